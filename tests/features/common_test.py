"""All feature maps of the registry through one battery of invariants."""

import contextlib
import copy
import dataclasses
import functools
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.testing import count_traces, tolerance
from tests.features import registry
from tests.features.registry import CASES, DIM, EXAMPLES, OUTPUTS

NUM_KEYS = 4096
CLOSE = tolerance("float32")

# Coupled directions change the law of the estimates, nothing else: where a map stands
# with both, the tests that are not statistical take the independent ones.
# One map of each kind is enough outside the slow tier: what shrinks, samples, expands
# into a series, keeps degrees exact.
LONG = (
    *("urf_shrunk_gelu", "exponential_shrunk", "exponential_exact_2_gaussian"),
    *("urf_sampled_sech_bias_gaussian", "urf_sampled_plain_gaussian"),
    *("urf_exact_0_bias_gaussian", "urf_exact_2_bias_gaussian"),
    *("urf_user_bias_gaussian", "urf_relu_bias_gaussian", "urf_tanh_bias_gaussian"),
    *("urf_shape_bias_gaussian", "arccos_2_gaussian", "polynomial_tensor_srht_bias"),
)
PLAIN = [
    pytest.param(case, marks=pytest.mark.slow) if case.name in LONG else case
    for case in CASES
    if not case.name.endswith("_orthogonal")
]
each_case = pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
each_unbiased_case = pytest.mark.parametrize(
    "case", [case for case in CASES if not case.biased], ids=lambda case: case.name
)
each_iid_case = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.features.projection == "gaussian"],
    ids=lambda case: case.name,
)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])


def x64(dtype):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def float64(*arrays):
    return [None if a is None else np.asarray(a, np.float64) for a in arrays]


def as_float32(a):
    """Casts, but leaves indices alone."""
    return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a


def setup(case, dtype="float32"):
    params = case.features.init(jax.random.key(3), DIM, jnp.dtype(dtype))
    return case.features, params, *case.inputs(dtype)


@functools.cache
def exact(case):
    x, kernel, bias = case.inputs()
    if case.expected is not None:
        x, kernel, bias = float64(x, kernel, bias)
        return case.expected(x @ kernel, np.zeros(OUTPUTS) if bias is None else bias)
    return np.asarray(case.features.exact(x, kernel, bias), np.float64)


@functools.cache
def estimates(case, features, seed=0):
    """Estimates under many keys, [keys, examples, outputs]."""
    x, kernel, bias = case.inputs()

    def one(key):
        params = features.init(key, DIM)
        return snnk.snnk_dense(features, params, x, kernel, bias)

    keys = jax.random.split(jax.random.key(seed), NUM_KEYS)
    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


def mean_squared_error(case, features, seed=0):
    """The error over keys and entries, and its standard error."""
    errors = estimates(case, features, seed) - exact(case)
    errors = np.mean(errors**2, axis=(1, 2))
    return errors.mean(), errors.std() / NUM_KEYS**0.5


# The registry itself.


def test_every_exported_map_is_registered():
    assert not registry.unregistered(snnk.features, CASES)


def test_unregistered_map_is_reported():
    class Stray(snnk.features.ArcCosine):
        pass

    module = types.SimpleNamespace(Stray=Stray, FeatureMap=snnk.features.FeatureMap)
    assert registry.unregistered(module, CASES) == {"Stray"}


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


# Shapes, batches, transformations.


@each_case
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_any_leading_dims_give_the_same_numbers(case, batch):
    features, params, _, kernel, bias = setup(case)
    x = jax.random.normal(jax.random.key(5), (6, DIM)) / DIM**0.5
    flat_phi = features.phi(params, x)
    flat_y = snnk.snnk_dense(features, params, x, kernel, bias)
    x = x.reshape(*batch, DIM) if batch else x[0]
    phi = features.phi(params, x)
    y = snnk.snnk_dense(features, params, x, kernel, bias)
    assert phi.shape == (*batch, features.num_features)
    assert y.shape == (*batch, OUTPUTS)
    assert features.exact(x, kernel, bias).shape == y.shape
    rows = 6 if batch else 1
    np.testing.assert_allclose(
        phi.reshape(rows, -1), flat_phi[:rows], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(y.reshape(rows, -1), flat_y[:rows], **CLOSE)


@each_case
def test_phi_maps_each_example_for_itself(case):
    features, params, x, _, _ = setup(case)
    phi = features.phi(params, x)
    np.testing.assert_allclose(features.phi(params, x[None]), phi[None], rtol=1e-6)
    for i in range(EXAMPLES):
        np.testing.assert_allclose(features.phi(params, x[i]), phi[i], **CLOSE)
    other = features.phi(params, x.at[0].set(9.0))
    np.testing.assert_allclose(other[1:], phi[1:], rtol=1e-6)


@each_case
def test_psi_column_depends_on_its_column_only(case):
    features, params, _, kernel, bias = setup(case)
    psi = features.psi(params, kernel, bias)
    assert psi.shape == (features.num_features, OUTPUTS)
    close = dict(CLOSE)
    if getattr(features, "shrinkage", False):
        # Sizes are fitted to references: rounding is relative to the largest.
        close["atol"] = 2e-5 * float(np.abs(psi).max())
    for j in range(OUTPUTS):
        column = slice(j, j + 1)
        alone = features.psi(
            params, kernel[:, column], None if bias is None else bias[column]
        )
        np.testing.assert_allclose(alone, psi[:, column], **close)
    moved = features.psi(
        params, kernel.at[:, 0].add(1.0), None if bias is None else bias.at[0].add(1.0)
    )
    np.testing.assert_allclose(moved[:, 1:], psi[:, 1:], rtol=1e-6)
    assert not np.allclose(moved[:, 0], psi[:, 0])


@each_case
def test_jit_vmap_and_eager_agree(case):
    features, params, x, kernel, bias = setup(case)

    def layer(params, x):
        return snnk.snnk_dense(features, params, x, kernel, bias)

    eager = layer(params, x)
    np.testing.assert_allclose(jax.jit(layer)(params, x), eager, **CLOSE)
    mapped = jax.vmap(layer, in_axes=(None, 0))(params, x)
    np.testing.assert_allclose(mapped, eager, **CLOSE)


@each_case
def test_layer_is_the_contraction_of_its_features(case):
    features, params, x, kernel, bias = setup(case)
    phi, psi = float64(features.phi(params, x), features.psi(params, kernel, bias))
    layer = snnk.snnk_dense(features, params, x, kernel, bias)
    np.testing.assert_allclose(layer, phi @ psi, **CLOSE)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.bias], ids=lambda case: case.name
)
def test_no_bias_is_zero_bias(case):
    features, params, _, kernel, bias = setup(case)
    with_zero = features.psi(params, kernel, jnp.zeros_like(bias))
    # Constants that XLA folds round in another order.
    np.testing.assert_allclose(
        features.psi(params, kernel), with_zero, rtol=1e-6, atol=1e-9
    )


# Parameters.


@each_case
def test_params_are_a_function_of_the_key(case):
    first, again, other = (
        case.features.init(jax.random.key(seed), DIM) for seed in (3, 3, 4)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    drawn = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    assert not all(np.allclose(a, b) for a, b in drawn)


@each_case
def test_init_under_jit_equals_eager(case):
    key = jax.random.key(3)
    compiled = jax.jit(lambda key: case.features.init(key, DIM))(key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **CLOSE),
        compiled,
        case.features.init(key, DIM),
    )


@each_case
@each_dtype
def test_params_are_real_and_of_the_dtype_asked_for(case, dtype):
    with x64(dtype):
        params = case.features.init(jax.random.key(0), DIM, jnp.dtype(dtype))
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
        # Indices are integers, everything else has the dtype.
        assert dtypes - {jnp.dtype("int32")} == {jnp.dtype(dtype)}


@each_case
def test_maps_hash_and_compare_by_value(case):
    features = case.features
    for twin in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        assert twin is not features
        assert twin == features
        assert hash(twin) == hash(features)
    assert case.replace(num_features=18) != features
    assert case.replace(precision="high") != features


@each_case
def test_equal_maps_compile_once(case):
    features, params, x, kernel, bias = setup(case)
    counted = count_traces(snnk.snnk_dense)
    layer = jax.jit(counted, static_argnums=0)
    layer(features, params, x, kernel, bias)
    layer(features, params, 2 * x, kernel, bias)
    layer(copy.deepcopy(features), params, x, kernel, bias)
    assert counted.traces == 1
    layer(case.replace(precision="highest"), params, x, kernel, bias)
    assert counted.traces == 2


# Dtypes.


@each_case
@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        *(pytest.param(f"float{n}", marks=pytest.mark.slow) for n in (32, 64)),
    ],
)
def test_dtype_in_is_dtype_out(case, dtype):
    with x64(dtype):
        features, same_params, x, kernel, bias = setup(case, dtype)
        float32_params = features.init(jax.random.key(3), DIM)
        for params in (same_params, float32_params):
            phi = features.phi(params, x)
            psi = features.psi(params, kernel, bias)
            layer = snnk.snnk_dense(features, params, x, kernel, bias)
            for result in (phi, psi, snnk.contract(phi, psi), layer):
                assert result.dtype == jnp.dtype(dtype)
        assert features.exact(x, kernel, bias).dtype == jnp.dtype(dtype)


@each_case
def test_bfloat16_is_float32_rounded(case):
    features, params, *inputs = setup(case, "bfloat16")
    x, kernel, bias = inputs
    phi, psi = features.phi(params, x), features.psi(params, kernel, bias)
    wide_params, wide = jax.tree.map(as_float32, (params, tuple(inputs)))
    wide_phi = features.phi(wide_params, wide[0])
    wide_psi = features.psi(wide_params, *wide[1:])
    # Same rounded inputs, wide inside: only the last rounding differs.
    rounding = {"rtol": 2.0**-8, "atol": 1e-5}
    np.testing.assert_allclose(*float64(phi, wide_phi), **rounding)
    np.testing.assert_allclose(*float64(psi, wide_psi), **rounding)
    np.testing.assert_allclose(
        *float64(
            snnk.snnk_dense(features, params, x, kernel, bias),
            snnk.snnk_dense(features, wide_params, *wide),
        ),
        **tolerance("bfloat16"),
    )


@each_case
def test_float64_computes_in_float64(case):
    with x64("float64"):
        features, params, x, kernel, bias = setup(case, "float64")
        layer = snnk.snnk_dense(features, params, x, kernel, bias)
        single = snnk.snnk_dense(
            features, *jax.tree.map(as_float32, (params, x, kernel, bias))
        )
        phi, psi = float64(features.phi(params, x), features.psi(params, kernel, bias))
        np.testing.assert_allclose(layer, phi @ psi, **tolerance("float64"))
        np.testing.assert_allclose(layer, single, **CLOSE)
        moved = snnk.snnk_dense(features, params, x * (1 + 1e-12), kernel, bias)
        if getattr(features, "order", 1) > 0:  # order 0 is piecewise constant
            change = np.max(np.abs(moved - layer))
            assert 1e-14 < change < 1e-10


# Gradients.


@each_case
@pytest.mark.parametrize(
    "at",
    [
        "zero_input",
        *(pytest.param(at, marks=pytest.mark.slow) for at in ("random", "zero_kernel")),
    ],
)
def test_gradients_are_finite(case, at):
    features, params, x, kernel, bias = setup(case)
    if at == "zero_input":
        x = jnp.zeros_like(x)
    if at == "zero_kernel":
        kernel = jnp.zeros_like(kernel)

    def loss(layer, weights):
        return jnp.sum(layer(*weights) ** 2)

    for layer in (
        functools.partial(snnk.snnk_dense, features, params),
        features.exact,
    ):
        grads = jax.grad(functools.partial(loss, layer))((x, kernel, bias))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        if at == "random" and getattr(features, "order", 1) > 0:
            assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


# Statistics over keys.


@each_unbiased_case
def test_unbiased(case):
    values = estimates(case, case.features)
    error = values.mean(axis=0) - exact(case)
    standard_error = values.std(axis=0, ddof=1) / NUM_KEYS**0.5
    assert np.all(standard_error < 0.05)  # small enough for a bias to show
    assert np.all(np.abs(error) < 4.5 * standard_error)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.variance is not None
        and (case.features.projection == "gaussian" or case.sketch)
    ],
    ids=lambda case: case.name,
)
def test_variance_is_the_formula(case):
    values = estimates(case, case.features)
    x, kernel, bias = float64(*case.inputs())
    bias = np.zeros(OUTPUTS) if bias is None else bias
    predicted = case.variance(case.features, x, kernel, bias)
    centred = values - values.mean(axis=0)
    variance = np.mean(centred**2, axis=0) * NUM_KEYS / (NUM_KEYS - 1)
    fourth = np.mean(centred**4, axis=0)
    standard_error = np.sqrt((fourth - variance**2) / NUM_KEYS)
    assert np.all(standard_error < 0.1 * predicted)
    assert np.all(np.abs(variance - predicted) < 5 * standard_error)


# Where the variance has a formula, it says how the error falls.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case.variance else ())
        for case in CASES
        if not case.biased
    ],
    ids=lambda case: case.name,
)
def test_error_falls_as_one_over_m(case):
    # Directions are whole orthogonal blocks of 4: the law is exact for one frequency.
    few, few_error = mean_squared_error(case, case.features)
    many, many_error = mean_squared_error(case, case.many, seed=1)
    noise = np.hypot(few_error / 4, many_error)
    assert noise < 0.35 * few / 4  # small enough for a wrong law to show
    # The directions of several frequencies are rounded to whole ones.
    assert many < few / 4 + 4.5 * noise + 0.1 * many
    # Stratified frequencies do better: their own noise falls as 1/m^3.
    stratified = "rates" in case.features.init(jax.random.key(0), DIM)
    assert many > (few / 64 if stratified else few / 4 - 4.5 * noise - 0.1 * many)


@pytest.mark.slow
@each_iid_case
def test_orthogonal_is_never_worse(case):
    orthogonal = case.replace(projection="orthogonal")
    iid, iid_error = mean_squared_error(case, case.features)
    coupled, coupled_error = mean_squared_error(case, orthogonal, seed=1)
    assert coupled < iid + 4 * np.hypot(iid_error, coupled_error)


# Errors.


@each_case
@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused(case):
    features, params, x, kernel, bias = setup(case)
    with pytest.raises(ValueError, match="inputs must have width 4"):
        features.phi(params, x[:, :3])
    with pytest.raises(ValueError, match="inputs must have width 4"):
        features.phi(params, x[0, 0])
    with pytest.raises(ValueError, match="inputs must have width 4"):
        features.psi(params, kernel[:3], bias)
    with pytest.raises(ValueError, match="must be real floating point. Got int32"):
        features.phi(params, jnp.ones((2, DIM), jnp.int32))
    with pytest.raises(ValueError, match="must be real floating point. Got complex64"):
        features.phi(params, x.astype(jnp.complex64))
    with pytest.raises(ValueError, match="must be real floating point. Got int32"):
        features.psi(params, jnp.ones((DIM, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"kernel \[d, o\] with the same d"):
        snnk.snnk_dense(features, params, x, kernel.T[:, :2], bias)
    words = r"shape \(3,\)" if case.bias else "no bias term|shape"
    with pytest.raises(ValueError, match=words):
        features.psi(params, kernel, jnp.zeros(OUTPUTS + 1))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "features",
    {type(case.features): case.features for case in CASES}.values(),
    ids=lambda features: type(features).__name__,
)
def test_wrong_fields_are_refused(features):
    def cls(**fields):
        return dataclasses.replace(features, **fields)

    with pytest.raises(ValueError, match="num_features must be a whole .* Got 0"):
        cls(num_features=0)
    with pytest.raises(ValueError, match="projection must be one of gaussian, orth"):
        cls(num_features=8, projection="diagonal")
    with pytest.raises(ValueError, match="precision must be None, 'default', 'high'"):
        cls(num_features=8, precision="low")
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls(num_features=8).num_features = 9
    with pytest.raises(ValueError, match="num and dim must be at least 1"):
        cls(num_features=8).init(jax.random.key(0), 0)
