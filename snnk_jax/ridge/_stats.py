"""Sufficient statistics of a ridge regression, gathered row by row."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snnk_jax.ridge._sums import (
    Total,
    add,
    add_blocks,
    add_product,
    join_upper,
    split_upper,
)
from snnk_jax.typing import Array, Dtype, Float

Map = Callable[[Any], Any]
"""Turns a chunk of inputs into features ``[n, m]``."""


class RidgeStats(NamedTuple):
    r"""Everything a ridge regression needs to know of its rows.

    With weights w, features :math:`\phi`, targets y and a fixed shift of both (a, c):
    the sums of :math:`w (\phi-a)(\phi-a)^\top`, :math:`w (\phi-a)(y-c)^\top`,
    :math:`w (\phi-a)`, :math:`w (y-c)`, :math:`w (y-c)^2` and w. It is a pytree of
    fixed size, ``O(m^2)``, whatever the number of rows.

    Attributes:
      gram: ``[m, m]``; the upper triangle, what stands below it means nothing.
      cross: ``[m, o]``.
      phi_sum: ``[m]``.
      y_sum: ``[o]``.
      y_square: ``[o]``.
      weight: sum of the weights.
      rows: number of rows of a weight other than zero.
      phi_shift: a, the mean of the first rows, ``[m]``, which keeps a mean far larger
        than the spread from taking the digits of the spread; None: no shift.
      y_shift: c, likewise, ``[o]``.
    """

    gram: Total
    cross: Total
    phi_sum: Total
    y_sum: Total
    y_square: Total
    weight: Total
    rows: Any
    phi_shift: Any
    y_shift: Any

    @property
    def num_features(self) -> int:
        return self.gram.high.shape[0]

    @property
    def num_targets(self) -> int:
        return self.cross.high.shape[1]


def init(
    num_features: int,
    num_targets: int,
    dtype: Dtype = jnp.float32,
    *,
    shift: bool = True,
) -> RidgeStats:
    r"""Statistics of no rows.

    Args:
      num_features: m, columns of the features.
      num_targets: o, columns of the targets.
      dtype: of the sums: float32, or float64 where JAX has it switched on. Every sum is
        kept as two numbers of it, so that rounding does not grow with the rows.
      shift: subtract the mean of the first rows from all rows before they are
        multiplied. Without it bfloat16 features are multiplied as they are, twice and
        more as fast on a TPU or GPU.

    Raises:
      ValueError: for sizes below one or another dtype.

    Example:
      >>> import snnk_jax as snnk
      >>> stats = snnk.ridge.init(256, 10)
      >>> stats.num_features, stats.num_targets, int(stats.rows)
      (256, 10, 0)
    """
    for name, size in (("num_features", num_features), ("num_targets", num_targets)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1. Got {size}.")
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64) or (
        jnp.dtype(dtype) != jax.dtypes.canonicalize_dtype(dtype)
    ):
        raise ValueError(
            "dtype must be float32, or float64 with jax_enable_x64. "
            f"Got {jnp.dtype(dtype).name}."
        )

    def total(*shape: int) -> Total:
        return Total(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return RidgeStats(
        gram=total(num_features, num_features),
        cross=total(num_features, num_targets),
        phi_sum=total(num_features),
        y_sum=total(num_targets),
        y_square=total(num_targets),
        weight=total(),
        rows=jnp.zeros((), jnp.int32),
        phi_shift=jnp.zeros(num_features, dtype) if shift else None,
        y_shift=jnp.zeros(num_targets, dtype) if shift else None,
    )


def update(
    stats: RidgeStats,
    phi: Float[Array, "n m"],
    y: Float[Array, "n o"],
    weights: Float[Array, " n"] | None = None,
) -> RidgeStats:
    r"""Adds rows.

    Pure; under ``jax.jit`` with ``donate_argnums=0`` it needs no second copy of the
    statistics. Products are accumulated in the dtype of the statistics at the highest
    precision, and only the upper triangle is computed.

    Args:
      stats: the statistics so far.
      phi: features, in bfloat16, float32 or float64.
      y: targets.
      weights: a row of weight k counts as k rows; 0 leaves it out. None is 1.
        With bfloat16 features and no shift, weighted features are rounded to
        bfloat16, which leaves weights of 0 and 1 exact.

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> stats = snnk.ridge.init(1, 1)
      >>> phi = jnp.array([[1.0], [2.0], [3.0]])
      >>> stats = snnk.ridge.update(stats, phi, 2 * phi + 1)
      >>> solution = snnk.ridge.solve(stats, l2=0.0)
      >>> round(float(solution.kernel[0, 0]), 5), round(float(solution.bias[0]), 5)
      (2.0, 1.0)
    """
    _check_rows(stats, phi, y, weights)
    return _add_rows_whole(stats, phi, y, weights, 1)


def downdate(
    stats: RidgeStats,
    phi: Float[Array, "n m"],
    y: Float[Array, "n o"],
    weights: Float[Array, " n"] | None = None,
) -> RidgeStats:
    """Takes rows out again: exact unlearning, equal to statistics without them.

    Arguments are those of :func:`update`, which must have seen the rows.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> phi, y = jax.random.normal(jax.random.key(0), (2, 20, 3))
      >>> stats = snnk.ridge.update(snnk.ridge.init(3, 3), phi, y)
      >>> left = snnk.ridge.downdate(stats, phi[:5], y[:5])
      >>> int(left.rows)
      15
    """
    _check_rows(stats, phi, y, weights)
    return _add_rows_whole(stats, phi, y, weights, -1)


def merge(a: RidgeStats, b: RidgeStats) -> RidgeStats:
    """Statistics of the rows of both: of two hosts, two days, two folds.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> phi, y = jax.random.normal(jax.random.key(0), (2, 20, 3))
      >>> parts = [
      ...     snnk.ridge.update(snnk.ridge.init(3, 3), phi[i::2], y[i::2])
      ...     for i in (0, 1)
      ... ]
      >>> int(snnk.ridge.merge(*parts).rows)
      20
    """
    if (a.num_features, a.num_targets) != (b.num_features, b.num_targets):
        raise ValueError(
            "statistics must have the same features and targets to be merged. Got "
            f"{a.num_features} and {b.num_features} features, {a.num_targets} and "
            f"{b.num_targets} targets."
        )
    if a.phi_shift is not None and b.phi_shift is not None:
        empty = a.rows == 0
        a = a._replace(
            phi_shift=jnp.where(empty, b.phi_shift, a.phi_shift),
            y_shift=jnp.where(empty, b.y_shift, a.y_shift),
        )
    # b in the coordinates of a: phi - a = (phi - b) + p, y - a = (y - b) + q.
    (phi_a, y_a), (phi_b, y_b) = shifts(a), shifts(b)
    p, q = phi_b - phi_a, y_b - y_a
    s, t, w = b.phi_sum.high, b.y_sum.high, b.weight.high
    terms = {
        "gram": [
            b.gram,
            jnp.outer(s, p) + jnp.outer(p, s) + w * jnp.outer(p, p),
        ],
        "cross": [b.cross, jnp.outer(s, q) + jnp.outer(p, t) + w * jnp.outer(p, q)],
        "phi_sum": [b.phi_sum, w * p],
        "y_sum": [b.y_sum, w * q],
        "y_square": [b.y_square, 2 * q * t + w * q * q],
        "weight": [b.weight],
    }
    fields = {"rows": a.rows + b.rows}
    for name, parts in terms.items():
        total = getattr(a, name)
        for part in parts:
            for term in part if isinstance(part, Total) else (part,):
                total = add(total, term)
        fields[name] = total
    return a._replace(**fields)


def update_chunks(
    stats: RidgeStats,
    x: Any,
    y: Float[Array, "n o"],
    weights: Float[Array, " n"] | None = None,
    *,
    phi: Map | None = None,
    chunk_size: int = 8192,
) -> RidgeStats:
    r"""Adds rows chunk by chunk, their features computed on the way.

    One compiled loop; it needs memory for the statistics and one chunk of features,
    ``O(m^2 + chunk_size * m)``, not for ``[n, m]``.

    Args:
      stats: the statistics so far.
      x: inputs, an array or a pytree of arrays with n leading rows.
      y: targets.
      weights: as for :func:`update`.
      phi: maps a chunk of inputs to features, ``functools.partial(fm.phi, params)``
        for a feature map. The arrays in such a partial are arguments of the compiled
        loop: other parameters do not compile it again. None: x are the features.
      chunk_size: rows at a time.

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import functools, jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.ArcCosine(num_features=64)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> x = jax.random.normal(jax.random.key(1), (1000, 8))
      >>> stats = snnk.ridge.update_chunks(
      ...     snnk.ridge.init(64, 1),
      ...     x,
      ...     x[:, :1] ** 2,
      ...     phi=functools.partial(fm.phi, params),
      ...     chunk_size=256,
      ... )
      >>> int(stats.rows)
      1000
    """
    check_chunks(stats, x, y, weights, chunk_size)
    return _update_chunks(stats, x, y, weights, as_pytree(phi), chunk_size)


@functools.partial(jax.jit, static_argnums=5)
def _update_chunks(
    stats: RidgeStats, x: Any, y: Any, weights: Any, phi: Map, chunk_size: int
) -> RidgeStats:
    return loop_chunks(stats, x, y, weights, phi, chunk_size)


def loop_chunks(
    stats: RidgeStats,
    x: Any,
    y: Any,
    weights: Any,
    phi: Map,
    chunk_size: int,
    add_gram: Callable[..., Total] | None = None,
) -> RidgeStats:
    """Adds all rows, a chunk at a time; ``add_gram`` as for :func:`add_rows`."""
    gram = stats.gram
    if add_gram is None:
        stats = stats._replace(gram=split_upper(gram))
    num = y.shape[0]
    size = min(chunk_size, num)
    rows = (x, y, weights)

    def add_part(stats: RidgeStats, start: Any, count: int) -> RidgeStats:
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=count
        )
        x_part, y_part, own = jax.tree.map(cut, rows)
        return add_rows(stats, phi(x_part), y_part, own, add_gram=add_gram)

    stats = jax.lax.fori_loop(
        0, num // size, lambda i, stats: add_part(stats, i * size, size), stats
    )
    rest = num % size
    if rest:
        stats = add_part(stats, num - rest, rest)
    if add_gram is None:
        stats = stats._replace(gram=join_upper(gram, stats.gram))
    return stats


@functools.partial(jax.jit, static_argnums=4)
def _add_rows_whole(
    stats: RidgeStats, phi: Any, y: Any, weights: Any, sign: int
) -> RidgeStats:
    gram = stats.gram
    stats = stats._replace(gram=split_upper(gram))
    stats = add_rows(stats, phi, y, weights, sign=sign)
    return stats._replace(gram=join_upper(gram, stats.gram))


def add_rows(
    stats: RidgeStats,
    phi: Any,
    y: Any,
    weights: Any,
    *,
    sign: int = 1,
    add_gram: Callable[..., Any] | None = None,
) -> RidgeStats:
    """The sums of :class:`RidgeStats`, ``gram`` in blocks of :func:`split_upper`.

    ``add_gram(gram, left, right, sign)`` adds to a matrix kept in another way.
    """
    dtype = stats.weight.high.dtype
    ones = jnp.ones(y.shape[0], dtype) if weights is None else weights.astype(dtype)
    y = y.astype(dtype)
    if stats.phi_shift is not None:
        stats = with_shift(stats, phi, y, ones)
        phi = phi.astype(dtype) - stats.phi_shift[None]
        y = y - stats.y_shift[None]
    elif phi.dtype != jnp.bfloat16:
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
    totals["gram"] = (add_gram or add_blocks)(stats.gram, left, phi, sign)
    rows = stats.rows + sign * jnp.sum(ones != 0, dtype=jnp.int32)
    return stats._replace(rows=rows, **totals)


def with_shift(stats: RidgeStats, phi: Any, y: Any, weights: Any) -> RidgeStats:
    """Sets the shift to the mean of these rows if they are the first."""
    dtype = stats.weight.high.dtype

    def means() -> tuple[Any, Any]:
        total = jnp.sum(weights)
        scale = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
        return scale * (weights @ phi.astype(dtype)), scale * (weights @ y)

    phi_shift, y_shift = jax.lax.cond(
        stats.rows == 0, means, lambda: (stats.phi_shift, stats.y_shift)
    )
    return stats._replace(phi_shift=phi_shift, y_shift=y_shift)


def shifts(stats: RidgeStats) -> tuple[Any, Any]:
    """Both shifts, zeros where there is none."""
    if stats.phi_shift is None:
        return jnp.zeros_like(stats.phi_sum.high), jnp.zeros_like(stats.y_sum.high)
    return stats.phi_shift, stats.y_shift


def as_pytree(phi: Map | None) -> Map:
    """The map as a pytree: arrays bound by ``functools.partial`` are its leaves."""
    if phi is None:
        return jax.tree_util.Partial(_identity)
    if isinstance(phi, functools.partial):
        return jax.tree_util.Partial(phi.func, *phi.args, **phi.keywords)
    return jax.tree_util.Partial(phi)


def _identity(x: Any) -> Any:
    return x


def check_chunks(
    stats: RidgeStats, x: Any, y: Any, weights: Any, chunk_size: int
) -> None:
    """Raises ValueError for rows that do not fit, whatever their features will be."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1. Got {chunk_size}.")
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    if not shapes or any(shape[:1] != y.shape[:1] for shape in shapes):
        raise ValueError(
            f"x and y must have the same number of rows. Got {shapes} and {y.shape}."
        )
    _check_targets(stats, y, weights)


def _check_rows(stats: RidgeStats, phi: Any, y: Any, weights: Any) -> None:
    if phi.ndim != 2 or phi.shape[1] != stats.num_features:
        raise ValueError(
            f"phi must be [n, {stats.num_features}], as many columns as init was told. "
            f"Got {phi.shape}."
        )
    if len(phi) != len(y):
        raise ValueError(
            "phi and y must have the same number of rows. "
            f"Got {phi.shape} and {y.shape}."
        )
    _check_targets(stats, y, weights)


def _check_targets(stats: RidgeStats, y: Any, weights: Any) -> None:
    if y.ndim != 2 or y.shape[1] != stats.num_targets or not len(y):
        raise ValueError(
            f"y must be [n, {stats.num_targets}] with n at least 1. Got {y.shape}."
        )
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(
            f"y must be floating; one-hot encode classes. Got {y.dtype.name}."
        )
    if weights is not None and weights.shape != y.shape[:1]:
        raise ValueError(f"weights must be [{len(y)}], one a row. Got {weights.shape}.")
