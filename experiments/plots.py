"""PNG plots of a report."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

Curve = Sequence[tuple[float, float]]


def curves(
    path: str | pathlib.Path,
    panels: Mapping[str, Mapping[str, Curve]],
    xlabel: str = "step",
) -> None:
    """Draws one panel per key, each with its named curves."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.0 * len(panels), 3.6), squeeze=False
    )
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
        axis.set(xlabel=xlabel, title=title)
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    _save(figure, path)


def log_curves(
    path: str | pathlib.Path, panels: Mapping[str, Mapping[str, Curve]], ylabel: str
) -> None:
    """Draws error against number of features, log-log, in rows of four panels.

    Predictors without features are dashed; all panels share one legend.
    """
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    legend = 0.25 * -(-len(names) // 5) + 0.3  # inches
    height = 3.4 * lines + legend
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, height), squeeze=False
    )
    handles: dict[str, Any] = {}
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for name, points in curves.items():
            rival = name in ("constant", "affine")
            style = "--" if rival else "-"
            color = "black" if name == "constant" else f"C{names.index(name) % 10}"
            marker = None if rival else "osv^D*"[names.index(name) // 10]
            (handles[name],) = axis.plot(
                *zip(*points, strict=True),
                linestyle=style,
                marker=marker,
                markersize=3,
                color="gray" if name == "affine" else color,
                linewidth=1.2,
            )
        axis.set(xscale="log", yscale="log", title=title, xlabel="features m")
        # What is far above every predictor need not be told apart.
        axis.set_ylim(top=min(axis.get_ylim()[1], 30))
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    axes[0][0].set_ylabel(ylabel)
    figure.legend(handles.values(), handles.keys(), ncols=5, loc="lower center")
    figure.tight_layout(rect=(0, legend / height, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def accuracy_against_parameters(
    path: str | pathlib.Path, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Draws accuracy against trained parameters (head apart), range as bars.

    Each row has ``title``, ``trained``, ``mean``, ``low`` and ``high``. The linear
    probe, which trains no parameter but the head, is drawn as a line.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for index, row in enumerate(rows):
        color = f"C{index}"
        mean = 100 * row["mean"]
        if row["trained"] == 0:
            axis.axhline(mean, color=color, linestyle="--", label=row["title"])
            continue
        spread = [[mean - 100 * row["low"]], [100 * row["high"] - mean]]
        marker = "o" if "SNNK" in row["title"] else "s"
        axis.errorbar(
            row["trained"],
            mean,
            yerr=spread,
            fmt=marker,
            color=color,
            capsize=3,
            label=row["title"],
        )
    axis.set(
        xscale="log", xlabel="trained parameters without the head", ylabel="accuracy, %"
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: str | pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
