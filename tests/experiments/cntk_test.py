"""Features of convolutional kernels: images, measurements, a resumed run, mistakes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cntk, load_config


def quick(**changes):
    small = {
        "error.num_features": (64,),
        "accuracy.num_features": (64,),
        "cost.images": (16,),
        "exact.error_images": 3,
        "exact.block": 2,
        "slice_size": 32,
        **changes,
    }
    return load_config("configs/cntk_cifar10.py:quicktest", small)


def test_whitened_images_are_white_and_of_one_size():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(48, 48))
    x = (rng.normal(size=(600, 48)) @ mixing).reshape(600, 4, 4, 3)
    mean, matrix = cntk._fit_whitening(jnp.asarray(x), 1e-6)
    flat = cntk._whiten(x, mean, matrix).reshape(600, 48)
    np.testing.assert_allclose(np.mean(flat**2, axis=1), 1, rtol=1e-3)
    values = np.linalg.eigvalsh(flat.T @ flat / 600)
    # One direction is lost to the mean of each image.
    assert values[2] > 0.7
    assert values[-1] < 1.4
    raw = np.linalg.eigvalsh(np.cov(x.reshape(600, 48).T))
    assert raw[-1] > 100 * raw[2]


def test_slices_have_one_shape_and_miss_no_row():
    x = np.arange(70.0).reshape(70, 1)
    parts = list(cntk._slices(x, 32))
    assert [part.shape for part, _ in parts] == [(32, 1)] * 3
    np.testing.assert_array_equal(np.concatenate([p[:n] for p, n in parts]), x)


def test_padding_does_not_count():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(70, 5)).astype(np.float32)
    y = rng.integers(0, 3, 70)
    said = []
    stats = cntk._gather(jnp.asarray, 5, 3, 32, said.append, x, y, "rows")
    assert int(stats.rows) == 70
    assert said[-1] == "rows: 70 of 70 images"
    centred = x - np.asarray(stats.phi_shift)[None]
    gram = np.asarray(stats.gram.high) + np.asarray(stats.gram.low)
    np.testing.assert_allclose(np.triu(gram), np.triu(centred.T @ centred), rtol=1e-4)


def test_networks_are_those_of_the_names():
    count = {
        name: sum(type(layer).__name__ == "Conv" for layer in cntk.network(name).layers)
        for name in cntk.NETS
    }
    assert count == {"myrtle5": 4, "myrtle7": 6}


@pytest.mark.slow
def test_a_run_reports_and_is_not_repeated(tmp_path, monkeypatch):
    rows = cntk.run(quick(), tmp_path, "the command")
    studies = [row["study"] for row in rows]
    assert studies == ["accuracy", "exact", "error", "cost"]
    accuracy, exact, error, cost = rows
    assert [point["images"] for point in accuracy["curve"]] == [100, 320]
    assert accuracy["curve"][-1]["accuracy"] > 0.5  # ten classes
    assert exact["pair_s"] > 0
    assert 0 < error["error"] < 0.3
    assert cost["seconds"] > 0
    text = (tmp_path / "report.md").read_text()
    assert "the command" in text
    assert "extrapolated" in text
    assert (tmp_path / "accuracy.png").is_file()
    monkeypatch.setattr(cntk, "make_features", None)
    monkeypatch.setattr(cntk, "_exact", None)
    assert cntk.run(quick(), tmp_path) == rows
    stored = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["study"] for line in stored] == studies


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nets": ("myrtle6",)}, "config.nets must be among"),
        ({"data.name": "mnist"}, "config.data.name must be among"),
        ({"data.image_size": 10}, "image_size must be a multiple of 4"),
        ({"slice_size": 0}, "config.slice_size must be positive"),
        ({"accuracy.images": ()}, "must not be empty"),
        ({"zca": -1.0}, "config.zca must not be negative"),
        ({"error.num_features": (0,)}, "must name numbers of features"),
        ({"width": (8,)}, "width must be one positive number for each of 3"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        quick(**changes)


def test_without_data_it_says_what_to_pass(tmp_path):
    config = load_config("configs/cntk_cifar10.py", {"data.dir": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="--config.data.dir=FOLDER"):
        cntk.run(config, tmp_path / "run")


@pytest.mark.parametrize("arg", ["", "full", "gpu"])
def test_every_argument_gives_a_config(arg):
    config = load_config(f"configs/cntk_cifar10.py:{arg}")
    assert config.name == "cntk_cifar10" + (f"_{arg}" if arg else "")
    with pytest.raises(ValueError, match="must be full, gpu or quicktest"):
        load_config("configs/cntk_cifar10.py:other")
