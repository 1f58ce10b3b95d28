"""Ways to make a feed-forward block smaller: what all of them share."""

import abc
import dataclasses
import warnings
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from snnk_jax import ridge
from snnk_jax.compression._blocks import Block
from snnk_jax.compression._gather import Task


@dataclasses.dataclass(frozen=True)
class Site:
    """What a method sees of the block it replaces.

    Attributes:
      task: the block in its model, with the data.
      first: the Linear before the activation.
      second: the one behind it.
      l2: penalty of a fit, None for that of least GCV.
      key: for what is random.
    """

    task: Task
    first: nnx.Linear
    second: nnx.Linear
    l2: float | None
    key: jax.Array

    @property
    def block(self) -> Block:
        """Names and sizes."""
        return self.task.block

    @property
    def judged(self) -> slice:
        """Columns of the targets by which choices are made."""
        return self.task.judged


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a method made of a block.

    Attributes:
      modules: replacements by path.
      solution: of the ridge regression, None where nothing was fitted.
      readout: the matrix in the block, where it is not that of the solution.
    """

    modules: dict[str, Any]
    solution: ridge.RidgeSolution | None = None
    readout: np.ndarray | None = None


class Method(abc.ABC):
    """Makes a block of a size; the size is a number of units, features or ranks.

    Attributes:
      least: the smallest size there is.
    """

    least: ClassVar[int] = 1

    @abc.abstractmethod
    def cost(self, block: Block, size: int) -> tuple[int, int]:
        """Stored numbers, in units of a float32, and FLOPs a token."""

    @abc.abstractmethod
    def largest(self, block: Block) -> int:
        """The size from which on nothing is left to gain."""

    @abc.abstractmethod
    def fit(self, site: Site, size: int) -> Fit:
        """Makes the replacement."""

    def size_for(self, block: Block, budget: float, what: str) -> int:
        """The largest size that costs at most ``budget`` numbers or FLOPs.

        Raises:
          ValueError: if the least size costs more.
        """
        index = 0 if what == "parameters" else 1
        low, high = self.least, self.largest(block)
        if self.cost(block, low)[index] > budget:
            raise ValueError(
                f"budget must leave {type(self).__name__} at least "
                f"{self.cost(block, low)[index]} {what} for {block.name}. "
                f"Got {budget:.0f}."
            )
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.cost(block, middle)[index] <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def hidden(x: Any, h: Any) -> Any:
    """The units."""
    return h


def inputs(x: Any, h: Any) -> Any:
    """The inputs."""
    return x


def need_whole(block: Block, method: Method) -> None:
    """Raises ValueError for a block in whose place no other module may stand."""
    if not block.whole:
        raise ValueError(
            f"{block.name} must do nothing but Linear, activation, Linear to be "
            f"replaced by {type(method).__name__}. Got a module that does more."
        )


def targets(stats: ridge.RidgeStats, judged: slice) -> ridge.RidgeStats:
    """Statistics of some of the targets."""
    shift = stats.y_shift
    return stats._replace(
        cross=ridge.Total(*(part[:, judged] for part in stats.cross)),
        y_sum=ridge.Total(*(part[judged] for part in stats.y_sum)),
        y_square=ridge.Total(*(part[judged] for part in stats.y_square)),
        y_shift=None if shift is None else shift[judged],
    )


def solve(
    stats: ridge.RidgeStats, l2: float | None, judged: slice
) -> ridge.RidgeSolution:
    """The readout, at the penalty of least GCV in the metric."""
    with warnings.catch_warnings():
        # It warns of the coefficients' digits; here only predictions count.
        warnings.simplefilter("ignore", ridge.PrecisionWarning)
        if l2 is None:
            l2 = ridge.select_l2(targets(stats, judged)).l2
        return ridge.solve(stats, l2)


def values(solution: ridge.RidgeSolution, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Readout and bias of the plain targets."""
    kernel, bias = np.asarray(solution.kernel), np.asarray(solution.bias)
    return kernel[:, :out], bias[:out]
