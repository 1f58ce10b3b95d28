"""What stands behind a frozen BERT: pooler and classifier, dense and as an SNNK.

The encoder is run over every text once and its states are kept, so that a head is
trained in seconds on a CPU. All heads are trained by one recipe.
"""

import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

import snnk_jax as snnk
from experiments import glue, plots, scores, train
from experiments.config import check_once
from experiments.jobs import Job, run_jobs
from experiments.pooler_heads import METHODS, merged_map
from experiments.pooler_states import TASK_PARAMETERS, States, load_states
from experiments.pooler_training import build, choose_rate, fit, keep_dense, score
from experiments.report import document, markdown
from experiments.workdirs import open_workdir


def run(
    config: Any, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Trains every head on every task and writes the report; nothing is done twice.

    Args:
      config: a config of ``configs/bert_pooler.py``.
      workdir: folder of ``rows.jsonl``, ``report.md`` and its plot, ``states``, what
        the encoder made of the texts, and ``heads``, a file of each head.
      command: shown in the report.

    Returns:
      The rows of the report, one a task and head.

    Raises:
      FileNotFoundError: without the data or the weights; says what to pass.
    """
    check(config)
    workdir = pathlib.Path(workdir)
    # A row holds all seeds, and says nothing of the rates it chose from.
    environment = open_workdir(workdir, config, ("methods",))
    start = time.perf_counter()
    jobs = list(_jobs(config, workdir))
    encoding = time.perf_counter() - start
    rows = run_jobs(workdir, jobs, config.name)
    parts = report(workdir, rows, config)
    document(workdir, config.name, command, parts, environment)
    total = time.perf_counter() - start
    print(f"{total:.0f} s, {encoding:.0f} s of them for the encoder.", flush=True)
    print(f"Report: {workdir / 'report.md'}", flush=True)
    return rows


def check(config: Any) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    for key, values, known in (
        ("methods", config.methods, METHODS),
        ("tasks", config.tasks, (*glue.TASKS, "synthetic_text")),
    ):
        wrong = [value for value in values if value not in known]
        if wrong or not values or len(set(values)) < len(values):
            raise ValueError(
                f"config.{key} must be some of {', '.join(known)}. Got {values}."
            )
    if config.model.pool not in ("cls", "mean", "pooler"):
        raise ValueError(
            f"config.model.pool must be cls, mean or pooler. Got {config.model.pool!r}."
        )
    needed = [name for name in config.methods if METHODS[name].source != "none"]
    if needed and config.methods[0] != "dense":
        raise ValueError(
            f"config.methods must begin with dense, which {', '.join(needed)} start "
            f"from. Got {config.methods}."
        )
    check_once("seeds", config.seeds)
    if (
        not config.seeds
        or min(config.seeds) < 0
        or config.sweep.seed not in config.seeds
    ):
        raise ValueError(
            "config.seeds must not be negative, and hold config.sweep.seed. "
            f"Got {config.seeds} and {config.sweep.seed}."
        )
    rates = config.sweep.learning_rates
    if not rates or any(not 0 < rate < math.inf for rate in rates):
        raise ValueError(f"config.sweep.learning_rates must be positive. Got {rates}.")
    for key, value in {
        "pooler.num_features": config.pooler.num_features,
        "pooler.merged_features": config.pooler.merged_features,
        "pooler.scale": config.pooler.scale,
        "optim.batch_size": config.optim.batch_size,
        "data.length": config.data.length,
    }.items():
        if not value > 0:
            raise ValueError(f"config.{key} must be positive. Got {value}.")
    if not 0 <= config.optim.warmup_steps < config.optim.steps:
        raise ValueError(
            "config.optim.warmup_steps must be from 0 to below optim.steps. "
            f"Got {config.optim.warmup_steps} and {config.optim.steps}."
        )


def _jobs(config: Any, workdir: pathlib.Path) -> Iterable[Job]:
    for task in config.tasks:
        states = load_states(task, config, workdir)
        for name in config.methods:
            measure = functools.partial(_measure, task, name, states, config, workdir)
            yield f"{task} | {name}", measure


def _measure(
    task: str, name: str, states: States, config: Any, workdir: pathlib.Path
) -> dict[str, Any]:
    heads = workdir / "heads" / task
    method = METHODS[name]
    row: dict[str, Any] = {"task": task, "method": name, "title": method.title}
    begun = time.perf_counter()
    if method.ridge is not None:
        row |= _ridge(method.ridge, states, config)
    else:
        starts = {s: build(name, states, config, s, heads) for s in config.seeds}
        rate = choose_rate(name, starts[config.sweep.seed], states, config)
        runs = {s: fit(starts[s], states, config, rate, s) for s in config.seeds}
        broken = [seed for seed, run in runs.items() if not run.finite]
        if broken:
            raise train.NonFiniteError(
                f"{name} at learning rate {rate:g} must train. Got a loss that is not "
                f"finite with seeds {broken}."
            )
        if name == "dense":
            for seed, run in runs.items():
                keep_dense(run.model, heads, seed)
        first = runs[config.seeds[0]].model
        counts = snnk.nn.count_parameters(first, nnx.Param)
        row |= {
            "rate": rate,
            "scores": [score(run.model, states, "test") for run in runs.values()],
            "start": [score(start, states, "test") for start in starts.values()],
            "trained": counts.trained + counts.head,
            "frozen": counts.projections,
            "bytes": snnk.adapters.save_adapter(
                heads / f"{name}.safetensors",
                first,
                base_fingerprint=states.fingerprint,
                trained=TASK_PARAMETERS,
                exclude=TASK_PARAMETERS,
            ),
            # Without the seconds of the compiler, which all seeds share.
            "fit_seconds": float(np.median([run.seconds for run in runs.values()])),
        }
    return row | {
        "metric": states.metric,
        "train_size": len(states.y["train"]),
        "seconds": time.perf_counter() - begun,
    }


def _ridge(kind: str, states: States, config: Any) -> dict[str, Any]:
    """A head in closed form; the penalty by generalised cross-validation."""
    y = states.y["train"][:, None]
    if states.classes > 1:
        y = np.where(y == np.arange(states.classes)[None], 1, -1)
    y = jnp.asarray(y, jnp.float32)
    if kind == "constant":
        level = np.tile(np.mean(y, axis=0), (len(states.y["test"]), 1))
        chance = scores.scores(level, states.y["test"])[states.metric]
        sizes = dict.fromkeys(("trained", "frozen", "bytes", "fit_seconds"), 0)
        return {"scores": [chance], **sizes}
    found, seconds, frozen = [], [], 0
    arrays: dict[str, np.ndarray] = {}
    for seed in config.seeds if kind != "linear" else config.seeds[:1]:
        phi: Callable[[Any], Any] = jnp.asarray
        if kind != "linear":
            features = merged_map(kind, config, states)
            params = features.init(jax.random.key(seed), states.dim)
            frozen = sum(leaf.size for leaf in jax.tree.leaves(params))
            phi = functools.partial(features.phi, params)
        begun = time.perf_counter()
        rows = phi(jnp.asarray(states.x["train"]))
        solution = snnk.ridge.fit(rows, y, criterion="gcv")
        seconds.append(time.perf_counter() - begun)
        outputs = np.asarray(solution(phi(jnp.asarray(states.x["test"]))))
        found.append(scores.scores(outputs, states.y["test"])[states.metric])
        arrays = {
            "kernel": np.asarray(solution.kernel),
            "bias": np.asarray(solution.bias),
        }
    return {
        "scores": found,
        "trained": sum(array.size for array in arrays.values()),
        "frozen": frozen,
        "bytes": len(save(arrays)),
        "fit_seconds": float(np.median(seconds)),
    }


def report(workdir: pathlib.Path, rows: list[dict[str, Any]], config: Any) -> list[str]:
    """The parts of the report; the plot is written on the way."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    header = ["head", "average", "range", "at the start", "trained", "frozen Ω"]
    lines = [[*header, "file, kB", "fit, s"]]
    tasks_header = [f"{task} ({r['metric']})" for task, r in _first_rows(rows).items()]
    details = [["head", *tasks_header]]
    points = []
    for found in by_method.values():
        # The average over the tasks of each seed.
        average = 100 * np.mean([row["scores"] for row in found], axis=0)
        start = [np.mean(row["start"]) for row in found if "start" in row]
        converted = METHODS[found[0]["method"]].source != "none"
        first = found[0]
        lines.append(
            [
                first["title"],
                f"{average.mean():.2f}",
                _spread(average),
                f"{100 * np.mean(start):.2f}" if converted else "",
                f"{first['trained']:,}",
                f"{first['frozen']:,}",
                f"{first['bytes'] / 1e3:.1f}",
                f"{np.median([row['fit_seconds'] for row in found]):.2f}",
            ]
        )
        percent = [100 * np.array(row["scores"]) for row in found]
        cells = [f"{values.mean():.1f} ({_spread(values)})" for values in percent]
        details.append([first["title"], *cells])
        points.append(
            {
                "title": first["title"],
                "trained": first["trained"],
                **{"mean": average.mean() / 100, "low": average.min() / 100},
                "high": average.max() / 100,
            }
        )
    # The constant is far below all others.
    shown = [p for p in points if p["title"] != METHODS["constant"].title]
    plots.ranges(workdir / "score.png", shown, "average score, %")
    sizes = ", ".join(
        f"{task} {row['train_size']:,}" for task, row in _first_rows(rows).items()
    )
    rates = ", ".join(f"{rate:g}" for rate in config.sweep.learning_rates)
    notes = (
        f"Frozen encoder, {config.model.pool} states, {config.optim.steps} steps of "
        f"{config.optim.batch_size} examples, {len(config.seeds)} seed(s); learning "
        f"rates chosen from {rates} on a validation split. Training examples: {sizes}. "
        "Trained parameters are with the classifier; files name the projection by its "
        "key unless it was balanced to samples."
    )
    picture = "![average score of each head, and its trained parameters](score.png)"
    return [notes, markdown(lines, left=1), markdown(details, left=1), picture]


def _spread(values: np.ndarray) -> str:
    if len(values) < 2:
        return "1 fit"
    return f"{values.min():.1f} to {values.max():.1f}"


def _first_rows(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A row of each task, in the order of the tasks, which is that of a method's."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["task"], row)
    return first
