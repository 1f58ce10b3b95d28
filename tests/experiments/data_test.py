import gzip
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments import data as data_lib
from experiments.data import from_float, load, mnist_arrays
from experiments.loading import TrainLoader, eval_batches


def test_from_float_quantises():
    got = from_float(np.array([0.0, 8.0, 16.0]), 16.0)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, [0, 128, 255])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, np.nan, np.inf], "finite. Got 2 non-finite"),
        ([-1.0, 2.0], r"lie in \[0, 16.0\]. Got \[-1.0, 2.0\]"),
        ([0.0, 17.0], r"lie in \[0, 16.0\]. Got \[0.0, 17.0\]"),
    ],
)
def test_from_float_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        from_float(np.array(values), 16.0)


def test_non_finite_digits_are_refused(monkeypatch):
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    digits.images[3, 0, 0] = np.nan
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: digits)
    with pytest.raises(ValueError, match=r"images must be finite. Got 1 non-finite"):
        load("digits", image_size=8)


@pytest.mark.parametrize("image_size", [8, 16])
def test_digits(image_size):
    dataset = load("digits", image_size=image_size)
    # 1797 scans: 450 of the last writers for testing, a tenth of the rest held out.
    assert len(dataset.test) == 450
    assert len(dataset.val) == 135
    assert len(dataset.train) == 1212
    for split in (dataset.train, dataset.val, dataset.test):
        batch = split.__getitems__(np.arange(len(split)))
        assert batch["image"].shape[1:] == (image_size, image_size, 3)
        assert batch["image"].dtype == np.uint8
        assert set(batch["label"]) == set(range(dataset.num_classes))
        assert batch["image"].max() > 200
        assert batch["image"].min() == 0


def test_the_cut_is_disjoint_and_seeded():
    def rows(**options):
        dataset = load("digits", image_size=8, **options)
        return set(dataset.train.rows), set(dataset.val.rows)

    train, val = rows()
    assert not train & val
    assert train | val == set(range(1347))
    assert rows() == (train, val)
    assert rows(split_seed=1) != (train, val)
    smaller, same_val = rows(train_size=100)
    assert len(smaller) == 100
    assert smaller < train
    assert same_val == val


def test_subset_of_the_test_split():
    dataset = load("digits", image_size=8, test_size=50)
    assert len(dataset.test) == 50
    assert len(set(dataset.test.rows)) == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnits"}, "data.name must be one of digits, .*tfds:NAME. Got 'mnits"),
        ({"train_size": 1213}, "data.train_size must be at most 1212. Got 1213"),
        ({"test_size": 451}, "data.test_size must be at most 450. Got 451"),
        ({"val_fraction": 0.0}, "data.val_fraction .*Got 0.0 of 1347"),
        ({"val_fraction": 1.0}, "data.val_fraction .*Got 1.0 of 1347"),
    ],
)
def test_load_errors(options, message):
    with pytest.raises(ValueError, match=message):
        load(**({"name": "digits", "image_size": 8} | options))


@pytest.mark.parametrize("name", ["cifar10_jpeg", "tinyimagenet32"])
@pytest.mark.parametrize("directory", ["", "absent"])
def test_a_missing_folder_says_what_to_pass(name, directory):
    with pytest.raises(FileNotFoundError, match=r"Got .*--config.data.dir=FOLDER"):
        load(name, image_size=32, directory=directory)


def test_synthetic_classes_look_different():
    dataset = load("synthetic", image_size=8)
    batch = dataset.train.__getitems__(np.arange(len(dataset.train)))
    assert set(batch["label"]) == set(range(10))
    means = [batch["image"][batch["label"] == k].mean(0) for k in range(10)]
    for a in range(10):
        for b in range(a):
            assert np.abs(means[a] - means[b]).max() > 50


def write_npz(path, **counts):
    """A small file in the layout of the real ones."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in counts.items():
        files = []
        for _ in range(n):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(
                stream, "JPEG"
            )
            files.append(stream.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = rng.integers(0, 10, n)
    np.savez(path, **arrays)


@pytest.mark.parametrize("image_size", [32, 16])
def test_cifar10_layout(tmp_path, image_size):
    write_npz(tmp_path / "cifar10_q75jpeg.npz", train=20, test=5)
    dataset = load("cifar10_jpeg", image_size=image_size, directory=str(tmp_path))
    sizes = [len(s) for s in (dataset.train, dataset.val, dataset.test)]
    assert sizes == [18, 2, 5]
    batch = dataset.test.__getitems__(np.arange(5))
    assert batch["image"].shape == (5, image_size, image_size, 3)
    assert batch["label"].dtype == np.int32


def test_tinyimagenet_layout(tmp_path):
    write_npz(tmp_path / "tinyimagenet32_q75jpeg.npz", train=20, val=5)
    dataset = load("tinyimagenet32", image_size=32, directory=str(tmp_path))
    assert [len(s) for s in (dataset.train, dataset.val)] == [20, 5]
    assert dataset.test is dataset.val
    assert dataset.num_classes == 200


def test_flowers_keeps_the_first_of_pictures_that_are_there_twice(tmp_path):
    write_npz(tmp_path / "one.npz", train=20)
    with np.load(tmp_path / "one.npz") as found:
        blob, offsets = found["train_jpeg"], found["train_offsets"]
    copied = blob[offsets[3] : offsets[4]]
    np.savez(
        tmp_path / "flowers5_128_jpeg.npz",
        jpeg=np.concatenate([blob, copied]),
        offsets=np.append(offsets, offsets[-1] + len(copied)),
        labels=np.append(np.arange(20) % 5, 4),
    )
    dataset = load("flowers5", image_size=16, directory=str(tmp_path))
    sizes = [len(s) for s in (dataset.train, dataset.val, dataset.test)]
    assert sizes == [14, 2, 4]
    assert dataset.num_classes == 5
    labels = [
        split.__getitems__(np.arange(len(split)))["label"]
        for split in (dataset.train, dataset.val, dataset.test)
    ]
    np.testing.assert_array_equal(np.bincount(np.concatenate(labels)), [4] * 5)


@pytest.mark.slow
def test_real_flowers(data_dir):
    folder = data_dir("flowers5_128_jpeg")
    splits = [load("flowers5", image_size=16, directory=str(folder)) for _ in range(2)]
    dataset = splits[0]
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [
        3_104,
        345,
        862,
    ]
    images = [
        split.__getitems__(np.arange(len(split)))["image"]
        for split in (dataset.train, dataset.val, dataset.test)
    ]
    whole = np.concatenate(images).reshape(4_311, -1)
    assert len(np.unique(whole, axis=0)) == 4_311
    again = splits[1].test.__getitems__(np.arange(862))["image"]
    np.testing.assert_array_equal(images[2], again)


@pytest.mark.slow
def test_real_cifar10(data_dir):
    folder = data_dir("cifar10_jpeg")
    dataset = load("cifar10_jpeg", image_size=32, directory=str(folder))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [
        45_000,
        5_000,
        10_000,
    ]
    batch = dataset.test.__getitems__(np.arange(10_000))
    np.testing.assert_array_equal(np.bincount(batch["label"]), [1000] * 10)


@pytest.mark.slow
def test_real_tinyimagenet(data_dir):
    folder = data_dir("tinyimagenet32_jpeg")
    dataset = load("tinyimagenet32", image_size=32, directory=str(folder))
    assert len(dataset.train) == 100_000
    batch = dataset.val.__getitems__(np.arange(len(dataset.val)))
    np.testing.assert_array_equal(np.bincount(batch["label"]), [50] * 200)


@pytest.mark.filterwarnings("default")  # tfds' own
@pytest.mark.parametrize(("name", "image_size"), [("mnist", 16), ("cifar10", 32)])
def test_tfds(monkeypatch, name, image_size):
    # The mock's own __getitems__ wants a self that MagicMock does not pass (4.9.10).
    monkeypatch.setattr(
        "tensorflow_datasets.testing.mocking._getitems",
        lambda keys, generator: [generator[key] for key in keys],
    )
    with tfds.testing.mock_data(num_examples=20):
        dataset = load(f"tfds:{name}", image_size=image_size)
        assert (len(dataset.train), len(dataset.val)) == (18, 2)
        assert dataset.num_classes == 10
        batch = TrainLoader(dataset.train, 4, seed=0).batch(0)
        assert batch["image"].shape == (4, image_size, image_size, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        (evaluated, *_) = eval_batches(dataset.val, 4)
        assert evaluated["image"].shape == (4, image_size, image_size, 3)
        np.testing.assert_array_equal(evaluated["weight"], [1, 1, 0, 0])


@pytest.mark.filterwarnings("default")  # tfds' own
def test_tfds_that_is_not_prepared_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be prepared as array_record"):
        load("tfds:mnist", image_size=28, directory=str(tmp_path))


class Listing:
    """A split as tfds makes them: a list of examples for a list of ints."""

    def __init__(self, image):
        self.image = image

    def __len__(self):
        return 2

    def __getitems__(self, keys):
        if not keys:  # an array would raise here, as in tfds
            return []
        return [{"image": self.image, "label": np.int64(key)} for key in keys]


@pytest.mark.parametrize("shape", [(6, 4, 1), (6, 4, 3), (5, 5, 1), (5, 5, 3)])
def test_resized_makes_rgb_squares(shape):
    split = data_lib.Resized(Listing(np.full(shape, 7, np.uint8)), 5)
    batch = split.__getitems__(np.array([1, 0]))
    np.testing.assert_array_equal(batch["image"], np.full((2, 5, 5, 3), 7))
    np.testing.assert_array_equal(batch["label"], [1, 0])


def write_idx(path, array):
    """An idx file of bytes, written from its published description."""
    header = bytes([0, 0, 8, array.ndim])
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + sizes + array.tobytes()))


def write_mnist(folder, train=6, test=3):
    rng = np.random.default_rng(0)
    written = []
    for split, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (n, 28, 28), np.uint8)
        labels = rng.integers(0, 10, n, np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
        written += [images, labels]
    return written


def test_mnist_arrays(tmp_path):
    written = write_mnist(tmp_path)
    arrays = mnist_arrays(tmp_path)
    for got, expected in zip(arrays, written, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert [a.dtype for a in arrays] == [np.uint8, np.int32, np.uint8, np.int32]


def test_mnist_files_that_are_missing_cut_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images.*--config.data.dir="):
        mnist_arrays(tmp_path)
    write_mnist(tmp_path)
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = gzip.decompress(file.read_bytes())
    for bad in (content[:-1], content[:2] + b"\x0d" + content[3:], b""):
        file.write_bytes(gzip.compress(bad))
        with pytest.raises(ValueError, match=r"t10k-labels.* must be a whole idx file"):
            mnist_arrays(tmp_path)


def test_real_mnist(data_dir):
    x_train, y_train, x_test, y_test = mnist_arrays(data_dir("mnist"))
    assert x_train.shape == (60_000, 28, 28)
    assert x_test.shape == (10_000, 28, 28)
    assert y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    # The published mean and deviation of the training pixels.
    assert abs(x_train.mean() / 255 - 0.1307) < 1e-4
    assert abs(x_train.std() / 255 - 0.3081) < 1e-4
