"""Batches whose position is the step number.

:class:`TrainLoader` maps a step to a batch by a seeded permutation of each epoch, so
resuming needs no stored iterator, and every number of processes sees the same global
batches.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from experiments.splits import Batch, Split


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
