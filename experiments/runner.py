"""Turns a config into runs, and their results into a report."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import snnk_jax as snnk
from experiments import data as data_lib
from experiments import glue, report, tasks, train, workdirs
from experiments import sharding as sharding_lib
from experiments.config import check_training as check
from experiments.config import methods_of
from experiments.metrics import write_json
from experiments.runs import Run, Shared, Trained, run_several
from experiments.splits import Dataset
from snnk_jax.models.bert import Bert
from snnk_jax.models.vit_params import save_vit


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
        return run_several(shared, runs)

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
