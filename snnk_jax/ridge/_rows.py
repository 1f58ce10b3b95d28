"""Ridge regression of rows that are all in memory: primal or dual, in float64."""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np

from snnk_jax.ridge import _factor
from snnk_jax.ridge._factor import blas
from snnk_jax.ridge._solve import (
    Moments,
    RidgeSolution,
    check_criterion,
    check_l2,
    make_solution,
)
from snnk_jax.ridge._stats import check_floating
from snnk_jax.typing import Array, Float


def fit(
    phi: Float[Array, "n m"],
    y: Float[Array, "n o"],
    l2: float | None = None,
    weights: Float[Array, " n"] | None = None,
    *,
    intercept: bool = True,
    criterion: Literal["loo", "gcv"] = "loo",
) -> RidgeSolution:
    r"""Fits rows that are all at hand, in float64 on the host.

    The same solution as :func:`solve` of their statistics, without the rounding of
    float32 sums, and with fewer rows than features at the cost of the rows: the dual
    :math:`V = Z^\top (Z Z^\top + \lambda I)^{-1} Y` of the centred rows Z. Where
    :math:`\lambda I` added to the Gram matrix is singular to working precision, the
    singular values of Z itself are taken, which are not squared; without a penalty
    and with more features than rows the solution is the one of least norm.

    Args:
      phi: features.
      y: targets.
      l2: penalty per example. None: the one of the least criterion on a grid from
        1e-12 of the largest eigenvalue of the Gram matrix to 100 times that.
      weights: row weights, not negative.
      intercept: fit an intercept, without penalty.
      criterion: for ``l2=None``: ``"loo"``, the mean squared leave-one-out residual, or
        ``"gcv"``, its rotation invariant relative, which more often takes no penalty
        at all where rows are fewer than features or repeat each other.

    Returns:
      The solution, in the dtype of ``y`` (float32 without x64); its ``method`` is
      ``"cholesky"``, ``"dual"``, ``"svd"`` or, for ``l2=None``, ``"eigh"``.

    Raises:
      ValueError: for shapes that do not fit, targets that are not floating, values
        that are not finite, or a negative penalty or weight.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> phi = jax.random.normal(jax.random.key(0), (50, 200))
      >>> solution = snnk.ridge.fit(phi, phi[:, :1], l2=1e-6)
      >>> solution.method, float(abs(solution(phi) - phi[:, :1]).max()) < 1e-3
      ('dual', True)
    """
    rows = centred_rows(phi, y, weights, intercept)
    if l2 is None:
        check_criterion(criterion, ("loo", "gcv"))
        spectrum = RowSpectrum.of(rows.phi, rows.y, intercept, rows.shares)
        l2 = spectrum.best(criterion) / rows.moments.weight
        factor = dataclasses.replace(spectrum.eigen, penalty=l2 * rows.moments.weight)
        kernel = spectrum.kernel(factor.penalty)
        method = "eigh"
    else:
        check_l2(l2)
        factor, method = _factored(rows.phi, l2 * rows.moments.weight)
        if isinstance(factor, _factor.Dual):
            kernel = rows.phi.T @ factor.factor.solve(rows.y)
        else:
            kernel = factor.solve(rows.moments.cross)
    dtype = jax.dtypes.canonicalize_dtype(y.dtype)
    solution = make_solution(rows.moments, kernel, l2, factor, method, dtype)
    # Of the rows themselves: exact also where hardly anything is left.
    residual = np.sum((rows.y - rows.phi @ kernel) ** 2, axis=0) / rows.moments.weight
    return dataclasses.replace(solution, residual=residual)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Centred rows, each times the root of its weight, and what was taken out.

    ``shares`` are the weights over their sum.
    """

    phi: np.ndarray
    y: np.ndarray
    shares: np.ndarray
    moments: Moments


def centred_rows(phi, y, weights, intercept: bool) -> Rows:
    """Checks and centres rows; those of weight zero are left out."""
    if phi.ndim != 2 or y.ndim != 2 or len(phi) != len(y) or not len(y):
        raise ValueError(
            "phi must be [n, m] and y [n, o] with the same n. "
            f"Got {phi.shape} and {y.shape}."
        )
    check_floating(y)
    if weights is not None and weights.shape != y.shape[:1]:
        raise ValueError(f"weights must be [{len(y)}], one a row. Got {weights.shape}.")
    z, t = np.array(phi, np.float64), np.array(y, np.float64)
    w = np.ones(len(t)) if weights is None else np.asarray(weights, np.float64)
    for name, values in (("features", z), ("targets", t), ("weights", w)):
        if not np.all(np.isfinite(values)):
            raise ValueError(f"{name} must be finite. Got inf or NaN among them.")
    if np.any(w < 0) or not np.any(w > 0):
        raise ValueError(f"weights must not be negative, nor all zero. Got {w}.")
    if not np.all(w):
        z, t, w = (a[w > 0] for a in (z, t, w))
    total = float(w.sum())
    means = [w @ a / total if intercept else np.zeros(a.shape[1]) for a in (z, t)]
    root = np.sqrt(w)[:, None]
    z, t = (z - means[0]) * root, (t - means[1]) * root
    moments = Moments(
        gram=np.zeros((0, 0)),
        cross=z.T @ t,
        y_square=np.sum(t**2, axis=0),
        phi_mean=means[0],
        y_mean=means[1],
        weight=total,
        rows=len(w),
        intercept=intercept,
    )
    return Rows(z, t, w / total, moments)


def _factored(z: np.ndarray, penalty: float) -> tuple[_factor.Factor, str]:
    """Cholesky factors of the smaller Gram matrix, or singular values."""
    if z.shape[0] >= z.shape[1]:
        factor = _factor.cholesky(_upper(z.T), penalty)
        if factor is not None:
            return factor, "cholesky"
    elif penalty > 0:
        inner = _factor.cholesky(_upper(z), penalty)
        if inner is not None:
            return _factor.Dual(z, inner), "dual"
    return _factor.svd(z, penalty), "svd"


def _upper(a: np.ndarray) -> np.ndarray:
    """``a @ a.T``, C-ordered, of which the upper triangle counts."""
    return blas.dsyrk(1.0, a, lower=1).T


@dataclasses.dataclass(frozen=True)
class RowSpectrum:
    """Rows ``Z = U S V^T`` and targets in their directions, for many penalties.

    Attributes:
      left: U, ``[n, r]``.
      eigen: values ``S^2`` and V.
      targets: Y, ``[n, o]``.
      inside: ``U^T Y``, ``[r, o]``.
      intercept: whether a mean was taken out, one more degree of freedom.
      shares: the leverage of each row on that mean, ``[n]``.
    """

    left: np.ndarray
    eigen: _factor.Eigen
    targets: np.ndarray
    inside: np.ndarray
    intercept: bool
    shares: np.ndarray

    @classmethod
    def of(
        cls,
        z: np.ndarray,
        y: np.ndarray,
        intercept: bool,
        shares: np.ndarray | None = None,
    ) -> "RowSpectrum":
        """By the eigenvectors of the smaller Gram matrix of Z; None: equal shares."""
        if z.shape[0] > z.shape[1]:
            eigen = _factor.eigen(_upper(z.T))
            left = z @ eigen.vectors / np.sqrt(eigen.values)
        else:
            outer = _factor.eigen(_upper(z))
            left = outer.vectors
            right = z.T @ left / np.sqrt(outer.values)
            eigen = _factor.Eigen(outer.values, right, 0.0)
        shares = np.full(len(y), 1 / len(y)) if shares is None else shares
        return cls(left, eigen, y, left.T @ y, intercept, shares)

    @property
    def values(self) -> np.ndarray:
        return self.eigen.values

    @functools.cached_property
    def outside(self) -> np.ndarray:
        """The part of the targets that no direction reaches."""
        return self.targets - self.left @ self.inside

    @functools.cached_property
    def _leverages(self) -> np.ndarray:
        return self.left**2

    def kernel(self, penalty: float) -> np.ndarray:
        """The coefficients."""
        scale = np.sqrt(self.values) / (self.values + penalty)
        return self.eigen.vectors @ (scale[:, None] * self.inside)

    def residual(self, penalty: float) -> np.ndarray:
        """Targets less predictions, ``[n, o]``."""
        back = penalty / (self.values + penalty) if penalty else 0 * self.values
        return self.outside + self.left @ (back[:, None] * self.inside)

    def kept_back(self, penalty: float) -> tuple[np.ndarray, float]:
        """``1 - H`` on the directions, and off them; up to a common factor."""
        if len(self.values) == len(self.targets) - self.intercept:
            # The factor of the penalty cancels, and with it the digits.
            return 1 / (self.values + penalty), 0.0
        return penalty / (self.values + penalty), 1.0

    def gcv(self, penalty: float) -> float:
        """Generalised cross-validation."""
        back, off = self.kept_back(penalty)
        residual = off * np.sum(self.outside**2)
        residual += np.sum((back[:, None] * self.inside) ** 2)
        num = len(self.targets)
        free = off * (num - len(back) - self.intercept) + np.sum(back)
        return num * float(residual) / max(float(free), np.finfo(float).tiny) ** 2

    def left_out(self, penalty: float) -> np.ndarray:
        """Residuals of rows predicted without themselves, ``[n, o]``."""
        back, off = self.kept_back(penalty)
        residual = off * self.outside + self.left @ (back[:, None] * self.inside)
        base = 1 - self.intercept * self.shares
        free = off * (base - np.sum(self._leverages, axis=1)) + self._leverages @ back
        return residual / np.maximum(free, np.finfo(np.float64).eps)[:, None]

    def loo(self, penalty: float) -> float:
        """Mean squared left-out residual."""
        return float(np.mean(self.left_out(penalty) ** 2))

    def best(self, criterion: str) -> float:
        """The penalty of the least criterion on a grid."""
        score = self.gcv if criterion == "gcv" else self.loo
        top = max(self.values[-1], np.finfo(float).tiny) if len(self.values) else 1.0
        grid = top * np.logspace(-12, 2, 113)
        return float(grid[np.argmin([score(penalty) for penalty in grid])])
