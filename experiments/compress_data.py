"""Models to be compressed, and what they are calibrated on and judged by."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import stats

import snnk_jax as snnk
from experiments import data as data_lib
from experiments import glue, sentences
from experiments.augment import normalise
from experiments.tasks import weights_path
from snnk_jax.compression import Block, find_blocks
from snnk_jax.models.bert import Bert, BertConfig
from snnk_jax.models.bert_tokens import BertTokenizer
from snnk_jax.models.vit_params import load_vit

_BLOCKS = r"blocks/[0-9]+/mlp"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its calibration inputs and its scores.

    Attributes:
      model: the dense model.
      batches: calibration inputs.
      norm: the LayerNorm behind a block of a post-norm model.
      weights: of the tokens of a batch.
      apply: runs a model on a batch.
      score: scores of a model, the larger the better.
      metrics: their names, in the order of the table.
      calibrated: in words.
    """

    model: Any
    batches: Sequence[Any]
    norm: str | None
    weights: Callable[[Any], Any] | None
    apply: Callable[[Any, Any], Any]
    score: Callable[[Any], dict[str, float]]
    metrics: tuple[str, ...]
    calibrated: str

    def rules(self, last: int) -> list[snnk.CompressRule]:
        """Rules for the last blocks."""
        where = slice(-last, None)
        return [snnk.CompressRule(path=_BLOCKS, norm=self.norm, where=where)]

    def blocks(self, last: int) -> list[Block]:
        """The last blocks."""
        return find_blocks(self.model, self.rules(last))


def load(config: Any) -> Case:
    """The case of a config.

    Raises:
      FileNotFoundError: without the data or the weights.
    """
    return {"encoder": _encoder, "vit": _vit, "synthetic": _synthetic}[config.study](
        config
    )


def _encoder(config: Any) -> Case:
    path = weights_path(config.weights)
    read = {"tokenizer": str(path), "length": config.length}
    texts = sentences.load(
        ("stsb",),
        directory=config.data.dir,
        val_fraction=config.held_out / 5749,
        **read,
    )
    dev, labels = sentences.pairs("stsb", config.data.dir, "dev", **read)
    model = Bert.from_pretrained(path, pool="mean", head="embedding")
    dense = cosines(embed(model, texts.val))
    probes = {}
    if config.probe:
        probes = {
            title: _probe_data(name, config, str(path))
            for name, title in (("sst2", "SST-2"), ("mrpc", "MRPC"))
        }

    def score(model: Any) -> dict[str, float]:
        found = {"agreement": rank(cosines(embed(model, texts.val)), dense)}
        for title, (train, test) in probes.items():
            found[title] = _probe(model, train, test)
        return found | {"STS-B dev": rank(cosines(embed(model, dev)), labels)}

    batches = list(_batches(_drawn(texts.train, config), config.batch_size))
    count = sum(len(batch["tokens"]) for batch in batches)
    tokens = sum(int(batch["mask"].sum()) for batch in batches)
    return Case(
        model=model,
        batches=batches,
        norm="norm2",
        weights=_mask,
        apply=_apply_text,
        score=score,
        metrics=("agreement", *probes, "STS-B dev"),
        calibrated=f"{count} training sentences ({tokens} tokens) without labels",
    )


def _synthetic(config: Any) -> Case:
    texts = sentences.synthetic(config.length)
    sizes = BertConfig.preset(
        "tiny",
        vocab_size=glue.SYNTHETIC_VOCABULARY,
        max_length=config.length,
        pool="mean",
        head="embedding",
        hidden_size=16,
        mlp_dim=64,
    )
    model = Bert(sizes, rngs=nnx.Rngs(config.seed))
    dense = cosines(embed(model, texts.val))
    batches = list(_batches(_drawn(texts.train, config), config.batch_size))
    return Case(
        model=model,
        batches=batches,
        norm="norm2",
        weights=_mask,
        apply=_apply_text,
        score=lambda m: {"agreement": rank(cosines(embed(m, texts.val)), dense)},
        metrics=("agreement",),
        calibrated="random words",
    )


def _vit(config: Any) -> Case:
    model = load_vit(weights_path(config.weights))
    data = data_lib.load(
        config.data.name, image_size=32, directory=config.data.dir, val_fraction=0.1
    )
    drawn = np.random.default_rng(0).permutation(len(data.train))
    count = config.calibration or len(drawn) - config.held_out
    images, _ = _images(data.train, drawn[: count - count % config.batch_size])
    held, _ = _images(data.train, drawn[-config.held_out :])
    test, labels = _images(data.test, np.arange(len(data.test)))
    # A task of its own has no use for the model's classes: its features are read out.
    apply = _apply_features if config.probe else _apply_images
    dense = _outputs(model, held, apply)

    def score(model: Any) -> dict[str, float]:
        same = np.argmax(_outputs(model, held, apply), 1) == np.argmax(dense, 1)
        right = np.argmax(_outputs(model, test, apply), 1) == labels
        return {"agreement": float(same.mean()), "top-1": float(right.mean())}

    def probed(model: Any) -> dict[str, float]:
        features = _outputs(model, held, apply)
        size = np.linalg.norm(features, axis=1) * np.linalg.norm(dense, axis=1)
        cosine = float(np.mean(np.sum(features * dense, axis=1) / size))
        right = fitted(
            _outputs(model, learnt, apply),
            classes,
            _outputs(model, test, apply),
            labels,
        )
        return {"agreement": cosine, "top-1": right}

    learnt, classes = _images(data.train, drawn[: config.probe])
    return Case(
        model=model,
        batches=[jnp.asarray(b) for b in _chunks(images, config.batch_size)],
        norm=None,
        weights=None,
        apply=apply,
        score=probed if config.probe else score,
        metrics=("agreement", "top-1"),
        calibrated=f"{len(images)} training images without labels",
    )


def _images(split: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    batch = split.__getitems__(rows)
    return np.asarray(normalise(batch["image"])), batch["label"]


def _chunks(values: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _outputs(model: Any, images: np.ndarray, apply: Any) -> np.ndarray:
    graphdef, state = nnx.split(model)
    parts = [np.asarray(_run(apply, graphdef, state, x)) for x in _chunks(images, 500)]
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(apply: Any, graphdef: Any, state: Any, x: Any) -> Any:
    return apply(nnx.merge(graphdef, state), x)


def _mask(batch: Any) -> Any:
    return batch["mask"]


def _apply_text(model: Any, batch: Any) -> Any:
    return model(batch["tokens"], mask=batch["mask"])


def _apply_images(model: Any, images: Any) -> Any:
    return model(images)


def _apply_features(model: Any, images: Any) -> Any:
    return model.features(images)


def _drawn(split: sentences.Sentences, config: Any) -> sentences.Sentences:
    """Some of the sentences, of all kinds: the file has them sorted by their source."""
    rows = np.random.default_rng(config.seed).permutation(len(split))
    rows = rows[: config.calibration or None]
    return sentences.Sentences(split.tokens[rows], split.mask[rows])


def _batches(split: sentences.Sentences, size: int) -> Iterator[Any]:
    """Sentences of similar length together; the rest that fills no batch is left.

    The batches come in random order: the report looks at the first ones.
    """
    order = np.argsort(split.lengths, kind="stable")
    starts = np.arange(0, len(order) - size + 1, size)
    for start in np.random.default_rng(0).permutation(starts):
        yield _cut(split, order[start : start + size])


def _cut(split: sentences.Sentences, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Sentences as long as the longest, in powers of two: few programs to compile."""
    longest, full = int(split.lengths[rows].max()), split.mask.shape[1]
    width = min(max(16, 1 << (longest - 1).bit_length()), full)
    return {"tokens": split.tokens[rows, :width], "mask": split.mask[rows, :width]}


def embed(model: Any, split: sentences.Sentences, size: int = 128) -> np.ndarray:
    """Embeddings ``[n, d]`` of sentences, those of similar length at a time."""
    graphdef, state = nnx.split(model)
    order = np.argsort(split.lengths, kind="stable")
    parts = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        # The last batch repeats a row: one more shape would be one more program.
        padded = np.pad(rows, (0, size - len(rows)), mode="edge")
        batch = _cut(split, padded)
        values = _embed(graphdef, state, batch["tokens"], batch["mask"])
        parts.append(np.asarray(values)[: len(rows)])
    embedded = np.concatenate(parts)
    return embedded[np.argsort(order)]


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: Any, state: Any, tokens: Any, mask: Any) -> Any:
    return nnx.merge(graphdef, state)(tokens, mask=mask)


def cosines(embedded: np.ndarray) -> np.ndarray:
    """Of pairs, one behind the other, of vectors of norm one."""
    return np.sum(embedded[0::2] * embedded[1::2], axis=1)


def rank(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation."""
    result: Any = stats.spearmanr(a, b)
    return float(result.statistic)


def _probe_data(
    name: str, config: Any, tokenizer: str
) -> tuple[tuple[Any, np.ndarray], tuple[Any, np.ndarray]]:
    """The first training rows and the dev rows of a task."""
    encode, found = BertTokenizer(tokenizer), []
    for split, limit in (("train", config.probe), ("dev", None)):
        texts, labels = glue.read(glue.TASKS[name], config.data.dir, split)
        texts, labels = texts[:limit], labels[:limit]
        parts = []
        for column in zip(*texts, strict=True):
            tokens = encode(column, length=config.length)
            parts.append(sentences.Sentences(tokens.tokens, tokens.mask))
        found.append((parts, labels))
    return found[0], found[1]


def _probe(
    model: Any, train: tuple[Any, np.ndarray], test: tuple[Any, np.ndarray]
) -> float:
    """Accuracy of a probe of frozen embeddings, of |u - v| and uv where it is pairs."""
    inputs = []
    for parts, _ in (train, test):
        columns = [embed(model, part) for part in parts]
        if len(columns) == 2:
            u, v = columns
            columns = [np.abs(u - v), u * v]
        inputs.append(np.concatenate(columns, axis=1))
    return fitted(inputs[0], train[1], inputs[1], test[1])


def fitted(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, wanted: np.ndarray
) -> float:
    """Accuracy of logistic regression."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=10.0, max_iter=1000).fit(train, labels)
    return float(probe.score(test, wanted))
