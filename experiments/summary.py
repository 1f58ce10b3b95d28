"""What a run will cost, before it starts: parameters, memory and operations."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import train
from experiments.data import Batch
from snnk_jax.nn import AdapterParam, RandomProjection


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters: trained ones with the head apart, and frozen ones."""

    trained: int
    head: int
    frozen: int
    projections: int

    @property
    def total(self) -> int:
        """All numbers the model holds."""
        return self.trained + self.head + self.frozen + self.projections


def count(model: nnx.Module, trainable: Any) -> Counts:
    """Counts the parameters of a model (or of its shapes)."""

    def size(state: Any) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))

    _, params, projections, frozen = train.split_model(model, trainable)
    head = nnx.filter_state(params, nnx.PathContains("head"))
    return Counts(
        trained=size(params) - size(head),
        head=size(head),
        frozen=size(frozen),
        projections=size(projections),
    )


def groups(model: nnx.Module, trainable: Any) -> list[tuple[str, int, int]]:
    """Rows ``(group, parameters, trained parameters)`` of the parameter table.

    A group is the first part of a path, with the blocks taken together and the
    adapters and projections inside them apart.
    """
    _, params, rest = nnx.split(model, trainable, ...)
    rows: dict[str, list[int]] = {}
    for state, trained in ((params, True), (rest, False)):
        for path, variable in nnx.to_flat_state(state):
            name = str(path[0])
            if isinstance(variable, AdapterParam):
                name += " (adapters)"
            elif isinstance(variable, RandomProjection):
                name += " (projections)"
            row = rows.setdefault(name, [0, 0])
            row[0] += int(np.prod(variable.shape))
            row[1] += int(np.prod(variable.shape)) * trained
    return [(name, total, trained) for name, (total, trained) in rows.items()]


def parameter_table(model: nnx.Module, trainable: Any) -> str:
    """The parameter table as text: per group, then totals with the head apart."""
    counts = count(model, trainable)
    lines = [f"{'group':28}{'parameters':>12}{'trained':>12}"]
    for name, total, trained in groups(model, trainable):
        lines.append(f"{name:28}{total:12,}{trained:12,}")
    share = (counts.trained + counts.head) / counts.total
    lines.append(f"{'total':28}{counts.total:12,}{counts.trained + counts.head:12,}")
    lines.append(
        f"trained without the head {counts.trained:,}, head {counts.head:,}, "
        f"{share:.2%} of all; frozen projections {counts.projections:,}"
    )
    return "\n".join(lines)


def cost(
    model: nnx.Module, trainable: Any, recipe: train.Recipe, batch: Batch
) -> dict[str, float]:
    """Estimates a training step from shapes alone: FLOPs, and bytes that stay.

    ``state_bytes`` are parameters, optimizer state and projections;
    ``gradient_bytes`` the gradients. Activations come on top.
    """
    graphdef, params, projections, frozen = train.split_model(model, trainable)
    optimizer = train.make_optimizer(recipe)
    state = jax.eval_shape(train.make_init(optimizer, recipe), params)
    trees = jax.eval_shape(lambda *trees: trees, state, projections, frozen, batch)
    step = jax.jit(train.make_train_step(graphdef, optimizer, recipe))
    analysis = step.lower(*trees).cost_analysis() or {}

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return {
        "flops": float(analysis.get("flops", float("nan"))),
        "state_bytes": size(trees[:3]),
        "gradient_bytes": size(params),
    }
