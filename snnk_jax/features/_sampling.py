"""Frequencies drawn from an integrable Fourier transform."""

import functools
import math

import jax.numpy as jnp
import numpy as np

from snnk_jax import projections
from snnk_jax.activations import Spectrum
from snnk_jax.typing import Array, UInt32

_CELLS = 4096
# The table ends where what is left out is this small beside the largest value.
_TAIL = 1e-9


def sample_rates(
    spectrum: Spectrum,
    words: UInt32[Array, "2"],
    num: int,
    kappa: float,
    importance: bool,
) -> tuple[Array, Array]:
    r"""Draws frequencies and weights with :math:`f(z) = E[w \cos(s z + \theta)]`.

    Stratified: one draw in each of ``num`` cells of equal probability. The law is
    :math:`|R|`, or with importance sampling :math:`|R(s)| e^{s\kappa}`, the one of
    least second moment for inputs and weights with
    :math:`\lVert x\rVert \lVert w\rVert = \kappa`.

    Returns:
      ``rates`` and ``weights``, ``[num]`` each, in float32.
    """
    edges, density, cumulative = _table(spectrum, kappa if importance else 0.0)
    offsets = projections.uniforms(projections.random_bits(words, num)[0])
    u = (jnp.arange(num, dtype=jnp.float32) + offsets) / num
    cell = jnp.searchsorted(jnp.asarray(cumulative, jnp.float32), u, side="right") - 1
    cell = jnp.clip(cell, 0, _CELLS - 1)
    width = float(edges[1] - edges[0])
    mass = np.diff(cumulative)
    low = jnp.asarray(cumulative[:-1], jnp.float32)[cell]
    share = (u - low) / jnp.asarray(np.maximum(mass, 1e-30), jnp.float32)[cell]
    share = jnp.clip(share, 0, 1)
    rates = jnp.asarray(edges[:-1], jnp.float32)[cell] + width * share
    left = jnp.asarray(density[:-1], jnp.float32)[cell]
    right = jnp.asarray(density[1:], jnp.float32)[cell]
    law = jnp.asarray(mass / width, jnp.float32)[cell]
    return rates, (left + share * (right - left)) / law


def amplified_mass(spectrum: Spectrum, kappa: float, importance: bool) -> float:
    r"""Root of the second moment of one feature, for inputs and weights at ``kappa``.

    :math:`\int |R| e^{s\kappa} ds` with importance sampling, else
    :math:`\sqrt{\int |R| ds \int |R| e^{2 s\kappa} ds}`; infinite where the integral
    is.
    """
    if importance:
        return _mass(spectrum, kappa)
    return math.sqrt(_mass(spectrum, 0.0) * _mass(spectrum, 2 * kappa))


def _mass(spectrum: Spectrum, kappa: float) -> float:
    if kappa >= spectrum.decay:
        return math.inf
    end = _end(spectrum, kappa)
    if end is None:
        return math.inf
    s = np.linspace(0, end, _CELLS + 1)[1:] - end / (2 * _CELLS)
    return float(np.sum(np.abs(spectrum.density(s)) * np.exp(s * kappa)) * end / _CELLS)


@functools.lru_cache(maxsize=64)
def _table(
    spectrum: Spectrum, kappa: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cell edges, the density there, and the cumulative law of the cells."""
    end = _end(spectrum, kappa)
    if end is None:
        raise ValueError(
            "the spectrum must fall faster than exp(-kappa s) to be sampled. "
            f"Got kappa {kappa}."
        )
    edges = np.linspace(0, end, _CELLS + 1)
    density = spectrum.density(np.maximum(edges, 1e-12))
    tilted = np.abs(density) * np.exp(edges * kappa)
    mass = (tilted[1:] + tilted[:-1]) / 2
    cumulative = np.concatenate([[0], np.cumsum(mass) / mass.sum()])
    return edges, density, cumulative


def _end(spectrum: Spectrum, kappa: float) -> float | None:
    """Where the tilted density has fallen to nothing; None if it gets out of hand.

    It must be nothing up to four times as far: a change of sign or a gap between two
    bands is no end.
    """

    def largest(start: float, stop: float, num: int) -> float:
        s = np.linspace(start, stop, num)[1:]
        tilt = np.exp(np.minimum(s * kappa, 700))  # finite
        return float(np.max(np.abs(spectrum.density(s)) * tilt))

    end, peak = 1.0, 0.0
    while end < 1e4 and end * kappa < 600:
        peak = max(peak, largest(0.0, end, 513))
        last = np.array([end])
        at_end = float(np.abs(spectrum.density(last))[0]) * math.exp(end * kappa)
        if at_end < _TAIL * peak and largest(end, 4 * end, 2049) < _TAIL * peak:
            return end
        end *= 1.25
    return None
