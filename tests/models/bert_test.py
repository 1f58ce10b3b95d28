import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from snnk_jax.models.bert import Bert, BertConfig
from snnk_jax.testing import call

TINY = BertConfig(
    hidden_size=8,
    depth=2,
    num_heads=2,
    mlp_dim=12,
    vocab_size=11,
    max_length=7,
    num_outputs=3,
)
POOLS = ("pooler", "cls", "mean")
HEADS = ("linear", "embedding", "none")
CASES = list(itertools.product(POOLS, HEADS))


def make_bert(seed=0, dtype=None, config=TINY, **changes):
    """A BERT whose parameters are all random, the zero-initialised ones too."""
    config = dataclasses.replace(config, **changes)
    model = Bert(config, dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype),
        nnx.state(model),
    )
    nnx.update(model, state)
    return model


def make_inputs(*batch, length=5, seed=0):
    """Token ids, token types and a mask that keeps the first token and some others."""
    rng = np.random.default_rng(seed)
    shape = (*batch, length)
    mask = rng.random(shape) < 0.6
    mask[..., 0] = True
    return (
        jnp.asarray(rng.integers(TINY.vocab_size, size=shape)),
        jnp.asarray(rng.integers(TINY.num_types, size=shape)),
        jnp.asarray(mask),
    )


def numpy_bert(model, tokens, types=None, mask=None):
    """The forward pass of one sequence after the paper, in float64 NumPy."""
    config = model.config
    tokens = np.asarray(tokens)
    types = np.zeros_like(tokens) if types is None else np.asarray(types)
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)

    def value(variable):
        return np.float64(variable[...])

    def dense(layer, x):
        return x @ value(layer.kernel) + value(layer.bias)

    def norm(layer, x):
        centred = x - x.mean(-1, keepdims=True)
        variance = np.mean(centred**2, -1, keepdims=True)
        scaled = centred / np.sqrt(variance + config.layer_norm_eps)
        return scaled * value(layer.scale) + value(layer.bias)

    def gelu(x):
        if config.activation == "gelu":
            return x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2.0)))
        return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def attention(layer, x):
        size = config.hidden_size // config.num_heads
        outputs = []
        for head in range(config.num_heads):
            part = slice(head * size, (head + 1) * size)
            q, k, v = (
                dense(m, x)[:, part] for m in (layer.query, layer.key, layer.value)
            )
            weights = np.exp(q @ k.T / np.sqrt(size)) * mask
            outputs.append(weights / weights.sum(-1, keepdims=True) @ v)
        return dense(layer.out, np.concatenate(outputs, -1))

    table = model.embeddings
    x = value(table.word.embedding)[tokens] + value(table.token_type.embedding)[types]
    x = norm(table.norm, x + value(table.position.embedding)[: len(tokens)])
    for block in model.blocks:
        x = norm(block.norm1, x + attention(block.attention, x))
        hidden = gelu(dense(block.mlp.fc1, x))
        x = norm(block.norm2, x + dense(block.mlp.fc2, hidden))
    x = x[mask].mean(0) if config.pool == "mean" else x[0]
    if config.pool == "pooler":
        x = np.tanh(dense(model.pooler.dense, x))
    if config.head == "linear":
        return dense(model.head, x)
    return x / np.linalg.norm(x) if config.head == "embedding" else x


def num_parameters(config):
    model = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


# "base" and "minilm-l6" are the counts of bert-base-uncased and all-MiniLM-L6-v2, the
# others those of google/bert_uncased_L-*.
@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("tiny", 4_385_920),
        ("mini", 11_170_560),
        ("base", 109_482_240),
        ("minilm-l6", 22_713_216),
    ],
)
def test_preset_parameter_counts(preset, count):
    assert num_parameters(BertConfig.preset(preset, head="none")) == count


def test_only_the_pooler_has_a_pooling_map():
    counts = {p: num_parameters(dataclasses.replace(TINY, pool=p)) for p in POOLS}
    assert counts["pooler"] - counts["cls"] == 8 * 8 + 8
    assert counts["cls"] == counts["mean"]


def test_only_a_linear_head_has_parameters():
    counts = {h: num_parameters(dataclasses.replace(TINY, head=h)) for h in HEADS}
    assert counts["linear"] - counts["none"] == 8 * 3 + 3
    assert counts["embedding"] == counts["none"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1. Got 0"),
        ({"depth": 0}, "depth must be a whole number of at least 1. Got 0"),
        ({"num_heads": 0}, "num_heads must be a whole number of at least 1. Got 0"),
        ({"mlp_dim": -1}, "mlp_dim must be a whole number of at least 1. Got -1"),
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1. Got 0"),
        ({"max_length": 0}, "max_length must be a whole number of at least 1. Got 0"),
        ({"num_types": 0}, "num_types must be a whole number of at least 1. Got 0"),
        ({"num_outputs": 0}, "num_outputs must be a whole number of at least 1. Got 0"),
        ({"num_heads": 3}, "hidden_size must be divisible by num_heads. Got 8 and 3"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\). Got 1.0"),
        (
            {"attention_dropout_rate": -0.1},
            r"attention_dropout_rate must be in \[0, 1\). Got -0.1",
        ),
        ({"pool": "max"}, "pool must be one of pooler, cls, mean. Got 'max'"),
        (
            {"head": "softmax"},
            "head must be one of linear, embedding, none. Got 'softmax'",
        ),
        ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh. Got 'rel"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("name", ["", "Base", "bert-base-uncased", "huge"])
def test_unknown_preset(name):
    with pytest.raises(ValueError, match=f"one of tiny, .*minilm-l6. Got '{name}'"):
        BertConfig.preset(name)


def test_preset_takes_overrides():
    config = BertConfig.preset("small", depth=1, pool="mean", vocab_size=99)
    assert (config.hidden_size, config.num_heads, config.mlp_dim) == (512, 8, 2048)
    assert (config.depth, config.pool, config.vocab_size) == (1, "mean", 99)


@pytest.mark.parametrize(("pool", "head"), CASES)
def test_forward_agrees_with_float64_numpy(pool, head):
    model = make_bert(pool=pool, head=head)
    inputs = make_inputs(3)
    expected = [numpy_bert(model, *one) for one in zip(*inputs, strict=True)]
    np.testing.assert_allclose(model(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "gelu_tanh"},
        {"layer_norm_eps": 0.1},
        {"num_heads": 1},
        {"num_heads": 8},
        # nnx.Embed has a path of its own for a single row.
        {"num_types": 1},
    ],
)
def test_forward_of_other_sizes_agrees_with_float64_numpy(change):
    model = make_bert(**change)
    tokens, types, mask = make_inputs(3)
    types = types % model.config.num_types
    expected = [
        numpy_bert(model, *one) for one in zip(tokens, types, mask, strict=True)
    ]
    np.testing.assert_allclose(
        call(model, tokens, types, mask), expected, rtol=1e-5, atol=1e-5
    )


def test_exact_and_tanh_gelu_differ():
    inputs = make_inputs(3)
    exact, tanh = (
        make_bert(activation=name)(*inputs) for name in ("gelu", "gelu_tanh")
    )
    # More than the tolerance of the comparison with NumPy, or that shows nothing.
    assert np.abs(exact - tanh).max() > 5e-5


@pytest.mark.parametrize("pool", POOLS)
def test_without_types_and_mask_all_tokens_are_of_type_zero_and_kept(pool):
    model = make_bert(pool=pool)
    tokens = make_inputs(3)[0]
    plain = model(tokens)
    explicit = model(tokens, jnp.zeros_like(tokens), jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(plain, explicit, rtol=1e-5, atol=1e-6)
    expected = [numpy_bert(model, one) for one in tokens]
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)


def test_a_sequence_of_the_greatest_length():
    model = make_bert()
    inputs = make_inputs(1, length=TINY.max_length)
    expected = [numpy_bert(model, *one) for one in zip(*inputs, strict=True)]
    np.testing.assert_allclose(call(model, *inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_padding_changes_nothing(pool):
    model = make_bert(pool=pool)
    tokens, types, mask = make_inputs(3, length=7)
    kept = jnp.arange(7) < 5
    mask = jnp.broadcast_to(kept, mask.shape)
    padded = call(model, tokens, types, mask)
    short = model(tokens[:, :5], types[:, :5])
    np.testing.assert_allclose(padded, short, rtol=1e-5, atol=1e-6)
    other = jnp.where(mask, tokens, (tokens + 3) % TINY.vocab_size)
    other_types = jnp.where(mask, types, 1 - types)
    np.testing.assert_array_equal(call(model, other, other_types, mask), padded)
    # The ids do matter where the mask keeps them.
    changed = call(model, (tokens + 3) % TINY.vocab_size, types, mask)
    assert np.abs(changed - padded).max() > 1e-2


@pytest.mark.parametrize("batch", [(), (1,), (6,), (2, 3), (1, 2, 3)])
def test_any_leading_batch_rank(batch):
    model = make_bert()
    rows = math.prod(batch)
    inputs = [x[:rows] for x in make_inputs(6)]
    outputs = call(model, *(x.reshape(*batch, 5) for x in inputs))
    assert outputs.shape == (*batch, TINY.num_outputs)
    expected = [numpy_bert(model, *one) for one in zip(*inputs, strict=True)]
    np.testing.assert_allclose(
        outputs.reshape(rows, -1), expected, rtol=1e-5, atol=1e-5
    )


def test_the_first_loss_is_that_of_guessing():
    outputs = Bert(TINY, rngs=nnx.Rngs(0))(*make_inputs(3))
    np.testing.assert_array_equal(outputs, np.zeros((3, TINY.num_outputs)))


@pytest.mark.parametrize("pool", POOLS)
def test_a_sentence_embedding_has_norm_one_and_the_direction_of_the_pool(pool):
    inputs = make_inputs(3)
    unit = make_bert(pool=pool, head="embedding")(*inputs)
    plain = np.asarray(make_bert(pool=pool, head="none")(*inputs))
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), np.ones(3), rtol=1e-6)
    norm = np.linalg.norm(plain, axis=-1, keepdims=True)
    np.testing.assert_allclose(unit * norm, plain, rtol=1e-5, atol=1e-6)


def test_features_and_hidden_states_are_what_the_head_and_the_pool_read():
    model = make_bert(pool="cls")
    inputs = make_inputs(3)
    hidden = model.hidden_states(*inputs)
    assert hidden.shape == (3, 5, 8)
    np.testing.assert_array_equal(model.features(*inputs), hidden[:, 0])
    np.testing.assert_array_equal(model(*inputs), model.head(hidden[:, 0]))


@pytest.mark.parametrize("option", ["dropout_rate", "attention_dropout_rate"])
def test_dropout_needs_rngs_and_follows_the_key(option):
    model = make_bert(**{option: 0.5})
    inputs = make_inputs(3)
    plain = make_bert()(*inputs)

    def noisy(seed):
        return call(model, *inputs, rngs=nnx.Rngs(dropout=seed))

    first, second = noisy(0), noisy(1)
    np.testing.assert_array_equal(model(*inputs), plain)
    np.testing.assert_array_equal(first, noisy(0))
    assert np.abs(first - plain).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


def test_rngs_without_a_rate_change_nothing():
    model = make_bert()
    inputs = make_inputs(3)
    np.testing.assert_array_equal(
        model(*inputs, rngs=nnx.Rngs(dropout=0)), model(*inputs)
    )


def test_attention_dropout_keeps_to_the_mask():
    model = make_bert(attention_dropout_rate=0.5)
    tokens, types, mask = make_inputs(3)
    assert not mask.all()
    other = jnp.where(mask, tokens, (tokens + 1) % TINY.vocab_size)
    first, second = (
        call(model, ids, types, mask, rngs=nnx.Rngs(dropout=0))
        for ids in (tokens, other)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_remat_gives_the_same_values_and_gradients():
    inputs = make_inputs(3)

    def value_and_gradients(remat):
        # Each block must draw its own mask, and the same one when recomputed.
        rates = {"dropout_rate": 0.3, "attention_dropout_rate": 0.3}
        graphdef, params = nnx.split(make_bert(remat=remat, **rates))
        # Compiles in a fraction of the time that threefry takes.
        key = jax.random.key(7, impl="unsafe_rbg")

        def loss(params):
            model = nnx.merge(graphdef, params)
            return jnp.mean(model(*inputs, rngs=nnx.Rngs(dropout=key)) ** 2)

        traced = jax.jit(jax.value_and_grad(loss)).trace(params)
        jaxpr = str(traced.jaxpr)
        assert ("checkpoint" in jaxpr or "remat" in jaxpr) == remat
        return traced.lower().compile()(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        value_and_gradients(False),
        value_and_gradients(True),
    )


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_bfloat16_computation(pool):
    model = make_bert(pool=pool)
    half = make_bert(pool=pool, dtype=jnp.bfloat16)
    inputs = make_inputs(3)
    # jax.nn.dot_product_attention and nnx.LayerNorm promote inside.
    with jax.numpy_dtype_promotion("standard"):
        outputs = call(half, *inputs)
    assert outputs.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    expected = model(*inputs)
    error = jnp.max(jnp.abs(outputs.astype(jnp.float32) - expected))
    # bfloat16 keeps 8 bits; a handful of layers loses a few of them.
    assert 0 < error < 0.05 * jnp.max(jnp.abs(expected))


@pytest.mark.parametrize("pool", POOLS)
def test_fully_masked_rows_are_finite_with_finite_gradients(pool):
    # Scaling to norm one divides by the zero that the mean of no tokens is.
    graphdef, params = nnx.split(make_bert(pool=pool, head="embedding"))
    tokens, types, mask = make_inputs(3)
    mask = mask.at[1].set(False)

    def loss(params):
        outputs = nnx.merge(graphdef, params)(tokens, types, mask)
        return jnp.sum(outputs[:, 0]), outputs

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert np.all(np.isfinite(outputs))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_fully_masked_rows_are_finite_in_half_precision(dtype):
    model = make_bert(pool="mean", head="embedding", dtype=dtype)
    tokens, types, mask = make_inputs(3)
    with jax.numpy_dtype_promotion("standard"):
        # Not jitted: XLA on the CPU refuses the float16 products of the attention.
        outputs = model(tokens, types, mask.at[1].set(False))
    assert np.all(np.isfinite(outputs))


@pytest.mark.parametrize("length", [0, 8, 100])
def test_a_sequence_of_no_possible_length(length):
    with pytest.raises(ValueError, match=rf"hold 1 to 7 ids .*Got shape \(2, {length}"):
        make_bert()(jnp.zeros((2, length), jnp.int32))


@pytest.mark.usefixtures("unchecked")
def test_a_lone_token_id_is_no_sequence():
    with pytest.raises(ValueError, match=r"tokens must hold 1 to 7 ids.*shape \(\)"):
        make_bert()(jnp.array(3))


@pytest.mark.parametrize("name", ["token_types", "mask"])
@pytest.mark.parametrize("shape", [(5,), (2, 4), (1, 5), (2, 5, 1)])
@pytest.mark.usefixtures("unchecked")
def test_types_and_mask_of_another_shape(name, shape):
    dtype = bool if name == "mask" else jnp.int32
    with pytest.raises(ValueError, match=rf"{name} must have the shape of .*\(2, 5\)"):
        make_bert()(jnp.zeros((2, 5), jnp.int32), **{name: jnp.ones(shape, dtype)})


@pytest.mark.parametrize("head", HEADS)
def test_jit_equals_eager(head):
    model = make_bert(pool="mean", head=head)
    inputs = make_inputs(3)
    np.testing.assert_allclose(
        call(model, *inputs), model(*inputs), rtol=1e-5, atol=1e-6
    )


def test_split_and_merge_under_jit_compile_once():
    traces = 0
    graphdef, state = nnx.split(make_bert())

    @jax.jit
    def apply(state, *inputs):
        nonlocal traces
        traces += 1
        return nnx.merge(graphdef, state)(*inputs)

    inputs = make_inputs(2)
    first = apply(state, *inputs)
    second = apply(jax.tree.map(lambda x: 2 * x, state), *inputs)
    assert traces == 1
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_mask_of_numbers_is_one_of_truths(pool):
    """As Hugging Face's attention_mask."""
    model = make_bert(pool=pool, attention_dropout_rate=0.5)
    tokens, types, mask = make_inputs(3)
    for dropout in (False, True):
        outputs = [
            model(tokens, types, m, rngs=nnx.Rngs(0) if dropout else None)
            for m in (mask, mask.astype(int))
        ]
        np.testing.assert_array_equal(*outputs)
