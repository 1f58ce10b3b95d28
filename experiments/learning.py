"""What one step of training is: recipe, optimizer, objective and pure functions."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import sharding as sharding_lib
from experiments.augment import AUGMENTATIONS, normalise
from experiments.scores import scores
from snnk_jax.nn import RandomProjection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run does with a model; every field changes the result.

    ``checkpoint_every``, ``eval_every`` and ``log_every`` are in steps; 0 turns the
    periodic save or evaluation off (the last step always has both). ``rates`` holds
    pairs of a regular expression and what the learning rate is multiplied by at the
    parameters whose whole path it matches; the first match counts.
    """

    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    augment: str = "none"
    eval_split: str = "test"
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0
    rates: tuple[tuple[str, float], ...] = ()

    def record(self) -> dict[str, Any]:
        """The fields as a file gives them back: JSON has lists for tuples."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW at learning rate 1 with warm-up and cosine decay; biases do not decay.

    The training step multiplies its updates by the learning rate, which stands in the
    training state: runs that differ in learning rate or seed share one compilation.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if recipe.warmup_steps else 1.0,
        peak_value=1.0,
        warmup_steps=recipe.warmup_steps,
        decay_steps=recipe.steps,
    )
    decayed = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(schedule, weight_decay=recipe.weight_decay, mask=decayed),
        *([_scale_by_path(recipe.rates)] if recipe.rates else []),
    )


def _scale_by_path(
    rates: tuple[tuple[str, float], ...],
) -> optax.GradientTransformation:
    def scale(path: Any, update: jax.Array) -> jax.Array:
        # The last part of a path into a state is the value of the variable.
        name = sharding_lib.path_name(path).removesuffix("/value")
        matches = (rate for pattern, rate in rates if re.fullmatch(pattern, name))
        return update * next(matches, 1.0)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates)
    )


INPUTS = ("image", "tokens", "token_types", "mask")
"""What of a batch a model is called with."""


def model_inputs(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a model is called with: images in [-1, 1], or ids, types and mask."""
    if "image" in batch:
        return (normalise(batch["image"]),)
    return batch["tokens"], batch["token_types"], batch["mask"]


def example_losses(
    outputs: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy of classes, or half the squared error of values, ``[n]``.

    Labels of a floating dtype are values.
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return optax.l2_loss(outputs[..., 0], labels)
    targets = jax.nn.one_hot(labels, outputs.shape[-1])
    targets = optax.smooth_labels(targets, label_smoothing)
    return optax.softmax_cross_entropy(outputs, targets)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run minimises and what it is judged by: here, the labels of a task."""

    def losses(
        self,
        model: Any,
        batch: dict[str, jax.Array],
        label_smoothing: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The loss of every example ``[n]``, and the outputs ``[n, k]``, float32."""
        outputs = model(*model_inputs(batch), rngs=rngs).astype(jnp.float32)
        return example_losses(outputs, batch["label"], label_smoothing), outputs

    def scores(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Scores of all outputs, better the larger they are."""
        return scores(outputs, labels)


TASK = Objective()


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    objective: Objective = TASK,
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Returns ``step(state, projections, frozen, batch) -> (state, metrics)``, pure."""
    augment = AUGMENTATIONS[recipe.augment]

    def train_step(state, projections, frozen, batch):
        key = jax.random.fold_in(jax.random.key(state["seed"]), state["step"])
        augment_key, dropout_key = jax.random.split(key)
        if "image" in batch:
            batch = batch | {"image": augment(augment_key, batch["image"])}

        def loss_fn(params):
            # Copies, since nnx.remat writes to all variables of the model.
            model = nnx.merge(graphdef, params, projections, frozen, copy=True)
            rngs = nnx.Rngs(dropout=dropout_key)
            losses, outputs = objective.losses(
                model, batch, recipe.label_smoothing, rngs
            )
            return jnp.mean(losses), outputs

        (loss, outputs), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state["params"]
        )
        updates, opt_state = optimizer.update(
            grads, state["opt_state"], state["params"]
        )
        updates = optax.tree.scale(state["learning_rate"], updates)
        params = optax.apply_updates(state["params"], updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
        }
        if not jnp.issubdtype(batch["label"].dtype, jnp.floating):
            hits = jnp.argmax(outputs, axis=-1) == batch["label"]
            metrics["accuracy"] = jnp.mean(hits.astype(jnp.float32))
        changed = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        return state | changed, metrics

    return train_step


def make_eval_step(
    graphdef: Any, objective: Objective = TASK
) -> Callable[..., dict[str, jax.Array]]:
    """Returns ``step(params, projections, frozen, batch) -> outputs``, pure.

    Beside the outputs of every example stand its loss, label and weight.
    """

    def eval_step(params, projections, frozen, batch):
        model = nnx.merge(graphdef, params, projections, frozen)
        losses, outputs = objective.losses(model, batch)
        return {
            "outputs": outputs,
            "loss": losses,
            "label": batch["label"],
            "weight": batch["weight"],
        }

    return eval_step


def split_model(model: nnx.Module, trainable: Any) -> tuple[Any, Any, Any, Any]:
    """Splits into graph, trainable state, projections, and all else that is frozen."""
    graphdef, *states = nnx.split(model, trainable, RandomProjection, ...)
    params, projections, frozen = states
    return graphdef, params, projections, frozen


def make_init(
    optimizer: optax.GradientTransformation, recipe: Recipe
) -> Callable[[Any], dict[str, Any]]:
    """Returns ``init(params) -> state``, pure."""

    def init_state(params):
        # Copies: the state is donated to the step, the caller keeps the model.
        params = jax.tree.map(jnp.copy, params)
        return {
            "params": params,
            "opt_state": optimizer.init(params),
            "step": jnp.zeros((), jnp.int32),
            "learning_rate": jnp.asarray(recipe.learning_rate, jnp.float32),
            "seed": jnp.asarray(recipe.seed, jnp.uint32),
        }

    return init_state


def step_shardings(
    state: Any, projections: Any, frozen: Any, rules: Any, mesh: jax.sharding.Mesh
) -> tuple[Any, Any, Any, Any]:
    """Shardings of a training step's arguments: the three trees and the batch."""
    trees = (state, projections, frozen)
    return (
        *(sharding_lib.shardings(tree, rules, mesh) for tree in trees),
        sharding_lib.batch_sharding(mesh),
    )


def jit_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    in_shardings: tuple[Any, Any, Any, Any],
    objective: Objective = TASK,
) -> Any:
    """The jitted training step, which reuses the memory of the state it is given."""
    replicated = sharding_lib.replicated(in_shardings[-1].mesh)
    return jax.jit(
        make_train_step(graphdef, optimizer, recipe, objective),
        in_shardings=in_shardings,
        out_shardings=(in_shardings[0], replicated),
        donate_argnums=0,
    )


def peak_bytes(compiled: Any) -> int:
    """Device memory of a compiled program: arguments, results and what is between.

    0 where the backend does not tell.
    """
    found = compiled.memory_analysis()
    if found is None:
        return 0
    shared = found.alias_size_in_bytes  # donated arguments hold results
    outside = found.argument_size_in_bytes + found.output_size_in_bytes - shared
    return int(outside + found.temp_size_in_bytes)
