"""The dual-kernel experiment: recipes, bounds, rows, resume, mistakes."""

import json
import math

import numpy as np
import pytest

from experiments import dual_error, load_config


def quick(**changes):
    return load_config("configs/dual_error.py:quicktest", changes)


def test_the_published_polynomial_is_the_hermite_series_at_norm_one():
    # ReLU to degree 2: 1 / sqrt(2 pi) + z / 2 + (z^2 - 1) / (2 sqrt(2 pi)).
    series = dual_error.published_series("relu", 2)
    root = 1 / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(series, [root / 2, 0.5, root / 2], atol=1e-12)
    # Also where the last coefficient is zero.
    assert len(dual_error.published_series("relu", 3)) == 4


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_at_norm_one_the_recipes_agree_and_elsewhere_they_do_not(activation):
    x = dual_error.inputs(quick(examples=30), 1.0)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for norm, same in ((1.0, True), (4.0, False)):
        exact = dual_error.exact_kernel(activation, norm * unit)
        own, *_ = dual_error._own_errors(activation, norm * unit, exact, 8)
        _, mended = dual_error._published_errors(activation, norm * unit, exact, 8)
        if same:
            np.testing.assert_allclose(mended, own, rtol=1e-6)
        else:
            assert mended[8] > 1e3 * own[8]


def test_the_exact_kernel_is_an_expectation():
    x = np.array([[1.0, 2.0], [0.5, -1.0], [-1.0, -2.0]])
    q = x @ x.T
    # Of degree 0 of homogeneity: 1 / 4 + asin(rho) / (2 pi).
    rho = q / np.sqrt(np.outer(np.diag(q), np.diag(q)))
    expected = 0.25 + np.arcsin(np.clip(rho, -1, 1)) / (2 * math.pi)
    np.testing.assert_allclose(dual_error.exact_kernel("step", x), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("activation", "norm"),
    [("gelu", 0.5), ("gelu", 4.0), ("sin", 4.0), ("elu", 2.0), ("sign", 1.0)],
)
def test_the_bound_holds_and_errors_fall(activation, norm):
    row = dual_error.measure(activation, norm, quick(degrees=1))
    assert max(row["excess"]) < 1e-12
    assert np.all(np.array(row["own"]) <= np.array(row["bound"]) + 1e-12)
    assert np.all(np.diff(row["worst"]) < 1e-12)
    assert row["worst"][10] < row["worst"][0]


def test_monte_carlo_falls_with_the_root_of_its_samples():
    config = quick(samples=(64, 16384), degrees=1)
    few, many = dual_error.measure("relu", 1.0, config)["monte_carlo"]
    assert 8 < few / many < 32


def test_least_degree():
    assert dual_error.least_degree([0.5, 0.1, 0.01], 0.1) == 1
    assert dual_error.least_degree([0.5, 0.1, 0.2, 0.01], 0.1) == 3
    assert dual_error.least_degree([0.05, 0.01], 0.1) == 0
    assert dual_error.least_degree([0.5, math.nan], 0.1) is None


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    config = quick(activations=("relu", "polynomial"))
    rows = dual_error.run(config, tmp_path, "command")
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == len(rows) == 4
    marked = json.loads(lines[0]) | {"worst": [0.123] * 11}
    file.write_text("\n".join([json.dumps(marked), *lines[2:]]) + "\n")
    again = dual_error.run(config, tmp_path, "command")
    assert again[0]["worst"][0] == 0.123
    np.testing.assert_allclose(again[1]["own"], rows[1]["own"], rtol=1e-6)
    report = (tmp_path / "report.md").read_text()
    assert "`command`" in report
    assert "| relu" in report
    assert (tmp_path / "degrees.png").is_file()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("activations", ("rleu",), "config.activations must be among"),
        ("plotted", (), "config.plotted must be among"),
        ("examples", 0, "config.examples must be positive. Got 0"),
        ("own_degrees", 3, "config.own_degrees must be at least degrees"),
        ("norms", (1.0, 0.0), "config.norms must be positive"),
        ("seed", -1, "config.seed must not be negative"),
    ],
)
def test_mistakes_are_found_before_any_work(key, value, words):
    with pytest.raises(ValueError, match=words):
        quick(**{key: value})


def test_the_argument():
    with pytest.raises(ValueError, match="argument must be quicktest. Got 'fast'"):
        load_config("configs/dual_error.py:fast")
