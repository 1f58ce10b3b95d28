"""Biases for feature maps that have none."""

import dataclasses

import jax.numpy as jnp

from snnk_jax.features._base import FeatureMap, Precision
from snnk_jax.kernels import check_layer
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class AppendOne(FeatureMap):
    r"""A feature map of :math:`(x, 1)`: biases for a map that has none.

    The weights get the bias as a last row: :math:`\Psi(W, b)` is
    :math:`\Psi((W; b))` of the map inside, for inputs :math:`(x, 1)`. For
    :class:`~snnk_jax.features.ArcCosine` the kernel is then
    :math:`K_n((x, 1), (w, b))`. Maps that carry biases themselves, as
    :class:`~snnk_jax.features.URF` does, need no such input.

    Args:
      features: the map inside, for inputs one wider.

    Parameters: those of the map inside. ``num_features``, ``projection`` and
    ``precision`` are its own as well.

    Raises:
      ValueError: for something else than a feature map inside.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> arc = snnk.features.ArcCosine(num_features=64)
      >>> fm = snnk.features.AppendOne(arc)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> fm.phi(params, jax.numpy.ones((5, 8))).shape
      (5, 64)
    """

    features: FeatureMap
    num_features: int = dataclasses.field(init=False, repr=False)
    projection: str = dataclasses.field(init=False, repr=False)
    precision: Precision | None = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.features, FeatureMap):
            raise ValueError(f"features must be a feature map. Got {self.features!r}.")
        for name in ("num_features", "projection", "precision"):
            object.__setattr__(self, name, getattr(self.features, name))
        super().__post_init__()

    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws the parameters of the map inside."""
        return self.features.init(key, dim + 1, dtype)

    def redraw(self, params: Params, key: PRNGKeyArray, dim: int) -> Params:
        """Draws the random parts anew and keeps what was calibrated."""
        return self.features.redraw(params, key, dim + 1)

    def phi(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """The features of the inputs with a one behind."""
        return self.features.phi(params, _with_one(x))

    def psi(
        self,
        params: Params,
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "m o"]:
        """The readout of the weights with the bias as a last row."""
        return self.features.psi(params, _with_bias(kernel, bias))

    def exact(
        self,
        x: Float[Array, "*b d"],
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "*b o"]:
        """The kernel of the map inside between inputs and weights so extended."""
        return self.features.exact(_with_one(x), _with_bias(kernel, bias))


def _with_one(x: Array) -> Array:
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def _with_bias(kernel: Array, bias: Array | None) -> Array:
    check_layer(kernel.T, kernel, bias)
    row = jnp.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias
    return jnp.concatenate([kernel, row[None, :].astype(kernel.dtype)])
