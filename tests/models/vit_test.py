import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from snnk_jax.models.vit import (
    ViT,
    ViTConfig,
    patchify,
    resize_position_embedding,
)
from snnk_jax.testing import call
from tests.tiers import slow_but

TINY = ViTConfig(
    hidden_size=16,
    depth=2,
    num_heads=2,
    mlp_dim=24,
    image_size=(8, 12),
    patch_size=4,
    channels=3,
    num_classes=5,
)


def make_vit(config=TINY, seed=0, **options):
    """A ViT whose parameters are all random, the zero-initialised ones too."""
    model = jax.jit(lambda: ViT(config, rngs=nnx.Rngs(seed), **options))()
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype),
        nnx.state(model),
    )
    nnx.update(model, state)
    return model


def make_images(*batch, config=TINY, seed=1):
    shape = (*batch, *config.image_shape, config.channels)
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1.0)


def num_parameters(config):
    model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


# Ti, S, B and L are timm's counts of vit_{tiny,small,base,large}_patch16_224.
@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("Ti/16", 5_717_416),
        ("S/16", 22_050_664),
        ("B/16", 86_567_656),
        ("L/16", 304_326_632),
    ],
)
def test_preset_parameter_counts(preset, count):
    assert num_parameters(ViTConfig.preset(preset)) == count


def test_mean_pool_drops_the_class_token_and_its_position():
    counts = [
        num_parameters(dataclasses.replace(TINY, pool=pool)) for pool in ("cls", "mean")
    ]
    assert counts[0] - counts[1] == 2 * TINY.hidden_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1. Got 0"),
        ({"depth": 0}, "depth must be a whole number of at least 1. Got 0"),
        ({"num_heads": 0}, "num_heads must be a whole number of at least 1. Got 0"),
        ({"mlp_dim": -1}, "mlp_dim must be a whole number of at least 1. Got -1"),
        ({"patch_size": 0}, "patch_size must be a whole number of at least 1. Got 0"),
        (
            {"image_size": 0},
            "image_size must be one or two whole numbers of at least 1. Got 0",
        ),
        ({"channels": 0}, "channels must be a whole number of at least 1. Got 0"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1. Got 0"),
        ({"num_heads": 3}, "hidden_size must be divisible by num_heads. Got 16 and 3"),
        (
            {"image_size": (8, 10)},
            r"image_size must be divisible by patch_size. Got \(8, 10\) and 4",
        ),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\). Got 1.0"),
        ({"patch_dropout": -0.1}, r"patch_dropout must be in \[0, 1\). Got -0.1"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_unknown_pool():
    # With jaxtyping's hook the type is refused first, without it ViTConfig refuses.
    with pytest.raises((ValueError, TypeError), match="pool"):
        dataclasses.replace(TINY, pool="max")


@pytest.mark.parametrize("name", ["B", "B/", "X/16", "B/sixteen", ""])
def test_unknown_preset(name):
    with pytest.raises(ValueError, match="preset must be SIZE/PATCH"):
        ViTConfig.preset(name)


def test_preset_takes_overrides():
    config = ViTConfig.preset("Ti/32", image_size=64, num_classes=10, pool="mean")
    assert (config.hidden_size, config.num_heads) == (192, 3)
    assert (config.grid, config.num_patches, config.num_tokens) == ((2, 2), 4, 4)


def numpy_vit(model, images):
    """The forward pass of one image after the paper, in float64 NumPy."""
    config = model.config

    def dense(layer, x):
        return x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])

    def norm(layer, x):
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6)
        return centred / scale * np.float64(layer.scale[...]) + np.float64(
            layer.bias[...]
        )

    def gelu(x):
        return x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2.0)))

    def attention(layer, x):
        size = config.hidden_size // config.num_heads
        outputs = []
        for head in range(config.num_heads):
            part = slice(head * size, (head + 1) * size)
            q, k, v = (
                dense(m, x)[:, part] for m in (layer.query, layer.key, layer.value)
            )
            weights = np.exp(q @ k.T / np.sqrt(size))
            outputs.append(weights / weights.sum(-1, keepdims=True) @ v)
        return dense(layer.out, np.concatenate(outputs, -1))

    p = config.patch_size
    tokens = [
        images[i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(-1)
        for i in range(config.grid[0])
        for j in range(config.grid[1])
    ]
    x = dense(model.patch_embed, np.float64(np.stack(tokens)))
    if config.pool == "cls":
        x = np.concatenate([np.float64(model.cls_token[...])[None], x])
    x = x + np.float64(model.position_embedding[...])
    for block in model.blocks:
        x = x + attention(block.attention, norm(block.norm1, x))
        hidden = gelu(dense(block.mlp.fc1, norm(block.norm2, x)))
        x = x + dense(block.mlp.fc2, hidden)
    x = norm(model.norm, x)
    return dense(model.head, x[0] if config.pool == "cls" else x.mean(0))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_forward_agrees_with_float64_numpy(pool):
    model = make_vit(dataclasses.replace(TINY, pool=pool))
    images = make_images(3)
    expected = [numpy_vit(model, image) for image in np.asarray(images)]
    np.testing.assert_allclose(call(model, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (1,), (6,), (2, 3), (1, 2, 3)])
def test_any_leading_batch_rank(batch):
    model = make_vit()
    images = make_images(6)[: math.prod(batch)]
    shape = (*batch, *TINY.image_shape, TINY.channels)
    logits = call(model, images.reshape(shape))
    assert logits.shape == (*batch, TINY.num_classes)
    expected = jnp.stack([call(model, image) for image in images])
    np.testing.assert_allclose(
        logits.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6
    )


def test_the_first_loss_is_that_of_guessing():
    logits = call(ViT(TINY, rngs=nnx.Rngs(0)), make_images(2))
    np.testing.assert_array_equal(logits, np.zeros((2, TINY.num_classes)))


def test_image_shape_mismatch():
    with pytest.raises(ValueError, match=r"trailing shape \(8, 12, 3\). Got \(2, 12,"):
        make_vit()(jnp.zeros((2, 12, 8, 3)))


def test_patchify_and_linear_equal_a_strided_convolution():
    images = make_images(2)
    kernel = jax.random.normal(jax.random.key(2), (4, 4, 3, 7))
    expected = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = patchify(images, 4) @ kernel.reshape(-1, 7)
    np.testing.assert_allclose(got, expected.reshape(2, 6, 7), rtol=1e-5, atol=1e-5)


def test_resize_position_embedding_keeps_the_same_grid():
    embedding = jax.random.normal(jax.random.key(0), (7, 5))
    got = resize_position_embedding(embedding, (2, 3), (2, 3))
    np.testing.assert_array_equal(got, embedding)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", [(4, 6), (1, 1), (3, 2)])
def test_resize_position_embedding_to_another_grid(prefix, grid):
    embedding = jax.random.normal(jax.random.key(0), (prefix + 6, 5))
    got = resize_position_embedding(embedding, (2, 3), grid)
    assert got.shape == (prefix + math.prod(grid), 5)
    np.testing.assert_array_equal(got[:prefix], embedding[:prefix])
    if grid == (1, 1):
        # Anti-aliased to one cell: some average of the six, not one of them.
        assert np.all(got[-1] > embedding[prefix:].min(0))
        assert np.all(got[-1] < embedding[prefix:].max(0))


def test_resize_position_embedding_interpolates_between_neighbours():
    ramp = jnp.arange(4.0)[:, None]
    got = resize_position_embedding(ramp, (1, 4), (1, 8))[:, 0]
    np.testing.assert_allclose(got, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_resize_position_embedding_refuses_too_few_rows():
    with pytest.raises(ValueError, match=r"at least 6 rows for the grid \(2, 3\)"):
        resize_position_embedding(jnp.zeros((5, 2)), (2, 3), (4, 6))


def test_bfloat16_computation():
    model = make_vit()
    half = make_vit(dtype=jnp.bfloat16)
    images = make_images(4)
    # jax.nn.dot_product_attention and nnx.LayerNorm promote inside.
    with jax.numpy_dtype_promotion("standard"):
        logits = call(half, images)
    assert logits.dtype == jnp.bfloat16
    assert half.head.kernel[...].dtype == jnp.float32
    expected = call(model, images)
    error = jnp.max(jnp.abs(logits.astype(jnp.float32) - expected))
    # bfloat16 keeps 8 bits; a handful of layers loses a few of them.
    assert 0 < error < 0.05 * jnp.max(jnp.abs(expected))


@pytest.mark.parametrize("option", ["dropout_rate", "patch_dropout"])
def test_dropout_needs_rngs_and_follows_the_key(option):
    model = make_vit(dataclasses.replace(TINY, **{option: 0.5}))
    images = make_images(4)
    plain = call(make_vit(), images)

    def noisy(seed):
        return call(model, images, rngs=nnx.Rngs(dropout=seed))

    np.testing.assert_array_equal(call(model, images), plain)
    np.testing.assert_array_equal(noisy(0), noisy(0))
    assert np.abs(noisy(0) - plain).max() > 1e-3
    assert np.abs(noisy(0) - noisy(1)).max() > 1e-3


def test_patch_dropout_keeps_the_asked_share_of_tokens():
    config = dataclasses.replace(TINY, pool="mean", patch_dropout=0.5)
    model = make_vit(config)
    seen = []

    class Spy(nnx.Module):
        def __call__(self, x, *, rngs=None):
            seen.append(x)
            return x

    model.blocks = nnx.List([Spy()])
    images = make_images(2)
    model(images)
    model(images, rngs=nnx.Rngs(dropout=0))
    whole, kept = seen
    assert (whole.shape[1], kept.shape[1]) == (6, 3)
    for tokens, chosen in zip(whole, kept, strict=True):
        matches = (tokens[None] == chosen[:, None]).all(-1)
        np.testing.assert_array_equal(matches.sum(1), 1)
        assert matches.any(0).sum() == 3  # no token twice


@pytest.mark.parametrize("dropout_rate", slow_but((0.3,), (0.0, 0.3)))
def test_remat_gives_the_same_gradients(dropout_rate):
    images = make_images(3)

    def gradients(remat):
        config = dataclasses.replace(TINY, remat=remat, dropout_rate=dropout_rate)
        graphdef, params = nnx.split(make_vit(config))

        @jax.jit
        def gradient(params):
            def loss(params):
                model = nnx.merge(graphdef, params)
                return jnp.mean(model(images, rngs=nnx.Rngs(dropout=7)) ** 2)

            return jax.grad(loss)(params)

        jaxpr = str(jax.make_jaxpr(gradient)(params))
        assert ("checkpoint" in jaxpr or "remat" in jaxpr) == remat
        return gradient(params)

    plain, remat = gradients(False), gradients(True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        plain,
        remat,
    )


def test_split_and_merge_under_jit_compile_once():
    traces = 0
    graphdef, state = nnx.split(make_vit())

    @jax.jit
    def apply(state, images):
        nonlocal traces
        traces += 1
        return nnx.merge(graphdef, state)(images)

    images = make_images(2)
    first = apply(state, images)
    second = apply(jax.tree.map(lambda x: 2 * x, state), images)
    assert traces == 1
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(first, make_vit()(images), rtol=1e-5, atol=1e-6)


def test_layer_norms_keep_their_digits_where_means_are_large():
    config = ViTConfig(
        **{"hidden_size": 64, "depth": 1, "num_heads": 2, "mlp_dim": 8},
        **{"image_size": 4, "patch_size": 4, "layer_norm_eps": 1e-12},
    )
    model = ViT(config, rngs=nnx.Rngs(0))
    x = 1000 + jax.random.normal(jax.random.key(0), (5, 64))
    exact = np.float64(x) - np.mean(np.float64(x), -1, keepdims=True)
    exact /= np.sqrt(np.mean(exact**2, -1, keepdims=True))
    for norm in (model.norm, model.blocks[0].norm1, model.blocks[0].norm2):
        np.testing.assert_allclose(norm(x), exact, atol=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [("dropout_rate", "0.1"), ("layer_norm_eps", None), ("layer_norm_eps", "1e-6")],
)
@pytest.mark.usefixtures("unchecked")
def test_numbers_that_are_none_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .* Got {value!r}"):
        ViTConfig.preset("Ti/16", **{field: value})
