"""What each layer does to the exact kernels of two sets of inputs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from snnk_jax.infinite import _layers, _positions
from snnk_jax.infinite._duals import Pair, diagonal, dual, square_distance
from snnk_jax.typing import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["nngp", "ntk", "gap", "var1", "var2"],
    meta_fields=["pairs"],
)
@dataclasses.dataclass(frozen=True)
class State:
    """Kernels between a and b inputs at one layer.

    Spatial axes are those of equal positions, [a, b, h, w], or, below a pooling layer,
    those of all pairs of positions, [a, b, h, w, h', w'].

    Attributes:
      nngp: covariances.
      ntk: the neural tangent kernel, or None if nobody asked for it.
      gap: one minus the squared correlation, to full relative accuracy; with pairs
        of positions to the accuracy of the correlation.
      var1: variances of the first inputs, [a, *positions], or with pairs their
        covariances between positions, [a, *positions, *positions].
      var2: of the second.
      pairs: whether the positions are pairs.
    """

    nngp: Array
    ntk: Array | None
    gap: Array
    var1: Array
    var2: Array
    pairs: bool

    @property
    def spatial(self) -> int:
        """Number of spatial axes of an input."""
        axes = self.var1.ndim - 1
        return axes // 2 if self.pairs else axes


def pair_of(state: State) -> Pair:
    """Variances, covariance and gap, of equal rank."""
    num = state.spatial
    if not state.pairs:
        return Pair(state.var1[:, None], state.nngp, state.var2[None], state.gap)
    p, r = _variances(state.var1, num), _variances(state.var2, num)
    p = p.reshape((p.shape[0], 1, *p.shape[1:], *(1,) * num))
    r = r.reshape((1, r.shape[0], *(1,) * num, *r.shape[1:]))
    return Pair(p, state.nngp, r, state.gap)


def snapped_gap(p: Array, q: Array, r: Array) -> Array:
    """One minus the squared correlation; below rounding it is 0."""
    p, q, r = jax.tree.map(jax.lax.stop_gradient, (p, q, r))
    present = (p > 0) & (r > 0)
    scale = jnp.where(present, jnp.sqrt(p), 1) * jnp.where(present, jnp.sqrt(r), 1)
    rho = q / scale
    gap = jnp.clip((1 - rho) * (1 + rho), 0, 1)
    return jnp.where(present, _snap(gap), 1)


def diagonals(state: State) -> State:
    """Keeps of all pairs of positions the equal ones."""
    if not state.pairs:
        return state
    num = state.spatial
    q, ntk, gap = (
        None if x is None else _variances(x, num, lead=2)
        for x in (state.nngp, state.ntk, state.gap)
    )
    assert q is not None
    assert gap is not None
    p, r = _variances(state.var1, num), _variances(state.var2, num)
    return State(q, ntk, gap, p, r, pairs=False)


def propagate_all(layer: _layers.Layer, state: State) -> State:
    """Propagates through a whole network, with pairs only as long as a pool follows."""
    layers = layer.layers if isinstance(layer, _layers.Serial) else (layer,)
    for i, inner in enumerate(layers):
        if isinstance(state, State) and not any(map(_layers.pools, layers[i:])):
            state = diagonals(state)
        state = propagate(inner, state)
    return diagonals(state)


@functools.singledispatch
def propagate(layer: _layers.Layer, state: Any) -> Any:
    """Computes the state after a layer; a tuple of states where branches are open.

    Raises:
      ValueError: for a layer without a kernel.
    """
    raise ValueError(f"layer must be one of snnk_jax.infinite. Got {layer!r}.")


@propagate.register
def _(layer: _layers.Dense, state: State) -> State:
    return _affine(state, layer.w_std, layer.b_std)


@propagate.register
def _(layer: _layers.Conv, state: State) -> State:
    def mean(x: Array, *groups: tuple[int, ...]) -> Array:
        return _positions.window_mean(
            x, layer.filter_shape, layer.strides or (), layer.padding, *groups
        )

    return _affine(_average(state, mean), layer.w_std, layer.b_std)


@propagate.register
def _(layer: _layers.Activation, state: State) -> State:
    pair = pair_of(state)
    k, kdot, gap = dual(layer.activation, pair, layer.jumps)
    ntk = None if state.ntk is None else state.ntk * kdot
    var1, var2 = (
        _activate_self(layer, x, state.spatial)
        if state.pairs
        else diagonal(layer.activation, x)
        for x in (state.var1, state.var2)
    )
    if state.pairs:
        gap = _snap(gap)
    return State(k, ntk, gap, var1, var2, state.pairs)


@propagate.register
def _(layer: _layers.AvgPool, state: State) -> State:
    _check_spatial(layer, state)

    def mean(x: Array, *groups: tuple[int, ...]) -> Array:
        for group in groups:
            x = _positions.window_mean(
                x, layer.window_shape, layer.strides or (), layer.padding, group
            )
        return x

    return _average(state, mean)


@propagate.register
def _(layer: _layers.GlobalAvgPool, state: State) -> State:
    _check_spatial(layer, state)

    def mean(x: Array, *groups: tuple[int, ...]) -> Array:
        return jnp.mean(x, axis=tuple(axis for group in groups for axis in group))

    return dataclasses.replace(_average(state, mean), pairs=False)


@propagate.register
def _(layer: _layers.Flatten, state: State) -> State:
    _check_spatial(layer, state)

    def mean(x: Array, *groups: tuple[int, ...]) -> Array:
        return jnp.mean(x, axis=groups[0])

    return _average(diagonals(state), mean)


@propagate.register
def _(layer: _layers.LayerNorm, state: State) -> State:
    p, q, r, gap = pair_of(state)
    scale = _inverse_root(p) * _inverse_root(r)
    ntk = None if state.ntk is None else state.ntk * scale
    var1, var2 = (
        _normalize_self(x, state.spatial) if state.pairs else (x > 0).astype(x.dtype)
        for x in (state.var1, state.var2)
    )
    return State(q * scale, ntk, gap, var1, var2, state.pairs)


@propagate.register
def _(layer: _layers.Identity, state: Any) -> Any:
    return state


@propagate.register
def _(layer: _layers.FanOut, state: State) -> tuple[State, ...]:
    return (state,) * layer.num


@propagate.register
def _(layer: _layers.FanInSum, state: tuple) -> State:
    return functools.reduce(_add, state)


@propagate.register
def _(layer: _layers.Residual, state: State) -> State:
    return _add(state, propagate(layer.branch, state))


@propagate.register
def _(layer: _layers.Serial, state: Any) -> Any:
    for inner in layer.layers:
        state = propagate(inner, state)
    return state


@propagate.register
def _(layer: _layers.Parallel, state: tuple) -> tuple:
    branches = zip(layer.layers, state, strict=True)
    return tuple(propagate(inner, branch) for inner, branch in branches)


def _affine(mean: State, w_std: float, b_std: float) -> State:
    """``w_std^2`` times averaged kernels, and ``b_std^2``."""
    w, b = w_std**2, b_std**2
    nngp = w * mean.nngp + b
    ntk = None if mean.ntk is None else nngp + w * mean.ntk
    var1, var2 = w * mean.var1 + b, w * mean.var2 + b
    gap = mean.gap
    if b > 0:
        pair = jax.tree.map(jax.lax.stop_gradient, pair_of(mean))
        # Of p r - q^2 after the bias, all terms are positive.
        area = w**2 * pair.p * pair.r * gap + w * b * square_distance(pair, 1)
        gap = area / ((w * pair.p + b) * (w * pair.r + b))
        gap = jnp.clip(gap, 0, 1)
    elif w == 0:
        gap = jnp.ones_like(gap)
    return State(nngp, ntk, gap, var1, var2, mean.pairs)


def _average(state: State, mean: Callable[..., Array]) -> State:
    """Applies a mean over positions, of one side (a group of axes) or of both."""
    num = state.spatial
    if state.pairs:
        cross = tuple(range(2, 2 + num)), tuple(range(2 + num, 2 + 2 * num))
        own = tuple(range(1, 1 + num)), tuple(range(1 + num, 1 + 2 * num))
    else:
        cross, own = (tuple(range(2, 2 + num)),), (tuple(range(1, 1 + num)),)
    nngp = mean(state.nngp, *cross)
    ntk = None if state.ntk is None else mean(state.ntk, *cross)
    var1, var2 = mean(state.var1, *own), mean(state.var2, *own)
    pairs = state.pairs and var1.ndim > 1
    after = State(nngp, ntk, nngp, var1, var2, pairs)
    pair = pair_of(after)
    if state.pairs:
        gap = snapped_gap(pair.p, pair.q, pair.r)
    else:
        gap = _summed_gap(
            [pair_of(state)], pair, lambda distances: mean(distances[0], *cross)
        )
    return dataclasses.replace(after, gap=gap)


def _add(one: State, other: State) -> State:
    """Adds independent branches."""
    if one.pairs != other.pairs:
        one, other = diagonals(one), diagonals(other)
    if one.nngp.shape != other.nngp.shape:
        raise ValueError(
            "branches must end with the same positions. "
            f"Got {one.var1.shape[1:]} and {other.var1.shape[1:]}."
        )
    ntk = None
    if one.ntk is not None and other.ntk is not None:
        ntk = one.ntk + other.ntk
    var1, var2 = one.var1 + other.var1, one.var2 + other.var2
    after = State(one.nngp + other.nngp, ntk, one.gap, var1, var2, one.pairs)
    gap = _summed_gap(
        [pair_of(one), pair_of(other)],
        pair_of(after),
        lambda distances: functools.reduce(jnp.add, distances),
    )
    if one.pairs:
        gap = _snap(gap)
    return dataclasses.replace(after, gap=gap)


def _summed_gap(
    parts: list[Pair], after: Pair, combine: Callable[[list[Array]], Array]
) -> Array:
    """The gap after a sum: ``E (u - v)^2`` and ``E (u + v)^2`` add up, all positive."""
    parts, after = jax.tree.map(jax.lax.stop_gradient, (parts, after))
    minus, plus = (
        combine([square_distance(part, sign) for part in parts]) for sign in (1, -1)
    )
    area = minus * plus - (after.p - after.r) ** 2
    size = 4 * after.p * after.r
    gap = jnp.clip(area / jnp.where(size > 0, size, 1), 0, 1)
    return jnp.where(size > 0, gap, 1)


def _snap(gap: Array) -> Array:
    return jnp.where(gap < 16 * jnp.finfo(gap.dtype).eps, 0, gap)


def _variances(x: Array, num: int, lead: int = 1) -> Array:
    """The entries of equal positions, [*lead, *s] of [*lead, *s, *s]."""
    for _ in range(num):
        # Moves the diagonal of the first axis and its partner to the end.
        x = jnp.diagonal(x, axis1=lead, axis2=lead + num)
        num -= 1
    return x


def _self_pair(cov: Array, num: int) -> Pair:
    p = _variances(cov, num)
    left = p.reshape((*p.shape, *(1,) * num))
    right = p.reshape((p.shape[0], *(1,) * num, *p.shape[1:]))
    return Pair(left, cov, right, snapped_gap(left, cov, right))


def _activate_self(layer: _layers.Activation, cov: Array, num: int) -> Array:
    return dual(layer.activation, _self_pair(cov, num), layer.jumps).k


def _normalize_self(cov: Array, num: int) -> Array:
    pair = _self_pair(cov, num)
    return cov * _inverse_root(pair.p) * _inverse_root(pair.r)


def _inverse_root(x: Array) -> Array:
    return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1)), 0)


def _check_spatial(layer: _layers.Layer, state: State) -> None:
    if not state.spatial:
        raise ValueError(
            f"{type(layer).__name__} must follow layers with positions, on inputs "
            "[n, *positions, channels]. Got none."
        )
