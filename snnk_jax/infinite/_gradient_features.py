"""Gradients of a finite network as features of the NTK: the baseline."""

from typing import Any

import jax
import jax.numpy as jnp

from snnk_jax.infinite import _finite, _layers
from snnk_jax.typing import Array, Params, PRNGKeyArray


def width_for(
    net: _layers.Layer, input_shape: tuple[int, ...], num_features: int
) -> int:
    """The largest width of a network of at most so many parameters.

    Raises:
      ValueError: if a network of width 1 has more.
    """

    def size(width: int) -> int:
        init = _finite.finite(net, width).init
        shapes = jax.eval_shape(lambda key: init(key, input_shape), jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    if size(1) > num_features:
        raise ValueError(
            f"num_features must be at least {size(1)}, the parameters of a network of "
            f"width 1. Got {num_features}."
        )
    low, high = 1, num_features + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= num_features else (low, middle)
    return low


def gradient_features(
    net: _layers.Layer, x: Array, num_features: int, draw: Any
) -> Array:
    """Gradients of a scalar output with respect to all parameters, zeros behind them.

    The width is the largest whose parameters ``num_features`` holds. References: Arora
    et al., "On Exact Computation with an Infinitely Wide Neural Net", arXiv 1904.11955.
    """
    shape = x.shape[1:]
    init, apply = _finite.finite(net, width_for(net, shape, num_features))

    def parameters(key: PRNGKeyArray) -> Params:
        return init(key, shape)

    def gradient(one: Array) -> Array:
        grads = jax.grad(lambda p: apply(p, one[None]).reshape(()))(params)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    params = draw(parameters)
    columns = jax.vmap(gradient)(x)
    return jnp.pad(columns, [(0, 0), (0, num_features - columns.shape[1])])
