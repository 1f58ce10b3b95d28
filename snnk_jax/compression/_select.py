"""Which units to keep, and how many of each block, from sums alone."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from snnk_jax.ridge._factor import blas, lapack
from snnk_jax.ridge._solve import Moments

# Share of the units that is taken out between two factorisations.
_STEP = 0.06
# Penalty of the elimination, as a share of the mean variance of a unit.
_PENALTY = 1e-5


def symmetric(centred: Moments) -> Moments:
    """The same with both triangles of the Gram matrix."""
    gram = np.triu(centred.gram)
    return dataclasses.replace(centred, gram=gram + np.triu(gram, 1).T)


def eliminate(
    moments: Moments, sizes: Sequence[int], targets: slice = slice(None)
) -> tuple[dict[int, np.ndarray], dict[int, float]]:
    r"""Takes out units one after the other, each time the one that is missed least.

    With the Gram matrix G of the units, :math:`P = (G + \lambda)^{-1}` and the readout
    :math:`V = P C`, leaving out unit j, all others refitted, raises the squared error
    by :math:`\lVert V_j\rVert^2 / P_{jj}` (the optimal brain surgeon on the readout).
    P is brought up to date after every unit among those that are candidates, after each
    6 % among all, and is factored anew when half of the units are gone.

    Args:
      moments: of the units and the targets.
      sizes: how many to keep.
      targets: columns of the targets that count, those in the metric.

    Returns:
      For each size the units kept, in order; and for every number of units that is
      passed the squared error per unit of weight that all eliminations brought.

    References:
      Hassibi and Stork, "Second order derivatives for network pruning: optimal brain
      surgeon", 1993.
    """
    gram = symmetric(moments).gram
    cross = moments.cross[:, targets]
    penalty = _PENALTY * float(np.trace(gram)) / len(gram)
    left = np.arange(len(gram))
    kept, curve, lost = {}, {len(left): 0.0}, 0.0
    inverse, readout, factored = np.zeros((0, 0)), np.zeros((0, 0)), np.inf
    while True:
        if len(left) in sizes:
            kept[len(left)] = left
        goals = [size for size in sizes if size < len(left)]
        if not goals:
            return kept, curve
        if 2 * len(left) <= factored:
            factored = len(left)
            inverse = _inverse(gram[np.ix_(left, left)], penalty)
            readout = inverse @ cross[left]
        score = np.sum(readout**2, axis=1) / np.diagonal(inverse)
        count = min(len(left) - max(goals), max(1, int(_STEP * len(left))))
        candidates = np.argsort(score)[: 2 * count]
        few = inverse[np.ix_(candidates, candidates)]
        rows = readout[candidates]
        gone = np.zeros(len(candidates), bool)
        for _ in range(count):
            diagonal = np.where(gone, 1.0, np.diagonal(few))
            score = np.where(gone, np.inf, np.sum(rows**2, axis=1) / diagonal)
            worst = int(np.argmin(score))
            lost += float(score[worst])
            column = few[:, worst] / few[worst, worst]
            rows = rows - np.outer(column, rows[worst])
            few = few - np.outer(column, few[worst])
            gone[worst] = True
        inverse, readout = _without(inverse, readout, candidates[gone])
        left = np.delete(left, candidates[gone])
        curve[len(left)] = lost / moments.weight


def _inverse(gram: np.ndarray, penalty: float) -> np.ndarray:
    gram[np.diag_indices(len(gram))] += penalty
    factor, info = lapack.dpotrf(gram, lower=1)
    if info:
        raise ValueError("units must be finite and not all zero. Got a singular Gram.")
    lower = np.tril(lapack.dpotri(factor, lower=1)[0])
    return lower + np.tril(lower, -1).T


def _without(
    inverse: np.ndarray, readout: np.ndarray, gone: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The inverse and the readout of the others, by the Schur complement."""
    stay = np.delete(np.arange(len(inverse)), gone)
    factor = lapack.dpotrf(inverse[np.ix_(gone, gone)], lower=1)[0]
    half = blas.dtrsm(1.0, factor, inverse[np.ix_(gone, stay)], lower=1)
    rows = blas.dtrsm(1.0, factor, readout[gone], lower=1)
    return inverse[np.ix_(stay, stay)] - half.T @ half, readout[stay] - half.T @ rows


def energies(moments: Moments, readout: np.ndarray) -> np.ndarray:
    """Variance of what each unit adds to the output: of the unit, times its row's."""
    variance = np.diagonal(moments.gram) / moments.weight
    return variance * np.sum(readout**2, axis=1)


def allocate(
    curves: Mapping[str, Mapping[int, float]],
    prices: Mapping[str, float],
    budget: float,
    least: Mapping[str, int],
) -> dict[str, int]:
    """Units per block for the least sum of errors at a total price.

    Each curve is replaced by its lower convex hull; then the steps that save most
    error per price are taken until the budget is spent, the last one in part.

    Args:
      curves: per block the error at numbers of units.
      prices: price of a unit of each block.
      budget: total price.
      least: units each block gets at any rate.

    Example:
      >>> from snnk_jax.compression._select import allocate
      >>> steep, flat = {0: 9.0, 4: 1.0, 8: 0.0}, {0: 2.4, 4: 1.0, 8: 0.0}
      >>> curves, prices = {"a": steep, "b": flat}, {"a": 1.0, "b": 1.0}
      >>> allocate(curves, prices, 8.0, least={"a": 1, "b": 1})
      {'a': 4, 'b': 4}
    """
    sizes = dict(least)
    spent = sum(prices[name] * least[name] for name in curves)
    steps = []
    for name, curve in curves.items():
        hull = _hull(curve)
        for (low, above), (high, below) in itertools.pairwise(hull):
            gain = (above - below) / (high - low)
            low = max(low, least[name])
            if high > low:
                steps.append((gain / prices[name], name, high - low))
    for _, name, count in sorted(steps, key=lambda step: -step[0]):
        count = min(count, int((budget - spent) / prices[name] + 1e-9))
        sizes[name] += max(count, 0)
        spent += max(count, 0) * prices[name]
    return sizes


def _hull(curve: Mapping[int, float]) -> list[tuple[int, float]]:
    hull: list[tuple[int, float]] = []
    for point in sorted(curve.items()):
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def reduced_rank(
    moments: Moments,
    rank: int,
    targets: slice = slice(None),
    l2: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Factors A ``[m, r]``, B ``[r, o]`` of the best linear map of a rank.

    :math:`\min \lVert \Phi A B - Y\rVert^2`: with :math:`G = L L^\top` the singular
    vectors of :math:`L^{-1} C`, cut at the rank (reduced-rank regression; for
    :math:`C = G W` the data-aware SVD of W).

    Args:
      moments: of the inputs and the targets.
      rank: of the map.
      targets: columns of the targets that are mapped to.
      l2: penalty per unit of weight, added to G; a small one at least.

    Raises:
      ValueError: for inputs that are not finite or all constant.

    References:
      Izenman, "Reduced-rank regression for the multivariate linear model", 1975.
    """
    gram = symmetric(moments).gram
    penalty = _PENALTY * float(np.trace(gram)) / len(gram)
    penalty = max(penalty, (l2 or 0.0) * moments.weight)
    gram[np.diag_indices(len(gram))] += penalty
    factor, info = lapack.dpotrf(gram, lower=1)
    if info:
        raise ValueError(
            "inputs must be finite, and vary or have a penalty. "
            "Got a singular Gram matrix."
        )
    factor = np.tril(factor)
    half = blas.dtrsm(1.0, factor, moments.cross[:, targets], lower=1)
    left, values, right = np.linalg.svd(half, full_matrices=False)
    left = left[:, :rank] * values[:rank]
    return blas.dtrsm(1.0, factor, left, lower=1, trans_a=1), right[:rank]
