import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.bundling import bundle, counts, merge_bias, merge_readout
from snnk_jax.features import URF, AppendOne, ArcCosine, Exponential, Polynomial
from snnk_jax.testing import count_traces, tolerance

DIM = 6
CLOSE = tolerance("float32")
KEY = jax.random.key(0)
ARC = ArcCosine(num_features=16)
COS = URF(activation="cos", num_features=64)


def network(widths, norm=0.5, dtype="float32"):
    """Kernels of columns of one norm, biases, and unit inputs."""
    rng = np.random.default_rng(1)
    kernels, biases = [], []
    for rows, columns in zip((DIM, *widths), widths, strict=False):
        kernel = rng.normal(size=(rows, columns))
        kernels.append(norm * kernel / np.linalg.norm(kernel, axis=0))
        biases.append(rng.normal(size=columns))
    x = rng.normal(size=(5, DIM))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cast = lambda arrays: [jnp.asarray(a, dtype) for a in arrays]  # noqa: E731
    return cast(kernels), cast(biases), jnp.asarray(x, dtype)


def part(net, level):
    prefix = f"map{level}_"
    return {
        k.removeprefix(prefix): v for k, v in net.params.items() if k.startswith(prefix)
    }


# Merging.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_merged_layer_is_the_two_layers(dtype):
    with jax.enable_x64(dtype == "float64"):
        (kernel, following), (bias, last), x = network((9, 4), dtype=dtype)
        params = COS.init(KEY, DIM, jnp.dtype(dtype))
        psi = COS.psi(params, kernel, bias)
        extra = jnp.ones(9, dtype)
        merged = merge_readout(psi, following)
        merged_bias = merge_bias(extra, following, last)
        assert merged.dtype == merged_bias.dtype == jnp.dtype(dtype)
        phi = COS.phi(params, x)
        expected = (snnk.contract(phi, psi) + extra[None]) @ following + last[None]
        actual = snnk.contract(phi, merged) + merged_bias[None]
        scale = float(abs(expected).max())
        np.testing.assert_allclose(
            actual.astype(float) / scale,
            expected.astype(float) / scale,
            atol=10 * tolerance(dtype)["atol"],
        )


def test_biases_merge_where_there_are_any():
    kernel, bias, last = jnp.arange(6.0).reshape(3, 2), jnp.ones(3), jnp.ones(2)
    assert merge_bias(None, kernel, None) is None
    np.testing.assert_array_equal(merge_bias(None, kernel, last), [1, 1])
    np.testing.assert_array_equal(merge_bias(bias, kernel, None), [6, 9])
    np.testing.assert_array_equal(merge_bias(bias, kernel, last), [7, 10])


# Bundling.


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rectifiers_bundle_as_their_formulas_say(depth, with_bias):
    # By hand, in float64: T_{k+1} = Psi_k W_{k+1}, and a linear layer last.
    kernels, biases, x = network((*(9, 7, 8)[:depth], 3))
    hidden, kernel = np.asarray(x, float), np.asarray(kernels[0], float)
    net = bundle(kernels, biases if with_bias else None, [ARC] * depth, KEY)
    for k in range(depth):
        if with_bias:
            hidden = np.concatenate([hidden, np.ones((5, 1))], axis=1)
            kernel = np.concatenate([kernel, np.asarray(biases[k])[None]])
        omega = np.asarray(part(net, k)["omega"], float)
        rectified = lambda z: np.sqrt(2 / 16) * np.maximum(z, 0)  # noqa: E731
        hidden, psi = rectified(hidden @ omega.T), rectified(omega @ kernel)
        kernel = psi @ np.asarray(kernels[k + 1], float)
    expected = hidden @ kernel + (np.asarray(biases[-1]) if with_bias else 0)
    np.testing.assert_allclose(net.phi(x), hidden, **CLOSE)
    np.testing.assert_allclose(net.readout, kernel, **CLOSE)
    np.testing.assert_allclose(net(x), expected, rtol=1e-4, atol=1e-5)
    assert net.readout.shape == (16, 3)
    assert net.features.num_features == 16


def test_waves_bundle_as_the_unbundled_towers():
    kernels, biases, x = network((9, 7, 8))
    net = bundle(kernels, biases, [COS] * 3, KEY)
    hidden, kernel = x, kernels[0]
    for k in range(3):
        psi = COS.psi(part(net, k), kernel, biases[k])
        hidden = COS.phi(part(net, k), hidden)
        if k < 2:
            kernel = psi @ kernels[k + 1]
    np.testing.assert_allclose(net(x), hidden @ psi, rtol=1e-4, atol=1e-4)
    assert net.bias is None


def test_one_level_is_the_layer_and_its_linear():
    kernels, biases, x = network((9, 3))
    fm = dataclasses.replace(COS, scale=1.0)
    net = bundle(kernels, biases, [fm], KEY)
    params = net.features.init(KEY, DIM)
    layer = snnk.snnk_dense(fm, part(net, 0), x, kernels[0], biases[0])
    np.testing.assert_allclose(net(x), layer @ kernels[1] + biases[1][None], **CLOSE)
    for name, value in params.items():
        np.testing.assert_array_equal(net.params[name], value)


@pytest.mark.slow
def test_maps_of_several_kinds_stack():
    kernels, biases, x = network((9, 7, 8))
    cubic = Polynomial(coefficients=(0.1, 0.5, 0.2), num_features=24)
    net = bundle(kernels, biases, [ARC, cubic, COS], KEY)
    assert net(x).shape == (5, 8)
    assert [level.kappa is None for level in net.levels] == [True, True, False]


@pytest.mark.slow
def test_deep_bundling_is_not_an_approximation():
    # What the documentation says of rectifiers, at many features.
    fm = ArcCosine(num_features=512, projection="gaussian")
    kernels, _, x = network((32, 32), norm=1.0)
    hidden = fm.exact(x, kernels[0])
    for depth, exact in enumerate((hidden, fm.exact(hidden, kernels[1])), start=1):
        net = bundle(kernels[:depth], None, [fm] * depth, KEY)
        error = jnp.linalg.norm(net(x) - exact) / jnp.linalg.norm(exact)
        assert error < 0.2 if depth == 1 else error > 0.5


# The guard on kappa.


def test_kappa_is_reported_and_the_scale_balanced():
    kernels, biases, x = network((9, 7))
    net = bundle(kernels, biases, [COS, COS], KEY, x=2 * x)
    first, second = net.levels
    np.testing.assert_allclose(first.kappa, 2 * 0.5, rtol=1e-5)
    assert (first.frequency, first.rescale) == (1.0, 1.0)
    np.testing.assert_allclose(part(net, 0)["scale"], np.sqrt(0.5 / 2), rtol=1e-5)
    hidden = COS.phi(part(net, 0), 2 * x)
    weights = COS.psi(part(net, 0), kernels[0], biases[0]) @ kernels[1]
    sizes = (
        np.linalg.norm(hidden, axis=1).mean(),
        np.linalg.norm(weights, axis=0).mean(),
    )
    np.testing.assert_allclose((second.input_norm, second.weight_norm), sizes, 1e-4)
    np.testing.assert_allclose(second.kappa, sizes[0] * sizes[1], rtol=1e-4)
    fixed = dataclasses.replace(COS, scale=0.7)
    net = bundle(kernels, biases, [fixed, COS], KEY, x=2 * x)
    np.testing.assert_allclose(part(net, 0)["scale"], 0.7, rtol=1e-6)


def test_kappa_grows_as_told_and_is_stopped_before_anything_overflows():
    kernels, biases, _ = network((32,) * 6, norm=1.0)
    message = "kappa must be at most 10 at every level.* Got level [34], where kappa"
    with pytest.raises(ValueError, match=message):
        bundle(kernels, biases, [COS] * 6, KEY)
    with pytest.raises(ValueError, match="must be finite. Got inf or NaN at level"):
        bundle(kernels, biases, [COS] * 6, KEY, max_kappa=float("inf"))
    levels = bundle(kernels[:3], None, [COS] * 3, KEY, max_kappa=1e9).levels
    assert 1.5 < levels[1].kappa < 4
    assert levels[2].kappa > 2 * levels[1].kappa


def test_rescaling_is_another_activation_and_says_so():
    kernels, biases, x = network((9, 7), norm=1.0)
    net = bundle(kernels, biases, [COS, COS], KEY, x=x, max_kappa=0.5, rescale=True)
    first, second = net.levels
    np.testing.assert_allclose(first.kappa, 1.0, rtol=1e-5)
    np.testing.assert_allclose(first.rescale, 0.5, rtol=1e-5)
    np.testing.assert_allclose(second.rescale, 0.5 / second.kappa, rtol=1e-6)
    # The network with both arguments multiplied, under no guard.
    one = bundle([0.5 * kernels[0]], [0.5 * biases[0]], [COS], KEY, x=x)
    np.testing.assert_allclose(part(net, 0)["scale"], one.params["map0_scale"], 1e-5)
    np.testing.assert_allclose(net.features.inner(net.params, x), one.phi(x), **CLOSE)
    weights = second.rescale * (one.readout @ kernels[1])
    psi = COS.psi(part(net, 1), weights, second.rescale * biases[1])
    np.testing.assert_allclose(net.readout, psi, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_rescaled_stacks_stay_finite_at_any_depth():
    kernels, biases, x = network((32,) * 12, norm=3.0)
    for fm in (COS, Exponential(num_features=64)):
        net = bundle(kernels, None, [fm] * 12, KEY, x=x, max_kappa=2.0, rescale=True)
        assert all(level.rescale <= 1 for level in net.levels)
        assert np.isfinite(net(x)).all()
        assert max(level.input_norm for level in net.levels) < 1e3
    deep = bundle(kernels, biases, [ARC] * 12, KEY, x=x)
    assert np.isfinite(deep(x)).all()


@pytest.mark.slow
def test_references_of_shrinkage_are_the_inputs_of_the_level():
    kernels, biases, x = network((9, 7))
    fm = URF(activation="cos", num_features=64, shrinkage=True)
    net = bundle(kernels, biases, [fm, fm], KEY, x=x)
    np.testing.assert_array_equal(part(net, 0)["reference"], x)
    inner = net.features.inner(net.params, x)
    np.testing.assert_allclose(part(net, 1)["reference"], inner, **CLOSE)


# The value.


def test_it_is_a_pytree_that_compiles_once_and_takes_another_readout():
    kernels, biases, x = network((9, 3))
    net = bundle(kernels, biases, [ARC], KEY)
    assert len(jax.tree.leaves(net)) == 3
    doubled = jax.tree.map(lambda leaf: 2 * leaf, net)
    np.testing.assert_allclose(doubled.readout, 2 * net.readout)
    assert jax.tree.map(jnp.shape, net).readout == (16, 3)
    apply = count_traces(lambda net, x: net(x))
    compiled = jax.jit(apply)
    np.testing.assert_allclose(compiled(net, x), net(x), **CLOSE)
    target = jnp.ones((5, 3))
    readout, _ = snnk.calibration.fit_linear(net.phi(x), target, l2=0.0)
    solved = dataclasses.replace(net, readout=readout, bias=jnp.zeros(3))
    np.testing.assert_allclose(compiled(solved, x), target, atol=1e-3)
    assert apply.traces == 1
    np.testing.assert_allclose(net(x[0]), net(x)[0], **CLOSE)
    np.testing.assert_allclose(net(x.reshape(5, 1, DIM))[:, 0], net(x), **CLOSE)
    loss = lambda readout: jnp.sum(  # noqa: E731
        dataclasses.replace(net, readout=readout)(x) ** 2
    )
    assert np.all(np.isfinite(jax.grad(loss)(net.readout)))


def test_float64_stays():
    with jax.enable_x64(True):
        kernels, biases, x = network((9, 7), dtype="float64")
        net = bundle(kernels, biases, [ARC, COS], KEY)
        assert net(x).dtype == net.readout.dtype == jnp.float64
        assert net.params["map1_omega"].dtype == jnp.float64


def test_append_one_is_a_feature_map_with_biases():
    kernels, biases, x = network((3,))
    fm = AppendOne(ArcCosine(num_features=20_000))
    params = fm.init(KEY, DIM)
    estimate = snnk.snnk_dense(fm, params, x, kernels[0], biases[0])
    exact = fm.exact(x, kernels[0], biases[0])
    ones = jnp.concatenate([x, jnp.ones((5, 1))], axis=1)
    rows = jnp.concatenate([kernels[0], biases[0][None]])
    np.testing.assert_allclose(exact, snnk.kernels.arc_cosine(ones, rows), **CLOSE)
    np.testing.assert_allclose(estimate, exact, atol=0.1)
    unbiased = fm.exact(x, kernels[0])
    assert float(abs(unbiased - exact).max()) > 0.1
    assert pickle.loads(pickle.dumps(fm)) == fm
    assert fm.redraw(params, KEY, DIM)["omega"].shape == (20_000, DIM + 1)


# Counts.


@pytest.mark.parametrize("use_bias", [False, True])
def test_counts_are_those_of_the_arrays(use_bias):
    kernels, biases, _ = network((9, 7, 8, 3))
    maps = [ArcCosine(num_features=m) for m in (12, 20, 16)]
    net = bundle(kernels, [None] * 3 + biases[3:] if use_bias else None, maps, KEY)
    expected = counts(DIM, 3, (12, 20, 16), use_bias=use_bias)
    assert expected.trained == 16 * 3 + 3 * use_bias
    assert expected.frozen == 12 * DIM + 20 * 12 + 16 * 20
    counted = net.count(DIM)
    assert (counted.trained, counted.frozen) == (expected.trained, expected.frozen)


def test_waves_have_half_as_many_directions():
    kernels, _, _ = network((9, 7))
    net = bundle(kernels, None, [COS, COS], KEY)
    expected = counts(DIM, 7, (64, 64), directions=(32, 32), use_bias=False)
    counted = net.count(DIM)
    assert counted.trained == expected.trained
    assert counted.frozen == expected.frozen + 2  # the scales


@pytest.mark.parametrize("num_features", [(), (256,), (192, 256, 128)])
def test_operations_are_those_that_xla_counts(num_features):
    dim, outputs = 256, 320
    kernel, x = jnp.zeros((dim, outputs)), jnp.zeros((4, dim))
    expected = counts(dim, outputs, num_features, use_bias=False)
    if num_features:
        kernels = [jnp.ones((dim, 2))] + [jnp.ones((2, 2))] * (len(num_features) - 1)
        maps = [ArcCosine(num_features=m, projection="gaussian") for m in num_features]
        net = bundle([*kernels, jnp.ones((2, outputs))], None, maps, KEY)
        call = net.__call__
        np.testing.assert_allclose(net.count(dim).flops, expected.flops, rtol=0.05)
    else:
        call = lambda x: snnk.kernels.ffl("relu", x, kernel)  # noqa: E731
    cost = jax.jit(call).lower(x).compile().cost_analysis()
    np.testing.assert_allclose(cost["flops"], 4 * expected.flops, rtol=0.05)


def test_counts_of_the_paper():
    block = counts(768, 3072, use_bias=False)
    assert (block.trained, block.flops) == (768 * 3072, 2 * 768 * 3072)
    # The layer gets cheaper below d o / (d + o) = 614.4 features.
    flops = [counts(768, 3072, (m,)).flops for m in (614, 615)]
    assert flops[0] < block.flops < flops[1]
    merged = counts(768, 768, (64,), use_bias=False)
    assert (merged.trained, merged.frozen) == (64 * 768, 64 * 768)
    both = counts(2, 3) + counts(3, 1, (5,))
    assert both == snnk.bundling.Counts(9 + 6, 15, 12 + 40)


# Mistakes.


@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_refused():
    kernels, biases, x = network((9, 7))
    two, wide = [COS, COS], jnp.ones((5, 7))
    for kernel_list, maps in [(kernels, [COS] * 3), (kernels, []), ([], two)]:
        with pytest.raises(ValueError, match="kernels must be as many as feature_maps"):
            bundle(kernel_list, None, maps, KEY)
    with pytest.raises(ValueError, match="biases must be None or one for each kernel"):
        bundle(kernels, biases[:1], two, KEY)
    for wrong in ([kernels[0], wide], [kernels[0], jnp.ones(9)]):
        with pytest.raises(ValueError, match="kernels must be matrices"):
            bundle(wrong, None, two, KEY)
    with pytest.raises(ValueError, match=r"bias must have shape \(9,\)"):
        bundle(kernels, biases[::-1], two, KEY)
    with pytest.raises(ValueError, match="kernels must be of one dtype"):
        bundle([kernels[0], kernels[1].astype("bfloat16")], None, two, KEY)
    with pytest.raises(ValueError, match="maps must be feature maps"):
        bundle(kernels, None, [COS, "cos"], KEY)
    for samples, words in [
        (x[:, :4], r"x must be samples \[n, 6\]"),
        (x[0], r"x must be samples \[n, 6\]"),
        (x[:0], r"x must be samples \[n, 6\]"),
        (x * jnp.nan, "x must be finite"),
        (0.0, "x must be samples or a positive finite norm"),
    ]:
        with pytest.raises(ValueError, match=words):
            bundle(kernels, None, two, KEY, x=samples)
    for max_kappa in (0.0, float("nan")):
        with pytest.raises(ValueError, match="max_kappa must be positive"):
            bundle(kernels, None, two, KEY, max_kappa=max_kappa)
    with pytest.raises(ValueError, match="phi must be .* and psi"):
        merge_readout(jnp.ones((4, 3)), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="bias must have shape"):
        merge_bias(None, jnp.ones((4, 3)), jnp.ones(4))
    with pytest.raises(ValueError, match="phi must be .* and psi"):
        merge_bias(jnp.ones(3), jnp.ones((4, 3)), None)
    for wrong in ((0, 3), (3, 3, (0,)), (3, 3, (4,), (4, 4))):
        with pytest.raises(ValueError, match="dim, outputs, num_features and direc"):
            counts(*wrong[:3], directions=wrong[3] if len(wrong) > 3 else None)
