import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.nn import linen

FM = snnk.features.URF(activation="sin", num_features=16, scale=1.0)


def nest(state):
    """NNX state as nested plain dicts of arrays."""
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))


@pytest.mark.parametrize(
    ("make_nnx", "make_linen", "collection"),
    [
        (
            lambda: snnk.nn.SNNKDense(6, 4, features=FM, rngs=nnx.Rngs(0)),
            lambda: linen.SNNKDense(6, 4, features=FM),
            "params",
        ),
        (
            lambda: snnk.nn.SNNKAdapter(6, features=FM, rngs=nnx.Rngs(0)),
            lambda: linen.SNNKAdapter(6, features=FM),
            "adapter_param",
        ),
    ],
    ids=["dense", "adapter"],
)
def test_parity_on_copied_weights(make_nnx, make_linen, collection):
    layer = make_nnx()
    if collection == "adapter_param":
        layer.readout[...] = jax.random.normal(jax.random.key(3), (16, 6))
    x = jax.random.normal(jax.random.key(0), (3, 6))
    _, params, projections = nnx.split(layer, nnx.Param, snnk.nn.RandomProjection)
    variables = {collection: nest(params), "random_projection": nest(projections)}
    module = make_linen()
    fresh = module.init(jax.random.key(1), x)
    assert jax.tree.structure(fresh) == jax.tree.structure(variables)
    np.testing.assert_array_equal(module.apply(variables, x), layer(x))
    np.testing.assert_allclose(
        jax.jit(module.apply)(variables, x), layer(x), rtol=1e-5, atol=1e-6
    )


def test_trains_inside_a_linen_model():
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            return flax.linen.Dense(1)(linen.SNNKDense(6, 4, features=FM)(x))

    x = 0.3 * jax.random.normal(jax.random.key(0), (8, 6))
    model = Model()
    variables = model.init(jax.random.key(1), x)
    params, frozen = variables["params"], variables["random_projection"]

    def loss(params):
        out = model.apply({"params": params, "random_projection": frozen}, x)
        return jnp.mean((out - 1.0) ** 2)

    before = loss(params)
    for _ in range(5):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    assert loss(params) < before


def test_dtypes_and_trained_directions_reach_the_layers():
    x = jnp.ones((2, 6))
    dense = linen.SNNKDense(6, 4, features=FM, dtype="bfloat16", param_dtype="bfloat16")
    variables = dense.init(jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {
        "bfloat16"
    }
    assert dense.apply(variables, x).dtype == jnp.bfloat16
    adapter = linen.SNNKAdapter(6, features=FM, train_projection=True)
    trained = adapter.init(jax.random.key(0), x)["adapter_param"]
    assert "values" in trained["projection"]
