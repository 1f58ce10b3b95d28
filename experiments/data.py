"""Image data sets by name: from scikit-learn, from files, and through TFDS."""

import dataclasses
import gzip
import io
import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.splits import ArraySplit, Batch, Dataset, Split, cut

NUM_CLASSES = {
    **{"digits": 10, "cifar10_jpeg": 10, "tinyimagenet32": 200, "flowers5": 5},
    "synthetic": 10,
}
"""Classes of each data set, known without reading it."""


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
