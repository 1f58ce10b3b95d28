"""What a run will cost, before it starts: parameters, memory and operations."""

from typing import Any

import jax
from flax import nnx

from experiments import learning
from experiments.splits import Batch
from snnk_jax.nn import count_parameters as count
from snnk_jax.nn import parameter_groups as groups
from snnk_jax.nn import parameter_table

__all__ = ["cost", "count", "groups", "parameter_table"]


def cost(
    model: nnx.Module, trainable: Any, recipe: learning.Recipe, batch: Batch
) -> dict[str, float]:
    """Estimates a training step from shapes alone: FLOPs, and bytes that stay.

    ``state_bytes`` are parameters, optimizer state and projections;
    ``gradient_bytes`` the gradients. Activations come on top.
    """
    graphdef, params, projections, frozen = learning.split_model(model, trainable)
    optimizer = learning.make_optimizer(recipe)
    state = jax.eval_shape(learning.make_init(optimizer, recipe), params)
    trees = jax.eval_shape(lambda *trees: trees, state, projections, frozen, batch)
    step = jax.jit(learning.make_train_step(graphdef, optimizer, recipe))
    analysis = step.lower(*trees).cost_analysis() or {}

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return {
        "flops": float(analysis.get("flops", float("nan"))),
        "state_bytes": size(trees[:3]),
        "gradient_bytes": size(params),
    }
