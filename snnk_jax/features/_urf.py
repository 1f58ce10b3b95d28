"""Universal random features from the Fourier transform of the activation."""

import dataclasses
import math

import jax.numpy as jnp

from snnk_jax import activations, kernels, projections
from snnk_jax.features._base import FeatureMap, squared_norm
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class URF(FeatureMap):
    r"""Universal random features of :math:`f(z) = a\cos(s z + \theta)`.

    cos and sin have a Fourier transform of finite support, so the only randomness is
    that of the directions :math:`g \sim N(0, I_d)`. With a scale c > 0,

    .. math::
      \cos(s w^\top x + \beta) = E_g\left[ e^{s^2 c^2 \lVert x\rVert^2 / 2}
        \cos(s c\, g^\top x + \beta)\, e^{g^\top w / c - \lVert w\rVert^2 / (2 c^2)}
        \right],

    and :math:`\cos(u + \beta) = \cos u \cos\beta - \sin u \sin\beta` puts the phase
    :math:`\beta = s b + \theta` on the weight side: everything is real, and a bias
    costs no features. ``m = num_features`` columns hold m/2 directions.

    The variance with independent directions is
    :math:`\tfrac{1}{m}\left[ e^{P+Q} + e^{Q-P}\cos(4 s w^\top x + 2\beta) \right]
    - \tfrac{2}{m}\cos^2(s w^\top x + \beta)` with
    :math:`P = s^2 c^2\lVert x\rVert^2`, :math:`Q = \lVert w\rVert^2 / c^2`, times
    :math:`a^2`. The best
    scale is :math:`c^2 = \lVert w\rVert / (s \lVert x\rVert)`; then
    :math:`P + Q = 2\kappa`, :math:`\kappa = s \lVert x\rVert \lVert w\rVert`, and m
    must grow like :math:`e^{2\kappa}`: the map serves small :math:`\kappa`.

    Args:
      activation: ``"cos"``, ``"sin"`` or a row with one Fourier atom.
      num_features: m, even.
      scale: c; None takes :math:`d^{-1/4}`, the best one for unit frequency, inputs of
        norm :math:`\sqrt{d}` and weights of norm 1.

    Parameters: ``{"omega": [m / 2, d], "scale": []}``.

    :meth:`phi` grows as :math:`e^{P/2}`. Where that leaves the range of the dtype the
    features are NaN, never inf; :meth:`max_input_norm` tells the limit beforehand.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.URF(activation="sin", num_features=64, scale=1.0)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> fm.phi(params, jax.numpy.ones((5, 8))).shape
      (5, 64)
    """

    activation: str | activations.Activation = "cos"
    scale: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_features % 2:
            raise ValueError(
                "num_features must be even: each direction gives a cosine and a sine. "
                f"Got {self.num_features}."
            )
        row = activations.get(self.activation)
        if len(row.atoms) != 1:
            raise ValueError(
                "activation must have one Fourier atom, as cos and sin do. "
                f"Got {row.name!r} with {len(row.atoms)}."
            )
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite. Got {self.scale}.")

    @property
    def _atom(self) -> activations.Atom:
        return activations.get(self.activation).atoms[0]

    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws ``omega``; see :class:`FeatureMap`."""
        omega = projections.draw(
            self.projection, key, self.num_features // 2, dim, dtype
        )
        scale = dim**-0.25 if self.scale is None else self.scale
        return {"omega": omega, "scale": jnp.asarray(scale, dtype)}

    def phi(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Maps inputs to features."""
        z = self.project(params["omega"], x)
        rate = self._atom.frequency * params["scale"].astype(z.dtype)
        log_size = 0.5 * rate * rate * squared_norm(x)[..., None]
        size = _scaled_exp(log_size, (2.0 / self.num_features) ** 0.5, x.dtype)
        angle = rate * z
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return (size * waves).astype(x.dtype)

    def psi(
        self,
        params: Params,
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "m o"]:
        """Maps weights and biases to the readout."""
        if bias is not None:
            kernels.check_layer(kernel.T, kernel, bias)
        atom = self._atom
        z = self.project(params["omega"], kernel.T)
        inverse = 1 / params["scale"].astype(z.dtype)
        norms = squared_norm(kernel.T)[:, None]
        log_size = inverse * z - 0.5 * inverse * inverse * norms
        factor = atom.amplitude * (2.0 / self.num_features) ** 0.5
        size = _scaled_exp(log_size, factor, kernel.dtype)
        phase = jnp.full((kernel.shape[1], 1), atom.phase, z.dtype)
        if bias is not None:
            phase = phase + atom.frequency * bias.astype(z.dtype)[:, None]
        waves = [jnp.cos(phase) * size, -jnp.sin(phase) * size]
        return jnp.concatenate(waves, axis=-1).T.astype(kernel.dtype)

    def exact(
        self,
        x: Float[Array, "*b d"],
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "*b o"]:
        """The feed-forward layer of the activation."""
        return kernels.ffl(self.activation, x, kernel, bias)

    def max_input_norm(self, params: Params, dtype: Dtype = jnp.float32) -> Array:
        """The largest input norm for which :meth:`phi` is finite in ``dtype``."""
        limit = math.log(float(jnp.finfo(dtype).max))
        return (2 * limit) ** 0.5 / (abs(self._atom.frequency) * params["scale"])


def _scaled_exp(log_size: Array, factor: float, dtype: Dtype) -> Array:
    """``factor * exp(log_size)``, NaN where ``dtype`` cannot hold it."""
    size = factor * jnp.exp(log_size)
    return jnp.where(jnp.abs(size) <= float(jnp.finfo(dtype).max), size, jnp.nan)
