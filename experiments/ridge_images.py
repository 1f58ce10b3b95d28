"""Fully bundled networks on images: frozen random features, readout in closed form."""

import dataclasses
import functools
import itertools
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import plots
from experiments.data import mnist_arrays
from experiments.report import markdown
from snnk_jax import infinite, ridge
from snnk_jax.features import ArcCosine, Chain, FeatureMap
from snnk_jax.typing import Array, Float, Params, PRNGKeyArray

TITLES = {
    "relu": "ReLU, one layer",
    "relu_relu": "ReLU, two layers",
    "patches": "ReLU patches, pooled",
}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images ``uint8[n, h, w]`` and labels of a training and a test part."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def classes(self) -> int:
        return int(self.y_train.max()) + 1


def load_images(name: str, directory: str) -> Images:
    """MNIST from a folder, or scikit-learn's digits, the last 450 rows for the test.

    Raises:
      FileNotFoundError: for MNIST without its files; says what to pass.
    """
    if name == "mnist":
        return Images(*mnist_arrays(directory))
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    x, y = digits.images.astype(np.uint8), digits.target.astype(np.int32)
    # The rows follow the writers: the test writers are not in the training part.
    return Images(x[:-450], y[:-450], x[-450:], y[-450:])


@dataclasses.dataclass(frozen=True)
class PatchFeatures:
    r"""Features of all patches of an image, averaged over a grid of cells.

    .. math::
      \Phi(x) = \tfrac{1}{c} \left[\operatorname{mean}_{p \in \text{cell}}
        \varphi(x_p / s, b)\right]_{\text{cell} = 1 \dots c^2},

    with :math:`x_p` the s x s patch at position p, b a constant coordinate and
    :math:`\varphi` any feature map. Every image stands for itself, nothing is learned:
    a frozen convolution. Coates, Lee and Ng, "An Analysis of Single-Layer Networks in
    Unsupervised Feature Learning", AISTATS 2011.

    Args:
      features: the map of a patch.
      shape: height and width of the images.
      size: s.
      cells: c, cells along each side.
      bias: b.
    """

    features: FeatureMap
    shape: tuple[int, int]
    size: int = 7
    cells: int = 4
    bias: float = 1.0

    @property
    def num_features(self) -> int:
        return self.cells**2 * self.features.num_features

    def init(self, key: PRNGKeyArray) -> Params:
        """Draws the parameters of the map of a patch."""
        return self.features.init(key, self.size**2 + 1)

    def phi(self, params: Params, x: Float[Array, "n p"]) -> Float[Array, "n m"]:
        """Maps images, flattened, to features."""
        return jax.lax.map(functools.partial(self._one, params), x, batch_size=128)

    def _one(self, params: Params, image: Array) -> Array:
        patches = jax.lax.conv_general_dilated_patches(
            image.reshape(1, *self.shape, 1),
            (self.size, self.size),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]
        ones = jnp.full((*patches.shape[:2], 1), self.bias, patches.dtype)
        inputs = jnp.concatenate([patches / self.size, ones], axis=-1)
        phi = self.features.phi(params, inputs)
        for axis in (0, 1):
            # Bounds of cells as equal as they can be; every patch is in one.
            length = phi.shape[axis]
            bounds = [i * length // self.cells for i in range(self.cells + 1)]
            parts = [
                jax.lax.slice_in_dim(phi, a, b, axis=axis).mean(axis, keepdims=True)
                for a, b in itertools.pairwise(bounds)
            ]
            phi = jnp.concatenate(parts, axis=axis)
        return phi.reshape(-1) / self.cells


def prepared(x: Any, mean: np.ndarray | Array, scale: Any, unit: bool = False) -> Array:
    """Flat images, centred and scaled, or each as it is but of norm one."""
    flat = jnp.asarray(x).reshape(len(x), -1).astype(jnp.float32)
    if unit:
        norm = jnp.linalg.norm(flat, axis=1, keepdims=True)
        return flat / jnp.maximum(norm, 1.0)  # an empty image stays zero
    return (flat - mean[None]) * scale


@dataclasses.dataclass(frozen=True)
class OfPixels:
    """A feature map of flattened images that are :func:`prepared` first."""

    features: Any
    unit: bool = False

    def phi(self, params: Params, mean: Array, scale: Array, x: Array) -> Array:
        """Maps raw images ``[n, h, w]`` to features."""
        return self.features.phi(params, prepared(x, mean, scale, self.unit))


def pixel_scale(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel's mean, and one over the root mean square norm around it."""
    x = images.x_train.reshape(len(images.x_train), -1).astype(np.float32)
    mean = x.mean(axis=0)
    return mean, 1 / np.sqrt(np.mean(np.sum((x - mean) ** 2, axis=1)))


def relu_network(depth: int) -> infinite.Layer:
    """``depth`` dense ReLU layers that keep the norm, and a dense one."""
    layers: list[infinite.Layer] = []
    for _ in range(depth):
        layers += [infinite.Dense(w_std=2**0.5), infinite.Activation("relu")]
    return infinite.serial(*layers, infinite.Dense())


def make_map(
    name: str, num_features: int, images: Images, config: Any, seed: int
) -> tuple[Callable[[Any], Array], int]:
    """The features of raw images by name, and the number of frozen parameters.

    The training images give the centre and the scale: each pixel's mean and the root
    mean square norm; for patches, the mean and the spread over all pixels. Neural
    tangent kernels may have images of norm one instead.
    """
    mean, scale = pixel_scale(images)
    key = jax.random.key(seed)
    unit = name in ("ntk", "landmarks") and config.pixels == "unit"
    if name == "ntk":
        width = min(config.width, num_features)
        features = relu_network(config.depth).features(num_features, width=width)
        params = features.init(key, mean.shape)
    elif name == "landmarks":
        features = infinite.LandmarkFeatures(net=relu_network(config.depth))
        x = prepared(images.x_train, mean, scale, unit)
        params = features.init(_centres(x, num_features, seed))
    elif name == "patches":
        x = images.x_train.reshape(len(images.x_train), -1).astype(np.float32)
        mean[:] = mean.mean()
        scale = 1 / np.sqrt(np.mean((x - mean) ** 2))
        cells = config.patches.cells
        features = PatchFeatures(
            ArcCosine(num_features=num_features // cells**2),
            images.x_train.shape[1:],
            **config.patches,
        )
        params = features.init(key)
    else:
        last = ArcCosine(num_features=num_features)
        features = Chain((last, last)) if name == "relu_relu" else last
        params = features.init(key, len(mean))
    phi = OfPixels(features, unit).phi
    frozen = sum(leaf.size for leaf in jax.tree.leaves(params))
    return functools.partial(phi, params, jnp.asarray(mean), jnp.asarray(scale)), frozen


def _centres(x: Array, size: int, seed: int) -> Array:
    """Centres of k-means, near to converged."""
    from sklearn.cluster import KMeans

    rows = np.asarray(x)
    start: Any = rows[np.random.default_rng(seed).choice(len(x), size, replace=False)]
    means = KMeans(size, init=start, max_iter=6).fit(rows)
    return jnp.asarray(means.cluster_centers_)


@dataclasses.dataclass(frozen=True)
class Job:
    """One map at one number of features and one seed."""

    map: str
    num_features: int
    seed: int
    fixed_l2: float = 0.0

    @property
    def name(self) -> str:
        rule = f"l2 {self.fixed_l2:g}" if self.fixed_l2 else "l2 selected"
        return f"{self.map} | {self.num_features} | seed {self.seed} | {rule}"


def jobs(config: Any) -> Iterator[Job]:
    """All jobs of a config, in the order of the report."""
    for name, sizes in config.maps.items():
        for num_features in sizes:
            for seed in config.seeds:
                yield Job(name, num_features, seed)
                if config.fixed_l2:
                    yield Job(name, num_features, seed, config.fixed_l2)


def measure(job: Job, images: Images, config: Any) -> dict[str, Any]:
    """Accuracy and seconds of a job, from raw images to the last prediction."""
    start = time.perf_counter()
    phi, frozen = make_map(job.map, job.num_features, images, config, job.seed)
    fit, held_out = _cut(len(images.y_train), config, job.seed)
    train = _statistics(phi, job.num_features, images, fit, config)
    rest = _statistics(phi, job.num_features, images, held_out, config)
    jax.block_until_ready((train, rest))
    gathered = time.perf_counter()
    with warnings.catch_warnings():
        # The condition number is in the row; only predictions are judged here.
        warnings.simplefilter("ignore", ridge.PrecisionWarning)
        if job.fixed_l2:
            solution = ridge.solve(ridge.merge(train, rest), job.fixed_l2)
        elif config.criterion == "gcv":
            solution = ridge.select_l2(ridge.merge(train, rest)).solution
        else:
            l2 = _validated(job, images, config, train, rest)
            solution = ridge.solve(ridge.merge(train, rest), l2)
    solved = time.perf_counter()
    correct = _predict(phi, solution, images.x_test) == images.y_test
    return {
        **dataclasses.asdict(job),
        "accuracy": float(np.mean(correct)),
        "l2": solution.l2,
        "condition": solution.condition,
        "trained": job.num_features * images.classes + images.classes,
        "frozen": frozen,
        "rows": len(images.y_train),
        "statistics_s": gathered - start,
        "solve_s": solved - gathered,
        "seconds": time.perf_counter() - start,
    }


def _validated(
    job: Job,
    images: Images,
    config: Any,
    train: ridge.RidgeStats,
    rest: ridge.RidgeStats,
) -> float:
    """The penalty that does best on the rows held out.

    Wide maps take that of the same map with fewer features: features keep their norm
    whatever their number, and a factorisation for each penalty would take longer than
    everything else.
    """
    if job.num_features > config.select_features:
        width = config.select_features
        phi, _ = make_map(job.map, width, images, config, job.seed)
        fit, held_out = _cut(len(images.y_train), config, job.seed)
        train = _statistics(phi, width, images, fit, config)
        rest = _statistics(phi, width, images, held_out, config)
    return ridge.select_l2(train, criterion="validation", validation=rest).l2


def _cut(rows: int, config: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(rows)
    held_out = round(rows * config.val_fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _statistics(
    phi: Callable, num_features: int, images: Images, rows: np.ndarray, config: Any
) -> ridge.RidgeStats:
    """Targets are 1 for the class and -1 for the others."""
    labels = images.y_train[rows, None] == np.arange(images.classes)[None]
    targets = np.where(labels, 1, -1).astype(np.float32)
    return ridge.update_chunks(
        ridge.init(num_features, images.classes),
        jnp.asarray(images.x_train[rows]),
        jnp.asarray(targets),
        phi=phi,
        chunk_size=config.chunk_size,
    )


def _predict(phi: Callable, solution: ridge.RidgeSolution, x: np.ndarray) -> np.ndarray:
    @jax.jit
    def scores(x: Array) -> Array:
        return phi(x) @ solution.kernel + solution.bias[None]

    parts = np.array_split(x, -(-len(x) // 2000))
    return np.concatenate([np.argmax(scores(part), axis=1) for part in parts])


def report(
    workdir: pathlib.Path, rows: Sequence[dict[str, Any]], config: Any
) -> list[str]:
    """The parts of the report; the plot is written on the way."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["map"], row["num_features"], row["fixed_l2"])
        groups.setdefault(key, []).append(row)
    header = ["map", "m", "accuracy, %", "range", "l2", "trained", "frozen"]
    lines = [[*header, "condition", "statistics, s", "solve, s", "seconds"]]
    curves: dict[str, list[tuple[float, float]]] = {}
    for (name, num_features, fixed), found in groups.items():
        accuracies = [100 * row["accuracy"] for row in found]
        mean = float(np.mean(accuracies))
        title = TITLES[name] + (f", l2 = {fixed:g}" if fixed else "")
        curves.setdefault(title, []).append((num_features, mean))
        spread = f"{min(accuracies):.2f} to {max(accuracies):.2f}"
        times = (
            f"{np.mean([row[key] for row in found]):.1f}"
            for key in ("statistics_s", "solve_s", "seconds")
        )
        lines.append(
            [
                title,
                f"{num_features:,}",
                f"{mean:.2f}",
                spread if len(found) > 1 else "1 seed",
                f"{np.median([row['l2'] for row in found]):.1e}",
                f"{found[0]['trained']:,}",
                f"{found[0]['frozen']:,}",
                f"{np.median([row['condition'] for row in found]):.0e}",
                *times,
            ]
        )
    train = rows[0]["rows"]
    mark = float(train) if max(row["num_features"] for row in rows) >= train else None
    plots.accuracy_curves(
        workdir / "accuracy.png",
        {f"{config.data.name}, {train:,} training images": curves},
        "features m" + (", dashed: as many as images" if mark else ""),
        "test accuracy, %",
        mark,
    )
    tests = (
        f"{config.data.name}: {train:,} training images, {len(config.seeds)} seed(s)."
    )
    return [tests, markdown(lines, left=1), "![accuracy](accuracy.png)"]
