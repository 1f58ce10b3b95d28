"""Small networks of the paper, one layer replaced by an SNNK: SIREN, PINN, MNIST.

Every network is trained as it is, with an SNNK in place of a hidden layer, and as a
dense network of the SNNK's size: the same steps, a learning rate each from the same
few, several seeds.
"""

import functools
import io
import math
import pathlib
import statistics
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import snnk_jax as snnk
from experiments import plots, summary
from experiments.jobs import Job, run_jobs
from experiments.networks import mnist_mlp, pictures, pinn, siren
from experiments.networks.model import Method, Network, methods
from experiments.networks.training import Problem, fit, step_times
from experiments.report import document, markdown
from experiments.workdirs import open_workdir
from snnk_jax._files import write_atomic

NETWORKS = {"siren": siren, "pinn": pinn, "mnist_mlp": mnist_mlp}
FEATURES = ("relu", "sin")


def check(config: ConfigDict) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    if config.network not in NETWORKS:
        raise ValueError(
            f"config.network must be one of {', '.join(NETWORKS)}. "
            f"Got {config.network!r}."
        )
    if not config.features or not set(config.features) <= set(FEATURES):
        raise ValueError(
            f"config.features must be some of {', '.join(FEATURES)}. "
            f"Got {config.features}."
        )
    model, optim = config.model, config.optim
    if model.activation not in snnk.activations.names():
        raise ValueError(
            f"config.model.activation must be one of "
            f"{', '.join(snnk.activations.names())}. Got {model.activation!r}."
        )
    for key, value in {
        "model.width": model.width,
        "model.hidden_layers": model.hidden_layers,
        "optim.steps": optim.steps,
        "optim.batch_size": optim.batch_size,
        "optim.evaluations": optim.evaluations,
        "timing.steps": config.timing.steps,
        "timing.rounds": config.timing.rounds,
    }.items():
        if not value > 0:
            raise ValueError(f"config.{key} must be positive. Got {value}.")
    if not model.frequency >= 0:
        raise ValueError(
            f"config.model.frequency must not be negative. Got {model.frequency}."
        )
    if not model.replaced or not set(model.replaced) <= set(range(model.hidden_layers)):
        raise ValueError(
            "config.model.replaced must be hidden layers, counted from 0. "
            f"Got {model.replaced} of {model.hidden_layers}."
        )
    if optim.steps % optim.evaluations:
        raise ValueError(
            "config.optim.steps must be a multiple of optim.evaluations. "
            f"Got {optim.steps} and {optim.evaluations}."
        )
    for key, values, least in (
        ("num_features", config.num_features, 2),
        ("seeds", config.seeds, 0),
    ):
        if not values or min(values) < least or len(set(values)) < len(values):
            raise ValueError(
                f"config.{key} must be different numbers from {least} up. Got {values}."
            )
    for key, values in (
        ("scales", config.scales),
        ("optim.learning_rates", optim.learning_rates),
    ):
        if not values or any(not 0 < value < math.inf for value in values):
            raise ValueError(f"config.{key} must be positive. Got {values}.")
    NETWORKS[config.network].check(config)


def run(
    config: ConfigDict, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Trains every network and writes the report; finished runs are not repeated.

    Args:
      config: a config of ``configs/siren.py``, ``pinn.py`` or ``mnist_mlp.py``.
      workdir: folder of ``rows.jsonl``, ``report.md``, its plots, and ``fields``, what
        the networks of the first seed drew.
      command: shown in the report.

    Returns:
      The rows of the chosen learning rates, of every network and seed.

    Raises:
      ValueError: for settings that no run could use, before any device work, and if a
        network diverges at every learning rate.
    """
    check(config)
    problems = NETWORKS[config.network].problems(config)
    workdir = pathlib.Path(workdir)
    environment = open_workdir(workdir, config)
    results, parts = [], []
    for problem in problems:
        rivals = methods(config, problem.inputs, problem.outputs)
        rates = _choose_rates(config, workdir, problem, rivals)
        rows = run_jobs(
            workdir,
            [
                _job(config, workdir, problem, method, rates[method.title], seed)
                for method in rivals
                for seed in config.seeds
            ],
            problem.name,
        )
        (times,) = run_jobs(
            workdir,
            [
                (
                    f"{problem.name} | time",
                    functools.partial(_time, config, problem, rivals),
                )
            ],
            f"{problem.name}, time",
        )
        parts += _section(config, workdir, problem, rivals, rows, times)
        results += rows
    document(workdir, config.name, command, parts, environment)
    print(f"Report: {workdir / 'report.md'}", flush=True)
    return results


def _build(config: ConfigDict, problem: Problem, method: Method, seed: int) -> Network:
    return Network(
        method,
        activation=config.model.activation,
        frequency=config.model.frequency,
        example=problem.example,
        rngs=nnx.Rngs(seed),
    )


def _job(
    config: ConfigDict,
    workdir: pathlib.Path,
    problem: Problem,
    method: Method,
    rate: float,
    seed: int,
) -> Job:
    name = f"{problem.name} | {method.title} | {rate:g} | {seed}"
    return name, functools.partial(
        _measure, config, workdir, problem, method, rate, seed
    )


def _measure(
    config: ConfigDict,
    workdir: pathlib.Path,
    problem: Problem,
    method: Method,
    rate: float,
    seed: int,
) -> dict[str, Any]:
    model, curve = fit(
        _build(config, problem, method, seed),
        problem,
        learning_rate=rate,
        steps=config.optim.steps,
        evaluations=config.optim.evaluations,
        seed=seed,
    )
    counts = summary.count(model, nnx.Param)
    if problem.predict is not None and seed == config.seeds[0]:
        drawn = np.asarray(problem.predict(model, problem.data))
        stream = io.BytesIO()
        np.save(stream, drawn)
        write_atomic(_field(workdir, problem, method, rate), stream.getvalue())
    return {
        "problem": problem.name,
        "method": method.title,
        "learning_rate": rate,
        "seed": seed,
        "trained": counts.trained + counts.head,
        "frozen": counts.projections,
        "curve": curve,
        **curve[-1],
    }


def _field(
    workdir: pathlib.Path, problem: Problem, method: Method, rate: float
) -> pathlib.Path:
    title = method.title.replace(" ", "").replace(",", "-")
    return workdir / "fields" / f"{problem.name}-{title}-{rate:g}.npy"


def _choose_rates(
    config: ConfigDict,
    workdir: pathlib.Path,
    problem: Problem,
    rivals: tuple[Method, ...],
) -> dict[str, float]:
    """The learning rate of each method, by its run of the first seed."""
    chosen = {}
    for method in rivals:
        rows = run_jobs(
            workdir,
            [
                _job(config, workdir, problem, method, rate, config.seeds[0])
                for rate in config.optim.learning_rates
            ],
            f"{problem.name}, {method.title}",
        )
        scores = {
            row["learning_rate"]: row[problem.choose_by]
            for row in rows
            if math.isfinite(row[problem.choose_by])
        }
        if not scores:
            raise ValueError(
                "config.optim.learning_rates must hold one at which every network "
                f"trains. Got {config.optim.learning_rates}, all diverged for "
                f"{method.title}."
            )
        chosen[method.title] = min(scores, key=lambda rate: scores[rate])
        print(f"{method.title}: learning rate {chosen[method.title]:g}", flush=True)
    return chosen


def _time(
    config: ConfigDict, problem: Problem, rivals: tuple[Method, ...]
) -> dict[str, Any]:
    models = [_build(config, problem, method, config.seeds[0]) for method in rivals]
    times = step_times(
        models, problem, steps=config.timing.steps, rounds=config.timing.rounds
    )
    titles = [method.title for method in rivals]
    return {"step_ms": dict(zip(titles, times, strict=True))}


def _section(
    config: ConfigDict,
    workdir: pathlib.Path,
    problem: Problem,
    rivals: tuple[Method, ...],
    rows: list[dict[str, Any]],
    times: dict[str, Any],
) -> list[str]:
    """Heading, table and plots of a problem."""
    header = ["network"]
    for title in problem.reported.values():
        header += [title, "range"]
    header += ["trained", "frozen", "learning rate", "step, ms", "training, s"]
    lines = []
    for method in rivals:
        mine = [row for row in rows if row["method"] == method.title]
        line = [method.title]
        for name in problem.reported:
            values = [row[name] for row in mine]
            line += [f"{statistics.fmean(values):.4g}"]
            line += [f"{min(values):.4g} to {max(values):.4g}"]
        step_ms = times["step_ms"][method.title]
        lines.append(
            [
                *line,
                f"{mine[0]['trained']:,}",
                f"{mine[0]['frozen']:,}",
                f"{mine[0]['learning_rate']:g}",
                f"{step_ms:.2f}",
                f"{step_ms * config.optim.steps / 1000:.1f}",
            ]
        )
    optim = config.optim
    rates = ", ".join(f"{rate:g}" for rate in optim.learning_rates)
    parts = [
        f"## {problem.name}",
        f"{optim.steps} steps of Adam with {optim.batch_size} examples, "
        f"{len(config.seeds)} seed(s), mean and range; each network's learning rate "
        f"is the best of {rates} for seed {config.seeds[0]}, by {problem.choose_by}. "
        "The networks' steps are timed in turns, without compilation and evaluation; "
        "training is the time of all steps.",
        markdown([header, *lines], left=1),
    ]
    first = [row for row in rows if row["seed"] == config.seeds[0]]
    curves = {
        row["method"]: [(point["step"], point[problem.curve]) for point in row["curve"]]
        for row in first
    }
    panel = f"{problem.name}, {problem.curve.replace('_', ' ')}"
    plots.curves(workdir / f"{problem.name}_curves.png", {panel: curves})
    parts.append(f"![curves of {problem.name}]({problem.name}_curves.png)")
    if problem.truth is not None:
        by_title = {method.title: method for method in rivals}
        drawn = {
            row["method"]: np.load(
                _field(workdir, problem, by_title[row["method"]], row["learning_rate"])
            )
            for row in first
        }
        file = workdir / f"{problem.name}.png"
        pictures.draw(file, problem.truth, drawn, problem.colors)
        parts.append(f"![{problem.name}]({problem.name}.png)")
    return parts
