"""Frozen randomness as a module, and a feature map with it."""

import abc
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import nnx

from snnk_jax import projections
from snnk_jax.calibration import balance
from snnk_jax.features import Chain, FeatureMap
from snnk_jax.nn._variables import AdapterParam, RandomProjection
from snnk_jax.surgery import find_modules, path_name
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray


def projection_key(rngs: nnx.Rngs) -> PRNGKeyArray:
    """Draws a key from the stream ``projection``, or ``default``, or ``params``.

    Linen's ``init(key, x)`` brings the last one alone.
    """
    named = "projection" in rngs or "default" in rngs
    return rngs.projection() if named else rngs.params()


class Drawn(nnx.Module):
    """Frozen random arrays and the key that they were drawn with.

    The key is kept beside the values, so that a file can name it instead of holding
    the values (see :mod:`snnk_jax.adapters`). Subclasses say what a key stands for.

    Args:
      key: key of the draw.
      param_dtype: storage dtype of the values.
      trainable: whether the values are trained, as adapter parameters.
    """

    def __init__(
        self,
        key: PRNGKeyArray,
        param_dtype: Dtype = jnp.float32,
        *,
        trainable: bool = False,
    ):
        self.param_dtype = param_dtype
        self.trainable = trainable
        self.key = RandomProjection(projections.key_words(key))
        self.calibrate(self.draw(key))

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray) -> Params:
        """The values that a key stands for."""

    def calibrate(self, params: Params) -> None:
        """Takes other values, balanced ones say.

        See :func:`snnk_jax.calibration.balance`. The key no longer draws them, so a
        file of :func:`snnk_jax.adapters.save_adapter` holds the values themselves.
        """
        kind = AdapterParam if self.trainable else RandomProjection
        self.values = nnx.Dict({name: kind(value) for name, value in params.items()})

    def redraw(self, key: PRNGKeyArray) -> None:
        """Draws other values; what was calibrated is kept."""
        self.key = RandomProjection(projections.key_words(key))
        self.calibrate(self.draw(key))

    @property
    def params(self) -> Params:
        """The values; closed to gradients unless they are trained."""
        values = {name: variable[...] for name, variable in self.values.items()}
        return values if self.trainable else jax.lax.stop_gradient(values)


class Projection(Drawn):
    """Applies a feature map whose parameters it keeps.

    Args:
      features: the feature map.
      dim: width of the inputs.
      key: key of the draw.
      param_dtype: storage dtype of the values.
      trainable: whether the values are trained.

    Raises:
      ValueError: if trained values are no floats, as the signs of some sketches.
    """

    def __init__(
        self,
        features: FeatureMap,
        dim: int,
        *,
        key: PRNGKeyArray,
        param_dtype: Dtype = jnp.float32,
        trainable: bool = False,
    ):
        self.features = features
        self.dim = dim
        super().__init__(key, param_dtype, trainable=trainable)
        if trainable:
            integers = [
                name
                for name, variable in self.values.items()
                if not jnp.issubdtype(variable.dtype, jnp.floating)
            ]
            if integers:
                raise ValueError(
                    "a trained projection must be of floats. Got "
                    f"{type(features).__name__} with {integers}."
                )

    def draw(self, key: PRNGKeyArray) -> Params:
        """The parameters of the map that a key stands for."""
        return self.features.init(key, self.dim, self.param_dtype)

    def balance(self, linear: nnx.Linear, x: Float[Array, "n d"]) -> None:
        """Fits the scaling of the map to a Linear and inputs of it."""
        params = balance(self.features, self.params, x, *_weights(linear))
        self.calibrate(params)

    def psi(self, linear: nnx.Linear) -> Float[Array, "m o"]:
        """The readout that estimates the activation behind a Linear.

        Raises:
          ValueError: for a Chain, whose kernel is not one of the inputs.
        """
        if isinstance(self.features, Chain):
            raise ValueError(
                "features must estimate a layer of their inputs, to be given its "
                f"weights; train or fit the readout of a Chain. Got {self.features}."
            )
        return self.features.psi(self.params, *_weights(linear))

    def redraw(self, key: PRNGKeyArray) -> None:
        """Draws other directions; balancing and references are kept."""
        params = self.features.redraw(self.params, key, self.dim)
        self.key = RandomProjection(projections.key_words(key))
        self.calibrate(params)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        return self.features.phi(self.params, x)


def _weights(linear: nnx.Linear) -> tuple[Array, Array | None]:
    return linear.kernel[...], None if linear.bias is None else linear.bias[...]


def redraw(model: nnx.Module, *, rngs: nnx.Rngs) -> Any:
    """Returns a clone of a model with other frozen randomness in all its layers.

    A readout that was trained on one draw does not fit another: it is for ablations,
    for averaging over draws, and for training that draws anew every so often. Trained
    projections stay.

    Args:
      model: any NNX model.
      rngs: random stream ``projection``, asked in model order.

    Raises:
      ValueError: if the model has nothing to redraw, or projections with a draw for
        each layer of a scan, of which a key stands for one.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> fm = snnk.features.ArcCosine(num_features=8)
      >>> layer = snnk.nn.SNNKDense(4, 2, features=fm, rngs=nnx.Rngs(0))
      >>> other = snnk.nn.redraw(layer, rngs=nnx.Rngs(1))
      >>> x = jnp.ones((3, 4))
      >>> bool(jnp.allclose(layer(x), other(x)))
      False
    """

    def random(module: Any) -> TypeGuard[Drawn]:
        return isinstance(module, Drawn) and not module.trainable

    # Asked in model order, before the map, whose own order is no promise.
    found = find_modules(model).items()
    keys = {name: projection_key(rngs) for name, module in found if random(module)}
    if not keys:
        raise ValueError("model must have frozen randomness to redraw. Got none.")

    stacked = [name for name, m in found if random(m) and m.key[...].ndim != 1]
    if stacked:
        raise ValueError(
            f"every projection must have one key to be redrawn. Got stacks: {stacked}."
        )

    def visit(parts: tuple[Any, ...], node: Any) -> Any:
        if path_name(parts) in keys and random(node):
            node.redraw(keys[path_name(parts)])
        return node

    return nnx.recursive_map(visit, nnx.clone(model))
