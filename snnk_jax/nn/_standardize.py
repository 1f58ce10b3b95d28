"""Measures what the inputs of adapters are like."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax.features._base import accumulation_dtype
from snnk_jax.nn._adapter import SNNKAdapter
from snnk_jax.nn._variables import InputStatistic
from snnk_jax.surgery import find_modules, path_name
from snnk_jax.typing import Array


class _Measuring(nnx.Module):
    """Stands in for an adapter and measures the inputs of all its calls."""

    def __init__(self, adapter: SNNKAdapter, where: np.ndarray | Array | None):
        self.adapter = adapter
        self.where = nnx.data(None if where is None else jnp.asarray(where))
        dtype = accumulation_dtype(adapter.param_dtype)
        self.count = InputStatistic(jnp.zeros((), dtype))
        self.mean = InputStatistic(jnp.zeros((adapter.dim,), dtype))
        self.variance = InputStatistic(jnp.zeros((adapter.dim,), dtype))

    def delta(self, x: Array) -> Array:
        z = x.astype(self.mean.dtype)
        weight = jnp.ones(x.shape[:-1], z.dtype)
        if self.where is not None:
            shape = self.where.shape + (1,) * (x.ndim - 1 - self.where.ndim)
            weight = weight * self.where.reshape(shape).astype(z.dtype)
        axes = tuple(range(x.ndim - 1))
        count = jnp.sum(weight)
        mean = jnp.sum(weight[..., None] * z, axes) / count
        centred = z - mean.reshape((1,) * len(axes) + (-1,))
        variance = jnp.sum(weight[..., None] * centred**2, axes) / count
        # With what earlier calls of a shared adapter measured, by Chan's formula.
        total = self.count[...] + count
        share = count / total
        step = mean - self.mean[...]
        self.mean[...] = self.mean[...] + share * step
        within = (1 - share) * self.variance[...] + share * variance
        self.variance[...] = within + share * (1 - share) * step**2
        self.count[...] = total
        self.settle()
        return self.adapter.delta(x)

    def settle(self) -> None:
        """Writes what was measured so far into the adapter."""
        variance = self.variance[...]
        # A coordinate that never changes carries nothing: it stays as small as it is.
        deviation = jnp.sqrt(jnp.where(variance > 0, variance, 1))
        for variable, value in zip(
            self.adapter.statistics, (self.mean[...], deviation), strict=True
        ):
            variable[...] = value.astype(variable.dtype)

    def __call__(self, x: Array) -> Array:
        return x + self.delta(x)


def standardize(
    model: nnx.Module,
    *args: Any,
    where: np.ndarray | Array | None = None,
    **kwargs: Any,
) -> Any:
    """Returns a clone whose adapters know the scales of their inputs.

    One call of the model on samples measures, for every
    :class:`~snnk_jax.nn.SNNKAdapter` made with ``standardize=True``, the mean and the
    standard deviation of each coordinate of its inputs, in all calls of one that
    several places share. Do it before training: adapters are the identity then, and the
    statistics those of the base model.

    Args:
      model: any NNX model.
      *args: arrays that the model is called with, a few hundred examples.
      where: which positions count, over the leading axes of the adapters' inputs: the
        padding mask of text.
      **kwargs: passed on to the model.

    Raises:
      ValueError: if no adapter asks for statistics, the model did not call one of them,
        or an input was not finite.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> fm = snnk.features.ArcCosine(num_features=16)
      >>> adapter = snnk.nn.SNNKAdapter(
      ...     8, features=fm, standardize=True, rngs=nnx.Rngs(0)
      ... )
      >>> x = 5 + 2 * jax.random.normal(jax.random.key(0), (500, 8))
      >>> mean, deviation = snnk.nn.standardize(adapter, x).statistics
      >>> float(mean[...].mean().round()), float(deviation[...].mean().round())
      (5.0, 2.0)
    """

    def asks(module: Any) -> bool:
        return isinstance(module, SNNKAdapter) and module.standardize

    names = {name for name, module in find_modules(model).items() if asks(module)}
    if not names:
        raise ValueError(
            "model must have an SNNKAdapter with standardize=True. Got none."
        )

    def blank(parts: tuple[Any, ...], node: Any) -> Any:
        return _Measuring(node, where) if path_name(parts) in names else node

    taps = nnx.recursive_map(blank, nnx.clone(model))
    graphdef, state = nnx.split(taps)

    @jax.jit
    def measure(state: Any, args: Any) -> Any:
        model = nnx.merge(graphdef, state, copy=True)
        model(*args, **kwargs)
        return nnx.state(model, InputStatistic)

    measured = measure(state, args)
    called = [
        leaf
        for path, leaf in nnx.to_flat_state(measured)
        if path[-1] == "count" and leaf[...] > 0
    ]
    finite = all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(measured))
    if len(called) < len(names) or not finite:
        raise ValueError(
            "inputs of every adapter must be measured and finite. Got a model that "
            f"calls only some of {sorted(names)}, or inputs that are not finite."
        )
    nnx.update(taps, measured)

    def unwrap(parts: tuple[Any, ...], node: Any) -> Any:
        return node.adapter if isinstance(node, _Measuring) else node

    return nnx.recursive_map(unwrap, taps)
