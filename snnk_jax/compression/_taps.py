"""Reading what flows through a model, at places named by path."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax.surgery import SwapRule, find_modules, swap_modules

Apply = Callable[[Any, Any], Any]
"""``apply(model, batch)`` returns the model's outputs."""


class Seen(nnx.Variable):
    """What a :class:`Tap` saw; lives as long as one traced call."""


class Tap(nnx.Module):
    """Calls a module and keeps its first argument and what it returns.

    Args:
      base_module: the module.
      name: under which the reading is returned.
    """

    def __init__(self, base_module: nnx.Module, name: str):
        self.base_module = base_module
        self.name = name
        self.x = Seen(jnp.zeros(()))
        self.y = Seen(jnp.zeros(()))
        self.shift = Seen(jnp.zeros(()))
        self.calls = 0

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = self.base_module(x, *args, **kwargs)
        shift = self.shift[...]
        if shift.shape:
            y = y + shift.astype(y.dtype)
        self.calls += 1
        # New variables: those of the last call had other shapes.
        self.x, self.y = Seen(x), Seen(y)
        return y


def call(model: Any, batch: Any) -> Any:
    """The default ``apply``: a mapping is keywords, a tuple or list are arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def place(model: nnx.Module, modules: Mapping[str, Any]) -> Any:
    """Puts modules at paths of a model, on a clone."""
    if not modules:
        return nnx.clone(model)
    rules = [
        SwapRule(path=re.escape(name), build=lambda _, rngs, new=new: new)
        for name, new in modules.items()
    ]
    return swap_modules(model, rules, rngs=nnx.Rngs(0))[0]


class Reader:
    """Runs a model, and returns what went in and out of some of its modules.

    Args:
      model: any NNX model.
      names: paths of the modules.
      apply: how it is called on a batch.

    ``state`` holds the model's arrays: what it returns is a pure function of them, to
    be called inside of other compiled functions. What is not used of its results is
    not computed there.
    """

    def __init__(self, model: nnx.Module, names: Iterable[str], apply: Apply = call):
        self.names = tuple(dict.fromkeys(names))
        wanted = set(self.names)

        def wrap(parts: tuple[Any, ...], node: Any) -> Any:
            name = "/".join(map(str, parts))
            if name in wanted and isinstance(node, nnx.Module):
                return Tap(node, name)
            return node

        # Not by swap_modules, which takes no modules inside of one another.
        tapped = nnx.recursive_map(wrap, nnx.clone(model))
        self._apply = apply
        self._graphdef, self.state = nnx.split(tapped)
        self._shifts = {
            module.name: (*_parts(path), "shift")
            for path, module in find_modules(tapped).items()
            if isinstance(module, Tap)
        }

    def __call__(
        self, state: Any, batch: Any, shifts: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, tuple[Any, Any]]]:
        """Outputs, and by name the input and the output of the modules.

        Args:
          state: ``reader.state``.
          batch: what ``apply`` takes.
          shifts: added to the outputs of some of the modules.
        """
        if shifts:
            flat = dict(nnx.to_flat_state(state))
            for name, shift in shifts.items():
                path = self._shifts[name]
                flat[path] = flat[path].replace(shift)
            state = nnx.from_flat_state(flat.items())
        model = nnx.merge(self._graphdef, state)
        outputs = self._apply(model, batch)
        found = find_modules(model).values()
        taps = {m.name: m for m in found if isinstance(m, Tap)}
        for name, tap in taps.items():
            if tap.calls != 1:
                raise ValueError(
                    "a block's modules must be called once, with an array first, when "
                    f"the model runs. Got {tap.calls} calls of {name!r}."
                )
        return outputs, {n: (tap.x[...], tap.y[...]) for n, tap in taps.items()}


def _parts(path: str) -> tuple[str | int, ...]:
    return tuple(int(p) if p.isdigit() else p for p in path.split("/") if p)


def rows(values: Any) -> jax.Array:
    """Leading axes as one: ``[*b, d]`` to ``[n, d]``, float32 or better."""
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return values.reshape(-1, values.shape[-1]).astype(dtype)


def token_weights(
    weights: Callable[[Any], Any] | None, batch: Any, shape: tuple[int, ...]
) -> jax.Array:
    """The weight of every row of ``[*b, d]`` values; one without ``weights``."""
    if weights is None:
        return jnp.ones(int(np.prod(shape[:-1])), jnp.float32)
    values = jnp.asarray(weights(batch)).astype(jnp.float32)
    if values.shape != shape[:-1]:
        raise ValueError(
            f"weights must have the shape of the tokens, {shape[:-1]}. "
            f"Got {values.shape}."
        )
    return values.reshape(-1)
