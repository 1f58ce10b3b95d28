"""Kernels of infinitely wide networks on small tables, beside the usual classifiers.

The protocol of "Harnessing the Power of Infinitely Wide Deep Nets on Small-data Tasks"
(Arora et al., arXiv 1910.01663) and of its code: data as they are, hyper-parameters on
a split of their own, accuracy on four others; ReLU networks without biases, the first
layers of which may be fixed.
"""

import functools
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import cho_factor, cho_solve

from experiments import plots, ridge_tables, tabular
from experiments.jobs import run_study
from experiments.report import markdown
from experiments.tabular import Split, Table
from snnk_jax import infinite, ridge

TITLES = {
    "ntk_svc": "NTK, SVC",
    "ntk_ridge": "NTK, ridge",
    "nngp_svc": "NNGP, SVC",
    "nngp_ridge": "NNGP, ridge",
    "features_ridge": "NTK features, ridge",
    "rbf_svc": "RBF, SVC",
    "linear_ridge": "Linear ridge",
    "forest": "Random forest",
}
COSTS = tuple(10.0**i for i in range(-2, 5))
_PENALTIES = tuple(10.0**i for i in range(-4, 2))  # relative to the kernel's diagonal
_ROWS, _DIMS = (256, 1024, 2048, 5120), (64, 320)
_WIDTHS = tuple(4.0**i for i in range(-3, 3))  # of RBF, relative to 1 / d


def relu_network(depth: int, last: str = "relu") -> infinite.Layer:
    """A network of ``depth`` activations without biases, a Dense after each."""
    layers: list[infinite.Layer] = [infinite.Dense()]
    for i in range(depth):
        name = last if i == depth - 1 else "relu"
        layers += [infinite.Activation(name), infinite.Dense()]
    return infinite.serial(*layers)


class ReluKernels:
    r"""NNGP and NTK of ReLU networks up to a depth, the first layers trained or fixed.

    The NTK of a network whose first ``fixed`` layers are not trained is
    :math:`\Theta \leftarrow \Theta\, \dot k + K` from :math:`\Theta = K` of that depth
    on. The derivative dual of ReLU is the NNGP of a network that ends in a step.

    Args:
      x: rows. Products of rows are not divided by their length, as in the paper.
    """

    def __init__(self, x: np.ndarray):
        self._count = len(x)
        # Zero rows and columns change no entry, and save compilations.
        rows = next((n for n in _ROWS if n >= len(x)), len(x))
        dim = next((d for d in _DIMS if d >= x.shape[1]), x.shape[1])
        padded = np.zeros((rows, dim), np.float32)
        padded[: len(x), : x.shape[1]] = x * math.sqrt(dim)
        self._x = jnp.asarray(padded)
        self._known: dict[infinite.Layer, np.ndarray] = {}

    def nngp(self, depth: int) -> np.ndarray:
        """K after ``depth`` activations."""
        return self._kernel(relu_network(depth))

    def ntk(self, depth: int, fixed: int = 0) -> np.ndarray:
        """The NTK after ``depth`` activations, ``fixed`` of the layers not trained."""
        value = self.nngp(fixed)
        for i in range(fixed + 1, depth + 1):
            value = value * self._kernel(relu_network(i, "step")) + self.nngp(i)
        return value

    def features(self, depth: int, num_features: int, seed: int) -> np.ndarray:
        """Features of the NTK with all layers trained."""
        fm = relu_network(depth).features(num_features, kind="ntk")
        params = _params(fm, seed, self._x.shape[1])
        return np.asarray(fm.phi(params, self._x))[: self._count]

    def _kernel(self, net: infinite.Layer) -> np.ndarray:
        if net not in self._known:
            values = np.asarray(net.kernel(self._x, get="nngp"))
            self._known[net] = values[: self._count, : self._count]
        return self._known[net]


@functools.lru_cache(maxsize=16)
def _params(fm: Any, seed: int, dim: int) -> Any:
    """Parameters, drawn once for all sets of one padded width."""
    return fm.init(jax.random.key(seed), (dim,))


Predict = Callable[[Split, Sequence[float]], Iterator[np.ndarray]]
"""Class scores, or class numbers, of the rows to judge, one for each penalty."""


def support_vectors(kernel: np.ndarray, y: np.ndarray, steps: int) -> Predict:
    """scikit-learn's SVC on a kernel of all rows; penalties are its C."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import SVC

    def predict(split: Split, costs: Sequence[float]) -> Iterator[np.ndarray]:
        train, judge = _parts(kernel, split)
        known = y[split.fit]
        predictions = np.full(len(split.judge), known[0])
        bounded = len(np.unique(known)) > 1
        for cost in costs:
            if bounded:
                machine = SVC(
                    kernel="precomputed", C=cost, max_iter=steps, cache_size=1000
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    machine.fit(train, known)
                predictions = machine.predict(judge)
                # Where no multiplier meets its bound, a higher one changes nothing.
                multipliers: Any = machine.dual_coef_
                bounded = np.abs(multipliers).max() >= cost
            yield predictions

    return predict


def kernel_ridge(kernel: np.ndarray, y: np.ndarray, classes: int) -> Predict:
    """Kernel ridge regression of labels, both centred.

    Penalties are relative to the mean of the centred kernel's diagonal.
    """

    def predict(split: Split, penalties: Sequence[float]) -> Iterator[np.ndarray]:
        train, judge = _parts(kernel, split)
        targets = _targets(y[split.fit], classes)
        column = train.mean(axis=1)
        judge = judge - judge.mean(axis=1, keepdims=True) - column + column.mean()
        train = train - column[:, None] - column + column.mean()
        mean = targets.mean(axis=0)
        scale = _positive(np.trace(train) / len(train))
        for penalty in penalties:
            system = train + penalty * scale * np.eye(len(train))
            factor = cho_factor(system, overwrite_a=True, check_finite=False)
            yield judge @ cho_solve(factor, targets - mean) + mean

    return predict


def feature_ridge(phi: np.ndarray, y: np.ndarray, classes: int) -> Predict:
    """Ridge regression of labels on features: :func:`kernel_ridge` of their kernel."""

    def predict(split: Split, penalties: Sequence[float]) -> Iterator[np.ndarray]:
        train, judge = phi[split.fit].astype(np.float32), phi[split.judge]
        targets = _targets(y[split.fit], classes).astype(np.float32)
        scale = _positive(np.sum(np.var(train, axis=0, dtype=np.float64)))
        for penalty in penalties:
            l2 = penalty * scale / len(train)
            solution = ridge.fit(jnp.asarray(train), jnp.asarray(targets), l2=l2)
            yield judge @ np.asarray(solution.kernel) + np.asarray(solution.bias)

    return predict


def forest(x: np.ndarray, y: np.ndarray, trees: int, seed: int) -> Predict:
    """scikit-learn's random forest; penalties are shares of the features to try."""
    from sklearn.ensemble import RandomForestClassifier

    def predict(split: Split, shares: Sequence[float]) -> Iterator[np.ndarray]:
        for share in shares:
            options: dict[str, Any] = {
                "max_features": max(1, round(share * x.shape[1]))
            }
            model = RandomForestClassifier(trees, random_state=seed, **options)
            model.fit(x[split.fit], y[split.fit])
            yield model.predict(x[split.judge])

    return predict


def settings(
    method: str, table: Table, kernels: Callable[[], ReluKernels], config: Any
) -> Iterator[tuple[str, Predict, Sequence[float]]]:
    """What a method chooses from: settings, each with its penalties."""
    y, classes, depths = table.y, table.classes, range(config.depths)
    if method == "ntk_svc":
        for depth in depths:
            for fixed in range(depth + 1):
                kernel = kernels().ntk(depth, fixed)
                name = f"depth {depth}, {fixed} fixed"
                yield name, support_vectors(kernel, y, config.svc_steps), COSTS
    elif method == "nngp_svc":
        for depth in depths:
            kernel = kernels().nngp(depth)
            name = f"depth {depth}"
            yield name, support_vectors(kernel, y, config.svc_steps), COSTS
    elif method in ("ntk_ridge", "nngp_ridge"):
        for depth in depths:
            network = kernels()
            kernel = (network.ntk if method == "ntk_ridge" else network.nngp)(depth)
            yield f"depth {depth}", kernel_ridge(kernel, y, classes), _PENALTIES
    elif method == "features_ridge":
        for depth in depths:
            phi = kernels().features(depth, config.num_features, config.seed)
            yield f"depth {depth}", feature_ridge(phi, y, classes), _PENALTIES
    elif method == "rbf_svc":
        square = np.sum(table.x**2, axis=1)
        distance = square[:, None] + square - 2 * table.x @ table.x.T
        for width in _WIDTHS:
            kernel = np.exp(-width / table.x.shape[1] * np.maximum(distance, 0))
            name = f"width {width:g}"
            yield name, support_vectors(kernel, y, config.svc_steps), COSTS
    elif method == "linear_ridge":
        yield "", feature_ridge(table.x, y, classes), _PENALTIES
    else:
        shares = (table.x.shape[1] ** -0.5, 0.3, 0.6)
        yield "", forest(table.x, y, config.trees, config.seed), shares


def measure(
    table: Table, method: str, kernels: Callable[[], ReluKernels], config: Any
) -> dict[str, Any]:
    """Accuracies on the splits of a table, tuned on its own split for that.

    Among settings of one accuracy the first is taken, of ridge regression the one of
    the least squared error.
    """
    start = time.perf_counter()
    assert table.tune is not None
    best = None
    for name, predict, penalties in settings(method, table, kernels, config):
        found = predict(table.tune, penalties)
        for penalty, predictions in zip(penalties, found, strict=True):
            loss = _loss(predictions, table.y[table.tune.judge])
            if best is None or loss < best[0]:
                best = loss, name, predict, penalty
    assert best is not None
    loss, name, predict, penalty = best
    results = []
    for split in table.splits:
        (predictions,) = predict(split, (penalty,))
        results.append(1 - _loss(predictions, table.y[split.judge])[0])
    return {
        "table": table.name,
        "method": method,
        "rows": len(table.x),
        "dim": table.x.shape[1],
        "classes": table.classes,
        "results": results,
        "validation": 1 - loss[0],
        "setting": name,
        "penalty": penalty,
        "seconds": time.perf_counter() - start,
    }


def _parts(kernel: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
    train, judge = (
        kernel[np.ix_(rows, split.fit)] for rows in (split.fit, split.judge)
    )
    return train.astype(np.float64), judge.astype(np.float64)


def _targets(y: np.ndarray, classes: int) -> np.ndarray:
    return np.where(y[:, None] == np.arange(classes)[None], 1.0, -1.0)


def _positive(scale: float) -> float:
    """A scale to multiply penalties with, also where all rows are equal."""
    return float(scale) if scale > 0 else 1.0


def _loss(predictions: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The share of errors, and the squared error of scores."""
    if predictions.ndim == 1:
        return float(np.mean(predictions != labels)), 0.0
    wrong = np.mean(np.argmax(predictions, axis=1) != labels)
    targets = _targets(labels, predictions.shape[1])
    return float(wrong), float(np.mean((predictions - targets) ** 2))


def tables(config: Any) -> list[Table]:
    """The sets of the paper: without a test file and of few rows, small ones first."""
    found = tabular.classification_tables(config.data.dir, config.sets)
    found = [t for t in found if len(t.splits) > 1 and len(t.x) <= config.max_rows]
    if not found:
        raise ValueError(
            "config.sets and max_rows must leave a set without a test file. "
            f"Got {config.sets} and {config.max_rows}."
        )
    return sorted(found, key=lambda table: len(table.x))


def check(config: Any) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    unknown = [method for method in config.methods if method not in TITLES]
    if unknown or not config.methods:
        raise ValueError(
            f"config.methods must be among {', '.join(TITLES)}. Got {config.methods}."
        )
    for key in ("max_rows", "depths", "num_features", "trees", "svc_steps"):
        if not config[key] > 0:
            raise ValueError(f"config.{key} must be positive. Got {config[key]}.")
    if config.seed < 0:
        raise ValueError(f"config.seed must not be negative. Got {config.seed}.")


def _groups(methods: Sequence[str]) -> list[list[str]]:
    """The exact NTK on all sets first: what a run is for if it is stopped."""
    first = [method for method in methods if method.startswith("ntk")]
    return [first, [method for method in methods if method not in first]]


def run(
    config: Any, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Measures every method on every set and writes the report; resumes where stopped.

    Args:
      config: a config of ``configs/ntk_uci.py``.
      workdir: folder of ``rows.jsonl``, ``report.md`` and the plot.
      command: shown in the report.

    Returns:
      The rows of the report.

    Raises:
      FileNotFoundError: without the data; says what to pass.
    """
    check(config)
    known = {table.name: table for table in tables(config)}

    @functools.lru_cache(maxsize=1)
    def kernels(name: str) -> ReluKernels:
        return ReluKernels(known[name].x)

    todo = [
        (
            f"{name} | {method}",
            functools.partial(
                measure, table, method, functools.partial(kernels, name), config
            ),
        )
        for group in _groups(config.methods)
        for name, table in known.items()
        for method in group
    ]
    return run_study(config, workdir, command, todo, report)


def report(workdir: pathlib.Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The parts of the report; the plot is drawn on the way."""
    means: dict[str, dict[str, float]] = {}
    for row in rows:
        means.setdefault(row["method"], {})[row["table"]] = float(
            np.mean(row["results"])
        )
    sets = list(dict.fromkeys(row["table"] for row in rows))
    best = {name: max(found[name] for found in means.values()) for name in sets}
    curves = {
        TITLES[method]: [
            (
                share,
                float(np.mean([found[name] >= share * best[name] for name in sets])),
            )
            for share in np.linspace(0.8, 1, 81)
        ]
        for method, found in means.items()
    }
    panel = {"share of sets with at least that share": curves}
    plots.curves(workdir / "profile.png", panel, "accuracy / that of the best method")
    lines = [["accuracy, %", "rows", *(TITLES[method] for method in means)]]
    sizes = {row["table"]: row["rows"] for row in rows}
    for name in sets:
        cells = [f"{100 * found[name]:.1f}" for found in means.values()]
        lines.append([name, f"{sizes[name]:,}", *cells])
    costs = [["method", "seconds, all sets", "chosen depths"]]
    for method in means:
        mine = [row for row in rows if row["method"] == method]
        depths = [row["setting"][6] for row in mine if "depth" in row["setting"]]
        counts = ", ".join(f"{d}: {depths.count(d)}" for d in sorted(set(depths)))
        seconds = sum(row["seconds"] for row in mine)
        costs.append([TITLES[method], f"{seconds:.0f}", counts or "-"])
    return [
        f"Mean accuracy of four splits, {len(sets)} sets.",
        ridge_tables.summary(means, list(means), sets, TITLES),
        "![profile](profile.png)",
        "Seconds, the choice of settings included; depths are numbers of activations, "
        "0: linear.",
        markdown(costs, left=1),
        markdown(lines, left=1),
    ]
