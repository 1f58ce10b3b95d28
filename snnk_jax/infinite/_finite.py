"""The same networks at a finite width, to see the limit approached."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snnk_jax import activations
from snnk_jax.infinite import _layers, _positions
from snnk_jax.typing import Array, Float, Params, PRNGKeyArray


class FiniteNetwork(NamedTuple):
    """A network of finite width as two pure functions.

    Attributes:
      init: ``init(key, shape)`` draws the parameters, standard normal, for inputs of
        ``shape = (*positions, channels)``.
      apply: ``apply(params, x)`` computes the outputs of a batch.
    """

    init: Callable[[PRNGKeyArray, tuple[int, ...]], Params]
    apply: Callable[[Params, Array], Array]


def finite(net: _layers.Layer, width: int, num_outputs: int = 1) -> FiniteNetwork:
    r"""Builds the finite network whose kernels tend to those of the infinite one.

    Its parameters are standard normal and scaled as they are used, by
    :math:`w\_std / \sqrt{fan\_in}` and :math:`b\_std`: the NTK parameterisation. The
    mean over draws of its empirical kernels (:func:`snnk_jax.infinite.empirical`)
    tends to the exact ones as 1 / width.

    Args:
      net: the layers.
      width: units, or channels, of every Dense and Conv but the last, and but the last
        of a branch that is added to one without any.
      num_outputs: those of a Dense that ends the network.

    Raises:
      ValueError: for numbers below 1, or an activation that is not a function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> net = snnk.infinite.serial(
      ...     snnk.infinite.Dense(), snnk.infinite.Activation("relu"),
      ...     snnk.infinite.Dense(),
      ... )
      >>> init, apply = snnk.infinite.finite(net, width=64, num_outputs=2)
      >>> apply(init(jax.random.key(0), (3,)), jnp.ones((5, 3))).shape
      (5, 2)
    """
    if width < 1 or num_outputs < 1:
        raise ValueError(
            f"width and num_outputs must be at least 1. Got {width} and {num_outputs}."
        )
    _layers.check_network(net)
    layers = net.layers if isinstance(net, _layers.Serial) else (net,)
    whole = _layers.Serial(layers)
    out = num_outputs if isinstance(layers[-1], _layers.Dense) else width

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Params:
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        return _init(whole, key, x, width, out)

    def apply(params: Params, x: Float[Array, "n *s d"]) -> Array:
        return _apply(whole, params, x)

    return FiniteNetwork(init, apply)


@functools.singledispatch
def _init(layer: _layers.Layer, key: Any, x: Any, width: int, out: int) -> Params:
    """Draws the parameters of a layer for inputs like x.

    Its last Dense or Conv has ``out`` units, the others ``width``.
    """
    del layer, key, x, width, out
    return ()


@functools.singledispatch
def _apply(layer: _layers.Layer, params: Params, x: Any) -> Any:
    del params, x
    raise ValueError(f"layer must have a finite counterpart. Got {layer!r}.")


def _draw(key: PRNGKeyArray, shape: tuple[int, ...]) -> Params:
    first, second = jax.random.split(key)
    return {
        "kernel": jax.random.normal(first, shape),
        "bias": jax.random.normal(second, shape[-1:]),
    }


def _bias(params: Params, y: Array, b_std: float) -> Array:
    bias = params["bias"].astype(y.dtype)
    return y + b_std * bias.reshape((1,) * (y.ndim - 1) + bias.shape)


@_init.register
def _(layer: _layers.Dense, key: Any, x: Any, width: int, out: int) -> Params:
    del layer, width
    return _draw(key, (x.shape[-1], out))


@_apply.register
def _(layer: _layers.Dense, params: Params, x: Array) -> Array:
    scale = layer.w_std / x.shape[-1] ** 0.5
    return _bias(params, scale * (x @ params["kernel"].astype(x.dtype)), layer.b_std)


@_init.register
def _(layer: _layers.Conv, key: Any, x: Any, width: int, out: int) -> Params:
    del width
    return _draw(key, (*layer.filter_shape, x.shape[-1], out))


@_apply.register
def _(layer: _layers.Conv, params: Params, x: Array) -> Array:
    kernel = params["kernel"].astype(x.dtype)
    scale = layer.w_std / kernel[..., 0].size ** 0.5
    x = _pad(layer, layer.filter_shape, x)
    letters = "hwxyz"[: len(layer.filter_shape)]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        layer.strides or (),
        "VALID",
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )
    return _bias(params, scale * y, layer.b_std)


def _pad(layer: Any, window: tuple[int, ...], x: Array) -> Array:
    if x.ndim != len(window) + 2:
        raise ValueError(
            f"inputs must have {len(window)} spatial axes for {layer!r}. Got {x.shape}."
        )
    pads = [(0, 0)]
    for extent, size, stride in zip(x.shape[1:-1], window, layer.strides, strict=True):
        pads.append(_positions.margins(extent, size, stride, layer.padding))
    mode = "wrap" if layer.padding == "CIRCULAR" else "constant"
    return jnp.pad(x, [*pads, (0, 0)], mode=mode)


@_apply.register
def _(layer: _layers.Activation, params: Params, x: Array) -> Array:
    if not isinstance(layer.activation, activations.Activation):
        raise ValueError(
            f"activation must be a function for a finite width. Got {layer.activation}."
        )
    return layer.activation(x)


@_apply.register
def _(layer: _layers.AvgPool, params: Params, x: Array) -> Array:
    axes = tuple(range(1, x.ndim - 1))
    return _positions.window_mean(
        x, layer.window_shape, layer.strides or (), layer.padding, axes
    )


@_apply.register
def _(layer: _layers.GlobalAvgPool, params: Params, x: Array) -> Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))


@_apply.register
def _(layer: _layers.Flatten, params: Params, x: Array) -> Array:
    return x.reshape((len(x), -1))


@_apply.register
def _(layer: _layers.LayerNorm, params: Params, x: Array) -> Array:
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


@_apply.register
def _(layer: _layers.Identity, params: Params, x: Any) -> Any:
    return x


@_apply.register
def _(layer: _layers.FanOut, params: Params, x: Array) -> tuple:
    return (x,) * layer.num


@_apply.register
def _(layer: _layers.FanInSum, params: Params, x: tuple) -> Array:
    return functools.reduce(jnp.add, x)


@_init.register
def _(layer: _layers.Residual, key: Any, x: Any, width: int, out: int) -> Params:
    del out
    return _init(layer.branch, key, x, width, x.shape[-1])


@_apply.register
def _(layer: _layers.Residual, params: Params, x: Array) -> Array:
    return x + _apply(layer.branch, params, x)


@_init.register
def _(layer: _layers.Serial, key: Any, x: Any, width: int, out: int) -> Params:
    params, keys = [], jax.random.split(key, len(layer.layers))
    free = [i for i, inner in enumerate(layer.layers) if _widens(inner)]
    for i, (inner, k) in enumerate(zip(layer.layers, keys, strict=True)):
        drawn = _init(inner, k, x, width, out if i in free[-1:] else width)
        params.append(drawn)
        x = jax.eval_shape(functools.partial(_apply, inner), drawn, x)
    return params


@_apply.register
def _(layer: _layers.Serial, params: Params, x: Any) -> Any:
    for inner, drawn in zip(layer.layers, params, strict=True):
        x = _apply(inner, drawn, x)
    return x


@_init.register
def _(layer: _layers.Parallel, key: Any, x: tuple, width: int, out: int) -> Params:
    keys = jax.random.split(key, len(layer.layers))
    params: list[Params] = [()] * len(keys)
    # A branch that keeps the width of what came before decides that of its neighbours.
    for i in sorted(range(len(keys)), key=lambda i: _widens(layer.layers[i])):
        inner = layer.layers[i]
        params[i] = _init(inner, keys[i], x[i], width, out)
        if not _widens(inner):
            like = jax.eval_shape(functools.partial(_apply, inner), params[i], x[i])
            out = like.shape[-1]
    return params


def _widens(layer: _layers.Layer) -> bool:
    """Whether the number of units after a layer is free."""
    if isinstance(layer, _layers.Serial):
        return any(_widens(inner) for inner in layer.layers)
    if isinstance(layer, _layers.Parallel):
        return all(_widens(inner) for inner in layer.layers)
    return isinstance(layer, _layers.Dense | _layers.Conv)


@_apply.register
def _(layer: _layers.Parallel, params: Params, x: tuple) -> tuple:
    parts = zip(layer.layers, params, x, strict=True)
    return tuple(_apply(inner, drawn, part) for inner, drawn, part in parts)
