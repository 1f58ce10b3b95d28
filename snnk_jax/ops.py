"""The layer as pure functions."""

import jax.numpy as jnp

from snnk_jax.features._base import FeatureMap, Precision, accumulation_dtype
from snnk_jax.kernels import check_layer
from snnk_jax.typing import Array, Float, Params


def contract(
    phi: Float[Array, "*b m"],
    psi: Float[Array, "m o"],
    *,
    precision: Precision | None = None,
) -> Float[Array, "*b o"]:
    r"""Contracts features with a readout: :math:`\Phi(x) \Psi`.

    Accumulates in float32 or better and returns the dtype of ``phi``.

    Raises:
      ValueError: if the feature axes differ, or phi are no floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> snnk.contract(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
      (2, 4)
    """
    if phi.ndim < 1 or psi.ndim != 2 or phi.shape[-1] != psi.shape[0]:
        raise ValueError(
            "phi must be [..., m] and psi [m, o] with the same m. "
            f"Got {phi.shape} and {psi.shape}."
        )
    if not jnp.issubdtype(phi.dtype, jnp.floating):
        raise ValueError(f"phi must be floating. Got {phi.dtype}.")
    y = jnp.matmul(
        phi,
        psi.astype(phi.dtype),
        precision=precision,
        preferred_element_type=accumulation_dtype(phi.dtype),
    )
    return y.astype(phi.dtype)


def snnk_dense(
    features: FeatureMap,
    params: Params,
    x: Float[Array, "*b d"],
    kernel: Float[Array, "n o"],
    bias: Float[Array, " o"] | None = None,
) -> Float[Array, "*b o"]:
    r"""Estimates a feed-forward layer: :math:`\Phi(x)\Psi(W, b) \approx K(x, (W, b))`.

    Args:
      features: the feature map.
      params: what ``features.init(key, d)`` drew.
      x: inputs.
      kernel: weights in Flax layout, ``[d, o]``; over the inner features for a
        :class:`~snnk_jax.features.Chain`.
      bias: biases, or None.

    Returns:
      An estimate of ``features.exact(features.inner(params, x), kernel, bias)``.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.URF(activation="cos", num_features=4096, scale=1.0)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> x = jax.random.normal(jax.random.key(1), (5, 8)) / 8**0.5
      >>> kernel = jax.random.normal(jax.random.key(2), (8, 3)) / 8**0.5
      >>> error = snnk.snnk_dense(fm, params, x, kernel) - fm.exact(x, kernel)
      >>> bool(abs(error).max() < 0.3)
      True
    """
    check_layer(features.inner(params, x), kernel, bias)
    return contract(
        features.phi(params, x),
        features.psi(params, kernel, bias),
        precision=features.precision,
    )
