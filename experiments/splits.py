"""What a data set is: splits with random access, and how subsets are cut from them.

A split is anything with ``len()`` and ``__getitems__(indices)`` returning
``{"image": uint8[n, h, w, c], "label": int32[n]}``, or tokens in place of images.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]


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
