r"""The logistic function as a mixture of normal distribution functions.

A logistic variable is a normal one of random scale, twice a Kolmogorov variable, so

.. math:: \frac{1}{1 + e^{-z}} = E_V[\Phi(z / (2 V))] \approx \sum_i w_i \Phi(z / s_i)

with the nodes of a Gauss rule. Every Gaussian expectation of sigmoid, tanh, softplus
and SiLU is then a double sum of closed forms, at every norm alike.

References:
  Stefanski, "A normal scale mixture representation of the logistic distribution",
  Statistics & Probability Letters 1991.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax.typing import Array

# Of the logistic function, over all z: 8e-12 and 9e-8 at most.
_NODES_FLOAT64, _NODES_FLOAT32 = 16, 8


@functools.lru_cache(maxsize=4)
def mixture(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales s and weights w, Gauss' rule in the logarithm of the scale, float64."""
    x, weights = np.polynomial.legendre.leggauss(2000)
    low, high = 0.08, 5.0
    v = low + (high - low) * (x + 1) / 2
    weights = weights * (high - low) / 2 * _kolmogorov(v)
    weights /= weights.sum()
    t = np.log(v)
    # Lanczos on the discrete measure: the Jacobi matrix of its orthogonal polynomials.
    diagonal, beside = np.empty(num), np.empty(num)
    before, now, step = np.zeros_like(t), np.ones_like(t), 0.0
    for i in range(num):
        diagonal[i] = np.sum(weights * t * now**2)
        following = (t - diagonal[i]) * now - step * before
        step = beside[i] = math.sqrt(np.sum(weights * following**2))
        before, now = now, following / step
    jacobi = np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    nodes, vectors = np.linalg.eigh(jacobi)
    return 2 * np.exp(nodes), vectors[0] ** 2


def total(form: Callable[..., tuple[Array, Array]], pair: Any) -> tuple[Array, Array]:
    """Sums ``form(pair, s_i, s_j)``, k and its derivative, over all pairs of scales."""
    dtype = pair.q.dtype
    scales, weights = mixture(
        _NODES_FLOAT64 if dtype == jnp.float64 else _NODES_FLOAT32
    )
    s, t = np.meshgrid(scales, scales)
    terms = jnp.asarray(
        np.stack([s.ravel(), t.ravel(), np.outer(weights, weights).ravel()], 1), dtype
    )

    @jax.checkpoint
    def term(pair: Any, s: Array, t: Array, weight: Array) -> tuple[Array, Array]:
        k, kdot = form(pair, s, t)
        return weight * k, weight * kdot

    def add(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], None]:
        k, kdot = term(pair, row[0], row[1], row[2])
        return (carry[0] + k, carry[1] + kdot), None

    zero = jnp.zeros_like(pair.q)
    return jax.lax.scan(add, (zero, zero), terms)[0]


def _kolmogorov(v: np.ndarray) -> np.ndarray:
    """The density of Kolmogorov's distribution, by the series that converges faster."""
    k = np.arange(1, 40)[:, None]
    late = 8 * (-1.0) ** (k + 1) * k**2 * v * np.exp(-2 * k**2 * v**2)
    rate = (2 * k - 1) ** 2 * math.pi**2 / 8
    early = np.exp(-rate / v**2) * (2 * rate / v**4 - 1 / v**2)
    return np.where(v > 0.8, late.sum(0), math.sqrt(2 * math.pi) * early.sum(0))
