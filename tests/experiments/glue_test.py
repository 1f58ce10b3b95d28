import gzip

import numpy as np
import pytest

from experiments import glue

SIZES = {
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "rte": (2490, 277),
    "cola": (8551, 1043),
    "stsb": (5749, 1500),
}
# Shares of the second class, or means, of the development sets as GLUE publishes them.
MEANS = {"sst2": 444 / 872, "mrpc": 279 / 408, "rte": 131 / 277, "cola": 721 / 1043}


@pytest.mark.parametrize("name", SIZES)
def test_the_published_files(name, data_dir):
    task = glue.TASKS[name]
    folder = str(data_dir("glue"))
    train, dev = (glue.read(task, folder, split) for split in ("train", "dev"))
    assert (len(train[1]), len(dev[1])) == SIZES[name]
    for texts, labels in (train, dev):
        assert len(texts) == len(labels)
        assert {len(parts) for parts in texts} == {len(task.texts)}
        assert all(part for parts in texts[:500] for part in parts)
    if name == "stsb":
        assert dev[1].dtype == np.float32
        assert (dev[1].min(), dev[1].max()) == (0, 1)
    else:
        assert dev[1].dtype == np.int32
        assert np.mean(dev[1]) == pytest.approx(MEANS[name])


@pytest.fixture
def folder(tmp_path):
    """A made-up RTE, a vocabulary, and what the texts become."""
    pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "rains", "is", "wet"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "RTE").mkdir()
    lines = ["index\tsentence1\tsentence2\tlabel"]
    for i in range(10):
        label = "entailment" if i % 2 else "not_entailment"
        lines.append(f"{i}\tit rains\tit is wet\t{label}")
    for split in ("train", "dev"):
        data = gzip.compress("\n".join(lines).encode("utf-8-sig"))
        (tmp_path / "RTE" / f"{split}.tsv.gz").write_bytes(data)
    return tmp_path


def load(folder, **options):
    options = {"length": 9, "val_fraction": 0.2} | options
    tokenizer = str(folder / "vocab.txt")
    return glue.load("glue:rte", directory=str(folder), tokenizer=tokenizer, **options)


def test_pairs_become_tokens_and_the_validation_part_is_cut_off(folder):
    dataset = load(folder)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (8, 2, 10)
    assert (dataset.num_classes, dataset.metric) == (2, "accuracy")
    batch = dataset.test.__getitems__(np.arange(2))
    np.testing.assert_array_equal(batch["tokens"][0], [2, 5, 6, 3, 5, 7, 8, 3, 0])
    np.testing.assert_array_equal(batch["token_types"][0], [0] * 4 + [1] * 4 + [0])
    np.testing.assert_array_equal(batch["mask"][0], [True] * 8 + [False])
    np.testing.assert_array_equal(batch["label"], [1, 0])


def test_cut_texts_are_told(folder, capsys):
    load(folder)
    assert "cut" not in capsys.readouterr().out
    load(folder, length=7)
    assert "glue:rte dev: 100.0% of the texts are cut to 7" in capsys.readouterr().out


def test_subsets(folder):
    dataset = load(folder, train_size=3, test_size=4)
    assert (len(dataset.train), len(dataset.test)) == (3, 4)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("11\tit rains", "Got line 12"),
        ("11\tit\tis\tmaybe", "Got line 12: .*maybe"),
    ],
)
def test_a_damaged_line_is_named(folder, line, words):
    path = folder / "RTE" / "train.tsv.gz"
    data = gzip.decompress(path.read_bytes()) + b"\n" + line.encode()
    path.write_bytes(gzip.compress(data))
    with pytest.raises(ValueError, match=f"train.tsv.gz of RTE must hold .* {words}"):
        load(folder)


def test_another_header_is_refused(folder):
    path = folder / "RTE" / "train.tsv.gz"
    path.write_bytes(gzip.compress(b"index\ttext\tlabel\n"))
    with pytest.raises(
        ValueError, match="must have a column 'sentence1'. Got .'index'"
    ):
        load(folder)


def test_missing_files_and_names(folder):
    with pytest.raises(FileNotFoundError, match="holds CoLA/train.tsv.gz"):
        glue.read(glue.TASKS["cola"], str(folder), "train")
    with pytest.raises(FileNotFoundError, match="config.data.dir=FOLDER"):
        glue.read(glue.TASKS["cola"], "", "train")
    for name in ("glue:qqp", "rte"):
        with pytest.raises(ValueError, match="data.name must be one of glue:sst2"):
            glue.load(name, directory="", tokenizer="", length=9)


def test_made_up_text_tells_its_class_by_one_word():
    dataset = glue.load("synthetic_text", directory="", tokenizer="", length=12)
    batch = dataset.train.__getitems__(np.arange(50))
    np.testing.assert_array_equal((batch["tokens"] == 8).any(1), batch["label"] == 1)
    np.testing.assert_array_equal((batch["tokens"] == 7).any(1), batch["label"] == 0)
    assert not batch["tokens"][~batch["mask"]].any()
    assert 0 < batch["label"].mean() < 1


def rewrite(folder, text):
    data = gzip.compress(text.encode()) if isinstance(text, str) else text
    (folder / "RTE" / "train.tsv.gz").write_bytes(data)


@pytest.mark.parametrize(
    ("task", "label"), [("mrpc", "7"), ("mrpc", "-1"), ("stsb", "nan"), ("cola", "2")]
)
def test_labels_that_the_task_does_not_have_are_refused(task, label, tmp_path):
    own = glue.TASKS[task]
    names = {
        "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        "stsb": "score\tsentence1\tsentence2\n",
        "cola": "",
    }
    lines = {
        "mrpc": f"{label}\t1\t2\ta\tb\n",
        "stsb": f"{label}\ta\tb\n",
        "cola": f"x\t{label}\t\ta\n",
    }
    (tmp_path / own.folder).mkdir()
    data = gzip.compress((names[task] + lines[task]).encode())
    (tmp_path / own.folder / "train.tsv.gz").write_bytes(data)
    with pytest.raises(ValueError, match="must hold texts and labels as GLUE"):
        glue.read(own, str(tmp_path), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index\tsentence1\tsentence2\tlabel\n", "must hold examples. Got none"),
        (b"no gzip", "must be whole gzipped text"),
        (gzip.compress(b"index" * 1000)[:-20], "must be whole gzipped text"),
        (gzip.compress("Ä".encode("latin1")), "must be whole gzipped text"),
    ],
    # The bytes hold the second in which each worker made them.
    ids=["no examples", "no gzip", "cut short", "no UTF-8"],
)
def test_files_without_text_are_refused_by_name(folder, content, message):
    rewrite(folder, content)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "train.tsv.gz" in str(error.value)
