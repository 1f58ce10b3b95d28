"""What may be taken for ``x @ kernel + bias``, and samples of its inputs."""

from typing import Any, TypeGuard

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax.features._base import accumulation_dtype
from snnk_jax.typing import Array, Float


def is_plain(module: Any) -> TypeGuard[nnx.Linear]:
    """Whether a module is ``x @ kernel + bias`` and nothing more.

    A subclass with a call of its own (``nnx.LoRALinear``) is more, and one with a
    kernel for each layer of a scan less.
    """
    return (
        isinstance(module, nnx.Linear)
        and type(module).__call__ is nnx.Linear.__call__
        and module.kernel.ndim == 2
    )


def check_plain(what: str, module: Any) -> None:
    """Refuses what is no plain Linear.

    Raises:
      ValueError: says ``what`` must be one.
    """
    if not is_plain(module):
        kernel = getattr(module, "kernel", None)
        shape = "" if kernel is None else f" with a kernel {kernel.shape}"
        raise ValueError(
            f"{what} must be an nnx.Linear with the call of that class and a kernel of "
            f"two axes. Got {type(module).__name__}{shape}."
        )


def wider(a: Any, b: Any) -> Any:
    """A dtype in which numbers of both are themselves; float32 for two of 16 bits.

    NumPy's, which the switch for strict promotion leaves alone.
    """
    a, b = jnp.dtype(a), jnp.dtype(b)
    return a if a == b else np.promote_types(*map(accumulation_dtype, (a, b)))


def sample_rows(x: Float[Array, "*b d"], linear: nnx.Linear) -> Float[Array, "n d"]:
    """Sample inputs of a Linear as rows.

    Raises:
      ValueError: if they have another width.
    """
    if x.ndim < 1 or x.shape[-1] != linear.in_features:
        raise ValueError(
            f"x must hold inputs of width {linear.in_features}. Got shape {x.shape}."
        )
    return x.reshape(-1, linear.in_features)
