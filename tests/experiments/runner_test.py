import concurrent.futures
import json
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import load_config, runs, workdirs
from experiments.metrics import read_jsonl
from experiments.runner import run

ROOT = pathlib.Path(__file__).parent.parent.parent
# The others have experiments and tests of their own.
CONFIGS = sorted(
    path.stem
    for path in ROOT.glob("configs/*.py")
    if "experiment" not in load_config(f"{path}:quicktest")
)
QUICK = "configs/vit_adapter.py:quicktest"


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_quicktest_of_every_config(name, tmp_path):
    config = load_config(f"configs/{name}.py:quicktest", {"export": ""})
    results = run(config, tmp_path)
    assert [result["method"] for result in results] == list(config.methods)
    for file in ("config.json", "env.json", "report.md", "results.json"):
        assert (tmp_path / file).stat().st_size > 0
    for result in results:
        folder = pathlib.Path(result["workdir"])
        assert (folder / "metrics.jsonl").is_file()
        assert (
            result["adapter_bytes"] == (folder / "adapter.safetensors").stat().st_size
        )
    png = (tmp_path / "score.png").read_bytes()
    assert png.startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_sweep_picks_a_rate_and_does_not_repeat_finished_runs(tmp_path):
    config = load_config(
        QUICK,
        {
            "methods": ("snnk_relu",),
            "seeds": (0, 1),
            "sweep.learning_rates": (1e-3, 1e-2),
        },
    )
    results = run(config, tmp_path)
    rates = json.loads((tmp_path / "sweep.json").read_text())
    assert rates["snnk_relu"] in (1e-3, 1e-2)
    assert {result["recipe"]["learning_rate"] for result in results} == set(
        rates.values()
    )
    chosen = json.loads(
        (tmp_path / f"sweep/snnk_relu-lr{rates['snnk_relu']:g}/result.json").read_text()
    )
    assert chosen["split"] == "val"
    row = json.loads((tmp_path / "results.json").read_text())["table"][0]
    accuracies = [result["accuracy"] for result in results]
    assert row["seeds"] == 2
    assert (row["low"], row["high"]) == (min(accuracies), max(accuracies))

    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    again = run(config, tmp_path)
    assert [result["accuracy"] for result in again] == accuracies
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")} == stamps


@pytest.mark.slow
def test_a_workdir_of_other_settings_is_refused(tmp_path):
    run(load_config(QUICK, {"methods": ("linear_probe",)}), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = load_config(QUICK, {"methods": ("linear_probe",), "optim.steps": 3})
    with pytest.raises(ValueError, match=r"whose config differs in optim\.steps"):
        run(other, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_a_run_goes_on_from_another_workdir(tmp_path):
    (first,) = run(load_config(QUICK, {"methods": ("snnk_relu",)}), tmp_path / "a")
    config = load_config(
        QUICK, {"methods": ("snnk_relu",), "resume": str(tmp_path / "a")}
    )
    (second,) = run(config, tmp_path / "b")
    assert second["loss"] == first["loss"]
    rows = read_jsonl(pathlib.Path(second["workdir"]) / "metrics.jsonl")
    assert not any("train/loss" in row for row in rows)
    config = load_config(QUICK, {"resume": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="config.resume must be the workdir of a run"):
        run(config, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_an_export_can_be_fine_tuned(tmp_path):
    weights = tmp_path / "vit.safetensors"
    run(
        load_config("configs/vit_pretrain.py:quicktest", {"export": str(weights)}),
        tmp_path / "pretrain",
    )
    config = load_config(
        QUICK, {"methods": ("snnk_cos",), "model.weights": str(weights)}
    )
    (result,) = run(config, tmp_path / "adapter")
    assert result["counts"]["trained"] == 2 * 17 * 16


def command_line(*arguments, timeout=240):
    return subprocess.run(
        [sys.executable, "-m", "experiments.main", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optim.stepz=3"], "Did you mean"),
        (["--config.methods=snnk_reul"], "error: config.methods must be among"),
        (["--config.data.name=cifar10_jpeg"], "error: data.dir must be a folder that"),
        (
            ["--config.data.name=nothing"],
            "error: config.data.name must be one of digits",
        ),
        (["--config.model.weights=none"], "error: weights must be an existing file"),
        (["--config.optim.batch_size=4096"], "error: batch_size must be in"),
    ],
)
@pytest.mark.slow
def test_a_mistake_on_the_command_line_is_one_clear_line(arguments, message, tmp_path):
    done = command_line(f"--config={QUICK}", f"--workdir={tmp_path / 'w'}", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(tmp_path.rglob("checkpoints"))
    if message.startswith("error:"):
        assert "Traceback" not in done.stderr


def test_a_run_is_resumed_from_the_same_settings_alone(tmp_path):
    other = load_config(QUICK, {"model.dropout_rate": 0.3})
    workdirs.claim(tmp_path / "a", other)
    config = load_config(QUICK, {"resume": str(tmp_path / "a")})
    with pytest.raises(ValueError, match=r"config.resume must .*model\.dropout_rate"):
        run(config, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_of_two_processes_with_other_settings_one_gets_the_folder(tmp_path):
    configs = [load_config(QUICK, {"optim.steps": steps}) for steps in (2, 3)]
    barrier = threading.Barrier(2)

    def claim(config):
        barrier.wait()
        try:
            workdirs.claim(tmp_path, config)
        except ValueError as error:
            return str(error)
        return config.optim.steps

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(claim, configs))
    (steps,) = [o for o in outcomes if isinstance(o, int)]
    (refusal,) = [o for o in outcomes if isinstance(o, str)]
    assert "optim.steps" in refusal
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["optim"]["steps"] == steps


def test_runs_trained_together_are_not_taken_for_those_of_another_recipe(tmp_path):
    config = load_config(QUICK)
    shared = runs.Shared(config, None, "b", None, None, "houlsby", tmp_path)
    one, two = (runs.Run(0.1, seed, "val", "run") for seed in (0, 7))
    summary = {"recipe": shared.recipe(one).record(), "score": 0.5, "adapter_bytes": 9}
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(summary))
    _, result = runs._read_result(shared, one, file)
    assert result["score"] == 0.5
    with pytest.raises(ValueError, match="a run of the same recipe.*seed"):
        runs._read_result(shared, two, file)
    file.write_text(json.dumps(summary | {"base": "a"}))
    with pytest.raises(ValueError, match="a run on the same base model"):
        runs._read_result(shared, one, file)


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_seeds_beside_it(tmp_path):
    options = {"methods": ("houlsby",), "model.weights": ""}
    both = run(load_config(QUICK, options | {"seeds": (0, 1)}), tmp_path / "a")
    (alone,) = run(load_config(QUICK, options | {"seeds": (1,)}), tmp_path / "b")
    assert alone["loss"] == both[1]["loss"]


@pytest.mark.slow
def test_new_weights_are_those_of_the_seed(tmp_path):
    config = load_config(
        "configs/vit_pretrain.py:quicktest",
        {"export": "", "seeds": (0, 1), "optim.learning_rates.scratch": 1e-9},
    )
    run(config, tmp_path)
    models = [
        load_file(file)
        for file in sorted(tmp_path.glob("scratch-*/adapter.safetensors"))
    ]
    kernels = [model["blocks/0/mlp/fc1/kernel"] for model in models]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


@pytest.mark.slow
def test_tokens_that_the_model_does_not_know_are_refused(tmp_path):
    config = load_config("configs/bert_adapter.py:quicktest", {"model.vocab_size": 20})
    with pytest.raises(ValueError, match="tokens of synthetic_text .* below .* 20"):
        run(config, tmp_path)
