"""Sums and products that keep what rounding takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Width of the squares on the diagonal of the symmetric product.
_SQUARE = 1024
# Rows of the blocks that products of at most that width are summed in.
_SHORT = 64
_NARROW = 256


class Total(NamedTuple):
    """A running sum ``high + low``; ``low`` keeps what rounding takes from ``high``."""

    high: Any
    low: Any


def add_product(total: Total, left: Any, right: Any, sign: int) -> Total:
    """Adds ``sign * left.T @ right``, in float32 or better at the highest precision.

    Narrow products are added in short blocks of rows: far less rounding for hardly
    more time. For wide ones the blocks would need too much memory, and their rounding
    averages out over the entries.
    """
    num, size = len(right), max(_SHORT, 4 * right.shape[1])
    whole = num - num % size if right.shape[1] <= _NARROW else 0
    if whole < num:
        total = add(total, sign * _dot(left[whole:], right[whole:]))
    if not whole:
        return total
    shape = (whole // size, size)
    parts = sign * _dot(*(a[:whole].reshape(*shape, -1) for a in (left, right)))
    return jax.lax.fori_loop(
        0, len(parts), lambda i, total: add(total, parts[i]), total
    )


def _dot(left: Any, right: Any) -> Any:
    batch = tuple(range(left.ndim - 2))
    rows = (left.ndim - 2,)
    return jax.lax.dot_general(
        left,
        right,
        ((rows, rows), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.result_type(
            jnp.float64 if right.dtype == jnp.float64 else jnp.float32
        ),
    )


def split_upper(total: Total) -> tuple[Total, ...]:
    """Cuts the blocks of :func:`add_blocks` out of a matrix.

    A loop that carries the blocks adds to each as a whole; one that carries the matrix
    would copy it for every block that it writes.
    """
    return tuple(
        Total(total.high[block], total.low[block]) for block in _blocks(len(total.high))
    )


def join_upper(total: Total, blocks: tuple[Total, ...]) -> Total:
    """Writes the blocks back into their matrix."""
    high, low = total
    for block, part in zip(_blocks(len(high)), blocks, strict=True):
        high, low = high.at[block].set(part.high), low.at[block].set(part.low)
    return Total(high, low)


def add_blocks(
    blocks: tuple[Total, ...], left: Any, right: Any, sign: int
) -> tuple[Total, ...]:
    """Adds ``sign * left.T @ right`` on and above the diagonal, and little below.

    Halves are split again, down to squares that a single product is fastest for: of
    the multiplications of the whole product hardly more than half are left.
    """
    return tuple(
        add_product(part, left[:, rows], right[:, columns], sign)
        for part, (rows, columns) in zip(blocks, _blocks(left.shape[1]), strict=True)
    )


def _blocks(size: int) -> list[tuple[slice, slice]]:
    least = max(_SQUARE, size // 16)

    def square(start: int, stop: int) -> list[tuple[slice, slice]]:
        if stop - start <= least:
            return [(slice(start, stop), slice(start, stop))]
        middle = (start + stop) // 2
        above = (slice(start, middle), slice(middle, stop))
        return [above, *square(start, middle), *square(middle, stop)]

    return square(0, size)


def add(total: Total, term: Any) -> Total:
    """Adds without losing what rounding cuts off (Knuth's two-sum)."""
    term = term.astype(total.high.dtype)
    high = total.high + term
    back = high - total.high
    error = (total.high - (high - back)) + (term - back)
    return Total(high, total.low + error)
