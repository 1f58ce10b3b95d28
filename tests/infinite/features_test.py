"""Feature maps of infinite networks against their exact kernels."""

import contextlib
import copy
import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.testing import count_traces

infinite = snnk.infinite
DIM, KEYS = 5, 512


def activation(name, **parameters):
    return infinite.Activation(snnk.activations.get(name, **parameters))


def mlp(layer, depth=1):
    hidden = [infinite.Dense(1.3, 0.2), layer]
    return infinite.serial(*hidden * depth, infinite.Dense(1.1, 0.3))


def conv(strides=None, padding="SAME"):
    return infinite.Conv((3, 3), strides, padding, w_std=1.4, b_std=0.1)


RELU = activation("relu")
CONV = infinite.serial(
    conv(),
    RELU,
    infinite.AvgPool((2, 2)),
    infinite.GlobalAvgPool(),
    infinite.Dense(1.0),
)


def vectors(dtype="float32"):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, DIM)) * np.array([0.3, 1.0, 2.0, 1.0])[:, None]
    x[3] = x[1] + 0.2 * x[3]
    return jnp.asarray(x, dtype)


def images(dtype="float32", n=3):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, 4, 4, 2))
    x[1] = 0.8 * x[0] + 0.4 * x[1]
    return jnp.asarray(x, dtype)


def error(features, x, seed=0):
    exact = np.asarray(features.net.kernel(x, get=features.kind), np.float64)
    params = features.init(jax.random.key(seed), x.shape[1:])
    phi = np.asarray(features.phi(params, x), np.float64)
    assert phi.shape == (len(x), features.num_features)
    return np.linalg.norm(phi @ phi.T - exact) / np.linalg.norm(exact)


# Statistics over keys. With a single activation and no correction of norms every map
# is unbiased; with more the features below make the next ones biased by 1 / width.

UNBIASED = {
    "relu": (mlp(RELU), vectors, {}),
    "relu_plain": (mlp(RELU), vectors, {"exact": False, "projection": "gaussian"}),
    "relu_spherical": (mlp(RELU), vectors, {"exact": False, "projection": "spherical"}),
    "gelu": (mlp(activation("gelu")), vectors, {"projection": "gaussian"}),
    "sin": (mlp(activation("sin", b=1.5, c=0.3)), vectors, {}),
    "sign": (mlp(activation("sign")), vectors, {}),
    "cubic_sketch": (
        mlp(activation("polynomial", coefficients=(0.2, 0.7, -0.3, 0.1))),
        vectors,
        {"method": "sketch", "degree": 3},
    ),
    "exponential": (
        mlp(infinite.Activation(infinite.NormalizedExponential())),
        vectors,
        {"degree": 12},
    ),
    "conv": (CONV, images, {}),
}


@functools.cache
def grams(name, kind, num_features):
    net, inputs, options = UNBIASED[name]
    features = net.features(num_features, kind=kind, normalize=False, **options)
    x = inputs()

    def one(key):
        phi = features.phi(features.init(key, x.shape[1:]), x)
        return jnp.matmul(phi, phi.T, precision="highest")

    keys = jax.random.split(jax.random.key(0), KEYS)
    values = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=64))(keys)
    return np.asarray(values, np.float64), np.asarray(net.kernel(x, get=kind))


SLOW = [
    pytest.param(name, marks=() if name == "relu" else pytest.mark.slow)
    for name in UNBIASED
]


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
@pytest.mark.parametrize("name", SLOW)
def test_unbiased(name, kind):
    values, exact = grams(name, kind, 32)
    deviation = values.std(axis=0) / KEYS**0.5
    assert np.median(deviation) < 0.03 * np.abs(exact).max()
    wrong = np.abs(values.mean(axis=0) - exact)
    assert np.all(wrong < 4.5 * deviation + 2e-4 * np.abs(exact).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    # 32 columns hold no exact copies of patches, and more of them pay twice.
    [("relu_plain", 32), ("cubic_sketch", 32), ("conv", 128)],
)
def test_variance_falls_as_one_over_the_features(name, least):
    few, many = (
        np.mean(np.var(grams(name, "ntk", m)[0], axis=0)) for m in (least, 4 * least)
    )
    assert 3 < few / many < 6, (few, many)


@pytest.mark.slow
def test_error_falls_as_the_root_of_the_features():
    x = jax.random.normal(jax.random.key(0), (64, 32))
    net = infinite.serial(*[infinite.Dense(2**0.5), RELU] * 2, infinite.Dense(2**0.5))
    few, many = (
        np.mean([error(net.features(m), x, seed) for seed in range(3)])
        for m in (256, 4096)
    )
    slope = np.log(many / few) / np.log(16)
    assert -0.65 < slope < -0.4


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "limit"), [(1, 0.04), (2, 0.05)])
def test_half_the_error_of_published_maps(depth, limit):
    # arXiv 2106.07880 and 2209.04121 as released: 0.10 with 4096 columns.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 64)), jnp.float32)
    net = infinite.serial(
        *[infinite.Dense(2**0.5), RELU] * depth, infinite.Dense(2**0.5)
    )
    assert error(net.features(4096), x) < limit


def myrtle5():
    layers = []
    for letter in "aapapa":
        if letter == "a":
            layers += [infinite.Conv((3, 3), w_std=2**0.5), RELU]
        else:
            layers.append(infinite.AvgPool((2, 2)))
    return infinite.serial(*layers, infinite.GlobalAvgPool(), infinite.Dense(2**0.5))


@pytest.mark.slow
def test_myrtle5_within_five_per_cent(data_dir):
    from experiments.data import load

    data = load("cifar10_jpeg", image_size=16, directory=str(data_dir("cifar10_jpeg")))
    x = data.test.__getitems__(np.arange(12))["image"].astype(np.float32)
    x = x - x.mean(axis=(1, 2, 3), keepdims=True)
    x = jnp.asarray(x / x.std(axis=(1, 2, 3), keepdims=True))
    features = myrtle5().features(2048, width=(128, 128, 256))
    assert np.mean([error(features, x, seed) for seed in range(3)]) < 0.05


# Layers.

NETS = {
    "erf_deep": (mlp(activation("erf"), 2), vectors),
    "tanh": (mlp(activation("tanh")), vectors),
    "norm": (
        infinite.serial(
            infinite.Dense(1.3, 0.1),
            RELU,
            infinite.Dense(1.0),
            infinite.LayerNorm(),
            activation("gelu"),
            infinite.Dense(1.0),
        ),
        vectors,
    ),
    "stride_circular": (
        infinite.serial(
            conv((2, 2)),
            activation("gelu"),
            conv(None, "CIRCULAR"),
            RELU,
            infinite.GlobalAvgPool(),
            infinite.Dense(1.4),
        ),
        images,
    ),
    "residual": (
        infinite.serial(
            conv(None, "VALID"),
            infinite.Residual(infinite.serial(RELU, conv())),
            RELU,
            infinite.Flatten(),
            infinite.Dense(1.0),
        ),
        images,
    ),
    "branches": (
        infinite.serial(
            infinite.Dense(1.2),
            infinite.FanOut(2),
            infinite.parallel(
                infinite.Identity(), infinite.serial(RELU, infinite.Dense(0.8))
            ),
            infinite.FanInSum(),
            RELU,
            infinite.Dense(1.0),
        ),
        vectors,
    ),
}
QUICK = (("stride_circular", "ntk"),)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(NETS, ("nngp", "ntk"))
    ],
)
def test_every_layer_tends_to_its_exact_kernel(name, kind):
    net, inputs = NETS[name]
    assert error(net.features(2048, kind=kind, width=512), inputs()) < 0.06


@pytest.mark.slow
def test_norms_are_exact_without_pools():
    x = vectors()
    net = mlp(RELU, 2)
    features = net.features(256, width=64)
    phi = features.phi(features.init(jax.random.key(0), (DIM,)), x)
    exact = jnp.diagonal(net.kernel(x, get="ntk"))
    np.testing.assert_allclose(jnp.sum(phi * phi, axis=1), exact, rtol=1e-4)


def test_degrees_zero_and_one_are_exact():
    # Nothing is left for random features, whatever their number.
    linear = activation("polynomial", coefficients=(0.4, 0.9))
    features = mlp(linear, 2).features(64, width=16, kind="nngp")
    assert error(features, vectors()) < 1e-5


def test_gradient_features_are_the_gradients():
    net = infinite.serial(infinite.Dense(1.3), RELU, infinite.Dense(1.0))
    features = net.features(4000, method="gradient")
    x = vectors()
    params = features.init(jax.random.key(0), (DIM,))
    (weights,) = params
    phi = features.phi(params, x)
    width = weights[0]["kernel"].shape[1]
    used = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert used <= 4000 < used + 7  # one unit more has d + 2 parameters
    z = 1.3 * DIM**-0.5 * x @ weights[0]["kernel"]
    hidden, slope = jax.nn.relu(z), (z > 0).astype(z.dtype)
    back = slope * weights[2]["kernel"][:, 0][None]
    expected = (hidden @ hidden.T + (back @ back.T) * (x @ x.T) * 1.69 / DIM) / width
    np.testing.assert_allclose(phi @ phi.T, expected, rtol=1e-3, atol=1e-4)


# Shapes, batches, transformations, dtypes.


@pytest.mark.parametrize(("num", "kind"), [(1, "ntk"), (7, "ntk"), (63, "nngp")])
def test_exactly_as_many_columns_as_asked_for(num, kind):
    features = mlp(RELU, 2).features(num, kind=kind, width=16)
    phi = features.phi(features.init(jax.random.key(0), (DIM,)), vectors())
    assert phi.shape == (4, num)
    assert not jnp.iscomplexobj(phi)
    assert np.all(np.isfinite(phi))


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(mlp(RELU), id="dense", marks=pytest.mark.slow),
        pytest.param(CONV, id="conv"),
    ],
)
def test_examples_do_not_see_each_other(net):
    x = vectors() if net is not CONV else images(n=5)
    features = net.features(64, width=16, batch_size=2)
    params = features.init(jax.random.key(0), x.shape[1:])
    phi = features.phi(params, x)
    whole = net.features(64, width=16, batch_size=8)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(whole.phi(params, x), phi, **close)
    np.testing.assert_allclose(features.phi(params, x[1:2]), phi[1:2], **close)
    mapped = jax.vmap(lambda one: features.phi(params, one[None])[0])(x)
    np.testing.assert_allclose(mapped, phi, **close)


@pytest.mark.slow
def test_time_is_linear_in_positions_and_memory_not_in_examples():
    features = CONV.features(128, width=32, batch_size=4)

    def compiled(side, n):
        shape = (side, side, 2)
        params = jax.eval_shape(lambda: features.init(jax.random.key(0), shape))
        x = jax.ShapeDtypeStruct((n, *shape), jnp.float32)
        return jax.jit(features.phi).lower(params, x).compile()

    small, large = (compiled(side, 4).cost_analysis()["flops"] for side in (16, 32))
    assert 3.3 < large / small < 4.3
    few, many = (compiled(16, n).memory_analysis() for n in (8, 64))
    assert many.temp_size_in_bytes < 1.5 * few.temp_size_in_bytes


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(mlp(RELU), id="dense"),
        pytest.param(CONV, id="conv", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_finite_at_zero_and_at_twins(net):
    x = vectors() if net is not CONV else images()
    x = x.at[0].set(0.0).at[1].set(x[2])
    features = net.features(32, width=8)
    params = features.init(jax.random.key(0), x.shape[1:])
    phi = features.phi(params, x)
    assert np.all(np.isfinite(phi))
    weights = jax.random.normal(jax.random.key(1), phi.shape)
    gradient = jax.grad(lambda x: jnp.sum(weights * features.phi(params, x)))(x)
    assert np.all(np.isfinite(gradient))
    assert float(jnp.abs(gradient[2]).max()) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_is_kept(dtype):
    wide = jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
    with wide:
        features = mlp(RELU).features(64)
        params = features.init(jax.random.key(0), (DIM,), jnp.dtype(dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        phi = features.phi(params, vectors(dtype))
        assert phi.dtype == jnp.dtype(dtype)
    params = features.init(jax.random.key(0), (DIM,))
    other = features.phi(params, vectors())
    close = 3e-2 if dtype == "bfloat16" else 1e-4
    np.testing.assert_allclose(
        np.asarray(phi, np.float32), other, atol=close * float(jnp.abs(other).max())
    )


def test_maps_compare_by_value_and_compile_once():
    features = mlp(RELU).features(32)
    for twin in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        assert twin == features
        assert hash(twin) == hash(features)
    counted = count_traces(lambda f, params, x: f.phi(params, x))
    phi = jax.jit(counted, static_argnums=0)
    params = features.init(jax.random.key(0), (DIM,))
    phi(features, params, vectors())
    phi(copy.deepcopy(features), params, 2 * vectors())
    assert counted.traces == 1


def test_the_key_decides():
    features = mlp(RELU).features(32)
    first, again, other = (
        features.init(jax.random.key(seed), (DIM,)) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.allclose(
        features.phi(first, vectors()), features.phi(other, vectors())
    )


# Suggestions.


@pytest.mark.slow
def test_suggested_features_meet_the_target():
    x = jax.random.normal(jax.random.key(0), (24, 16))
    net = mlp(activation("gelu"))
    found = infinite.suggest_features(net, x, 0.02, jax.random.key(1))
    assert found.error <= 0.02
    assert found.num_features % 64 == 0
    reached = np.mean([error(net.features(found.num_features), x, s) for s in (5, 6)])
    assert reached < 1.4 * 0.02


def test_suggested_degree_is_the_least():
    cubic = activation("polynomial", coefficients=(0.0, 1.0, 0.0, 1.0))
    found = infinite.suggest_features(
        mlp(cubic), vectors(), 1e-3, jax.random.key(0), kind="nngp"
    )
    assert found.degree == 3
    assert found.truncation < 1e-5
    steep = infinite.serial(infinite.Dense(8.0), activation("erf", b=20.0))
    found = infinite.suggest_features(
        steep, vectors(), 1e-3, jax.random.key(0), kind="nngp"
    )
    assert found.degree is None
    assert found.truncation > 5e-4


# Errors.

DENSE = mlp(RELU)


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (DENSE, {"kind": "cntk"}, "kind must be 'ntk' or 'nngp'"),
        (DENSE, {"method": "magic"}, "method must be one of auto"),
        (DENSE, {"num_features": 0}, "num_features must be at least 1"),
        (DENSE, {"degree": 0}, "degree must be at least 1"),
        (DENSE, {"batch_size": -1}, "batch_size must be at least 0"),
        (DENSE, {"width": -1}, "width must not be negative"),
        (DENSE, {"width": (4,)}, "width must be one positive number for each of 0"),
        (DENSE, {"precision": "low"}, "precision must be None"),
        (DENSE, {"projection": "sobel"}, "projection must be one of"),
        (DENSE, {"projection": "spherical"}, "projection must be 'orthogonal'"),
        (DENSE, {"method": "gradient", "kind": "nngp"}, "kind must be 'ntk' for"),
        (
            infinite.serial(infinite.Dense(), RELU),
            {"method": "gradient"},
            "net must end in a Dense",
        ),
        (
            mlp(infinite.Activation("sign", jumps=True)),
            {},
            "jumps must be False",
        ),
        (
            mlp(infinite.Activation(infinite.NormalizedExponential())),
            {"method": "random"},
            "method must be 'sketch' or 'auto'",
        ),
    ],
)
def test_wrong_fields_are_refused(unchecked, net, options, message):
    with pytest.raises(ValueError, match=message):
        net.features(**{"num_features": 8, **options})


def test_networks_without_a_kernel_have_no_features(unchecked):
    dense, identity = infinite.Dense(), infinite.Identity()
    twice = infinite.parallel(identity, identity)
    for net, message in (
        (infinite.serial(RELU, dense), "must come after a Dense or Conv"),
        (
            infinite.serial(dense, infinite.FanOut(2), twice, infinite.FanInSum()),
            "branches of .* must be independent",
        ),
        (
            infinite.serial(dense, twice, infinite.FanInSum()),
            "parallel must follow a FanOut",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            net.features(8)
        with pytest.raises(ValueError, match=message):
            infinite.LandmarkFeatures(net=net)


def test_wrong_inputs_are_refused(unchecked):
    key, features = jax.random.key(0), DENSE.features(8)
    params = features.init(key, (DIM,))
    with pytest.raises(ValueError, match="inputs must be"):
        features.phi(params, jnp.ones(DIM))
    with pytest.raises(ValueError, match="inputs must be real floating"):
        features.phi(params, jnp.ones((2, DIM), jnp.int32))
    with pytest.raises(ValueError, match="shape that params were drawn for. Got .4"):
        features.phi(params, jnp.ones((2, DIM - 1)))
    with pytest.raises(ValueError, match="input_shape must be positive"):
        features.init(key, ())
    open_end = infinite.serial(conv(), RELU, infinite.Dense(1.0))
    with pytest.raises(ValueError, match="net must end without positions"):
        open_end.features(8, width=()).init(key, (4, 4, 2))
    flat = infinite.serial(conv(), RELU, infinite.Flatten(), infinite.Dense(1.0))
    with pytest.raises(ValueError, match="window must have one extent"):
        flat.features(8).init(key, (4, 2))
    with pytest.raises(ValueError, match="num_features must be at least"):
        DENSE.features(3, method="gradient").init(key, (DIM,))
    with pytest.raises(ValueError, match="target_error must be in"):
        infinite.suggest_features(DENSE, vectors(), 0.0, key)
    with pytest.raises(ValueError, match="x must hold at least two"):
        infinite.suggest_features(DENSE, vectors()[:1], 0.1, key)
