"""One training run: a model, a recipe, a folder; resumable bit for bit on CPU.

Order of set-up: shapes, shardings, restore, compiled step, loop. The loop draws its
batch, its augmentation and its dropout from the step number alone, so nothing but the
training state has to be saved.
"""

import contextlib
import json
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import learning
from experiments import sharding as sharding_lib
from experiments.checkpoints import Checkpoints
from experiments.loading import TrainLoader, eval_batches, prefetch
from experiments.metrics import MetricWriter, Progress, write_json
from experiments.splits import Dataset

PREEMPTED_EXIT_CODE = 75
"""Exit status after SIGTERM: state saved, run the same command again to go on."""


class Preempted(Exception):  # noqa: N818 (a request, not an error)
    """The run was asked to stop and has saved its state."""


class NonFiniteError(FloatingPointError):
    """The loss or a norm stopped being finite."""


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


def fit(
    model: nnx.Module,
    trainable: Any,
    dataset: Dataset,
    recipe: learning.Recipe,
    workdir: str | pathlib.Path,
    *,
    mesh: jax.sharding.Mesh,
    rules: Any,
    name: str = "train",
    keep: int = 2,
    keep_best: bool = False,
    resume: str | pathlib.Path | None = None,
    objective: learning.Objective = learning.TASK,
    loader: Callable[..., TrainLoader] = TrainLoader,
    base_fingerprint: str = "",
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
      base_fingerprint: of the model without what the run adds to it: another one is
        refused by a run that was stopped or has finished.

    Returns:
      The trained model and its result: metrics of that model, best metric, seconds.

    Raises:
      Preempted: after SIGTERM, with the state saved, or the result.
      NonFiniteError: if loss or norms stop being finite; the last good checkpoint
        stays.
      ValueError: if the batch does not fit the data or the mesh, or ``workdir`` holds
        a damaged checkpoint or a run of another recipe or base model.
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
    optimizer = learning.make_optimizer(recipe)
    graphdef, params, projections, frozen = learning.split_model(model, trainable)

    init_state = learning.make_init(optimizer, recipe)
    shapes = jax.eval_shape(init_state, params)
    in_shardings = learning.step_shardings(shapes, projections, frozen, rules, mesh)
    state_shardings, *shared = in_shardings
    projections = jax.device_put(projections, shared[0])
    frozen = jax.device_put(frozen, shared[1])
    batch_sharding = shared[2]

    state = jax.jit(init_state, out_shardings=state_shardings)(params)
    best: dict[str, Any] = {"score": -math.inf, "step": 0}
    best_params = jax.tree.map(jnp.copy, state["params"]) if keep_best else None
    seconds = 0.0
    memory, earlier_step_seconds = 0, 0.0
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
            check_recipe(record["recipe"], recipe, workdir, keep_best=keep_best)
            check_base(record, base_fingerprint, workdir)
        except ValueError:
            checkpoints.close()
            raise
        finally:
            if source is not checkpoints:
                source.close()
        projections = restored.pop("projections")
        best_params = restored.pop("best_params", None)
        state, best, seconds = restored, record["best"], record["seconds"]
        # Records of before have neither.
        memory = record.get("memory", 0)
        earlier_step_seconds = record.get("step_seconds", 0.0)
    start = int(state["step"])
    train_step = learning.jit_train_step(
        graphdef, optimizer, recipe, in_shardings, objective
    )
    eval_step = jax.jit(
        learning.make_eval_step(graphdef, objective),
        in_shardings=(state_shardings["params"], *shared),
        out_shardings=sharding_lib.replicated(mesh),
    )

    step_seconds: list[float] = []

    def evaluate(params: Any) -> dict[str, float]:
        parts = []
        for batch in eval_batches(scored, recipe.batch_size, **process):
            batch = sharding_lib.place(batch, batch_sharding)
            parts.append(jax.device_get(eval_step(params, projections, frozen, batch)))
        whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        real = whole["weight"] > 0  # the last batch is filled up
        loss = float(np.mean(whole["loss"][real], dtype=np.float64))
        if not np.all(np.isfinite(whole["outputs"][real])):
            raise NonFiniteError(
                f"outputs of {name} on the {recipe.eval_split} split must be finite. "
                f"Got others; try a lower learning rate than {recipe.learning_rate}."
            )
        found = objective.scores(whole["outputs"][real], whole["label"][real])
        return {"loss": loss} | found

    def median_step() -> float:
        """Of this process; of the one before it, if that trained all the steps."""
        whole = earlier_step_seconds or seconds / recipe.steps
        return float(np.median(step_seconds or [whole]))

    def save(step: int) -> None:
        record = {
            "best": best,
            "seconds": seconds,
            "data": {"seed": recipe.seed, "next_example": step * recipe.batch_size},
            "recipe": recipe.record(),
            "base": base_fingerprint,
            "memory": memory,
            "step_seconds": median_step(),
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
    programs: dict[Any, Any] = {}  # one a shape of the batch
    stopping = False
    batches = prefetch(
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
                    memory = max(memory, learning.peak_bytes(programs[shapes]))
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
            if keep_best:  # the result is that of the model that is returned
                evaluation = evaluate(best_params)
            elif not evaluation:  # killed between the last checkpoint and the result
                evaluation = evaluate(state["params"])
            result = result_of(
                recipe,
                dataset.metric,
                evaluation,
                best=best,
                seconds=seconds,
                step_seconds=median_step(),
                memory=memory,
                base_fingerprint=base_fingerprint,
            )
            # A result says that its checkpoint is there.
            checkpoints.wait()
            if chief:
                write_json(result_path, result)
            # A request that came with the last step is for the runs behind this one.
            alone = jax.process_count() == 1
            if stopping or (alone and stop_requested(recipe.steps)):
                raise Preempted(f"{name} has finished, result saved.")
    finally:
        progress.close()
        checkpoints.close()
        if writer:
            writer.close()
    return trained(state), result


def result_of(
    recipe: learning.Recipe,
    metric: str,
    evaluation: dict[str, float],
    *,
    best: dict[str, Any],
    seconds: float,
    step_seconds: float,
    memory: int,
    together: int = 1,
    base_fingerprint: str = "",
) -> dict[str, Any]:
    """What a run came to, as it is written to ``result.json``.

    Seconds are the run's own share, ``memory`` that of all runs trained together; 0
    where it is not known.
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
        "base": base_fingerprint,
    }


def check_base(
    stored: dict[str, Any], base_fingerprint: str, workdir: pathlib.Path
) -> None:
    """Refuses to go on with a run on another base model; early records name none."""
    found = stored.get("base")
    if found and base_fingerprint and found != base_fingerprint:
        raise ValueError(
            f"{workdir} must hold a run on the same base model, fingerprint "
            f"{base_fingerprint}; choose another workdir. Got {found}."
        )


def check_recipe(
    stored: dict[str, Any],
    recipe: learning.Recipe,
    workdir: pathlib.Path,
    *,
    keep_best: bool = False,
) -> None:
    """Refuses to go on with a run that was started with another recipe."""
    # How often a run reports and saves does not change what it learns; how often it is
    # scored does, where the best score decides.
    free = {"log_every", "checkpoint_every"}
    if not keep_best:
        free.add("eval_every")
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
