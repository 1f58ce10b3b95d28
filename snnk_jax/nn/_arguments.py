"""Checks of what layers and adapters are made of and called with."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax.features import FeatureMap
from snnk_jax.typing import Array


def check_features(features: Any, rngs: Any) -> None:
    """Raises ValueError for what is no feature map, or no random streams."""
    if not isinstance(features, FeatureMap):
        raise ValueError(
            "features must be a feature map of snnk_jax.features, such as "
            f"ArcCosine(num_features=64). Got {features!r}."
        )
    check_rngs(rngs)


def check_rngs(rngs: Any) -> None:
    """Raises ValueError for what is no random streams, a key for instance."""
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs must be nnx.Rngs. Got {rngs!r}.")


def float_dtype(what: str, dtype: Any) -> Any:
    """One spelling of a floating dtype, so that equal layers compile once; or None.

    Raises:
      ValueError: for a name of no dtype, and for integers.
    """
    if dtype is None:
        return None
    try:
        known = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"{what} must be a dtype. Got {dtype!r}.") from error
    if not jnp.issubdtype(known, np.floating):
        raise ValueError(f"{what} must be floating-point. Got {known}.")
    return known


def check_width(x: Array, dim: int) -> None:
    """Raises ValueError for inputs of another width: one of 1 would be broadcast."""
    shape = getattr(x, "shape", None)
    if not shape or shape[-1] != dim:
        found = type(x).__name__ if shape is None else f"shape {shape}"
        raise ValueError(f"inputs must be an array of width {dim}. Got {found}.")


def check_inputs(x: Array, dim: int) -> None:
    """The same, and for what is not floating-point."""
    check_width(x, dim)
    if not jnp.issubdtype(x.dtype, np.floating):
        raise ValueError(f"inputs must be floating-point. Got {x.dtype}.")
