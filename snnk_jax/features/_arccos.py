"""Arc-cosine (ReLU) features."""

import dataclasses

import jax
import jax.numpy as jnp

from snnk_jax import kernels
from snnk_jax.features._base import FeatureMap, compiled
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArcCosine(FeatureMap):
    r"""Features of the arc-cosine kernel :math:`K_n`, the ReLU-SNNK.

    .. math::
      \Phi(x) = \sqrt{2/m}\, \Theta(\Omega x)(\Omega x)^n, \qquad
      \Psi(W) = \sqrt{2/m}\, \Theta(\Omega W)(\Omega W)^n,

    so that :math:`E[\Phi(x) \cdot \Psi(w)] = K_n(x, w)` itself (see
    :func:`snnk_jax.kernels.arc_cosine`). With independent directions the variance is
    :math:`(2 K_{2n} - K_n^2) / m` (:math:`K_{2n}` of order 2n): for orthogonal unit
    vectors and n = 1 a relative deviation of :math:`2.98 / \sqrt{m}`, whatever the
    width d and the norms.

    With a negative slope a, which order 1 alone takes, the rectifier is the leaky one:
    the features are :math:`\sqrt{2/m}\, \sigma_a(\Omega x)` and the kernel is
    :math:`(1 - a)^2 K_1(x, w) + 2 a\, x^\top w`.

    :math:`K_1` is not :math:`\mathrm{relu}(x \cdot w)`: it depends on both norms, and
    it has no bias term.

    Args:
      order: n, one of 0, 1, 2, 3. Order 0 has zero gradients everywhere.
      negative_slope: a, finite; other than zero for order 1 only.
      num_features: m.

    Parameters: ``{"omega": [m, d]}``.

    References:
      Cho and Saul, "Kernel Methods for Deep Learning", NIPS 2009; Sehanobish et al.,
      "Scalable Neural Network Kernels", arXiv 2310.13225.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.ArcCosine(order=1, num_features=64)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> fm.phi(params, jax.numpy.ones((5, 8))).shape
      (5, 64)
    """

    order: int = 1
    negative_slope: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        kernels.check_order(self.order, self.negative_slope)

    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws ``omega``; see :class:`FeatureMap`."""
        return self.directions(key, self.num_features, dim, dtype)

    @compiled
    def phi(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Maps inputs to features."""
        z = self.project(params, x)
        if self.order == 0:
            # max(z, 0)**0 would be 1 everywhere, the step function is not.
            power = jnp.where(z > 0, 1, 0).astype(z.dtype)
        elif self.negative_slope:
            power = jax.nn.leaky_relu(z, self.negative_slope)
        else:
            power = jax.nn.relu(z) ** self.order
        scale = (2.0 / self.num_features) ** 0.5
        return (scale * power).astype(x.dtype)

    @compiled
    def psi(
        self,
        params: Params,
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "m o"]:
        """Maps weights to the readout; ``bias`` must be None."""
        _refuse_bias(bias)
        kernels.check_layer(kernel.T, kernel, None)
        return self.phi(params, kernel.T).T

    def exact(
        self,
        x: Float[Array, "*b d"],
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "*b o"]:
        """The arc-cosine kernel of this order."""
        _refuse_bias(bias)
        return kernels.arc_cosine(x, kernel, self.order, self.negative_slope)


def _refuse_bias(bias: Array | None) -> None:
    if bias is not None:
        raise ValueError(
            "bias must be None for ArcCosine, whose kernel has no bias term. Append 1 "
            f"to the inputs and the bias to the kernel. Got shape {bias.shape}."
        )
