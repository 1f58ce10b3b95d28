"""Feature maps of kernels through their columns at landmarks (Nystrom features)."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from snnk_jax.infinite import _layers
from snnk_jax.infinite._kernel import kernel
from snnk_jax.typing import Array, Float, Params


def whitening(inner: np.ndarray, dtype: Any) -> np.ndarray:
    r"""Returns W with :math:`W W^\top = (K + \epsilon I)^{-1}`, float64.

    The shift is what a kernel that was computed in ``dtype`` leaves uncertain.

    Raises:
      ValueError: for a kernel that is not finite or all zero.
    """
    inner = np.asarray(inner, np.float64)
    if not np.isfinite(inner).all() or not np.trace(inner) > 0:
        raise ValueError(
            "landmarks must be finite and not all without a kernel. "
            f"Got a kernel of trace {np.trace(inner)}."
        )
    size = len(inner)
    shift = float(np.finfo(dtype).eps) * np.trace(inner)
    shifted = (inner + inner.T) / 2 + shift * np.eye(size)
    lower = scipy.linalg.cholesky(shifted, lower=True, check_finite=False)
    return scipy.linalg.solve_triangular(
        lower, np.eye(size), lower=True, check_finite=False
    ).T


@dataclasses.dataclass(frozen=True, kw_only=True)
class LandmarkFeatures:
    r"""Features of the NNGP or the NTK from its exact columns at landmarks Z.

    .. math:: \Phi(x) = K(x, Z)\, K(Z, Z)^{-1/2}

    with the root of a Cholesky factor. :math:`\Phi(x) \cdot \Phi(y)` is the part of
    the kernel that functions :math:`K(\cdot, z)` of the landmarks can express: exact
    where x or y is a landmark, and never above the kernel,
    :math:`K - \Phi\Phi^\top \succeq 0`. Unlike :class:`Features` it sees data, is not
    unbiased, and works for any network that has a kernel. Data near the landmarks are
    told apart better than by many more random features.

    Landmarks are examples, or better the centres of k-means. One input costs a row of
    the kernel, and a product with a square matrix.

    Args:
      net: the network.
      kind: ``"ntk"`` or ``"nngp"``.
      batch_size: rows and columns of a block of the kernel, None for a size that fits.

    Raises:
      ValueError: for an unknown kind, and as for :func:`snnk_jax.infinite.kernel`.

    References:
      Williams and Seeger, "Using the Nystrom Method to Speed Up Kernel Machines", 2000;
      k-means: Zhang, Tsang and Kwok, "Improved Nystrom Low-Rank Approximation and
      Error Analysis", 2008.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> net = snnk.infinite.serial(
      ...     snnk.infinite.Dense(w_std=2**0.5),
      ...     snnk.infinite.Activation("relu"),
      ...     snnk.infinite.Dense(),
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (100, 8))
      >>> features = snnk.infinite.LandmarkFeatures(net=net)
      >>> params = features.init(x[:32])
      >>> features.phi(params, x).shape
      (100, 32)
    """

    net: _layers.Layer
    kind: Literal["ntk", "nngp"] = "ntk"
    batch_size: int | None = None

    def __post_init__(self):
        _layers.check_map(self.net, self.kind)
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1. Got {self.batch_size}.")

    def init(self, landmarks: Float[Array, "m *s d"]) -> Params:
        """Computes the parameters: the landmarks, and a root of their inverse kernel.

        Args:
          landmarks: m inputs, one for each feature; concrete, not traced.

        Raises:
          ValueError: for landmarks that are not finite or whose kernel is all zero.
        """
        landmarks = jnp.asarray(landmarks)
        inner = np.asarray(self._kernel(landmarks, None))
        root = jnp.asarray(whitening(inner, inner.dtype), inner.dtype)
        return {"landmarks": landmarks, "whitening": root}

    def phi(self, params: Params, x: Float[Array, "n *s d"]) -> Float[Array, "n m"]:
        """Maps inputs, of the shape and dtype of the landmarks, to features."""
        across = self._kernel(x, params["landmarks"])
        phi = jnp.matmul(across, params["whitening"], precision="highest")
        return phi.astype(x.dtype)

    def _kernel(self, x: Any, z: Any) -> Array:
        return kernel(self.net, x, z, self.kind, batch_size=self.batch_size)
