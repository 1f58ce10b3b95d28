"""Rows into statistics and out of them."""

from typing import Any

import jax

from snnk_jax.ridge._accumulate import Map, accumulate, as_pytree
from snnk_jax.ridge._stats import RidgeStats, check_floating
from snnk_jax.typing import Array, Float


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
    return accumulate(stats, phi, y, weights, None, len(y))


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
    return accumulate(stats, phi, y, weights, None, len(y), -1)


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

    It needs memory for the statistics and one chunk of features, ``O(m^2 + chunk_size
    * m)``, not for ``[n, m]``. On a CPU 1024 features and more, of at least 16 times
    as many rows, are multiplied by BLAS chunk by chunk; elsewhere, and inside a
    ``jax.jit``, all is one compiled loop.

    Args:
      stats: the statistics so far.
      x: inputs, an array or a pytree of arrays with n leading rows.
      y: targets.
      weights: as for :func:`update`.
      phi: maps a chunk of inputs to features, ``functools.partial(fm.phi, params)``
        for a feature map. The arrays and floats in such a partial are arguments of the
        compiled loop: other parameters do not compile it again, nor does an equal map.
        Other keywords, as ``axis=1``, are compiled in. None: x are the features.
      chunk_size: rows at a time; at most ``32 sqrt(n)`` (and 256) are taken, since
        longer sums round more.

    Raises:
      ValueError: for shapes that do not fit, also of what ``phi`` makes of the rows.

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
    check_features(as_pytree(phi), x, len(y), stats.num_features)
    return accumulate(stats, x, y, weights, phi, chunk_size)


def downdate_chunks(
    stats: RidgeStats,
    x: Any,
    y: Float[Array, "n o"],
    weights: Float[Array, " n"] | None = None,
    *,
    phi: Map | None = None,
    chunk_size: int = 8192,
) -> RidgeStats:
    """Takes rows out chunk by chunk: :func:`downdate` for :func:`update_chunks`.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> x, y = jax.random.normal(jax.random.key(0), (2, 20, 3))
      >>> stats = snnk.ridge.update_chunks(snnk.ridge.init(3, 3), x, y, phi=jax.nn.relu)
      >>> left = snnk.ridge.downdate_chunks(stats, x[:5], y[:5], phi=jax.nn.relu)
      >>> int(left.rows)
      15
    """
    check_chunks(stats, x, y, weights, chunk_size)
    check_features(as_pytree(phi), x, len(y), stats.num_features)
    return accumulate(stats, x, y, weights, phi, chunk_size, -1)


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


def check_features(phi: Map, x: Any, rows: int, num_features: int) -> None:
    """Raises ValueError unless ``phi`` makes as many features of as many rows."""
    features = jax.eval_shape(_features, phi, x)
    if getattr(features, "shape", None) != (rows, num_features):
        raise ValueError(
            f"phi must map {rows} rows to [{rows}, {num_features}]. "
            f"Got {getattr(features, 'shape', features)}."
        )


@jax.jit
def _features(phi: Map, x: Any) -> Any:
    return phi(x)


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
    check_floating(y)
    if weights is not None and weights.shape != y.shape[:1]:
        raise ValueError(f"weights must be [{len(y)}], one a row. Got {weights.shape}.")
