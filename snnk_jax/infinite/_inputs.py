"""The first kernel, and the gap between inputs that nearly point the same way."""

import jax
import jax.numpy as jnp

from snnk_jax.infinite._propagate import State, snapped_gap
from snnk_jax.typing import Array

# Below this gap the angle comes from differences of coordinates, not of products.
_NEAR = 0.01
_FEW_CHANNELS = 16
# Up to here all differences cost less than to look for the near pairs.
_MANY_CHANNELS = 64
_HIGHEST = jax.lax.Precision.HIGHEST


def input_state(
    x1: Array, x2: Array, twins: Array | None, pairs: bool, ntk: bool
) -> State:
    """Computes the kernels of the inputs themselves: products of channels, averaged.

    Args:
      x1: [a, *positions, d].
      x2: [b, *positions, d].
      twins: [a, b], whether the two are the same input, or None if none are.
      pairs: whether to compute all pairs of positions.
      ntk: whether to carry the tangent kernel, which is zero so far.
    """
    num = x1.ndim - 2
    if pairs and num:
        return _pairs(x1, x2, ntk)
    channels = x1.shape[-1]
    if num:
        positions = tuple(range(1, num + 1))
        dims = ((x1.ndim - 1,), (x2.ndim - 1,)), (positions, positions)
        q = jax.lax.dot_general(x1, x2, dims, precision=_HIGHEST) / channels
        q = jnp.moveaxis(q, (num, num + 1), (0, 1))
    else:
        q = jnp.matmul(x1, x2.T, precision=_HIGHEST) / channels
    var1, var2 = (jnp.mean(x * x, axis=-1) for x in (x1, x2))
    gap = jax.lax.stop_gradient(_gap(x1, x2, var1, var2, q, twins))
    return State(q, jnp.zeros_like(q) if ntk else None, gap, var1, var2, pairs=False)


def _pairs(x1: Array, x2: Array, ntk: bool) -> State:
    num, channels = x1.ndim - 2, x1.shape[-1]
    q = jnp.tensordot(x1, x2, axes=(-1, -1), precision=_HIGHEST) / channels
    q = jnp.moveaxis(q, num + 1, 1)
    own = (((x1.ndim - 1,), (x1.ndim - 1,)), ((0,), (0,)))
    var1, var2 = (
        jax.lax.dot_general(x, x, own, precision=_HIGHEST) / channels for x in (x1, x2)
    )
    state = State(q, jnp.zeros_like(q) if ntk else None, q, var1, var2, pairs=True)
    ones = (1,) * num
    p, r = (jnp.mean(x * x, axis=-1) for x in (x1, x2))
    p = p.reshape((len(x1), 1, *x1.shape[1:-1], *ones))
    r = r.reshape((1, len(x2), *ones, *x2.shape[1:-1]))
    gap = snapped_gap(p, q, r)
    return State(q, state.ntk, gap, var1, var2, pairs=True)


def _gap(
    x1: Array, x2: Array, var1: Array, var2: Array, q: Array, twins: Array | None
) -> Array:
    """One minus the squared cosine, exact to rounding of the angle."""
    p, r = var1[:, None], var2[None]
    present = (p > 0) & (r > 0)
    units = [
        x
        * jnp.where(v > 0, jax.lax.rsqrt(jnp.where(v > 0, v * x.shape[-1], 1)), 0)[
            ..., None
        ]
        for x, v in ((x1, var1), (x2, var2))
    ]
    u, v = units[0][:, None], units[1][None]
    if x1.shape[-1] <= _FEW_CHANNELS:
        gap = _chordal(u, v)
    else:
        scale = jnp.where(present, jnp.sqrt(p), 1) * jnp.where(present, jnp.sqrt(r), 1)
        rho = q / scale
        gap = jnp.clip((1 - rho) * (1 + rho), 0, 1)
        near = (gap < _NEAR) & present
        if twins is not None:
            near &= ~_expand(twins, q.ndim)
        gap = _refined(u, v, gap, near)
    gap = jnp.where(present, gap, 1)
    if twins is not None:
        gap = jnp.where(_expand(twins, q.ndim) & present, 0, gap)
    return gap


def _expand(twins: Array, ndim: int) -> Array:
    return twins.reshape((*twins.shape, *(1,) * (ndim - 2)))


def _chordal(u: Array, v: Array) -> Array:
    """``|u - v|^2 |u + v|^2 / 4`` of unit vectors, the squared sine of their angle."""

    def add(k: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        a = jax.lax.dynamic_index_in_dim(u, k, u.ndim - 1, keepdims=False)
        b = jax.lax.dynamic_index_in_dim(v, k, v.ndim - 1, keepdims=False)
        return sums[0] + (a - b) ** 2, sums[1] + (a + b) ** 2

    shape = jnp.broadcast_shapes(u.shape[:-1], v.shape[:-1])
    zero = jnp.zeros(shape, u.dtype)
    channels = u.shape[-1]
    if channels <= _FEW_CHANNELS:
        sums = zero, zero
        for k in range(channels):
            a, b = u[..., k], v[..., k]
            sums = sums[0] + (a - b) ** 2, sums[1] + (a + b) ** 2
    else:
        sums = jax.lax.fori_loop(0, channels, add, (zero, zero), unroll=8)
    return jnp.clip(sums[0] * sums[1] / 4, 0, 1)


def _refined(u: Array, v: Array, gap: Array, near: Array) -> Array:
    """Computes the gap of near pairs anew: none, few of them, or all."""
    few = 16 * (near.shape[0] + near.shape[1])
    count = jnp.sum(near)

    def none() -> Array:
        return gap

    def some() -> Array:
        index = jnp.nonzero(near, size=min(few, near.size), fill_value=0)
        # Where there are fewer, the first entry is computed again and again.
        left = u[(index[0], 0, *index[2:])]
        right = v[(0, index[1], *index[2:])]
        exact = _chordal(left, right)
        old = gap[index]
        return gap.at[index].set(jnp.where(near[index], exact, old))

    def every() -> Array:
        return jnp.where(near, _chordal(u, v), gap)

    if u.shape[-1] <= _MANY_CHANNELS:
        return jax.lax.cond(count > 0, every, none)
    which = jnp.where(count == 0, 0, jnp.where(count <= few, 1, 2))
    return jax.lax.switch(which, [none, some, every])
