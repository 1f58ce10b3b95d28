"""NTK features and exact kernels on images: accuracy, rows, resume, mistakes."""

import json
import re

import numpy as np
import pytest

from experiments import load_config, ntk_images, ridge_images


def quick(**changes):
    return load_config("configs/ntk_mnist.py:quicktest", changes)


@pytest.fixture(scope="module")
def digits():
    return ridge_images.load_images("digits", "")


def test_the_exact_kernel_classifies_digits(digits):
    row = ntk_images.measure_exact(400, digits, quick())
    assert row["accuracy"] > 0.9
    assert row["kernel_s"] <= row["seconds"]


def test_images_of_norm_one_and_centred_ones(digits):
    mean, scale = ridge_images.pixel_scale(digits)
    x = np.concatenate([digits.x_train[:5], np.zeros((1, 8, 8), np.uint8)])
    unit = ridge_images.prepared(x, mean, scale, unit=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), [1] * 5 + [0], rtol=1e-6)
    centred = ridge_images.prepared(digits.x_train, mean, scale)
    np.testing.assert_allclose(np.mean(centred, axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.mean(np.sum(centred**2, axis=1)), 1, rtol=1e-5)


@pytest.mark.slow
def test_features_come_near_the_exact_kernel(digits):
    """Of as many images: those of both fit the same 400."""
    few = ridge_images.Images(
        digits.x_train[:400], digits.y_train[:400], digits.x_test, digits.y_test
    )
    config = quick(select_features=1024)
    exact = ntk_images.measure_exact(400, few, config)
    for method, size in (("features", 1024), ("landmarks", 200)):
        row = ntk_images.measure_features(method, size, 0, few, config)
        assert abs(row["accuracy"] - exact["accuracy"]) < 0.03


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    config = quick()
    rows = ntk_images.run(config, tmp_path, "command")
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == len(rows) == 5
    marked = json.loads(lines[0]) | {"seconds": 123.0}
    file.write_text("\n".join([json.dumps(marked), *lines[2:]]) + "\n")
    again = ntk_images.run(config, tmp_path, "command")
    assert again[0]["seconds"] == 123.0
    np.testing.assert_allclose(again[1]["accuracy"], rows[1]["accuracy"], atol=0.01)
    report = (tmp_path / "report.md").read_text()
    assert re.search(r"^\| exact kernel +\|", report, re.MULTILINE)
    assert (tmp_path / "accuracy.png").is_file()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.name", "svhn", "config.data.name must be mnist or digits"),
        ("pixels", "raw", "config.pixels must be unit or centred. Got 'raw'"),
        ("depth", 0, "config.depth must be positive. Got 0"),
        ("num_features", (8,), "config.num_features must be at least 64"),
        ("landmarks", (63,), "config.landmarks must be at least 64"),
        ("exact_rows", (5,), "config.exact_rows must be at least 20"),
        ("val_fraction", 1.0, "config.val_fraction must be in"),
        ("seeds", (), "config.seeds must not be empty"),
    ],
)
def test_mistakes_are_found_before_any_work(key, value, words):
    with pytest.raises(ValueError, match=words):
        quick(**{key: value})


@pytest.mark.slow
@pytest.mark.parametrize("key", ["exact_rows", "landmarks"])
def test_more_rows_than_images(key, tmp_path):
    with pytest.raises(ValueError, match=f"config.{key} must be at most 1347"):
        ntk_images.run(quick(**{key: (2000,)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_that_are_missing(tmp_path):
    config = load_config("configs/ntk_mnist.py")
    with pytest.raises(FileNotFoundError, match="config.data.dir"):
        ntk_images.run(config, tmp_path / "run")


def test_the_argument():
    with pytest.raises(ValueError, match="must be large or quicktest. Got 'fast'"):
        load_config("configs/ntk_mnist.py:fast")
