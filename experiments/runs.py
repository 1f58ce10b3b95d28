"""The runs of one method: trained alone or together, and not twice."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

import snnk_jax as snnk
from experiments import cohort, learning, summary, tasks, train
from experiments.loading import TrainLoader
from experiments.metrics import write_json
from experiments.splits import Dataset
from snnk_jax._files import write_atomic

_SAMPLES = 256
"""Examples on which the scales of adapters' inputs are measured."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a method: what it varies, which split scores it, and its folder."""

    learning_rate: float
    seed: int
    split: str
    name: str


Trained = tuple[Any, dict[str, Any]] | train.NonFiniteError
"""A trained model and its result, or why there is none."""


@dataclasses.dataclass(frozen=True)
class Shared:
    """What the runs of a method have in common.

    Attributes:
      config: the settings.
      base: the model that they start from.
      mark: its fingerprint, the head left out.
      dataset: the splits.
      mesh: the devices.
      method: key of :data:`experiments.tasks.METHODS`.
      root: folder of the folders of the runs.
    """

    config: ConfigDict
    base: Any
    mark: str
    dataset: Dataset
    mesh: jax.sharding.Mesh
    method: str
    root: pathlib.Path

    @property
    def task(self) -> tasks.Method:
        """The method itself."""
        return tasks.METHODS[self.method]

    def recipe(self, run: Run) -> learning.Recipe:
        """What one of the runs does."""
        return recipe_for(self.config, run.learning_rate, run.seed, run.split)


def recipe_for(
    config: ConfigDict, learning_rate: float, seed: int, eval_split: str
) -> learning.Recipe:
    """The training recipe of one run of a config."""
    return learning.Recipe(
        learning_rate=learning_rate,
        steps=config.optim.steps,
        batch_size=config.optim.batch_size,
        seed=seed,
        warmup_steps=config.optim.warmup_steps,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
        label_smoothing=config.optim.label_smoothing,
        augment=config.data.augment,
        eval_split=eval_split,
        log_every=config.log.log_every,
        eval_every=config.log.eval_every,
        checkpoint_every=config.log.checkpoint_every,
    )


def run_several(shared: Shared, runs: Sequence[Run]) -> list[Trained]:
    """Trains runs of a method, ``config.together`` at a time; not those that are done.

    Runs trained together are done when their ``summary.json`` is there. One of a run by
    itself says that it diverged; it ends with ``result.json``, and its model is in its
    checkpoint.
    """
    size = shared.config.together
    found: dict[str, Trained] = {}
    for run in runs:
        folder = shared.root / run.name
        if (folder / "summary.json").is_file():
            found[run.name] = _read_result(shared, run, folder / "summary.json")
        elif size > 1 and (folder / "result.json").is_file():
            # Trained by itself; that writes its adapter if a stop came before it.
            found[run.name] = _run_one(shared, run)
    left = [run for run in runs if run.name not in found]
    for start in range(0, len(left), size):
        group = left[start : start + size]
        trained = (
            [_run_one(shared, group[0])] if size == 1 else _run_together(shared, group)
        )
        found |= dict(zip((run.name for run in group), trained, strict=True))
    return [found[run.name] for run in runs]


def _run_one(shared: Shared, run: Run) -> Trained:
    config, task = shared.config, shared.task
    workdir = shared.root / run.name
    recipe = shared.recipe(run)
    earlier = pathlib.Path(config.resume) / run.name
    model = _adapt(shared, run.seed)
    if jax.process_index() == 0 and not (workdir / "result.json").is_file():
        _announce(workdir.name, shared, model, recipe)
    try:
        trained, result = train.fit(
            model,
            task.trainable,
            shared.dataset,
            recipe,
            workdir,
            mesh=shared.mesh,
            rules=config.mesh.rules,
            name=workdir.name,
            keep=config.log.keep,
            keep_best=config.keep_best,
            resume=earlier if config.resume and earlier.is_dir() else None,
            base_fingerprint=shared.mark,
        )
    except train.NonFiniteError as error:
        if jax.process_index() == 0:
            _write_diverged(shared, workdir, recipe)
        return error
    return trained, _finish(shared, trained, result, workdir)


def _run_together(shared: Shared, runs: Sequence[Run]) -> list[Trained]:
    """Trains the runs in one program."""
    recipes = [shared.recipe(run) for run in runs]
    models = [_adapt(shared, run.seed) for run in runs]
    _announce(f"{len(runs)} runs", shared, models[0], recipes[0])
    outcomes = cohort.fit(
        *(models, shared.task.trainable, shared.dataset, recipes),
        mesh=shared.mesh,
        name=runs[0].name,
        base_fingerprint=shared.mark,
    )
    done: list[Trained] = []
    for run, recipe, outcome in zip(runs, recipes, outcomes, strict=True):
        folder = shared.root / run.name
        folder.mkdir(parents=True, exist_ok=True)
        # Of an earlier attempt, which was stopped before its summary.
        (folder / "adapter.safetensors").unlink(missing_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in outcome.history)
        write_atomic(folder / "metrics.jsonl", lines)
        if outcome.result is None:
            file = _write_diverged(shared, folder, recipe)
            done.append(_read_result(shared, run, file))
            continue
        result = _finish(shared, outcome.model, dict(outcome.result), folder)
        write_json(folder / "summary.json", result)
        done.append((outcome.model, result))
    return done


def _write_diverged(
    shared: Shared, folder: pathlib.Path, recipe: learning.Recipe
) -> pathlib.Path:
    file = folder / "summary.json"
    diverged = {"diverged": True, "recipe": recipe.record(), "base": shared.mark}
    write_json(file, diverged)
    return file


def _read_result(shared: Shared, run: Run, file: pathlib.Path) -> Trained:
    """A finished run, whose model is in its adapter file: the base stands for it."""
    folder = file.parent
    result = json.loads(file.read_text())
    if "recipe" in result:  # early summaries of diverged runs have none
        train.check_recipe(result["recipe"], shared.recipe(run), folder)
    train.check_base(result, shared.mark, folder)
    if result.get("diverged"):
        return train.NonFiniteError(
            f"loss and norms must stay finite. Got others in {folder.name}; try a "
            "lower learning rate."
        )
    return shared.base, result | {"workdir": str(folder)}


def _adapt(shared: Shared, seed: int) -> Any:
    """The base model with a method's modules, which know their inputs' scales."""
    config, dataset, task = shared.config, shared.dataset, shared.task
    if task.fresh:
        return tasks.build_model(config, dataset.num_classes, nnx.Rngs(params=seed))
    model = task.adapt(shared.base, config, nnx.Rngs(params=seed, projection=seed))
    if not task.standardize:
        return model
    size = min(_SAMPLES, len(dataset.train))
    # The same examples for all seeds: statistics are no part of a run's randomness.
    batch = TrainLoader(dataset.train, size, 0).batch(0)
    return snnk.nn.standardize(
        model, *learning.model_inputs(batch), where=batch.get("mask")
    )


def _announce(name: str, shared: Shared, model: Any, recipe: learning.Recipe) -> None:
    task = shared.task
    print(f"\n{name}: {task.title}")
    print(summary.parameter_table(model, task.trainable))
    batch = TrainLoader(shared.dataset.train, recipe.batch_size, 0).batch(0)
    cost = summary.cost(model, task.trainable, recipe, batch)
    # Backends other than CPUs may not count.
    counted = math.isfinite(cost["flops"])
    work = f"{cost['flops'] / 1e9:.1f} GFLOP a step" if counted else "Steps"
    print(
        f"{work} of {recipe.batch_size} examples; "
        f"{cost['state_bytes'] / 1e6:.1f} MB of state, "
        f"{cost['gradient_bytes'] / 1e6:.1f} MB of gradients, and activations",
        flush=True,
    )


def _finish(
    shared: Shared, model: Any, result: dict[str, Any], workdir: pathlib.Path
) -> dict[str, Any]:
    """Completes a result and writes the adapter beside it."""
    task = shared.task
    result |= {
        "method": shared.method,
        "title": task.title,
        "workdir": str(workdir),
        "counts": dataclasses.asdict(summary.count(model, task.trainable)),
    }
    file = workdir / "adapter.safetensors"
    if jax.process_index() == 0:
        if not file.is_file():
            mark = snnk.adapters.fingerprint(shared.base, exclude=task.trained)
            snnk.adapters.save_adapter(
                file,
                model,
                base_fingerprint=mark,
                trained=task.trained,
                exclude=task.trained,
            )
        result["adapter_bytes"] = file.stat().st_size
        print(
            f"{workdir.name}: {result['split']} {result['metric']} "
            f"{100 * result['score']:.2f} %, {result['seconds']:.0f} s",
            flush=True,
        )
    return result
