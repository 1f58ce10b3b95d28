"""Positive random features of the exponential kernel."""

import dataclasses

import jax.numpy as jnp

from snnk_jax import activations
from snnk_jax.features._towers import Layout, Terms, TowerFeatures, log_damping, taylor
from snnk_jax.typing import Array, Dtype, Params, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponential(TowerFeatures):
    r"""Generalised positive features of :math:`\exp(w^\top x + b)`.

    .. math::
      e^{w^\top x} = E_g[\Lambda_g(c x)\, \Lambda_g(w / c)], \qquad
      \Lambda_g(z) = (1 - 4A)^{d/4}
        e^{A\lVert g\rVert^2 + \sqrt{1 - 4A}\, g^\top z - \lVert z\rVert^2 / 2},

    one column a direction. All exponents are added before the exponential is taken,
    and the factors of A stand on the weight side. For independent directions, without
    ``exact_degree``,

    .. math::
      m\, E[Z^2] = \left(\tfrac{1 - 4A}{\sqrt{1 - 8A}}\right)^d
        e^{2 \frac{1 - 4A}{1 - 8A} \lVert c x + w / c\rVert^2
        - c^2 \lVert x\rVert^2 - \lVert w\rVert^2 / c^2}.

    Without ``exact_degree`` features and, for A = 0, their estimate of a bias-free
    layer are positive.

    Args:
      num_features: m.
      shape: A, at most 0. :meth:`best_shape` is the closed form for isotropic data;
        :func:`snnk_jax.calibration.balance` finds one :math:`A_l` a direction.
      scale, kappa, exact_degree, shrinkage: see :class:`TowerFeatures`.

    Parameters: as :class:`URF` without sampling.

    References:
      Likhosherstov et al., "Chefs' Random Tables", arXiv 2205.15317; "FAVOR#", arXiv
      2302.00787 (one :math:`A_l` a direction).

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.Exponential(num_features=64)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> bool((fm.phi(params, jax.numpy.ones((5, 8))) > 0).all())
      True
    """

    columns_per_direction = 1

    @staticmethod
    def best_shape(kappa: float, dim: int) -> float:
        r"""The A of least second moment where inputs and weights are uncorrelated.

        With :math:`\lambda = 2\kappa / d`, the eigenvalue of :math:`E[vv^\top]`,
        :math:`v = cx + w/c`: :math:`A = (1 - 2\lambda - \sqrt{(2\lambda + 1)^2 +
        8\lambda}) / 16`.

        Example:
          >>> import snnk_jax as snnk
          >>> snnk.features.Exponential.best_shape(0.0, 64)
          0.0
        """
        eigenvalue = 2 * kappa / dim
        root = ((2 * eigenvalue + 1) ** 2 + 8 * eigenvalue) ** 0.5
        return (1 - 2 * eigenvalue - root) / 16

    @property
    def row(self) -> activations.Activation:
        """The exponential."""
        return activations.get("exp")

    @property
    def terms(self) -> Terms:
        """A single exponential of rate 1."""
        return Terms(0.0, 0.0, rates=(1.0,), weights=(0.0,))

    def _draw_rates(self, words: UInt32[Array, "2"], num: int, dtype: Dtype) -> Params:
        return {}

    def _waves(self, params: Params, layout: Layout) -> tuple[Array, Array, Array]:
        one = jnp.ones(())
        return one, one / layout.directions, jnp.zeros(())

    def _input_tower(self, z: Array, square: Array, cap: Array | None) -> list[Array]:
        damp = log_damping(square, cap)
        tower = jnp.exp(z - square / 2 + damp)
        if self.exact_degree is not None:
            tower = tower - jnp.exp(damp) * taylor(z, square, self.exact_degree)
        return [tower]

    def _weight_factors(self, phase: Array) -> list[Array]:
        return [jnp.exp(phase)]
