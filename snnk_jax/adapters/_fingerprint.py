"""What a base model is, in one hash."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax._arguments import check_pattern
from snnk_jax._files import hash_array
from snnk_jax.nn import AdapterParam, InputStatistic, RandomProjection
from snnk_jax.surgery import path_name

_WRAPPERS = ("base_module",)
# What is no weight of a base model: of adapters, or changed by calls.
FOREIGN = (AdapterParam, RandomProjection, InputStatistic)
_PASSING = (nnx.RngState, nnx.Intermediate, nnx.Cache, nnx.Perturbation)


def fingerprint(model: nnx.Module, *, exclude: str = "head/.*") -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of what a model itself holds.

    Those are parameters, batch statistics and arrays of other kinds. Adapter
    parameters, random projections, random streams, caches and what ``exclude`` matches
    are left out, and a wrapper's ``base_module`` does not show in the names: a base
    model and its adapted clone have the same fingerprint as long as only adapters and
    head train. What is no array does not count: two models of the same weights that
    differ in an activation, the number of heads or an epsilon have one fingerprint.

    Args:
      model: any NNX model.
      exclude: regular expression for whole parameter paths, ``/``-joined. The default
        leaves out the head, which belongs to the task.

    Raises:
      ValueError: if two arrays have one name but for ``base_module``, or ``exclude`` is
        no regular expression.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> len(snnk.adapters.fingerprint(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
      64
    """
    pattern = check_pattern("exclude", exclude)
    sha = hashlib.sha256()
    rows = {}
    for path, variable in held(model):
        name = base_name(path)
        if isinstance(variable, FOREIGN) or pattern.fullmatch(name):
            continue
        if name in rows:
            raise ValueError(
                "arrays of model must have names that differ by more than base_module. "
                f"Got {name} twice."
            )
        rows[name] = np.asarray(variable[...])
    for name in sorted(rows):
        hash_array(sha, name, rows[name])
    return sha.hexdigest()


def held(model: nnx.Module) -> list[tuple[str, Any]]:
    """Paths and variables of a model but for what its calls change."""
    return [
        (path_name(parts), variable)
        for parts, variable in nnx.to_flat_state(nnx.state(model))
        if not isinstance(variable, _PASSING)
        and not jnp.issubdtype(variable.dtype, jax.dtypes.prng_key)
    ]


def base_name(name: str) -> str:
    """A path as it is in the base model, without the wrappers around."""
    return "/".join(part for part in name.split("/") if part not in _WRAPPERS)
