r"""Hermite coefficients of an activation at the norm of each input.

With :math:`h_j = \mathrm{He}_j / \sqrt{j!}` and
:math:`a_j(c) = E_g[\sigma(c g) h_j(g)]`, exactly

.. math:: k = \sum_j a_j(\sqrt p)\, a_j(\sqrt r)\, \rho^j, \qquad
  \dot k = \frac{1}{\sqrt{p r}} \sum_j (j + 1)\, a_{j+1}(\sqrt p)\, a_{j+1}(\sqrt r)
  \, \rho^j.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax import activations
from snnk_jax.infinite._layers import NormalizedExponential
from snnk_jax.infinite._root import safe_sqrt
from snnk_jax.typing import Array, Float

# Panels of the quadrature: dyadic towards 0, where a function is narrow if c is large.
_EDGES = np.concatenate([[0.0], 2.0 ** np.arange(-14, 0), np.arange(1.0, 17.0)])
_EDGES = np.concatenate([-_EDGES[:0:-1], _EDGES])
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_CHUNK = 2048
_DEGREES = 64  # of the duals without a closed form


def coefficients(
    activation: activations.Activation | NormalizedExponential,
    num: int,
    c: Float[Array, "*b"],
) -> Float[Array, "*b j"]:
    r"""Computes :math:`a_j(c) = E_g[\sigma(c g) h_j(g)]`, elementwise in c.

    In closed form for homogeneous functions, polynomials, finite Fourier
    representations and :class:`NormalizedExponential`; otherwise by a Gauss-Legendre
    rule of panels that shrink towards zero and end at the kinks. It holds for norms up
    to about 1e4 and ``num`` up to about 64. Compiles and differentiates.

    Args:
      activation: the function.
      num: coefficients, j = 0 to num - 1.
      c: norms (standard deviations) of at least 0, any shape.

    Returns:
      In the dtype of c.

    Raises:
      ValueError: for ``num`` below 1.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1. Got {num}.")
    if isinstance(activation, NormalizedExponential):
        j = np.arange(num)
        logs = j * math.log(activation.gamma) - _log_factorials(num)
        return c[..., None] * _like(np.exp((logs - activation.gamma) / 2), c)
    if activation.coefficients:
        return _polynomial(activation.coefficients, num, c)
    if activation.degree is not None:
        scale = jnp.where(c > 0, c**activation.degree, 0)
        return scale[..., None] * _like(activation.hermite(num), c)
    if activation.atoms:
        parts = [_atom(atom, num, c) for atom in activation.atoms]
        return functools.reduce(jnp.add, parts)
    values = _moments(activation, num, c.reshape(-1))[:, :num]
    return values.reshape((*c.shape, num))


def power(
    activation: activations.Activation | NormalizedExponential,
    c: Float[Array, "*b"],
    derivative: bool = False,
) -> Float[Array, "*b"]:
    r"""Computes :math:`E_g[\sigma(c g)^2]`, or that of the derivative, elementwise.

    Args:
      activation: the function.
      c: norms of at least 0, any shape.
      derivative: of :math:`\sigma'` in the place of :math:`\sigma`.
    """
    from snnk_jax.infinite import _duals

    return _duals.diagonal(activation, c * c, derivative=derivative)


def truncation(
    activation: activations.Activation | NormalizedExponential,
    a: Float[Array, "*b j"],
    c: Float[Array, "*b"],
) -> Float[Array, "*b"]:
    r"""Computes what a truncated expansion leaves out.

    .. math:: \tau_q(c) = E[\sigma(c g)^2] - \sum_{j \le q} a_j(c)^2

    The error of the kernel that is truncated after degree q is at most
    :math:`\sqrt{\tau_q(\sqrt p)\, \tau_q(\sqrt r)}`, with equality where x = y.

    Args:
      activation: the function.
      a: its coefficients at c, degrees 0 to q.
      c: norms, as for :func:`coefficients`.

    Returns:
      At least 0; not below the rounding error of the difference, so that the bound
      holds for computed kernels as well.
    """
    total = power(activation, c)
    floor = 8 * jnp.finfo(c.dtype).eps * total
    return jnp.maximum(total - jnp.sum(a * a, axis=-1), floor)


def dual(activation: activations.Activation, pair: Any) -> tuple[Array, Array]:
    r"""Computes k and its derivative dual by an expansion at each norm's own.

    The even and the odd part of what the truncated series leaves out are known exactly
    at :math:`\rho = \pm 1`; each takes the first degree of its parity that is left out,
    so that both ends are exact.
    """
    p, q, r, _ = pair
    size_p, size_r = safe_sqrt(p), safe_sqrt(r)
    scale = size_p * size_r
    rho = jnp.where(scale > 0, q / jnp.where(scale > 0, scale, 1), 0)
    rho = jnp.clip(rho, -1, 1)
    k, kdot = (
        _series(_expand(f, size_p), _expand(f, size_r), rho)
        for f in (activation, derivative_of(activation))
    )
    return k, kdot


def derivative_of(activation: activations.Activation) -> activations.Activation:
    """The row of the derivative; jumps have none."""
    degree = activation.degree
    return activations.Activation(
        f"derivative of {activation.name}",
        _Derivative(activation),
        degree=degree - 1 if degree else None,
        kinks=activation.kinks,
    )


@dataclasses.dataclass(frozen=True)
class _Derivative:
    """The derivative of an activation, hashable by value."""

    activation: activations.Activation

    def __call__(self, z: Array) -> Array:
        return self.activation.grad(z)


def _expand(activation: activations.Activation, c: Array) -> list[Array]:
    """Coefficients at c, and the roots of the remainder of each parity."""
    columns = _moments(activation, _DEGREES, c.reshape(-1))
    a, square, mirrored = jnp.split(columns, [_DEGREES, _DEGREES + 1], axis=1)
    parts = []
    for parity, power in enumerate((square + mirrored, square - mirrored)):
        kept = jnp.sum(a[:, parity::2] ** 2, axis=1, keepdims=True)
        parts.append(safe_sqrt(power / 2 - kept))
    rows = jnp.concatenate([a, *parts], axis=1).T
    return [row.reshape(c.shape) for row in rows]


def _series(a: list[Array], b: list[Array], rho: Array) -> Array:
    value = jnp.zeros_like(rho)
    for left, right in zip(reversed(a), reversed(b), strict=True):
        value = value * rho + left * right
    return value


def _like(values: np.ndarray, c: Array) -> Array:
    """A row of constants that broadcasts against ``c[..., None]``."""
    return jnp.asarray(values, c.dtype).reshape((1,) * c.ndim + values.shape)


def _log_factorials(num: int) -> np.ndarray:
    return np.cumsum(np.log(np.maximum(np.arange(num), 1)))


def _polynomial(series: tuple[float, ...], num: int, c: Array) -> Array:
    """``a_j(c) = sum_i s_{j+2i} (j+2i)! / (2^i i! sqrt(j!)) c^{j+2i}``."""
    table = polynomial_table(series)
    columns = []
    for j in range(num):
        value = jnp.zeros_like(c)
        if j < len(table):
            for entry in reversed(table[j]):
                value = value * c * c + entry
            value = value * c**j
        columns.append(value)
    return jnp.stack(columns, axis=-1)


@functools.lru_cache(maxsize=256)
def polynomial_table(series: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    r"""Rows T_j of :math:`a_j(c) = c^j \sum_i T_{ji} c^{2i}` of a polynomial."""
    return tuple(
        tuple(
            series[n]
            * math.factorial(n)
            / (2**i * math.factorial(i) * math.sqrt(math.factorial(j)))
            for i, n in enumerate(range(j, len(series), 2))
        )
        for j in range(len(series))
    )


def _atom(atom: activations.Atom, num: int, c: Array) -> Array:
    r"""Of :math:`a\cos(sz + \theta)`: :math:`a e^{-x^2/2} x^j/\sqrt{j!} \cos(..)`."""
    x = abs(atom.frequency) * c
    phase = math.copysign(1.0, atom.frequency) * atom.phase
    waves = atom.amplitude * np.cos(phase + np.arange(num) * math.pi / 2)
    safe = jnp.where(x > 0, x, 1)
    logs = jnp.log(safe)[..., None] * _like(np.arange(num), c)
    logs = logs - _like(_log_factorials(num) / 2, c) - (x * x / 2)[..., None]
    at_zero = _like(np.eye(1, num)[0], c)
    return _like(waves, c) * jnp.where((x > 0)[..., None], jnp.exp(logs), at_zero)


def _moments(activation: activations.Activation, num: int, c: Array) -> Array:
    """Columns: the coefficients, ``E f(c g)^2`` and ``E f(c g) f(-c g)``."""
    rule = functools.partial(_quadrature, activation, num)
    if len(c) <= _CHUNK:
        return rule(c)
    return jax.lax.map(lambda x: rule(x[None])[0], c, batch_size=_CHUNK)


def _quadrature(activation: activations.Activation, num: int, c: Array) -> Array:
    moving = np.asarray([kink for kink in activation.kinks if kink != 0])
    if not len(moving):
        g, weights, table = _fixed_rule(num)
        values = activation(c[:, None] * jnp.asarray(g, c.dtype)[None])
        a = jnp.matmul(
            values, jnp.asarray(table, c.dtype), precision=jax.lax.Precision.HIGHEST
        )
        weighted = values * jnp.asarray(weights, c.dtype)[None]
        return jnp.concatenate([a, _squares(values, weighted)], axis=1)
    # Symmetric, so that the value at -g is that of the mirrored node.
    moving = jnp.asarray(np.concatenate([moving, -moving]), c.dtype)[None]
    safe = jnp.where(c > 0, c, 1)[:, None]
    kinks = jnp.clip(jax.lax.stop_gradient(moving / safe), _EDGES[0], _EDGES[-1])
    fixed = jnp.broadcast_to(jnp.asarray(_EDGES, c.dtype)[None], (len(c), len(_EDGES)))
    edges = jnp.sort(jnp.concatenate([fixed, kinks], axis=1), axis=1)
    half = jnp.diff(edges, axis=1)[..., None] / 2
    middle = (edges[:, 1:] + edges[:, :-1])[..., None] / 2
    g = middle + half * jnp.asarray(_NODES, c.dtype)[None, None]
    weights = half * jnp.asarray(_WEIGHTS / math.sqrt(2 * math.pi), c.dtype)[None, None]
    g = g.reshape(len(c), -1)
    weights = weights.reshape(len(c), -1) * jnp.exp(-g * g / 2)
    values = activation(c[:, None] * g)
    weighted = values * weights

    def step(carry: tuple[Array, Array], j: Array) -> tuple[tuple[Array, Array], Array]:
        now, before = carry
        value = jnp.sum(weighted * now, axis=1)
        following = (g * now - jnp.sqrt(j) * before) / jnp.sqrt(j + 1)
        return (following, now), value

    start = jnp.ones_like(g), jnp.zeros_like(g)
    _, a = jax.lax.scan(step, start, jnp.arange(num, dtype=c.dtype))
    return jnp.concatenate([a.T, _squares(values, weighted)], axis=1)


def _squares(values: Array, weighted: Array) -> Array:
    square = jnp.sum(values * weighted, axis=1)
    mirrored = jnp.sum(values[:, ::-1] * weighted, axis=1)
    return jnp.stack([square, mirrored], axis=1)


@functools.lru_cache(maxsize=64)
def _fixed_rule(num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, weights, and the table [nodes, num] of weighted Hermite polynomials."""
    g, weights = panels(_EDGES)
    table = np.empty((len(g), num))
    now, before = np.ones_like(g), np.zeros_like(g)
    for j in range(num):
        table[:, j] = weights * now
        now, before = (g * now - math.sqrt(j) * before) / math.sqrt(j + 1), now
    return g, weights, table


def panels(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes of all panels, and their weights under the Gaussian."""
    half = np.diff(edges)[..., None] / 2
    g = (edges[..., 1:] + edges[..., :-1])[..., None] / 2 + half * _NODES
    g, weights = (z.reshape((*edges.shape[:-1], -1)) for z in (g, half * _WEIGHTS))
    return g, weights * np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi)
