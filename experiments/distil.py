"""Learning from a teacher: what it says of every example, kept on disk, and the loss.

Nothing here needs labels. A teacher's embeddings and, where wanted, its hidden states
are computed once, in half precision; training reads them like labels.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import stats

import snnk_jax as snnk
from experiments.learning import Objective, model_inputs
from experiments.metrics import write_json
from experiments.splits import Batch, Split
from snnk_jax._files import hash_array

# Batches between two marks of how far a cache is filled.
_MARK = 20


def unit(x: jax.Array) -> jax.Array:
    """Rows at unit length, float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def embed(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """The unit embeddings ``[n, d]`` of a batch: what the head of the model reads."""
    return unit(model.features(*model_inputs(batch)))


@dataclasses.dataclass(frozen=True)
class Distil(Objective):
    r"""Follows a teacher whose unit embeddings :math:`t_i` stand as labels.

    The loss of an example with embedding :math:`e_i` is

    .. math::
        a\,(1 - e_i \cdot t_i)
        + b \operatorname{mean}_{j \ne i} (e_i \cdot e_j - t_i \cdot t_j)^2
        + c \operatorname{mean}_{\text{tokens}} \lVert h - h^{\text{teacher}} \rVert^2/d

    Args:
      embedding: a.
      similarity: b, over the examples of a batch.
      hidden: c, of the last hidden states; where not zero, batches hold ``hidden``.

    References:
      Reimers and Gurevych, arXiv 2004.09813 (embeddings); Park et al., arXiv 1904.05068
      (similarities within a batch); Jiao et al., arXiv 1909.10351 (hidden states).
    """

    embedding: float = 1.0
    similarity: float = 0.0
    hidden: float = 0.0

    def __post_init__(self):
        weights = (self.embedding, self.similarity, self.hidden)
        if not all(0 <= weight < float("inf") for weight in weights) or not any(
            weights
        ):
            raise ValueError(
                f"weights must be finite, not negative and not all zero. Got {weights}."
            )

    def losses(
        self,
        model: Any,
        batch: dict[str, jax.Array],
        label_smoothing: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The loss of every example and the embeddings; draws nothing from ``rngs``."""
        teacher, real = batch["label"], batch.get("weight")
        ours = embed(model, batch)
        losses = self.embedding * (1 - jnp.sum(ours * teacher, axis=-1))
        if self.similarity:
            n = len(ours)
            others = jnp.ones(n) if real is None else real
            others = (1 - jnp.eye(n)) * others[None]
            wrong = jnp.square(ours @ ours.T - teacher @ teacher.T) * others
            count = jnp.maximum(jnp.sum(others, axis=1), 1)
            losses += self.similarity * jnp.sum(wrong, axis=1) / count
        if self.hidden:
            states = model.hidden_states(*model_inputs(batch)).astype(jnp.float32)
            target = batch["hidden"].astype(jnp.float32)
            wrong = jnp.mean(jnp.square(states - target), axis=-1)
            mask = batch.get("mask", jnp.ones(wrong.shape, bool))
            total = jnp.sum(jnp.where(mask, wrong, 0.0), axis=-1)
            losses += self.hidden * total / jnp.maximum(jnp.sum(mask, axis=-1), 1)
        return losses, ours

    def scores(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Agreement with the teacher.

        Returns:
          ``cosine``, the mean over examples; ``agreement``, Spearman's correlation of
          the similarities of the pairs (0, 1), (2, 3), ... with the teacher's.
        """
        products = np.sum(outputs * labels, axis=1, dtype=np.float64)
        ours, theirs = (pair_similarities(x) for x in (outputs, labels))
        return {
            "cosine": float(np.mean(products)),
            "agreement": rank_correlation(ours, theirs),
        }


def pair_similarities(embeddings: np.ndarray) -> np.ndarray:
    """Cosines of the pairs (0, 1), (2, 3), ... of unit rows."""
    pairs = embeddings[: len(embeddings) // 2 * 2].reshape(-1, 2, embeddings.shape[1])
    return np.einsum("nd,nd->n", *np.moveaxis(pairs, 1, 0), dtype=np.float64)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation; 0 where there is no order."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    found: Any = stats.spearmanr(a, b)
    return float(found.statistic)


@dataclasses.dataclass(frozen=True)
class Taught:
    """A split whose labels are a teacher's embeddings.

    Attributes:
      split: the examples; with text, lengths tell which tokens count.
      lengths: tokens of each example.
      embedding: ``[n, d]``, half precision.
      hidden: hidden states of all tokens of all examples in a row, or None.
    """

    split: Split
    lengths: np.ndarray
    embedding: np.ndarray
    hidden: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.split)

    def labels(self, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The embeddings, at unit length in float32."""
        said = np.asarray(self.embedding[indices], np.float32)
        return said / np.linalg.norm(said, axis=1, keepdims=True)

    def __getitems__(self, indices: np.ndarray) -> Batch:
        batch = dict(self.split.__getitems__(indices))
        batch["label"] = self.labels(indices)
        if self.hidden is not None:
            lengths = self.lengths[indices]
            ends = np.cumsum(self.lengths)[indices]
            width = batch["mask"].shape[1] if "mask" in batch else lengths.max()
            states = np.zeros((len(indices), width, self.hidden.shape[1]), np.float16)
            for row, end, length in zip(states, ends, lengths, strict=True):
                row[:length] = self.hidden[end - length : end]
            batch["hidden"] = states
        return batch


def teach(
    split: Split,
    lengths: np.ndarray,
    teacher: Any,
    folder: str | pathlib.Path,
    *,
    batch_size: int,
    hidden: bool = False,
) -> Taught:
    """Has a teacher say what it makes of every example, once.

    Args:
      split: the examples.
      lengths: tokens of each; examples of similar length are taken together.
      teacher: a model with ``features`` and ``hidden_states``.
      folder: keeps the arrays. One that is half filled is filled up.
      batch_size: examples at a time.
      hidden: keep the last hidden states too.

    Raises:
      ValueError: if the folder holds what another teacher said, or of other examples.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    n, order = len(split), np.argsort(lengths, kind="stable")
    first = split.__getitems__(order[:1])
    dim = jax.eval_shape(functools.partial(embed, teacher), first).shape[1]
    key = _key(split, lengths, teacher, hidden)
    record = folder / "record.json"
    done = 0
    if record.is_file():
        found = json.loads(record.read_text())
        if found["key"] != key:
            kept = "embeddings and hidden states" if hidden else "embeddings alone"
            raise ValueError(
                f"the folder of a teacher must hold its {kept} of these examples; "
                f"remove it or choose another. Got {folder}."
            )
        done = found["done"]
    shapes = {"embedding": (n, dim)}
    if hidden:
        shapes["hidden"] = (int(lengths.sum()), dim)
    arrays = {
        name: np.memmap(
            folder / f"{name}.f16", np.float16, "r+" if done else "w+", shape=shape
        )
        for name, shape in shapes.items()
    }
    graphdef, state = nnx.split(teacher)

    @jax.jit
    def run(state: Any, batch: Any) -> Any:
        model = nnx.merge(graphdef, state)
        states = model.hidden_states(*model_inputs(batch)) if hidden else None
        return embed(model, batch), states

    ends = np.cumsum(lengths)
    for start in range(done, n, batch_size):
        rows = order[start : start + batch_size]
        # Filled up, so that every batch of a length has one shape.
        filled = np.resize(rows, batch_size)
        said, states = jax.device_get(run(state, split.__getitems__(filled)))
        arrays["embedding"][rows] = said[: len(rows)]
        for row, i in enumerate(rows) if hidden else ():
            own = states[row, : lengths[i]]
            arrays["hidden"][ends[i] - lengths[i] : ends[i]] = own
        last = start + batch_size >= n
        if last or (start // batch_size) % _MARK == _MARK - 1:
            for array in arrays.values():
                array.flush()
            write_json(record, {"key": key, "done": min(start + batch_size, n)})
    return Taught(split, lengths, arrays["embedding"], arrays.get("hidden"))


def _key(split: Split, lengths: np.ndarray, teacher: Any, hidden: bool) -> str:
    sha = hashlib.sha256(snnk.adapters.fingerprint(teacher).encode())
    hash_array(sha, f"lengths {hidden}", lengths)
    for start in range(0, len(split), 1024):
        rows = np.arange(start, min(start + 1024, len(split)))
        for name, array in sorted(split.__getitems__(rows).items()):
            if name != "label":
                hash_array(sha, name, array)
    return sha.hexdigest()
