"""Matrices of low rank: of the whole block, or of each of its two."""

import dataclasses
import math

import numpy as np

from snnk_jax.compression._blocks import Block
from snnk_jax.compression._methods import (
    Fit,
    Method,
    Site,
    hidden,
    inputs,
    need_whole,
    solve,
    values,
)
from snnk_jax.compression._modules import linear, low_rank
from snnk_jax.compression._select import reduced_rank, symmetric
from snnk_jax.ridge._solve import Moments, moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine(Method):
    """One matrix and a bias, fitted; of lower rank where the budget asks for it.

    Of size 0 the block returns the mean of its target.
    """

    least = 0

    def cost(self, block: Block, size: int) -> tuple[int, int]:
        d, o = block.dim, block.out
        if size >= self.largest(block):
            return d * o + o, 2 * d * o
        return size * (d + o) + o, 2 * size * (d + o)

    def largest(self, block: Block) -> int:
        # From this rank on the two factors hold more than their product.
        return math.ceil(block.dim * block.out / (block.dim + block.out))

    def fit(self, site: Site, size: int) -> Fit:
        need_whole(site.block, self)
        stats = site.task.gather(inputs, "inputs")
        solution = solve(stats, site.l2, site.judged)
        kernel, offset = values(solution, site.block.out)
        if size >= self.largest(site.block):
            return Fit({site.block.name: linear(site.first, kernel, offset)}, solution)
        a, b, offset = plain_targets(site, moments(stats), size, solution.l2)
        module = low_rank(site.first, a, b, offset)
        return Fit({site.block.name: module}, solution, a @ b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Both matrices by two factors of a rank.

    Args:
      data_aware: the second factors and both maps are fitted to the inputs (reduced-
        rank regression: of the pre-activations, then of the target from the units that
        the first map leaves), with a small penalty if ``l2`` is None; without it they
        are the truncated SVD of the weights.
    """

    data_aware: bool = True

    def cost(self, block: Block, size: int) -> tuple[int, int]:
        d, width, o = block.dim, block.width, block.out
        ranked = size * (d + 2 * width + o)
        return ranked + block.biases[0] * width + o, 2 * ranked

    def largest(self, block: Block) -> int:
        return min(block.dim, block.width, block.out)

    def fit(self, site: Site, size: int) -> Fit:
        block, up, down = site.block, site.first, site.second
        bias = None if up.bias is None else np.asarray(up.bias[...], np.float64)
        kernel = np.asarray(up.kernel[...], np.float64)
        second = np.asarray(down.kernel[...], np.float64)
        offset = np.zeros(block.out) if down.bias is None else np.asarray(down.bias)
        if not self.data_aware:
            pairs = (truncated(kernel, size), truncated(second, size))
            (a, b), (c, d) = pairs
            return Fit(
                {
                    block.first: low_rank(up, a, b, bias),
                    block.second: low_rank(down, c, d, offset),
                }
            )
        centred = moments(site.task.gather(inputs, "inputs"))
        cross = symmetric(centred).gram @ kernel
        of_units = dataclasses.replace(centred, cross=cross)
        a, b = reduced_rank(of_units, size, l2=site.l2)
        if bias is not None:
            # The mean pre-activation stays what it was.
            bias = bias + centred.phi_mean @ (kernel - a @ b)
        changes = {block.first: low_rank(up, a, b, bias)}
        stats = site.task.gather(hidden, f"hidden-{size}", changes)
        c, d, offset = plain_targets(site, moments(stats), size, site.l2)
        return Fit(changes | {block.second: low_rank(down, c, d, offset)})


def truncated(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the best approximation of a rank."""
    left, sizes, right = np.linalg.svd(kernel, full_matrices=False)
    return left[:, :rank] * sizes[:rank], right[:rank]


def plain_targets(
    site: Site, centred: Moments, rank: int, l2: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors of a rank and the bias of the map to the plain targets."""
    out = site.block.out
    a, b = reduced_rank(centred, rank, slice(0, out), l2)
    return a, b, centred.y_mean[:out] - centred.phi_mean @ a @ b
