"""Kernels over the devices of a mesh: each computes its share of the blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from snnk_jax.infinite import _kernel, _layers
from snnk_jax.typing import Array

_P = jax.sharding.PartitionSpec


def compute(
    net: _layers.Layer,
    names: tuple[str, ...],
    size: int,
    mesh: jax.sharding.Mesh,
    x1: Array,
    x2: Array | None,
) -> list[Array]:
    """Kernels with their rows shared out over all devices, see :func:`.kernel`."""
    # Zeros are inputs like any other; their rows and columns are cut off again.
    rows = _padded(x1, mesh.size)
    if x2 is None:
        values = _compiled(net, names, size, mesh, True)(rows)
        return [value[: len(x1), : len(x1)] for value in values]
    values = _compiled(net, names, size, mesh, False)(rows, x2)
    return [value[: len(x1)] for value in values]


@functools.lru_cache(maxsize=64)
def _compiled(
    net: _layers.Layer,
    names: tuple[str, ...],
    size: int,
    mesh: jax.sharding.Mesh,
    same: bool,
) -> Any:
    axes = mesh.axis_names
    if same:
        body = functools.partial(_ring, net, names, size, axes, mesh.size)
        inputs: Any = _P(axes)
    else:
        body = functools.partial(_kernel.rectangular, net, names, size)
        inputs = _P(axes), _P()
    sharded = jax.shard_map(
        body, mesh=mesh, in_specs=inputs, out_specs=_P(axes), check_vma=False
    )
    return jax.jit(sharded)


def _ring(
    net: _layers.Layer,
    names: tuple[str, ...],
    size: int,
    axes: tuple[str, ...],
    num: int,
    x: Array,
) -> list[Array]:
    """Rows of one device: its own block, and half of the others'.

    Device i computes the columns of i + 1, ..., i + num / 2 around the ring and sends
    each block, transposed, to the device whose rows it is part of.
    """
    here = jax.lax.axis_index(axes)
    n = len(x)
    out = [jnp.zeros((n, num * n), x.dtype) for _ in names]

    def write(out: list[Array], values: list[Array], device: Array) -> list[Array]:
        start = device % num * n
        return [
            jax.lax.dynamic_update_slice(whole, value, (jnp.zeros_like(start), start))
            for whole, value in zip(out, values, strict=True)
        ]

    out = write(out, _kernel.symmetric(net, names, size, x), here)
    there = x
    for k in range(1, num // 2 + 1):
        there = _shift(there, axes, num, -1)
        values = _kernel.rectangular(net, names, size, x, there)
        out = write(out, values, here + k)
        if 2 * k < num:
            turned = [_shift(value.T, axes, num, k) for value in values]
            out = write(out, turned, here - k)
    return out


def _shift(x: Array, axes: tuple[str, ...], num: int, by: int) -> Array:
    """Sends x to the device ``by`` places further on the ring."""
    return jax.lax.ppermute(x, axes, [(i, (i + by) % num) for i in range(num)])


def _padded(x: Array, num: int) -> Array:
    more = -len(x) % num
    return jnp.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)])
