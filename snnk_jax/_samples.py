"""Sample inputs that a layer is measured on or fitted to."""

import jax.numpy as jnp
import numpy as np

from snnk_jax.kernels import check_layer
from snnk_jax.typing import Array


def check_samples(x: Array, kernel: Array, bias: Array | None = None) -> None:
    """Raises ValueError unless ``x`` is rows of finite inputs of a finite layer."""
    check_rows(x, "x")
    check_layer(x, kernel, bias)
    check_finite(x, "x")
    check_finite(kernel, "kernel")
    if bias is not None:
        check_finite(bias, "bias")


def check_rows(x: Array, what: str) -> None:
    """Raises ValueError unless there are rows and nothing but rows."""
    if x.ndim != 2 or not len(x):
        raise ValueError(
            f"{what} must be rows [n, d], at least one; reshape tokens to (-1, d). "
            f"Got {x.shape}."
        )


def check_finite(values: Array | np.ndarray, what: str) -> None:
    """Raises ValueError for infinities and NaN."""
    if not np.all(np.isfinite(np.asarray(values, np.float64))):
        raise ValueError(f"{what} must be finite. Got inf or NaN among them.")


def thinned(values: Array, count: int, axis: int = 0) -> Array:
    """At most ``count`` of the rows or columns, evenly spread."""
    return jnp.take(values, evenly(values.shape[axis], count), axis=axis)


def evenly(length: int, count: int) -> np.ndarray:
    """At most ``count`` indices below ``length``, evenly spread."""
    count = min(length, count)
    return np.arange(count) * length // count
