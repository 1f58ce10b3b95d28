"""The pointwise-kernel experiment: layers, jobs, rows, resume, mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from experiments import kernel_error, load_config
from experiments.kernel_error import REGIMES

SMALL = {
    "studies": ("projections",),
    "regimes": ("i^-1 4",),
    "projections": ("gaussian",),
    "num_features": (16,),
}


def quick(**changes):
    spec = "configs/kernel_error.py:quicktest"
    return load_config(spec, SMALL | changes)


@pytest.mark.parametrize("name", REGIMES)
def test_layers_have_the_norms_and_spectra_of_their_regime(name):
    config = load_config("configs/kernel_error.py")
    layer = kernel_error.make_layer(REGIMES[name], config)
    x = np.concatenate([layer.calibration, layer.x])
    product = np.linalg.norm(x, axis=1).mean()
    product *= np.linalg.norm(layer.kernel, axis=0).mean()
    np.testing.assert_allclose(product, REGIMES[name].kappa, rtol=1e-4)
    spread = x.std(axis=0)
    for spectrum in (spread, np.sort(np.std(layer.kernel, axis=1))[::-1]):
        decay = np.log(spectrum[0] / spectrum[-1]) / np.log(len(spectrum))
        assert abs(decay - REGIMES[name].decay) < 0.25
    assert layer.bias.std() > 0.7


def test_jobs_have_names_of_their_own():
    jobs = list(kernel_error.jobs(load_config("configs/kernel_error.py")))
    assert len({job.name for job in jobs}) == len(jobs)
    assert {job.study for job in jobs} == set(kernel_error._DESCRIPTIONS)
    assert all(job.with_bias == (job.study == "activations") for job in jobs)


def test_errors_are_those_of_the_estimate():
    config = quick()
    layer = kernel_error.make_layer(REGIMES["iso 0.5"], config)
    job = next(kernel_error.jobs(quick(regimes=("iso 0.5",))))
    row = kernel_error.measure(job, layer, config)
    exact = np.cos(np.asarray(layer.x @ layer.kernel, np.float64))
    squares = []
    for seed in range(config.draws):
        params = job.features.init(jax.random.key(seed + 1), config.dim)
        estimate = snnk.snnk_dense(job.features, params, layer.x, layer.kernel)
        squares.append(np.mean((np.asarray(estimate) - exact) ** 2))
    expected = np.sqrt(np.mean(squares) / np.mean(exact**2))
    np.testing.assert_allclose(row["relative"], expected, rtol=1e-3)
    assert row["low"] <= row["relative"] <= row["high"]
    constant = np.sqrt(np.var(exact, axis=0).mean() / np.mean(exact**2))
    np.testing.assert_allclose(row["constant"], constant, rtol=1e-3)
    assert row["best_affine"] < 1.2 * row["affine"]


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    config = quick()
    rows = kernel_error.run(config, tmp_path, "command")
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == len(rows) == 4
    # Drop one, mark another: the marked one is kept, the dropped one done again.
    marked = json.loads(lines[0]) | {"relative": 123.0}
    file.write_text("\n".join([json.dumps(marked), *lines[2:]]) + "\n")
    again = kernel_error.run(config, tmp_path, "command")
    assert again[0]["relative"] == 123.0
    np.testing.assert_allclose(again[1]["relative"], rows[1]["relative"], rtol=1e-4)
    report = (tmp_path / "report.md").read_text()
    assert "gaussian + balanced" in report
    assert "projections.png" in report
    assert (tmp_path / "projections.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_quicktest_does_something_of_everything(tmp_path):
    config = load_config("configs/kernel_error.py:quicktest")
    rows = kernel_error.run(config, tmp_path, "command")
    assert {row["study"] for row in rows} == set(config.studies)
    report = (tmp_path / "report.md").read_text()
    for study in config.studies:
        assert f"## {study}" in report
        assert (tmp_path / f"{study}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_balancing_and_shrinkage_show(tmp_path):
    config = quick(studies=("activations",), num_features=(64,), activations=("gelu",))
    rows = kernel_error.run(config, tmp_path)
    by_label = {row["label"]: row for row in rows}
    assert set(by_label) == {
        *("plain", "exact 1", "exact 1, shrunk"),
        *("exact 1, shrunk + balanced", "fitted readout"),
    }
    shrunk = by_label["exact 1, shrunk + balanced"]
    assert shrunk["to_spread"] < 0.1 * by_label["exact 1"]["to_spread"]
    assert np.isfinite(shrunk["predicted"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"regimes": ("iso 7",)}, "config.regimes must be some of iso 0.5"),
        ({"activations": ("gelux",)}, "config.activations must be some of"),
        ({"projections": ("rademacher",)}, "config.projections must be some of"),
        ({"studies": ()}, "config.studies must be some of"),
        ({"draws": 0}, "config.draws must be positive. Got 0"),
        ({"num_features": (8,)}, "config.num_features must be at least 16"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_any_work(changes, words):
    with pytest.raises(ValueError, match=words):
        quick(**changes)


def test_unknown_experiments_are_refused():
    config = load_config("configs/kernel_error.py:quicktest")
    with config.unlocked():
        config.experiment = "kernel_errors"
    from experiments.config import check

    with pytest.raises(ValueError, match="must be one of train, .* Got 'kernel_"):
        check(config)


def test_estimates_are_finite_or_counted_as_infinite():
    config = quick()
    layer = kernel_error.make_layer(REGIMES["i^-2 40"], config)
    layer = kernel_error.Layer(
        *(100 * a for a in (layer.calibration, layer.x)),
        layer.kernel,
        jnp.zeros_like(layer.bias),
    )
    job = next(kernel_error.jobs(config))
    assert kernel_error.measure(job, layer, config)["relative"] == np.inf
