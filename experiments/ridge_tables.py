"""Fully bundled networks on tables: protocols, methods and reports."""

import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax
from scipy.stats import rankdata

from experiments import plots
from experiments.baselines import (
    FourierFeatures,
    kernel_columns,
    matched_width,
    mlp_size,
    train_mlps,
)
from experiments.report import markdown
from experiments.tabular import Split, Table, standardise
from snnk_jax import ridge
from snnk_jax.features import URF, ArcCosine, Chain
from snnk_jax.projections import power_of_two
from snnk_jax.typing import Array, Params

Maps = Callable[..., list[np.ndarray]]
"""Turns training rows and others into columns: one trial of a method."""

TITLES = {
    "linear": "Linear ridge",
    "relu_1": "Bundled ReLU, 1 layer",
    "relu_2": "Bundled ReLU, 2 layers",
    "relu_3": "Bundled ReLU, 3 layers",
    "relu_deep": "Bundled ReLU, 2 or 3 layers",
    "cosine": "Bundled cosine, 1 layer",
    "rbf_features": "RBF random features",
    "rbf_kernel": "RBF kernel, exact",
    "mlp_trained": "MLP, same trained parameters",
    "mlp_width": "MLP, same width",
    "mlp_flops": "MLP of 2 layers, same FLOPs",
}
_BIASES = (0.25, 0.5, 1.0, 2.0)
_LENGTHS = 2.0 ** np.arange(-1.5, 2.5, 0.5)


def trials(method: str, dim: int, config: Any, seed: int) -> list[Maps]:
    """The maps that a closed-form method chooses from: eight, as MLPs have settings.

    The linear method has nothing to choose but l2.
    """
    m = config.num_features
    if method == "linear":
        return [lambda *parts: list(parts)]
    if method in ("rbf_features", "rbf_kernel"):
        scales = [1 / (length * math.sqrt(dim)) for length in _LENGTHS]
        if method == "rbf_kernel":
            return [functools.partial(_kernel, scale) for scale in scales]
        fm = FourierFeatures(m)
        return [functools.partial(_features, fm, seed, s, 0.0, False) for s in scales]
    scale = 1 / math.sqrt(dim)
    if method == "cosine":
        return [
            functools.partial(
                _features,
                URF(activation="cos", num_features=m, scale=norm),
                *(seed, scale, bias, True),
            )
            for norm in (0.5, 1.0, 2.0, 4.0)
            for bias in (0.5, 2.0)
        ]
    depths = {"relu_1": (1,), "relu_2": (2,), "relu_3": (3,), "relu_deep": (2, 3)}
    # The orders of the last layer; the depth takes their place where it is open.
    orders = (1, 2) if len(depths[method]) == 1 else (1,)
    return [
        functools.partial(_features, _relu(m, depth, order), seed, scale, bias, False)
        for depth in depths[method]
        for order in orders
        for bias in _BIASES
    ]


def _relu(num_features: int, depth: int, order: int) -> Any:
    """The fully bundled network: its parameters are frozen, the readout is fitted."""
    inner = ArcCosine(num_features=num_features)
    return Chain((inner,) * (depth - 1) + (dataclasses.replace(inner, order=order),))


def _kernel(scale: float, *parts: np.ndarray) -> list[np.ndarray]:
    return kernel_columns(*(part * scale for part in parts))


def _features(
    fm: Any, seed: int, scale: float, bias: float, unit: bool, *parts: np.ndarray
) -> list[np.ndarray]:
    """Features of scaled rows with a constant coordinate, on the sphere if ``unit``."""
    columns = []
    for part in parts:
        x = np.concatenate([part * scale, np.full((len(part), 1), bias)], axis=1)
        if unit:
            x /= np.linalg.norm(x, axis=1, keepdims=True)
        # Zero rows and columns change nothing and save compilations: sets share shapes.
        rows, dim = _padded(len(x), 1024), _padded(x.shape[1], 16)
        x = np.pad(x, [(0, rows - len(x)), (0, dim - x.shape[1])]).astype(np.float32)
        columns.append(np.asarray(_phi(fm, _params(fm, seed, dim), x))[: len(part)])
    return columns


def _padded(size: int, least: int) -> int:
    """``least`` times the next power of four."""
    while least < size:
        least *= 4
    return least


@functools.lru_cache(maxsize=64)
def _params(fm: Any, seed: int, dim: int) -> Params:
    return fm.init(jax.random.key(seed), dim)


@functools.partial(jax.jit, static_argnums=0)
def _phi(fm: Any, params: Params, x: Array) -> Array:
    return fm.phi(params, x)


def fit_predict(
    maps: Maps, train: np.ndarray, targets: np.ndarray, judge: np.ndarray
) -> np.ndarray:
    """Predictions of ridge regression on the columns, l2 by leave-one-out."""
    phi, phi_judge = maps(train, judge)
    solution = ridge.fit(
        jnp.asarray(phi, jnp.float32), jnp.asarray(targets, jnp.float32)
    )
    return phi_judge @ np.asarray(solution.kernel) + np.asarray(solution.bias)


@dataclasses.dataclass(frozen=True)
class Task:
    """A split with its rows standardised by the part that is fitted."""

    x: np.ndarray
    targets: np.ndarray
    x_judge: np.ndarray
    judge: np.ndarray
    unit: float = 1.0  # of the targets

    @classmethod
    def of(cls, table: Table, split: Split) -> "Task":
        x, x_judge = standardise(table.x[split.fit], table.x[split.judge])
        y, judge = table.y[split.fit], table.y[split.judge]
        if table.classes:
            targets = np.where(y[:, None] == np.arange(table.classes)[None], 1.0, -1.0)
            return cls(x, targets, x_judge, judge)
        targets, judge = standardise(y, judge)
        return cls(x, targets, x_judge, judge, float(y.std()))

    def score(self, predictions: np.ndarray) -> tuple[float, float]:
        """Least is best: the RMSE, or the errors; among equals the squared loss."""
        if self.judge.ndim == 2:
            return float(np.sqrt(np.mean((predictions - self.judge) ** 2))), 0.0
        wrong = np.mean(np.argmax(predictions, axis=1) != self.judge)
        labels = self.judge[:, None] == np.arange(predictions.shape[1])[None]
        return float(wrong), float(np.mean((predictions - (2.0 * labels - 1)) ** 2))

    def result(self, predictions: np.ndarray) -> float:
        """What is reported: the RMSE in the targets' unit, or the accuracy."""
        first, _ = self.score(predictions)
        return first * self.unit if self.judge.ndim == 2 else 1 - first


def tuning_split(table: Table, split: Split, rows: int, seed: int) -> Split:
    """A cut of the training rows, or the table's own, of at most ``rows`` to fit."""
    rng = np.random.default_rng(seed)
    if table.tune is not None:
        fit, judge = rng.permutation(table.tune.fit), table.tune.judge
        return Split(fit[:rows], rng.permutation(judge)[:rows])
    order = rng.permutation(split.fit)[: rows * 5 // 4]
    cut = len(order) * 4 // 5
    return Split(order[:cut], order[cut:])


def measure(table: Table, method: str, config: Any) -> dict[str, Any]:
    """Results of a method on the splits of a table, tuned on training rows alone."""
    start = time.perf_counter()
    tuned = [
        Task.of(table, tuning_split(table, split, config.tune_rows, i))
        for i, split in enumerate(table.splits[: 1 if table.tune else None])
    ]
    tasks = [Task.of(table, split) for split in table.splits]
    rows = max(len(task.x) for task in tasks)
    fact: dict[str, Any]
    if method == "rbf_kernel" and rows > config.kernel_rows:
        results, fact = [], {"choices": {}, "trained": 0, "multiplications": 0}
    elif method.startswith("mlp"):
        results, fact = _trained(table, method, tuned, tasks, config)
    else:
        results, fact = _closed_form(table, method, tuned, tasks, config)
    return {
        "table": table.name,
        "method": method,
        "rows": rows,
        "dim": table.x.shape[1],
        "classes": table.classes,
        "results": results,
        **fact,
        "seconds": time.perf_counter() - start,
    }


def _closed_form(
    table: Table,
    method: str,
    tuned: Sequence[Task],
    tasks: Sequence[Task],
    config: Any,
) -> tuple[list[float], dict[str, Any]]:
    dim, outputs = table.x.shape[1], table.classes or 1
    best, results = [], []
    for i, task in enumerate(tasks):
        # One draw for each split, so that results vary with it too.
        candidates = trials(method, dim, config, config.seed + i)
        if i < len(tuned):
            scores = [
                tuned[i].score(
                    fit_predict(maps, tuned[i].x, tuned[i].targets, tuned[i].x_judge)
                )
                if len(candidates) > 1
                else (0.0, 0.0)
                for maps in candidates
            ]
            best.append(min(range(len(scores)), key=scores.__getitem__))
        maps = candidates[best[min(i, len(best) - 1)]]
        results.append(
            task.result(fit_predict(maps, task.x, task.targets, task.x_judge))
        )
    width = {"linear": dim, "rbf_kernel": len(tasks[0].x)}
    m = width.get(method, config.num_features)
    depth = 3 if method == "relu_deep" else int(method[-1]) if "relu" in method else 1
    hidden = (dim + 1) * m + (depth - 1) * m * m if method != "linear" else 0
    return results, {
        "choices": dict(Counter(map(str, best))),
        "trained": (m + 1) * outputs,
        "multiplications": hidden + m * outputs,
    }


def _trained(
    table: Table,
    method: str,
    tuned: Sequence[Task],
    tasks: Sequence[Task],
    config: Any,
) -> tuple[list[float], dict[str, Any]]:
    dim, outputs = table.x.shape[1], table.classes or 1
    m = config.num_features
    hidden = {
        "mlp_trained": lambda: (matched_width((m + 1) * outputs, dim, outputs),),
        "mlp_width": lambda: (m,),
        "mlp_flops": lambda: (
            (matched_width(mlp_size((dim, m, outputs)), dim, outputs, 2),) * 2
        ),
    }[method]()
    grid = np.array([(r, d) for r in config.mlp.rates for d in config.mlp.decays])
    found = _predictions(tuned, np.tile(grid, (len(tuned), 1, 1)), hidden, config)
    best = []
    for task, predictions in zip(tuned, found, strict=True):
        scores = {
            (trial, checkpoint): task.score(predictions[trial, checkpoint])
            for trial in range(len(grid))
            for checkpoint in range(config.mlp.checkpoints)
        }
        best.append(min(scores, key=scores.__getitem__))
    best = best if len(best) == len(tasks) else best * len(tasks)
    settings = np.stack([grid[[trial]] for trial, _ in best])
    found = _predictions(tasks, settings, hidden, config)
    results = [
        task.result(predictions[0, checkpoint])
        for task, predictions, (_, checkpoint) in zip(tasks, found, best, strict=True)
    ]
    widths = (dim, *hidden, outputs)
    return results, {
        "choices": dict(Counter(f"{t}, {c}" for t, c in best)),
        "trained": mlp_size(widths),
        "multiplications": sum(a * b for a, b in itertools.pairwise(widths)),
    }


def _predictions(
    tasks: Sequence[Task],
    settings: np.ndarray,
    hidden: tuple[int, ...],
    config: Any,
) -> list[np.ndarray]:
    """Predictions ``[t, c, k, o]`` of each task's settings at every checkpoint."""
    classify = tasks[0].judge.ndim == 1
    outputs = tasks[0].targets.shape[1]
    shapes = [(*task.x.shape, len(task.x_judge), outputs) for task in tasks]
    rows, dim, judged, _ = map(max, zip(*shapes, strict=True))
    rows = judged = _padded(max(rows, judged), 1024)
    dim, wide = _padded(dim, 16), _padded(outputs, 4) if classify else 1

    def stack(parts: list[np.ndarray], rows: int, columns: int) -> np.ndarray:
        padded = [
            np.pad(part, [(0, rows - len(part)), (0, columns - part.shape[1])])
            for part in parts
        ]
        return np.stack(padded).astype(np.float32)

    targets = [(t.targets > 0) * 1.0 if classify else t.targets for t in tasks]
    smallest = min(len(task.x) for task in tasks)
    epochs = config.mlp.epochs * smallest // config.mlp.batch
    # In few sizes, which compile once each.
    steps = power_of_two(max(config.mlp.steps, epochs) // config.mlp.checkpoints)
    found = train_mlps(
        jax.random.key(config.seed),
        stack([task.x for task in tasks], rows, dim),
        stack(targets, rows, wide),
        np.array([len(task.x) for task in tasks], np.int32),
        stack([task.x_judge for task in tasks], judged, dim),
        settings[..., 0].astype(np.float32),
        settings[..., 1].astype(np.float32),
        hidden=hidden,
        classify=classify,
        steps=steps * config.mlp.checkpoints,
        checkpoints=config.mlp.checkpoints,
        batch=config.mlp.batch,
    )
    parts = [
        np.asarray(part)[:, :, : len(task.x_judge), :outputs]
        for part, task in zip(found, tasks, strict=True)
    ]
    # As probabilities between -1 and 1, which ties are judged by.
    return [2 * softmax(part, axis=-1) - 1 if classify else part for part in parts]


def report(
    workdir: pathlib.Path, rows: Sequence[dict[str, Any]], config: Any
) -> list[str]:
    """The parts of the report; plots are written on the way."""
    results: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["results"]:
            results.setdefault(row["method"], {})[row["table"]] = row["results"]
    classify = bool(rows[0]["classes"])
    judge = _classification if classify else _regression
    return [*judge(workdir, results), _costs(rows)]


def _regression(
    workdir: pathlib.Path, results: dict[str, dict[str, list[float]]]
) -> list[str]:
    tables = list(dict.fromkeys(t for method in results.values() for t in method))
    lines = [["test RMSE", *tables]]
    for method, found in results.items():
        cells = [_mean_and_error(found.get(table, [])) for table in tables]
        lines.append([TITLES[method], *cells])
    means = {
        method: {table: float(np.mean(values)) for table, values in found.items()}
        for method, found in results.items()
    }
    everywhere = [m for m in means if len(means[m]) == len(tables)]
    values = np.array([[means[m][t] for t in tables] for m in everywhere])
    ranks = rankdata(values, axis=0).mean(axis=1)
    to_best = np.exp(np.mean(np.log(values / values.min(axis=0)), axis=1))
    summary = [["method", "mean rank", "RMSE over the best, geometric mean", "best on"]]
    for method, rank, ratio, row in zip(
        everywhere, ranks, to_best, values, strict=True
    ):
        wins = int(np.sum(row == values.min(axis=0)))
        summary.append([TITLES[method], f"{rank:.2f}", f"{ratio:.3f}", str(wins)])
    base = means.get("linear") or next(iter(means.values()))
    points = {
        TITLES[method]: {t: value / base[t] for t, value in found.items()}
        for method, found in means.items()
    }
    plots.dots(workdir / "rmse.png", points, "test RMSE / that of linear ridge")
    return [
        "Test RMSE in the unit of the targets: mean and standard error over splits.",
        markdown(lines, left=1),
        f"Over the {len(tables)} sets, methods that ran on all of them:",
        markdown(summary, left=1),
        "![RMSE](rmse.png)",
    ]


def _mean_and_error(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = float(np.mean(values))
    # Two digits of most standard errors.
    digits = max(0, 2 - math.floor(math.log10(abs(mean) or 1)))
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def _classification(
    workdir: pathlib.Path, results: dict[str, dict[str, list[float]]]
) -> list[str]:
    means = {
        method: {table: float(np.mean(values)) for table, values in found.items()}
        for method, found in results.items()
    }
    tables = list(dict.fromkeys(t for method in means.values() for t in method))
    shared = [t for t in tables if all(t in found for found in means.values())]
    everywhere = [m for m in means if len(means[m]) == len(tables)]
    parts = [
        f"Over all {len(tables)} sets:",
        summary(means, everywhere, tables, TITLES),
    ]
    if len(shared) < len(tables) and shared:
        parts += [
            f"Over the {len(shared)} sets that every method ran on:",
            summary(means, list(means), shared, TITLES),
        ]
    shares = np.linspace(0.8, 1, 81)
    best = {t: max(means[m][t] for m in everywhere) for t in tables}
    curves = {
        TITLES[method]: [
            (s, float(np.mean([means[method][t] >= s * best[t] for t in tables])))
            for s in shares
        ]
        for method in everywhere
    }
    panel = {"share of sets with at least that share": curves}
    plots.curves(workdir / "profile.png", panel, "accuracy / that of the best method")
    lines = [["accuracy, %", *(TITLES[m] for m in means)]]
    for table in tables:
        cells = [
            f"{100 * means[m][table]:.1f}" if table in means[m] else "-" for m in means
        ]
        lines.append([table, *cells])
    per_set = markdown(lines, left=1)
    return [*parts, "![profile](profile.png)", per_set]


def summary(
    means: dict[str, dict[str, float]],
    methods: Sequence[str],
    tables: Sequence[str],
    titles: dict[str, str],
) -> str:
    """As in Table 1 of Arora et al., arXiv 1910.01663."""
    values = np.array([[means[m][t] for t in tables] for m in methods])
    best = values.max(axis=0)
    ranks = rankdata(-values, axis=0).mean(axis=1)
    lines = [
        ["method", "accuracy, %", "std", "mean rank", "P90, %", "P95, %", "PMA, %"]
    ]
    for method, row, rank in zip(methods, values, ranks, strict=True):
        shares = row / best
        lines.append(
            [
                titles[method],
                *(f"{100 * v:.2f}" for v in (row.mean(), row.std())),
                f"{rank:.2f}",
                *(f"{100 * np.mean(shares >= p):.1f}" for p in (0.9, 0.95)),
                f"{100 * np.mean(shares):.2f}",
            ]
        )
    return markdown(lines, left=1)


def _costs(rows: Sequence[dict[str, Any]]) -> str:
    """Sizes and times of each method, ranges over the sets."""
    lines = [["method", "trained parameters", "multiplications a row", "seconds, all"]]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method and row["results"]]
        if mine:
            ranges = [
                sorted(row[key] for row in mine)
                for key in ("trained", "multiplications")
            ]
            cells = [f"{values[0]:,} to {values[-1]:,}" for values in ranges]
            seconds = sum(row["seconds"] for row in mine)
            lines.append([TITLES[method], *cells, f"{seconds:.0f}"])
    return markdown(lines, left=1)
