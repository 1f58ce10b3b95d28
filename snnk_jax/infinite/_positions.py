"""Means over windows of positions, along one axis or two axes in step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from snnk_jax.infinite._layers import Padding
from snnk_jax.typing import Array


def margins(extent: int, window: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Positions that are added before and after an axis, as in Flax.

    Raises:
      ValueError: if no window fits.
    """
    if padding == "VALID":
        if extent < window:
            raise ValueError(
                f"positions must be at least the window {window}. Got {extent}."
            )
        return 0, 0
    if padding == "CIRCULAR":
        low = (window - 1) // 2
        if window - 1 - low > extent:
            raise ValueError(
                f"positions must be at least half of the circular window {window}. "
                f"Got {extent}."
            )
        return low, window - 1 - low
    total = max((-(-extent // stride) - 1) * stride + window - extent, 0)
    return total // 2, total - total // 2


def window_mean(
    x: Array,
    shape: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    *axes: Sequence[int],
) -> Array:
    """Averages over windows; positions outside count as zeros.

    Args:
      x: any array.
      shape: extents of the window.
      strides: steps of the window.
      padding: ``"SAME"``, ``"VALID"`` or ``"CIRCULAR"``.
      *axes: the axes of x that the window moves along. Two groups of axes move in step:
        the mean is over the diagonal of pairs of positions, as a filter sees them.

    Raises:
      ValueError: if the window has another number of axes than x, or does not fit.
    """
    for group in axes:
        if len(group) != len(shape):
            raise ValueError(
                f"window must have one extent for each of the {len(group)} spatial "
                f"axes. Got {tuple(shape)}."
            )
    size = 1
    for extent, stride, *together in zip(shape, strides, *axes, strict=True):
        x = _window_sum(x, extent, stride, padding, together)
        size *= extent
    return x / size


def _window_sum(
    x: Array, window: int, stride: int, padding: Padding, together: Sequence[int]
) -> Array:
    pads = [(0, 0)] * x.ndim
    for axis in together:
        pads[axis] = margins(x.shape[axis], window, stride, padding)
    if any(pad != (0, 0) for pad in pads):
        x = jnp.pad(x, pads, mode="wrap" if padding == "CIRCULAR" else "constant")
    total = None
    for offset in range(window):
        part = x
        for axis in together:
            stop = x.shape[axis] - window + offset + 1
            part = jax.lax.slice_in_dim(part, offset, stop, stride, axis)
        total = part if total is None else total + part
    assert total is not None
    return total
