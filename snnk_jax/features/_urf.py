"""Universal random features from the Fourier transform of the activation."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from snnk_jax import activations
from snnk_jax.features._sampling import amplified_mass, sample_rates
from snnk_jax.features._series import FourierSeries, fourier_series
from snnk_jax.features._towers import Layout, Terms, TowerFeatures, log_damping
from snnk_jax.features._trig import cos_sin
from snnk_jax.typing import Array, Dtype, Params, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class URF(TowerFeatures):
    r"""Universal random features of :math:`f(w^\top x + b)`.

    The Fourier transform makes f a sum, or a mean, of waves
    :math:`a\cos(s z + \theta)`, and each wave has random features that are real and
    carry the bias at no cost: with a scale c and :math:`t = \sqrt s\, c\, x`,
    :math:`u = \sqrt s\, w / c`,

    .. math::
      \cos(s w^\top x + \beta) = E_g\left[ e^{\lVert t\rVert^2 / 2}
        \cos(g^\top t + \beta)\, e^{g^\top u - \lVert u\rVert^2 / 2} \right],

    where :math:`\cos(\cdot + \beta)` is split into a cosine and a sine column of
    :math:`\Phi` and the phase :math:`\beta = s b + \theta` goes to :math:`\Psi`.

    For one wave and independent directions, without ``exact_degree``, the variance is
    :math:`a^2/k\,[ \tfrac12 e^{P+Q} + \tfrac12 e^{Q-P}\cos(4 s w^\top x + 2\beta) -
    \cos^2(s w^\top x + \beta) ]` with :math:`P = \lVert t\rVert^2`,
    :math:`Q = \lVert u\rVert^2` and k directions. At the best scale
    :math:`P + Q = 2\kappa`, :math:`\kappa = s\lVert x\rVert\lVert w\rVert`: k must
    grow like :math:`e^{2\kappa}`, which :func:`snnk_jax.calibration.balance` lowers
    for data with decaying spectra and ``exact_degree`` for small :math:`\kappa`.

    Args:
      activation: f, by name, row or function.
      num_features: m.
      spectrum: where the waves come from. ``"series"``: f's own finite sum of waves
        (cos, sin), or a Fourier series with a linear part on
        ``[-half_width, half_width]`` (:func:`fourier_series`), the linear part on
        ``1 + d`` exact columns, directions shared out by :math:`|a_k| e^{s_k\kappa}`.
        The map then estimates the series. ``"sampled"``: frequencies drawn from an
        integrable transform (Gaussian, sech, Gabor). ``"auto"``: the exact sum, else
        sampling where its noise at ``kappa`` is below twice the series', else the
        series.
      importance: draw frequencies from :math:`|R(s)| e^{s\kappa}` instead of
        :math:`|R(s)|`; stratified in both cases.
      num_terms: waves of the series.
      half_width: L of the series.
      scale, shape, kappa, exact_degree, shrinkage: see :class:`TowerFeatures`.

    Parameters: ``omega [k, d]`` (or the signs and lengths of a Hadamard projection)
    and ``scale []``; with sampling ``rates [k]`` and ``weights [k]``; with shrinkage
    ``reference [256, d]``; after balancing ``mean``, ``metric``, ``dual_metric`` and
    ``stretch`` in place of ``scale``.

    Columns: the exact ones, cosines, sines, and a zero where one is left over.
    :meth:`phi` grows as :math:`e^{P/2}`. Where that leaves the range of the dtype the
    features are NaN, never inf; :meth:`max_input_norm` tells the limit beforehand.

    Raises:
      ValueError: for sampling without an integrable transform or with an infinite
        second moment, and for fields out of their range.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225;
      Likhosherstov et al., "Chefs' Random Tables", arXiv 2205.15317 (A).

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.URF(activation="gelu", num_features=64, exact_degree=1)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> fm.phi(params, jax.numpy.ones((5, 8))).shape
      (5, 64)
    """

    activation: str | activations.Activation = "cos"
    spectrum: Literal["auto", "sampled", "series"] = "auto"
    importance: bool = True
    num_terms: int = 6
    half_width: float = 6.0

    def __post_init__(self):
        super().__post_init__()
        if self.spectrum not in ("auto", "sampled", "series"):
            raise ValueError(
                "spectrum must be 'auto', 'sampled' or 'series'. "
                f"Got {self.spectrum!r}."
            )
        row = self.row
        if self.spectrum == "sampled":
            if row.spectrum is None:
                raise ValueError(
                    "activation must have an integrable Fourier transform to be "
                    f"sampled. Got {row.name!r}; use spectrum='series'."
                )
            if not self._moment < math.inf:
                limit = row.spectrum.decay / (1 if self.importance else 2)
                below = f"below {limit:.3g}" if limit < math.inf else "smaller"
                raise ValueError(
                    f"kappa must be {below} to sample {row.name!r}: the second moment "
                    "is infinite there, or beyond all numbers, whatever num_features. "
                    f"Got {self.kappa}; scale the inputs or use spectrum='series'."
                )
        elif not self._sampled and not self._atoms:
            raise ValueError(
                "activation must not be affine: it is exact without random features. "
                f"Got {row.name!r}."
            )

    @property
    def row(self) -> activations.Activation:
        """The activation f."""
        return activations.get(self.activation)

    @property
    def series(self) -> FourierSeries | None:
        """What the map estimates in place of f: None where it estimates f itself."""
        return None if self.row.atoms or self._sampled else self._fit()

    @property
    def carried(self) -> tuple[activations.Activation, ...]:
        """f, or its series where that is estimated and f has kinks.

        Near a kink the Taylor parts of the two differ by far more than the functions,
        and the random columns hold the rest of the series, not of f. Where shrinkage
        drops the random columns, f's own part may be the better one.
        """
        series = self.series
        if self.exact_degree is None or series is None or not self.row.kinks:
            return (self.row,)
        row = activations.Activation(f"series of {self.row.name}", series)
        return (row, self.row) if self.shrinkage else (row,)

    def _fit(self) -> FourierSeries:
        return fourier_series(self.row, self.num_terms, self.half_width)

    @property
    def _moment(self) -> float:
        row = self.row
        if row.spectrum is None:
            return math.inf
        return amplified_mass(row.spectrum, self.kappa, self.importance)

    @property
    def _sampled(self) -> bool:
        if self.spectrum != "auto":
            return self.spectrum == "sampled"
        if self.row.atoms or not self._moment < math.inf:
            return False
        # Frequencies drawn afresh estimate f itself, which is worth some noise.
        return self._moment <= 2 * self._fit().amplification(self.kappa)

    @property
    def _atoms(self) -> tuple[activations.Atom, ...]:
        series = self.series
        if series is not None:
            return series.atoms
        return tuple(atom for atom in self.row.atoms if atom.amplitude)

    @property
    def terms(self) -> Terms:
        """How f is taken apart."""
        if self._sampled:
            return Terms(0.0, 0.0, rates=(), weights=(0.0,))
        atoms, series = self._atoms, self.series
        return Terms(
            0.0 if series is None else series.constant,
            0.0 if series is None else series.slope,
            rates=tuple(abs(atom.frequency) for atom in atoms),
            weights=tuple(
                math.log(abs(atom.amplitude)) + abs(atom.frequency) * self.kappa
                for atom in atoms
            ),
        )

    def _draw_rates(self, words: UInt32[Array, "2"], num: int, dtype: Dtype) -> Params:
        if not self._sampled:
            return {}
        spectrum = self.row.spectrum
        assert spectrum is not None
        rates, weights = sample_rates(spectrum, words, num, self.kappa, self.importance)
        return {"rates": rates.astype(dtype), "weights": weights.astype(dtype)}

    def _waves(self, params: Params, layout: Layout) -> tuple[Array, Array, Array]:
        if self._sampled:
            spectrum = self.row.spectrum
            assert spectrum is not None
            rates, weights = params["rates"], params["weights"]
            return rates, weights / layout.directions, jnp.asarray(spectrum.phase)
        atoms, counts = self._atoms, np.array(layout.counts)
        rates = np.array([abs(atom.frequency) for atom in atoms])
        amplitudes = np.array([atom.amplitude for atom in atoms]) / counts
        phases = np.array(
            [math.copysign(1, atom.frequency) * atom.phase for atom in atoms]
        )
        if len(atoms) > 1:  # A single wave broadcasts: one exponential an example.
            rates, amplitudes, phases = (
                np.repeat(a, counts) for a in (rates, amplitudes, phases)
            )
        else:
            rates, amplitudes, phases = rates[0], amplitudes[0], phases[0]
        return jnp.asarray(rates), jnp.asarray(amplitudes), jnp.asarray(phases)

    def _input_tower(self, z: Array, square: Array, cap: Array | None) -> list[Array]:
        # Not square / 2 less the excess: the two would cancel, and lose the difference.
        size = jnp.exp((square if cap is None else jnp.minimum(square, cap)) / 2)
        cosine, sine = (size * wave for wave in cos_sin(z))
        if self.exact_degree is not None:
            damp = jnp.exp(log_damping(square, cap))
            cosine = cosine - damp
            if self.exact_degree >= 1:
                sine = sine - damp * z
            if self.exact_degree >= 2:
                cosine = cosine - damp * (square - z * z) / 2
        return [cosine, sine]

    def _weight_factors(self, phase: Array) -> list[Array]:
        return [jnp.cos(phase), -jnp.sin(phase)]
