"""Exact kernels against 40 digits, brute force, themselves in blocks, and misuse."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.infinite import _variance
from snnk_jax.testing import count_traces

infinite = snnk.infinite
PATH = pathlib.Path(__file__).parent.parent / "golden" / "infinite_kernels.json"
GOLDEN = json.loads(PATH.read_text())
PARAMETERS = {"hermite": {"n": 3}, "polynomial": {"coefficients": (0.5, -1.0, 0.25)}}
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((5, 5, 6, 3))
IMAGES[2] = IMAGES[0]


def network(name, depth, w_std, b_std):
    if name == "normalized_exponential":
        middle = infinite.Activation(infinite.NormalizedExponential())
    else:
        row = snnk.activations.get(name, **PARAMETERS.get(name, {}))
        middle = infinite.Activation(row)
    dense = infinite.Dense(w_std, b_std)
    return infinite.serial(*[dense, middle] * depth, dense)


def relu_network(depth=2, b_std=0.1):
    return network("relu", depth, 1.4, b_std)


def grouped():
    """Cases of equal networks together: inputs of several scales in one call."""
    groups = {}
    for case in GOLDEN["cases"]:
        near = len(case["x"]) > 3
        key = case["activation"], case["depth"], case["b_std"], near
        groups.setdefault(key, []).append(case)
    for (name, depth, b_std, near), cases in groups.items():
        quick = (depth == 2 and not near) or (near and (name, depth) == ("relu", 10))
        for dtype in ("float64", "float32"):
            now = quick and (dtype == "float64" or name == "relu")
            yield pytest.param(
                *(name, depth, b_std, near, cases, dtype),
                marks=() if now else pytest.mark.slow,
                id=f"{name}-{depth}-{b_std}-{near}-{dtype}",
            )


@pytest.mark.parametrize(
    ("name", "depth", "b_std", "near", "cases", "dtype"), list(grouped())
)
def test_kernels_to_forty_digits(name, depth, b_std, near, cases, dtype):
    """Norms from 1e-3 to 1e3; equal, opposite and nearly so."""
    net = network(name, depth, GOLDEN["w_std"], b_std)
    close = {"float64": 1e-10, "float32": 1e-5}[dtype] / (10 if near else 1)
    close = close / 10 if near and dtype == "float64" else close
    with jax.enable_x64(dtype == "float64"):
        size = len(cases[0]["x"])
        x = jnp.asarray(np.concatenate([case["x"] for case in cases]), dtype)
        kernels = net.kernel(x[::size], x)
        assert kernels.nngp.dtype == dtype
        for i, case in enumerate(cases):
            for part in ("nngp", "ntk"):
                own = np.array(case[f"{part}_diagonal"])
                scale = np.sqrt(own[0] * own)
                value = getattr(kernels, part)[i, i * size : (i + 1) * size]
                np.testing.assert_allclose(
                    value / scale, case[part] / scale, rtol=0, atol=close
                )


@pytest.mark.parametrize("channels", [4, pytest.param(80, marks=pytest.mark.slow)])
def test_blocks_triangles_and_rectangles_agree(channels):
    net = relu_network()
    x = jnp.asarray(RNG.standard_normal((23, channels)), jnp.float32)
    x = x.at[7].set(x[3]).at[11].set(-x[3]).at[13].set(0)
    whole = net.kernel(x)
    for part in ("nngp", "ntk"):
        expected = getattr(whole, part)
        np.testing.assert_array_equal(expected, expected.T)
        for size in (5, 8, 22):
            value = net.kernel(x, get=part, batch_size=size)
            np.testing.assert_array_equal(value, value.T)
            np.testing.assert_allclose(value, expected, atol=1e-6)
        value = net.kernel(x, x[4:15], part, batch_size=6)
        np.testing.assert_allclose(value, expected[:, 4:15], atol=1e-6)
    for rows, columns, values in infinite.blocks(net, np.asarray(x), batch_size=9):
        np.testing.assert_allclose(values, whole.ntk[rows, columns], atol=1e-6)


def test_duplicates_in_a_wide_block_are_found():
    """Few of them and many, where differences of coordinates are not always taken."""
    net = network("relu", 1, 1.0, 0.0)
    x = RNG.standard_normal((40, 100)).astype(np.float32)
    for num in (2, 40):
        y = RNG.standard_normal((40, 100)).astype(np.float32)
        y[:num] = x[:num]
        if num == 40:
            y[:] = x[:1] * np.linspace(0.5, 2, 40)[:, None]
            x[:] = x[:1]
        p, r = np.sum(np.float64(x) ** 2, 1) / 100, np.sum(np.float64(y) ** 2, 1) / 100
        ntk = net.kernel(jnp.asarray(x), jnp.asarray(y), "ntk")
        for i in range(num):
            np.testing.assert_allclose(ntk[i, i], np.sqrt(p[i] * r[i]), rtol=1e-6)


@pytest.mark.slow
def test_rows_over_devices_are_the_same_kernel(mesh):
    net = relu_network()
    for n in (16, 21):
        x = jnp.asarray(RNG.standard_normal((n, 6)), jnp.float32)
        whole, shared = net.kernel(x), net.kernel(x, mesh=mesh, batch_size=2)
        np.testing.assert_allclose(shared.ntk, whole.ntk, atol=1e-6)
        np.testing.assert_allclose(shared.nngp, whole.nngp, atol=1e-6)
        value = net.kernel(x, x[:5], "ntk", mesh=mesh)
        np.testing.assert_allclose(value, whole.ntk[:, :5], atol=1e-6)
        if n == 16:
            assert len(shared.ntk.sharding.device_set) == mesh.size
            assert not shared.ntk.sharding.is_fully_replicated


def patches(x, window, strides, padding):
    """What each position of a filter sees, [n, h, w, all of it]."""
    pads = [(0, 0), (0, 0), (0, 0), (0, 0)]
    for axis, (size, step) in enumerate(zip(window, strides, strict=True), 1):
        extent = x.shape[axis]
        if padding == "SAME":
            total = max((-(-extent // step) - 1) * step + size - extent, 0)
            pads[axis] = total // 2, total - total // 2
        elif padding == "CIRCULAR":
            pads[axis] = (size - 1) // 2, size // 2
    x = np.pad(x, pads, mode="wrap" if padding == "CIRCULAR" else "constant")
    tops = range(0, x.shape[1] - window[0] + 1, strides[0])
    lefts = range(0, x.shape[2] - window[1] + 1, strides[1])
    cut = [
        [x[:, i : i + window[0], j : j + window[1]].reshape(len(x), -1) for j in lefts]
        for i in tops
    ]
    return np.stack([np.stack(row, 1) for row in cut], 1)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_convolutions_see_their_patches(padding, strides):
    seen = patches(IMAGES, (3, 2), strides, padding)
    k = 1.69 * np.einsum("ahwf,bijf->abhwij", seen, seen) / seen.shape[-1] + 0.04
    conv = infinite.Conv((3, 2), strides, padding, 1.3, 0.2)
    flat = np.einsum("abijij->abij", k).mean((2, 3))
    with jax.enable_x64(True):
        x = jnp.asarray(IMAGES)
        for last, mean in (
            (infinite.Flatten(), flat),
            (infinite.GlobalAvgPool(), k.mean((2, 3, 4, 5))),
        ):
            value = infinite.serial(conv, last, infinite.Dense(0.7, 0.1)).kernel(x)
            nngp = 0.49 * mean + 0.01
            np.testing.assert_allclose(value.nngp, nngp, rtol=1e-12)
            np.testing.assert_allclose(value.ntk, nngp + 0.49 * mean, rtol=1e-12)


def layers_of(name):
    conv = infinite.Conv((3, 3), None, "SAME", 1.4, 0.1)
    after = infinite.Conv((3, 3), (2, 2), "SAME", 1.4, 0.0)
    middle = infinite.Activation(name)
    return conv, infinite.LayerNorm(), middle, after, middle


@pytest.mark.parametrize("name", ["relu", pytest.param("gelu", marks=pytest.mark.slow)])
def test_equal_positions_are_part_of_all_pairs(name):
    """The same network by both routes: a pool over one position changes nothing."""
    layers, dense = layers_of(name), infinite.Dense(1.0, 0.3)
    short = infinite.serial(*layers, infinite.Flatten(), dense)
    pooled = infinite.AvgPool((1, 1))
    long = infinite.serial(*layers, pooled, infinite.Flatten(), dense)
    with jax.enable_x64(True):
        x = jnp.asarray(IMAGES)
        expected = short.kernel(x)
        for net in (short, long):
            value = net.kernel(x, x, batch_size=2)
            np.testing.assert_allclose(value.ntk, expected.ntk, rtol=2e-8)
            np.testing.assert_allclose(value.nngp, expected.nngp, rtol=1e-11)
    np.testing.assert_allclose(expected.ntk[0], expected.ntk[2], rtol=1e-14)
    np.testing.assert_allclose(expected.ntk[0, 2], expected.ntk[0, 0], rtol=1e-14)


def test_layer_norm_and_residual_by_their_formulas():
    x = RNG.standard_normal((4, 3))
    k = x @ x.T / 3
    root = np.sqrt(np.outer(np.diag(k), np.diag(k)))
    with jax.enable_x64(True):
        value = infinite.serial(
            infinite.LayerNorm(),
            infinite.Residual(infinite.Dense(2.0)),
            infinite.Dense(0.5, 1.0),
        ).kernel(jnp.asarray(x))
    once = k / root
    np.testing.assert_allclose(value.nngp, 0.25 * 5 * once + 1)
    np.testing.assert_allclose(value.ntk, 0.25 * 5 * once + 1 + 0.25 * 4 * once)


def test_branches_add_like_a_residual():
    branch = infinite.serial(infinite.Activation("erf"), infinite.Dense(1.2, 0.4))
    dense = infinite.Dense(1.1, 0.2)
    one = infinite.serial(dense, infinite.Residual(branch), dense)
    other = infinite.serial(
        dense,
        infinite.FanOut(2),
        infinite.parallel(infinite.Identity(), branch),
        infinite.FanInSum(),
        dense,
    )
    x = jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)
    for a, b in zip(one.kernel(x), other.kernel(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "relu",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gelu", "sign", "tanh", "elu")
        ),
    ],
)
def test_gradients_are_finite_and_right(name):
    """At equal, opposite and zero inputs finite; elsewhere those of differences."""
    net = network(name, 2, 1.3, 0.0)
    x = RNG.standard_normal((5, 4))
    x[1], x[2], x[3] = x[0], -x[0], 0
    with jax.enable_x64(True):
        x = jnp.asarray(x)

        def total(x, y):
            return sum(k.sum() for k in net.kernel(x, y))

        slope = jax.jit(jax.grad(total))(x, x)
        assert np.isfinite(slope).all()
        u, v = x[:1], x[4:]
        value, step = jax.grad(total)(u, v), 1e-6
        for i in range(4):
            move = step * jnp.eye(4)[i][None]
            numeric = (total(u + move, v) - total(u - move, v)) / (2 * step)
            np.testing.assert_allclose(value[0, i], numeric, rtol=1e-5, atol=1e-7)
    y = x.astype(jnp.float32)
    slope = jax.grad(lambda y: sum(k.sum() for k in net.kernel(y, batch_size=2)))(y)
    assert np.isfinite(slope).all()


@pytest.mark.slow
def test_gradients_of_images_are_finite():
    net = infinite.serial(
        *layers_of("relu"), infinite.GlobalAvgPool(), infinite.Dense()
    )
    x = jnp.asarray(IMAGES[:3, :3, :3], jnp.float32).at[1].set(0)
    assert np.isfinite(jax.grad(lambda x: net.kernel(x, get="ntk").sum())(x)).all()


def test_kernels_are_positive_definite_and_compile_once():
    net = relu_network(3)
    x = jnp.asarray(RNG.standard_normal((50, 8)), jnp.float32)
    kernels = net.kernel(x)
    for k in kernels:
        assert np.linalg.eigvalsh(np.float64(k)).min() > -1e-5
    assert net.kernel(x, get=["nngp"]).ntk is None
    counted = count_traces(lambda x: relu_network(3).kernel(x, get="ntk"))
    compiled = jax.jit(counted)
    np.testing.assert_allclose(compiled(x), kernels.ntk, rtol=1e-5, atol=1e-6)
    compiled(x + 1)
    assert counted.traces == 1
    assert relu_network(3) == relu_network(3)
    assert hash(relu_network(3)) == hash(relu_network(3))


def test_bfloat16_inputs_are_computed_in_single_precision():
    x = jnp.asarray(RNG.standard_normal((3, 4)), jnp.bfloat16)
    value = relu_network().kernel(x, get="ntk")
    assert value.dtype == jnp.float32
    expected = relu_network().kernel(x.astype(jnp.float32), get="ntk")
    np.testing.assert_array_equal(value, expected)


def test_numpy_inputs_in_double_precision_are_computed_in_that_of_jax(
    unchecked, recwarn
):
    x = RNG.standard_normal((3, 4))
    value = relu_network().kernel(x, x[:2], get="ntk")
    assert value.dtype == jnp.float32
    assert not [str(w.message) for w in recwarn if "float64" in str(w.message)]


def test_variances_are_the_diagonal():
    x = jnp.asarray(IMAGES, jnp.float32)
    net = infinite.serial(
        *layers_of("relu"),
        infinite.Flatten(),
        infinite.FanOut(2),
        infinite.parallel(infinite.Dense(0.4, 0.5), infinite.Dense(2.0)),
        infinite.FanInSum(),
        infinite.Residual(infinite.Dense()),
        infinite.Identity(),
    )
    p = _variance.variance(net, _variance.input_variance(x))
    diagonal = np.diag(net.kernel(x, get="nngp"))
    np.testing.assert_allclose(p, diagonal, rtol=1e-5)
    with pytest.raises(ValueError, match="must not mix positions by a mean"):
        _variance.variance(infinite.GlobalAvgPool(), p)


@pytest.mark.usefixtures("unchecked")
def test_networks_without_these_formulas_are_refused():
    dense, act, serial = infinite.Dense(), infinite.Activation("relu"), infinite.serial
    both = infinite.parallel(dense, dense)
    x = jnp.ones((2, 3))
    refused = {
        "must come after a Dense or Conv": [
            serial(act),
            serial(dense, act, act),
            serial(dense, infinite.Residual(serial(act, dense)), act, act),
            serial(infinite.Conv((1,)), infinite.Flatten(), act, dense),
        ],
        "branches of .* must be independent": [
            serial(dense, infinite.Residual(act)),
            serial(
                dense,
                infinite.FanOut(2),
                infinite.parallel(act, infinite.Identity()),
                infinite.FanInSum(),
            ),
        ],
        "must follow the branches of one parallel": [serial(infinite.FanInSum())],
        "parallel must follow a FanOut": [
            serial(both),
            serial(infinite.FanOut(3), both, infinite.FanInSum()),
        ],
        "while branches are open": [serial(infinite.FanOut(2), dense)],
        "FanInSum is missing": [serial(infinite.FanOut(2), both)],
    }
    for message, networks in refused.items():
        for net in networks:
            with pytest.raises(ValueError, match=message):
                net.kernel(x)


@pytest.mark.usefixtures("unchecked")
def test_wrong_layers_are_refused():
    for bad in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="w_std must be finite and at least 0"):
            infinite.Dense(bad)
        with pytest.raises(ValueError, match="b_std must be finite and at least 0"):
            infinite.Conv((3,), b_std=bad)
    with pytest.raises(ValueError, match="filter_shape must be positive integers"):
        infinite.Conv((0, 3))
    for bad in ((2.7,), 3, "3"):
        with pytest.raises(ValueError, match="must be positive integers. Got"):
            infinite.Conv(bad)
    with pytest.raises(ValueError, match="strides must be positive .* Got .1.5,"):
        infinite.AvgPool((2,), (1.5,))
    with pytest.raises(ValueError, match="window_shape must be positive integers"):
        infinite.AvgPool(())
    with pytest.raises(ValueError, match="strides must be positive integers, one for"):
        infinite.Conv((3, 3), (1,))
    with pytest.raises(ValueError, match="padding must be one of SAME, VALID, CIRC"):
        infinite.AvgPool((2, 2), padding="FULL")
    for bad in (0, 2.7, "2"):
        with pytest.raises(ValueError, match=f"num must be a whole .* Got {bad!r}"):
            infinite.FanOut(bad)
    with pytest.raises(ValueError, match="layers must be at least one layer"):
        infinite.serial()
    with pytest.raises(ValueError, match="layers must be layers of snnk_jax.infinite"):
        infinite.parallel("relu")
    with pytest.raises(ValueError, match="activation must be one of"):
        infinite.Activation("rellu")


@pytest.mark.usefixtures("unchecked")
def test_wrong_inputs_are_refused():
    net, x = relu_network(), jnp.ones((2, 3))
    image = jnp.ones((2, 4, 4, 3))
    for wrong in ("both", (), ("ntk", "gp")):
        with pytest.raises(ValueError, match="get must name nngp, ntk or both"):
            net.kernel(x, get=wrong)
    with pytest.raises(ValueError, match="x1 must be floating-point. Got int32"):
        net.kernel(jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"x1 must be \[n, \*positions, channels\]"):
        net.kernel(jnp.ones(3))
    with pytest.raises(ValueError, match="x2 must have the shape and dtype of x1"):
        net.kernel(x, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="batch_size must be at least 1. Got 0"):
        net.kernel(x, batch_size=0)
    with pytest.raises(ValueError, match="network must end without positions"):
        net.kernel(image)
    with pytest.raises(ValueError, match="Flatten must follow layers with positions"):
        infinite.Flatten().kernel(x)
    with pytest.raises(ValueError, match="one extent for each of the 0 spatial axes"):
        infinite.Conv((3, 3)).kernel(x)
    valid = infinite.serial(infinite.Conv((5, 5), None, "VALID"), infinite.Flatten())
    with pytest.raises(ValueError, match="positions must be at least the window 5"):
        valid.kernel(image)
