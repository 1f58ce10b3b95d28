"""PNG plots of a report."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

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


def _panels(
    panels: Mapping[str, Any], columns: int, size: tuple[float, float], ncols: int
) -> tuple[Any, Any, list[str], float]:
    """Axes of at most so many columns, names of all curves, height of a legend.

    The rest of the last line is empty; ``ncols`` is for :func:`_save_panels`.
    """
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    legend = 0.25 * -(-len(names) // ncols) + 0.3  # inches
    height = size[1] * lines + legend
    figure, axes = plt.subplots(
        lines, columns, figsize=(size[0] * columns, height), squeeze=False
    )
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    return figure, axes, names, legend / height


def _save_panels(
    figure: Any,
    path: str | pathlib.Path,
    handles: Mapping[str, Any],
    ncols: int,
    legend: float,
) -> None:
    """Saves a figure with one legend below all panels, a share of its height."""
    figure.legend(handles.values(), handles.keys(), ncols=ncols, loc="lower center")
    figure.tight_layout(rect=(0, legend, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def log_curves(
    path: str | pathlib.Path, panels: Mapping[str, Mapping[str, Curve]], ylabel: str
) -> None:
    """Draws error against number of features, log-log, in rows of four panels.

    Predictors without features are dashed; all panels share one legend.
    """
    figure, axes, names, legend = _panels(panels, 4, (4.2, 3.4), ncols=5)
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
    axes[0][0].set_ylabel(ylabel)
    _save_panels(figure, path, handles, 5, legend)


def dots(
    path: str | pathlib.Path, points: Mapping[str, Mapping[str, float]], xlabel: str
) -> None:
    """Draws a line of dots for every case, one dot a method."""
    cases = list(dict.fromkeys(case for row in points.values() for case in row))
    figure, axis = plt.subplots(figsize=(7.5, 1.6 + 0.42 * len(cases)))
    for i, (name, row) in enumerate(points.items()):
        heights = [-cases.index(case) - 0.06 * (i - len(points) / 2) for case in row]
        marker = "osv^D*PX"[i % 8]
        axis.plot(list(row.values()), heights, marker, label=name, markersize=5)
    axis.set(xlabel=xlabel)
    axis.set_yticks([-i for i in range(len(cases))], cases)
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def accuracy_curves(
    path: str | pathlib.Path,
    panels: Mapping[str, Mapping[str, Curve]],
    xlabel: str,
    ylabel: str,
    mark: float | None = None,
) -> None:
    """Draws percentages against a logarithmic axis, ``mark`` as a vertical line."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.0 * len(panels), 4.0), squeeze=False
    )
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
        if mark is not None:
            axis.axvline(mark, color="gray", linestyle="--", linewidth=0.8)
        axis.set(xscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    _save(figure, path)


def share_curves(
    path: str | pathlib.Path,
    panels: Mapping[str, Mapping[str, Curve]],
    dense: float,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draws percentages against per cent of a dense model's cost, a line a method.

    ``dense`` is what the dense model reaches. The axis ends below the methods of
    several sizes; of others below it the legend has the figure.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(8.5 * len(panels), 4.5), squeeze=False
    )
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        curves = [points for points in lines.values() if len(points) > 1]
        heights = [y for points in curves or lines.values() for _, y in points]
        space = 0.05 * max(max(heights) - min(heights), 1.0)
        bottom = min(heights) - space
        for index, (name, points) in enumerate(lines.items()):
            below = max(y for _, y in points) < bottom
            label = f"{name} ({points[0][1]:.1f})" if below else name
            style = "o-" if index < 10 else "s--"
            line = {"color": f"C{index % 10}", "markersize": 4}
            axis.plot(*zip(*points, strict=True), style, label=label, **line)
        axis.axhline(dense, color="black", linestyle=":", label=f"dense ({dense:.1f})")
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=(bottom, None))
        shares = [x for points in lines.values() for x, _ in points]
        if max(shares) > 4 * min(shares):
            marks = (0.1, 0.3, 1, 3, 6, 12, 25, 50, 100)
            ticks = [x for x in marks if x > min(shares)]
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)
            axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def score_against_parameters(
    path: str | pathlib.Path, rows: Sequence[Mapping[str, Any]], ylabel: str
) -> None:
    """Draws percentages against trained parameters (head apart), range as bars.

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
    axis.set(xscale="log", xlabel="trained parameters without the head", ylabel=ylabel)
    # Matplotlib's own labels of a log axis of one decade run into each other.
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    _save(figure, path)


def ranges(
    path: str | pathlib.Path, rows: Sequence[Mapping[str, Any]], xlabel: str
) -> None:
    """Draws a line for each row: mean and range, its parameters beside the title.

    Rows are those of :func:`score_against_parameters`, too many for a legend.
    """
    figure, axis = plt.subplots(figsize=(7.6, 0.9 + 0.26 * len(rows)))
    for index, row in enumerate(rows):
        mean = 100 * row["mean"]
        spread = [[mean - 100 * row["low"]], [100 * row["high"] - mean]]
        color = "C1" if "SNNK" in row["title"] else "C0"
        axis.errorbar(mean, -index, xerr=spread, fmt="o", color=color, capsize=3)
    names = [f"{row['title']}: {row['trained']:,}" for row in rows]
    axis.set_yticks([-index for index in range(len(rows))], names, fontsize=8)
    axis.set(xlabel=xlabel)
    axis.grid(alpha=0.3, axis="x")
    _save(figure, path)


def _save(figure: Any, path: str | pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def depth_curves(
    path: str | pathlib.Path,
    panels: Mapping[str, Mapping[str, Any]],
    ylabel: str,
    xlabel: str = "depth",
) -> None:
    """Draws error against depth or degree, log, in rows of three panels.

    Each curve is an array ``[seed, depth]``, drawn as median and range; it ends where
    values are not finite. Bounds are dashed, all panels share one legend and the limits
    of what is below 1e4.
    """
    figure, axes, names, legend = _panels(panels, 3, (4.4, 3.2), ncols=4)
    handles: dict[str, Any] = {}
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for name, values in curves.items():
            low, high = np.min(values, axis=0), np.max(values, axis=0)
            middle = np.median(values, axis=0)
            depths = np.arange(1, values.shape[1] + 1)
            color = "black" if name == "constant" else f"C{names.index(name)}"
            (handles[name],) = axis.plot(
                depths,
                np.where(np.isfinite(middle), middle, np.nan),
                color=color,
                linestyle="--" if name.startswith(("bound", "constant")) else "-",
                marker="." if name != "constant" else None,
                linewidth=1.3,
            )
            shown = np.isfinite(high)
            axis.fill_between(
                depths[shown], low[shown], high[shown], color=color, alpha=0.15
            )
        axis.set(yscale="log", title=title, xlabel=xlabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(top=min(axis.get_ylim()[1], 1e4))
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel(ylabel)
    _save_panels(figure, path, handles, 4, legend)
