import json

import numpy as np
import pytest
from flax import nnx

from experiments import compress, compress_data, load_config, sentences
from experiments.compress import METHODS
from snnk_jax.models.bert import Bert, BertConfig


@pytest.fixture(scope="module")
def quick():
    return load_config("configs/compress.py:quicktest")


@pytest.mark.slow
def test_quicktest_and_a_second_run_that_measures_nothing(quick, tmp_path, capsys):
    rows = compress.run(quick, tmp_path)
    assert [row["name"] for row in rows] == [
        "dense",
        *(f"{method} | 2 | 0.25" for method in quick.methods),
    ]
    assert all(row["share"] <= 0.25 for row in rows[1:])
    assert rows[0]["agreement"] > 1 - 1e-9
    text = (tmp_path / "report.md").read_text()
    assert all(METHODS[method].title in text for method in quick.methods)
    plots = {"score.png", "latency.png", "blocks.png"}
    assert plots <= {f.name for f in tmp_path.iterdir()}
    assert all(min(row["ms"], row["dense_ms"]) > 0 for row in rows[1:])
    before = (tmp_path / "rows.jsonl").read_text()
    capsys.readouterr()
    assert compress.run(quick, tmp_path) == json.loads(json.dumps(rows))
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_jobs_that_no_budget_pays_for_are_left_out(quick):
    config = load_config(
        "configs/compress.py:quicktest",
        {"methods": tuple(METHODS), "budgets": (0.25, 0.0625), "last": (1, 2)},
    )
    case = compress_data.load(config)
    names = [name for name, _ in compress.jobs(config, case)]
    assert len(set(names)) == len(names)
    assert "relu_linear | 2 | 0.25" in names
    assert "relu_linear | 2 | 0.0625" not in names
    # Those of one size are measured once.
    assert [name for name in names if name.startswith("int8")] == [
        "int8 | 1 | 1",
        "int8 | 2 | 1",
    ]
    assert [block.name for block in case.blocks(1)] == ["blocks/1/mlp"]


def test_every_second_layer_is_left_out(quick):
    case = compress_data.load(quick)
    # Of the last two of three it is the one that was not there at first.
    case.model.blocks.append(Bert(case.model.config, rngs=nnx.Rngs(5)).blocks[0])
    row = compress._drop_layers(case, quick, 2)
    assert row["share"] == 0.5
    assert row["agreement"] > 1 - 1e-9 > case.score(case.model)["agreement"]
    assert len(case.model.blocks) == 3
    assert "| every second layer left out | last 2 | 0.5000 |" in compress._table(
        [row], ("agreement",)
    ).replace("  ", " ")


def test_embeddings_do_not_depend_on_the_batch():
    texts = sentences.synthetic(12).val
    config = BertConfig.preset(
        "tiny", vocab_size=64, max_length=12, pool="mean", head="none"
    )
    model = Bert(config, rngs=nnx.Rngs(0))
    both = [compress_data.embed(model, texts, size) for size in (7, 64)]
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5)


def test_cosines_and_ranks():
    pairs = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    np.testing.assert_allclose(compress_data.cosines(pairs), [0.0, 0.6])
    assert compress_data.rank(np.arange(5), np.arange(5) ** 3) > 1 - 1e-9


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("study", "speech", "config.study must be one of"),
        ("methods", ("ours", "other"), "config.methods must be among"),
        ("budgets", (0.0,), "config.budgets must be in"),
        ("last", (0,), "config.last must be at least 1"),
        ("batch_size", 0, "config.batch_size must be positive"),
        ("probe", -1, "config.probe must not be negative"),
    ],
)
def test_bad_values(key, value, message):
    with pytest.raises(ValueError, match=message):
        load_config("configs/compress.py", {key: value})


@pytest.mark.parametrize("arg", ["", "vit", "cifar10", "goals", "budget", "quicktest"])
def test_every_argument_gives_a_config(arg):
    config = load_config(f"configs/compress.py:{arg}")
    assert config.name == "compress" + (f"_{arg}" if arg else "")
    with pytest.raises(ValueError, match="config argument must be"):
        load_config("configs/compress.py:other")
