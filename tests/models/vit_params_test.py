import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from snnk_jax.models.vit import ViT, ViTConfig, resize_position_embedding
from snnk_jax.models.vit_params import load_vit, read_config, save_vit
from snnk_jax.testing import call

CONFIG = ViTConfig(
    hidden_size=8,
    depth=1,
    num_heads=2,
    mlp_dim=12,
    image_size=8,
    patch_size=4,
    num_classes=5,
)


@pytest.fixture
def model():
    model = ViT(CONFIG, rngs=nnx.Rngs(0))
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), (8, 5))
    return model


@pytest.fixture
def path(model, tmp_path):
    path = tmp_path / "vit.safetensors"
    save_vit(path, model)
    return path


def rewrite(path, change=None, **metadata):
    """Writes the file again with other tensors or another header."""
    with safe_open(path, framework="numpy") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    header.update(metadata)
    save_file(tensors, path, {k: v for k, v in header.items() if v is not None})


def assert_same(a, b):
    a, b = nnx.state(a), nnx.state(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_is_bit_exact(model, path):
    loaded = load_vit(path)
    assert loaded.config == CONFIG
    assert_same(loaded, model)
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    np.testing.assert_array_equal(call(loaded, images), call(model, images))


def test_a_rectangle_survives_the_header(tmp_path):
    config = ViTConfig(
        hidden_size=8, depth=1, num_heads=2, mlp_dim=12, image_size=(8, 4), patch_size=4
    )
    save_vit(tmp_path / "vit.safetensors", ViT(config, rngs=nnx.Rngs(0)))
    assert read_config(tmp_path / "vit.safetensors") == config


@pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16])
def test_half_precision_storage(model, tmp_path, dtype):
    path = tmp_path / "half.safetensors"
    save_vit(path, model, dtype=dtype)
    with safe_open(path, framework="numpy") as file:
        assert file.get_tensor("head.kernel").dtype == jnp.dtype(dtype)
    loaded = load_vit(path)
    assert loaded.head.kernel[...].dtype == jnp.float32
    rounded = jax.tree.map(
        lambda x: x.astype(dtype).astype(jnp.float32), nnx.state(model)
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), rounded)


def test_dtypes_of_the_loaded_model(path):
    loaded = load_vit(path, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(loaded))} == {
        jnp.dtype("float16")
    }
    # jax.nn.dot_product_attention and nnx.LayerNorm promote inside.
    with jax.numpy_dtype_promotion("standard"):
        assert call(loaded, jnp.zeros((1, 8, 8, 3))).dtype == jnp.bfloat16


def test_metadata_is_kept(model, tmp_path):
    path = tmp_path / "vit.safetensors"
    save_vit(path, model, metadata={"licence": "Apache-2.0"})
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["licence"] == "Apache-2.0"


def test_image_size_resamples_the_positions(model, path):
    loaded = load_vit(path, image_size=16)
    assert loaded.config.grid == (4, 4)
    expected = resize_position_embedding(
        model.position_embedding[...], CONFIG.grid, (4, 4)
    )
    np.testing.assert_array_equal(loaded.position_embedding[...], expected)
    np.testing.assert_array_equal(loaded.head.kernel[...], model.head.kernel[...])
    assert call(loaded, jnp.zeros((1, 16, 16, 3))).shape == (1, 5)


def test_num_classes_puts_a_zero_head(model, path):
    loaded = load_vit(path, num_classes=3)
    np.testing.assert_array_equal(loaded.head.kernel[...], np.zeros((8, 3)))
    np.testing.assert_array_equal(loaded.head.bias[...], np.zeros(3))
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    np.testing.assert_array_equal(loaded.features(images), model.features(images))


@pytest.mark.parametrize("read", [load_vit, read_config])
def test_missing_file(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"existing file. Got .*absent"):
        read(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_file(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"whole safetensors file. Got .*vit.safeten"):
        load_vit(path)


@pytest.mark.parametrize("read", [load_vit, read_config])
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "other"}, "format snnk_jax.vit.1. Got 'other' in .*vit.safeten"),
        ({"format": None}, "format snnk_jax.vit.1. Got None in .*vit.safetensors"),
        ({"config": None}, "header must hold .*Got .*vit.safetensors.*config"),
        ({"config": "{"}, "header must hold .*Got .*vit.safetensors"),
        ({"config": "[]"}, "header must hold .*Got .*vit.safetensors"),
        ({"config": '{"width": 8}'}, "header must hold .*vit.safetensors.*TypeError"),
        ({"config": '{"depth": 2}'}, "header must hold .*vit.safetensors.*TypeError"),
    ],
)
def test_tampered_header(path, read, metadata, message):
    rewrite(path, **metadata)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_header_with_another_size(path):
    with safe_open(path, framework="numpy") as file:
        config = json.loads(file.metadata()["config"])
    rewrite(path, config=json.dumps(config | {"mlp_dim": 16}))
    message = r"blocks.0.mlp.fc1.kernel \(8, 12\) instead of \(8, 16\)"
    with pytest.raises(ValueError, match=message):
        load_vit(path)


def test_every_wrong_name_is_listed(path):
    def change(tensors):
        del tensors["blocks.0.norm1.scale"]
        del tensors["head.bias"]
        tensors["surplus"] = np.zeros(2, np.float32)
        tensors["norm.bias"] = np.zeros(7, np.float32)

    rewrite(path, change)
    with pytest.raises(ValueError, match="exactly the parameters") as error:
        load_vit(path)
    message = str(error.value)
    assert "missing ['blocks.0.norm1.scale', 'head.bias']" in message
    assert "unexpected ['surplus']" in message
    assert "misshapen ['norm.bias (7,) instead of (8,)']" in message


def test_a_missing_position_embedding_is_named(path):
    rewrite(path, lambda tensors: tensors.pop("position_embedding"))
    with pytest.raises(ValueError, match=r"missing .'position_embedding'."):
        load_vit(path, image_size=16)


def test_a_misshapen_position_embedding_is_named_when_resized(path):
    def change(tensors):
        tensors["position_embedding"] = np.zeros((2, 8), np.float32)

    rewrite(path, change)
    with pytest.raises(ValueError, match=r"position_embedding|embedding must have"):
        load_vit(path, image_size=16)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_parameters_are_refused(model, tmp_path, value):
    model.norm.scale[...] = model.norm.scale[...].at[:2].set(value)
    with pytest.raises(ValueError, match="scale must be finite in float32"):
        save_vit(tmp_path / "vit.safetensors", model)
    assert list(tmp_path.iterdir()) == []


def test_overflow_of_the_storage_dtype_is_refused(model, tmp_path):
    model.norm.scale[...] = model.norm.scale[...].at[0].set(1e6)
    with pytest.raises(ValueError, match="scale must be finite in float16"):
        save_vit(tmp_path / "vit.safetensors", model, dtype="float16")


def test_a_failed_write_keeps_the_old_file(model, path, monkeypatch):
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_vit(path, model, dtype="float16")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_write_leaves_nothing_else_behind(model, path):
    save_vit(path, model, dtype="float16")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "overrides", [{"num_heads": 1}, {"depth": 2}, {"pool": "cls"}, {"patch_size": 2}]
)
def test_what_the_weights_fix_is_not_overridden(path, overrides):
    """Another number of heads has parameters of the same shapes."""
    with pytest.raises(ValueError, match="overrides must be among"):
        load_vit(path, **overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 8.0}, "hidden_size must be a whole number"),
        ({"depth": True}, "depth must be a whole number"),
        ({"num_classes": 1.5}, "num_classes must be a whole number"),
        ({"image_size": [8.0, 8.0]}, "image_size must be one or two whole numbers"),
        ({"image_size": [8]}, "image_size must be one or two whole numbers"),
        ({"remat": "yes"}, "remat must be true or false"),
    ],
)
def test_sizes_of_a_header_are_whole_numbers(path, change, message, unchecked):
    with safe_open(path, framework="numpy") as file:
        config = json.loads(file.metadata()["config"])
    rewrite(path, config=json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_vit(path)


def test_a_header_does_not_make_the_reader_build_what_is_not_there(path):
    with safe_open(path, framework="numpy") as file:
        config = json.loads(file.metadata()["config"])
    rewrite(path, config=json.dumps(config | {"depth": 10**9}))
    with pytest.raises(ValueError, match="tensors holds no more. Got"):
        load_vit(path)
    rewrite(path, config="[" * 100_000)
    with pytest.raises(ValueError, match="header must hold"):
        load_vit(path)
