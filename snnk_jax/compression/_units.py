"""A block's own units, selected, and read out by a fitted matrix."""

import dataclasses
from typing import Literal

import jax
import numpy as np

from snnk_jax import ridge
from snnk_jax.compression._blocks import Block
from snnk_jax.compression._methods import Fit, Method, Site, hidden, solve, values
from snnk_jax.compression._modules import linear
from snnk_jax.compression._path import beside, units_and_inputs
from snnk_jax.compression._select import eliminate, energies, symmetric
from snnk_jax.ridge._solve import moments

# Shares of a linear path that "auto" tries.
_SHARES = (0.0, 0.25, 0.5)
# From here on ReLU, GELU and SiLU are the identity up to float32, or nearly so.
_IDENTITY = 6.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Units(Method):
    r"""Keeps some of the block's own units, and fits what they are read out by.

    The units' input weights are a projection that knows the data. Two Linears of the
    same kind stand in for those of the block, and its own activation between them.

    Args:
      select: ``"elimination"`` takes out the unit that is missed least, again and
        again (:func:`~snnk_jax.compression._select.eliminate`); ``"energy"`` keeps
        those of the largest activation variance times squared readout norm;
        ``"random"`` any.
      refit: fit the readout to the target; without it the units keep their rows, the
        plain structured pruning.
      linear: share of the units that become a linear path: their weights are the
        directions of the inputs that say most of what the kept units leave of the
        target, and their bias is so large that the activation is the identity. For
        ReLU, GELU, SiLU and their like, with a bias; a path in bfloat16 loses digits
        to that bias. ``"auto"`` takes of 0, 1/4 and 1/2 what leaves the least
        error in the metric, block by block.
    """

    select: Literal["elimination", "energy", "random"] = "elimination"
    refit: bool = True
    linear: float | Literal["auto"] = 0.0

    def __post_init__(self):
        if self.linear != "auto" and not 0 <= self.linear < 1:
            raise ValueError(f"linear must be in [0, 1), or 'auto'. Got {self.linear}.")
        if self.linear and not (self.refit and self.select == "elimination"):
            raise ValueError(
                "units beside a linear path must be selected by elimination and "
                f"refitted. Got {self.select!r}, refit={self.refit}."
            )
        if self.select not in ("elimination", "energy", "random"):
            raise ValueError(
                "select must be 'elimination', 'energy' or 'random'. "
                f"Got {self.select!r}."
            )

    def cost(self, block: Block, size: int) -> tuple[int, int]:
        d, o = block.dim, block.out
        stored = size * (d + block.biases[0] + o) + o
        return stored, 2 * size * (d + o)

    def largest(self, block: Block) -> int:
        return block.width

    def fit(self, site: Site, size: int) -> Fit:
        if self.linear:
            return self._fit_beside(site, size)
        stats = site.task.gather(hidden, "units")
        kept = self.units(site, stats, size)
        up = site.first
        bias = None if up.bias is None else np.asarray(up.bias[...])[kept]
        narrow = linear(up, np.asarray(up.kernel[...])[:, kept], bias)
        solution = None
        if self.refit:
            solution = solve(subset(stats, kept), site.l2, site.judged)
            readout, offset = values(solution, site.block.out)
        else:
            readout = np.asarray(site.second.kernel[...])[kept]
            whole = site.second.bias
            offset = np.zeros(site.block.out) if whole is None else np.asarray(whole)
        second = linear(site.second, readout, offset)
        return Fit({site.block.first: narrow, site.block.second: second}, solution)

    def units(self, site: Site, stats: ridge.RidgeStats, size: int) -> np.ndarray:
        """Indices of the units that are kept, in order."""
        width = site.block.width
        if self.select == "random":
            order = np.asarray(jax.random.permutation(site.key, width))
            return np.sort(order[:size])
        centred = moments(stats)
        if self.select == "energy":
            own = energies(centred, np.asarray(site.second.kernel[...], np.float64))
            return np.sort(np.argsort(-own)[:size])
        return eliminate(centred, [size], site.judged)[0][size]

    def _fit_beside(self, site: Site, size: int) -> Fit:
        block, up = site.block, site.first
        if up.bias is None:
            raise ValueError(
                f"{block.name} must have a bias before its activation for a linear "
                "path. Got none."
            )
        whole = symmetric(moments(site.task.gather(units_and_inputs, "units-inputs")))
        shares = _SHARES if self.linear == "auto" else (self.linear,)
        found = [
            beside(whole, block.width, size, ranks, site.judged)
            for ranks in sorted({int(share * size) for share in shares})
        ]
        kept, a, _ = min(found, key=lambda choice: choice[2])
        gram = whole.gram[block.width :, block.width :]
        mean = whole.phi_mean[block.width :]
        variance = np.sum(a * (gram @ a), axis=0) / whole.weight
        # A direction that the units leave nothing to say stays short.
        a = a / np.sqrt(np.maximum(variance, 1e-8 * variance.max(initial=0)))
        x = np.asarray(site.task.sample(), np.float64)
        reach = np.abs((x - mean) @ a).max(initial=0)
        bias = _IDENTITY + reach - mean @ a
        narrow = linear(
            up,
            np.concatenate([np.asarray(up.kernel[...])[:, kept], a], axis=1),
            np.concatenate([np.asarray(up.bias[...])[kept], bias]),
        )
        blank = linear(site.second, np.zeros((size, block.out)), None)
        changes = {block.first: narrow, block.second: blank}
        stats = site.task.gather(hidden, f"path-{size}", changes)
        solution = solve(stats, site.l2, site.judged)
        second = linear(site.second, *values(solution, block.out))
        return Fit({block.first: narrow, block.second: second}, solution)


def subset(stats: ridge.RidgeStats, kept: np.ndarray) -> ridge.RidgeStats:
    """Statistics of some of the features, their indices rising."""
    grid = np.ix_(kept, kept)
    shift = stats.phi_shift
    return stats._replace(
        gram=ridge.Total(*(part[grid] for part in stats.gram)),
        cross=ridge.Total(*(part[kept] for part in stats.cross)),
        phi_sum=ridge.Total(*(part[kept] for part in stats.phi_sum)),
        phi_shift=None if shift is None else shift[kept],
    )
