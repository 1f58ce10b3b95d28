import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.nn import AdapterParam, RandomProjection

DIM = 12
ARC = snnk.features.ArcCosine(num_features=8)
COS = snnk.features.URF(activation="cos", num_features=8, scale=1.0)


def snnk_adapter(fm, **options):
    return snnk.nn.SNNKAdapter(DIM, features=fm, rngs=nnx.Rngs(0), **options)


ADAPTERS = {
    "snnk_relu": lambda: snnk_adapter(ARC),
    "snnk_cos": lambda: snnk_adapter(COS),
    "unmodulated": lambda: snnk_adapter(ARC, modulate=False),
    "factored": lambda: snnk_adapter(ARC, rank=3, modulate=False),
    "unnormalized": lambda: snnk_adapter(ARC, normalize=False),
    "bottleneck": lambda: snnk.nn.BottleneckAdapter(DIM, 3, rngs=nnx.Rngs(0)),
}
PARAMETERS = {
    "snnk_relu": (8 + 1) * DIM,
    "snnk_cos": (8 + 1) * DIM,
    "unmodulated": 8 * DIM,
    "factored": 3 * (8 + DIM),
    "unnormalized": (8 + 1) * DIM,
    "bottleneck": 2 * DIM * 3 + 3 + DIM,
}
# What moves in the first step: the zero-initialised maps behind the frozen features.
FIRST_GRADIENTS = {
    "snnk_relu": {"readout"},
    "snnk_cos": {"readout"},
    "unmodulated": {"readout"},
    "factored": {"up"},
    "unnormalized": {"readout"},
    "bottleneck": {"up_kernel", "up_bias"},
}


@pytest.fixture(params=list(ADAPTERS))
def name(request):
    return request.param


def test_is_the_identity_at_the_start(name):
    x = jax.random.normal(jax.random.key(0), (2, 3, DIM))
    np.testing.assert_array_equal(ADAPTERS[name]()(x), x)


def test_counts(name):
    leaves = jax.tree.leaves(nnx.state(ADAPTERS[name](), AdapterParam))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


def test_learns_from_the_first_step(name):
    adapter = ADAPTERS[name]()
    x = jax.random.normal(jax.random.key(0), (5, DIM))
    target = jax.random.normal(jax.random.key(1), (5, DIM))
    graphdef, params, rest = nnx.split(adapter, AdapterParam, ...)

    def loss(params):
        return jnp.mean((nnx.merge(graphdef, params, rest)(x) - target) ** 2)

    grads = jax.grad(loss)(params)
    moving = {
        path[-1] for path, grad in nnx.to_flat_state(grads) if np.any(grad[...] != 0)
    }
    assert moving == FIRST_GRADIENTS[name]
    before = loss(params)
    for _ in range(3):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params))
    assert loss(params) < before


def test_projections_are_not_trainable():
    state = nnx.state(snnk_adapter(ARC), RandomProjection)
    names = {path[-1] for path, _ in nnx.to_flat_state(state)}
    assert names == {"key", "omega"}


def test_normalised_features_do_not_depend_on_the_size_of_the_input():
    adapter = snnk_adapter(COS)
    adapter.readout[...] = jax.random.normal(jax.random.key(2), (8, DIM))
    x = jax.random.normal(jax.random.key(0), (5, DIM))
    np.testing.assert_allclose(
        adapter(x) - x, adapter(1e3 * x) - 1e3 * x, rtol=1e-2, atol=1e-3
    )


def test_zero_input_is_finite_with_finite_gradients(name):
    adapter = ADAPTERS[name]()
    value, grad = jax.value_and_grad(lambda x: jnp.sum(adapter(x)))(jnp.zeros(DIM))
    assert np.isfinite(value)
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_keeps_the_dtype_of_the_residual_stream(name, dtype):
    x = jnp.ones((4, DIM), dtype)
    assert ADAPTERS[name]()(x).dtype == dtype


def test_computes_in_the_asked_dtype_and_returns_the_residual_dtype():
    adapter = snnk_adapter(ARC, dtype=jnp.bfloat16)
    assert adapter(jnp.ones((4, DIM))).dtype == jnp.float32


def test_adapted_passes_arguments_to_the_module():
    class Scale(nnx.Module):
        def __call__(self, x, *, by):
            return x * by

    adapted = snnk.nn.Adapted(Scale(), ADAPTERS["bottleneck"]())
    np.testing.assert_array_equal(adapted(jnp.ones((2, DIM)), by=3.0), 3.0)


def test_rank_must_be_positive():
    with pytest.raises(ValueError, match="rank must be None or at least 1. Got 0"):
        snnk_adapter(ARC, rank=0)


def test_bottleneck_must_be_positive():
    with pytest.raises(ValueError, match=r"bottleneck must be at least 1. Got 0"):
        snnk.nn.BottleneckAdapter(DIM, 0, rngs=nnx.Rngs(0))
