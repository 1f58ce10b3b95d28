"""A feature map with its frozen randomness, as a module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from snnk_jax import projections
from snnk_jax.features import FeatureMap
from snnk_jax.nn._variables import RandomProjection
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray


def projection_key(rngs: nnx.Rngs) -> PRNGKeyArray:
    """Draws a key from the stream ``projection``, or ``default``, or ``params``.

    Linen's ``init(key, x)`` brings the last one alone.
    """
    named = "projection" in rngs or "default" in rngs
    return rngs.projection() if named else rngs.params()


class Projection(nnx.Module):
    """Applies a feature map whose parameters it keeps as :class:`RandomProjection`.

    The key of the draw is kept beside the values, so that a file can name it instead
    of holding the values (see :mod:`snnk_jax.adapters`).

    Args:
      features: the feature map.
      dim: width of the inputs.
      key: key of the draw.
      param_dtype: storage dtype of the values.
    """

    def __init__(
        self,
        features: FeatureMap,
        dim: int,
        *,
        key: PRNGKeyArray,
        param_dtype: Dtype = jnp.float32,
    ):
        self.features = features
        self.dim = dim
        self.param_dtype = param_dtype
        self.key = RandomProjection(projections.key_words(key))
        self.values = _variables(features.init(key, dim, param_dtype))

    def calibrate(self, params: Params) -> None:
        """Takes other parameters for the same map and width, balanced ones say.

        See :func:`snnk_jax.calibration.balance`. The key no longer draws them, so a
        file of :func:`snnk_jax.adapters.save_adapter` holds the values themselves.
        """
        self.values = _variables(params)

    @property
    def params(self) -> Params:
        """The parameters of the feature map, closed to gradients."""
        return {
            name: jax.lax.stop_gradient(variable[...])
            for name, variable in self.values.items()
        }

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        return self.features.phi(self.params, x)


def _variables(params: Params) -> Any:
    return nnx.Dict({name: RandomProjection(value) for name, value in params.items()})
