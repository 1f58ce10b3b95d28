"""Several tasks under one recipe, and one table over all of them.

Every task is a run of :mod:`experiments.runner` in a folder of its own. The learning
rates of a method are chosen on the validation split of one task and used for others, or
on each of its own.
"""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import plots, report, runner, workdirs
from experiments.config import methods_of
from experiments.metrics import write_json


def order(config: ConfigDict) -> list[str]:
    """Names of the tasks: first those that choose learning rates of their own."""
    return sorted(config.tasks, key=lambda name: config.tasks[name].rates_of != name)


def task_config(config: ConfigDict, task: str) -> ConfigDict:
    """The config of one task: the suite's, with what the task changes."""
    changed = ConfigDict(config.to_dict())
    own = changed.tasks[task]
    del changed["tasks"], changed["experiment"]
    changed.name = f"{config.name}_{task}"
    changed.data.update(name=own.data, length=own.length)
    changed.optim.update(steps=own.steps, warmup_steps=own.warmup_steps)
    if own.rates_of != task:
        changed.sweep.learning_rates = ()
    return changed.lock()


def run(
    config: ConfigDict, workdir: str | pathlib.Path, command: str = ""
) -> dict[str, list[dict[str, Any]]]:
    """Runs every task and writes the table over them; finished runs are not repeated.

    Args:
      config: a config with ``experiment = "suite"``.
      workdir: holds a folder a task.
      command: shown in the reports.

    Returns:
      The results of each task, as of :func:`experiments.runner.run`.

    Raises:
      ValueError: for settings that no run could use, before any device work.
    """
    check(config)
    for task in order(config):
        # Not after hours of training on the tasks before it.
        runner.check_files(task_config(config, task))
    workdir = pathlib.Path(workdir)
    environment = workdirs.open_workdir(workdir, config)
    results: dict[str, list[dict[str, Any]]] = {}
    for task in order(config):
        own = config.tasks[task]
        changed = task_config(config, task)
        if own.rates_of != task:
            rates = {
                result["method"]: result["recipe"]["learning_rate"]
                for result in results[own.rates_of]
            }
            with changed.unlocked():
                changed.optim.learning_rates.update(rates)
        results[task] = runner.run(changed, workdir / task, command)
    table = average({task: report.rows(found) for task, found in results.items()})
    metrics = {task: found[0]["metric"] for task, found in results.items()}
    text = markdown_table(table, metrics)
    plots.score_against_parameters(
        workdir / "score.png", table, f"mean score of {len(results)} tasks, %"
    )
    write_json(workdir / "results.json", {"table": table, "metrics": metrics})
    parts = [_notes(config), text, "![mean score against parameters](score.png)"]
    report.document(workdir, config.name, command, parts, environment)
    print(f"\n{text}\n\nReport and plot: {workdir / 'report.md'}", flush=True)
    return results


def average(tables: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a method: its score on every task, and their mean over tasks.

    The range is that of the mean over tasks, seed by seed.
    """
    rows = []
    for method in next(iter(tables.values())):
        own = {
            task: next(row for row in table if row["method"] == method["method"])
            for task, table in tables.items()
        }
        by_seed = [
            statistics.fmean(scores)
            for scores in zip(*(row["scores"] for row in own.values()), strict=True)
        ]
        rows.append(
            method
            | {
                "tasks": {task: row["mean"] for task, row in own.items()},
                "ranges": {
                    task: (row["low"], row["high"]) for task, row in own.items()
                },
                "rates": {task: row["learning_rate"] for task, row in own.items()},
                "mean": statistics.fmean(by_seed),
                "low": min(by_seed),
                "high": max(by_seed),
                "seconds": sum(row["seconds"] for row in own.values()),
            }
        )
    return rows


def markdown_table(table: Sequence[dict[str, Any]], metrics: Mapping[str, str]) -> str:
    """The table in Markdown: scores in percent, the best mean first."""
    header = ["method", "mean", "range", *(f"{t}, {m}" for t, m in metrics.items())]
    header += ["trained", "file, kB", "step, ms", "memory, MB"]
    lines = [header]
    for row in sorted(table, key=lambda row: -row["mean"]):
        lines.append(
            [
                row["title"],
                f"{100 * row['mean']:.2f}",
                f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
                *(f"{100 * row['tasks'][task]:.1f}" for task in metrics),
                f"{row['trained']:,}",
                f"{row['bytes'] / 1e3:.0f}",
                f"{row['step_ms']:.1f}",
                report.megabytes(row["memory_bytes"]),
            ]
        )
    return report.markdown(lines, left=1)


def _notes(config: ConfigDict) -> str:
    tasks = "; ".join(
        f"{name}: {config.tasks[name].steps} steps, {config.tasks[name].length} "
        f"tokens, learning rates of {config.tasks[name].rates_of}"
        for name in order(config)
    )
    rates = ", ".join(f"{rate:g}" for rate in config.sweep.learning_rates)
    size = config.data.train_size
    examples = f"at most {size:,}" if size else "all"
    return (
        f"{len(config.seeds)} seeds, {config.together} trained together in one "
        f"program; {examples} training examples, batch {config.optim.batch_size}, "
        f"learning rates from {rates} by the validation split. Range: of the mean over "
        f"tasks, seed by seed. {tasks}. Step and memory are a run's share of the "
        "program's, on the first task."
    )


def check(config: ConfigDict) -> None:
    """Raises ValueError for a value that no run could use; touches no device."""
    if not config.tasks:
        raise ValueError("config.tasks must not be empty.")
    if not config.sweep.learning_rates:
        raise ValueError("config.sweep.learning_rates must not be empty for a suite.")
    for task, own in config.tasks.items():
        source = config.tasks.get(own.rates_of)
        if source is None or source.rates_of != own.rates_of:
            raise ValueError(
                f"config.tasks.{task}.rates_of must be the task, or one that chooses "
                f"its own learning rates. Got {own.rates_of!r}."
            )
        changed = task_config(config, task)
        if own.rates_of != task:
            # Known only when the other task has chosen them.
            rates = dict.fromkeys(methods_of(config), 1.0)
            with changed.unlocked():
                changed.optim.learning_rates.update(rates)
        runner.check(changed)
