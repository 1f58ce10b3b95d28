"""The sums of rows, a chunk at a time: in one compiled loop, or with BLAS on a CPU."""

import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax.ridge._factor import blas
from snnk_jax.ridge._stats import RidgeStats, shifts
from snnk_jax.ridge._sums import (
    Total,
    add,
    add_blocks,
    add_product,
    join_upper,
    split_upper,
)

Map = Callable[[Any], Any]
"""Turns a chunk of inputs into features ``[n, m]``."""

Rows = tuple[Any, Any, Any]
"""Inputs, targets and weights or None."""

AddGram = Callable[[Any, Any, Any, int], Any]
"""``add_gram(gram, left, right, sign)`` adds ``sign * left.T @ right``."""

# Rows whose mean makes the shift: enough for its size, not for its digits.
_HEAD = 256
# Rows of a product are at most this many times the root of their number: the rounding
# of longer ones would outgrow that of shorter ones and of their sum.
_LONGEST = 32
# BLAS serves from this width on, where products outweigh what a step of the host's loop
# costs, and from this many rows a feature on: its products round more than XLA's, which
# many rows make up for.
_WIDE = 1024
_TALL = 16
# Rows whose features the host's loop asks for at a time: few enough for the cache of
# the processor; and numbers in a band of the Gram matrix that is added at a time.
_BLOCK = 256
_CACHED = 1 << 17


def accumulate(
    stats: RidgeStats,
    x: Any,
    y: Any,
    weights: Any,
    phi: Map | None,
    chunk_size: int,
    sign: int = 1,
) -> RidgeStats:
    """Adds all rows, or takes them out with a ``sign`` of -1."""
    chunk_size = min(chunk_size, max(_BLOCK, int(_LONGEST * len(y) ** 0.5)))
    rows, phi = (x, y, weights), as_pytree(phi)
    try:
        if _suits_blas(stats, rows, phi):
            return _host_loop(stats, rows, phi, chunk_size, sign)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        pass  # traced: part of the caller's compiled program
    return _compiled_loop(stats, rows, phi, chunk_size, sign)


def as_pytree(phi: Map | None) -> Map:
    """The map as a pytree: arrays bound by ``functools.partial`` are its leaves."""
    if phi is None:
        return jax.tree_util.Partial(_identity)
    bound = phi if isinstance(phi, functools.partial) else functools.partial(phi)
    static = {name: v for name, v in bound.keywords.items() if _is_static(v)}
    traced = {name: v for name, v in bound.keywords.items() if name not in static}
    function, owner = bound.func, ()
    # Methods are equal only of the same object: an equal one would compile again.
    if isinstance(function, types.MethodType) and _is_static(function.__self__):
        function, owner = function.__func__, (function.__self__,)
    call = _Call(function, owner, tuple(sorted(static.items())))
    return jax.tree_util.Partial(call, *bound.args, **traced)


def _identity(x: Any) -> Any:
    return x


def _is_static(value: Any) -> bool:
    """Whether it can be compared and holds no numbers to differentiate or to change."""
    try:
        hash(value)
    except TypeError:
        return False
    numbers = (float, complex, np.generic, np.ndarray, jax.Array)
    return not any(isinstance(leaf, numbers) for leaf in jax.tree.leaves(value))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What of a map is compiled in: equal ones compile once."""

    function: Any
    owner: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.function(*self.owner, *args, **dict(self.keywords), **keywords)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _compiled_loop(
    stats: RidgeStats, rows: Rows, phi: Map, chunk_size: int, sign: int
) -> RidgeStats:
    x, y, _ = rows
    return loop_upper(first_shift(stats, x, y, phi), rows, phi, chunk_size, sign)


def loop_upper(
    stats: RidgeStats, rows: Rows, phi: Map, chunk_size: int, sign: int = 1
) -> RidgeStats:
    """:func:`loop_chunks` of a whole Gram matrix, of which it takes the triangle."""
    gram = stats.gram
    stats = stats._replace(gram=split_upper(gram))
    stats = loop_chunks(stats, rows, phi, chunk_size, add_blocks, sign)
    return stats._replace(gram=join_upper(gram, stats.gram))


def loop_chunks(
    stats: RidgeStats,
    rows: Rows,
    phi: Map,
    chunk_size: int,
    add_gram: AddGram,
    sign: int = 1,
) -> RidgeStats:
    """Adds all rows in a traced loop; the shift is set, ``gram`` suits ``add_gram``."""
    num = rows[1].shape[0]
    size = min(chunk_size, num)

    def add_part(stats: RidgeStats, start: Any, count: int) -> RidgeStats:
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=count
        )
        x_part, y_part, own = jax.tree.map(cut, rows)
        return add_rows(stats, phi(x_part), y_part, own, add_gram, sign)

    stats = jax.lax.fori_loop(
        0, num // size, lambda i, stats: add_part(stats, i * size, size), stats
    )
    rest = num % size
    return add_part(stats, num - rest, rest) if rest else stats


def first_shift(stats: RidgeStats, x: Any, y: Any, phi: Map) -> RidgeStats:
    """Statistics of no rows take about the mean of the first ones for their shift."""
    if stats.phi_shift is None:
        return stats
    dtype = stats.weight.high.dtype
    x, y = jax.tree.map(lambda a: a[:_HEAD], (x, y))

    def means() -> tuple[Any, Any]:
        return jnp.mean(phi(x).astype(dtype), axis=0), jnp.mean(y.astype(dtype), axis=0)

    phi_shift, y_shift = jax.lax.cond(
        stats.rows == 0, means, lambda: (stats.phi_shift, stats.y_shift)
    )
    return stats._replace(phi_shift=phi_shift, y_shift=y_shift)


def add_rows(
    stats: RidgeStats, phi: Any, y: Any, weights: Any, add_gram: AddGram, sign: int
) -> RidgeStats:
    """The sums of :class:`RidgeStats` with these rows, about its shift."""
    dtype = stats.weight.high.dtype
    ones = jnp.ones(y.shape[0], dtype) if weights is None else weights.astype(dtype)
    y = y.astype(dtype)
    if stats.phi_shift is not None:
        phi = phi.astype(dtype) - stats.phi_shift[None]
        y = y - stats.y_shift[None]
    elif phi.dtype != jnp.bfloat16 or dtype != jnp.float32:
        phi = phi.astype(dtype)
    left = phi if weights is None else phi * ones[:, None].astype(phi.dtype)
    terms = {
        "y_sum": ones @ y,
        "y_square": ones @ (y * y),
        "weight": jnp.sum(ones),
    }
    totals: dict[str, Any] = {
        name: add(getattr(stats, name), sign * t) for name, t in terms.items()
    }
    # The sums of the features are their products with a target of ones.
    extended = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b[:, None]], axis=1),
        stats.cross,
        stats.phi_sum,
    )
    targets = jnp.concatenate([y, jnp.ones((len(y), 1), dtype)], axis=1)
    extended = add_product(extended, left.astype(dtype), targets, sign)
    totals["cross"] = jax.tree.map(lambda a: a[:, :-1], extended)
    totals["phi_sum"] = jax.tree.map(lambda a: a[:, -1], extended)
    totals["gram"] = add_gram(stats.gram, left, phi, sign)
    rows = stats.rows + sign * jnp.sum(ones != 0, dtype=jnp.int32)
    return stats._replace(rows=rows, **totals)


def _suits_blas(stats: RidgeStats, rows: Rows, phi: Map) -> bool:
    """Whether the arrays are here, on one CPU, and wide enough for it to pay."""
    m, num = stats.num_features, len(jax.tree.leaves(rows)[0])
    if m < _WIDE or num < _TALL * m:
        return False
    arrays = [
        leaf
        for leaf in jax.tree.leaves((stats, rows, phi))
        if isinstance(leaf, jax.Array)
    ]
    devices = {device for array in arrays for device in array.devices()}
    if [device.platform for device in devices] != ["cpu"]:
        return False
    # Rows are multiplied by the roots of their weights.
    weights = rows[-1]
    return weights is None or bool(np.all(np.asarray(weights) >= 0))


def _host_loop(
    stats: RidgeStats, rows: Rows, phi: Map, chunk_size: int, sign: int
) -> RidgeStats:
    """The loop with the symmetric product of BLAS, which XLA does not have.

    It takes two thirds of the time of the best arrangement of general products. Rows
    and targets are multiplied by the roots of their weights. Large arrays are made
    once: fresh memory is slow.
    """
    high, low = np.array(stats.gram.high), np.array(stats.gram.low)
    *data, weights = rows
    x, y = jax.tree.map(_view, tuple(data))
    head = jax.tree.map(operator.itemgetter(slice(_HEAD)), (x, y))
    stats = _first_shift(stats._replace(gram=None), *head, phi)
    phi_shift, y_shift = (np.asarray(shift) for shift in shifts(stats))
    num, m, dtype = len(y), len(high), high.dtype
    weights = np.ones(num, dtype) if weights is None else np.asarray(weights)
    chunk_size = min(chunk_size, num)
    features, product = np.empty((chunk_size, m), dtype), np.zeros((m, m), dtype)
    with_phi = np.zeros((stats.num_targets + 1, m))
    with_y = np.zeros((stats.num_targets + 1,) * 2)
    begin = functools.partial(_rows_and_product, phi, phi_shift)
    for own in _slices(num, chunk_size):
        root = np.sqrt(weights[own].astype(np.float64))[:, None]
        # A last target of ones makes the plain sums.
        ones = np.ones_like(root)
        targets = np.append(y[own] - y_shift.astype(np.float64), ones, 1) * root
        chunk = (
            jax.tree.map(operator.itemgetter(own), x),
            targets.astype(dtype),
            root.astype(dtype),
        )
        for part, result in _ahead(begin, chunk):
            features[part], with_part = (np.asarray(array) for array in result)
            with_phi += with_part
        product = _symmetric(features[: len(root)], product)
        _add_upper(high, low, product, sign)
        with_y += targets.T @ targets
    sums = {
        "cross": with_phi[:-1].T,
        "phi_sum": with_phi[-1],
        "y_sum": with_y[-1, :-1],
        "y_square": np.diagonal(with_y)[:-1],
        "weight": with_y[-1, -1],
    }
    totals = {
        name: _add_float64(getattr(stats, name), sign * value, dtype)
        for name, value in sums.items()
    }
    return stats._replace(
        gram=Total(jnp.asarray(high), jnp.asarray(low)),
        rows=stats.rows + np.int32(sign * np.count_nonzero(weights)),
        **totals,
    )


_first_shift = jax.jit(first_shift)


def _view(array: Any) -> Any:
    """NumPy's view of an array on the CPU, whose slices cost nothing."""
    extended = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return array if extended else np.asarray(array)


def _ahead(fn: Any, chunk: Any) -> Iterator[Any]:
    """Results of ``fn`` part by part, the next one begun before one is waited for."""
    waiting = None
    for part in _slices(len(chunk[-1]), _BLOCK):
        begun = part, fn(*jax.tree.map(operator.itemgetter(part), chunk))
        if waiting is not None:
            yield waiting
        waiting = begun
    yield waiting


@jax.jit
def _rows_and_product(
    phi: Map, shift: Any, x: Any, targets: Any, root: Any
) -> tuple[Any, Any]:
    rows = (phi(x).astype(shift.dtype) - shift[None]) * root
    return rows, jnp.matmul(targets.T, rows, precision=jax.lax.Precision.HIGHEST)


def _slices(num: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]


def _symmetric(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    """``rows.T @ rows`` in the upper triangle of ``out``."""
    syrk = blas.ssyrk if rows.dtype == np.float32 else blas.dsyrk
    return syrk(1.0, rows.T, c=out.T, lower=1, overwrite_c=1).T


def _add_upper(high: np.ndarray, low: np.ndarray, term: np.ndarray, sign: int) -> None:
    """:func:`add` in place, in rows that the processor's cache holds."""
    for rows in _slices(len(high), max(1, _CACHED // len(high))):
        part = rows, slice(rows.start, None)
        high[part], low[part] = add(Total(high[part], low[part]), sign * term[part])


def _add_float64(total: Total, value: Any, dtype: np.dtype) -> Total:
    high = np.asarray(value, dtype)
    return add(add(total, jnp.asarray(high)), jnp.asarray(value - high, dtype))
