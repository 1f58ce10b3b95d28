r"""Duals of :math:`r z_+^n + l\,(-z)_+^n`: the arc-cosine kernels, to full accuracy.

.. math:: k = \frac{(p r)^{n/2}}{2 \pi} \left[(l^2 + r^2) J_n(\theta)
  + 2 l r J_n(\pi - \theta)\right]

with the :math:`J_n` of Cho and Saul (NIPS 2009). With t the angle to the nearer of
0 and :math:`\pi`, :math:`J_n(\pi - t) = g_n(t)`, which is of order :math:`t^{2n+1}`,
and :math:`J_n(t) = \pi c_n(\cos t) - (-1)^n g_n(t)`. All is computed from t, so that
neither end loses digits.
"""

import fractions
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax.infinite._arctan import angle
from snnk_jax.typing import Array

_AT_ONE = (1, 1, 3, 15)  # c_n(1)
_SERIES_BELOW = 0.5
_TERMS = 9


def dual(
    n: int, left: float, right: float, pair: Any, jumps: bool
) -> tuple[Array, Array, Array]:
    """Computes k, its derivative dual and the gap of k; see :mod:`._duals`."""
    gap = jax.lax.stop_gradient(pair.gap)
    k = _kernel(n, left, right, pair.p, pair.q, pair.r, gap)
    if n == 0 and not jumps:
        kdot = jnp.zeros_like(k)
    else:
        kdot = _slope(n, left, right, pair.p, pair.q, pair.r, gap)
    return k, kdot, _gap(n, left, right, jax.tree.map(jax.lax.stop_gradient, pair))


def diagonal(n: int, left: float, right: float, p: Array, derivative: bool) -> Array:
    """Computes the second moment of the function, or of its derivative."""
    if derivative and n == 0:
        return jnp.zeros_like(p)
    if derivative:
        return n**2 * diagonal(n - 1, -left, right, p, False)
    moment = math.prod(range(2 * n - 1, 0, -2)) * (left**2 + right**2) / 2
    return jnp.where(p > 0, moment * p**n, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _kernel(
    n: int, left: float, right: float, p: Array, q: Array, r: Array, gap: Array
) -> Array:
    t, sin, cos = nearest_end(p, q, r, gap)
    far = _far(n, t, sin, cos)
    near = math.pi * _centre(n, cos) - (-1) ** n * far
    same, cross = left**2 + right**2, 2 * left * right
    value = jnp.where(q >= 0, same * near + cross * far, same * far + cross * near) / (
        2 * math.pi
    )
    present = (p > 0) & (r > 0)
    if n == 0:
        return jnp.where(present, value, 0)
    size = jnp.where(present, p, 0) * jnp.where(present, r, 0)
    return value * (size ** (n // 2) if n % 2 == 0 else jnp.sqrt(size) ** n)


@_kernel.defjvp
def _(n: int, left: float, right: float, primals: tuple, tangents: tuple) -> Any:
    p, q, r, gap = primals
    dp, dq, dr, _ = tangents
    k = _kernel(n, left, right, p, q, r, gap)
    slope = _slope(n, left, right, p, q, r, gap)
    # Euler's theorem: k is homogeneous of degree n in the first and second scale.
    euler = (n * k - q * slope) / 2
    left_part = euler / jnp.where(p > 0, p, 1) * dp
    right_part = euler / jnp.where(r > 0, r, 1) * dr
    return k, slope * dq + left_part + right_part


def _slope(
    n: int, left: float, right: float, p: Array, q: Array, r: Array, gap: Array
) -> Array:
    """The derivative of k in q; that of a step is singular at gap 0, and 0 there."""
    if n:
        return n**2 * _kernel(n - 1, -left, right, p, q, r, gap)
    area = p * r * gap
    area = area + (p * r - q * q) - jax.lax.stop_gradient(p * r - q * q)
    inside = area > 0
    root = jnp.sqrt(jnp.where(inside, area, 1))
    return jnp.where(inside, (right - left) ** 2 / (2 * math.pi) / root, 0)


def _gap(n: int, left: float, right: float, pair: Any) -> Array:
    """The gap of k, from 1 - rho and 1 + rho as sums without cancellation."""
    square = left**2 + right**2
    t, sin, cos = nearest_end(*pair)
    far = _far(n, t, sin, cos) / (math.pi * _AT_ONE[n])
    loss = _loss(n, pair.gap, cos) + (-1) ** n * far
    cross = 2 * left * right / square
    minus = jnp.where(
        pair.q >= 0,
        loss - cross * far,
        (right - left) ** 2 / square + cross * loss - far,
    )
    plus = jnp.where(
        pair.q >= 0, 2 - minus, (right + left) ** 2 / square - cross * loss + far
    )
    present = (pair.p > 0) & (pair.r > 0)
    return jnp.where(present, jnp.clip(minus * plus, 0, 1), 1)


def nearest_end(p: Array, q: Array, r: Array, gap: Array) -> tuple[Array, Array, Array]:
    """The angle t in [0, pi / 2] to the nearer of 0 and pi, its sine and cosine."""
    sin = jnp.sqrt(gap)
    present = (p > 0) & (r > 0)
    scale = jnp.where(present, jnp.sqrt(p), 1) * jnp.where(present, jnp.sqrt(r), 1)
    cos = jnp.where(gap < 0.5, jnp.sqrt(1 - gap), jnp.abs(q) / scale)
    return angle(sin, cos), sin, cos


def _centre(n: int, c: Array) -> Array:
    """c_n, the part of J_n that does not vanish at the far end, over pi."""
    if n == 0:
        return jnp.ones_like(c)
    if n == 1:
        return c
    if n == 2:
        return 1 + 2 * c * c
    return c * (9 + 6 * c * c)


def _loss(n: int, gap: Array, c: Array) -> Array:
    """``1 - c_n(c) / c_n(1)``."""
    if n == 0:
        return jnp.zeros_like(c)
    if n == 2:
        return gap * (2 / 3)
    versed = gap / (1 + c)
    return versed if n == 1 else versed * (15 + 6 * c + 6 * c * c) / 15


def _far(n: int, t: Array, s: Array, c: Array) -> Array:
    """g_n(t) for t in [0, pi / 2], by its series where the closed form cancels."""
    if n == 0:
        return t
    if n == 1:
        closed = s - t * c
    elif n == 2:
        closed = t * (1 + 2 * c * c) - 3 * s * c
    else:
        closed = s * (4 + 11 * c * c) - t * c * (9 + 6 * c * c)
    square = t * t
    series = jnp.zeros_like(t)
    for coefficient in _series(n)[::-1]:
        series = series * square + coefficient
    return jnp.where(t < _SERIES_BELOW, series * t ** (2 * n + 1), closed)


@functools.lru_cache(maxsize=8)
def _series(n: int) -> tuple[float, ...]:
    """Coefficients of ``g_n(t) / t^(2n+1)`` in powers of t^2."""
    powers = np.arange(2 * (_TERMS + n) + 2)
    exact = [fractions.Fraction(0)] * len(powers)

    def add(scale: int | fractions.Fraction, shift: int, frequency: int) -> None:
        """Adds ``scale * t^shift * wave(frequency t)``, a sine, or cosine for shift."""
        for k in range(len(powers)):
            odd = 0 if shift else 1
            power = 2 * k + odd + shift
            if power < len(exact):
                term = fractions.Fraction(
                    (-1) ** k * frequency ** (2 * k + odd), math.factorial(2 * k + odd)
                )
                exact[power] += scale * term

    half, quarter = fractions.Fraction(1, 2), fractions.Fraction(1, 4)
    if n == 1:  # sin t - t cos t
        add(1, 0, 1)
        add(-1, 1, 1)
    elif n == 2:  # t (2 + cos 2t) - 3/2 sin 2t
        add(2, 1, 0)
        add(1, 1, 2)
        add(-3 * half, 0, 2)
    else:  # s (4 + 11 c^2) = (27 sin t + 11 sin 3t) / 4, t (9 c + 6 c^3) likewise
        add(27 * quarter, 0, 1)
        add(11 * quarter, 0, 3)
        add(-27 * half, 1, 1)
        add(-3 * half, 1, 3)
    return tuple(float(value) for value in exact[2 * n + 1 :: 2][:_TERMS])
