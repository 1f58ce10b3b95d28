"""The report of a config's runs: one table, its plots, and where they come from."""

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from experiments import plots
from experiments.metrics import read_jsonl, write_json
from snnk_jax._files import write_atomic


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Takes the seeds of a method together: mean and range of the score."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        methods.setdefault(result["method"], []).append(result)
    table = []
    for runs in methods.values():
        scores = [run["score"] for run in runs]
        table.append(
            {
                "method": runs[0]["method"],
                "title": runs[0]["title"],
                "seeds": len(runs),
                "scores": scores,
                "mean": statistics.fmean(scores),
                "low": min(scores),
                "high": max(scores),
                "learning_rate": runs[0]["recipe"]["learning_rate"],
                "trained": runs[0]["counts"]["trained"],
                "head": runs[0]["counts"]["head"],
                "projections": runs[0]["counts"]["projections"],
                "bytes": runs[0]["adapter_bytes"],
                "memory_bytes": runs[0]["memory_bytes"] // runs[0]["together"],
                "step_ms": statistics.median(run["step_ms"] for run in runs),
                "seconds": sum(run["seconds"] for run in runs),
            }
        )
    return table


_HEADER = (
    "range",
    "trained",
    "head",
    "frozen Ω",
    "file, kB",
    "learning rate",
    "step, ms",
    "memory, MB",
    "seconds",
)


def markdown_table(table: Sequence[dict[str, Any]], metric: str = "accuracy") -> str:
    """The table in Markdown, columns padded so that it reads as text too."""
    lines: list[tuple[str, ...]] = [("method", f"{metric}, %", *_HEADER)]
    for row in table:
        spread = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        lines.append(
            (
                row["title"],
                f"{100 * row['mean']:.2f}",
                spread if row["seeds"] > 1 else "1 seed",
                f"{row['trained']:,}",
                f"{row['head']:,}",
                f"{row['projections']:,}",
                f"{row['bytes'] / 1e3:.1f}",
                f"{row['learning_rate']:g}",
                f"{row['step_ms']:.0f}",
                megabytes(row["memory_bytes"]),
                f"{row['seconds']:.0f}",
            )
        )
    return markdown(lines, left=1)


def megabytes(size: int) -> str:
    """A size in a cell; 0 stands for one that is not known."""
    return f"{size / 1e6:.0f}" if size else "-"


def markdown(lines: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table, its first line the header; ``left`` columns are of text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def text(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([text(lines[0]), text(rule), *map(text, lines[1:])])


def write(
    workdir: str | pathlib.Path,
    results: Sequence[dict[str, Any]],
    *,
    title: str,
    command: str,
    environment: dict[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """Writes ``report.md``, ``results.json`` and the plots; returns the table."""
    workdir = pathlib.Path(workdir)
    table = rows(results)
    metric = results[0]["metric"]
    text = markdown_table(table, metric)
    split = results[0]["recipe"]["eval_split"]
    panels: dict[str, dict[str, Any]] = {"training loss": {}, f"{split} {metric}": {}}
    for result in results:
        if result["recipe"]["seed"] != results[0]["recipe"]["seed"]:
            continue
        logged = read_jsonl(pathlib.Path(result["workdir"]) / "metrics.jsonl")
        for panel, key in zip(
            panels.values(), ("train/loss", f"{split}/{metric}"), strict=True
        ):
            points = [(line["step"], line[key]) for line in logged if key in line]
            if points:
                panel[result["title"]] = points
    panels = {title: curves for title, curves in panels.items() if curves}
    if panels:  # a run that had finished elsewhere logged nothing here
        plots.curves(workdir / "curves.png", panels)
    plots.score_against_parameters(workdir / "score.png", table, f"{metric}, %")
    write_json(workdir / "results.json", {"table": table})
    parts = [
        f"{metric.capitalize()} on the {split} split. " + " ".join(notes),
        text,
        f"![{metric} against trained parameters](score.png)",
        *(["![curves](curves.png)"] if panels else []),
    ]
    document(workdir, title, command, parts, environment)
    return text


def document(
    workdir: str | pathlib.Path,
    title: str,
    command: str,
    parts: Sequence[str],
    environment: dict[str, Any],
) -> None:
    """Writes ``report.md``: title, command, the parts, the environment."""
    facts = ", ".join(f"{name} {value}" for name, value in environment.items())
    text = "\n\n".join([f"# {title}", f"`{command}`", *parts, f"Environment: {facts}."])
    write_atomic(pathlib.Path(workdir) / "report.md", text + "\n")
