"""The exact variance of each unit, example by example: the diagonal of the NNGP."""

import functools
from typing import Any

import jax.numpy as jnp

from snnk_jax.infinite import _duals, _layers, _positions
from snnk_jax.typing import Array, Float


def input_variance(x: Float[Array, "n *s d"]) -> Float[Array, "n *s"]:
    """Computes the mean square of the channels, at each position."""
    return jnp.mean(x * x, axis=-1)


@functools.singledispatch
def variance(layer: _layers.Layer, p: Any) -> Any:
    """Computes the variances after a layer from those before it.

    Args:
      layer: any but the pools, whose variances depend on the covariances between
        positions.
      p: variances, [n, *positions]; a tuple of them where branches are open.

    Raises:
      ValueError: for a pooling layer.
    """
    raise ValueError(f"layer must not mix positions by a mean. Got {layer}.")


@variance.register
def _(layer: _layers.Dense, p: Array) -> Array:
    return layer.w_std**2 * p + layer.b_std**2


@variance.register
def _(layer: _layers.Activation, p: Array) -> Array:
    return _duals.diagonal(layer.activation, p)


@variance.register
def _(layer: _layers.Conv, p: Array) -> Array:
    axes = tuple(range(1, p.ndim))
    mean = _positions.window_mean(
        p, layer.filter_shape, layer.strides or (), layer.padding, axes
    )
    return layer.w_std**2 * mean + layer.b_std**2


@variance.register
def _(layer: _layers.Flatten, p: Array) -> Array:
    return jnp.mean(p, axis=tuple(range(1, p.ndim)))


@variance.register
def _(layer: _layers.LayerNorm, p: Array) -> Array:
    return jnp.where(p > 0, jnp.ones_like(p), 0)


@variance.register
def _(layer: _layers.Identity, p: Any) -> Any:
    return p


@variance.register
def _(layer: _layers.FanOut, p: Array) -> tuple[Array, ...]:
    return (p,) * layer.num


@variance.register
def _(layer: _layers.FanInSum, p: tuple) -> Array:
    return functools.reduce(jnp.add, p)


@variance.register
def _(layer: _layers.Residual, p: Array) -> Array:
    return p + variance(layer.branch, p)


@variance.register
def _(layer: _layers.Serial, p: Any) -> Any:
    for inner in layer.layers:
        p = variance(inner, p)
    return p


@variance.register
def _(layer: _layers.Parallel, p: tuple) -> tuple:
    return tuple(variance(inner, q) for inner, q in zip(layer.layers, p, strict=True))
