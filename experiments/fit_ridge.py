"""Fully bundled networks fitted in closed form: images, regression, classification.

All layers but the readout are frozen random features, so that ridge regression is all
the training there is; scales, depths and penalties are chosen on training rows alone.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from experiments import ridge_images, ridge_tables, tabular
from experiments.jobs import Job, run_study


def _image_jobs(config: Any) -> Iterable[Job]:
    images = ridge_images.load_images(config.data.name, config.data.dir)
    for job in ridge_images.jobs(config):
        yield job.name, functools.partial(ridge_images.measure, job, images, config)


def _table_jobs(config: Any) -> Iterable[Job]:
    load = tabular.classification_tables
    if config.study == "regression":
        load = tabular.regression_tables
    tables = load(config.data.dir, config.sets)
    tables = [t for t in tables if not config.max_rows or len(t.x) <= config.max_rows]
    if config.study == "regression":
        tables = [_first_splits(table, config) for table in tables]
    if not tables:
        raise ValueError(
            f"config.max_rows must leave a set of data. Got {config.max_rows}."
        )
    for table in tables:
        for method in config.methods:
            measure = functools.partial(ridge_tables.measure, table, method, config)
            yield f"{table.name} | {method}", measure


def _first_splits(table: tabular.Table, config: Any) -> tabular.Table:
    limits = [config.max_splits]
    if len(table.x) > config.large_rows:
        limits.append(config.large_splits)
    count = min((limit for limit in limits if limit), default=len(table.splits))
    return dataclasses.replace(table, splits=table.splits[:count])


_STUDIES: dict[str, tuple[Callable[..., Iterable[Job]], Callable[..., list[str]]]] = {
    "images": (_image_jobs, ridge_images.report),
    "regression": (_table_jobs, ridge_tables.report),
    "classification": (_table_jobs, ridge_tables.report),
}


def run(
    config: Any, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Measures every job and writes the report; finished jobs are not repeated.

    Args:
      config: a config of ``configs/mnist_ridge.py``, ``uci_ridge.py`` or ``uci121.py``.
      workdir: folder of ``rows.jsonl``, ``report.md`` and the plots.
      command: shown in the report.

    Returns:
      The rows of the report.

    Raises:
      FileNotFoundError: without the data; says what to pass.
    """
    check(config)
    jobs, report = _STUDIES[config.study]
    return run_study(
        config,
        workdir,
        command,
        list(jobs(config)),
        functools.partial(report, config=config),
    )


def check(config: Any) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    if config.study not in _STUDIES:
        raise ValueError(
            f"config.study must be one of {', '.join(_STUDIES)}. Got {config.study!r}."
        )
    if config.study == "images":
        _check_images(config)
    else:
        _check_tables(config)


def _check_images(config: Any) -> None:
    _check_choice("data.name", config.data.name, ("mnist", "digits"))
    _check_choice("criterion", config.criterion, ("gcv", "validation"))
    sizes = [m for sizes in config.maps.values() for m in sizes]
    if not sizes or min(sizes) < 1:
        raise ValueError(
            "config.maps must name numbers of features, at least 1. "
            f"Got {config.maps.to_dict()}."
        )
    cells = config.patches.cells**2
    if any(m % cells for m in config.maps.patches):
        raise ValueError(
            f"config.maps.patches must be multiples of {cells}, the cells of an image. "
            f"Got {config.maps.patches}."
        )
    side = 28 if config.data.name == "mnist" else 8
    room = side - config.patches.size + 1
    if config.patches.size < 1 or not 1 <= config.patches.cells <= room:
        raise ValueError(
            f"config.patches must leave a patch to each cell of {side} pixels. "
            f"Got size={config.patches.size} and cells={config.patches.cells}."
        )
    if not 0 < config.val_fraction < 1:
        raise ValueError(
            f"config.val_fraction must be in (0, 1). Got {config.val_fraction}."
        )
    if not config.fixed_l2 >= 0:
        raise ValueError(
            f"config.fixed_l2 must not be negative. Got {config.fixed_l2}."
        )
    _check_positive(config, "select_features", "chunk_size")
    if config.select_features % cells:
        raise ValueError(
            f"config.select_features must be a multiple of {cells}. "
            f"Got {config.select_features}."
        )
    if not config.seeds:
        raise ValueError(f"config.seeds must not be empty. Got {config.seeds}.")


def _check_tables(config: Any) -> None:
    for method in config.methods:
        _check_choice("methods", method, tuple(ridge_tables.TITLES))
    if not config.methods:
        raise ValueError(f"config.methods must not be empty. Got {config.methods}.")
    _check_positive(config, "num_features", "tune_rows", "kernel_rows")
    if config.num_features % 2:
        raise ValueError(
            "config.num_features must be even, for cosines and sines. "
            f"Got {config.num_features}."
        )
    limits = ("max_splits", "large_rows", "large_splits")
    for key in ("max_rows", "seed", *(limits if config.study == "regression" else ())):
        if config[key] < 0:
            raise ValueError(f"config.{key} must not be negative. Got {config[key]}.")
    mlp = config.mlp
    for key in ("steps", "batch", "checkpoints"):
        if not mlp[key] > 0:
            raise ValueError(f"config.mlp.{key} must be positive. Got {mlp[key]}.")
    if mlp.steps % mlp.checkpoints:
        raise ValueError(
            "config.mlp.steps must be a multiple of mlp.checkpoints. "
            f"Got {mlp.steps} and {mlp.checkpoints}."
        )
    if not mlp.rates or not mlp.decays or min(mlp.rates) <= 0 or min(mlp.decays) < 0:
        raise ValueError(
            "config.mlp.rates must be positive and mlp.decays not negative. "
            f"Got {mlp.rates} and {mlp.decays}."
        )


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"config.{key} must be among {', '.join(choices)}. Got {value!r}."
        )


def _check_positive(config: Any, *keys: str) -> None:
    for key in keys:
        if not config[key] > 0:
            raise ValueError(f"config.{key} must be positive. Got {config[key]}.")
