import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.nn import RandomProjection, SNNKDense, bundle_stack
from snnk_jax.testing import tolerance

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ARC = snnk.features.ArcCosine(num_features=8)
SHARP = snnk.features.ArcCosine(num_features=12, order=2)
COS = snnk.features.URF(activation="cos", num_features=16, scale=1.0)


def dense(d, o, features=ARC, *, seed=0, **options):
    options = {"bias_init": nnx.initializers.normal(1.0)} | options
    return SNNKDense(d, o, features=features, rngs=nnx.Rngs(seed), **options)


def linear(d, o, *, seed=9, **options):
    options = {"bias_init": nnx.initializers.normal(1.0)} | options
    return nnx.Linear(d, o, rngs=nnx.Rngs(seed), **options)


STACKS = {
    "one": lambda: [dense(6, 20)],
    "readout": lambda: [dense(6, 20), linear(20, 5)],
    "readouts": lambda: [dense(6, 20), linear(20, 9), linear(9, 5)],
    "folded": lambda: [dense(6, 20), dense(20, 5, seed=1)],
    "unbiased": lambda: [
        dense(6, 20, use_bias=False),
        dense(20, 5, seed=1, use_bias=False),
    ],
    "deep": lambda: [
        dense(6, 20, COS),
        linear(20, 9, use_bias=False),
        dense(9, 7, SHARP, seed=1),
        dense(7, 20, seed=2),
        linear(20, 3),
    ],
    "linear first": lambda: [linear(6, 20), dense(20, 9), dense(9, 3, seed=1)],
    "hadamard": lambda: [
        dense(6, 20),
        dense(
            20,
            5,
            snnk.features.ArcCosine(num_features=8, projection="hadamard"),
            seed=1,
        ),
    ],
}


@pytest.fixture(params=STACKS)
def modules(request):
    return STACKS[request.param]()


def run(modules, x):
    for module in modules:
        x = module(x)
    return x


def test_it_returns_what_the_stack_returns(modules):
    stack, _ = bundle_stack(modules)
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    expected = run(modules, x)
    np.testing.assert_allclose(stack(x), expected, **CLOSE)
    np.testing.assert_allclose(stack(x[0, 0]), expected[0, 0], **CLOSE)
    np.testing.assert_allclose(
        jax.jit(lambda stack, x: stack(x))(stack, x), expected, **CLOSE
    )
    assert float(jnp.std(expected)) > 0.1


def test_it_shares_nothing_with_the_stack(modules):
    stack, _ = bundle_stack(modules)
    x = jax.random.normal(jax.random.key(0), (3, 6))
    before = stack(x)
    for module in modules:
        for leaf in ("readout", "kernel", "bias"):
            if getattr(module, leaf, None) is not None:
                variable = getattr(module, leaf)
                variable[...] = jnp.zeros_like(variable[...])
    np.testing.assert_array_equal(stack(x), before)


def test_products_are_trained_and_the_first_directions_frozen():
    stack, _ = bundle_stack(STACKS["deep"]())
    graphdef, params, rest = nnx.split(stack, nnx.Param, ...)
    paths = {path for path, _ in nnx.to_flat_state(params)}
    assert paths == {
        *(("stages", i, "kernel") for i in (1, 2)),
        ("readout",),
        ("bias",),
    }
    frozen = nnx.to_flat_state(nnx.state(stack, RandomProjection))
    assert all(path[:2] == ("stages", 0) for path, _ in frozen)
    x = jax.random.normal(jax.random.key(0), (3, 6))

    def loss(params):
        return jnp.sum(nnx.merge(graphdef, params, rest)(x) ** 2)

    for grad in jax.tree.leaves(jax.grad(loss)(params)):
        assert np.all(np.isfinite(grad))
        assert np.any(grad != 0)


def test_wide_layers_get_cheaper_and_narrow_ones_dearer():
    wide = [dense(6, 200), dense(200, 5, seed=1)]
    narrow = [dense(6, 2), dense(2, 5, seed=1)]
    for modules, cheaper in ((wide, True), (narrow, False)):
        _, report = bundle_stack(modules)
        # m1 m2 < m1 l + l m2
        width = modules[0].out_features
        assert (8 * width + width * 8 > 8 * 8) == cheaper
        assert (report.after.flops < report.before.flops) == cheaper


def test_counts_are_those_of_the_formulas():
    m, d, hidden, o = 8, 6, 200, 5
    modules = [dense(d, hidden, use_bias=False), dense(hidden, o, seed=1)]
    _, report = bundle_stack(modules)
    first = snnk.bundling.counts(d, hidden, (m,), use_bias=False)
    second = snnk.bundling.counts(hidden, o, (m,))
    both = first + second
    assert (report.before.trained, report.before.frozen) == (both.trained, both.frozen)
    np.testing.assert_allclose(report.before.flops, both.flops, rtol=0.05)
    # One matrix [m, m] stands for readout and directions, and is trained.
    assert report.after.trained == m * m + m * o + o
    assert report.after.frozen == m * d
    expected = 2 * (m * d + m * m + m * o)
    np.testing.assert_allclose(report.after.flops, expected, rtol=0.2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_it_computes_in_the_dtype_of_the_modules(dtype):
    modules = [dense(6, 9, dtype=dtype), linear(9, 5, dtype=dtype)]
    stack, _ = bundle_stack(modules)
    x = jax.random.normal(jax.random.key(0), (3, 6))
    assert stack(x).dtype == dtype
    np.testing.assert_allclose(
        stack(x).astype(float),
        run(modules, x).astype(float),
        **{name: 5 * value for name, value in tolerance(dtype).items()},
    )


@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_refused():
    for modules, words in [
        ([], "Got none"),
        ([linear(6, 5)], "modules must be SNNKDense and nnx.Linear, at least one"),
        ([dense(6, 5), jax.nn.relu], "modules must be SNNKDense and nnx.Linear"),
        ([dense(6, 5), linear(4, 3)], "must read what the one before writes"),
        (
            [dense(6, 5), linear(5, 3, dtype=jnp.bfloat16)],
            "modules must compute in one dtype",
        ),
        (
            [dense(6, 20), dense(20, 5, COS)],
            "features behind another module must be ArcCosine.* Got URF in module 1; "
            "exponential maps also read .* takes all 20 inputs",
        ),
        ([linear(6, 20), dense(20, 5, COS)], "must be ArcCosine"),
    ]:
        with pytest.raises(ValueError, match=words):
            bundle_stack(modules)
