"""Finite Fourier series of an activation on an interval."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from snnk_jax import activations
from snnk_jax.typing import Array

_GRID = 4001
# Relative to the Gram matrix: the slope and the lowest sines are nearly collinear, and
# without it they would grow against each other, and the features' noise with them.
_RIDGE = 1e-6
# Amplitudes below this share of the largest are rounding, not part of the function.
_NEGLIGIBLE = 1e-4


@dataclasses.dataclass(frozen=True)
class FourierSeries:
    r"""A function as :math:`c_0 + \beta z + \sum_k a_k \cos(s_k z + \theta_k)`.

    Attributes:
      constant: :math:`c_0`.
      slope: :math:`\beta`.
      atoms: the waves.
      half_width: L, the series holds on [-L, L].
      sup_error: largest error on [-L / 2, L / 2].
      l2_error: root mean square error under :math:`z \sim N(0, (L/3)^2)` cut at L.
    """

    constant: float
    slope: float
    atoms: tuple[activations.Atom, ...]
    half_width: float
    sup_error: float
    l2_error: float

    def __call__(self, z: Array) -> Array:
        """Evaluates the series elementwise."""
        value = self.constant + self.slope * z
        for atom in self.atoms:
            wave = jnp.cos(atom.frequency * z + atom.phase)
            value = value + atom.amplitude * wave
        return value

    def amplification(self, kappa: float) -> float:
        r""":math:`\sum_k |a_k| e^{s_k \kappa}`.

        With directions shared out in proportion to the terms, plain universal random
        features have a root mean square error of this over :math:`\sqrt{m}`.
        """
        return sum(
            abs(atom.amplitude) * _exp(abs(atom.frequency) * kappa)
            for atom in self.atoms
        )


def fourier_series(
    activation: str | activations.Activation | Callable[[Array], Array],
    num_terms: int = 6,
    half_width: float = 6.0,
) -> FourierSeries:
    r"""Fits a Fourier series with a linear part to an activation.

    Weighted least squares on [-L, L] with the frequencies
    :math:`s_k = \pi k / L`, :math:`k \le K`, and the weight
    :math:`e^{-z^2 / (2 (L/3)^2)}`. The linear part takes up what is not periodic, so
    that GELU or softplus need few terms.

    Args:
      activation: f, by name, row or function.
      num_terms: K.
      half_width: L.

    Raises:
      ValueError: for ``num_terms`` below 1, a half-width that is not positive and
        finite, or a function that is not finite on the interval.

    References:
      The need for it: the Fourier transforms of tanh, GELU or ReLU are not integrable,
      so that no frequency can be sampled from them; Sehanobish et al., "Scalable
      Neural Network Kernels", arXiv 2310.13225, leave these functions out.

    Example:
      >>> import snnk_jax as snnk
      >>> series = snnk.features.fourier_series("gelu")
      >>> round(series.slope, 2), series.sup_error < 0.005
      (0.5, True)
    """
    if num_terms < 1:
        raise ValueError(f"num_terms must be at least 1. Got {num_terms}.")
    if not 0 < half_width < math.inf:
        raise ValueError(f"half_width must be positive and finite. Got {half_width}.")
    return _fit(activations.get(activation), num_terms, float(half_width))


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


@functools.lru_cache(maxsize=256)
def _fit(
    activation: activations.Activation, num_terms: int, half_width: float
) -> FourierSeries:
    z = np.linspace(-half_width, half_width, _GRID)
    value = activation.evaluate(z)
    if not np.all(np.isfinite(value)):
        raise ValueError(
            f"activation must be finite on [-{half_width}, {half_width}]. "
            f"Got {activation.name!r}."
        )
    weight = np.exp(-0.5 * (3 * z / half_width) ** 2)
    weight = np.sqrt(weight / weight.sum())
    rates = math.pi / half_width * np.arange(1, num_terms + 1)
    angle = z[:, None] * rates
    columns = [np.ones((_GRID, 1)), z[:, None], np.cos(angle), np.sin(angle)]
    design = np.concatenate(columns, axis=1)
    weighted = design * weight[:, None]
    gram = weighted.T @ weighted + _RIDGE * np.eye(design.shape[1])
    solution = np.linalg.solve(gram, weighted.T @ (value * weight))
    constant, slope = solution[:2]
    cosines, sines = solution[2 : 2 + num_terms], solution[2 + num_terms :]
    amplitudes = np.hypot(cosines, sines)
    largest = max(amplitudes.max(), abs(constant), abs(slope))
    slope = slope if abs(slope) > _NEGLIGIBLE * largest else 0.0
    constant = constant if abs(constant) > _NEGLIGIBLE * largest else 0.0
    atoms = tuple(
        activations.Atom(float(rate), float(size), math.atan2(-sine, cosine))
        for rate, size, cosine, sine in zip(
            rates, amplitudes, cosines, sines, strict=True
        )
        if size > _NEGLIGIBLE * largest
    )
    fitted = constant + slope * z
    for atom in atoms:
        fitted = fitted + atom.amplitude * np.cos(atom.frequency * z + atom.phase)
    error = fitted - value
    return FourierSeries(
        constant=float(constant),
        slope=float(slope),
        atoms=atoms,
        half_width=half_width,
        sup_error=float(np.abs(error[np.abs(z) <= half_width / 2]).max()),
        l2_error=float(np.sqrt(np.sum((weight * error) ** 2))),
    )
