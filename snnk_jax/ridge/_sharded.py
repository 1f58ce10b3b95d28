"""Statistics of rows that lie on many devices, or of many features."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snnk_jax.ridge._accumulate import (
    Map,
    as_pytree,
    first_shift,
    loop_chunks,
    loop_upper,
)
from snnk_jax.ridge._stats import RidgeStats, merge
from snnk_jax.ridge._sums import Total, add_product
from snnk_jax.ridge._update import check_chunks, check_features
from snnk_jax.typing import Array, Float


def update_sharded(
    stats: RidgeStats,
    x: Any,
    y: Float[Array, "n o"],
    weights: Float[Array, " n"] | None = None,
    *,
    mesh: Mesh,
    phi: Map | None = None,
    data: str = "data",
    features: str | None = None,
    chunk_size: int = 8192,
) -> RidgeStats:
    r"""Adds rows that are sharded over a mesh: each device its own, then one reduction.

    Every device streams its rows through its own statistics as :func:`update_chunks`
    does; a single all-reduce over the axis ``data`` adds them up. The same in one
    process or many: there ``x`` and ``y`` are global arrays, of
    ``jax.make_array_from_process_local_data`` for instance.

    With an axis ``features`` each device of it keeps ``m / k`` rows of the Gram
    matrix, for matrices too large for one; all of it computes the features of its
    rows, and every device writes what it keeps.

    Args:
      stats: the statistics so far, as :func:`shardings` places them or anyhow.
      x: inputs, an array or a pytree of arrays with n leading rows. Rows that ``data``
        does not divide are filled up with rows of weight zero.
      y: targets.
      weights: as for :func:`update`.
      mesh: the mesh.
      phi: as for :func:`update_chunks`.
      data: mesh axis of the rows.
      features: mesh axis of the rows of the Gram matrix; None keeps it whole.
      chunk_size: rows at a time, on each device.

    Returns:
      The statistics, replicated but for a Gram matrix sharded over ``features``.

    Raises:
      ValueError: for shapes that do not fit, axes the mesh does not have, features the
        axis does not divide, or rows of several processes that need filling up.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> phi, y = jax.random.normal(jax.random.key(0), (2, 1000, 8))
      >>> stats = snnk.ridge.update_sharded(snnk.ridge.init(8, 8), phi, y, mesh=mesh)
      >>> int(stats.rows)
      1000
    """
    check_chunks(stats, x, y, weights, chunk_size)
    for axis in (data, features):
        if axis is not None and axis not in mesh.shape:
            raise ValueError(f"mesh must have an axis {axis!r}. Got {mesh.axis_names}.")
    if features is not None and stats.num_features % mesh.shape[features]:
        raise ValueError(
            f"num_features must be divisible by the {mesh.shape[features]} devices of "
            f"the axis {features!r}. Got {stats.num_features}."
        )
    rows = NamedSharding(mesh, PartitionSpec(data))
    missing = -len(y) % mesh.shape[data]
    if missing:
        if jax.process_count() > 1:
            raise ValueError(
                f"rows of several processes must be divisible by the "
                f"{mesh.shape[data]} devices of the axis {data!r}: fill up with rows "
                f"of weight zero. Got {len(y)}."
            )
        weights = jnp.ones(len(y)) if weights is None else weights
        x, y, weights = jax.tree.map(
            lambda a: jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)),
            (x, y, weights),
        )
    x, y, weights = jax.device_put((x, y, weights), rows)
    stats = jax.device_put(stats, shardings(stats, mesh, features=features))
    return _update_sharded(
        stats, x, y, weights, as_pytree(phi), mesh, data, features, chunk_size
    )


def shardings(
    stats: RidgeStats, mesh: Mesh, *, features: str | None = None
) -> RidgeStats:
    """Where :func:`update_sharded` keeps each array of the statistics.

    Take them as ``out_shardings`` to make large statistics where they will be.

    Example:
      >>> import functools, jax
      >>> import snnk_jax as snnk
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
      >>> make = functools.partial(snnk.ridge.init, 64, 3)
      >>> where = snnk.ridge.shardings(jax.eval_shape(make), mesh, features="model")
      >>> stats = jax.jit(make, out_shardings=where)()
      >>> stats.gram.high.sharding.spec
      P('model',)
    """
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        _specs(stats, features),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def _specs(stats: RidgeStats, features: str | None) -> RidgeStats:
    specs = jax.tree.map(lambda _: PartitionSpec(), stats)
    gram = PartitionSpec(features) if features else PartitionSpec()
    return specs._replace(gram=Total(gram, gram))


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _update_sharded(
    stats: RidgeStats,
    x: Any,
    y: Any,
    weights: Any,
    phi: Map,
    mesh: Mesh,
    data: str,
    features: str | None,
    chunk_size: int,
) -> RidgeStats:
    specs = _specs(stats, features)
    rows = PartitionSpec(data)

    def add_own_rows(total: Total, left: Any, right: Any, sign: int) -> Total:
        """The rows of the Gram matrix that this device keeps."""
        kept = total.high.shape[0]
        start = jax.lax.axis_index(features) * kept
        left = jax.lax.dynamic_slice_in_dim(left, start, kept, axis=1)
        return add_product(total, left, right, sign)

    num_features = stats.num_features

    def local(stats: RidgeStats, x: Any, y: Any, weights: Any) -> RidgeStats:
        check_features(phi, x, len(y), num_features)  # phi may name the axes
        shift = None, None
        if stats.phi_shift is not None:
            # The same for all: the mean of what each would take.
            first = first_shift(stats, x, y, phi)
            shift = jax.lax.pmean((first.phi_shift, first.y_shift), data)
        own = jax.tree.map(jnp.zeros_like, stats)
        own = own._replace(phi_shift=shift[0], y_shift=shift[1])
        if features:
            own = loop_chunks(own, (x, y, weights), phi, chunk_size, add_own_rows)
        else:
            own = loop_upper(own, (x, y, weights), phi, chunk_size)
        own = jax.lax.psum(own._replace(phi_shift=None, y_shift=None), data)
        return own._replace(phi_shift=shift[0], y_shift=shift[1])

    added = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, rows, rows, rows),
        out_specs=specs,
        # The loops carry sums that start the same everywhere and then differ.
        check_vma=False,
    )(stats, x, y, weights)
    return merge(stats, added)
