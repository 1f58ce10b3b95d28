"""Feature vectors before an affine layer is applied to them.

A convolution puts the features of all positions of its filter side by side. What
follows mostly wants random projections of that, or its norm: both are computed without
forming it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax.infinite import _layers, _positions
from snnk_jax.typing import Array

Precision = Any


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Features ``[n, *positions, a]`` and the affine layer that they still go through.

    Attributes:
      array: the features.
      layer: a Dense or Conv to be applied, or None.
      exact: whether they are free of randomness, and so worth a copy as they are.
      bias: whether the bias of the layer belongs to them.
      energy: the squared norm of ``array`` that inputs of mean square one have, or
        about that; only numbers of columns depend on it.
    """

    array: Array
    layer: _layers.Dense | _layers.Conv | None = None
    exact: bool = False
    bias: bool = True
    energy: float = 1.0

    @property
    def after(self) -> float:
        """The energy after the layer."""
        w_std = 1.0 if self.layer is None else self.layer.w_std
        return self.energy * w_std**2 + self.offset**2

    @property
    def taps(self) -> int:
        """Positions of the filter."""
        conv = self.layer if isinstance(self.layer, _layers.Conv) else None
        return math.prod(conv.filter_shape) if conv else 1

    @property
    def width(self) -> int:
        """Columns of :func:`explicit`."""
        return self.taps * self.array.shape[-1] + (self.offset > 0)

    @property
    def offset(self) -> float:
        """The constant that the bias adds, as a column of its own."""
        return self.layer.b_std if self.layer is not None and self.bias else 0.0

    @property
    def scale(self) -> float:
        return 1.0 if self.layer is None else self.layer.w_std / math.sqrt(self.taps)


def square_norm(vectors: Sequence[Vectors]) -> Array:
    """Squared norms ``[n, *positions]`` of vectors side by side."""
    total: Any = 0
    for v in vectors:
        p = jnp.sum(v.array * v.array, axis=-1)
        if isinstance(v.layer, _layers.Conv):
            conv: Any = v.layer
            axes = tuple(range(1, p.ndim))
            window = (conv.filter_shape, conv.strides, conv.padding)
            p = _positions.window_mean(p, *window, axes)
        p = p * (1.0 if v.layer is None else v.layer.w_std**2)
        total = total + p + v.offset**2
    return total


def explicit(v: Vectors) -> Array:
    """The vectors after their layer, ``[n, *positions, width]``."""
    x = v.array
    if isinstance(v.layer, _layers.Conv):
        x = _patches(x, v.layer)
    x = x * v.scale
    if v.offset:
        ones = jnp.full((*x.shape[:-1], 1), v.offset, x.dtype)
        x = jnp.concatenate([x, ones], axis=-1)
    return x


def _patches(x: Array, conv: _layers.Conv) -> Array:
    """The positions of the filter side by side, the first one first."""
    x = _pad(x, conv)
    strides: Any = conv.strides
    parts = []
    for shift in np.ndindex(*conv.filter_shape):
        part = x
        for axis, (offset, window, stride) in enumerate(
            zip(shift, conv.filter_shape, strides, strict=True), 1
        ):
            stop = x.shape[axis] - window + offset + 1
            part = jax.lax.slice_in_dim(part, offset, stop, stride, axis)
        parts.append(part)
    return jnp.concatenate(parts, axis=-1)


def project(
    vectors: Sequence[Vectors], rows: Array, precision: Precision = None
) -> Array:
    """Products of vectors side by side with ``rows [m, sum of widths]``."""
    edges = np.cumsum([v.width for v in vectors])[:-1]
    total: Any = 0
    for v, own in zip(vectors, jnp.split(rows, edges, axis=1), strict=True):
        if v.offset:
            constant = v.offset * own[:, -1]
            own = own[:, :-1]
            total = total + constant.reshape((1,) * (v.array.ndim - 1) + (-1,))
        total = total + _apply(v, own * v.scale, precision)
    return total


def _apply(v: Vectors, rows: Array, precision: Precision) -> Array:
    """Products with the array alone; a convolution is one product of all patches."""
    x = v.array
    if not isinstance(v.layer, _layers.Conv):
        return jnp.matmul(x, rows.T, precision=precision)
    # Products of widths that are no multiple of 8 leave a GPU's tensor cores idle.
    gap = -x.shape[-1] % 8
    rows = rows.reshape(-1, v.taps, x.shape[-1])
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, gap)]).reshape(len(rows), -1)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, gap)])
    return jnp.matmul(_patches(x, v.layer), rows.T, precision=precision)


def _pad(x: Array, conv: _layers.Conv) -> Array:
    strides: Any = conv.strides
    pads = [
        _positions.margins(extent, window, stride, conv.padding)
        for extent, window, stride in zip(
            x.shape[1:-1], conv.filter_shape, strides, strict=True
        )
    ]
    mode = "wrap" if conv.padding == "CIRCULAR" else "constant"
    return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode=mode)
