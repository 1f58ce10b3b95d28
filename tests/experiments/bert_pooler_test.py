"""Heads of a frozen BERT: sizes, states, one recipe for all, reports that go on."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import snnk_jax as snnk
from experiments import bert_pooler, load_config, pooler_states, pooler_training
from experiments.pooler_heads import METHODS, dense_head
from experiments.pooler_states import States
from snnk_jax.models.bert import Bert, BertConfig


def quick(**changes):
    return load_config("configs/bert_pooler.py:quicktest", changes)


def make_states(classes=2, dim=12, n=96):
    """Classes told apart by the sign of one input."""
    rng = np.random.default_rng(0)
    x = {s: np.float32(rng.normal(size=(n, dim))) for s in ("train", "val", "test")}
    y = {s: np.int32(v[:, 0] > 0) for s, v in x.items()}
    return States(x, y, classes, "accuracy", "0" * 64, None)


def built(name, states, config):
    source = dense_head(states.dim, states.dim, states.classes, nnx.Rngs(1))
    build = METHODS[name].build
    assert build is not None
    return build(config, states, source, nnx.Rngs(params=2, projection=2))


def test_sizes_are_the_arithmetic():
    states, config = make_states(), quick()
    m, k = 8, 32  # features of a pooler, of merged heads
    d, o = 12, 2
    counts = {
        "dense": d * d + d + d * o + o,
        "linear": d * o + o,
        "cos_random": m * d + d + d * o + o,
        "merged_relu": k * o + o,
    }
    for name, count in counts.items():
        model = built(name, states, config)
        assert (
            snnk.nn.count_parameters(model, nnx.Param).total
            - (snnk.nn.count_parameters(model, nnx.Param).projections)
            == count
        ), name


@pytest.mark.parametrize(
    ("narrow", "like"), [("dense_narrow", "cos_random"), ("dense_slim", "merged_relu")]
)
def test_narrow_dense_heads_have_the_size_of_their_rivals(narrow, like):
    states, config = make_states(), quick()
    sizes = []
    for name in (narrow, like):
        counts = snnk.nn.count_parameters(built(name, states, config), nnx.Param)
        sizes.append(counts.trained + counts.head)
    unit = states.dim + 1 + states.classes
    assert abs(sizes[0] - sizes[1]) <= unit / 2 + 1


@pytest.mark.slow
def test_heads_made_of_weights_do_at_once_what_the_dense_one_does():
    states, config = make_states(n=600), quick(**{"pooler.num_features": 256})
    dense = dense_head(12, 12, 2, nnx.Rngs(1))
    head, pooler = dense.head, dense.pooler
    head.kernel[...] = jnp.asarray(np.random.default_rng(1).normal(size=(12, 2)), "f4")
    pooler.dense.bias[...] = jnp.linspace(-0.5, 0.5, 12)
    x = jnp.asarray(states.x["test"])
    for name in ("cos_samples", "merged_tanh_samples"):
        build = METHODS[name].build
        assert build is not None
        made = build(config, states, dense, nnx.Rngs(params=0, projection=0))
        error = jnp.mean((made(x) - dense(x)) ** 2) / jnp.var(dense(x))
        assert error < 0.1, name


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["mean", "pooler"])
def test_states_in_batches_of_one_length_are_those_of_the_model(pool):
    config = BertConfig(
        hidden_size=8, depth=1, num_heads=2, mlp_dim=16, vocab_size=30, max_length=40,
        pool=pool, head="none",
    )  # fmt: skip
    model = Bert(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, 11)
    mask = np.arange(40)[None] < lengths[:, None]
    tokens = np.where(mask, rng.integers(1, 30, (11, 40)), 0).astype(np.int32)
    batch = {"tokens": tokens, "token_types": np.zeros_like(tokens), "mask": mask}
    found = pooler_states.encode(model, batch, size=4)
    hidden = model.hidden_states(*map(jnp.asarray, batch.values()))
    expected = model.features(*map(jnp.asarray, batch.values()))
    if pool == "pooler":
        expected = hidden[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_pretrained_pooler_is_where_the_dense_head_begins(tmp_path):
    states = make_states()
    kernel, bias = np.eye(12, dtype=np.float32), np.ones(12, np.float32)
    states = States(**(vars(states) | {"pooler": (kernel, bias)}))
    model = pooler_training.build("dense", states, quick(), 0, tmp_path)
    np.testing.assert_array_equal(model.pooler.dense.kernel[...], kernel)
    np.testing.assert_array_equal(model.pooler.dense.bias[...], bias)
    fitted = pooler_training.build("relu_samples", states, quick(), 0, tmp_path)
    assert np.any(np.asarray(fitted.pooler.readout[...]))


def test_training_learns_and_repeats_itself():
    states = make_states(n=400)
    config = quick(**{"optim.steps": 60, "optim.warmup_steps": 5})
    model = built("merged_relu", states, config)
    runs = [pooler_training.fit(model, states, config, 0.03, 1) for _ in range(2)]
    assert pooler_training.score(runs[0].model, states, "test") > 0.85
    assert runs[0].loss == runs[1].loss
    other = pooler_training.fit(model, states, config, 0.03, 2)
    assert other.loss != runs[0].loss
    assert not np.any(np.asarray(model.head.readout[...]))


def test_scores_stand_under_their_tasks(tmp_path):
    sizes = dict.fromkeys(("trained", "frozen", "bytes", "fit_seconds"), 1)
    rows = [
        {"task": task, "method": name, "title": name, "metric": "f1", "train_size": i}
        | sizes
        | {"scores": [i / 10 + j / 100]}
        for i, task in enumerate(("mrpc", "rte"))
        for j, name in enumerate(("dense", "linear"))
    ]
    table = bert_pooler.report(tmp_path, rows, quick())[2].splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table]
    assert cells[0] == ["head", "mrpc (f1)", "rte (f1)"]
    assert cells[2:] == [
        ["dense", "0.0 (1 fit)", "10.0 (1 fit)"],
        ["linear", "1.0 (1 fit)", "11.0 (1 fit)"],
    ]


@pytest.mark.slow
def test_the_quicktest_writes_a_report_and_goes_on(tmp_path):
    methods = ("dense", "relu_samples", "merged_relu", "ridge_cos")
    config = quick(methods=methods, seeds=(0,))
    rows = bert_pooler.run(config, tmp_path, command="the command")
    assert [row["method"] for row in rows] == list(methods)
    report = (tmp_path / "report.md").read_text()
    assert all(row["title"] in report for row in rows)
    assert (tmp_path / "score.png").is_file()
    merged = rows[2]
    file = tmp_path / "heads" / "synthetic_text" / "merged_relu.safetensors"
    assert merged["bytes"] == file.stat().st_size
    arrays = load_file(file)
    assert sum(a.size for a in arrays.values()) == merged["trained"] == 33 * 2
    # A kill between two jobs: what was measured stays, the rest is done.
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:3]) + '\n{"name": "synth')
    again = bert_pooler.run(config, tmp_path)
    assert [row["scores"] for row in again] == [row["scores"] for row in rows]
    assert again[:3] == [json.loads(line) for line in lines[:3]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("dense", "dens")}, "config.methods must be some of"),
        ({"methods": ("relu_samples",)}, "must begin with dense"),
        ({"tasks": ("wnli",)}, "config.tasks must be some of"),
        ({"tasks": ()}, "config.tasks must be some of"),
        ({"seeds": (1, 2)}, "hold config.sweep.seed"),
        ({"sweep.learning_rates": (0.0,)}, "sweep.learning_rates must be positive"),
        ({"model.pool": "max"}, "config.model.pool must be"),
        ({"pooler.num_features": 0}, "config.pooler.num_features must be positive"),
        ({"optim.warmup_steps": 2}, "optim.warmup_steps must be"),
    ],
)
def test_values_of_no_use_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        quick(**changes)


def test_every_method_has_a_way_to_be_made():
    for name, method in METHODS.items():
        assert (method.build is None) == (method.ridge is not None), name
    assert {m.source for m in METHODS.values()} == {"none", "pooler", "head"}
