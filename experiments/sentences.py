"""Unlabelled sentences, and batches of sentences of similar length."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from experiments import glue
from experiments.loading import TrainLoader
from experiments.splits import Batch
from snnk_jax.models.bert_tokens import BertTokenizer


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Sentences as token ids; batches lose the columns that nobody needs.

    Attributes:
      tokens: ids ``[n, length]``.
      mask: False behind the end of a sentence.
      step: batches are as long as their longest sentence, rounded up to a multiple of
        this; the larger, the fewer shapes there are to compile for.
    """

    tokens: np.ndarray
    mask: np.ndarray
    step: int = 8

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence."""
        return self.mask.sum(axis=1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, indices: np.ndarray) -> Batch:
        mask = self.mask[indices]
        longest = int(mask.sum(axis=1).max())
        width = min(-(-longest // self.step) * self.step, mask.shape[1])
        tokens = self.tokens[indices, :width]
        types = np.zeros_like(tokens)
        return {"tokens": tokens, "token_types": types, "mask": mask[:, :width]}


@dataclasses.dataclass(frozen=True)
class SimilarLengths(TrainLoader):
    """Training batches of sentences of similar length, a pure function of the step.

    An epoch sorts its sentences by length, those of one length in random order, and
    takes the batches in random order. The few sentences that fill no batch are left
    out, other ones every epoch. The split has ``lengths``.
    """

    def indices(self, step: int) -> np.ndarray:
        """Rows of the global batch of a step."""
        count = len(self.split) // self.batch_size
        epoch, position = divmod(step, count)
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.split))[: count * self.batch_size]
        lengths = self.split.lengths[order]  # pyright: ignore[reportAttributeAccessIssue]
        order = order[np.argsort(lengths, kind="stable")]
        batch = int(rng.permutation(count)[position])
        return order[batch * self.batch_size :][: self.batch_size]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Sentences to learn from, and pairs of sentences to judge by, held out of them.

    Attributes:
      train: the sentences.
      val: those of held-out pairs, one pair after the other.
    """

    train: Sentences
    val: Sentences


def load(
    names: Sequence[str],
    *,
    directory: str,
    tokenizer: str,
    length: int,
    train_size: int = 0,
    val_fraction: float = 0.1,
) -> Texts:
    """Loads the sentences of GLUE training sets, without their labels.

    Args:
      names: keys of :data:`experiments.glue.TASKS`; pairs of the first one are held
        out.
      directory: folder of GLUE's folders.
      tokenizer: file or folder of a tokenizer.
      length: most tokens; longer sentences are left out.
      train_size: sentences to train on, the first of them in the order of ``names``;
        0 keeps all.
      val_fraction: share of the pairs of the first set that is held out, every
        sentence of which is kept from training.

    Raises:
      ValueError: for an unknown name, or sizes that the data cannot serve.
      FileNotFoundError: if the files are not there.
    """
    if not names or not set(names) <= set(glue.TASKS):
        raise ValueError(
            f"texts must be of {', '.join(glue.TASKS)}. Got {tuple(names)}."
        )
    read = [glue.read(glue.TASKS[name], directory, "train")[0] for name in names]
    encode = BertTokenizer(tokenizer)
    pairs = read[0]
    drawn = np.random.default_rng(0).permutation(len(pairs))
    held = [pairs[i] for i in sorted(drawn[: round(val_fraction * len(pairs))])]
    val = [text for pair in held for text in pair]
    if len(held) < 1 or len(held[0]) != 2:
        raise ValueError(
            "texts must begin with a set of pairs, and val_fraction hold some out. Got "
            f"{names[0]!r} and {val_fraction}."
        )
    apart = set(val)
    everything = (text for texts in read for parts in texts for text in parts)
    unique = dict.fromkeys(text for text in everything if text not in apart)
    train = _encode(encode, list(unique), length, whole=True)
    if train_size > len(train):
        raise ValueError(
            f"data.train_size must be at most {len(train)}. Got {train_size}."
        )
    kept = slice(train_size or None)
    return Texts(
        Sentences(train.tokens[kept], train.mask[kept]),
        _encode(encode, val, length, whole=False),
    )


def pairs(
    name: str, directory: str, split: str, *, tokenizer: str, length: int
) -> tuple[Sentences, np.ndarray]:
    """The sentences of a set of pairs, one pair after the other, and their scores."""
    texts, labels = glue.read(glue.TASKS[name], directory, split)
    flat = list(itertools.chain.from_iterable(texts))
    return _encode(BertTokenizer(tokenizer), flat, length, whole=False), labels


def synthetic(length: int, num: int = 256) -> Texts:
    """Random words, for tests: nothing to download."""

    def draw(num: int, seed: int) -> Sentences:
        split = glue.load("synthetic_text", directory="", tokenizer="", length=length)
        rows = split.train if seed == 0 else split.test
        batch = rows.__getitems__(np.arange(min(num, len(rows))))
        return Sentences(batch["tokens"], batch["mask"])

    return Texts(draw(num, 0), draw(num // 4, 1))


def _encode(
    encode: BertTokenizer, texts: Sequence[str], length: int, whole: bool
) -> Sentences:
    batch = encode(texts, length=length)
    kept = ~batch.truncated if whole else np.ones(len(texts), bool)
    return Sentences(batch.tokens[kept], batch.mask[kept])
