"""Unlabelled sentences and batches of similar length."""

import gzip
import itertools

import numpy as np
import pytest

from experiments import sentences

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


@pytest.fixture
def folder(tmp_path):
    """A small STS-B and a small CoLA, and a vocabulary."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))

    def write(task, split, lines):
        (tmp_path / task).mkdir(exist_ok=True)
        path = tmp_path / task / f"{split}.tsv.gz"
        path.write_bytes(gzip.compress("\n".join(lines).encode()))

    pairs = [f"{x} b\t{x} c d\t{i}" for i, x in enumerate("abcdefgh")]
    # The first pair comes back, and one sentence is far too long.
    pairs += ["a b\th g\t1", "a a a a a a a a a a a a\te e\t2"]
    write("STS-B", "train", ["sentence1\tsentence2\tscore", *pairs])
    write("STS-B", "dev", ["sentence1\tsentence2\tscore", "a\tb\t5", "c d\te\t0"])
    write("CoLA", "train", ["x\t1\t\tf f f", "x\t0\t\ta b", "x\t0\t\tg g"])
    return tmp_path


def load(folder, **changes):
    options = {"length": 8, "val_fraction": 0.2} | changes
    names = options.pop("names", ("stsb", "cola"))
    path = str(folder / "vocab.txt")
    return sentences.load(names, directory=str(folder), tokenizer=path, **options)


def text(split):
    return [
        " ".join(WORDS[i] for i in row[mask][1:-1])
        for row, mask in zip(split.tokens, split.mask, strict=True)
    ]


def test_sentences_are_unique_whole_and_apart_from_the_held_out_pairs(folder):
    texts = load(folder)
    train, val = text(texts.train), text(texts.val)
    assert len(val) == 4
    assert len(set(train)) == len(train)
    assert not set(train) & set(val)
    assert {"f f f", "g g"} <= set(train)
    assert not any(sentence.startswith("a a a") for sentence in train)
    assert text(load(folder, train_size=5).train) == train[:5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("stsb", "qqp")}, "texts must be of sst2, mrpc"),
        ({"names": ()}, "texts must be of sst2, mrpc"),
        ({"names": ("cola",)}, "texts must begin with a set of pairs"),
        ({"val_fraction": 0.0}, "and val_fraction hold some out"),
        ({"train_size": 99}, "train_size must be at most"),
    ],
)
def test_what_cannot_be_loaded(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **changes)


def test_pairs_stand_one_after_the_other(folder):
    path = str(folder / "vocab.txt")
    split, labels = sentences.pairs(
        "stsb", str(folder), "dev", tokenizer=path, length=8
    )
    assert text(split) == ["a", "b", "c d", "e"]
    np.testing.assert_allclose(labels, [1.0, 0.0])


def test_batches_lose_the_columns_nobody_needs():
    mask = np.arange(20) < np.array([3, 8, 9, 20])[:, None]
    split = sentences.Sentences(np.where(mask, 7, 0).astype(np.int32), mask)
    widths = {
        rows: split.__getitems__(np.array(rows))["tokens"].shape[1]
        for rows in ((0,), (0, 1), (2, 0), (3,))
    }
    assert widths == {(0,): 8, (0, 1): 8, (2, 0): 16, (3,): 20}
    halves = sentences.Sentences(split.tokens, mask, step=10)
    assert halves.__getitems__(np.array([2]))["mask"].shape == (1, 10)


def test_an_epoch_has_every_sentence_once_in_batches_of_similar_length():
    lengths = np.random.default_rng(0).integers(1, 40, 103)
    mask = np.arange(40) < lengths[:, None]
    split = sentences.Sentences(mask.astype(np.int32), mask)
    loader = sentences.SimilarLengths(split, 10, 0)
    epochs = [
        np.stack([loader.indices(epoch * 10 + step) for step in range(10)])
        for epoch in range(3)
    ]
    for rows in epochs:
        assert len(np.unique(rows)) == 100
        own = lengths[rows]
        # Sorted, the batches do not overlap.
        ends = sorted((batch.min(), batch.max()) for batch in own)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
        assert [batch.min() for batch in own] != sorted(batch.min() for batch in own)
    assert {i for rows in epochs for i in rows.flat} == set(range(103))
    again = sentences.SimilarLengths(split, 10, 0).indices(17)
    np.testing.assert_array_equal(again, epochs[1][7])
    other = sentences.SimilarLengths(split, 10, 1).indices(17)
    assert not np.array_equal(other, again)


def test_processes_share_a_batch():
    texts = sentences.synthetic(12).train
    whole = sentences.SimilarLengths(texts, 8, 0).indices(3)
    parts = [sentences.SimilarLengths(texts, 8, 0, i, 2).batch(3) for i in range(2)]
    expected = texts.tokens[whole]
    got = [
        np.pad(part["tokens"], ((0, 0), (0, 12 - part["tokens"].shape[1])))
        for part in parts
    ]
    np.testing.assert_array_equal(np.concatenate(got), expected)
