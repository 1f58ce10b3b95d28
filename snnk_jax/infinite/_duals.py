r"""Dual activations: Gaussian expectations of products of functions, in closed form.

For (u, v) of variances p, r and covariance q,

.. math:: k = E[\sigma(u) \sigma(v)], \qquad
  \dot k = E[\sigma'(u) \sigma'(v)] = \partial k / \partial q.

Next to p, q and r a pair carries its *gap* :math:`1 - q^2 / (p r)`, the squared sine of
the angle, to full relative accuracy: what the angle is near 0 and near pi cannot be
told from q in floating point. Gradients go through p, q and r alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from snnk_jax import activations
from snnk_jax.infinite import _arccos, _elu, _hermite, _mixture
from snnk_jax.infinite._arctan import angle
from snnk_jax.infinite._layers import NormalizedExponential
from snnk_jax.infinite._root import safe_sqrt
from snnk_jax.typing import Array

Function = activations.Activation | NormalizedExponential


class Pair(NamedTuple):
    """Variances p and r, covariance q and gap; shapes broadcast at equal rank."""

    p: Array
    q: Array
    r: Array
    gap: Array


class Dual(NamedTuple):
    """The kernel k, the derivative kernel, and the gap of k."""

    k: Array
    kdot: Array
    gap: Array


def dual(activation: Function, pair: Pair, jumps: bool = False) -> Dual:
    r"""Computes k, its derivative dual and the gap that k leaves.

    Args:
      activation: the function.
      pair: variances, covariance and gap.
      jumps: whether the derivative of a jump counts in the derivative dual, as
        :math:`2 \delta(z)` for sign.
    """
    if isinstance(activation, activations.Activation):
        form = activation.dual
        if form is not None and form.family == "rectified":
            n, left, right = form.parameters
            return Dual(*_arccos.dual(int(n), left, right, pair, jumps))
    k, kdot = _values(activation, pair)
    return Dual(k, kdot, _gap(activation, pair, k, kdot))


def diagonal(activation: Function, p: Array, derivative: bool = False) -> Array:
    r"""Computes :math:`E[\sigma(u)^2]`, or of the derivative, for u of variance p."""
    pair = Pair(p, p, p, jnp.zeros_like(p))
    if isinstance(activation, activations.Activation):
        form = activation.dual
        if form is not None and form.family == "rectified":
            n, left, right = form.parameters
            return _arccos.diagonal(int(n), left, right, p, derivative)
    return _values(activation, pair)[1 if derivative else 0]


def _values(activation: Function, pair: Pair) -> tuple[Array, Array]:
    if isinstance(activation, NormalizedExponential):
        return _normalized_exponential(pair, activation.gamma)
    if activation.coefficients:
        return _polynomial(pair, activation.coefficients)
    if activation.atoms:
        return _fourier(pair, activation.atoms)
    if activation.dual is not None:
        form = _FORMS.get(activation.dual.family)
        if form is None:
            raise ValueError(
                f"family must be one of rectified, {', '.join(_FORMS)}. "
                f"Got {activation.dual.family!r}."
            )
        return form(pair, *activation.dual.parameters)
    return _hermite.dual(activation, pair)


def _gap(activation: Function, pair: Pair, k: Array, kdot: Array) -> Array:
    pair, k, kdot = jax.tree.map(jax.lax.stop_gradient, (pair, k, kdot))
    p, q, r, gap = pair
    if isinstance(activation, NormalizedExponential):
        close = one_minus(pair, sign=1)
        # rho' = e^{-gamma (1 - rho)} lies above zero.
        fall = -jnp.expm1(-activation.gamma * close)
        return jax.lax.stop_gradient(fall * (2 - fall))
    if activation.coefficients and activation.degree == 1:
        return gap
    own = diagonal(activation, p)
    scale = safe_sqrt(own) * safe_sqrt(diagonal(activation, r))
    rho = k / jnp.where(scale > 0, scale, 1)
    value = jnp.clip((1 - rho) * (1 + rho), 0, 1)
    if activation.dual is not None and activation.dual.family == "elu":
        own_kdot = diagonal(activation, p, derivative=True)
        closer, near = _elu.near_gap(pair, own, kdot, own_kdot)
        value = jnp.where(near, closer, value)
    twins = (gap == 0) & (p == r) & (q >= 0) & (p > 0)
    return jnp.where(twins, 0, jnp.where(scale > 0, value, 1))


def graft(value: Array, formula: Array) -> Array:
    """The value of one expression with the derivatives of the other."""
    return jax.lax.stop_gradient(value) + (formula - jax.lax.stop_gradient(formula))


def determinant(pair: Pair) -> Array:
    """``p r - q^2`` without cancellation."""
    p, q, r, gap = pair
    return graft(p * r * gap, p * r - q * q)


def one_minus(pair: Pair, sign: int) -> Array:
    """``1 - rho`` for sign 1 and ``1 + rho`` for sign -1, without cancellation."""
    p, q, r, gap = pair
    scale = safe_sqrt(p) * safe_sqrt(r)
    rho = jnp.where(scale > 0, sign * q / jnp.where(scale > 0, scale, 1), 0)
    near = gap / (1 + jnp.where(rho > 0, rho, 0))
    return graft(jnp.where(rho > 0, near, 1 - rho), 1 - rho)


def square_distance(pair: Pair, sign: int) -> Array:
    """``p + r - 2 q`` for sign 1 and ``p + r + 2 q`` for -1, without cancellation."""
    p, q, r, _ = pair
    a, b = safe_sqrt(p), safe_sqrt(r)
    value = (a - b) ** 2 + 2 * a * b * one_minus(pair, sign)
    return graft(value, p + r - 2 * sign * q)


def scaled(pair: Pair, s: float | Array, t: float | Array) -> Pair:
    """The pair of ``s u`` and ``t v``."""
    return Pair(s * s * pair.p, s * t * pair.q, t * t * pair.r, pair.gap)


def _normalized_exponential(pair: Pair, gamma: float) -> tuple[Array, Array]:
    value = jnp.exp(-gamma * one_minus(pair, sign=1))
    return safe_sqrt(pair.p) * safe_sqrt(pair.r) * value, gamma * value


def _polynomial(pair: Pair, series: tuple[float, ...]) -> tuple[Array, Array]:
    """``sum_l T_l(p) T_l(r) q^l``, see :func:`_hermite.polynomial_table`."""
    table = _hermite.polynomial_table(series)

    def outer(row: tuple[float, ...]) -> Array:
        left, right = jnp.zeros_like(pair.p), jnp.zeros_like(pair.r)
        for entry in reversed(row):
            left, right = left * pair.p + entry, right * pair.r + entry
        return left * right

    k, kdot = jnp.zeros_like(pair.q), jnp.zeros_like(pair.q)
    for degree in reversed(range(len(table))):
        weight = outer(table[degree])
        k = k * pair.q + weight
        if degree:
            kdot = kdot * pair.q + degree * weight
    return k, kdot


def _fourier(pair: Pair, atoms: tuple[activations.Atom, ...]) -> tuple[Array, Array]:
    """Even and odd parts in q apart: their difference cancels at small norms."""
    k, kdot = jnp.zeros_like(pair.q), jnp.zeros_like(pair.q)
    for a in atoms:
        for b in atoms:
            both = scaled(pair, a.frequency, b.frequency)
            positive = both.q >= 0
            size = jnp.where(positive, both.q, -both.q)
            closer = jnp.where(
                positive, square_distance(both, 1), square_distance(both, -1)
            )
            decay = jnp.exp(-closer / 2) / 2
            even = decay * (1 + jnp.exp(-2 * size))
            odd = decay * -jnp.expm1(-2 * size)
            odd = jnp.where(positive, odd, -odd)
            scale = a.amplitude * b.amplitude
            cosines = scale * math.cos(a.phase) * math.cos(b.phase)
            sines = scale * math.sin(a.phase) * math.sin(b.phase)
            k = k + cosines * even + sines * odd
            slope = a.frequency * b.frequency
            kdot = kdot + slope * (cosines * odd + sines * even)
    return k, kdot


def _erf(pair: Pair, a: float, b: float, c: float) -> tuple[Array, Array]:
    pair = scaled(pair, b, b)
    root = jnp.sqrt(1 + 2 * (pair.p + pair.r) + 4 * determinant(pair))
    k = a**2 * (2 / math.pi) * angle(2 * pair.q, root) + c**2
    return k, a**2 * b**2 * (4 / math.pi) / root


def _exp(pair: Pair, a: float, b: float) -> tuple[Array, Array]:
    k = a**2 * jnp.exp(b**2 / 2 * square_distance(pair, -1))
    return k, b**2 * k


def _gaussian(pair: Pair, a: float, b: float) -> tuple[Array, Array]:
    volume = 1 - 2 * b * (pair.p + pair.r) + 4 * b**2 * determinant(pair)
    root = jnp.sqrt(volume)
    return a**2 / root, 4 * a**2 * b**2 * pair.q / (volume * root)


def _gabor(pair: Pair) -> tuple[Array, Array]:
    both, gap = pair.p + pair.r, 4 * determinant(pair)
    m = 2 * both + gap + 1
    decay = jnp.exp(-(both + gap) / (2 * m))
    sinh, cosh = jnp.sinh(pair.q / m), jnp.cosh(pair.q / m)
    s = 1 + 2 * both + 4 * (pair.q**2 + pair.p * pair.r)
    t = 4 * pair.q * (gap + 3 * both + 2)
    return decay * sinh / jnp.sqrt(m), decay * (s * cosh + t * sinh) / m**2.5


def _gelu(pair: Pair) -> tuple[Array, Array]:
    p, q, r, _ = pair
    square = 1 + p + r + determinant(pair)
    root, volume = jnp.sqrt(square), (1 + p) * (1 + r)
    turn = 0.25 + angle(q, root) / (2 * math.pi)
    k = q * turn + (q * q / square + p * r) * root / (2 * math.pi * volume)
    slope = q / (2 * math.pi * root) * (1 / square + (2 + p + r) / volume)
    return k, turn + slope


def _sigmoid(pair: Pair, a: float, b: float, c: float) -> tuple[Array, Array]:
    """Centred at its mean: the rest is odd, and small at small norms."""
    pair = scaled(pair, b, b)
    k, kdot = _mixture.total(_smooth_sign, pair)
    return a**2 * k + (a / 2 + c) ** 2, a**2 * b**2 * kdot


def _softplus(pair: Pair) -> tuple[Array, Array]:
    return _mixture.total(_smooth_relu, pair)


def _silu(pair: Pair) -> tuple[Array, Array]:
    return _mixture.total(_smooth_gate, pair)


def _noisy(pair: Pair, s: Array, t: Array) -> Array:
    """The root of the determinant after noise of variances s^2 and t^2."""
    p, _, r, _ = pair
    return jnp.sqrt(determinant(pair) + p * t * t + r * s * s + (s * t) ** 2)


def _smooth_sign(pair: Pair, s: Array, t: Array) -> tuple[Array, Array]:
    r"""Of :math:`\Phi(u / s) - 1/2` and :math:`\Phi(v / t) - 1/2`."""
    root = _noisy(pair, s, t)
    return angle(pair.q, root) / (2 * math.pi), 1 / (2 * math.pi * root)


def _smooth_relu(pair: Pair, s: Array, t: Array) -> tuple[Array, Array]:
    r"""Of :math:`E (u + s g)_+` and :math:`E (v + t g)_+`."""
    root = _noisy(pair, s, t)
    turn = 0.25 + angle(pair.q, root) / (2 * math.pi)
    return pair.q * turn + root / (2 * math.pi), turn


def _smooth_gate(pair: Pair, s: Array, t: Array) -> tuple[Array, Array]:
    r"""Of :math:`u \Phi(u / s)` and :math:`v \Phi(v / t)`."""
    k, kdot = _gelu(scaled(pair, 1 / s, 1 / t))
    return s * t * k, kdot


_FORMS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "elu": _elu.dual,
    "erf": _erf,
    "exp": _exp,
    "gabor": _gabor,
    "gaussian": _gaussian,
    "gelu": _gelu,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "softplus": _softplus,
}
