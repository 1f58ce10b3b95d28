"""Sufficient statistics of a ridge regression, gathered row by row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snnk_jax.ridge._sums import Total, add
from snnk_jax.typing import Dtype


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
        multiplied. Without it bfloat16 features are multiplied as they are into sums
        in float32, twice and more as fast on a TPU or GPU.

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
    return _merge(a, b)


@jax.jit
def _merge(a: RidgeStats, b: RidgeStats) -> RidgeStats:
    if a.phi_shift is not None and b.phi_shift is not None:
        empty = a.rows == 0
        a = a._replace(
            phi_shift=jnp.where(empty, b.phi_shift, a.phi_shift),
            y_shift=jnp.where(empty, b.y_shift, a.y_shift),
        )
    b = recentre(b, *shifts(a))
    sums = {
        name: add(add(getattr(a, name), getattr(b, name).high), getattr(b, name).low)
        for name in RidgeStats._fields
        if isinstance(getattr(a, name), Total)
    }
    return a._replace(rows=a.rows + b.rows, **sums)


def recentre(stats: RidgeStats, phi_shift: Any, y_shift: Any) -> RidgeStats:
    """The same rows about another shift."""
    phi_old, y_old = shifts(stats)
    p, q = phi_old - phi_shift, y_old - y_shift
    s, t, w = stats.phi_sum.high, stats.y_sum.high, stats.weight.high
    # With (phi - new) = (phi - old) + p and (y - new) = (y - old) + q.
    terms = {
        "gram": jnp.outer(s, p) + jnp.outer(p, s) + w * jnp.outer(p, p),
        "cross": jnp.outer(s, q) + jnp.outer(p, t) + w * jnp.outer(p, q),
        "phi_sum": w * p,
        "y_sum": w * q,
        "y_square": 2 * q * t + w * q * q,
    }
    sums = {name: add(getattr(stats, name), term) for name, term in terms.items()}
    return stats._replace(phi_shift=phi_shift, y_shift=y_shift, **sums)


def shifts(stats: RidgeStats) -> tuple[Any, Any]:
    """Both shifts, zeros where there is none."""
    if stats.phi_shift is None:
        return jnp.zeros_like(stats.phi_sum.high), jnp.zeros_like(stats.y_sum.high)
    return stats.phi_shift, stats.y_shift


def check_floating(y: Any, name: str = "y") -> None:
    """Raises ValueError for targets that are whole numbers: their sums would round."""
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating; one-hot encode classes. Got {y.dtype.name}."
        )
