"""A device mesh from the config, and shardings of state trees by path rules."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Rule = tuple[str, Any]


def mesh_shape(
    axes: Sequence[tuple[str, int]], num_devices: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Sizes and names of the mesh axes; one size may be -1 for what is left.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    names = tuple(name for name, _ in axes)
    sizes = [int(size) for _, size in axes]
    if any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh.axes must be positive or -1. Got {tuple(axes)}.")
    if sizes.count(-1) == 1:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(num_devices // known, 1)
    if int(np.prod(sizes)) != num_devices:
        raise ValueError(
            f"mesh.axes must multiply to the {num_devices} devices. Got {tuple(axes)}."
        )
    return tuple(sizes), names


def make_mesh(
    axes: Sequence[tuple[str, int]], devices: Sequence[Any] | None = None
) -> Mesh:
    """Builds a mesh with automatic axes, on all devices unless some are given."""
    devices = jax.devices() if devices is None else devices
    sizes, names = mesh_shape(axes, len(devices))
    return jax.make_mesh(
        sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices
    )


def path_name(path: Sequence[Any]) -> str:
    """Joins the keys of a tree path by ``/``."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
        for key in path
    )


def shardings(tree: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
    """Shardings for a tree of arrays (or shapes), by the first rule that matches.

    A rule is ``(regex, tactic)``; the regex must match the whole ``/``-joined path.
    Tactics:

    * ``"replicate"``: every device holds the array.
    * ``("fsdp", axis)``: the largest dimension that the mesh axis divides is cut.
    * ``("shard", axis, dim)``: dimension ``dim`` is cut over the mesh axis.

    Scalars are replicated under every tactic.

    Raises:
      ValueError: if a path matches no rule, or a rule cannot be carried out.
    """

    def spec(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, tactic in rules:
            if re.fullmatch(pattern, name):
                return NamedSharding(mesh, _partition(name, leaf.shape, tactic, mesh))
        raise ValueError(
            f"mesh.rules must cover every array; add ('.*', 'replicate'). Got {name!r}."
        )

    return jax.tree_util.tree_map_with_path(spec, tree)


def _partition(
    name: str, shape: tuple[int, ...], tactic: Any, mesh: Mesh
) -> PartitionSpec:
    if not shape:
        return PartitionSpec()
    match tactic if isinstance(tactic, str) else tuple(tactic):
        case "replicate":
            return PartitionSpec()
        case ("fsdp", axis) if axis in mesh.shape:
            divisible = [d for d, n in enumerate(shape) if n % mesh.shape[axis] == 0]
            if not divisible:
                return PartitionSpec()
            dim = max(divisible, key=lambda d: shape[d])
        case ("shard", axis, int(dim)) if axis in mesh.shape and (
            -len(shape) <= dim < len(shape)
        ):
            if shape[dim] % mesh.shape[axis]:
                raise ValueError(
                    f"{name} must be divisible by {mesh.shape[axis]} along dimension "
                    f"{dim} for {tactic!r}. Got {shape}."
                )
        case _:
            raise ValueError(
                "a tactic must be 'replicate', ('fsdp', axis) or ('shard', axis, dim) "
                f"with an axis of {tuple(mesh.shape)} and a dimension of the array. "
                f"Got {tactic!r} for {name} of shape {shape}."
            )
    return PartitionSpec(
        *(axis if d == dim % len(shape) else None for d in range(len(shape)))
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis of a batch over the mesh axis ``data``."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, sharding: Any) -> Any:
    """Puts process-local host arrays on the mesh as global arrays."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), tree
    )
