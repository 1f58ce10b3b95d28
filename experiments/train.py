"""One training run: a model, a recipe, a folder; resumable bit for bit on CPU.

Order of set-up: shapes, shardings, restore, compiled step, loop. The loop draws its
batch, its augmentation and its dropout from the step number alone, so nothing but the
training state has to be saved.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import data as data_lib
from experiments import sharding as sharding_lib
from experiments.checkpoints import Checkpoints
from experiments.metrics import MetricWriter, Progress, write_json
from experiments.scores import scores
from snnk_jax.nn import RandomProjection

PREEMPTED_EXIT_CODE = 75
"""Exit status after SIGTERM: state saved, run the same command again to go on."""


class Preempted(Exception):  # noqa: N818 (a request, not an error)
    """The run was asked to stop and has saved its state."""


class NonFiniteError(FloatingPointError):
    """The loss or a norm stopped being finite."""


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


def normalise(images: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def augment_none(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the images as they are."""
    return images


def augment_crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts each image by up to an eighth of its side, edges repeated."""
    pad = max(images.shape[1] // 8, 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        start = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def augment_crop_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Random shift, and a horizontal flip of half of the images."""
    crop_key, flip_key = jax.random.split(key)
    images = augment_crop(crop_key, images)
    flip = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": augment_none,
    "crop": augment_crop,
    "crop_flip": augment_crop_flip,
}


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


@contextlib.contextmanager
def stop_requests(checkpoints: Checkpoints) -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM into an answer that the loop asks for after each step.

    Several processes must stop after the same step: there JAX's own handler takes the
    signal and Orbax agrees on the step.
    """
    if jax.process_count() > 1:
        yield checkpoints.reached_preemption
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # a notebook's worker cannot handle signals
        return
    stopped = False

    def request(signum: int, frame: Any) -> None:
        nonlocal stopped
        stopped = True

    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield lambda step: stopped
    finally:
        signal.signal(signal.SIGTERM, previous)


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


def fit(
    model: nnx.Module,
    trainable: Any,
    dataset: data_lib.Dataset,
    recipe: Recipe,
    workdir: str | pathlib.Path,
    *,
    mesh: jax.sharding.Mesh,
    rules: Any,
    name: str = "train",
    keep: int = 2,
    keep_best: bool = False,
    resume: str | pathlib.Path | None = None,
    objective: Objective = TASK,
    loader: Callable[..., data_lib.TrainLoader] = data_lib.TrainLoader,
) -> tuple[nnx.Module, dict[str, Any]]:
    """Trains the parameters that ``trainable`` selects and evaluates them.

    A finished run is not repeated: its ``result.json`` is returned with the model
    restored from its last checkpoint. A run that was stopped goes on from there.

    Args:
      model: the model; not modified.
      trainable: NNX filter of the variables to train.
      dataset: the splits; ``recipe.eval_split`` names the one that is scored.
      recipe: what to do.
      workdir: folder of this run alone.
      mesh: devices, with an axis ``data``.
      rules: sharding rules, see :func:`experiments.sharding.shardings`.
      name: shown beside the progress.
      keep: checkpoints kept on disk.
      keep_best: return the parameters of the best evaluation, not of the last step.
      resume: ``workdir`` of an earlier run of the same recipe, to go on from while
        this one has no checkpoint of its own.
      objective: the loss and the scores.
      loader: makes the loader of the training batches.

    Returns:
      The trained model and its result: final metrics, best metric, seconds.

    Raises:
      Preempted: after SIGTERM, with the state saved.
      NonFiniteError: if loss or norms stop being finite; the last good checkpoint
        stays.
      ValueError: if the batch does not fit the data or the mesh, or ``workdir`` holds
        a damaged checkpoint or a run of another recipe.
    """
    workdir = pathlib.Path(workdir)
    chief = jax.process_index() == 0
    process = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    batches_of = loader(dataset.train, recipe.batch_size, recipe.seed, **process)
    scored = getattr(dataset, recipe.eval_split)
    if recipe.batch_size % mesh.shape["data"]:
        raise ValueError(
            "batch_size must be divisible by the mesh axis 'data'. "
            f"Got {recipe.batch_size} and {mesh.shape['data']}."
        )
    optimizer = make_optimizer(recipe)
    graphdef, params, projections, frozen = split_model(model, trainable)

    init_state = make_init(optimizer, recipe)
    shapes = jax.eval_shape(init_state, params)
    in_shardings = step_shardings(shapes, projections, frozen, rules, mesh)
    state_shardings, *shared = in_shardings
    projections = jax.device_put(projections, shared[0])
    frozen = jax.device_put(frozen, shared[1])
    batch_sharding = shared[2]

    state = jax.jit(init_state, out_shardings=state_shardings)(params)
    best: dict[str, Any] = {"score": -math.inf, "step": 0}
    best_params = jax.tree.map(jnp.copy, state["params"]) if keep_best else None
    seconds = 0.0
    checkpoints = Checkpoints(workdir / "checkpoints", keep)

    def saved(state: Any, best_params: Any) -> dict[str, Any]:
        extra = {} if best_params is None else {"best_params": best_params}
        return state | {"projections": projections} | extra

    source = checkpoints
    if resume is not None and checkpoints.latest_step() is None:
        source = Checkpoints(pathlib.Path(resume) / "checkpoints", keep)
    if source.latest_step() is not None:
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            saved(state, best_params),
        )
        try:
            restored, record = source.restore(target)
            _check_recipe(record["recipe"], recipe, workdir)
        except ValueError:
            checkpoints.close()
            raise
        finally:
            if source is not checkpoints:
                source.close()
        projections = restored.pop("projections")
        best_params = restored.pop("best_params", None)
        state, best, seconds = restored, record["best"], record["seconds"]
    start = int(state["step"])
    train_step = jit_train_step(graphdef, optimizer, recipe, in_shardings, objective)
    eval_step = jax.jit(
        make_eval_step(graphdef, objective),
        in_shardings=(state_shardings["params"], *shared),
        out_shardings=sharding_lib.replicated(mesh),
    )

    def evaluate(params: Any) -> dict[str, float]:
        parts = []
        for batch in data_lib.eval_batches(scored, recipe.batch_size, **process):
            batch = sharding_lib.place(batch, batch_sharding)
            parts.append(jax.device_get(eval_step(params, projections, frozen, batch)))
        whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        real = whole["weight"] > 0  # the last batch is filled up
        loss = float(np.mean(whole["loss"][real], dtype=np.float64))
        found = objective.scores(whole["outputs"][real], whole["label"][real])
        return {"loss": loss} | found

    def save(step: int) -> None:
        record = {
            "best": best,
            "seconds": seconds,
            "data": {"seed": recipe.seed, "next_example": step * recipe.batch_size},
            "recipe": recipe.record(),
        }
        checkpoints.save(step, saved(state, best_params), record)

    def trained(state: Any) -> nnx.Module:
        params = state["params"] if best_params is None else best_params
        return nnx.merge(graphdef, params, projections, frozen)

    result_path = workdir / "result.json"
    if start == recipe.steps and result_path.is_file():
        checkpoints.close()
        return trained(state), json.loads(result_path.read_text())

    writer = MetricWriter(workdir, start) if chief else None
    progress = Progress(name, start, recipe.steps, quiet=not chief)
    evaluation: dict[str, float] = {}
    step_seconds: list[float] = []
    programs: dict[Any, Any] = {}  # one a shape of the batch
    memory = 0
    batches = data_lib.prefetch(
        lambda step: sharding_lib.place(batches_of.batch(step), batch_sharding),
        start,
        recipe.steps,
    )
    try:
        with stop_requests(checkpoints) as stop_requested, contextlib.closing(batches):
            last_good = start
            clock = time.monotonic()
            for step, batch in enumerate(batches, start + 1):
                arguments = (state, projections, frozen, batch)
                shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
                if shapes not in programs:
                    before = time.monotonic()
                    programs[shapes] = train_step.lower(*arguments).compile()
                    memory = max(memory, peak_bytes(programs[shapes]))
                    clock += time.monotonic() - before
                state, metrics = programs[shapes](*arguments)
                last = step == recipe.steps
                stopping = stop_requested(step)
                saving = last or stopping or _due(step, recipe.checkpoint_every)
                evaluating = last or _due(step, recipe.eval_every)
                if saving or evaluating or last or _due(step, recipe.log_every):
                    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                    now = time.monotonic()
                    step_seconds.append((now - clock) / (step - last_good))
                    seconds += now - clock
                    if not all(math.isfinite(value) for value in values.values()):
                        kept = checkpoints.latest_step()
                        raise NonFiniteError(
                            f"loss and norms must stay finite. Got {values} between "
                            f"steps {last_good + 1} and {step} of {name}. "
                            f"{'No step' if kept is None else f'Step {kept}'} is saved "
                            f"in {checkpoints.directory}; try a lower learning rate "
                            f"than {recipe.learning_rate}."
                        )
                    last_good = step
                    if writer:
                        writer.write(
                            step, **{f"train/{k}": v for k, v in values.items()}
                        )
                    progress.note(f"loss {values['loss']:.4f}")
                    clock = time.monotonic()
                if evaluating:
                    evaluation = evaluate(state["params"])
                    if evaluation[dataset.metric] > best["score"]:
                        best = {"score": evaluation[dataset.metric], "step": step}
                        if keep_best:
                            best_params = jax.tree.map(jnp.copy, state["params"])
                    if writer:
                        prefix = recipe.eval_split
                        writer.write(
                            step, **{f"{prefix}/{k}": v for k, v in evaluation.items()}
                        )
                    clock = time.monotonic()
                if saving:
                    save(step)
                    clock = time.monotonic()
                progress.update(step)
                if stopping and not last:
                    raise Preempted(f"{name} stopped at step {step}, state saved.")
    finally:
        progress.close()
        checkpoints.close()
        if writer:
            writer.close()

    if not evaluation:  # killed between the last checkpoint and the result
        evaluation = evaluate(state["params"])
    result = result_of(
        recipe,
        dataset.metric,
        evaluation,
        best=best,
        seconds=seconds,
        step_seconds=float(np.median(step_seconds or [seconds / recipe.steps])),
        memory=memory,
    )
    if chief:
        write_json(result_path, result)
    return trained(state), result


def result_of(
    recipe: Recipe,
    metric: str,
    evaluation: dict[str, float],
    *,
    best: dict[str, Any],
    seconds: float,
    step_seconds: float,
    memory: int,
    together: int = 1,
) -> dict[str, Any]:
    """What a run came to, as it is written to ``result.json``.

    Seconds are the run's own share, ``memory`` that of all runs trained together.
    """
    return {
        "split": recipe.eval_split,
        **evaluation,
        "metric": metric,
        "score": evaluation[metric],
        "best": best,
        "seconds": seconds,
        "step_ms": 1e3 * step_seconds,
        "memory_bytes": memory,
        "together": together,
        "recipe": recipe.record(),
    }


def _check_recipe(
    stored: dict[str, Any], recipe: Recipe, workdir: pathlib.Path
) -> None:
    """Refuses to go on with a run that was started with another recipe."""
    # How often a run reports and saves does not change what it learns.
    free = {"log_every", "eval_every", "checkpoint_every"}
    changed = {
        name: (stored.get(name), value)
        for name, value in recipe.record().items()
        if name not in free and stored.get(name) != value
    }
    if changed:
        raise ValueError(
            f"{workdir} must hold a run of the same recipe; choose another workdir. "
            f"Got (stored, asked) values {changed}."
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
