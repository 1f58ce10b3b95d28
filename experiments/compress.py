"""Compression without training: methods side by side at equal stored parameters."""

import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import snnk_jax as snnk
from experiments import compress_data, plots
from experiments.jobs import Job, run_study
from experiments.latency import compiled, time_in_turns
from experiments.report import markdown
from snnk_jax.compression import (
    Affine,
    CompressionReport,
    Features,
    Int8,
    LowRank,
    Magnitude,
    Method,
    Units,
)

STUDIES = ("encoder", "vit", "synthetic")
_RELU = snnk.features.ArcCosine(num_features=1)
# The paper's map for biases: they need a column of their own.
_PSI = snnk.features.AppendOne(snnk.features.ArcCosine(num_features=1))


@dataclasses.dataclass(frozen=True)
class Choice:
    """One row's method.

    Attributes:
      title: in the table.
      method: how a block is made smaller.
      options: of :func:`snnk_jax.compress`.
      size: of every block, whatever the budget; None takes the budget.
    """

    title: str
    method: Method
    options: tuple[tuple[str, Any], ...] = ()
    size: int | None = None


METHODS = {
    "ours": Choice("own units, common budget", Units(), (("spread", "curves"),)),
    "ours_equal": Choice("own units", Units()),
    "ours_linear": Choice("own units and a linear path", Units(linear="auto")),
    "ours_plain": Choice("own units, plain metric", Units(), (("metric", "plain"),)),
    "energy": Choice("pruning by energy, refitted", Units(select="energy")),
    "pruned": Choice("pruning by energy", Units(select="energy", refit=False)),
    "affine": Choice("affine map", Affine()),
    "svd_aware": Choice("data-aware SVD", LowRank()),
    "svd": Choice("SVD of the weights", LowRank(data_aware=False)),
    "relu": Choice("random ReLU features, fitted", Features(features=_RELU)),
    "relu_linear": Choice(
        "linear path and ReLU features", Features(features=_RELU, linear=True)
    ),
    "psi_8": Choice("Psi(W), m=8", Features(features=_PSI, readout="psi"), size=8),
    "psi_16": Choice("Psi(W), m=16", Features(features=_PSI, readout="psi"), size=16),
    "magnitude": Choice("magnitude pruning, nonzeros", Magnitude()),
    "int8": Choice("8-bit weights", Int8(), size=0),
    "drop": Choice("blocks left out, mean output", Affine(), size=0),
}
"""Keys of ``config.methods``, besides ``LAYERS``."""

LAYERS = "layers"
"""Every second of the last layers is left out whole, as a DistilBERT starts."""


def check(config: Any) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    if config.study not in STUDIES:
        raise ValueError(
            f"config.study must be one of {', '.join(STUDIES)}. Got {config.study!r}."
        )
    known = (*METHODS, LAYERS)
    unknown = [name for name in config.methods if name not in known]
    if unknown or not config.methods:
        raise ValueError(
            f"config.methods must be among {', '.join(known)}. Got {unknown}."
        )
    if not config.budgets or not all(0 < share <= 1 for share in config.budgets):
        raise ValueError(f"config.budgets must be in (0, 1]. Got {config.budgets}.")
    if not config.last or min(config.last) < 1:
        raise ValueError(f"config.last must be at least 1. Got {config.last}.")
    for name in ("batch_size", "length", "held_out"):
        if config[name] < 1:
            raise ValueError(f"config.{name} must be positive. Got {config[name]}.")
    for name in ("calibration", "probe", "rounds"):
        if config[name] < 0:
            raise ValueError(f"config.{name} must not be negative. Got {config[name]}.")


def jobs(config: Any, case: compress_data.Case) -> list[Job]:
    """The dense model, then every method at every budget it can meet."""
    todo: list[Job] = [("dense", functools.partial(_dense, case))]
    for last in config.last:
        blocks = case.blocks(last)
        for key in config.methods:
            if key == LAYERS:
                drop = functools.partial(_drop_layers, case, config, last)
                todo.append((f"{key} | {last}", drop))
                continue
            choice = METHODS[key]
            budgets = config.budgets if choice.size is None else (1.0,)
            for budget in budgets:
                if choice.size is None and not _affordable(choice, blocks, budget):
                    continue
                name = f"{key} | {last} | {budget:g}"
                measure = functools.partial(
                    _measure, case, config, key, last, budget, blocks
                )
                todo.append((name, measure))
    return todo


def _affordable(choice: Choice, blocks: list[Any], budget: float) -> bool:
    method = choice.method
    costs = [(method.cost(block, method.least)[0], block) for block in blocks]
    return all(cost <= budget * block.parameters for cost, block in costs)


def _dense(case: compress_data.Case) -> dict[str, Any]:
    return {"title": "dense", "share": 1.0, **case.score(case.model)}


def _measure(
    case: compress_data.Case,
    config: Any,
    key: str,
    last: int,
    budget: float,
    blocks: list[Any],
) -> dict[str, Any]:
    choice = METHODS[key]
    sizes = {block.name: choice.size or 0 for block in blocks}
    start = time.perf_counter()
    model, report = snnk.compress(
        case.model,
        case.batches,
        case.rules(last),
        budget=budget if choice.size is None else sizes,
        method=choice.method,
        weights=case.weights,
        apply=case.apply,
        probes=4,
        seed=config.seed,
        **dict(choice.options),
    )
    seconds = time.perf_counter() - start
    print(f"{choice.title}, last {last}, {budget:g}\n{report}", flush=True)
    return {
        "title": choice.title,
        "last": last,
        "budget": budget,
        "share": report.share,
        "flop_share": report.flop_share,
        "sizes": [block.size for block in report.blocks],
        "r2": [block.r2 for block in report.blocks],
        "r2_metric": [block.r2_metric for block in report.blocks],
        "linear_r2": [block.linear_r2 for block in report.blocks],
        "output_r2": report.output_r2,
        "seconds": seconds,
        **case.score(model),
        **_bytes(model, case.model, report),
        **_latency(case, config.rounds, model),
    }


def _drop_layers(case: compress_data.Case, config: Any, last: int) -> dict[str, Any]:
    model = nnx.clone(case.model)
    depth = len(model.blocks)
    kept = [i for i in range(depth) if i < depth - last or (i - depth + last) % 2 == 0]
    model.blocks = nnx.List([model.blocks[i] for i in kept])
    share = (len(kept) - depth + last) / last
    return {
        "title": "every second layer left out",
        "last": last,
        "budget": 1.0,
        "share": share,
        "flop_share": share,
        "parameters": snnk.compression.num_parameters(model),
        **case.score(model),
        **_latency(case, config.rounds, model),
    }


def _bytes(model: Any, dense: Any, report: CompressionReport) -> dict[str, Any]:
    """Of the saved file, beside the arithmetic."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.safetensors"
        size = snnk.compression.save(file, model, dense)
    return {"bytes": size, "parameters": report.parameters}


def _latency(case: compress_data.Case, rounds: int, model: Any) -> dict[str, Any]:
    """Medians of the widest calibration batch, beside the dense model in turns."""
    if not rounds:
        return {}
    batch = max(case.batches, key=lambda batch: jax.tree.leaves(batch)[0].size)
    models = {"dense_ms": case.model, "ms": model}
    calls = {k: compiled(m, batch, apply=case.apply)[0] for k, m in models.items()}
    times = time_in_turns(calls, rounds)
    return {name: float(np.median(times[name])) for name in times}


def run(
    config: Any, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Measures every method and writes the report; finished jobs are not repeated.

    Args:
      config: a config of ``configs/compress.py``.
      workdir: folder of ``rows.jsonl``, ``report.md`` and the plots.
      command: shown in the report.

    Returns:
      The rows, the dense model first.

    Raises:
      FileNotFoundError: without the data or the weights; says what to pass.
    """
    check(config)
    case = compress_data.load(config)
    return run_study(
        config,
        workdir,
        command,
        jobs(config, case),
        functools.partial(report, case=case),
    )


def report(
    workdir: pathlib.Path, rows: list[dict[str, Any]], case: compress_data.Case
) -> list[str]:
    """The parts of the report; the plots are drawn on the way."""
    parts = [
        f"Calibrated on {case.calibrated}. Stored parameters and FLOPs are those of "
        "the replaced feed-forward blocks, as shares of the dense ones. R² is that of "
        "the worst block, for its plain outputs and in the metric. The time is that of "
        "the whole model on a batch, as a share of the dense model's, timed in turns.",
        _table(rows, case.metrics),
    ]
    metric = case.metrics[-1]
    costs = (("score", _stored, "stored parameters"), ("latency", _time, "time"))
    for name, cost, words in costs:
        if panels := _panels(rows, metric, cost):
            labels = f"{words}, % of dense", f"{metric}, %"
            dense = 100 * rows[0][metric]
            plots.share_curves(workdir / f"{name}.png", panels, dense, *labels)
            parts.append(f"![score against {words}]({name}.png)")
    if any("r2_metric" in row for row in rows):
        _plot_blocks(workdir / "blocks.png", rows)
        parts.append("![R² of the blocks](blocks.png)")
    return parts


def _table(rows: list[dict[str, Any]], metrics: tuple[str, ...]) -> str:
    head = ["method", "blocks", "stored", "FLOPs", "sizes", "R²", "R², metric"]
    lines = [[*head, *metrics, "file, MB", "time"]]
    for row in rows:
        scores = [f"{row[name]:.4f}" if name in row else "" for name in metrics]
        if "last" not in row:
            lines.append([row["title"], "", "1", "1", "", "", "", *scores, "", ""])
            continue
        sizes = row.get("sizes", [])
        same = len(set(sizes)) == 1
        text = str(sizes[0]) if same else " ".join(map(str, sizes))
        worst = [f"{min(row[k]):.3f}" if k in row else "" for k in ("r2", "r2_metric")]
        lines.append(
            [
                *(row["title"], f"last {row['last']}", f"{row['share']:.4f}"),
                *(f"{row['flop_share']:.4f}", text, *worst, *scores),
                f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "",
                f"{row['ms'] / row['dense_ms']:.2f}" if "ms" in row else "",
            ]
        )
    return markdown(lines, left=2)


def _stored(row: dict[str, Any]) -> float | None:
    return 100 * row["share"]


def _time(row: dict[str, Any]) -> float | None:
    return 100 * row["ms"] / row["dense_ms"] if "ms" in row else None


def _panels(
    rows: list[dict[str, Any]],
    metric: str,
    cost: Callable[[dict[str, Any]], float | None],
) -> dict[str, dict[str, Any]]:
    """Score against a cost in per cent of each method, a panel for each depth."""
    panels: dict[str, dict[str, Any]] = {}
    for row in rows:
        spent = cost(row) if "last" in row and np.isfinite(row[metric]) else None
        if spent is not None:
            curves = panels.setdefault(f"last {row['last']} blocks", {})
            curves.setdefault(row["title"], []).append((spent, 100 * row[metric]))
    return {
        name: {title: sorted(points) for title, points in curves.items()}
        for name, curves in panels.items()
    }


def _plot_blocks(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """R^2 of every block in the metric, the methods at the smallest budget."""
    replaced = [row for row in rows if "r2_metric" in row]
    least = min(row["budget"] for row in replaced)
    panels: dict[str, dict[str, Any]] = {}
    for row in replaced:
        if row["budget"] in (least, 1.0):
            curves = panels.setdefault(f"last {row['last']} blocks", {})
            shown = np.maximum(row["r2_metric"], 0.0)
            curves[row["title"]] = list(enumerate(100 * shown, start=1))
    plots.accuracy_curves(path, panels, "block", "R² in the metric, %")
