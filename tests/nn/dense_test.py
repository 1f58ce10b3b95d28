import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk

FEATURES = [
    snnk.features.ArcCosine(num_features=32),
    snnk.features.URF(activation="sin", num_features=32, scale=1.0),
]


@pytest.fixture(params=FEATURES, ids=["relu", "sin"])
def layer(request):
    return snnk.nn.SNNKDense(12, 5, features=request.param, rngs=nnx.Rngs(0))


def test_any_batch_rank_gives_the_same_numbers(layer):
    x = 0.3 * jax.random.normal(jax.random.key(0), (2, 3, 12))
    y = layer(x)
    assert y.shape == (2, 3, 5)
    np.testing.assert_allclose(layer(x.reshape(6, 12)), y.reshape(6, 5), rtol=1e-5)
    np.testing.assert_allclose(layer(x[1, 2]), y[1, 2], rtol=1e-5, atol=1e-6)


def test_trains_the_readout_and_the_bias_alone(layer):
    x = 0.3 * jax.random.normal(jax.random.key(0), (4, 12))
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    names = {path for path, _ in nnx.to_flat_state(params)}
    assert names == {("readout",), ("bias",)}

    def loss(params):
        return jnp.sum(nnx.merge(graphdef, params, rest)(x) ** 2)

    for grad in jax.tree.leaves(jax.grad(loss)(params)):
        assert np.all(np.isfinite(grad))
        assert np.any(grad != 0)


def test_the_projection_gets_no_gradient_where_everything_is_differentiated(layer):
    x = 0.3 * jax.random.normal(jax.random.key(0), (4, 12))
    graphdef, state = nnx.split(layer)
    floats = nnx.filter_state(state, lambda path, v: "key" not in path)
    rest = nnx.filter_state(state, lambda path, v: "key" in path)

    def loss(floats):
        return jnp.sum(nnx.merge(graphdef, floats, rest)(x) ** 2)

    grads = nnx.to_flat_state(jax.grad(loss)(floats))
    projected = [np.asarray(g[...]) for path, g in grads if "projection" in path]
    assert projected
    assert all(np.all(grad == 0) for grad in projected)


def test_from_linear_is_the_estimate_of_the_dense_layer():
    linear = nnx.Linear(6, 3, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(0.5))
    fm = snnk.features.URF(activation="cos", num_features=60_000, scale=1.0)
    layer = snnk.nn.SNNKDense.from_linear(linear, features=fm, rngs=nnx.Rngs(1))
    x = 0.3 * jax.random.normal(jax.random.key(0), (7, 6))
    np.testing.assert_allclose(layer(x), jnp.cos(linear(x)), atol=0.05)


def test_from_linear_without_bias_and_with_one_that_cannot_be_carried():
    fm = snnk.features.ArcCosine(num_features=16)
    plain = nnx.Linear(6, 3, use_bias=False, rngs=nnx.Rngs(0))
    layer = snnk.nn.SNNKDense.from_linear(plain, features=fm, rngs=nnx.Rngs(1))
    chex.assert_shape(layer.readout[...], (16, 3))
    assert layer.bias is None
    with pytest.raises(ValueError, match="bias must be None for ArcCosine"):
        snnk.nn.SNNKDense.from_linear(
            nnx.Linear(6, 3, rngs=nnx.Rngs(0)), features=fm, rngs=nnx.Rngs(1)
        )


def test_two_equal_layers_compile_once():
    fm = snnk.features.ArcCosine(num_features=8)
    traces = []

    @jax.jit
    def apply(layer, x):
        traces.append(x.shape)
        return layer(x)

    for seed in range(3):
        same = snnk.features.ArcCosine(num_features=8)
        assert same == fm
        layer = snnk.nn.SNNKDense(12, 5, features=same, rngs=nnx.Rngs(seed))
        apply(layer, jnp.ones((4, 12)))
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtype_computes_and_param_dtype_stores(dtype):
    fm = snnk.features.ArcCosine(num_features=8)
    layer = snnk.nn.SNNKDense(12, 5, features=fm, dtype=dtype, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((4, 12))).dtype == dtype
    assert layer.readout.dtype == jnp.float32
    stored = snnk.nn.SNNKDense(12, 5, features=fm, param_dtype=dtype, rngs=nnx.Rngs(0))
    assert stored.readout.dtype == stored.projection.values["omega"].dtype == dtype


def test_needs_rngs_and_draws_by_them():
    fm = snnk.features.ArcCosine(num_features=8)
    with pytest.raises(TypeError, match="rngs"):
        snnk.nn.SNNKDense(12, 5, features=fm)  # pyright: ignore

    def omega(seed):
        layer = snnk.nn.SNNKDense(12, 5, features=fm, rngs=nnx.Rngs(seed))
        return layer.projection.values["omega"][...]

    np.testing.assert_array_equal(omega(0), omega(0))
    assert not np.allclose(omega(0), omega(1))


def test_wrong_width(unchecked):
    fm = snnk.features.ArcCosine(num_features=8)
    layer = snnk.nn.SNNKDense(12, 5, features=fm, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="inputs must have width 12"):
        layer(jnp.ones((4, 11)))


@pytest.mark.slow
def test_from_linear_balances_to_samples():
    rng = np.random.default_rng(0)
    spectrum = 3 / np.arange(1, 33)
    x = jnp.asarray(rng.normal(size=(4, 64, 32)) * spectrum, jnp.float32)
    linear = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    features = snnk.features.URF(
        activation="gelu", num_features=256, exact_degree=1, shrinkage=True
    )
    plain = snnk.nn.SNNKDense.from_linear(linear, features=features, rngs=nnx.Rngs(1))
    balanced = snnk.nn.SNNKDense.from_linear(
        linear, features=features, x=x, rngs=nnx.Rngs(1)
    )
    exact = jax.nn.gelu(linear(x), approximate=False)

    def error(layer):
        return float(jnp.mean((layer(x) - exact) ** 2))

    assert error(balanced) < 0.7 * error(plain)
    # What it was calibrated to is state that is not trained.
    assert not jax.tree.leaves(nnx.state(balanced.projection, nnx.Param))
    with pytest.raises(ValueError, match="features must be URF or Exponential"):
        snnk.nn.SNNKDense.from_linear(
            linear,
            features=snnk.features.ArcCosine(num_features=8),
            x=x,
            rngs=nnx.Rngs(1),
        )


def test_samples_of_another_width_are_refused(unchecked):
    """Not reshaped into rows that no input ever was."""
    features = snnk.features.URF(activation="cos", num_features=8)
    x = jnp.ones((12, 6))
    with pytest.raises(ValueError, match=r"x must hold inputs of width 4. Got shape"):
        snnk.nn.SNNKDense.from_linear(
            nnx.Linear(4, 3, rngs=nnx.Rngs(0)), features=features, x=x, rngs=nnx.Rngs(1)
        )
    with pytest.raises(ValueError, match=r"x must hold inputs of width 4. Got shape"):
        snnk.nn.SNNKPooler.from_pooler(
            *(nnx.Linear(4, 4, rngs=nnx.Rngs(0)),),
            features=features,
            init="samples",
            x=x,
            rngs=nnx.Rngs(1),
        )


def test_a_linear_with_more_inside_is_refused(unchecked):
    """LoRALinear is an nnx.Linear by class, and adds to what one computes."""
    lora = nnx.LoRALinear(8, 8, lora_rank=2, rngs=nnx.Rngs(0))
    features = snnk.features.URF(activation="cos", num_features=8)
    layer = snnk.nn.SNNKDense(8, 8, features=features, rngs=nnx.Rngs(1))
    rngs = nnx.Rngs(2)
    with pytest.raises(ValueError, match=r"linear must be an nnx.Linear .*LoRALinear"):
        snnk.nn.SNNKDense.from_linear(lora, features=features, rngs=rngs)
    with pytest.raises(ValueError, match=r"pooler must be .*LoRALinear"):
        snnk.nn.SNNKPooler.from_pooler(lora, features=features, rngs=rngs)
    with pytest.raises(ValueError, match=r"modules must be .*LoRALinear"):
        snnk.nn.bundle_stack([layer, lora])
    model = nnx.Sequential(layer, lora)
    with pytest.raises(ValueError, match=r"nnx.Linear at 'layers/1'.*LoRALinear"):
        snnk.nn.merge_pooler(model, pooler="layers/0", head="layers/1")
