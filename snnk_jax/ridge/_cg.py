"""Conjugate gradients on the device, for matrices too large to factor."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax.ridge._solve import (
    PrecisionWarning,
    RidgeSolution,
    check_l2,
    rounding_of,
    target_moments,
)
from snnk_jax.ridge._stats import RidgeStats, recentre, shifts
from snnk_jax.typing import PRNGKeyArray


class CGReport(NamedTuple):
    """How conjugate gradients ended.

    Attributes:
      steps: products with the Gram matrix.
      error: relative residual of the normal equations, the largest of the targets.
      converged: whether it is below the tolerance.
    """

    steps: int
    error: float
    converged: bool


def solve_cg(
    key: PRNGKeyArray,
    stats: RidgeStats,
    l2: float,
    *,
    rank: int = 128,
    tolerance: float = 1e-5,
    max_steps: int = 500,
    intercept: bool = True,
) -> tuple[RidgeSolution, CGReport]:
    r"""Solves for the coefficients where the Gram matrix is too large to factor.

    Preconditioned conjugate gradients, all targets at once, in the dtype of the
    statistics on the device that holds them, also sharded. A step costs one product
    of the Gram matrix with ``[m, o]``, and nothing costs ``m^3``. The
    preconditioner is a randomised Nyström approximation :math:`U \Lambda U^\top` of
    the Gram matrix of rank r,

    .. math::
      P^{-1} = (\lambda_r + \lambda)\, U (\Lambda + \lambda)^{-1} U^\top
      + (I - U U^\top),

    which leaves a condition number of about :math:`1 + \lambda_r / \lambda`.

    Args:
      key: of the random sketch, which only the number of steps depends on.
      stats: statistics of at least one row.
      l2: penalty per example, above zero.
      rank: r, at most m; a QR and singular value decomposition of ``[m, r]`` on the
        host.
      tolerance: relative residual to stop at. Float32 statistics do not reach much
        below 1e-6.
      max_steps: when to give up.
      intercept: as for :func:`solve`.

    Returns:
      The solution, without a factor: its degrees of freedom, errors and leverages are
      not available; and the report. The ``residual`` is that of these coefficients, up
      to the rounding of the statistics and of :math:`V^\top C V`: in float32 about
      1e-7 of :math:`\lVert C\rVert \lVert V\rVert^2`, below which it tells nothing.

    Raises:
      ValueError: for a penalty, rank or tolerance that is not positive.

    Warns:
      PrecisionWarning: if the tolerance was not reached.

    References:
      Frangella, Tropp and Udell, "Randomized Nyström Preconditioning", arXiv
      2110.02820.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> phi = jax.random.normal(jax.random.key(0), (1000, 64))
      >>> stats = snnk.ridge.update(snnk.ridge.init(64, 1), phi, phi[:, :1])
      >>> solution, report = snnk.ridge.solve_cg(
      ...     jax.random.key(1), stats, l2=1e-2, rank=16
      ... )
      >>> report.converged
      True
    """
    check_l2(l2)
    if not l2 > 0:
        raise ValueError(f"l2 must be above zero for conjugate gradients. Got {l2}.")
    if not 1 <= rank <= stats.num_features:
        raise ValueError(f"rank must be in [1, {stats.num_features}]. Got {rank}.")
    if not tolerance > 0 or max_steps < 1:
        raise ValueError(
            "tolerance must be above zero and max_steps at least 1. "
            f"Got {tolerance} and {max_steps}."
        )
    centred = target_moments(stats, intercept)
    penalty = jnp.asarray(l2 * centred.weight, stats.weight.high.dtype)
    system = _prepare(stats, intercept)
    if not bool(jnp.isfinite(jnp.sum(jnp.diagonal(system.gram)))):
        raise ValueError("features and targets must be finite. Got inf or NaN.")
    omega = jax.random.normal(key, (stats.num_features, rank), penalty.dtype)
    omega = jnp.linalg.qr(omega)[0]
    basis, values = _nystrom(np.asarray(omega), np.asarray(_apply(system, omega)))
    preconditioner = jnp.asarray(basis, penalty.dtype), jnp.asarray(values)
    kernel, steps, errors = _conjugate_gradients(
        system, penalty, preconditioner, tolerance, max_steps
    )
    error = float(jnp.max(errors))
    report = CGReport(int(steps), error, error <= tolerance)
    if not report.converged:
        warnings.warn(
            f"conjugate gradients stopped after {report.steps} steps at a relative "
            f"residual of {error:.1e}, above {tolerance:.0e}. Raise rank, max_steps, "
            "l2 or the tolerance.",
            PrecisionWarning,
            stacklevel=2,
        )
    # Of these coefficients, not of the solution: theirs is second order in the error.
    kernel64 = np.asarray(kernel, np.float64)
    wrong = np.asarray(_apply(system, kernel), np.float64) - 2 * centred.cross
    residual = centred.y_square + np.sum(kernel64 * wrong, axis=0)
    solution = RidgeSolution(
        kernel=kernel,
        bias=system.y_mean - system.phi_mean @ kernel,
        l2=float(l2),
        residual=np.maximum(residual, 0) / centred.weight,
        condition=float("nan"),
        method="cg",
        rows=centred.rows,
        weight=centred.weight,
        phi_mean=centred.phi_mean,
        y_mean=centred.y_mean,
        intercept=intercept,
        kernel64=kernel64,
        rounding=rounding_of(stats),
        factor=None,
    )
    return solution, report


class _System(NamedTuple):
    """The centred normal equations, on the device.

    The Gram matrix is ``gram - outer(mean, mean) * weight``, never formed; ``mean`` is
    that of the shifted features.
    """

    gram: Any
    mean: Any
    weight: Any
    cross: Any
    phi_mean: Any
    y_mean: Any


@functools.partial(jax.jit, static_argnums=1)
def _prepare(stats: RidgeStats, intercept: bool) -> _System:
    zeros = jnp.zeros_like(stats.phi_sum.high), jnp.zeros_like(stats.y_sum.high)
    if not intercept:
        # About zero, where the mean that is taken out again is none.
        stats = recentre(stats, *zeros)
    weight = stats.weight.high
    upper = jnp.triu(stats.gram.high)
    gram = upper + jnp.triu(upper, 1).T
    cross = stats.cross.high
    if not intercept:
        return _System(gram, zeros[0], weight, cross, *zeros)
    a, c = shifts(stats)
    s, t = stats.phi_sum.high / weight, stats.y_sum.high / weight
    cross = cross - weight * jnp.outer(s, t)
    return _System(gram, s, weight, cross, a + s, c + t)


@jax.jit
def _apply(system: _System, v: Any) -> Any:
    product = jnp.matmul(system.gram, v, precision=jax.lax.Precision.HIGHEST)
    return product - system.weight * jnp.outer(system.mean, system.mean @ v)


def _nystrom(omega: np.ndarray, product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors and values of the approximation ``Y (O^T Y)^{-1} Y^T``, host."""
    omega, product = omega.astype(np.float64), product.astype(np.float64)
    # A shift keeps rounding from making the inner matrix indefinite.
    shift = np.finfo(np.float32).eps * np.linalg.norm(product, 2)
    shift = max(shift, np.finfo(np.float64).tiny)
    product = product + shift * omega
    inner = omega.T @ product
    values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    keep = values > shift * 1e-3
    half = product @ (vectors[:, keep] / np.sqrt(values[keep]))
    basis, singular, _ = np.linalg.svd(half, full_matrices=False)
    return basis, np.maximum(singular**2 - shift, 0).astype(np.float32)


@jax.jit
def _conjugate_gradients(
    system: _System, penalty: Any, preconditioner: Any, tolerance: Any, max_steps: Any
) -> tuple[Any, Any, Any]:
    basis, values = preconditioner
    values = values.astype(penalty.dtype)

    def precondition(r: Any) -> Any:
        inside = jnp.matmul(basis.T, r, precision=jax.lax.Precision.HIGHEST)
        scale = (values[-1] + penalty) / (values + penalty) - 1
        lifted = jnp.matmul(
            basis, scale[:, None] * inside, precision=jax.lax.Precision.HIGHEST
        )
        return r + lifted

    size = jnp.linalg.norm(system.cross, axis=0)
    size = jnp.where(size > 0, size, 1)

    def unfinished(state: Any) -> Any:
        _, r, _, _, step = state
        error = jnp.max(jnp.linalg.norm(r, axis=0) / size)
        return (error > tolerance) & (step < max_steps)

    def body(state: Any) -> Any:
        v, r, p, rz, step = state
        q = _apply(system, p) + penalty * p
        curvature = jnp.sum(p * q, axis=0)
        # A target that has converged exactly has no direction left.
        alpha = jnp.where(curvature > 0, rz / jnp.where(curvature > 0, curvature, 1), 0)
        v, r = v + alpha[None] * p, r - alpha[None] * q
        z = precondition(r)
        new = jnp.sum(r * z, axis=0)
        beta = jnp.where(rz > 0, new / jnp.where(rz > 0, rz, 1), 0)
        return v, r, z + beta[None] * p, new, step + 1

    r = system.cross
    z = precondition(r)
    start = (jnp.zeros_like(r), r, z, jnp.sum(r * z, axis=0), jnp.zeros((), jnp.int32))
    v, _, _, _, steps = jax.lax.while_loop(unfinished, body, start)
    # The residual itself, not the one that the recursion believes in.
    true = system.cross - _apply(system, v) - penalty * v
    return v, steps, jnp.linalg.norm(true, axis=0) / size
