"""Several adapters of one base model."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from snnk_jax._arguments import check_pattern
from snnk_jax.adapters._fingerprint import FOREIGN, base_name, fingerprint, held
from snnk_jax.adapters._store import describe_modules, load_adapter, save_adapter
from snnk_jax.nn import AdapterParam
from snnk_jax.surgery import SwapRule, path_name, swap_modules


class AdapterBank:
    """Named adapters that share the arrays of one base model.

    JAX arrays do not change, so an adapted model is a clone that holds the same base
    arrays: a bank of many costs one base model and the adapters. ``bank[name]`` is the
    model with that adapter, to be trained, called or jitted like any other.

    Args:
      base_model: the plain base model; left as it is.
      exclude: regular expression of the parameters that belong to the task (the head)
        and not to the base, for :func:`fingerprint`.

    Raises:
      ValueError: if the model has adapters, or ``exclude`` is no regular expression.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> base = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      >>> fm = snnk.features.ArcCosine(num_features=16)
      >>> def adapt(linear, rngs):
      ...     adapter = snnk.nn.SNNKAdapter(8, features=fm, rngs=rngs)
      ...     return snnk.nn.Adapted(linear, adapter)
      >>> bank = snnk.adapters.AdapterBank(base)
      >>> rules = [snnk.SwapRule(path="layers/0", build=adapt)]
      >>> for i, task in enumerate(("sst2", "mrpc")):
      ...     _ = bank.add(task, rules, rngs=nnx.Rngs(i))
      >>> list(bank), type(bank["mrpc"].layers[0]).__name__
      (['sst2', 'mrpc'], 'Adapted')
    """

    def __init__(self, base_model: nnx.Module, *, exclude: str = "head/.*"):
        check_pattern("exclude", exclude)
        if jax.tree.leaves(nnx.state(base_model, AdapterParam)):
            raise ValueError("base_model must have no adapters. Got one that has.")
        self._base = base_model
        self._exclude = exclude
        self._fingerprint = fingerprint(base_model, exclude=exclude)
        self._models: dict[str, Any] = {}

    @property
    def base(self) -> Any:
        """The model without adapters."""
        return self._base

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def __getitem__(self, name: str) -> Any:
        """The base model with an adapter."""
        self._check_known(name)
        return self._models[name]

    def add(self, name: str, rules: Sequence[SwapRule], *, rngs: nnx.Rngs) -> Any:
        """Puts a new adapter into the bank by rules, and returns its model.

        Raises:
          ValueError: if there is one of that name, or a rule matches nothing.
        """
        self._check_new(name)
        self._models[name] = swap_modules(self._base, rules, rngs=rngs)[0]
        return self._models[name]

    def replace(self, name: str, model: nnx.Module) -> None:
        """Keeps a clone of a model that was trained as one of the bank.

        It holds the arrays of the bank's base, whatever copies the model has.

        Raises:
          ValueError: if there is no such adapter, the model has other adapters, or
            other parameters than adapters and head were trained.
        """
        self._check_known(name)
        kept, given = (_adapters(m) for m in (self._models[name], model))
        different = sorted(
            path for path in kept | given if kept.get(path) != given.get(path)
        )
        if different:
            raise ValueError(
                f"model must have the adapters of {name!r}. Got others at {different}."
            )
        found = fingerprint(model, exclude=self._exclude)
        if found != self._fingerprint:
            raise ValueError(
                f"model must have the base's parameters, fingerprint "
                f"{self._fingerprint}. Got {found}."
            )
        base = {base_name(path): variable[...] for path, variable in held(self._base)}
        graphdef, state = nnx.split(model)
        flat = []
        for parts, variable in nnx.to_flat_state(state):
            path = base_name(path_name(parts))
            own = not isinstance(variable, FOREIGN) and path in base
            if own and not re.fullmatch(self._exclude, path):
                variable = variable.replace(base[path])
            flat.append((parts, variable))
        self._models[name] = nnx.merge(graphdef, nnx.from_flat_state(flat))

    def remove(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
          ValueError: if there is none of that name.
        """
        self._check_known(name)
        del self._models[name]

    def save(self, name: str, path: str | os.PathLike[str], **options: Any) -> int:
        """Writes one adapter to a file; see :func:`save_adapter`."""
        return save_adapter(
            path,
            self[name],
            base_fingerprint=self._fingerprint,
            exclude=self._exclude,
            **options,
        )

    def load(self, name: str, path: str | os.PathLike[str]) -> Any:
        """Adds an adapter from a file, and returns its model; see :func:`load_adapter`.

        Raises:
          ValueError: if there is one of that name, the file is of another base, or
            holds more than adapters and what the bank excludes.
        """
        self._check_new(name)
        model = load_adapter(path, self._base)
        if fingerprint(model, exclude=self._exclude) != self._fingerprint:
            raise ValueError(
                "the bank must be made with an exclude that covers all the file holds "
                f"besides adapters. Got {self._exclude!r} for {path}."
            )
        self._models[name] = model
        return model

    def _check_known(self, name: str) -> None:
        if name not in self._models:
            raise ValueError(
                f"adapter must be one of {list(self._models)}. Got {name!r}."
            )

    def _check_new(self, name: str) -> None:
        if name in self._models:
            raise ValueError(
                f"adapter must have a new name. Got {name!r}, there is one already."
            )


def _adapters(model: nnx.Module) -> dict[str, Any]:
    """What adapters there are: their settings, and the shapes of what they train."""
    flat = nnx.to_flat_state(nnx.state(model, AdapterParam))
    shapes = {path_name(p): (v.shape, jnp.dtype(v.dtype).name) for p, v in flat}
    settings: dict[str, list[Any]] = {}
    for spec in describe_modules(model):
        settings.setdefault(spec["at"], []).append(spec)
    return shapes | settings
