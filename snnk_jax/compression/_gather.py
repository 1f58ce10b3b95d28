"""Passes over calibration data: the sums from which a block is fitted."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from snnk_jax import ridge
from snnk_jax._files import hash_array, open_safetensors, write_atomic
from snnk_jax.compression._blocks import Block
from snnk_jax.compression._taps import (
    Apply,
    Reader,
    call,
    place,
    rows,
    token_weights,
)

Columns = Callable[[Any, Any], Any]
"""``columns(x, h)``: features of a block's inputs ``[n, d]`` and units ``[n, l]``."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Calibration inputs and how a model reads them.

    Attributes:
      batches: the batches; each pass goes over them anew, in the same order.
      apply: ``apply(model, batch)`` runs a model.
      weights: ``weights(batch)`` gives each token its weight, None gives all one.
      folder: where the sums of passes are kept; None keeps none.
      save_every: batches between two writes.
    """

    batches: Sequence[Any] | Callable[[], Iterable[Any]]
    apply: Apply = call
    weights: Callable[[Any], Any] | None = None
    folder: str | os.PathLike[str] | None = None
    save_every: int = 50

    def __iter__(self) -> Iterator[Any]:
        batches: Any = self.batches
        if callable(batches):
            batches = batches()
        return iter(batches)

    def head(self, count: int) -> "Data":
        """The first batches alone, without a folder."""
        first = functools.partial(itertools.islice, self, count)
        return dataclasses.replace(self, batches=first, folder=None)

    def first(self) -> Any:
        """The first batch.

        Raises:
          ValueError: if there is none.
        """
        batch = next(iter(self), None)
        if batch is None:
            raise ValueError("calibration_inputs must hold batches. Got none.")
        return batch


@dataclasses.dataclass(frozen=True)
class Task:
    r"""One block to be fitted, in a model whose other blocks may be replaced.

    Its target is :math:`T = F(x) + (s^{\text{dense}} - s)`: what it returns at present,
    and with ``corrected`` what its layer's residual sum lacks to the dense model's.

    Attributes:
      model: with this block as it was.
      dense: the model to be compressed.
      block: the block.
      data: the calibration inputs.
      root: a matrix R ``[o, r]``: the error in the metric is that of ``T R``; or None.
      corrected: whether the errors of other blocks are to be made good.
      scales: a factor of each token's weight, per batch; see :func:`sensitivity`.
      label: tells the passes in ``data.folder`` apart, with a hash of the model.
    """

    model: nnx.Module
    dense: nnx.Module
    block: Block
    data: Data
    root: np.ndarray | None
    corrected: bool
    scales: Sequence[Any] | None = None
    label: str = ""

    @property
    def judged(self) -> slice:
        """Columns of the targets by which choices are made: those in the metric."""
        return slice(0 if self.root is None else self.block.out, None)

    def gather(
        self,
        columns: Columns,
        name: str,
        changes: Mapping[str, Any] | None = None,
        *,
        data: Data | None = None,
    ) -> ridge.RidgeStats:
        """Sums of features and targets ``T``, then ``T R``, over all tokens.

        Args:
          columns: the features.
          name: of the pass.
          changes: modules put into the model first; the targets stay what they were.
          data: in place of the task's own.
        """
        data = self.data if data is None else data
        source = self._source if changes is None else self._changed(changes)
        store = _Store.of(self, data, f"{self.label}-{name}", source, columns)
        stats, done = store.load()
        for index, batch in enumerate(data):
            if index < done:
                continue
            x, h, target, weight = source(batch, index)
            phi = columns(x, h)
            if self.root is not None:
                root = jnp.asarray(self.root, target.dtype)
                target = jnp.concatenate([target, target @ root], axis=1)
            if stats is None:
                stats = ridge.init(phi.shape[1], target.shape[1])
            stats = ridge.update_chunks(stats, phi, target, weight)
            done = index + 1
            if done % data.save_every == 0:
                store.save(stats, done)
        if stats is None:
            raise ValueError("calibration_inputs must hold batches. Got none.")
        store.save(stats, done)
        return stats

    def residual(self, after: nnx.Module, out: str, data: Data) -> np.ndarray:
        """Second moment ``[o, o]`` of what ``after`` returns at ``out`` less T."""
        new = Reader(after, (out,), data.apply)

        @jax.jit
        def moment(state: Any, batch: Any, target: Any, weight: Any) -> Any:
            error = rows(new(state, batch)[1][out][1]) - target
            return (error * weight[:, None]).T @ error

        total, weights = np.zeros((self.block.out,) * 2), 0.0
        for index, batch in enumerate(data):
            *_, target, weight = self._source(batch, index)
            own = moment(new.state, batch, target, weight)
            total, weights = total + np.asarray(own), weights + float(weight.sum())
        return total / weights

    def sample(self) -> Any:
        """Inputs of the block at tokens of the first batch that count, ``[n, d]``."""
        x, _, _, weight = self._source(self.data.first(), 0)
        return x[np.asarray(weight) > 0]

    @functools.cached_property
    def _source(self) -> "_Source":
        return _Source(self, None)

    def _changed(self, changes: Mapping[str, Any]) -> "_Source":
        names = (self.block.first, self.block.second)
        model = place(self.model, changes)
        return _Source(self, Reader(model, names, self.data.apply))


class _Source:
    """Inputs, units, targets and weights of a batch's tokens, compiled."""

    def __init__(self, task: Task, changed: Reader | None):
        block, apply = task.block, task.data.apply
        names = (block.first, block.second, block.stream)
        ours, theirs = (
            Reader(task.model, names, apply),
            Reader(task.dense, names, apply),
        )
        self._task, self._readers = task, (ours, theirs, changed)
        self.states = tuple(r if r is None else r.state for r in self._readers)
        self._read = jax.jit(self._rows)

    def __call__(self, batch: Any, index: int) -> tuple[Any, Any, Any, Any]:
        x, h, target, weight = self._read(self.states, batch)
        scales = self._task.scales
        if scales is not None:
            if index >= len(scales) or len(scales[index]) != len(weight):
                raise ValueError(
                    "calibration_inputs must give the same batches at every pass. Got "
                    f"others at batch {index}."
                )
            weight = weight * scales[index]
        return x, h, target, weight

    def _rows(self, states: tuple[Any, ...], batch: Any) -> tuple[Any, Any, Any, Any]:
        task, block = self._task, self._task.block
        ours, theirs, changed = self._readers
        _, seen = ours(states[0], batch)
        y = seen[block.second][1]
        target = rows(y)
        weight = token_weights(task.data.weights, batch, y.shape)
        if task.corrected:
            _, wanted = theirs(states[1], batch)
            which = 0 if block.post_norm else 1
            target += rows(wanted[block.stream][which])
            target -= rows(seen[block.stream][which])
        if changed is not None:
            _, seen = changed(states[2], batch)
        x, h = seen[block.first][0], seen[block.second][0]
        return rows(x), rows(h), target, weight


def sensitivity(
    model: nnx.Module, blocks: Sequence[Block], data: Data, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
    r"""How the model's outputs change with what each block returns at each token.

    J is the derivative of the outputs by the block's output at a token, r a random
    normal direction of an example's outputs: :math:`E[rr^\top] = I`.

    Returns:
      Per block :math:`E[J^\top r r^\top J]` ``[o, o]``, the Gauss-Newton metric; and
      :math:`\lVert J^\top r\rVert^2` of every token, batch by batch, as a share of
      the mean: four bytes a token and block.

    Raises:
      ValueError: if the outputs do not depend on a block.
    """
    names = [block.second for block in blocks]
    reader = Reader(model, names, data.apply)

    @jax.jit
    def pull_back(state: Any, batch: Any, key: Any) -> Any:
        seen = jax.eval_shape(reader, state, batch)[1]
        zeros = {n: jnp.zeros(seen[n][1].shape, seen[n][1].dtype) for n in names}

        def outputs(shifts: Any) -> Any:
            values = reader(state, batch, shifts)[0]
            return values.astype(jnp.promote_types(values.dtype, jnp.float32))

        values, pull = jax.vjp(outputs, zeros)
        pulled = pull(jax.random.normal(key, values.shape, values.dtype))[0]
        weight = token_weights(data.weights, batch, zeros[names[0]].shape)
        moments, squares = {}, {}
        for name, value in pulled.items():
            moments[name] = (rows(value) * weight[:, None]).T @ rows(value)
            squares[name] = jnp.sum(rows(value) ** 2, axis=1)
        return moments, squares, jnp.sum(weight)

    metric = {block.second: np.zeros((block.out,) * 2) for block in blocks}
    scales: dict[str, list[Any]] = {name: [] for name in names}
    total = 0.0
    for index, batch in enumerate(data):
        key = jax.random.fold_in(jax.random.key(seed), index)
        moments, squares, weight = pull_back(reader.state, batch, key)
        total += float(weight)
        for name in names:
            metric[name] += np.asarray(moments[name])
            scales[name].append(np.asarray(squares[name]))
    for block in blocks:
        if not np.trace(metric[block.second]) > 0:
            raise ValueError(
                "the model's outputs must depend on every block for the metric "
                f"'gauss_newton'; take another metric, or give apply. Got {block.name}."
            )
    means = {name: np.trace(matrix) / total for name, matrix in metric.items()}
    return (
        {b.name: metric[b.second] / total for b in blocks},
        {
            b.name: [own / np.float32(means[b.second]) for own in scales[b.second]]
            for b in blocks
        },
    )


def _summary(values: Any) -> np.ndarray:
    """The mean of each column, and its mean along a ramp, which tells the order."""
    rows = np.asarray(values, np.float64).reshape(len(values), -1)
    ramp = np.linspace(-1, 1, len(rows))[:, None]
    return np.concatenate([rows.mean(axis=0), (ramp * rows).mean(axis=0)])


@dataclasses.dataclass(frozen=True)
class _Store:
    """The sums of one pass on disk, bound to what they were gathered from."""

    path: pathlib.Path | None
    identity: str
    summary: np.ndarray

    @classmethod
    def of(
        cls, task: Task, data: Data, label: str, source: _Source, columns: Columns
    ) -> "_Store":
        if data.folder is None:
            return cls(None, "", np.zeros(0))
        # The batches cannot all be hashed before the pass; the first one stands for
        # them, and what comes out of it for the functions of the settings.
        batch = data.first()
        x, h, target, weight = source(batch, 0)
        made = jax.tree.leaves((columns(x, h), target, weight))
        shapes = [leaf.shape for leaf in made]
        settings = (label, task.block, task.corrected, shapes)
        sha = hashlib.sha256(repr(settings).encode())
        leaves = jax.tree.leaves((source.states, task.root, batch))
        for index, leaf in enumerate(leaves):
            if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            hash_array(sha, str(index), np.asarray(leaf))
        name = label.replace("/", ".")
        path = pathlib.Path(data.folder) / f"{name}.safetensors"
        return cls(path, sha.hexdigest(), np.concatenate([_summary(v) for v in made]))

    def load(self) -> tuple[ridge.RidgeStats | None, int]:
        if self.path is None or not self.path.is_file():
            return None, 0
        with open_safetensors(self.path, "calibration state") as file:
            record = json.loads((file.metadata() or {}).get("record", "{}"))
            names = set(file.keys())
            summary = file.get_tensor("summary") if "summary" in names else None
            sums = sorted(names - {"summary"})
            arrays = [jnp.asarray(file.get_tensor(name)) for name in sums]
        if record.get("identity") != self.identity or not self._agrees(summary):
            raise ValueError(
                "the calibration state must be of the same model, data and settings: "
                f"remove it, or name another folder. Got {self.path} of others."
            )
        tree = jax.tree.structure(ridge.init(1, 1))
        return jax.tree.unflatten(tree, arrays), record["batches"]

    def _agrees(self, summary: np.ndarray | None) -> bool:
        """Up to the rounding of another processor, which a hash would not forgive."""
        if summary is None or summary.shape != self.summary.shape:
            return False
        size = np.max(np.abs(self.summary), initial=0.0)
        return bool(np.all(np.abs(summary - self.summary) <= 1e-3 * size))

    def save(self, stats: ridge.RidgeStats, batches: int) -> None:
        if self.path is None:
            return
        arrays = {
            f"{i:02}": np.asarray(leaf, order="C")
            for i, leaf in enumerate(jax.tree.leaves(stats))
        }
        arrays["summary"] = self.summary
        record = json.dumps({"identity": self.identity, "batches": batches})
        write_atomic(self.path, save(arrays, {"record": record}))
