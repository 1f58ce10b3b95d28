"""Runs trained side by side are the runs that would be trained alone."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from experiments import cohort, glue, learning, load_config, runner, tasks, train
from experiments.metrics import read_jsonl

RECIPE = learning.Recipe(
    learning_rate=1e-2, steps=6, batch_size=16, seed=0, log_every=2, warmup_steps=1
)


def quick(**changes):
    return load_config("configs/bert_adapter.py:quicktest", changes)


@pytest.fixture(scope="module")
def dataset():
    return glue.load("synthetic_text", directory="", tokenizer="", length=12)


def adapted(seed, method="snnk_relu", dropout=0.1):
    config = quick(**{"model.dropout_rate": dropout})
    base = tasks.build_model(config, 2, nnx.Rngs(params=0))
    return tasks.METHODS[method].adapt(
        base, config, nnx.Rngs(params=seed, projection=seed)
    )


@pytest.mark.slow
def test_each_run_is_the_run_alone(dataset, mesh, tmp_path):
    recipes = [
        RECIPE,
        dataclasses.replace(RECIPE, seed=1),
        dataclasses.replace(RECIPE, seed=1, learning_rate=1e-3),
    ]
    models = [adapted(recipe.seed) for recipe in recipes]
    trainable = tasks.METHODS["snnk_relu"].trainable
    outcomes = cohort.fit(models, trainable, dataset, recipes, mesh=mesh)
    alone, expected = train.fit(
        models[1],
        trainable,
        dataset,
        recipes[1],
        tmp_path,
        mesh=mesh,
        rules=((".*", "replicate"),),
    )
    result = outcomes[1].result
    assert result["recipe"] == expected["recipe"]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["together"] == 3
    assert result["memory_bytes"] > 0 < expected["memory_bytes"]
    for one, other in zip(
        jax.tree.leaves(nnx.state(outcomes[1].model)),
        jax.tree.leaves(nnx.state(alone)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in outcomes[1].history] == [r["step"] for r in rows]
    assert outcomes[1].history[0]["train/loss"] == pytest.approx(
        rows[0]["train/loss"], rel=1e-4
    )
    # Neither the seed nor the rate is the first run's.
    losses = [outcome.result["loss"] for outcome in outcomes]
    assert len({round(loss, 5) for loss in losses}) == 3


@pytest.mark.slow
def test_a_diverging_run_does_not_take_the_others_along(dataset, mesh):
    recipes = [RECIPE, dataclasses.replace(RECIPE, learning_rate=1e38)]
    models = [adapted(0, "full"), adapted(0, "full")]
    good, bad = cohort.fit(models, nnx.Param, dataset, recipes, mesh=mesh)
    assert np.isfinite(good.result["loss"])
    assert bad.result is None


def test_refusals(dataset, mesh):
    other = dataclasses.replace(RECIPE, steps=7)
    models = [adapted(0), adapted(0)]
    with pytest.raises(ValueError, match="differ in seed and learning rate alone"):
        cohort.fit(models, nnx.Param, dataset, [RECIPE, other], mesh=mesh)
    wrong = dataclasses.replace(RECIPE, batch_size=12)
    with pytest.raises(ValueError, match="mesh axis 'data'"):
        cohort.fit(models, nnx.Param, dataset, [wrong, wrong], mesh=mesh)
    with pytest.raises(ValueError, match="same frozen arrays"):
        cohort.fit(
            [adapted(0), _shifted(adapted(0))],
            tasks.METHODS["snnk_relu"].trainable,
            dataset,
            [RECIPE, RECIPE],
            mesh=mesh,
        )


def _shifted(model):
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] = variable[...] + 1
    return nnx.clone(model)


@pytest.mark.slow
def test_the_runner_trains_together_and_repeats_nothing(tmp_path, capsys):
    changes = {
        "together": 2,
        "seeds": (0, 1, 2),
        "methods": ("snnk_standard",),
        "sweep.learning_rates": (1e-3, 1e-2),
    }
    first = runner.run(quick(**changes), tmp_path)
    assert [result["recipe"]["seed"] for result in first] == [0, 1, 2]
    assert [result["together"] for result in first] == [2, 2, 1]
    capsys.readouterr()
    again = runner.run(quick(**changes), tmp_path)
    assert "GFLOP" not in capsys.readouterr().out
    assert [r["score"] for r in again] == [r["score"] for r in first]
    for result in first:
        assert (pathlib.Path(result["workdir"]) / "adapter.safetensors").is_file()
    assert "curves.png" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_finished_runs_are_not_trained_again_with_others(tmp_path, monkeypatch):
    sizes = []
    real = cohort.fit

    def counted(models, *rest, **options):
        sizes.append(len(models))
        return real(models, *rest, **options)

    monkeypatch.setattr(cohort, "fit", counted)
    options = {"methods": ("houlsby",), "together": 2}
    first = runner.run(quick(**options, seeds=(0, 1)), tmp_path)
    adapters = {p: p.read_bytes() for p in tmp_path.rglob("adapter.safetensors")}
    # One more seed, other numbers of runs side by side: only what is new is trained.
    again = runner.run(quick(**options, seeds=(0, 1, 2)), tmp_path)
    runner.run(quick(**options | {"together": 4}, seeds=(0, 1, 2, 3)), tmp_path)
    assert sizes == [2, 1, 1]
    assert again[:2] == first
    alone = runner.run(quick(**options | {"together": 1}, seeds=(0, 1, 4)), tmp_path)
    assert alone[:2] == first
    assert all(path.read_bytes() == data for path, data in adapters.items())
    # And the other way round.
    mixed = runner.run(quick(**options, seeds=(4, 5)), tmp_path)
    assert sizes == [2, 1, 1, 1]
    keys = ("score", "loss", "counts", "adapter_bytes", "title", "method", "workdir")
    assert [mixed[0][k] for k in keys] == [alone[2][k] for k in keys]


@pytest.mark.slow
def test_a_run_that_diverged_is_not_tried_again(tmp_path, monkeypatch):
    config = quick(
        methods=("full",), **{"sweep.learning_rates": (1e-3, 1e38), "optim.steps": 4}
    )
    runner.run(config, tmp_path)
    found = json.loads((tmp_path / "sweep/full-lr1e+38/summary.json").read_text())
    assert found["diverged"]
    names, real = [], train.fit

    def noted(*rest, name, **options):
        names.append(name)
        return real(*rest, name=name, **options)

    monkeypatch.setattr(train, "fit", noted)
    runner.run(config, tmp_path)
    assert names == ["full-lr0.001", "full-lr0.001-seed0"]


def test_a_run_whose_adapter_is_not_written_is_finished_alone(tmp_path, monkeypatch):
    """A stop may come between the two files."""
    options = {"methods": ("houlsby",), "seeds": (0, 1)}
    (first, _) = runner.run(quick(**options), tmp_path)
    adapter = pathlib.Path(first["workdir"]) / "adapter.safetensors"
    size, arrays = adapter.stat().st_size, load_file(adapter)
    adapter.unlink()
    again = runner.run(quick(**options, together=2), tmp_path)
    # Not the bytes: safetensors writes the entries of a header in any order.
    assert adapter.stat().st_size == size
    jax.tree.map(np.testing.assert_array_equal, load_file(adapter), arrays)
    assert again[0]["score"] == first["score"]
