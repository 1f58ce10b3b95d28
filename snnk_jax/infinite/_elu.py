r"""Duals of ELU and SELU: one integral over the angle, whose integrand is closed.

In polar coordinates :math:`u = -R \sqrt p \sin(\omega - \psi)` and
:math:`v = -R \sqrt r \sin\psi`, with R a Rayleigh variable and :math:`\omega` the angle
between u and -v. Over the sector :math:`0 < \psi < \omega` both are negative, and

.. math:: E[(1 - e^u)(1 - e^v); u, v < 0] = \frac{1}{2 \pi} \int_0^\omega
  w(a) + w(b) - w(a + b)\, d\psi, \qquad w(a) = 1 - E[e^{-a R}]
  = \sqrt{\pi / 2}\, a\, \mathrm{erfcx}(a / \sqrt 2)

at :math:`a = \sqrt p \sin(\omega - \psi)` and :math:`b = \sqrt r \sin\psi`. Over the
sectors of opposite signs, of angle :math:`\theta = \pi - \omega`, the integrand is
:math:`a E[R (1 - e^{-b R})]`; where both are positive it is the arc-cosine kernel's.
Written with bivariate normal distribution functions (Tsuchida et al., arXiv
2002.08517) the same expectations cancel at small norms, and lose digits to large
exponentials at large ones; all integrands here are positive, bounded relative to the
kernel, and smooth at every correlation, so one Gauss rule serves them.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from snnk_jax.infinite import _arccos
from snnk_jax.infinite._root import safe_sqrt
from snnk_jax.typing import Array

_MEAN = math.sqrt(math.pi / 2)  # of R
# Moments E[R^n] = 2^(n/2) gamma(1 + n/2).
_MOMENTS = tuple(2 ** (n / 2) * math.gamma(1 + n / 2) for n in range(12))
# erfcx is a polynomial in (a - c) / (a + c), over 1 + a.
_CENTRE = 4.0
_TERMS_FLOAT64, _TERMS_FLOAT32 = 24, 12
# Where both arguments, or one, are small: the ends of the series.
_THRESHOLDS_FLOAT64, _THRESHOLDS_FLOAT32 = (0.02, 1e-3), (0.25, 0.05)
_ORDER = 11
_CAP = 1e4
_ERFCX_OF_CAP = float(scipy.special.erfcx(_CAP / math.sqrt(2)))
# Nodes of half a sector, and the width relative to the sector where they crowd.
_RULE_FLOAT64, _RULE_FLOAT32 = (26, 1e-4), (16, 2e-4)


def dual(pair: Any, scale: float, alpha: float) -> tuple[Array, Array]:
    """Computes k and its derivative dual of ``scale * elu(z, alpha)``.

    To about 1e-12 in float64 and 1e-6 in float32, relative to the geometric mean of
    the diagonal entries, for norms up to 1e4; beyond, the derivative dual has an error
    of about 2e-6. First derivatives in p, q and r are those of the exact kernels,
    higher ones are not.
    """
    p, q, r, gap = pair
    gap = jax.lax.stop_gradient(gap)
    s, t = safe_sqrt(p), safe_sqrt(r)
    sectors = jax.lax.stop_gradient(_sectors(p, q, r, gap))
    k_sum, kdot_sum, curvature = _integrals(s, t, sectors, alpha)
    plain, step, _ = jax.lax.stop_gradient(_arccos.dual(1, 0.0, 1.0, pair, False))
    size = s * t
    level = plain / jnp.where(size > 0, jax.lax.stop_gradient(size), 1)
    k = level * size + k_sum
    kdot = step + kdot_sum
    # So far at a fixed angle; the rest is the derivative in q at fixed p and r.
    move = q - sectors[1].cosine * size
    move = move - jax.lax.stop_gradient(move)
    curvature = curvature + _kink(p, r, gap, alpha)
    k, kdot = k + kdot * move, kdot + jax.lax.stop_gradient(curvature) * move
    return scale**2 * k, scale**2 * kdot


def near_gap(pair: Any, k: Array, kdot: Array, own_kdot: Array) -> tuple[Array, Array]:
    r"""Computes the gap of k next to equal inputs, and where it holds.

    .. math:: k(0) - k(\theta) = p \int_0^\theta \dot k \sin,

    with :math:`\dot k` linear in the angle, which it is there, as a kink makes it. What
    follows depends on the angle, a root of the gap, so that k alone would not tell.

    Args:
      pair: variances, covariance and gap.
      k: the variance that p leaves.
      kdot: the derivative dual.
      own_kdot: that of equal inputs.
    """
    near = pair.gap < jnp.finfo(pair.gap.dtype).eps ** (2 / 3)
    near = near & (pair.p == pair.r) & (pair.q > 0)
    versed = pair.gap / (1 + jnp.sqrt(1 - pair.gap))
    loss = pair.p * versed * (own_kdot + 2 * kdot) / 3 / jnp.where(k > 0, k, 1)
    return loss * (2 - loss), near


class _Sector(NamedTuple):
    """An angle in [0, pi], its sine and its cosine."""

    angle: Array
    sine: Array
    cosine: Array


def _sectors(p: Array, q: Array, r: Array, gap: Array) -> tuple[_Sector, _Sector]:
    """The sectors of equal and of opposite signs."""
    near, sine, cosine = _arccos.nearest_end(p, q, r, gap)
    far, positive = math.pi - near, q >= 0
    rho = jnp.where(positive, cosine, -cosine)
    equal = _Sector(jnp.where(positive, far, near), sine, -rho)
    return equal, _Sector(jnp.where(positive, near, far), sine, rho)


def _sines(sector: _Sector, x: Array, mirrored: Array) -> tuple[Array, Array]:
    """``sin(x angle)`` and ``sin((1 - x) angle)``, x <= 1/2, or in the other order."""
    half = sector.angle * (x / 2)
    square, series = half * half, jnp.zeros_like(half)
    for n in range(17, -1, -2):
        series = series * square + (-1) ** (n // 2) / math.factorial(n)
    sine = half * series
    double = 2 * sine * jnp.sqrt(1 - sine * sine)
    rest = sector.sine * (1 - 2 * sine * sine) - sector.cosine * double
    return jnp.where(mirrored, rest, double), jnp.where(mirrored, double, rest)


def _integrals(
    s: Array, t: Array, sectors: tuple[_Sector, _Sector], alpha: float
) -> tuple[Array, Array, Array]:
    """Of k and its derivative all but the arc-cosine part; of the latter's slope, too.

    The last is ``E[f''(u) f''(v)]`` without the terms of the kink.
    """
    equal, opposite = sectors

    @jax.checkpoint
    def term(s: Array, t: Array, row: Array) -> tuple[Array, Array, Array]:
        x, weight, mirrored = row[0], row[1], row[2] > 0
        here, there = _sines(equal, x, mirrored)
        both, decay = _both_bend(s * there, t * here)
        here, there = _sines(opposite, x, mirrored)
        one = single = jnp.zeros_like(here)
        for c, d in ((s, t), (t, s)):
            b = d * here
            erfcx = _erfcx(b)
            one = one + c * there * _one_bends(b, erfcx)
            single = single + (1 - _loss(b, erfcx))
        equal_weight, opposite_weight = weight * equal.angle, weight * opposite.angle
        curvature = alpha**2 * equal_weight * decay
        k = alpha**2 * equal_weight * both - alpha * opposite_weight * one
        return k, curvature + alpha * opposite_weight * single, curvature

    def add(carry: tuple[Array, ...], row: Array) -> tuple[tuple[Array, ...], None]:
        return tuple(map(jnp.add, carry, term(s, t, row))), None

    rule = _RULE_FLOAT64 if s.dtype == jnp.float64 else _RULE_FLOAT32
    zero = jnp.zeros_like(equal.angle)
    rows = jnp.asarray(_rule(*rule), s.dtype)
    (k, kdot, curvature), _ = jax.lax.scan(add, (zero, zero, zero), rows)
    return k, kdot, curvature


def _kink(p: Array, r: Array, gap: Array, alpha: float) -> Array:
    r"""Of ``E[f''(u) f''(v)]`` the terms of :math:`(1 - \alpha) \delta` in f''."""
    if alpha == 1:
        return jnp.zeros_like(gap)

    def density(variance: Array) -> Array:
        inside = variance > 0
        root = jnp.sqrt(jnp.where(inside, 2 * math.pi * variance, 1))
        return jnp.where(inside, 1 / root, 0)

    jump, first, second = 1 - alpha, density(p), density(r)
    one = first * _erfcx(safe_sqrt(r * gap)) + second * _erfcx(safe_sqrt(p * gap))
    # Singular at gap 0, and left out there as the arc-cosine kernels do.
    both = first * density(r * gap)
    return alpha * jump / 2 * one + jump**2 * both


def _both_bend(a: Array, b: Array) -> tuple[Array, Array]:
    """``E[(1 - e^(-a R)) (1 - e^(-b R))]`` and ``E[e^(-(a + b) R)]``, a and b >= 0."""
    near, little = _thresholds(a)
    erfcx_a, erfcx_b, total = _erfcx(a), _erfcx(b), a + b
    left = 1 - _loss(total, _erfcx(total))
    # The closed form cancels where one of them is small, hence the series.
    value = _loss(a, erfcx_a) + _loss(b, erfcx_b) + (left - 1)
    first = a < b
    small, large = jnp.where(first, a, b), jnp.where(first, b, a)
    one = _one_small(small, large, jnp.where(first, erfcx_b, erfcx_a), little)
    value = jnp.where(small * jnp.maximum(large, 1) < little, one, value)
    return jnp.where(total < near, _both_small(a, b, near), value), left


def _thresholds(a: Array) -> tuple[float, float]:
    return _THRESHOLDS_FLOAT64 if a.dtype == jnp.float64 else _THRESHOLDS_FLOAT32


def _both_small(a: Array, b: Array, near: float) -> Array:
    """By ``P_n = (a + b)^n - a^n - b^n = (a + b) P_(n-1) + a b (..)``, all positive."""
    a, b = jnp.minimum(a, near), jnp.minimum(b, near)
    power_a, power_b, mixed = a, b, jnp.zeros_like(a + b)
    value = jnp.zeros_like(mixed)
    for n in range(2, _ORDER):
        if n == 2:
            mixed = 2 * a * b
        else:
            mixed = (a + b) * mixed + a * b * (power_a + power_b)
            power_a, power_b = power_a * a, power_b * b
        value = value + (-1) ** n * _MOMENTS[n] / math.factorial(n) * mixed
    return value


def _one_small(small: Array, large: Array, erfcx: Array, little: float) -> Array:
    """By ``E[R^j e^(-a R)] = j E[R^(j-2) e^(-a R)] - a E[R^(j-1) e^(-a R)]``."""
    # Beyond the cap nothing changes, and powers might overflow; erfcx decreases.
    small, a = jnp.minimum(small, little), jnp.minimum(large, _CAP)
    erfcx = jnp.maximum(erfcx, _ERFCX_OF_CAP)
    before = 1 - _loss(a, erfcx)
    now = _MEAN * erfcx - a * before
    power, value = small, jnp.zeros_like(a)
    for j in range(1, 5):
        value = value + power * (_MOMENTS[j] - now)
        before, now = now, (j + 1) * before - a * now
        power = power * small / -(j + 1)
    return value


def _one_bends(b: Array, erfcx: Array) -> Array:
    """``E[R (1 - e^(-b R))]``."""
    near, _ = _thresholds(b)
    small, series = jnp.minimum(b, near), jnp.zeros_like(b)
    for n in range(_ORDER - 2, 0, -1):
        series = small * (
            _MOMENTS[n + 1] / math.factorial(n) * (-1) ** (n + 1) + series
        )
    return jnp.where(b < near, series, _MEAN - _MEAN * erfcx * (1 + b * b) + b)


def _loss(a: Array, erfcx: Array) -> Array:
    """``1 - E[e^(-a R)]``."""
    return _MEAN * a * erfcx


def _erfcx(a: Array) -> Array:
    r""":math:`\mathrm{erfcx}(a / \sqrt 2)` for a of at least 0, in arithmetic alone."""
    double = a.dtype == jnp.float64
    x, value = (a - _CENTRE) / (a + _CENTRE), jnp.zeros_like(a)
    for coefficient in _erfcx_series(_TERMS_FLOAT64 if double else _TERMS_FLOAT32):
        value = value * x + coefficient
    return value / (1 + a)


@functools.lru_cache(maxsize=4)
def _erfcx_series(terms: int) -> tuple[float, ...]:
    """Powers of ``(a - c) / (a + c)``, the highest first, by interpolation."""
    x = np.cos((2 * np.arange(terms) + 1) / (2 * terms) * np.pi)
    a = _CENTRE * (1 + x) / (1 - x)
    values = (1 + a) * scipy.special.erfcx(a / math.sqrt(2))
    fit = np.polynomial.Chebyshev.fit(x, values, terms - 1, [-1, 1])
    powers = fit.convert(kind=np.polynomial.Polynomial).coef
    return tuple(float(c) for c in powers[::-1])


@functools.lru_cache(maxsize=4)
def _rule(num: int, width: float) -> np.ndarray:
    r"""Positions in (0, 1/2), weights over :math:`2 \pi`, whether mirrored at 1/2.

    Gauss-Legendre in the inverse hyperbolic sine of the position over the width: an
    integrand varies over 1 / norm at an end of the sector.
    """
    x, weights = np.polynomial.legendre.leggauss(num)
    stretch = math.asinh(0.5 / width)
    inner = stretch * (x + 1) / 2
    weights = weights * stretch / 2 * width * np.cosh(inner) / (2 * math.pi)
    rows = [
        np.stack([width * np.sinh(inner), weights, np.full(num, mirrored)], axis=1)
        for mirrored in (0.0, 1.0)
    ]
    return np.concatenate(rows)
