"""Differentially private statistics: clipped rows and Gaussian noise."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from snnk_jax.ridge._solve import value_of
from snnk_jax.ridge._stats import RidgeStats
from snnk_jax.ridge._sums import Total
from snnk_jax.typing import Array, Float, PRNGKeyArray

# One row, its features and targets divided by their bounds, adds to each of the six
# sums an array of norm 1 at most: of |phi|^2, |phi| |y|, |phi|, |y|, |y|^2 and 1. A row
# along the axes on both bounds attains all of them.
_SENSITIVITY = math.sqrt(6)


class PrivacyReport(NamedTuple):
    """What a release promises, and the noise that it cost.

    Attributes:
      epsilon: ε.
      delta: δ.
      phi_bound: B, the largest norm of the features of a row.
      y_bound: R, the largest norm of its targets.
      sensitivity: the largest norm of what one row changes, in units of the bounds.
      sigma: standard deviation of the noise, in units of the bounds: that of the Gram
        matrix is ``sigma * phi_bound ** 2``.
      projected: eigenvalues of the noisy Gram matrix that were negative and became 0.
    """

    epsilon: float
    delta: float
    phi_bound: float
    y_bound: float
    sensitivity: float
    sigma: float
    projected: int


def clip_rows(
    phi: Float[Array, "n m"],
    y: Float[Array, "n o"],
    phi_bound: float,
    y_bound: float,
) -> tuple[Float[Array, "n m"], Float[Array, "n o"]]:
    r"""Scales rows down to norms that :func:`privatize` may rely on.

    Rows inside a bound stay as they are, others become ``bound / norm`` times
    themselves; bounds are lowered by the rounding of a norm, so that none is passed.
    How many rows were scaled is no less private than the rows: choose bounds from
    what is known of the features, not from these data.

    Args:
      phi: features; finite, as one row of NaN would be seen in every sum.
      y: targets.
      phi_bound: the largest Euclidean norm of a row of ``phi``.
      y_bound: the largest Euclidean norm of a row of ``y``.

    Returns:
      Both, clipped.

    Raises:
      ValueError: for bounds that are not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> phi, y = jnp.array([[3.0, 4.0], [0.3, 0.4]]), jnp.array([[1.0], [-8.0]])
      >>> phi, y = snnk.ridge.clip_rows(phi, y, 1.0, 2.0)
      >>> phi.round(3).tolist(), y.round(3).tolist()
      ([[0.6..., 0.8...], [0.3..., 0.4...]], [[1.0], [-2.0]])
    """
    _check_bounds(phi_bound, y_bound)
    return _clip(phi, phi_bound), _clip(y, y_bound)


def privatize(
    key: PRNGKeyArray,
    stats: RidgeStats,
    *,
    epsilon: float,
    delta: float,
    phi_bound: float,
    y_bound: float,
) -> tuple[RidgeStats, PrivacyReport]:
    r"""Adds Gaussian noise, so that the statistics tell little of any single row.

    Let :math:`M(D)` be what comes out for the rows D. For all D and D' that differ by
    one row, added or taken out, of a weight of at most 1 and of norms
    :math:`\lVert\phi\rVert \le B` and :math:`\lVert y\rVert \le R`, and all sets S,

    .. math::
      P(M(D) \in S) \le e^\epsilon P(M(D') \in S) + \delta.

    With features in units of B and targets of R, one row changes each of the six sums
    (of the Gram matrix the upper triangle) by a norm of at most 1, and all of them by
    :math:`\Delta = \sqrt 6`, which a row attains. Their entries get independent noise
    of standard deviation :math:`\sigma`, the least of the analytic Gaussian mechanism:

    .. math::
      \Phi\left(\frac{\Delta}{2\sigma} - \frac{\epsilon\sigma}{\Delta}\right) -
      e^\epsilon \Phi\left(-\frac{\Delta}{2\sigma} -
      \frac{\epsilon\sigma}{\Delta}\right) \le \delta,

    for any positive ε. The number of rows becomes the noisy weight, rounded. The noisy
    second moments of :math:`[\phi, 1]` are projected onto the positive semi-definite
    cone, which costs no privacy and moves nothing where they are positive already;
    after a projection the sums are biased. Whatever is computed from the result, any
    :func:`solve` or :func:`select_l2`, is as private; what looks at the rows again is
    not.

    The noise of the Gram matrix has a norm of about :math:`2 \sigma B^2 \sqrt m`. An
    ``l2`` well below that over the weight lets the directions in which there is only
    noise into the solution.

    Limits: the guarantee is of real numbers. Sums and noise are rounded, to about 48
    bits in float32 statistics, and low bits of such noise can betray the value it
    hides (Mironov); the generator is numpy's, seeded by the 64 bits of the key, good
    for statistics and not made to withstand an attacker. A key that is known, is drawn
    from a small seed or is used for other statistics too, protects nothing. Every
    release of the same rows spends its own ε and δ.

    Args:
      key: drawn from a source of secrets, for this release only.
      stats: of rows that went through :func:`clip_rows` with the same bounds, of
        weights of at most 1, from ``init(..., shift=False)``.
      epsilon: ε, above 0.
      delta: δ, above 0 and below 1, well below one over the number of rows.
      phi_bound: B.
      y_bound: R.

    Returns:
      Statistics to publish, and the report of the noise in them.

    Raises:
      ValueError: for statistics with a shift, which is a mean of rows and gets no
        noise, for sums larger than the bounds allow, for sums that are not finite, or
        for an ε, δ or bound out of range.

    References:
      Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy",
      arXiv 1805.06530; Wang, "Revisiting differentially private linear regression",
      arXiv 1803.02596 (perturbed sufficient statistics); Mironov, "On significance of
      the least significant bits for differential privacy", CCS 2012.

    Example:
      >>> import jax, secrets
      >>> import numpy as np
      >>> import snnk_jax as snnk
      >>> phi = jax.random.normal(jax.random.key(0), (20000, 4))
      >>> phi, y = snnk.ridge.clip_rows(phi / 4, phi[:, :1] / 4, 1.0, 1.0)
      >>> stats = snnk.ridge.update(snnk.ridge.init(4, 1, shift=False), phi, y)
      >>> words = np.frombuffer(secrets.token_bytes(8), np.uint32)
      >>> key = jax.random.wrap_key_data(words, impl="threefry2x32")
      >>> private, report = snnk.ridge.privatize(
      ...     key, stats, epsilon=1.0, delta=1e-6, phi_bound=1.0, y_bound=1.0
      ... )
      >>> round(report.sigma, 1)
      10.3
      >>> solution = snnk.ridge.solve(private, l2=2e-3)
      >>> bool(abs(solution.kernel - np.array([[1.0], [0], [0], [0]])).max() < 0.1)
      True
    """
    _check_bounds(phi_bound, y_bound)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite. Got {epsilon}.")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be above 0 and below 1. Got {delta}.")
    if stats.phi_shift is not None or stats.y_shift is not None:
        raise ValueError(
            "stats must come from init(..., shift=False): a shift is a mean of rows "
            "and gets no noise. Got statistics with a shift."
        )
    words = np.asarray(jax.random.key_data(key))
    if words.ndim != 1:
        raise ValueError(f"key must be a single key. Got key data {words.shape}.")
    gram, cross, phi_sum, y_sum, y_square, weight = _scaled(stats, phi_bound, y_bound)
    sigma = gaussian_sigma(epsilon, delta, _SENSITIVITY)
    rng = np.random.default_rng(words)
    # The sums of [phi, 1] as one matrix; every noise is drawn once and mirrored.
    moments = np.block([[gram, phi_sum[:, None]], [phi_sum[None], weight]])
    moments = np.triu(moments + sigma * rng.standard_normal(moments.shape))
    moments, projected = _project(moments + np.triu(moments, 1).T)
    cross, y_sum, y_square = (
        total + sigma * rng.standard_normal(total.shape)
        for total in (cross, y_sum, y_square)
    )
    b, r, dtype = phi_bound, y_bound, stats.weight.high.dtype
    weight = moments[-1, -1]
    noisy = RidgeStats(
        gram=_total(b * b * moments[:-1, :-1], dtype),
        cross=_total(b * r * cross, dtype),
        phi_sum=_total(b * moments[:-1, -1], dtype),
        y_sum=_total(r * y_sum, dtype),
        y_square=_total(r * r * np.maximum(y_square, 0), dtype),
        weight=_total(weight, dtype),
        rows=jnp.asarray(round(float(weight)), jnp.int32),
        phi_shift=None,
        y_shift=None,
    )
    report = PrivacyReport(epsilon, delta, b, r, _SENSITIVITY, sigma, projected)
    return noisy, report


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float) -> float:
    """The least σ of the Gaussian mechanism that is (ε, δ)-private, rounded up."""
    low = high = 1.0
    while _delta(high, epsilon) > delta:
        high *= 2
    while _delta(low, epsilon) <= delta:
        low /= 2
    while high > low * (1 + 1e-12):
        middle = math.sqrt(low * high)
        if _delta(middle, epsilon) > delta:
            low = middle
        else:
            high = middle
    return high * sensitivity * (1 + 1e-12)


def _delta(sigma: float, epsilon: float) -> float:
    """The least δ at noise of σ sensitivities, from above.

    A difference of logarithms, as ``exp(epsilon)`` overflows; what they may have lost
    to rounding is added.
    """
    centre = epsilon * sigma
    upper = float(special.log_ndtr(0.5 / sigma - centre))
    lower = epsilon + float(special.log_ndtr(-0.5 / sigma - centre))
    if upper == -math.inf:
        return 0.0
    size = 1 + epsilon + abs(upper) + abs(lower)
    error = 8 * np.finfo(np.float64).eps * size
    return math.exp(upper) * (-math.expm1(min(lower - upper, 0.0)) + error)


def _scaled(stats: RidgeStats, phi_bound: float, y_bound: float) -> list[np.ndarray]:
    """The sums in units of the bounds, if they can be sums of clipped rows."""
    b, r = phi_bound, y_bound
    sums = [
        np.asarray(value_of(total) / unit)
        for total, unit in (
            (stats.gram, b * b),
            (stats.cross, b * r),
            (stats.phi_sum, b),
            (stats.y_sum, r),
            (stats.y_square, r * r),
            (stats.weight, 1.0),
        )
    ]
    # Below the diagonal the Gram matrix means nothing, but was made of rows as well.
    sums[0] = np.triu(sums[0])
    gram, *_, y_square, weight = sums
    if not all(np.all(np.isfinite(total)) for total in sums):
        raise ValueError("features and targets must be finite. Got inf or NaN.")
    # Norms of clipped rows add up to this at most; a thousandth for rounding.
    limit = 1.001 * float(weight) + 1e-3
    if np.trace(gram) > limit or y_square.sum() > limit:
        raise ValueError(
            "rows must go through clip_rows with the same bounds. Got squared norms "
            f"of sum {np.trace(gram):.4g} and {y_square.sum():.4g}, in units of the "
            f"bounds, at a weight of {float(weight):.4g}."
        )
    return sums


def _project(moments: np.ndarray) -> tuple[np.ndarray, int]:
    """The nearest positive semi-definite matrix, and how many eigenvalues that took."""
    values, vectors = np.linalg.eigh(moments)
    negative = int(np.sum(values < 0))
    if negative:
        moments = (vectors[:, negative:] * values[negative:]) @ vectors[:, negative:].T
    return moments, negative


def _total(value: Any, dtype: Any) -> Total:
    """A value in float64 as the two numbers of a sum."""
    high = np.asarray(value, dtype)
    low = np.asarray(value - high.astype(np.float64), dtype)
    return Total(jnp.asarray(high), jnp.asarray(low))


def _clip(rows: Any, bound: float) -> Any:
    """Rows of norms of at most ``bound``, whatever the rounding."""
    rows = jnp.asarray(rows)  # float64 of NumPy becomes what JAX computes in
    wide = jnp.float64 if rows.dtype == jnp.float64 else jnp.float32
    margin = rows.shape[1] * jnp.finfo(wide).eps + 2 * jnp.finfo(rows.dtype).eps
    limit = bound * (1 - float(margin))
    # By a power of two the squares of extreme rows neither overflow nor vanish.
    power = 5 * jnp.finfo(wide).maxexp // 16
    top = jnp.max(jnp.abs(rows), axis=1, keepdims=True).astype(wide)
    small = jnp.where(top < 2.0**-power, 2.0 ** (2 * power), 1)
    unit = jnp.where(top > 2.0**power, 2.0 ** (-2 * power), small).astype(wide)
    scaled = rows.astype(wide) * unit
    norm = jnp.linalg.norm(scaled, axis=1, keepdims=True)
    clipped = scaled * (limit / norm)
    return jnp.where(norm > limit * unit, clipped.astype(rows.dtype), rows)


def _check_bounds(phi_bound: float, y_bound: float) -> None:
    for name, bound in (("phi_bound", phi_bound), ("y_bound", y_bound)):
        if not 0 < bound < math.inf:
            raise ValueError(f"{name} must be positive and finite. Got {bound}.")
