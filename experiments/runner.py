"""Turns a config into runs, and their results into a report."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import snnk_jax as snnk
from experiments import cohort, glue, learning, report, summary, tasks, train, workdirs
from experiments import data as data_lib
from experiments import sharding as sharding_lib
from experiments.config import check_training as check
from experiments.config import methods_of
from experiments.loading import TrainLoader
from experiments.metrics import write_json
from experiments.splits import Dataset
from snnk_jax._files import write_atomic
from snnk_jax.models.bert import Bert
from snnk_jax.models.vit_params import save_vit

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


def load_data(config: ConfigDict) -> Dataset:
    """The data set of a config: images for a ViT, text for a BERT."""
    options = config.data
    shared = {
        "directory": options.dir,
        "train_size": options.train_size,
        "val_fraction": options.val_fraction,
        "test_size": options.test_size,
    }
    if config.model.family == "vit":
        return data_lib.load(options.name, image_size=config.model.image_size, **shared)
    weights = tasks.weights_path(config.model.weights)
    folder = pathlib.Path(weights)
    tokenizer = options.tokenizer or str(folder if folder.is_dir() else folder.parent)
    return glue.load(options.name, tokenizer=tokenizer, length=options.length, **shared)


def run(
    config: ConfigDict, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Runs every method and seed of a config; finished runs are not repeated.

    Args:
      config: a config of :func:`experiments.load_config` or the command line.
      workdir: folder for everything the runs write. A folder that holds runs of
        other settings is refused.
      command: shown in the report.

    Returns:
      The results of the final runs, as in ``results.json`` of each run.

    Raises:
      ValueError: for settings that no run could use, before any device work.
    """
    check(config)
    workdir = pathlib.Path(workdir)
    if config.resume and not pathlib.Path(config.resume).is_dir():
        raise ValueError(
            f"config.resume must be the workdir of a run. Got {config.resume!r}."
        )
    if config.resume:
        settings = json.loads(config.to_json_best_effort())
        workdirs.check_settings(
            pathlib.Path(config.resume), settings, workdirs.FREE, "config.resume"
        )
    workdirs.claim(workdir, config)
    dataset = load_data(config)
    mesh = sharding_lib.make_mesh(config.mesh.axes)
    chief = jax.process_index() == 0
    environment = workdirs.describe_environment()
    if chief:
        write_json(workdir / "env.json", environment)
    # One base for all runs: which seeds there are beside it must not change a run.
    base = tasks.build_model(config, dataset.num_classes, nnx.Rngs(params=0))
    check_ids(dataset, base)
    mark = snnk.adapters.fingerprint(base)

    def several(method: str, runs: Sequence[Run]) -> list[Trained]:
        shared = Shared(config, base, mark, dataset, mesh, method, workdir)
        return _run_several(shared, runs)

    if config.sweep.learning_rates:
        rates = _sweep(config, several)
        if chief:
            write_json(workdir / "sweep.json", rates)
    else:
        rates = config.optim.learning_rates
    results = []
    model = base
    for method in methods_of(config):
        rate = rates[method]
        runs = [
            Run(rate, seed, config.eval_split, f"{method}-lr{rate:g}-seed{seed}")
            for seed in config.seeds
        ]
        for trained in several(method, runs):
            if isinstance(trained, train.NonFiniteError):
                raise trained
            model, result = trained
            results.append(result)
    if chief:
        table = report.write(
            workdir,
            results,
            title=config.name,
            command=command or f"{config.name} ({len(results)} runs)",
            environment=environment,
            notes=_notes(config),
        )
        print(f"\n{table}\n\nReport and plots: {workdir / 'report.md'}", flush=True)
        if config.export and model is base:
            raise ValueError(
                "config.export must be of a run by itself. Got one that was trained "
                "together with others; choose another workdir."
            )
        if config.export:
            save_vit(config.export, model, dtype="float16")
    return results


def check_files(config: ConfigDict) -> None:
    """Raises FileNotFoundError unless the files of a text task are there."""
    if config.model.family == "bert":
        glue.check_files(config.data.name, config.data.dir)


def check_ids(dataset: Dataset, base: Any) -> None:
    """Refuses tokens that the model has no embedding for, which would be NaN."""
    if not isinstance(base, Bert):
        return
    sizes = {"tokens": base.config.vocab_size, "token_types": base.config.num_types}
    for split in (dataset.train, dataset.val, dataset.test):
        batch = split.__getitems__(np.arange(len(split)))
        for name, size in sizes.items():
            largest = int(np.max(batch[name]))
            if largest >= size:
                raise ValueError(
                    f"{name} of {dataset.name} must be below the model's {size}: the "
                    f"tokenizer must be that of the model. Got {largest}."
                )


def _sweep(config: ConfigDict, several: Any) -> dict[str, float]:
    """Picks each method's learning rate by the validation split, one seed each."""
    rates = {}
    suffix = f"-seed{config.sweep.seed}" if config.sweep.seed else ""
    for method in methods_of(config):
        runs = [
            Run(rate, config.sweep.seed, "val", f"sweep/{method}-lr{rate:g}{suffix}")
            for rate in config.sweep.learning_rates
        ]
        found = []
        for run_, trained in zip(runs, several(method, runs), strict=True):
            if isinstance(trained, train.NonFiniteError):
                print(f"{run_.name} diverged: {trained}", flush=True)
                continue
            # The lower loss decides between equal scores.
            _, result = trained
            found.append((result["score"], -result["loss"], run_.learning_rate))
        if not found:
            raise ValueError(
                "sweep.learning_rates must hold a rate at which every method trains. "
                f"Got {tuple(config.sweep.learning_rates)}, all diverged for {method}."
            )
        rates[method] = max(found)[-1]
        print(f"{method}: learning rate {rates[method]:g}", flush=True)
    return rates


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

    def recipe(self, run_: Run) -> learning.Recipe:
        """What one of the runs does."""
        return recipe_for(self.config, run_.learning_rate, run_.seed, run_.split)


def _run_several(shared: Shared, runs: Sequence[Run]) -> list[Trained]:
    """Trains runs of a method, ``config.together`` at a time; not those that are done.

    Runs trained together are done when their ``summary.json`` is there. One of a run by
    itself says that it diverged; it ends with ``result.json``, and its model is in its
    checkpoint.
    """
    size = shared.config.together
    found: dict[str, Trained] = {}
    for run_ in runs:
        folder = shared.root / run_.name
        if (folder / "summary.json").is_file():
            found[run_.name] = _read_result(shared, run_, folder / "summary.json")
        elif size > 1 and (folder / "result.json").is_file():
            # Trained by itself; that writes its adapter if a stop came before it.
            found[run_.name] = _run_one(shared, run_)
    left = [run_ for run_ in runs if run_.name not in found]
    for start in range(0, len(left), size):
        group = left[start : start + size]
        trained = (
            [_run_one(shared, group[0])] if size == 1 else _run_together(shared, group)
        )
        found |= dict(zip((run_.name for run_ in group), trained, strict=True))
    return [found[run_.name] for run_ in runs]


def _run_one(shared: Shared, run_: Run) -> Trained:
    config, task = shared.config, shared.task
    workdir = shared.root / run_.name
    recipe = shared.recipe(run_)
    earlier = pathlib.Path(config.resume) / run_.name
    model = _adapt(shared, run_.seed)
    if jax.process_index() == 0 and not (workdir / "result.json").is_file():
        _announce(workdir.name, task, model, recipe, shared.dataset)
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
    task, dataset = shared.task, shared.dataset
    recipes = [shared.recipe(run_) for run_ in runs]
    models = [_adapt(shared, run_.seed) for run_ in runs]
    _announce(f"{len(runs)} runs", task, models[0], recipes[0], dataset)
    outcomes = cohort.fit(
        *(models, task.trainable, dataset, recipes),
        mesh=shared.mesh,
        name=runs[0].name,
        base_fingerprint=shared.mark,
    )
    done: list[Trained] = []
    for run_, recipe, outcome in zip(runs, recipes, outcomes, strict=True):
        folder = shared.root / run_.name
        folder.mkdir(parents=True, exist_ok=True)
        # Of an earlier attempt, which was stopped before its summary.
        (folder / "adapter.safetensors").unlink(missing_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in outcome.history)
        write_atomic(folder / "metrics.jsonl", lines)
        if outcome.result is None:
            file = _write_diverged(shared, folder, recipe)
            done.append(_read_result(shared, run_, file))
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


def _read_result(shared: Shared, run_: Run, file: pathlib.Path) -> Trained:
    """A finished run, whose model is in its adapter file: the base stands for it."""
    folder = file.parent
    result = json.loads(file.read_text())
    if "recipe" in result:  # early summaries of diverged runs have none
        train.check_recipe(result["recipe"], shared.recipe(run_), folder)
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


def _announce(
    name: str,
    task: Any,
    model: Any,
    recipe: learning.Recipe,
    dataset: Dataset,
) -> None:
    print(f"\n{name}: {task.title}")
    print(summary.parameter_table(model, task.trainable))
    batch = TrainLoader(dataset.train, recipe.batch_size, 0).batch(0)
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
            exclude = task.trained
            snnk.adapters.save_adapter(
                file,
                model,
                base_fingerprint=snnk.adapters.fingerprint(
                    shared.base, exclude=exclude
                ),
                trained=task.trained,
                exclude=exclude,
            )
        result["adapter_bytes"] = file.stat().st_size
        print(
            f"{workdir.name}: {result['split']} {result['metric']} "
            f"{100 * result['score']:.2f} %, {result['seconds']:.0f} s",
            flush=True,
        )
    return result


def _notes(config: ConfigDict) -> list[str]:
    notes = [
        f"{config.optim.steps} steps of {config.optim.batch_size} examples of "
        f"{config.data.name}, {len(config.seeds)} seed(s)."
    ]
    if config.sweep.learning_rates:
        rates = ", ".join(f"{rate:g}" for rate in config.sweep.learning_rates)
        notes.append(
            f"Each method's learning rate was chosen from {rates} on the validation "
            "split."
        )
    if config.together > 1:
        notes.append(
            f"Step and memory are a run's share of a program that trains "
            f"{config.together}."
        )
    return notes
