"""Units and a linear path beside them, chosen together from sums alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax.compression._select import eliminate, reduced_rank
from snnk_jax.ridge._solve import Moments

# Turns between units and directions.
_TURNS = 2


@jax.jit
def units_and_inputs(x: Any, h: Any) -> Any:
    """The units, then the inputs."""
    return jnp.concatenate([h, x.astype(h.dtype)], axis=1)


def part(whole: Moments, columns: slice) -> Moments:
    """Moments of some of the features."""
    return dataclasses.replace(
        whole,
        gram=whole.gram[columns, columns],
        cross=whole.cross[columns],
        phi_mean=whole.phi_mean[columns],
    )


def beside(
    whole: Moments, width: int, size: int, ranks: int, judged: slice
) -> tuple[np.ndarray, np.ndarray, float]:
    """Units and directions of the inputs in turns, each for what the others leave.

    Args:
      whole: moments of the units, then the inputs.
      width: number of units.
      size: how many units and directions to keep.
      ranks: how many directions among them.
      judged: columns of the targets.

    Returns:
      The units, the directions ``[d, ranks]``, and the squared error they leave.
    """
    units, rest = slice(0, width), slice(width, None)
    a, kept = np.zeros((len(whole.gram) - width, 0)), np.zeros(0, int)
    others = part(whole, rest)
    if ranks:
        a, _ = reduced_rank(others, ranks, judged)
    for _ in range(_TURNS if ranks else 1):
        left = beyond(whole, units, rest, a)
        kept = eliminate(left, [size - ranks], judged)[0][size - ranks]
        others = beyond(whole, rest, units, np.eye(width)[:, kept])
        if ranks:
            a, _ = reduced_rank(others, ranks, judged)
    left = beyond(others, slice(None), slice(None), a)
    return kept, a, float(np.sum(left.y_square[judged]))


def beyond(whole: Moments, columns: slice, others: slice, maps: np.ndarray) -> Moments:
    """Moments of some features and of the targets, ``others @ maps`` regressed out."""
    own = part(whole, columns)
    if not maps.size:
        return own
    gram = maps.T @ whole.gram[others, others] @ maps
    gram[np.diag_indices(len(gram))] += 1e-8 * np.trace(gram) / len(gram)
    across, cross = maps.T @ whole.gram[others, columns], maps.T @ whole.cross[others]
    weights = np.linalg.solve(gram, np.concatenate([across, cross], axis=1))
    features, readout = np.split(weights, [across.shape[1]], axis=1)
    return dataclasses.replace(
        own,
        gram=own.gram - across.T @ features,
        cross=own.cross - across.T @ readout,
        y_square=own.y_square - np.sum(cross * readout, axis=0),
    )
