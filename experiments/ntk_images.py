"""Features of a neural tangent kernel on images, beside the exact kernel.

The features of all training images by streamed ridge regression, against their number;
the exact kernel of the first n images, against n.
"""

import functools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments import plots, ridge_images
from experiments.jobs import Job, run_study
from experiments.ntk_tables import kernel_ridge
from experiments.report import markdown
from experiments.ridge_images import Images
from experiments.tabular import Split

# Methods of maps, with the maps' names, and their titles in the report.
MAPS = {"features": "ntk", "landmarks": "landmarks"}
TITLES = {"features": "random features", "landmarks": "landmarks"}


def measure_features(
    method: str, num_features: int, seed: int, images: Images, config: Any
) -> dict[str, Any]:
    """Accuracy and seconds, from raw images to the last prediction."""
    job = ridge_images.Job(MAPS[method], num_features, seed)
    return {**ridge_images.measure(job, images, config), "method": method}


def measure_exact(rows: int, images: Images, config: Any) -> dict[str, Any]:
    """Accuracy of the exact kernel of some training images, and seconds.

    The penalty is the best of a grid for the last ``val_fraction`` of the rows.
    """
    start = time.perf_counter()
    order = np.random.default_rng(0).permutation(len(images.x_train))[:rows]
    centre, scale = ridge_images.pixel_scale(images)
    x = np.concatenate([images.x_train[order], images.x_test])
    x = ridge_images.prepared(x, centre, scale, config.pixels == "unit")
    net = ridge_images.relu_network(config.depth)
    kernel = np.concatenate(
        [
            np.asarray(net.kernel(x[:rows], get="ntk")),
            np.asarray(net.kernel(x[rows:], x[:rows], get="ntk")),
        ]
    )
    computed = time.perf_counter()
    y = np.concatenate([images.y_train[order], images.y_test])
    predict = kernel_ridge(kernel, y, images.classes)
    train, test = np.arange(rows), np.arange(rows, len(y))
    cut = rows - round(rows * config.val_fraction)
    penalties = tuple(10.0**i for i in range(-6, 1))
    found = predict(Split(train[:cut], train[cut:]), penalties)
    right = [np.mean(np.argmax(f, axis=1) == y[cut:rows]) for f in found]
    penalty = penalties[int(np.argmax(right))]
    (scores,) = predict(Split(train, test), (penalty,))
    return {
        "method": "exact",
        "rows": rows,
        "accuracy": float(np.mean(np.argmax(scores, axis=1) == images.y_test)),
        "penalty": penalty,
        "kernel_s": computed - start,
        "seconds": time.perf_counter() - start,
    }


def jobs(images: Images, config: Any) -> Iterator[Job]:
    """The exact kernel by rows, then random features and landmarks by their number."""
    for rows in config.exact_rows:
        yield f"exact | {rows}", functools.partial(measure_exact, rows, images, config)
    sizes = {"features": config.num_features, "landmarks": config.landmarks}
    for method, numbers in sizes.items():
        for num_features in numbers:
            for seed in config.seeds:
                measure = functools.partial(
                    measure_features, method, num_features, seed, images, config
                )
                yield f"{method} | {num_features} | seed {seed}", measure


def check(config: Any) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    if config.data.name not in ("mnist", "digits"):
        raise ValueError(
            f"config.data.name must be mnist or digits. Got {config.data.name!r}."
        )
    if config.pixels not in ("unit", "centred"):
        raise ValueError(
            f"config.pixels must be unit or centred. Got {config.pixels!r}."
        )
    for key in ("depth", "width", "select_features", "chunk_size"):
        if not config[key] > 0:
            raise ValueError(f"config.{key} must be positive. Got {config[key]}.")
    if not config.seeds:
        raise ValueError(f"config.seeds must not be empty. Got {config.seeds}.")
    for key in ("num_features", "landmarks"):
        if min(config[key], default=64) < 64:
            raise ValueError(f"config.{key} must be at least 64. Got {config[key]}.")
    if config.exact_rows and min(config.exact_rows) < 20:
        raise ValueError(
            f"config.exact_rows must be at least 20. Got {config.exact_rows}."
        )
    if not 0 < config.val_fraction < 1:
        raise ValueError(
            f"config.val_fraction must be in (0, 1). Got {config.val_fraction}."
        )


def run(
    config: Any, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Measures every job and writes the report; finished jobs are not repeated.

    Args:
      config: a config of ``configs/ntk_mnist.py``.
      workdir: folder of ``rows.jsonl``, ``report.md`` and the plot.
      command: shown in the report.

    Returns:
      The rows of the report.

    Raises:
      FileNotFoundError: without the data; says what to pass.
    """
    check(config)
    images = ridge_images.load_images(config.data.name, config.data.dir)
    for key in ("exact_rows", "landmarks"):
        if max(config[key], default=0) > len(images.x_train):
            raise ValueError(
                f"config.{key} must be at most {len(images.x_train)} images. "
                f"Got {config[key]}."
            )
    return run_study(
        config,
        workdir,
        command,
        jobs(images, config),
        functools.partial(report, config=config),
    )


def report(
    workdir: pathlib.Path, rows: Sequence[dict[str, Any]], config: Any
) -> list[str]:
    """The parts of the report; the plot is written on the way."""
    exact = [row for row in rows if row["method"] == "exact"]
    lines = [["method", "training images", "m", "accuracy, %", "seconds"]]
    for row in exact:
        cells = [f"{row['rows']:,}", "-", f"{100 * row['accuracy']:.2f}"]
        lines.append(["exact kernel", *cells, f"{row['seconds']:.0f}"])
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["method"] != "exact":
            groups.setdefault((row["method"], row["num_features"]), []).append(row)
    curves: dict[str, list[tuple[float, float]]] = {}
    for (method, m), mine in groups.items():
        accuracy = 100 * float(np.mean([row["accuracy"] for row in mine]))
        curves.setdefault(TITLES[method], []).append((m, accuracy))
        cells = [f"{mine[0]['rows']:,}", f"{m:,}", f"{accuracy:.2f}"]
        seconds = np.mean([row["seconds"] for row in mine])
        lines.append([TITLES[method], *cells, f"{seconds:.0f}"])
    panels = {"features, all training images": curves} if curves else {}
    if exact:
        points = [(row["rows"], 100 * row["accuracy"]) for row in exact]
        panels["exact kernel, by training images"] = {"exact kernel": points}
    plots.accuracy_curves(
        workdir / "accuracy.png", panels, "features m, or images", "test accuracy, %"
    )
    title = f"NTK of {config.depth} ReLU layers on plain pixels of {config.data.name}."
    return [title, markdown(lines, left=1), "![accuracy](accuracy.png)"]
