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
        # NumPy's, which the switch for strict promotion leaves alone.
        wide = np.promote_types(x.dtype, self.mean.dtype)
        z = x.astype(wide).reshape(-1, x.shape[-1])
        weight = self._weight(x.shape[:-1]).astype(wide).reshape(-1, 1)
        count = jnp.sum(weight)
        # About a row that counts: a coordinate that never changes is then exactly zero.
        row = z[jnp.argmax(weight > 0)]
        offset = jnp.sum(weight * (z - row[None]), 0) / count
        mean = row + offset
        variance = jnp.sum(weight * (z - row[None] - offset[None]) ** 2, 0) / count
        # Values of one or two units in the last place are rounding: nothing is to be
        # made of it.
        rounding = float(jnp.finfo(x.dtype).eps) * jnp.abs(mean)
        variance = jnp.where(jnp.sqrt(variance) > rounding, variance, 0)
        count, mean, variance = (
            a.astype(self.mean.dtype) for a in (count, mean, variance)
        )
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

    def _weight(self, shape: tuple[int, ...]) -> Array:
        if self.where is None:
            return jnp.ones(shape)
        given = self.where.shape + (1,) * (len(shape) - self.where.ndim)
        if len(given) != len(shape) or any(
            own not in (1, size) for own, size in zip(given, shape, strict=True)
        ):
            raise ValueError(
                f"where must be over leading axes of the adapters' inputs, {shape}. "
                f"Got {self.where.shape}."
            )
        return jnp.broadcast_to(self.where.reshape(given), shape)

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
        an input was not finite, or ``where`` does not fit the inputs of an adapter.

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
    # Random streams are used up inside of the program.
    streams = {k: v for k, v in kwargs.items() if isinstance(v, nnx.Rngs)}
    options = {k: v for k, v in kwargs.items() if k not in streams}
    streamdef, words = nnx.split(streams)

    @jax.jit
    def measure(state: Any, args: Any, words: Any) -> Any:
        model = nnx.merge(graphdef, state, copy=True)
        model(*args, **options, **nnx.merge(streamdef, words, copy=True))
        return nnx.state(model, InputStatistic)

    measured = measure(state, args, words)
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
