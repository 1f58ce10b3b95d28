"""Networks of dense layers, one of which may be an SNNK, and narrower rivals."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

import snnk_jax as snnk
from snnk_jax.features import URF, ArcCosine, FeatureMap

# About what sin, tanh and relu give for standard normal pre-activations.
_OUTPUT_SQUARE = 0.5


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to build the network.

    Attributes:
      title: its line in the report.
      widths: of the inputs, the hidden layers and the outputs.
      replaced: the hidden layer that is an SNNK, counted from 0; None for none.
      features: the map of that layer.
    """

    title: str
    widths: tuple[int, ...]
    replaced: int | None = None
    features: FeatureMap | None = None

    @property
    def trained(self) -> int:
        """Trained parameters: those of the dense layers, and of the readout."""
        count = sum(
            (d + 1) * o for d, o in zip(self.widths[:-1], self.widths[1:], strict=True)
        )
        if self.features is None or self.replaced is None:
            return count
        d, o = self.widths[self.replaced : self.replaced + 2]
        return count + (self.features.num_features - d) * o


def methods(config: ConfigDict, inputs: int, outputs: int) -> tuple[Method, ...]:
    """The original, and for every m the SNNKs and a dense network of their size."""
    model = config.model
    original = (inputs, *(model.width,) * model.hidden_layers, outputs)
    found = {}
    for m in config.num_features:
        for replaced in model.replaced:
            snnks = [
                Method(title, original, replaced, features)
                for title, features in _maps(config, m, replaced)
            ]
            width = equal_width(original, snnks[0].trained)
            widths = (inputs, *(width,) * model.hidden_layers, outputs)
            rival = Method(f"dense, width {width}", widths)
            found |= {method.title: method for method in (*snnks, rival)}
    first = Method(f"original, width {model.width}", original)
    found.pop(f"dense, width {model.width}", None)
    return first, *found.values()


def _maps(config: ConfigDict, m: int, replaced: int) -> list[tuple[str, FeatureMap]]:
    place = f", layer {replaced + 1}" if len(config.model.replaced) > 1 else ""
    maps: list[tuple[str, FeatureMap]] = []
    if "relu" in config.features:
        maps.append((f"ReLU-SNNK, m = {m}{place}", ArcCosine(num_features=m)))
    for scale in config.scales if "sin" in config.features else ():
        given = f", c = {scale:g}" if len(config.scales) > 1 else ""
        features = URF(activation="sin", num_features=m, scale=scale)
        maps.append((f"sine-SNNK, m = {m}{given}{place}", features))
    return maps


def equal_width(widths: Sequence[int], trained: int) -> int:
    """The hidden width at which a dense network has about ``trained`` parameters.

    Args:
      widths: of a network whose inputs, outputs and depth it shares.
      trained: the number to come near to.
    """

    def dense(width: int) -> Method:
        return Method("", (widths[0], *(width,) * (len(widths) - 2), widths[-1]))

    width = 1
    while dense(width + 1).trained <= trained:
        width += 1
    return min(width, width + 1, key=lambda w: abs(dense(w).trained - trained))


class Network(nnx.Module):
    r"""A multilayer perceptron :math:`h_{i+1} = f(\omega(h_i W_i + b_i))`.

    The last layer is linear. An SNNK :math:`\Phi(h_i)\Psi + b_i` takes the place of a
    whole hidden layer, activation included. Its readout is drawn, not computed from
    weights: the estimate by :math:`\Psi(W, b)` would start from noise of many times the
    signal (``docs/networks.md``).

    Args:
      method: widths, and the SNNK if there is one.
      activation: f.
      frequency: :math:`\omega`, with weights drawn for it as in SIREN; 0 for no factor
        and Flax's own initialisation.
      example: inputs of the network, ``[n, d]``; the readout is drawn such that its
        outputs on them have a mean square of one half.
      rngs: random streams ``params`` and ``projection``.

    References:
      Sitzmann et al., "Implicit Neural Representations with Periodic Activation
      Functions", arXiv 2006.09661 (SIREN); Sehanobish et al., "Scalable Neural Network
      Kernels", arXiv 2310.13225.
    """

    def __init__(
        self,
        method: Method,
        *,
        activation: str,
        frequency: float,
        example: jax.Array,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.frequency = frequency
        self.replaced = method.replaced
        layers: list[nnx.Module] = []
        h = example
        for index, width in enumerate(method.widths[1:]):
            if index == method.replaced and method.features is not None:
                layer = _snnk(h, width, method.features, rngs)
            else:
                layer = nnx.Linear(h.shape[-1], width, rngs=rngs)
                if frequency:
                    _draw_as_siren(layer, frequency, index == 0, rngs)
            layers.append(layer)
            h = self._activated(index, layer(h))
        self.layers = nnx.List(layers)

    def _activated(self, index: int, z: jax.Array) -> jax.Array:
        if index == self.replaced:
            return z
        return snnk.activations.get(self.activation)((self.frequency or 1.0) * z)

    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, last = self.layers
        for index, layer in enumerate(hidden):
            x = self._activated(index, layer(x))
        return last(x)


def _draw_as_siren(
    layer: nnx.Linear, frequency: float, first: bool, rngs: nnx.Rngs
) -> None:
    inputs = layer.in_features
    limit = 1 / inputs if first else math.sqrt(6 / inputs) / frequency
    for variable in (layer.kernel, layer.bias):
        assert variable is not None
        shape = variable[...].shape
        variable[...] = jax.random.uniform(
            rngs.params(), shape, minval=-limit, maxval=limit
        )


def _snnk(
    h: jax.Array, width: int, features: FeatureMap, rngs: nnx.Rngs
) -> snnk.nn.SNNKDense:
    layer = snnk.nn.SNNKDense(
        h.shape[-1],
        width,
        features=features,
        readout_init=nnx.initializers.normal(1.0),
        rngs=rngs,
    )
    square = jnp.mean(jnp.sum(layer.projection(h) ** 2, axis=-1))
    layer.readout[...] = layer.readout[...] * jnp.sqrt(_OUTPUT_SQUARE / square)
    return layer
