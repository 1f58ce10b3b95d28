"""Text for sentence classifiers: tasks of GLUE from their own files, and made-up ones.

GLUE: Wang et al., arXiv 1804.07461. Its development sets, whose labels are public,
serve as test sets; validation examples are cut off the training sets, at random. The
training rows of SST-2 are phrases of its sentences: nearly all validation phrases stand
in a training phrase too, and scores on that cut are too high.
"""

import dataclasses
import gzip
import math
import pathlib
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from experiments.splits import Batch, Dataset, cut
from snnk_jax.models.bert_tokens import BertTokenizer


@dataclasses.dataclass(frozen=True)
class Task:
    """Where a task's texts and labels stand in its files.

    Attributes:
      folder: of ``train.tsv.gz`` and ``dev.tsv.gz``.
      texts: columns of the text, or of the two texts, by header or by number.
      label: column of the label.
      classes: number of classes; 1 for values.
      metric: what runs are judged by, see :mod:`experiments.scores`.
      header: whether the first line names the columns.
      parse: label from its text.
    """

    folder: str
    texts: tuple[str | int, ...]
    label: str | int
    classes: int = 2
    metric: str = "accuracy"
    header: bool = True
    parse: Callable[[str], float] = int


TASKS = {
    "sst2": Task("SST-2", ("sentence",), "label"),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", metric="f1"),
    "rte": Task(
        *("RTE", ("sentence1", "sentence2"), "label"),
        parse=("entailment", "not_entailment").index,
    ),
    "cola": Task("CoLA", (3,), 1, metric="matthews", header=False),
    "stsb": Task(
        *("STS-B", ("sentence1", "sentence2"), "score"),
        classes=1,
        metric="spearman",
        # Scores from 0 to 5 as values of order one.
        parse=lambda score: float(score) / 5,
    ),
}
NUM_CLASSES = {f"glue:{name}": task.classes for name, task in TASKS.items()}
NUM_CLASSES["synthetic_text"] = 2
SYNTHETIC_VOCABULARY = 64


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """Examples held in memory as token ids, types and masks ``[n, length]``."""

    tokens: np.ndarray
    token_types: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: np.ndarray) -> Batch:
        return {
            "tokens": self.tokens[indices],
            "token_types": self.token_types[indices],
            "mask": self.mask[indices],
            "label": self.labels[indices],
        }


def load(
    name: str,
    *,
    directory: str,
    tokenizer: str,
    length: int,
    train_size: int = 0,
    val_fraction: float = 0.1,
    test_size: int = 0,
) -> Dataset:
    """Loads ``glue:TASK`` or ``synthetic_text`` as token ids.

    Args:
      name: the data set.
      directory: folder of GLUE's folders.
      tokenizer: file or folder of :class:`~snnk_jax.models.bert_tokens.BertTokenizer`.
      length: ids of an example; how many texts are longer and lose their end is
        printed.
      train_size: examples left for training after the validation cut; 0 keeps all.
      val_fraction: share of the training examples held out for validation.
      test_size: test examples used; 0 keeps all.

    Raises:
      ValueError: for an unknown name, a file that is not as published, or sizes that
        the data cannot serve.
      FileNotFoundError: if the files are not there; says what to do.
    """
    if name == "synthetic_text":
        metric = "accuracy"
        train, test = _synthetic(256, length, 0), _synthetic(64, length, 1)
    else:
        task = TASKS.get(name.removeprefix("glue:"))
        if task is None or not name.startswith("glue:"):
            choices = ", ".join(NUM_CLASSES)
            raise ValueError(f"data.name must be one of {choices}. Got {name!r}.")
        metric = task.metric
        encode = BertTokenizer(tokenizer)
        train, test = (
            _encode(encode, *read(task, directory, split), length, f"{name} {split}")
            for split in ("train", "dev")
        )
    return cut(
        Dataset(name, train, train, test, NUM_CLASSES[name], metric),
        has_val=False,
        train_size=train_size,
        val_fraction=val_fraction,
        test_size=test_size,
    )


def check_files(name: str, directory: str) -> None:
    """Raises FileNotFoundError unless the files of a task are there."""
    if name != "synthetic_text":
        for split in ("train", "dev"):
            _file(TASKS[name.removeprefix("glue:")], directory, split)


def _file(task: Task, directory: str, split: str) -> pathlib.Path:
    path = pathlib.Path(directory) / task.folder / f"{split}.tsv.gz"
    if not directory or not path.is_file():
        raise FileNotFoundError(
            f"data.dir must be a folder that holds {task.folder}/{split}.tsv.gz. Got "
            f"{directory!r}. Pass it with --config.data.dir=FOLDER."
        )
    return path


def read(
    task: Task, directory: str, split: str
) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """The texts and labels of one file of a task.

    Raises:
      FileNotFoundError: if the file is not there.
      ValueError: if the file is damaged or empty, or a line has too few columns or
        another label.
    """
    path = _file(task, directory, split)
    # The fields are not quoted, and one file starts with a byte-order mark.
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must be whole gzipped text in UTF-8. Got {error}."
        ) from error
    lines = [line.rstrip("\r").split("\t") for line in text.split("\n") if line]
    names = lines.pop(0) if task.header else []
    columns = [
        column if isinstance(column, int) else _position(names, column, path)
        for column in (*task.texts, task.label)
    ]
    texts, labels = [], []
    for number, line in enumerate(lines, 1 + task.header):
        try:
            *parts, label = (line[column] for column in columns)
            labels.append(_checked(task.parse(label), task.classes))
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{path.name} of {task.folder} must hold texts and labels as GLUE "
                f"publishes them. Got line {number}: {line}."
            ) from error
        texts.append(tuple(parts))
    if not texts:
        raise ValueError(f"{path} must hold examples. Got none.")
    dtype = np.float32 if task.classes == 1 else np.int32
    return texts, np.asarray(labels, dtype)


def _checked(label: float, classes: int) -> float:
    """A label; those of GLUE's test files are -1."""
    if not (math.isfinite(label) if classes == 1 else label in range(classes)):
        raise ValueError("no such label")
    return label


def _position(names: Sequence[str], column: str, path: pathlib.Path) -> int:
    if column not in names:
        raise ValueError(f"{path.name} must have a column {column!r}. Got {names}.")
    return list(names).index(column)


def _encode(
    tokenizer: BertTokenizer,
    texts: Sequence[tuple[str, ...]],
    labels: np.ndarray,
    length: int,
    name: str,
) -> TokenSplit:
    first, *rest = zip(*texts, strict=True)
    batch = tokenizer(first, rest[0] if rest else None, length=length)
    if batch.truncated.any():
        share = np.mean(batch.truncated)
        print(
            f"{name}: {share:.1%} of the texts are cut to {length} tokens", flush=True
        )
    return TokenSplit(batch.tokens, batch.token_types, batch.mask, labels)


def _synthetic(num: int, length: int, seed: int) -> TokenSplit:
    """Random words; the class says whether the word 7 or the word 8 is among them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, num).astype(np.int32)
    sizes = rng.integers(min(4, length), length + 1, num)
    mask = np.arange(length)[None] < sizes[:, None]
    tokens = rng.integers(9, SYNTHETIC_VOCABULARY, (num, length))
    tokens[:, 0] = 2
    tokens[np.arange(num), rng.integers(1, sizes)] = 7 + labels
    tokens = np.where(mask, tokens, 0).astype(np.int32)
    return TokenSplit(tokens, np.zeros_like(tokens), mask, labels)
