"""Features of convolutional neural tangent kernels against the exact kernels."""

import functools
import pathlib
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import snnk_jax as snnk
from experiments import data as data_lib
from experiments import plots
from experiments.jobs import Job, run_study
from experiments.report import markdown
from experiments.splits import Dataset
from snnk_jax import ridge
from snnk_jax.typing import Array

# Letters: convolution with activation, pool of 2 x 2, global pool.
NETS = {"myrtle5": "aapapaG", "myrtle7": "aaapaapaG"}
W_STD = 2**0.5


def network(name: str) -> snnk.infinite.Layer:
    """A network by name: 3 x 3 convolutions with ReLU, pools, and a dense layer."""
    layers: list[snnk.infinite.Layer] = []
    for letter in NETS[name]:
        if letter == "a":
            layers.append(snnk.infinite.Conv((3, 3), w_std=W_STD))
            layers.append(snnk.infinite.Activation("relu"))
        elif letter == "p":
            layers.append(snnk.infinite.AvgPool((2, 2)))
        else:
            layers.append(snnk.infinite.GlobalAvgPool())
    return snnk.infinite.serial(*layers, snnk.infinite.Dense(W_STD))


class Images:
    """Whitened images, decoded and fitted when they are first asked for."""

    def __init__(self, config: Any):
        self._config = config

    @functools.cached_property
    def _raw(self) -> Dataset:
        options = self._config.data
        return data_lib.load(
            options.name,
            image_size=options.image_size,
            directory=options.dir,
            val_fraction=0.01,  # a split that is joined again below
        )

    @functools.cached_property
    def _raw_train(self) -> tuple[np.ndarray, np.ndarray]:
        parts = [_all(self._raw.train), _all(self._raw.val)]
        x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return x, y

    @functools.cached_property
    def _whitening(self) -> tuple[Array, Array]:
        return _fit_whitening(jnp.asarray(self._raw_train[0]), self._config.zca)

    @functools.cached_property
    def train(self) -> tuple[np.ndarray, np.ndarray]:
        """Training images ``float32[n, h, w, 3]`` in random order, and labels."""
        x, y = self._raw_train
        order = np.random.default_rng(self._config.seed).permutation(len(y))
        return _whiten(x[order], *self._whitening), y[order]

    @functools.cached_property
    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """Test images, as the training images, and labels."""
        x, y = _all(self._raw.test)
        size = self._config.accuracy.test_images or len(y)
        return _whiten(x[:size], *self._whitening), y[:size]

    @property
    def classes(self) -> int:
        return self._raw.num_classes


def _all(split: Any) -> tuple[np.ndarray, np.ndarray]:
    batch = split.__getitems__(np.arange(len(split)))
    return batch["image"], batch["label"]


@jax.jit
def _standardised(x: Array) -> Array:
    """Each image flat, of mean zero and mean square one."""
    x = x.reshape(len(x), -1).astype(jnp.float32)
    x = x - jnp.mean(x, axis=1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-6)


def _fit_whitening(x: Array, share: float) -> tuple[Array, Array]:
    """Mean and symmetric whitening matrix of the pixels of training images."""
    x = _standardised(x)
    mean = jnp.mean(x, axis=0)
    if not share:
        return mean, jnp.eye(x.shape[1])
    x = x - mean[None]
    values, vectors = jnp.linalg.eigh(jnp.matmul(x.T, x, precision="highest") / len(x))
    values = jnp.maximum(values, 0)
    scale = jax.lax.rsqrt(values + share * jnp.mean(values))
    return mean, jnp.matmul(vectors * scale[None], vectors.T, precision="highest")


def _whiten(x: np.ndarray, mean: Array, matrix: Array) -> np.ndarray:
    flat = _standardised(jnp.asarray(x)) - mean[None]
    flat = _standardised(jnp.matmul(flat, matrix, precision="highest"))
    return np.asarray(flat).reshape(x.shape)


def _features(net: str, num_features: int, config: Any) -> Any:
    return network(net).features(
        num_features=num_features,
        width=tuple(config.width) or 0,
        batch_size=config.batch_size,
    )


def make_features(net: str, num_features: int, config: Any, seed: int) -> Any:
    """The map of images to features."""
    features = _features(net, num_features, config)
    size = config.data.image_size
    params = features.init(jax.random.key(seed), (size, size, 3))
    return functools.partial(features.phi, params)


def measure_error(
    images: Images, net: str, num_features: int, seed: int, config: Any
) -> dict[str, Any]:
    """Errors of the kernel on a block of training images, relative and centred."""
    x = images.train[0][: config.exact.error_images]
    exact = np.asarray(_exact(net, jnp.asarray(x)), np.float64)
    phi = _phi_of(x, make_features(net, num_features, config, seed), config)
    phi = phi.astype(np.float64)
    error = phi @ phi.T - exact
    return {
        "study": "error",
        "net": net,
        "num_features": num_features,
        "seed": seed,
        "error": _norm(error) / _norm(exact),
        "centred": _norm(_centred(error)) / _norm(_centred(exact)),
    }


@functools.cache
def _exact_fn(net: str) -> Any:
    return functools.partial(network(net).kernel, get="ntk")


def _exact(net: str, x1: Array, x2: Array | None = None) -> Array:
    return jax.block_until_ready(_exact_fn(net)(x1, x2))


def _norm(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix))


def _centred(matrix: np.ndarray) -> np.ndarray:
    matrix = matrix - matrix.mean(axis=0)
    return matrix - matrix.mean(axis=1, keepdims=True)


def measure_exact(images: Images, net: str, config: Any) -> dict[str, Any]:
    """Seconds of a pair of images in the exact kernel, the best of several blocks."""
    size = config.exact.block
    x = jnp.asarray(images.train[0][: 2 * size])
    _exact(net, x[:size], x[size:])
    seconds = []
    for _ in range(config.exact.blocks):
        start = time.perf_counter()
        _exact(net, x[:size], x[size:])
        seconds.append(time.perf_counter() - start)
    return {"study": "exact", "net": net, "pair_s": min(seconds) / size**2}


def measure_cost(
    images: Images, net: str, num_features: int, count: int, config: Any
) -> dict[str, Any]:
    """Seconds of the features of a number of images, compiled before."""
    phi = make_features(net, num_features, config, config.seed)
    parts = list(_slices(images.train[0][:count], config.slice_size))
    jax.block_until_ready(phi(parts[0][0]))
    start = time.perf_counter()
    for part, _ in parts:
        jax.block_until_ready(phi(part))
    return {
        "study": "cost",
        "net": net,
        "num_features": num_features,
        "images": count,
        "seconds": time.perf_counter() - start,
    }


def _slices(x: np.ndarray, size: int) -> Iterator[tuple[Array, int]]:
    """Slices of one shape, the last filled up, and how many rows count."""
    for start in range(0, len(x), size):
        part = x[start : start + size]
        padding = [(0, size - len(part))] + [(0, 0)] * (x.ndim - 1)
        yield jnp.asarray(np.pad(part, padding)), len(part)


def _phi_of(x: np.ndarray, phi: Any, config: Any) -> np.ndarray:
    parts = _slices(x, config.slice_size)
    return np.concatenate([np.asarray(phi(part))[:n] for part, n in parts])


def measure_accuracy(
    images: Images, net: str, num_features: int, config: Any
) -> dict[str, Any]:
    """Accuracy against the number of training images, in one pass over them."""
    options = config.accuracy
    begin = time.perf_counter()

    def say(text: str) -> None:
        seconds = time.perf_counter() - begin
        print(f"[{seconds:6.1f} s] {net} {num_features}: {text}", flush=True)

    x, y = images.train
    x_test, y_test = images.test
    say(f"{len(y)} training and {len(y_test)} test images whitened")
    cut = len(y) - options.held_out
    counts = sorted({min(n, cut) if n else cut for n in options.images})
    phi = jax.block_until_ready(make_features(net, num_features, config, config.seed))
    say("features drawn")
    gathered = functools.partial(
        _gather, phi, num_features, images.classes, config.slice_size, say
    )
    start = time.perf_counter()
    held_out = gathered(x[cut:], y[cut:], "held out")
    tested = _phi_of(x_test, phi, config)
    say(f"features of {len(y_test)} test images")
    stats, done, curve = None, 0, []
    spent = time.perf_counter() - start
    for count in counts:
        start = time.perf_counter()
        more = gathered(x[done:count], y[done:count], f"up to {count}")
        stats = more if stats is None else ridge.merge(stats, more)
        done = count
        spent += time.perf_counter() - start
        with warnings.catch_warnings():
            # Only predictions are judged here.
            warnings.simplefilter("ignore", ridge.PrecisionWarning)
            square = float(np.mean(np.sum(tested[:256] ** 2, axis=1)))
            path = ridge.select_l2(
                stats,
                square * np.asarray(options.l2s),
                criterion="validation",
                validation=held_out,
            )
            solution = path.solution
            rows = count
            if count == cut:
                rows = len(y)
                solution = ridge.solve(ridge.merge(stats, held_out), path.l2)
        scores = tested @ np.asarray(solution.kernel) + np.asarray(solution.bias)
        accuracy = float(np.mean(np.argmax(scores, axis=1) == y_test))
        say(f"{rows} images, l2 {path.l2 / square:.0e}: {100 * accuracy:.2f} %")
        curve.append({"images": rows, "accuracy": accuracy, "l2": path.l2 / square})
    return {
        "study": "accuracy",
        "net": net,
        "num_features": num_features,
        "curve": curve,
        "features_s": spent,
        "seconds": time.perf_counter() - begin,
    }


def _gather(
    phi: Any,
    num_features: int,
    classes: int,
    size: int,
    say: Any,
    x: np.ndarray,
    y: np.ndarray,
    label: str,
) -> ridge.RidgeStats:
    """Statistics of images, a slice of features at a time. Targets are 1 and -1."""
    stats = ridge.init(num_features, classes)
    targets = np.where(y[:, None] == np.arange(classes)[None], 1, -1)
    seen = 0
    for (part, n), (target, _) in zip(
        _slices(x, size), _slices(targets.astype(np.float32), size), strict=True
    ):
        weights = (np.arange(len(part)) < n).astype(np.float32)
        stats = ridge.update_chunks(
            stats, phi(part), target, jnp.asarray(weights), chunk_size=1024
        )
        jax.block_until_ready(stats)
        seen += n
        say(f"{label}: {seen} of {len(y)} images")
    return stats


def _jobs(config: Any) -> Iterable[Job]:
    images = Images(config)
    accuracy, error = config.accuracy.num_features, config.error.num_features
    for net in config.nets:
        for m in accuracy:
            call = functools.partial(measure_accuracy, images, net, m, config)
            yield f"accuracy | {net} | {m}", call
        call = functools.partial(measure_exact, images, net, config)
        yield f"exact | {net}", call
        for m in error:
            for seed in config.error.seeds:
                call = functools.partial(measure_error, images, net, m, seed, config)
                yield f"error | {net} | {m} | seed {seed}", call
            for count in config.cost.images:
                call = functools.partial(measure_cost, images, net, m, count, config)
                yield f"cost | {net} | {m} | {count}", call


def run(
    config: Any, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Measures every job and writes the report; finished jobs are not repeated.

    Args:
      config: a config of ``configs/cntk_cifar10.py``.
      workdir: folder of ``rows.jsonl``, ``report.md`` and the plot.
      command: shown in the report.

    Returns:
      The rows of the report.

    Raises:
      FileNotFoundError: without the data; says what to pass.
    """
    check(config)
    return run_study(
        config,
        workdir,
        command,
        _jobs(config),
        functools.partial(report, config=config),
    )


def report(workdir: pathlib.Path, rows: list[dict[str, Any]], config: Any) -> list[str]:
    """The parts of the report; the plot is written on the way."""

    def of(study: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["study"] == study]

    lines = [
        ["net", "features", "images", "accuracy, %", "l2", "features, s", "all, s"]
    ]
    curves: dict[str, dict[str, Any]] = {}
    for row in of("accuracy"):
        panel = curves.setdefault(row["net"], {})
        panel[f"{row['num_features']:,} features"] = [
            (point["images"], 100 * point["accuracy"]) for point in row["curve"]
        ]
        for point in row["curve"]:
            lines.append(
                [
                    row["net"],
                    f"{row['num_features']:,}",
                    f"{point['images']:,}",
                    f"{100 * point['accuracy']:.2f}",
                    f"{point['l2']:.0e}",
                    f"{row['features_s']:.1f}",
                    f"{row['seconds']:.1f}",
                ]
            )
    name = workdir / "accuracy.png"
    plots.accuracy_curves(name, curves, "training images", "test accuracy, %")
    errors = [["net", "features", "error, %", "of the centred kernel, %", "seeds"]]
    for net in config.nets:
        for m in config.error.num_features:
            found = [
                row
                for row in of("error")
                if (row["net"], row["num_features"]) == (net, m)
            ]
            means = (
                np.mean([row[key] for row in found]) for key in ("error", "centred")
            )
            cells = (f"{100 * mean:.2f}" for mean in means)
            errors.append([net, f"{m:,}", *cells, str(len(found))])
    n = config.cost.extrapolate
    pairs = n * (n + 1) // 2
    header = ["net", "features", "images", "seconds", "ms an image"]
    costs = [[*header, f"exact at {n:,}, s (extrapolated)", f"speed-up at {n:,}"]]
    pair_s = {row["net"]: row["pair_s"] for row in of("exact")}
    for row in of("cost"):
        each = row["seconds"] / row["images"]
        exact = pairs * pair_s[row["net"]]
        costs.append(
            [
                row["net"],
                f"{row['num_features']:,}",
                f"{row['images']:,}",
                f"{row['seconds']:.2f}",
                f"{1000 * each:.1f}",
                f"{exact:,.0f}",
                f"{exact / (each * n):,.0f}",
            ]
        )
    blocks = ", ".join(f"{net} {1000 * s:.2f} ms" for net, s in pair_s.items())
    return [
        "Accuracy of ridge regression on the test images; the penalty, a share of the "
        "mean square of a feature vector, is chosen on held-out training images.",
        markdown(lines, left=1),
        "![accuracy](accuracy.png)",
        "Frobenius norm of the error over that of the exact kernel, on a block of "
        f"{config.exact.error_images} images.",
        markdown(errors, left=1),
        f"A pair of images of the exact kernel, measured in blocks of "
        f"{config.exact.block} x {config.exact.block}: {blocks}. The seconds at "
        f"{n:,} images are extrapolated to the {pairs:,} pairs of one triangle.",
        markdown(costs, left=1),
    ]


def check(config: Any) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    for net in config.nets:
        if net not in NETS:
            raise ValueError(
                f"config.nets must be among {', '.join(NETS)}. Got {net!r}."
            )
    sizes = ("synthetic", "cifar10_jpeg")
    if config.data.name not in sizes:
        raise ValueError(
            f"config.data.name must be among {', '.join(sizes)}. "
            f"Got {config.data.name!r}."
        )
    if config.data.image_size % 4:
        raise ValueError(
            "config.data.image_size must be a multiple of 4, for two pools. "
            f"Got {config.data.image_size}."
        )
    positive = {
        "exact.error_images": config.exact.error_images,
        "exact.block": config.exact.block,
        "exact.blocks": config.exact.blocks,
        "cost.extrapolate": config.cost.extrapolate,
        "accuracy.held_out": config.accuracy.held_out,
        "slice_size": config.slice_size,
        **{f"cost.images[{i}]": n for i, n in enumerate(config.cost.images)},
        **{f"accuracy.l2s[{i}]": l2 for i, l2 in enumerate(config.accuracy.l2s)},
    }
    for key, value in positive.items():
        if not value > 0:
            raise ValueError(f"config.{key} must be positive. Got {value}.")
    lists = (config.nets, config.error.seeds, config.accuracy.images)
    if not all(map(len, lists)):
        raise ValueError(
            "config.nets, error.seeds and accuracy.images must not be empty. "
            f"Got {lists}."
        )
    if config.zca < 0:
        raise ValueError(f"config.zca must not be negative. Got {config.zca}.")
    features = (*config.error.num_features, *config.accuracy.num_features)
    if not features or min(features) < 1:
        raise ValueError(
            f"config.error and accuracy must name numbers of features. Got {features}."
        )
    for net in config.nets:  # widths and the rest, before any device work
        _features(net, features[0], config)
