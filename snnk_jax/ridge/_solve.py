"""Solutions of the normal equations, on the host in float64."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from snnk_jax.ridge import _factor
from snnk_jax.ridge._factor import blas
from snnk_jax.ridge._stats import RidgeStats, shifts
from snnk_jax.ridge._sums import Total
from snnk_jax.typing import Array, Float

Method = Literal["auto", "cholesky", "eigh"]

# Above this width the criterion is evaluated by Cholesky factors, one for each l2: the
# eigenvectors would take longer than a few of them.
_EIGH_WIDTH = 4096
# Condition numbers above which the rounding of sums shows in the coefficients, and the
# relative size of that rounding.
_LIMITS = {4: 1e4, 8: 1e12}
# Least penalty that is tried, as a share of the norm of the Gram matrix.
_LEAST = {4: 1e-7, 8: 1e-11}
_ROUNDING = {4: 1e-7, 8: 1e-15}


class PrecisionWarning(UserWarning):
    """The statistics do not hold as many digits as the solution needs."""


@dataclasses.dataclass(frozen=True, eq=False)
class RidgeSolution:
    r"""Coefficients, and what they cost and explain.

    Attributes:
      kernel: V, ``[m, o]``.
      bias: b, ``[o]``; zeros without intercept.
      l2: the penalty, per example.
      residual: weighted mean of the squared residuals of each target on the rows that
        were seen, ``[o]``.
      condition: condition number of what was solved, by power iterations; for
        :func:`solve_cg` NaN.
      method: ``"cholesky"``, ``"eigh"``, ``"dual"``, ``"svd"`` or ``"cg"``.
      rows: number of rows seen.
      weight: sum of their weights.
      phi_mean: the mean that the intercept takes out, ``[m]``; zeros without.
      y_mean: that of the targets, ``[o]``.
      intercept: whether there is one.
      kernel64: V in float64, which the left-out residuals need.
      rounding: relative rounding of the sums that were solved.
      factor: the factorisation in float64, which the errors and left-out residuals
        need; ``dataclasses.replace(solution, factor=None)`` frees its memory.
    """

    kernel: Float[Array, "m o"]
    bias: Float[Array, " o"]
    l2: float
    residual: np.ndarray
    condition: float
    method: str
    rows: int
    weight: float
    phi_mean: np.ndarray = dataclasses.field(repr=False)
    y_mean: np.ndarray = dataclasses.field(repr=False)
    intercept: bool
    kernel64: np.ndarray = dataclasses.field(repr=False)
    rounding: float
    factor: Any = dataclasses.field(repr=False)

    def __call__(self, phi: Float[Array, "*b m"]) -> Float[Array, "*b o"]:
        """The predictions ``phi @ kernel + bias``."""
        y = phi @ self.kernel.astype(phi.dtype)
        bias = self.bias.astype(phi.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)

    @functools.cached_property
    def dof(self) -> float:
        """Effective degrees of freedom, the trace of the hat matrix."""
        return self._needed().dof() + self.intercept

    @functools.cached_property
    def gcv(self) -> float:
        r"""Generalised cross-validation, ``residual / (1 - dof / n)^2``, its mean."""
        return _gcv(float(np.mean(self.residual)), self.dof, self.rows)

    def standard_errors(self) -> np.ndarray:
        r"""Standard deviations of the coefficients, ``[m, o]``.

        For noise of one variance, :math:`\hat\sigma^2 (C+\lambda)^{-1} C
        (C+\lambda)^{-1}` on the diagonal, with :math:`\hat\sigma^2` the sum of squared
        residuals over ``n - dof``. The bias that the penalty brings is not in it.

        Raises:
          ValueError: where no degree of freedom is left for the noise.
        """
        free = self.rows - self.dof
        if not free > 0:
            raise ValueError(
                "standard errors must have rows above the degrees of freedom. "
                f"Got {self.rows} rows and {self.dof:.1f}."
            )
        variance = self.residual * self.weight / free
        spread = np.maximum(self._needed().sandwich(), 0)
        return np.sqrt(spread[:, None] * variance[None])

    def leverage(
        self, phi: Float[Array, "n m"], weights: Float[Array, " n"] | None = None
    ) -> np.ndarray:
        """Diagonal of the hat matrix at rows that were seen, ``[n]``."""
        z = np.asarray(phi, np.float64) - self.phi_mean
        own = np.ones(len(z)) if weights is None else np.asarray(weights, np.float64)
        base = 1 / self.weight if self.intercept else 0.0
        return own * (base + self._needed().quadratic(z))

    def _needed(self) -> _factor.Factor:
        if self.factor is None:
            raise ValueError("the solution must keep its factor for this. Got None.")
        return self.factor


@dataclasses.dataclass(frozen=True, eq=False)
class RidgePath:
    """Scores of several penalties, and the solution of the best.

    Attributes:
      l2s: the penalties, rising.
      scores: the criterion at each, a mean squared error.
      dofs: effective degrees of freedom at each; NaN where the criterion needs none
        and they were not computed.
      criterion: what was minimised.
      solution: at the penalty of the least score.
    """

    l2s: np.ndarray
    scores: np.ndarray
    dofs: np.ndarray
    criterion: str
    solution: RidgeSolution

    @property
    def l2(self) -> float:
        """The penalty of the least score."""
        return self.solution.l2


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Second moments about a point, of the rows of some statistics; float64.

    Of ``gram`` the upper triangle counts. The point is the mean with ``intercept``.
    """

    gram: np.ndarray
    cross: np.ndarray
    y_square: np.ndarray
    phi_mean: np.ndarray
    y_mean: np.ndarray
    weight: float
    rows: int
    intercept: bool


def moments(
    stats: RidgeStats, intercept: bool = True, about: Moments | None = None
) -> Moments:
    """Moments about the own mean, about zero without intercept, or about another's."""
    centred = target_moments(stats, intercept, about)
    gram = np.array(_host(stats.gram.high), np.float64, order="C")
    gram += np.asarray(_host(stats.gram.low))
    # (phi - mean) = (phi - a) - p.
    s = value_of(stats.phi_sum)
    p = centred.phi_mean - np.asarray(_host(shifts(stats)[0]), np.float64)
    blas.dsyr2(-1.0, s, p, lower=1, a=gram.T, overwrite_a=1)
    blas.dsyr(centred.weight, p, lower=1, a=gram.T, overwrite_a=1)
    _check_finite(np.diagonal(gram))
    return dataclasses.replace(centred, gram=gram)


def target_moments(
    stats: RidgeStats, intercept: bool = True, about: Moments | None = None
) -> Moments:
    """:func:`moments` without those of the features among themselves."""
    a, c = (np.asarray(_host(v), np.float64) for v in shifts(stats))
    s, t = value_of(stats.phi_sum), value_of(stats.y_sum)
    weight, rows = float(value_of(stats.weight)), int(_host(stats.rows))
    check_rows(rows, weight)
    if about is not None:
        mean, y_mean = about.phi_mean, about.y_mean
    elif intercept:
        mean, y_mean = a + s / weight, c + t / weight
    else:
        mean, y_mean = np.zeros_like(a), np.zeros_like(c)
    p, q = mean - a, y_mean - c
    cross = value_of(stats.cross)
    square = value_of(stats.y_square)
    # (phi - mean) = (phi - a) - p, and so on.
    cross = cross - np.outer(s, q) - np.outer(p, t) + weight * np.outer(p, q)
    square = square - 2 * q * t + weight * q * q
    _check_finite(cross, square)
    gram, square = np.zeros((0, 0)), np.maximum(square, 0)
    return Moments(gram, cross, square, mean, y_mean, weight, rows, intercept)


def _check_finite(*sums: np.ndarray) -> None:
    if not all(np.isfinite(values).all() for values in sums):
        raise ValueError("features and targets must be finite. Got inf or NaN.")


def solve(
    stats: RidgeStats, l2: float, *, intercept: bool = True, method: Method = "auto"
) -> RidgeSolution:
    r"""Solves for the coefficients.

    .. math::
      V = (C + \lambda I)^{-1} c, \quad b = \bar y - V^\top \bar\phi, \quad
      \lambda = \mathrm{l2} \sum_i w_i,

    with C and c the centred sums of :math:`\phi\phi^\top` and :math:`\phi y^\top`. In
    float64 on the host, by Cholesky factors; where the matrix is singular to working
    precision, by its eigenvectors with those of rounding noise left out.

    Args:
      stats: statistics of at least one row.
      l2: penalty per example, zero or more.
      intercept: fit b, without penalty.
      method: ``"cholesky"`` raises where the factors do not exist, ``"eigh"`` takes
        the eigenvectors from the start, ``"auto"`` those it needs.

    Raises:
      ValueError: for a negative or infinite penalty, statistics without rows or with
        inf or NaN, or another method.

    Warns:
      PrecisionWarning: if the condition number of :math:`C + \lambda I` is above 1e4
        (1e12 for float64 statistics): the rounding of the sums, times the condition
        number, bounds the relative error of the coefficients. Predictions are hurt
        much less. ``l2`` above 1e-4 of the norm of C over the rows never warns.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225 (closed
      form of bundled networks); Hoerl and Kennard, "Ridge Regression", 1970.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> phi = jax.random.normal(jax.random.key(0), (1000, 16))
      >>> y = phi[:, :2] + 3.0
      >>> stats = snnk.ridge.update(snnk.ridge.init(16, 2), phi, y)
      >>> solution = snnk.ridge.solve(stats, l2=1e-3)
      >>> solution.bias.round(2).tolist(), round(solution.dof, 1)
      ([3.0, 3.0], 17.0)
    """
    check_l2(l2)
    if method not in ("auto", "cholesky", "eigh"):
        raise ValueError(f"method must be auto, cholesky or eigh. Got {method!r}.")
    centred = moments(stats, intercept)
    penalty = l2 * centred.weight
    if method == "eigh":
        factor = _factor.eigen(centred.gram, penalty)
    else:
        factor = _factor.cholesky(centred.gram, penalty)
        if factor is None and method == "cholesky":
            raise ValueError(
                "l2 must make the Gram matrix positive definite for "
                f"method='cholesky'. Got {l2}."
            )
    if factor is None:  # the attempt overwrote the matrix
        factor = _factor.eigen(moments(stats, intercept).gram, penalty)
    return _solution(stats, centred, l2, factor)


def select_l2(
    stats: RidgeStats,
    l2s: Sequence[float] | np.ndarray | None = None,
    *,
    criterion: Literal["gcv", "validation"] = "gcv",
    validation: RidgeStats | None = None,
    intercept: bool = True,
) -> RidgePath:
    r"""Chooses the penalty from the statistics alone, without another look at the rows.

    ``"gcv"``: generalised cross-validation, ``residual / (1 - dof / n)^2``.
    ``"validation"``: the mean squared error on the rows of other statistics; K folds
    are the statistics of everything, :func:`merge`d but for one.

    Up to 4096 features one eigendecomposition serves all penalties; wider matrices are
    factored for each.

    Args:
      stats: statistics of the training rows.
      l2s: penalties per example, positive. None: a grid from the precision of the
        statistics (1e-7 of the norm of the Gram matrix over n; 1e-11 in float64) to
        ten times the norm; by decades and then thirds of them in wide matrices.
      criterion: what to minimise.
      validation: statistics of held-out rows.
      intercept: as for :func:`solve`.

    Returns:
      Penalties, scores and the best solution.

    Raises:
      ValueError: for penalties that are not positive, a criterion without what it
        needs, or statistics of other features or targets.

    References:
      Golub, Heath and Wahba, "Generalized cross-validation as a method for choosing a
      good ridge parameter", 1979.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> phi, noise = jax.random.normal(jax.random.key(0), (2, 100, 50))
      >>> y = phi[:, :1] + noise[:, :1]
      >>> stats = snnk.ridge.update(snnk.ridge.init(50, 1), phi, y)
      >>> path = snnk.ridge.select_l2(stats)
      >>> 0.01 < path.l2 < 10, path.solution.dof < 40
      (True, True)
    """
    check_criterion(criterion, ("gcv", "validation"))
    if (validation is not None) != (criterion == "validation"):
        raise ValueError(
            "validation must be given with criterion='validation', and only then. "
            f"Got criterion={criterion!r}."
        )
    if validation is not None and (
        (validation.num_features, validation.num_targets)
        != (stats.num_features, stats.num_targets)
    ):
        raise ValueError(
            f"validation must have {stats.num_features} features and "
            f"{stats.num_targets} targets, as the statistics. Got "
            f"{validation.num_features} and {validation.num_targets}."
        )
    if l2s is not None:
        l2s = np.asarray(l2s, np.float64)
        if l2s.ndim != 1 or not l2s.size:
            raise ValueError(f"l2s must be a sequence of penalties. Got {l2s}.")
        if not np.all((l2s > 0) & (l2s < np.inf)):
            raise ValueError(f"l2s must be positive and finite. Got {l2s}.")
        l2s = np.sort(l2s)
    centred = moments(stats, intercept)
    held_out = None if validation is None else moments(validation, about=centred)
    top = max(_factor.largest(centred.gram), np.finfo(float).tiny) / centred.weight
    wide = stats.num_features > _EIGH_WIDTH
    spectrum = None if wide else _factor.eigen(centred.gram)
    judged: dict[float, tuple[float, float]] = {}

    def factor_at(l2: float) -> _factor.Factor:
        penalty = l2 * centred.weight
        if spectrum is not None:
            return dataclasses.replace(spectrum, penalty=penalty)
        return _factored(stats, intercept, penalty)

    def judge(values: np.ndarray) -> float:
        for l2 in map(float, values):
            judged[l2] = _judge(centred, held_out, factor_at(l2), rounding_of(stats))
        return min(judged, key=lambda l2: judged[l2][0])

    if l2s is not None:
        best = judge(l2s)
    else:
        low = np.log10(_LEAST[stats.weight.high.dtype.itemsize])
        best = judge(top * 10.0 ** np.arange(low, 1.5, 1 if wide else 1 / 6))
        if wide:
            best = judge(best * 10.0 ** (np.array([-2, -1, 1, 2]) / 3))
    order = np.array(sorted(judged))
    scores, dofs = np.array([judged[l2] for l2 in order]).T
    solution = _solution(stats, centred, best, factor_at(best))
    return RidgePath(order, scores, dofs, criterion, solution)


def leave_one_out(
    solution: RidgeSolution,
    phi: Float[Array, "n m"],
    y: Float[Array, "n o"],
    weights: Float[Array, " n"] | None = None,
) -> np.ndarray:
    r"""Residuals of rows predicted without themselves, ``[n, o]``, in closed form.

    ``residual / (1 - leverage)``: what a refit without the row would give at the same
    :math:`\lambda`, in float64. The rows may come in chunks.

    Args:
      solution: with its factor, of statistics that hold the rows.
      phi: their features.
      y: their targets.
      weights: their weights.

    Warns:
      PrecisionWarning: where a leverage is so close to 1 that the rounding of the
        statistics is above a hundredth of what is left: more features than rows and
        hardly a penalty. Of :func:`fit` the residuals have their digits there too.

    References:
      Allen, "The relationship between variable selection and data augmentation and a
      method for prediction" (PRESS), 1974.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> phi, y = jax.random.normal(jax.random.key(0), (2, 30, 4))
      >>> stats = snnk.ridge.update(snnk.ridge.init(4, 4), phi, y)
      >>> solution = snnk.ridge.solve(stats, l2=0.1)
      >>> snnk.ridge.leave_one_out(solution, phi, y).shape
      (30, 4)
    """
    z = np.asarray(phi, np.float64) - solution.phi_mean
    residual = np.asarray(y, np.float64) - solution.y_mean - z @ solution.kernel64
    own = np.ones(len(z)) if weights is None else np.asarray(weights, np.float64)
    factor = solution.factor
    if isinstance(factor, _factor.Dual):
        # Its leverages are differences of numbers as large as one over the penalty.
        factor = _factor.svd(factor.rows, factor.penalty)
    if (
        isinstance(factor, _factor.Eigen)
        and len(factor.values) == solution.rows - solution.intercept
        and solution.rounding <= _ROUNDING[8]
    ):
        seen = own > 0
        residual[seen] = _interpolated(factor, solution.kernel64, z[seen], own[seen])
        return residual
    free = 1 - solution.leverage(phi, weights)
    lost = int(np.sum(free < 100 * solution.rounding))
    if lost:
        exact = solution.rounding <= _ROUNDING[8]
        advice = "Raise l2" if exact else "Raise l2, or take them from ridge.fit"
        warnings.warn(
            f"{lost} rows have a leverage within {100 * solution.rounding:.0e} of 1, "
            f"which a rounding of {solution.rounding:.0e} leaves few digits of: their "
            f"left-out residuals may be off by any factor. {advice}.",
            PrecisionWarning,
            stacklevel=2,
        )
    with np.errstate(divide="ignore", invalid="ignore"):  # warned of
        return residual / free[:, None]


def _interpolated(
    factor: _factor.Eigen, kernel: np.ndarray, z: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Left-out residuals where only the penalty keeps the rows from being met.

    With rows ``Z = U S V^T`` and all of U seen, residuals and what the leverages leave
    of 1 have the penalty as a factor, ``p U (S^2 + p)^{-1} U^T`` of the targets and on
    the diagonal. It cancels, and may be zero.
    """
    roots = np.sqrt(factor.values)
    left = z @ factor.vectors / roots
    residual = left @ (factor.vectors.T @ kernel / roots[:, None])
    free = left**2 @ (1 / (factor.values + factor.penalty))
    return residual / (weights * free)[:, None]


def _factored(stats: RidgeStats, intercept: bool, penalty: float) -> _factor.Factor:
    """Cholesky factors, or eigenvectors where they do not exist."""
    factor = _factor.cholesky(moments(stats, intercept).gram, penalty)
    # The first matrix is overwritten: it is made again for the second way.
    return factor or _factor.eigen(moments(stats, intercept).gram, penalty)


def _judge(
    centred: Moments,
    held_out: Moments | None,
    factor: _factor.Factor,
    rounding: float,
) -> tuple[float, float]:
    """The criterion and the degrees of freedom of one penalty."""
    kernel = factor.solve(centred.cross)
    if held_out is not None:
        wrong = _factor.multiply(held_out.gram, kernel) - 2 * held_out.cross
        error = np.sum(held_out.y_square) + np.sum(kernel * wrong)
        return float(error) / held_out.weight / kernel.shape[1], float("nan")
    residual = float(np.mean(_residual(centred, kernel, factor.penalty)))
    # Below the rounding of the sums a residual of zero is none.
    floor = rounding * float(np.mean(centred.y_square)) / centred.weight
    dof = factor.dof() + centred.intercept
    return _gcv(max(residual, floor), dof, centred.rows), dof


def _residual(centred: Moments, kernel: np.ndarray, penalty: float) -> np.ndarray:
    """Mean squared residuals by ``y^2 - c.V - penalty |V|^2`` at the solution V."""
    explained = np.sum(kernel * (centred.cross + penalty * kernel), axis=0)
    return np.maximum(centred.y_square - explained, 0) / centred.weight


def _gcv(residual: float, dof: float, rows: int) -> float:
    free = max(1 - dof / rows, np.finfo(np.float64).eps)
    return residual / free**2


def _solution(
    stats: RidgeStats, centred: Moments, l2: float, factor: _factor.Factor
) -> RidgeSolution:
    """The solution in the dtype of the statistics; warns of what their sums lack."""
    dtype = stats.weight.high.dtype
    limit = _LIMITS[dtype.itemsize]
    if factor.condition > limit:
        warnings.warn(
            f"l2={l2:.2g} leaves a condition number of {factor.condition:.1e}, above "
            f"the {limit:.0e} that sums in {dtype.name} resolve: coefficients may be "
            f"off by {factor.condition * rounding_of(stats):.0e} of their size, "
            "predictions by far less. Raise l2, or gather the statistics in float64.",
            PrecisionWarning,
            stacklevel=3,
        )
    method = "eigh" if isinstance(factor, _factor.Eigen) else "cholesky"
    kernel = factor.solve(centred.cross)
    return make_solution(centred, kernel, l2, factor, method, dtype, rounding_of(stats))


def make_solution(
    centred: Moments,
    kernel: np.ndarray,
    l2: float,
    factor: _factor.Factor | None,
    method: str,
    dtype: Any,
    rounding: float = _ROUNDING[8],
) -> RidgeSolution:
    """The solution of coefficients in float64, in a dtype of its own."""
    penalty = l2 * centred.weight
    return RidgeSolution(
        kernel=jnp.asarray(kernel, dtype),
        bias=jnp.asarray(centred.y_mean - centred.phi_mean @ kernel, dtype),
        l2=float(l2),
        residual=_residual(centred, kernel, penalty),
        condition=float("nan") if factor is None else factor.condition,
        method=method,
        rows=centred.rows,
        weight=centred.weight,
        phi_mean=centred.phi_mean,
        y_mean=centred.y_mean,
        intercept=centred.intercept,
        kernel64=kernel,
        rounding=rounding,
        factor=factor,
    )


def rounding_of(stats: RidgeStats) -> float:
    """Relative rounding of sums in the dtype of the statistics."""
    return _ROUNDING[stats.weight.high.dtype.itemsize]


def value_of(total: Total) -> Any:
    """A sum in float64 on the host."""
    return np.asarray(_host(total.high), np.float64) + np.asarray(_host(total.low))


def _host(value: Any) -> np.ndarray:
    """The whole array, also where other processes hold parts of it."""
    here = getattr(value, "is_fully_addressable", True) or value.is_fully_replicated
    if not here:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def check_rows(rows: int, weight: float) -> None:
    """Raises ValueError unless statistics hold rows of some weight."""
    # What unlearning leaves of the weight of all rows is rounding.
    if rows == 0 or not weight > 0:  # the count wraps beyond 2^31
        raise ValueError(
            f"statistics must hold rows. Got {rows} of a weight of {weight}."
        )


def check_l2(l2: float) -> None:
    """Raises ValueError unless ``l2`` is a penalty."""
    if not 0 <= l2 < np.inf:
        raise ValueError(f"l2 must be at least 0 and finite. Got {l2}.")


def check_criterion(criterion: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless the criterion is known."""
    if criterion not in known:
        raise ValueError(f"criterion must be {' or '.join(known)}. Got {criterion!r}.")
