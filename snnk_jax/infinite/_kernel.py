"""Exact NNGP and NTK kernels, in blocks."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax.infinite import _layers
from snnk_jax.infinite._inputs import input_state
from snnk_jax.infinite._propagate import propagate_all
from snnk_jax.projections import accumulation_dtype
from snnk_jax.typing import Array, Float

# A block's entries: enough to keep cores busy, few enough to stay in cache.
_ENTRIES = 2**18
_SPATIAL_ENTRIES = 2**23
_Slice = tuple[slice, slice]


class Kernels(NamedTuple):
    """Kernel matrices of two sets of inputs, [n1, n2].

    Attributes:
      nngp: that of the Gaussian process the network is at its start, or None.
      ntk: the neural tangent kernel, or None.
    """

    nngp: Array | None = None
    ntk: Array | None = None


def kernel(
    net: _layers.Layer,
    x1: Float[Array, "n1 *s d"],
    x2: Float[Array, "n2 *s d"] | None = None,
    get: str | Sequence[str] = _layers.GET,
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    r"""Computes the exact kernels of a network of infinite width.

    The first kernel is :math:`x \cdot x' / d`, for images that of the channels at each
    pair of positions, and the layers follow in turn. It compiles once a network and
    shape, runs block by block and differentiates; without ``x2`` only one triangle of
    blocks is computed. Only the results have the size n1 times n2.

    Args:
      net: the layers.
      x1: inputs, float32 or wider to keep their dtype, others become float32. Images
        have their channels last.
      x2: other inputs of the same shape and dtype; None for ``x1``.
      get: ``"nngp"``, ``"ntk"`` or a sequence of them. A single one costs less.
      batch_size: rows and columns of a block; None for a size that fits the shape.
      mesh: the blocks of rows are shared out over all devices of this mesh, and the
        result is sharded by rows.

    Returns:
      The matrix for a single name, otherwise :class:`Kernels`.

    Raises:
      ValueError: for a network that is no Gaussian process layer by layer (see
        :func:`snnk_jax.infinite.serial`), shapes or dtypes that do not fit, an unknown
        kernel or a batch size below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> net = snnk.infinite.serial(
      ...     snnk.infinite.Dense(), snnk.infinite.Activation("relu"),
      ...     snnk.infinite.Dense(),
      ... )
      >>> x = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
      >>> net.kernel(x, get="ntk")
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    References:
      Lee et al., arXiv 1711.00165; Jacot et al., arXiv 1806.07572; Arora et al., arXiv
      1904.11955; Novak et al., arXiv 1912.02803.
    """
    names = (get,) if isinstance(get, str) else tuple(get)
    if not names or any(name not in _layers.GET for name in names):
        raise ValueError(f"get must name nngp, ntk or both. Got {get!r}.")
    x1, x2 = _check_inputs(net, x1, x2)
    size = _block_size(net, x1, batch_size)
    if mesh is not None:
        from snnk_jax.infinite import _sharded

        values = _sharded.compute(net, names, size, mesh, x1, x2)
    elif x2 is None:
        values = symmetric(net, names, size, x1)
    else:
        values = rectangular(net, names, size, x1, x2)
    if isinstance(get, str):
        return values[0]
    return Kernels(**dict(zip(names, values, strict=True)))


def blocks(
    net: _layers.Layer,
    x1: Any,
    x2: Any = None,
    get: str = "ntk",
    *,
    batch_size: int = 1024,
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Computes a kernel one block at a time, for results that fit nowhere.

    Args:
      net: the layers.
      x1: inputs, also a ``numpy.memmap``.
      x2: other inputs; None for ``x1``, and then only blocks on and below the diagonal
        come, each of the others the transpose of one of them.
      get: ``"nngp"`` or ``"ntk"``.
      batch_size: rows and columns of a block.

    Yields:
      The rows and columns of the block as slices, and its values on the host.

    Raises:
      ValueError: as for :func:`kernel`.

    Example:
      >>> import numpy as np
      >>> import snnk_jax as snnk
      >>> net = snnk.infinite.Dense()
      >>> x = np.ones((3, 2), np.float32)
      >>> parts = snnk.infinite.blocks(net, x, batch_size=2)
      >>> [(rows.start, columns.start, block.shape) for rows, columns, block in parts]
      [(0, 0, (2, 2)), (2, 0, (1, 2)), (2, 2, (1, 1))]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1. Got {batch_size}.")
    if get not in _layers.GET:
        raise ValueError(f"get must be nngp or ntk. Got {get!r}.")
    _check_shape("x1", x1)
    _check_shape("x2", x1 if x2 is None else x2)
    return _blocks(net, x1, x2, get, batch_size)


def _blocks(
    net: _layers.Layer, x1: Any, x2: Any, get: str, batch_size: int
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    columns = x1 if x2 is None else x2
    for i in range(0, len(x1), batch_size):
        rows = slice(i, min(i + batch_size, len(x1)))
        left = jnp.asarray(x1[rows])
        stop = rows.stop if x2 is None else len(columns)
        for j in range(0, stop, batch_size):
            across = slice(j, min(j + batch_size, len(columns)))
            twins = x2 is None and i == j
            right = None if twins else jnp.asarray(columns[across])
            yield rows, across, np.asarray(kernel(net, left, right, get))


def check_floating(name: str, x: Array) -> None:
    """Raises ValueError unless x holds floating-point numbers."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating-point. Got {x.dtype}.")


def _check_shape(name: str, x: Any) -> None:
    shape = np.shape(x)
    if len(shape) < 2 or 0 in shape:
        raise ValueError(
            f"{name} must be [n, *positions, channels], not empty. Got {shape}."
        )


def _check_inputs(
    net: _layers.Layer, x1: Array, x2: Array | None
) -> tuple[Array, Array | None]:
    _layers.check_network(net)
    for name, x in (("x1", x1), ("x2", x1 if x2 is None else x2)):
        check_floating(name, x)
        _check_shape(name, x)
    if x2 is not None and (x1.shape[1:] != x2.shape[1:] or x1.dtype != x2.dtype):
        raise ValueError(
            "x2 must have the shape and dtype of x1, but for the number of inputs. "
            f"Got {x2.dtype}{list(x2.shape)} and {x1.dtype}{list(x1.shape)}."
        )
    dtype = jax.dtypes.canonicalize_dtype(accumulation_dtype(x1.dtype))
    x1 = jnp.asarray(x1, dtype)
    return x1, None if x2 is None else jnp.asarray(x2, dtype)


def _block_size(net: _layers.Layer, x1: Array, batch_size: int | None) -> int:
    if batch_size is not None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1. Got {batch_size}.")
        return batch_size
    positions = math.prod(x1.shape[1:-1])
    if x1.ndim == 2:
        return math.isqrt(_ENTRIES)
    entries = positions**2 if _layers.pools(net) else positions
    return max(1, math.isqrt(_SPATIAL_ENTRIES // entries))


def block(
    net: _layers.Layer, names: tuple[str, ...], x1: Array, x2: Array, twins: Any
) -> list[Array]:
    """Kernels of one block; ``twins`` [n1, n2] marks the pairs of one and the same."""
    state = propagate_all(
        net, input_state(x1, x2, twins, _layers.pools(net), "ntk" in names)
    )
    if state.spatial:
        raise ValueError(
            "network must end without positions: in GlobalAvgPool or Flatten. "
            f"Got outputs of {state.spatial} spatial axes."
        )
    return [getattr(state, name) for name in names]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _symmetric(
    net: _layers.Layer, names: tuple[str, ...], size: int, x: Array
) -> list[Array]:
    """Kernels of x with itself: one triangle of blocks, the other by transposition."""
    n = len(x)
    if n <= size:
        return block(net, names, x, x, jnp.eye(n, dtype=bool))
    starts = _starts(n, size)
    # Those on the diagonal come last, and so also where the last rows overlap others.
    pairs = [(i, j) for i in starts for j in starts if i > j]
    pairs += [(i, i) for i in starts]

    def step(out: list[Array], start: Array) -> tuple[list[Array], None]:
        i, j = start[0], start[1]
        values = _at(net, names, size, x, x, i, j, True)
        # A branch ends XLA's fusion: it would compute the block once for each use.
        values = jax.lax.cond(i == j, _mirrored, lambda values: values, values)
        out = [
            jax.lax.dynamic_update_slice(whole, value, (i, j))
            for whole, value in zip(out, values, strict=True)
        ]
        out = [
            jax.lax.dynamic_update_slice(whole, value.T, (j, i))
            for whole, value in zip(out, values, strict=True)
        ]
        return out, None

    empty = [jnp.zeros((n, n), x.dtype) for _ in names]
    return jax.lax.scan(step, empty, jnp.asarray(pairs, jnp.int32))[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def rectangular(
    net: _layers.Layer, names: tuple[str, ...], size: int, x1: Array, x2: Array
) -> list[Array]:
    """Kernels of x1 with x2, block by block."""
    rows, columns = min(size, len(x1)), min(size, len(x2))
    if rows == len(x1) and columns == len(x2):
        return block(net, names, x1, x2, None)
    starts = [(i, j) for i in _starts(len(x1), rows) for j in _starts(len(x2), columns)]

    def step(out: list[Array], start: Array) -> tuple[list[Array], None]:
        i, j = start[0], start[1]
        values = _at(net, names, (rows, columns), x1, x2, i, j, False)
        out = [
            jax.lax.dynamic_update_slice(whole, value, (i, j))
            for whole, value in zip(out, values, strict=True)
        ]
        return out, None

    empty = [jnp.zeros((len(x1), len(x2)), x1.dtype) for _ in names]
    return jax.lax.scan(step, empty, jnp.asarray(starts, jnp.int32))[0]


def _starts(n: int, size: int) -> list[int]:
    """First rows of blocks that cover n rows; the last overlaps the one before."""
    return [min(i, n - size) for i in range(0, n, size)]


def _at(
    net: _layers.Layer,
    names: tuple[str, ...],
    size: int | tuple[int, int],
    x1: Array,
    x2: Array,
    i: Array,
    j: Array,
    same: bool,
) -> list[Array]:
    rows, columns = (size, size) if isinstance(size, int) else size

    # Gradients compute the block again rather than keep what was inside.
    @jax.checkpoint
    def compute(x1: Array, x2: Array, i: Array, j: Array) -> list[Array]:
        left = jax.lax.dynamic_slice_in_dim(x1, i, rows)
        right = jax.lax.dynamic_slice_in_dim(x2, j, columns)
        twins = None
        if same:
            first = jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0) + i
            twins = first == jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1) + j
        return block(net, names, left, right, twins)

    return compute(x1, x2, i, j)


def _mirrored(values: list[Array]) -> list[Array]:
    """Of each, the lower triangle and its mirror image."""
    return [jnp.tril(x) + jnp.tril(x, -1).T for x in values]


# For itself, so that XLA does not compute an entry anew for its mirror image.
_mirror = jax.jit(_mirrored)


def symmetric(
    net: _layers.Layer, names: tuple[str, ...], size: int, x: Array
) -> list[Array]:
    """Kernels of x with itself: one triangle of blocks, the other by transposition."""
    values = _symmetric(net, names, size, x)
    return _mirror(values) if len(x) <= size else values
