"""Data sets and a loader whose position is the step number.

A split is anything with ``len()`` and ``__getitems__(indices)`` returning
``{"image": uint8[n, h, w, c], "label": int32[n]}``: the arrays below, or a
``tfds.data_source`` behind :class:`Resized`. :class:`TrainLoader` maps a step to a
batch by a seeded permutation of each epoch, so resuming needs no stored iterator, and
every number of processes sees the same global batches.
"""

import dataclasses
import gzip
import io
import itertools
import math
import pathlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]

NUM_CLASSES = {
    **{"digits": 10, "cifar10_jpeg": 10, "tinyimagenet32": 200, "flowers5": 5},
    "synthetic": 10,
}
"""Classes of each data set, known without reading it."""


class Split(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """Examples held in memory: images ``uint8[n, h, w, c]``, labels ``int32[n]``."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self):
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                "images must be uint8 [n, height, width, channels]. "
                f"Got {self.images.dtype} {self.images.shape}."
            )
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must have shape ({len(self.images)},). "
                f"Got {self.labels.shape}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: np.ndarray) -> Batch:
        return {"image": self.images[indices], "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class Subset:
    """A split restricted to given rows."""

    split: Split
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: np.ndarray) -> Any:
        return self.split.__getitems__(self.rows[indices])


@dataclasses.dataclass(frozen=True)
class Resized:
    """A split whose images become RGB squares of one size when they are read."""

    split: Split
    image_size: int

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: np.ndarray) -> Batch:
        # Ints in a list: tfds takes no arrays.
        examples = self.split.__getitems__([int(index) for index in indices])
        images = [
            _resize(np.asarray(example["image"])[None], self.image_size)[0]
            for example in examples
        ]
        return {
            "image": np.stack([np.broadcast_to(x, (*x.shape[:2], 3)) for x in images]),
            "label": np.asarray([example["label"] for example in examples], np.int32),
        }


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits, the number of classes, and the metric that runs are judged by.

    A regression has one class and labels of a floating dtype; see
    :mod:`experiments.scores` for metrics.
    """

    name: str
    train: Split
    val: Split
    test: Split
    num_classes: int
    metric: str = "accuracy"


def from_float(images: np.ndarray, maximum: float) -> np.ndarray:
    """Quantises float images in [0, maximum] to uint8.

    Raises:
      ValueError: if a value is not finite or out of range.
    """
    if not np.all(np.isfinite(images)):
        count = int(np.size(images) - np.isfinite(images).sum())
        raise ValueError(f"images must be finite. Got {count} non-finite values.")
    if images.min() < 0 or images.max() > maximum:
        raise ValueError(
            f"images must lie in [0, {maximum}]. Got [{images.min()}, {images.max()}]."
        )
    return np.round(images * (255.0 / maximum)).astype(np.uint8)


def load(
    name: str,
    *,
    image_size: int,
    directory: str = "",
    train_size: int = 0,
    val_fraction: float = 0.1,
    test_size: int = 0,
    split_seed: int = 0,
) -> Dataset:
    """Loads a data set by name and cuts a validation part off its training part.

    Args:
      name: ``digits``, ``cifar10_jpeg``, ``tinyimagenet32``, ``flowers5``,
        ``synthetic``, or ``tfds:NAME`` for a prepared array_record data set.
      image_size: side of the square images the model reads; others are resized.
      directory: folder of the sets that are read from disk.
      train_size: examples left for training after the validation cut; 0 keeps all.
      val_fraction: share of the training examples held out for validation; the
        synthetic and tinyimagenet32 sets have a validation split of their own.
      test_size: test examples used; 0 keeps all.
      split_seed: seed of the cut and of the subsets, independent of training seeds.

    Raises:
      ValueError: for an unknown name, or sizes that the data cannot serve.
      FileNotFoundError: if the files are not there; says what to do.
    """
    loader = _LOADERS.get(name)
    if loader is None and name.startswith("tfds:"):
        train, test, num_classes = _tfds(name.removeprefix("tfds:"), directory)
        train, test = Resized(train, image_size), Resized(test, image_size)
        val = None
    elif loader is None:
        choices = ", ".join([*_LOADERS, "tfds:NAME"])
        raise ValueError(f"data.name must be one of {choices}. Got {name!r}.")
    else:
        train, val, test = loader(directory, image_size)
        num_classes = NUM_CLASSES[name]
    return cut(
        Dataset(name, train, train if val is None else val, test, num_classes),
        has_val=val is not None,
        train_size=train_size,
        val_fraction=val_fraction,
        test_size=test_size,
        split_seed=split_seed,
    )


def cut(
    dataset: Dataset,
    *,
    has_val: bool,
    train_size: int,
    val_fraction: float,
    test_size: int,
    split_seed: int = 0,
) -> Dataset:
    """Cuts a validation part off the training part, and takes subsets.

    Args:
      dataset: whole splits.
      has_val: whether its validation split is one of its own; it is taken as it is.
      train_size: see :func:`load`, like the others.
      val_fraction: share of the training examples.
      test_size: test examples.
      split_seed: seed of the cut and of the subsets.

    Raises:
      ValueError: for sizes that the data cannot serve.
    """
    train, val, test = dataset.train, dataset.val, dataset.test
    rng = np.random.default_rng(split_seed)
    order = rng.permutation(len(train))
    if not has_val:
        held_out = round(len(train) * val_fraction)
        if not 0 < held_out < len(train):
            raise ValueError(
                "data.val_fraction must leave examples on both sides. "
                f"Got {val_fraction} of {len(train)} examples."
            )
        val, order = Subset(train, np.sort(order[:held_out])), order[held_out:]
    if train_size > len(order):
        raise ValueError(
            f"data.train_size must be at most {len(order)}. Got {train_size}."
        )
    if test_size > len(test):
        raise ValueError(
            f"data.test_size must be at most {len(test)}. Got {test_size}."
        )
    train = Subset(train, np.sort(order[: train_size or None]))
    if test_size:
        test = Subset(test, np.sort(rng.permutation(len(test))[:test_size]))
    return dataclasses.replace(dataset, train=train, val=val, test=test)


def _digits(directory: str, image_size: int):
    """scikit-learn's 8x8 scans of handwritten digits: 1797 images, 10 classes."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = _resize(from_float(digits.images, 16.0)[..., None], image_size)
    images = np.repeat(images, 3, axis=-1)
    labels = digits.target.astype(np.int32)
    # The rows follow the writers, so a random cut would test on hands seen in
    # training. The last quarter keeps the test writers apart.
    cut = len(labels) - 450
    train = ArraySplit(images[:cut], labels[:cut])
    return train, None, ArraySplit(images[cut:], labels[cut:])


def _cifar10_jpeg(directory: str, image_size: int):
    """CIFAR-10 stored as quality-75 JPEG."""
    data = _npz(directory, "cifar10_q75jpeg.npz")
    train = _decode(data, "train_", image_size)
    return train, None, _decode(data, "test_", image_size)


def _tinyimagenet32(directory: str, image_size: int):
    """Tiny-ImageNet-200 at 32x32.

    Its validation images serve as validation and test, since the labels of its test
    images are not public.
    """
    data = _npz(directory, "tinyimagenet32_q75jpeg.npz")
    val = _decode(data, "val_", image_size)
    return _decode(data, "train_", image_size), val, val


def _flowers5(directory: str, image_size: int):
    """Five kinds of flowers, photographs of 128x128 pixels.

    Of pictures that are there twice the first is kept: a copy would be in training and
    test. A fifth of the rest, drawn with a fixed seed, is the test split.
    """
    data = _npz(directory, "flowers5_128_jpeg.npz")
    first: dict[bytes, int] = {}
    for index, (a, b) in enumerate(itertools.pairwise(data["offsets"])):
        first.setdefault(data["jpeg"][a:b].tobytes(), index)
    images = _decode(data, "", image_size)
    rows = np.random.default_rng(0).permutation(list(first.values()))
    test, train = np.split(rows, [len(rows) // 5])
    return (
        ArraySplit(images.images[train], images.labels[train]),
        None,
        ArraySplit(images.images[test], images.labels[test]),
    )


def _synthetic(directory: str, image_size: int):
    """Ten classes told apart by the colour and the corner of a bright square."""
    rng = np.random.default_rng(0)

    def split(n: int) -> ArraySplit:
        labels = rng.integers(0, 10, n).astype(np.int32)
        images = rng.integers(0, 64, (n, image_size, image_size, 3), np.uint8)
        half = image_size // 2
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label) % 4, 2)
            patch = image[row * half :, column * half :][:half, :half]
            patch[..., int(label) // 4] = 220
        return ArraySplit(images, labels)

    return split(256), split(64), split(64)


_LOADERS: dict[str, Callable] = {
    "digits": _digits,
    "cifar10_jpeg": _cifar10_jpeg,
    "tinyimagenet32": _tinyimagenet32,
    "flowers5": _flowers5,
    "synthetic": _synthetic,
}


def mnist_arrays(
    directory: str | pathlib.Path,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """MNIST from the four gzipped idx files, as they are published.

    Args:
      directory: folder of ``train-images-idx3-ubyte.gz`` and its three companions.

    Returns:
      Training images ``uint8[60000, 28, 28]`` and labels ``int32[60000]``, then the
      10000 of the test split.

    Raises:
      FileNotFoundError: if a file is not there.
      ValueError: if a file is no idx file of bytes, or is cut short.
    """
    arrays = []
    for split in ("train", "t10k"):
        for part in ("images-idx3", "labels-idx1"):
            arrays.append(_idx(pathlib.Path(directory) / f"{split}-{part}-ubyte.gz"))
    x_train, y_train, x_test, y_test = arrays
    return x_train, y_train.astype(np.int32), x_test, y_test.astype(np.int32)


def _idx(path: pathlib.Path) -> np.ndarray:
    """An array of bytes: zero, zero, 8, rank, big-endian sizes, values."""
    if not path.is_file():
        raise FileNotFoundError(
            f"data.dir must be a folder that holds {path.name}. Got "
            f"{str(path.parent)!r}. Pass it with --config.data.dir=FOLDER."
        )
    content = gzip.decompress(path.read_bytes())
    rank = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * rank], ">i4").tolist())
    values = content[4 + 4 * rank :]
    if not rank or len(values) != math.prod(shape):
        raise ValueError(
            f"{path.name} must be a whole idx file of bytes. Got {len(content)} bytes "
            f"that start with {content[:4].hex()}."
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _npz(directory: str, filename: str) -> dict[str, np.ndarray]:
    path = pathlib.Path(directory) / filename
    if not path.is_file():
        raise FileNotFoundError(
            f"data.dir must be a folder that holds {filename}. Got {directory!r}. "
            "Pass it with --config.data.dir=FOLDER."
        )
    with np.load(path, allow_pickle=False) as data:
        return dict(data)


def _decode(data: dict[str, np.ndarray], prefix: str, image_size: int) -> ArraySplit:
    from PIL import Image

    blob, offsets = data[f"{prefix}jpeg"], data[f"{prefix}offsets"]
    images = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(blob[a:b].tobytes())).convert("RGB"))
            for a, b in itertools.pairwise(offsets)
        ]
    )
    labels = data[f"{prefix}labels"].astype(np.int32)
    return ArraySplit(_resize(images, image_size), labels)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resize of uint8 images to a square."""
    from PIL import Image

    if images.shape[1:3] == (size, size):
        return images
    squeeze = images.shape[-1] == 1
    resized = [
        np.asarray(
            Image.fromarray(image[..., 0] if squeeze else image).resize(
                (size, size), Image.Resampling.BILINEAR
            )
        )
        for image in images
    ]
    out = np.stack(resized)
    return out[..., None] if squeeze else out


def _tfds(name: str, directory: str) -> tuple[Split, Split, int]:
    """A prepared array_record data set, read without TensorFlow."""
    import tensorflow_datasets as tfds

    options: dict[str, Any] = {"download": False}
    if directory:
        options["data_dir"] = directory
    try:
        splits: Any = tfds.data_source(name, split=["train", "test"], **options)
    except Exception as error:
        raise FileNotFoundError(
            f"data.name=tfds:{name} must be prepared as array_record first. Once, on a "
            "machine with a network: pip install '.[prepare]' && python -c "
            f'"import tensorflow_datasets as tfds; tfds.data_source({name!r})". '
            f"Got {type(error).__name__}: {error}"
        ) from error
    train, test = splits
    return train, test, train.dataset_info.features["label"].num_classes


@dataclasses.dataclass(frozen=True)
class TrainLoader:
    """Shuffled training batches as a pure function of the step.

    Args:
      split: the examples.
      batch_size: examples of a global batch.
      seed: seed of the permutations.
      process_index: this process; it gets rows ``[index * k, (index + 1) * k)`` of
        each global batch, ``k = batch_size / process_count``.
      process_count: number of processes.

    Raises:
      ValueError: if the batch cannot be drawn or does not divide evenly.
    """

    split: Split
    batch_size: int
    seed: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if not 0 < self.batch_size <= len(self.split):
            raise ValueError(
                f"batch_size must be in [1, {len(self.split)}], the training "
                f"examples. Got {self.batch_size}."
            )
        if self.batch_size % self.process_count:
            raise ValueError(
                "batch_size must be divisible by the number of processes. "
                f"Got {self.batch_size} and {self.process_count}."
            )

    def indices(self, step: int) -> np.ndarray:
        """Rows of the global batch of a step; epochs follow without a gap."""
        n = len(self.split)
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs, offsets = np.divmod(positions, n)
        rows = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            rng = np.random.default_rng((self.seed, int(epoch)))
            mine = epochs == epoch
            rows[mine] = rng.permutation(n)[offsets[mine]]
        return rows

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of a step."""
        share = self.batch_size // self.process_count
        start = self.process_index * share
        rows = self.indices(step)[start : start + share]
        return self.split.__getitems__(rows)


def eval_batches(
    split: Split, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields every example once; padding of the last batch has ``weight`` 0."""
    share = batch_size // process_count
    for start in range(0, len(split), batch_size):
        positions = start + process_index * share + np.arange(share)
        rows = np.minimum(positions, len(split) - 1)
        batch = split.__getitems__(rows)
        yield batch | {"weight": (positions < len(split)).astype(np.float32)}


def prefetch(
    load: Callable[[int], Any], start: int, stop: int, size: int = 2
) -> Generator[Any]:
    """Yields ``load(start) ... load(stop - 1)``, computed ahead by one thread."""
    results: queue.Queue = queue.Queue(maxsize=size)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return results.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in range(start, stop):
                if stopped.is_set():
                    return
                put((load(step), None))
        except BaseException as error:  # handed to the consumer, not lost
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item, error = results.get()
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        thread.join()
