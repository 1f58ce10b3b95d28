import itertools

import numpy as np
import pytest

from snnk_jax.compression._select import (
    allocate,
    eliminate,
    energies,
    reduced_rank,
)
from snnk_jax.ridge._solve import Moments


def make(m=8, o=3, n=400, seed=0):
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, m)) @ rng.normal(size=(m, m))
    y = phi @ rng.normal(size=(m, o)) + rng.normal(size=(n, o))
    phi, y = phi - phi.mean(0), y - y.mean(0)
    gram = np.triu(phi.T @ phi) + np.tril(np.full((m, m), 7.0), -1)  # upper one counts
    moments = Moments(
        gram=gram,
        cross=phi.T @ y,
        y_square=np.sum(y**2, axis=0),
        phi_mean=np.zeros(m),
        y_mean=np.zeros(o),
        weight=float(n),
        rows=n,
        intercept=True,
    )
    return phi, y, moments


def error(phi, y, kept):
    return float(np.sum((y - phi[:, kept] @ np.linalg.lstsq(phi[:, kept], y)[0]) ** 2))


@pytest.mark.parametrize("seed", range(4))
def test_elimination_takes_the_unit_that_is_missed_least_at_every_step(seed):
    phi, y, moments = make(seed=seed)
    sizes = list(range(1, 8))
    kept, curve = eliminate(moments, sizes)
    left = list(range(8))
    for size in reversed(sizes):
        errors = {j: error(phi, y, [k for k in left if k != j]) for j in left}
        left.remove(min(errors, key=errors.__getitem__))
        assert kept[size].tolist() == left
        lost = (error(phi, y, left) - error(phi, y, list(range(8)))) / len(y)
        np.testing.assert_allclose(curve[size], lost, rtol=2e-2, atol=1e-3)


def test_elimination_is_close_to_the_best_subset():
    phi, y, moments = make(m=9, o=2)
    (kept,) = eliminate(moments, [4])[0].values()
    best = min(error(phi, y, list(s)) for s in itertools.combinations(range(9), 4))
    assert error(phi, y, kept) < 1.3 * best


def test_many_at_a_time_are_nearly_as_good_as_one_by_one():
    phi, y, moments = make(m=120, o=4, n=3000)
    (kept,) = eliminate(moments, [30])[0].values()
    left = np.arange(120)
    gram = np.triu(moments.gram) + np.triu(moments.gram, 1).T
    while len(left) > 30:
        inverse = np.linalg.inv(gram[np.ix_(left, left)])
        score = np.sum((inverse @ moments.cross[left]) ** 2, 1) / np.diag(inverse)
        left = np.delete(left, np.argmin(score))
    assert error(phi, y, kept) < 1.05 * error(phi, y, left)


def test_only_the_targets_that_count_decide():
    _, y, moments = make()
    other = Moments(**{**vars(moments), "cross": moments.cross * [[0, 0, 1]]})
    a, b = eliminate(moments, [3], slice(2, 3))[0], eliminate(other, [3])[0]
    assert a[3].tolist() == b[3].tolist()
    assert y.shape[1] == 3


def test_energies():
    phi, _, moments = make()
    readout = np.arange(16.0).reshape(8, 2)
    expected = phi.var(axis=0) * np.sum(readout**2, axis=1)
    np.testing.assert_allclose(energies(moments, readout), expected)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_reduced_rank_is_the_best_map_of_its_rank(rank):
    phi, y, moments = make()
    a, b = reduced_rank(moments, rank)
    assert a.shape == (8, rank)
    fitted = phi @ np.linalg.lstsq(phi, y)[0]
    left, values, right = np.linalg.svd(fitted, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose(phi @ a @ b, best, rtol=1e-2, atol=1e-2 * values[0])


def test_the_map_of_full_rank_is_ridge_regression_at_its_penalty():
    phi, y, moments = make()
    a, b = reduced_rank(moments, 3, l2=0.5)
    gram = phi.T @ phi + 0.5 * len(y) * np.eye(8)
    np.testing.assert_allclose(a @ b, np.linalg.solve(gram, phi.T @ y), rtol=1e-6)
    gram = moments.gram.copy()
    gram[0], gram[:, 0] = 0.0, 0.0  # a constant input
    constant = Moments(**{**vars(moments), "gram": gram})
    assert np.isfinite(reduced_rank(constant, 3, l2=0.0)[0]).all()
    nothing = Moments(**{**vars(moments), "gram": np.zeros((8, 8))})
    with pytest.raises(ValueError, match="inputs must be finite, and vary"):
        reduced_rank(nothing, 3)


def test_allocation_is_optimal_for_convex_curves():
    rng = np.random.default_rng(0)
    curves = {}
    for name in "abc":
        gains = np.sort(rng.exponential(size=10))[::-1]
        curves[name] = dict(enumerate(np.append(0, -np.cumsum(gains)) + gains.sum()))
    prices, least = dict.fromkeys("abc", 2.0), dict.fromkeys("abc", 1)
    sizes = allocate(curves, prices, 24.0, least)
    assert sum(sizes.values()) == 12
    found = sum(curves[name][size] for name, size in sizes.items())
    best = min(
        sum(curves[name][size] for name, size in zip("abc", trial, strict=True))
        for trial in itertools.product(range(1, 11), repeat=3)
        if sum(trial) <= 12
    )
    np.testing.assert_allclose(found, best)
