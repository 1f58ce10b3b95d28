import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.nn import SNNKDense, SNNKMlp

COS = snnk.features.URF(activation="cos", num_features=32, scale=1.0)


class Mlp(nnx.Module):
    def __init__(self, d, hidden, o, *, use_bias=True):
        def linear(d, o, seed):
            bias_init = nnx.initializers.normal(0.5)
            rngs = nnx.Rngs(seed)
            return nnx.Linear(d, o, use_bias=use_bias, bias_init=bias_init, rngs=rngs)

        # The second one comes first in every order but that of the data.
        self.down = linear(hidden, o, 0)
        self.up = linear(d, hidden, 1)

    def __call__(self, x):
        return self.down(jnp.cos(self.up(x)))


def build(mlp, features=COS, **options):
    options = {"first": "up", "second": "down", "rngs": nnx.Rngs(1)} | options
    return SNNKMlp.from_mlp(mlp, features=features, **options)


@pytest.mark.parametrize("use_bias", [False, True])
def test_it_is_the_layer_and_the_linear_behind_it(use_bias):
    mlp = Mlp(6, 20, 5, use_bias=use_bias)
    block = build(mlp)
    layer = SNNKDense.from_linear(mlp.up, features=COS, rngs=nnx.Rngs(1))
    x = 0.3 * jax.random.normal(jax.random.key(0), (2, 3, 6))
    np.testing.assert_allclose(block(x), mlp.down(layer(x)), rtol=1e-4, atol=1e-5)
    assert block.readout.shape == (32, 5)
    assert (block.bias is None) == (not use_bias)
    params = nnx.state(block, nnx.Param)
    assert {path for path, _ in nnx.to_flat_state(params)} == (
        {("readout",), ("bias",)} if use_bias else {("readout",)}
    )


def test_many_features_estimate_the_block():
    mlp = Mlp(6, 20, 5)
    fm = snnk.features.URF(activation="cos", num_features=60_000, scale=1.0)
    x = 0.3 * jax.random.normal(jax.random.key(0), (7, 6))
    np.testing.assert_allclose(build(mlp, fm)(x), mlp(x), atol=0.05)


@pytest.mark.slow
def test_the_block_of_the_vit_and_samples_to_balance_to():
    config = snnk.models.vit.ViTConfig(
        image_size=8,
        patch_size=4,
        num_classes=10,
        hidden_size=16,
        depth=1,
        num_heads=2,
        mlp_dim=64,
    )
    mlp = snnk.models.vit.Mlp(config, rngs=nnx.Rngs(0))
    fm = snnk.features.URF(activation="gelu", num_features=128, exact_degree=1)
    spectrum = 3 / jnp.arange(1, 17)
    x = spectrum[None, None] * jax.random.normal(jax.random.key(0), (2, 64, 16))

    def error(block):
        return float(jnp.mean((block(x) - mlp(x)) ** 2))

    plain, balanced = (
        SNNKMlp.from_mlp(mlp, features=fm, x=samples, rngs=nnx.Rngs(1))
        for samples in (None, x)
    )
    assert error(balanced) < 0.5 * error(plain)
    np.testing.assert_array_equal(balanced.bias[...], mlp.fc2.bias[...])
    mlp.fc2.bias[...] = mlp.fc2.bias[...] + 1
    assert np.all(balanced.bias[...] != mlp.fc2.bias[...])


def test_its_counts_are_those_of_a_layer_without_the_hidden_width():
    fm = snnk.features.ArcCosine(num_features=16)
    block = build(Mlp(6, 200, 5, use_bias=False), fm)
    trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(block, nnx.Param)))
    expected = snnk.bundling.counts(6, 5, (16,), use_bias=False)
    assert trained == expected.trained
    assert block.projection.values["omega"].size == expected.frozen


@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_refused():
    mlp = Mlp(6, 20, 5)
    with pytest.raises(ValueError, match="mlp must hold nnx.Linear layers in 'fc1'"):
        SNNKMlp.from_mlp(mlp, features=COS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'up' must read what 'down' writes"):
        build(mlp, first="down", second="up")
    with pytest.raises(ValueError, match="bias must be None for ArcCosine"):
        build(mlp, snnk.features.ArcCosine(num_features=8))
    with pytest.raises(ValueError, match="features must be URF or Exponential"):
        build(
            Mlp(6, 20, 5, use_bias=False),
            snnk.features.ArcCosine(num_features=8),
            x=jnp.ones((4, 6)),
        )
