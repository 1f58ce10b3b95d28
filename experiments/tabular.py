"""Tables of the UCI repository with the splits that papers report on."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

REGRESSION = (
    "bostonHousing",
    "concrete",
    "energy",
    "kin8nm",
    "naval-propulsion-plant",
    "power-plant",
    "protein-tertiary-structure",
    "wine-quality-red",
    "yacht",
)


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows to fit and rows to judge on."""

    fit: np.ndarray
    judge: np.ndarray


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of features and targets.

    Attributes:
      name: of the set.
      x: ``[n, d]``, float64.
      y: ``[n, 1]`` real targets, or ``[n]`` class numbers.
      classes: number of classes; 0 for regression.
      splits: the test splits.
      tune: the split for hyper-parameters; None: cut one from each training part.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    classes: int
    splits: tuple[Split, ...]
    tune: Split | None = None


def regression_tables(directory: str, names: Sequence[str] = REGRESSION) -> list[Table]:
    """The nine sets of the MC-dropout papers with their 20 splits (protein: 5).

    Without a folder the one set that needs no file: scikit-learn's diabetes, 20 splits
    of 10 % drawn here.

    Args:
      directory: folder of ``uci_reg_gal.npz``, or "".
      names: sets.

    Raises:
      FileNotFoundError: if the file is not there; says what to do.
      ValueError: for a name that the file does not hold.
    """
    if not directory:
        from sklearn.datasets import load_diabetes

        diabetes: Any = load_diabetes()
        rng = np.random.default_rng(0)
        count = len(diabetes.target)
        masks = [rng.permutation(count) < count // 10 for _ in range(20)]
        return [_table("diabetes", diabetes.data, diabetes.target, masks)]
    tables = []
    with _open(directory, "uci_reg_gal.npz") as data:
        for name in names:
            if f"{name}/X" not in data:
                known = sorted(key[:-2] for key in data if key.endswith("/X"))
                raise ValueError(
                    f"config.sets must be among {', '.join(known)}. Got {name!r}."
                )
            x, y = data[f"{name}/X"], data[f"{name}/y"]
            masks = np.unpackbits(
                data[f"{name}/test_mask_packed"], axis=1, count=len(x)
            )
            tables.append(_table(name, x, y, masks.astype(bool)))
    return tables


def _table(name: str, x: np.ndarray, y: np.ndarray, tests: Any) -> Table:
    splits = tuple(Split(_rows(~test), _rows(test)) for test in tests)
    return Table(name, x, y[:, None], 0, splits)


def classification_tables(directory: str, names: Sequence[str] = ()) -> list[Table]:
    """The UCI classification sets of the NTK papers, with their splits.

    Sets with a test file of their own have that one split, the others four of 75/25.

    Args:
      directory: folder of ``uci121.npz``.
      names: sets; () takes all of the file.

    Raises:
      FileNotFoundError: if the file is not there; says what to do.
      ValueError: for a name that the file does not hold.
    """
    with _open(directory, "uci121.npz") as data:
        known = sorted(key[: -len("/hp_val")] for key in data if key.endswith("hp_val"))
        tables = []
        for name in names or known:
            if name not in known:
                raise ValueError(
                    f"config.sets must be among {', '.join(known)}. Got {name!r}."
                )
            x, y = data[f"{name}/X"], data[f"{name}/y"]
            validation = data[f"{name}/hp_val"]
            tune = Split(_rows(~validation), _rows(validation))
            if f"{name}/X_test" in data:
                rows = np.arange(len(x))
                x = np.concatenate([x, data[f"{name}/X_test"]])
                y = np.concatenate([y, data[f"{name}/y_test"]])
                splits = (Split(rows, np.arange(len(rows), len(x))),)
            else:
                tests = data[f"{name}/test4"]
                splits = tuple(Split(_rows(~test), _rows(test)) for test in tests)
            y = y.astype(np.int32)
            classes = int(y.max()) + 1
            table = Table(name, x.astype(np.float64), y, classes, splits, tune)
            tables.append(table)
    return tables


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """All by the mean and the spread of the first; constant columns become zero."""
    mean, spread = train.mean(axis=0), train.std(axis=0)
    # A spread of rounding errors is none.
    constant = spread <= 1e-10 * np.maximum(np.abs(mean), 1)
    scale = np.where(constant, 0, 1 / np.where(constant, 1, spread))
    return [(part - mean) * scale for part in (train, *others)]


def _rows(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(mask)


def _open(directory: str, filename: str) -> Any:
    path = pathlib.Path(directory) / filename
    if not directory or not path.is_file():
        raise FileNotFoundError(
            f"data.dir must be a folder that holds {filename}. Got {directory!r}. "
            "Pass it with --config.data.dir=FOLDER."
        )
    return np.load(path, allow_pickle=False)
