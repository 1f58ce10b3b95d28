"""Adapters folded into the weights, where that is exact."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax.features._base import accumulation_dtype
from snnk_jax.nn import Adapted, AdapterParam, DoRA, Scaled, VeRA
from snnk_jax.nn._linear import check_plain
from snnk_jax.nn._lowrank import add_change
from snnk_jax.surgery import find_modules, path_name
from snnk_jax.typing import Array, Float

_LINEAR = (nnx.LoRA, DoRA, VeRA, Scaled)
_PROBES = 64


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
      merged: paths of the Linears that took an adapter in.
      max_error: the largest difference between an adapted module and the merged one
        on standard normal inputs, divided by the largest output: rounding, to the dtype
        of the base.
    """

    merged: tuple[str, ...]
    max_error: float


def merge_adapters(model: nnx.Module) -> tuple[Any, MergeReport]:
    """Folds LoRA, DoRA, VeRA and IA3 into the Linears that they stand around.

    What they compute is linear in the input, so the merged model computes the same but
    for rounding, without their cost; it can no longer tell base and adapter apart.

    Args:
      model: a model with adapters; left as it is.

    Returns:
      The model with plain Linears, and a report with the largest error.

    Raises:
      ValueError: if an adapter is not linear (SNNK and bottleneck adapters): those
        stay modules of their own. Also if it stands around something else than a plain
        ``nnx.Linear``; its error is not finite; or rounding takes more than half of
        what it changes, as in a bfloat16 base of an adapter that was hardly trained.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> base = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      >>> def adapt(linear, rngs):
      ...     return snnk.nn.DoRA(linear, 2, rngs=rngs)
      >>> rule = snnk.SwapRule(path="layers/0", build=adapt)
      >>> model, _ = snnk.swap_modules(base, [rule], rngs=nnx.Rngs(1))
      >>> merged, report = snnk.adapters.merge_adapters(model)
      >>> report.merged, report.max_error < 1e-5
      (('layers/0',), True)
    """
    found = find_modules(model)
    refused = {
        name: type(module.adapter).__name__
        for name, module in found.items()
        if isinstance(module, Adapted)
    }
    if refused:
        raise ValueError(
            "only adapters that are linear maps of their input can be merged. "
            f"Got {refused}."
        )
    clone = nnx.clone(model)
    merged: dict[str, float] = {}

    def fold(parts: tuple[Any, ...], node: Any) -> Any:
        # A subclass may compute something else.
        if type(node) not in _LINEAR:
            return node
        name = path_name(tuple(part for part in parts if part != "base_module"))
        linear = _merged_linear(name, node)
        merged[name] = _checked_error(name, node, linear)
        return linear

    clone = nnx.recursive_map(fold, clone)
    left = [
        path_name(path)
        for path, variable in nnx.to_flat_state(nnx.state(clone, AdapterParam))
    ]
    if left or not merged:
        raise ValueError(
            "model must have LoRA, DoRA, VeRA or Scaled adapters and no others. "
            f"Got {left or 'none'}."
        )
    return clone, MergeReport(tuple(sorted(merged)), max(merged.values()))


def _merged_linear(name: str, adapter: Any) -> nnx.Linear:
    base = adapter.base_module
    check_plain(f"the module inside the adapter at {name}", base)
    kernel, bias = _lora(adapter) if isinstance(adapter, nnx.LoRA) else adapter.merged()
    # The adapter still computes with its base: the two are compared.
    linear = nnx.clone(base)
    linear.kernel[...] = kernel
    if linear.bias is not None:
        linear.bias[...] = bias
    return linear


def _lora(adapter: nnx.LoRA) -> tuple[Float[Array, "d o"], Float[Array, " o"] | None]:
    base: Any = adapter.base_module
    down, up = adapter.lora_a[...], adapter.lora_b[...]
    change = jnp.matmul(down, up, precision="highest")
    bias = None if base.bias is None else base.bias[...]
    return add_change(base.kernel[...], change), bias


def _checked_error(name: str, adapter: Any, linear: nnx.Linear) -> float:
    """The error of a merged Linear; refuses one that has lost its adapter."""
    dtype = accumulation_dtype(linear.kernel.dtype)
    x = jax.random.normal(jax.random.key(0), (_PROBES, linear.in_features), dtype)
    modules = (_widened(m, dtype) for m in (adapter, linear, adapter.base_module))
    expected, got, before = (np.asarray(m(x), np.float64) for m in modules)
    error, change = (np.max(np.abs(expected - y)) for y in (got, before))
    if not np.isfinite(error):
        raise ValueError(
            f"the adapter at {name} must return finite numbers to be merged. Got inf "
            "or NaN."
        )
    if error > change / 2:
        raise ValueError(
            f"merging must keep what the adapter at {name} changes, outputs by "
            f"{change:.2g}. Got an error of {error:.2g} by rounding to "
            f"{linear.kernel.dtype}; merge into a base of a wider dtype."
        )
    return float(error / max(np.max(np.abs(expected)), 1e-30))


def _widened(module: Any, dtype: Any) -> Any:
    """A clone that holds and computes floats of a dtype which hides no rounding."""
    graphdef, state = nnx.split(module)
    floats = jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, state
    )

    def widen(parts: tuple[Any, ...], node: Any) -> Any:
        for name in ("dtype", "preferred_element_type"):
            if isinstance(node, nnx.Module) and getattr(node, name, None) is not None:
                setattr(node, name, dtype)
        return node

    return nnx.recursive_map(widen, nnx.merge(graphdef, floats))
