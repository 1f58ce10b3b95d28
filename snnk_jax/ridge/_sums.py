"""Sums and products that keep what rounding takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Range = tuple[int, int]

# Width of the squares on the diagonal of the symmetric product.
_SQUARE = 512
# Rows of the blocks that narrow products are summed in.
_SHORT = 64


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
    whole = num - num % size
    if num % size:
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


def add_upper(total: Total, left: Any, right: Any, sign: int) -> Total:
    """Adds ``sign * left.T @ right`` on and above the diagonal, and little below.

    Halves are split again, down to squares that a single product is fastest for: of
    the multiplications of the whole product hardly more than half are left.
    """
    size = right.shape[1]
    least = max(_SQUARE, size // 16)

    def add_square(total: Total, start: int, stop: int) -> Total:
        if stop - start <= least:
            return add_block(total, (start, stop), (start, stop))
        middle = (start + stop) // 2
        total = add_block(total, (start, middle), (middle, stop))
        return add_square(add_square(total, start, middle), middle, stop)

    def add_block(total: Total, rows: Range, columns: Range) -> Total:
        block = np.s_[slice(*rows), slice(*columns)]
        part = Total(total.high[block], total.low[block])
        part = add_product(part, left[:, slice(*rows)], right[:, slice(*columns)], sign)
        return Total(
            total.high.at[block].set(part.high), total.low.at[block].set(part.low)
        )

    return add_square(total, 0, size)


def add(total: Total, term: Any) -> Total:
    """Adds without losing what rounding cuts off (Knuth's two-sum)."""
    term = term.astype(total.high.dtype)
    high = total.high + term
    back = high - total.high
    error = (total.high - (high - back)) + (term - back)
    return Total(high, total.low + error)
