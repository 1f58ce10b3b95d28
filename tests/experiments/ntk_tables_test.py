"""Kernels of infinite networks on tables: kernels, classifiers, protocol, mistakes."""

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.svm import SVC

from experiments import load_config, ntk_tables, tabular
from experiments.ntk_tables import ReluKernels
from experiments.tabular import Split


def quick(**changes):
    return load_config("configs/ntk_uci.py:quicktest", changes)


def moons(n=80, seed=0):
    """Two half circles, four splits and one to tune on."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n).astype(np.int32)
    angle = math.pi * rng.uniform(size=n)
    x = np.stack([np.cos(angle) - 0.5 + y, (1 - 2 * y) * np.sin(angle)], axis=1)
    x += 0.1 * rng.normal(size=x.shape)
    rows = np.arange(n)
    cuts = tuple(Split(rows[rows % 4 != i], rows[rows % 4 == i]) for i in range(4))
    tune = Split(rows[::2], rows[1::2])
    return tabular.Table("moons", x, y, 2, cuts, tune)


def recursion(x, depth, fixed):
    """The kernel as the code of the paper has it."""
    s = x @ x.T
    h = np.zeros_like(s)
    for layer in range(depth + 1):
        if layer >= fixed:
            h = h + s
        if layer == depth:
            return h
        size = np.sqrt(np.outer(np.diag(s), np.diag(s)))
        rho = np.clip(s / size, -1, 1)
        turn = (math.pi - np.arccos(rho)) / (2 * math.pi)
        s = (rho * turn + np.sqrt(1 - rho**2) / (2 * math.pi)) * size
        h = h * turn
    raise AssertionError


def test_kernels_are_those_of_the_paper_with_fixed_layers_too():
    x = np.random.default_rng(0).normal(size=(9, 3))
    kernels = ReluKernels(x)
    for depth in range(3):
        for fixed in range(depth + 1):
            np.testing.assert_allclose(
                kernels.ntk(depth, fixed),
                recursion(x, depth, fixed),
                rtol=2e-5,
                atol=1e-5,
            )
        np.testing.assert_array_equal(kernels.ntk(depth, depth), kernels.nngp(depth))


def test_without_fixed_layers_it_is_the_ntk_of_the_library():
    x = np.random.default_rng(1).normal(size=(7, 5))
    rows = jnp.asarray(x * 5**0.5, jnp.float32)
    exact = ntk_tables.relu_network(2).kernel(rows, get="ntk")
    np.testing.assert_allclose(ReluKernels(x).ntk(2), exact, rtol=1e-5, atol=1e-6)


def test_features_estimate_the_kernel():
    x = np.random.default_rng(2).normal(size=(30, 4))
    kernels = ReluKernels(x)
    exact = kernels.ntk(1)
    phi = kernels.features(1, 512, seed=0)
    assert phi.shape == (30, 512)
    error = np.linalg.norm(phi @ phi.T - exact) / np.linalg.norm(exact)
    assert error < 0.1


def test_kernel_ridge_is_feature_ridge_of_the_kernel_and_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(40, 12)) + 1.0
    y = rng.integers(0, 3, 40)
    split = Split(np.arange(30), np.arange(30, 40))
    penalties = (1e-3, 1.0)
    kernel = ntk_tables.kernel_ridge(phi @ phi.T, y, 3)(split, penalties)
    features = ntk_tables.feature_ridge(phi, y, 3)(split, penalties)
    targets = np.where(y[:30, None] == np.arange(3), 1.0, -1.0)
    scale = np.sum(np.var(phi[:30], axis=0))
    for penalty, one, other in zip(penalties, kernel, features, strict=True):
        model = Ridge(penalty * scale).fit(phi[:30], targets)
        expected = model.predict(phi[30:])
        np.testing.assert_allclose(one, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(other, expected, rtol=1e-3, atol=1e-4)


def test_support_vectors_are_those_of_every_cost():
    table = moons()
    kernel = ReluKernels(table.x).ntk(2)
    predict = ntk_tables.support_vectors(kernel, table.y, 100_000)
    found = list(predict(table.tune, ntk_tables.COSTS))
    fit, judge = table.tune.fit, table.tune.judge
    wide = kernel.astype(np.float64)
    for cost, predictions in zip(ntk_tables.COSTS, found, strict=True):
        model = SVC(kernel="precomputed", C=cost)
        model.fit(wide[np.ix_(fit, fit)], table.y[fit])
        expected = model.predict(wide[np.ix_(judge, fit)])
        np.testing.assert_array_equal(predictions, expected)


def test_rows_of_one_class():
    kernel, y = np.eye(6), np.array([1, 1, 1, 0, 1, 1])
    split = Split(np.arange(3), np.arange(3, 6))
    (found,) = ntk_tables.support_vectors(kernel, y, 100)(split, (1.0,))
    np.testing.assert_array_equal(found, [1, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ntk_tables.TITLES)
def test_every_method_is_tuned_and_judged(method):
    table = moons()
    config = quick(num_features=128)
    kernels = ReluKernels(table.x)
    row = ntk_tables.measure(table, method, lambda: kernels, config)
    assert row["method"] == method
    assert len(row["results"]) == 4
    least = 0.7 if method == "linear_ridge" else 0.85
    assert np.mean(row["results"]) > least
    json.dumps(row)


def test_no_test_row_is_tuned_on():
    # The rows that are judged never change what is chosen.
    table = moons()
    rows = []
    for labels in (table.y, np.where(np.arange(80) < 40, table.y, 1 - table.y)):
        tune = Split(np.arange(0, 20), np.arange(20, 40))
        splits = (Split(np.arange(40), np.arange(40, 80)),)
        changed = tabular.Table("moons", table.x, labels, 2, splits, tune)
        kernels = ReluKernels(table.x)
        rows.append(
            ntk_tables.measure(changed, "ntk_svc", lambda k=kernels: k, quick())
        )
    one, other = rows
    for key in ("setting", "penalty", "validation"):
        assert one[key] == other[key]
    np.testing.assert_allclose(one["results"][0], 1 - other["results"][0])


def test_the_sets_are_the_90_of_the_paper(data_dir):
    directory = {"data.dir": str(data_dir("uci121"))}
    config = load_config("configs/ntk_uci.py", directory)
    tables = ntk_tables.tables(config)
    assert len(tables) == 90
    assert all(len(t.splits) == 4 and len(t.x) <= 5000 for t in tables)
    sizes = [len(t.x) for t in tables]
    assert sizes == sorted(sizes)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(tmp_path, data_dir):
    directory = {"data.dir": str(data_dir("uci121"))}
    methods = ("ntk_svc", "linear_ridge", "forest")
    config = quick(sets=("iris",), methods=methods, **directory)
    rows = ntk_tables.run(config, tmp_path, "command")
    file = pathlib.Path(tmp_path) / "rows.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == len(rows) == 3
    marked = json.loads(lines[0]) | {"seconds": 123.0}
    file.write_text("\n".join([json.dumps(marked), *lines[2:]]) + "\n")
    again = ntk_tables.run(config, tmp_path, "command")
    assert [row["name"] for row in again] == [row["name"] for row in rows]
    assert again[0]["seconds"] == 123.0
    assert again[1]["results"] == rows[1]["results"]
    assert "NTK, SVC" in (tmp_path / "report.md").read_text()


def test_files_that_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="Pass it with --config.data.dir="):
        ntk_tables.run(quick(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("methods", ("ntk",), "config.methods must be among ntk_svc"),
        ("methods", (), "config.methods must be among ntk_svc"),
        ("depths", 0, "config.depths must be positive. Got 0"),
        ("num_features", -1, "config.num_features must be positive"),
        ("seed", -1, "config.seed must not be negative. Got -1"),
    ],
)
def test_mistakes_are_found_before_any_work(key, value, words):
    with pytest.raises(ValueError, match=words):
        quick(**{key: value})


def test_sets_with_a_test_file_are_not_the_papers(data_dir):
    config = quick(sets=("monks-1",), **{"data.dir": str(data_dir("uci121"))})
    with pytest.raises(ValueError, match="must leave a set without a test file"):
        ntk_tables.tables(config)


def test_the_argument():
    with pytest.raises(ValueError, match="argument must be quicktest. Got 'fast'"):
        load_config("configs/ntk_uci.py:fast")
