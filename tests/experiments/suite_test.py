"""Several tasks, one recipe, one table."""

import json

import pytest
from ml_collections import ConfigDict

from experiments import load_config, suite


def make_config(**changes):
    changes = {
        "methods": ("snnk_relu", "houlsby"),
        "seeds": (0, 1),
        "together": 2,
        "sweep.learning_rates": (1e-3, 1e-2),
    } | changes
    config = load_config("configs/bert_adapter.py:quicktest", changes)
    with config.unlocked():
        config.experiment = "suite"
        config.tasks = ConfigDict(
            {
                name: {
                    "data": "synthetic_text",
                    "length": length,
                    "steps": 2,
                    "warmup_steps": 1,
                    "rates_of": "first",
                }
                for name, length in (("first", 12), ("second", 8))
            }
        )
    return config


def row(method, scores, **fields):
    return {
        "method": method,
        "title": method.title(),
        "scores": scores,
        "mean": sum(scores) / len(scores),
        "low": min(scores),
        "high": max(scores),
        "learning_rate": 0.1,
        "trained": 10,
        "bytes": 2000,
        "step_ms": 1.0,
        "memory_bytes": 10**6,
        "seconds": 3.0,
    } | fields


def test_means_are_over_tasks_and_ranges_over_seeds():
    tables = {
        "a": [row("x", [0.5, 0.7]), row("y", [0.2, 0.2])],
        # Another order of methods, another spread.
        "b": [row("y", [0.4, 0.8]), row("x", [0.9, 0.7], learning_rate=0.2)],
    }
    x, y = suite.average(tables)
    assert (x["method"], y["method"]) == ("x", "y")
    assert x["tasks"] == pytest.approx({"a": 0.6, "b": 0.8})
    # Seed by seed 0.7 and 0.7: opposite luck on two tasks is no spread of the mean.
    assert (x["mean"], x["low"], x["high"]) == pytest.approx((0.7, 0.7, 0.7))
    assert (y["low"], y["high"]) == pytest.approx((0.3, 0.5))
    assert x["rates"] == {"a": 0.1, "b": 0.2}
    assert x["seconds"] == 6.0
    text = suite.markdown_table([y, x], {"a": "f1", "b": "accuracy"}).splitlines()
    assert "a, f1" in text[0]
    assert "b, accuracy" in text[0]
    assert text[2].startswith("| X ")
    assert "70.00" in text[2]


def test_a_task_changes_what_it_names_and_nothing_else():
    config = make_config()
    first, second = (suite.task_config(config, name) for name in ("first", "second"))
    assert (first.data.length, second.data.length) == (12, 8)
    assert first.sweep.learning_rates == (1e-3, 1e-2)
    assert second.sweep.learning_rates == ()
    assert first.methods == second.methods == config.methods
    assert not {"tasks", "experiment"} & set(first)


def test_refusals():
    config = make_config()
    with config.unlocked():
        config.tasks.first.rates_of = "second"
    with pytest.raises(ValueError, match="one that chooses"):
        suite.check(config)
    with pytest.raises(ValueError, match="must not be empty for a suite"):
        suite.check(make_config(**{"sweep.learning_rates": ()}))
    with pytest.raises(ValueError, match="among"):
        suite.check(make_config(methods=("hulsby",)))


@pytest.mark.parametrize("arg", ["suite", "suite,reduced", "stsb,sweep", "rte"])
def test_the_recipes_are_sound(arg):
    config = load_config(f"configs/bert_adapter.py:{arg}")
    if arg.startswith("suite"):
        assert set(config.tasks) == {"mrpc", "stsb", "cola", "rte", "sst2"}
        names = suite.order(config)
        for name in names:
            assert names.index(config.tasks[name].rates_of) <= names.index(name)
    if "reduced" in arg:
        assert (config.data.train_size, config.together) == (2000, 1)
        assert set(config.methods) < set(config.optim.learning_rates)


@pytest.mark.slow
def test_a_suite_runs_reports_and_repeats_nothing(tmp_path, capsys):
    config = make_config()
    results = suite.run(config, tmp_path)
    assert list(results) == ["first", "second"]
    rates = [
        {r["method"]: r["recipe"]["learning_rate"] for r in found}
        for found in results.values()
    ]
    assert rates[0] == rates[1]
    assert rates[0] == json.loads((tmp_path / "first/sweep.json").read_text())
    assert not (tmp_path / "second/sweep.json").exists()
    text = (tmp_path / "report.md").read_text()
    assert "first, accuracy" in text
    assert "score.png" in text
    assert (tmp_path / "score.png").is_file()
    capsys.readouterr()
    again = suite.run(config, tmp_path)
    assert "GFLOP" not in capsys.readouterr().out
    assert [r["score"] for r in again["second"]] == [
        r["score"] for r in results["second"]
    ]
    # One method alone shares the folder: its runs are there already.
    suite.run(make_config(methods=("houlsby",)), tmp_path)
    assert "GFLOP" not in capsys.readouterr().out


def test_every_method_can_be_in_a_suite():
    suite.check(make_config(methods=("snnk_leaky",)))


@pytest.mark.usefixtures("unchecked")
def test_files_of_all_tasks_are_looked_for_first(tmp_path):
    config = load_config(
        "configs/bert_adapter.py:suite,reduced", {"data.dir": str(tmp_path)}
    )
    for folder in ("MRPC", "STS-B", "CoLA", "RTE"):
        (tmp_path / folder).mkdir()
        for split in ("train", "dev"):
            (tmp_path / folder / f"{split}.tsv.gz").touch()
    with pytest.raises(FileNotFoundError, match="holds SST-2/train.tsv.gz"):
        suite.run(config, tmp_path / "work")
    assert not (tmp_path / "work").exists()
