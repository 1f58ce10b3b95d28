import dataclasses
import io
import json
import pathlib
import re
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special
from flax import nnx
from safetensors.numpy import save_file

from snnk_jax.models.vit import ViT, ViTConfig
from snnk_jax.models.vit_import import import_vit
from snnk_jax.models.vit_params import save_vit

# Far from every default: a loader that does not read it is found out.
EPS = 3e-3
CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 6,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": EPS,
    "qkv_bias": True,
    "id2label": {"0": "LABEL_0"},
}
# The sizes of every file here; what the npz files leave open is as they mean it.
OURS = ViTConfig(
    hidden_size=8,
    depth=2,
    num_heads=2,
    mlp_dim=12,
    image_size=6,
    patch_size=2,
    num_classes=3,
    activation="gelu_tanh",
)
BLOCK = "Transformer/encoderblock_{}"
POSITION = "Transformer/posembed_input/pos_embedding"
POOLER = {"pooler.dense.bias", "pooler.dense.weight"}


def random_arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: np.float32(rng.normal(size=shape) * 0.5) for name, shape in shapes.items()
    }


def make_hugging_face(pooler=False, classes=3):
    """A random ViT as Hugging Face names it: weights are ``[out, in]``."""

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name):
        return {f"{name}.weight": (8,), f"{name}.bias": (8,)}

    projection = "embeddings.patch_embeddings.projection"
    shapes = {
        "embeddings.cls_token": (1, 1, 8),
        "embeddings.position_embeddings": (1, 10, 8),
        f"{projection}.weight": (8, 3, 2, 2),
        f"{projection}.bias": (8,),
        **norm("layernorm"),
    }
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.attention.{part}", 8, 8)
        shapes |= linear(f"{layer}.attention.output.dense", 8, 8)
        shapes |= norm(f"{layer}.layernorm_before") | norm(f"{layer}.layernorm_after")
        shapes |= linear(f"{layer}.intermediate.dense", 12, 8)
        shapes |= linear(f"{layer}.output.dense", 8, 12)
    if pooler:
        shapes |= linear("pooler.dense", 8, 8)
    if classes:
        shapes |= linear("classifier", classes, 8)
    return random_arrays(shapes)


def make_npz(cls=True, positions=10, classes=3, depth=2):
    """A random ViT as the authors' ``.npz`` files name it, in the old numbering."""
    shapes = {
        "embedding/kernel": (2, 2, 3, 8),
        "embedding/bias": (8,),
        POSITION: (1, positions, 8),
        "Transformer/encoder_norm/scale": (8,),
        "Transformer/encoder_norm/bias": (8,),
    }
    if cls:
        shapes["cls"] = (1, 1, 8)
    if classes:
        shapes |= {"head/kernel": (8, classes), "head/bias": (classes,)}
    for i in range(depth):
        block = BLOCK.format(i)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (8,), f"{block}/{norm}/bias": (8,)}
        for part in ("query", "key", "value"):
            name = f"{block}/MultiHeadDotProductAttention_1/{part}"
            shapes |= {f"{name}/kernel": (8, 2, 4), f"{name}/bias": (2, 4)}
        name = f"{block}/MultiHeadDotProductAttention_1/out"
        shapes |= {f"{name}/kernel": (2, 4, 8), f"{name}/bias": (8,)}
        name = f"{block}/MlpBlock_3/Dense"
        shapes |= {f"{name}_0/kernel": (8, 12), f"{name}_0/bias": (12,)}
        shapes |= {f"{name}_1/kernel": (12, 8), f"{name}_1/bias": (8,)}
    return random_arrays(shapes)


def write_hugging_face(folder, tensors, config=CONFIG, prefix=""):
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    stored = {
        name if name.startswith("classifier.") else prefix + name: value
        for name, value in tensors.items()
    }
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_npz(folder, arrays, prefix="", new=False, top=False):
    """Writes an ``.npz`` file, in the new numbering of modules if asked."""

    def stored(name):
        if new:
            name = name.replace("LayerNorm_2", "LayerNorm_1")
            name = name.replace("Attention_1", "Attention_0")
            name = name.replace("MlpBlock_3", "MlpBlock_0")
        if top:
            name = name.replace(POSITION, "pos_embedding")
        return prefix + name

    path = folder / "vit.npz"
    np.savez(path, **{stored(name): value for name, value in arrays.items()})
    return path


def norm(x, scale, bias, eps):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * scale + bias


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attend(q, k, v):
    """Attention of ``[heads, tokens, size]``."""
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    return scipy.special.softmax(scores, -1) @ v


def patches(image, size=2):
    """Yields the patches ``[size, size, channels]``, row by row."""
    for top in range(0, image.shape[0], size):
        for left in range(0, image.shape[1], size):
            yield image[top : top + size, left : left + size]


def numpy_hugging_face(tensors, image, config=CONFIG):
    """Hidden states around every block and the pooled vector, in float64."""

    def get(name):
        return np.float64(tensors[name])

    def dense(name, x):
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def layernorm(name, x):
        eps = config["layer_norm_eps"]
        return norm(x, get(f"{name}.weight"), get(f"{name}.bias"), eps)

    def split(x):
        return x.reshape(len(x), 2, 4).transpose(1, 0, 2)

    exact = config["hidden_act"] == "gelu"
    projection = "embeddings.patch_embeddings.projection"
    kernel = get(f"{projection}.weight")
    x = [np.einsum("dcij,ijc->d", kernel, patch) for patch in patches(image)]
    x = np.stack(x) + get(f"{projection}.bias")
    x = np.concatenate([get("embeddings.cls_token")[0], x])
    states = [x + get("embeddings.position_embeddings")[0]]
    for i in range(2):
        x, layer = states[-1], f"encoder.layer.{i}"
        y = layernorm(f"{layer}.layernorm_before", x)
        y = attend(
            *(
                split(dense(f"{layer}.attention.attention.{part}", y))
                for part in ("query", "key", "value")
            )
        )
        y = y.transpose(1, 0, 2).reshape(x.shape)
        x = x + dense(f"{layer}.attention.output.dense", y)
        y = layernorm(f"{layer}.layernorm_after", x)
        y = dense(f"{layer}.intermediate.dense", y)
        y = y * scipy.special.ndtr(y) if exact else gelu_tanh(y)
        states.append(x + dense(f"{layer}.output.dense", y))
    return states, layernorm("layernorm", states[-1])[0]


def numpy_npz(arrays, image, position=None):
    """Hidden states around every block and the pooled vector, in float64."""

    def get(name):
        return np.float64(arrays[name])

    def layernorm(name, x):
        return norm(x, get(f"{name}/scale"), get(f"{name}/bias"), 1e-6)

    kernel = get("embedding/kernel")
    x = [np.einsum("ijcd,ijc->d", kernel, patch) for patch in patches(image)]
    x = np.stack(x) + get("embedding/bias")
    position = get(POSITION)[0] if position is None else position
    if len(position) == len(x):
        x, position = x + position, np.zeros(8)
    if "cls" in arrays:
        x = np.concatenate([get("cls")[0], x])
    states = [x + position]
    for i in range(2):
        x, block = states[-1], BLOCK.format(i)
        name = f"{block}/MultiHeadDotProductAttention_1"
        y = layernorm(f"{block}/LayerNorm_0", x)
        y = attend(
            *(
                np.einsum("td,dhk->htk", y, get(f"{name}/{part}/kernel"))
                + get(f"{name}/{part}/bias")[:, None]
                for part in ("query", "key", "value")
            )
        )
        y = np.einsum("htk,hkd->td", y, get(f"{name}/out/kernel"))
        x = x + y + get(f"{name}/out/bias")
        name = f"{block}/MlpBlock_3/Dense"
        y = layernorm(f"{block}/LayerNorm_2", x)
        y = gelu_tanh(y @ get(f"{name}_0/kernel") + get(f"{name}_0/bias"))
        states.append(x + y @ get(f"{name}_1/kernel") + get(f"{name}_1/bias"))
    x = layernorm("Transformer/encoder_norm", states[-1])
    return states, x[0] if "cls" in arrays else x.mean(0)


def make_images(height=6, width=6):
    return np.random.default_rng(3).uniform(-1, 1, size=(2, height, width, 3))


def head_of(tensors):
    """Kernel ``[in, out]`` and bias of the head of either naming."""
    if "head/kernel" in tensors:
        return tensors["head/kernel"], tensors["head/bias"]
    return tensors["classifier.weight"].T, tensors["classifier.bias"]


def assert_agrees(model, oracle, tensors, *args, images=None):
    images = make_images() if images is None else images
    expected = np.stack([oracle(tensors, image, *args)[1] for image in images])
    features = model.features(jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
    return features, expected


def assert_agrees_with_the_head(model, oracle, tensors, *args, **options):
    images = options.get("images", make_images())
    features, expected = assert_agrees(model, oracle, tensors, *args, images=images)
    kernel, bias = head_of(tensors)
    expected = expected @ kernel + bias
    np.testing.assert_allclose(model.head(features), expected, rtol=1e-5, atol=1e-5)


def assert_blocks_agree(model, states):
    """Each block on the oracle's input gives the oracle's output."""
    assert len(model.blocks) == len(states) - 1 == 2
    for block, before, after in zip(model.blocks, states, states[1:], strict=False):
        got = block(jnp.asarray(before, jnp.float32))
        np.testing.assert_allclose(got, after, rtol=1e-5, atol=1e-5)


def assert_same(a, b):
    a, b = nnx.state(a), nnx.state(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("prefix", ["", "vit."])
def test_hugging_face_naming(tmp_path, prefix, pooler):
    tensors = make_hugging_face(pooler)
    write_hugging_face(tmp_path, tensors, prefix=prefix)
    model, report = import_vit(tmp_path)
    assert_agrees_with_the_head(model, numpy_hugging_face, tensors)
    assert set(report.ignored) == (
        {prefix + name for name in POOLER} if pooler else set()
    )
    assert report.fresh == ()
    assert report.loaded == len(make_hugging_face())


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/", "params/img/"])
def test_npz_naming(tmp_path, prefix, new):
    arrays = make_npz()
    model, report = import_vit(write_npz(tmp_path, arrays, prefix, new))
    assert model.config == OURS
    assert_agrees_with_the_head(model, numpy_npz, arrays)
    assert (report.ignored, report.fresh) == ((), ())
    assert report.loaded == len(arrays)


def test_the_state_of_the_optimizer_is_ignored(tmp_path):
    arrays = make_npz()
    path = write_npz(
        tmp_path,
        {f"params/{name}": value for name, value in arrays.items()}
        | {"opt/step": np.array(7), "extra/rng": np.zeros(2, np.uint32)},
    )
    model, report = import_vit(path)
    assert_agrees(model, numpy_npz, arrays)
    assert report.ignored == ("extra/rng", "opt/step")


def test_every_block_of_hugging_face_agrees(tmp_path):
    tensors = make_hugging_face()
    model, _ = import_vit(write_hugging_face(tmp_path, tensors))
    assert_blocks_agree(model, numpy_hugging_face(tensors, make_images()[0])[0])


def test_every_block_of_npz_agrees(tmp_path):
    arrays = make_npz()
    model, _ = import_vit(write_npz(tmp_path, arrays))
    assert_blocks_agree(model, numpy_npz(arrays, make_images()[0])[0])


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("new", [False, True])
def test_positions_added_before_the_class_token(tmp_path, new, cls):
    arrays = make_npz(cls=cls, positions=9)
    model, report = import_vit(write_npz(tmp_path, arrays, "params/", new, top=True))
    assert_agrees_with_the_head(model, numpy_npz, arrays)
    assert report.loaded == len(arrays)
    if cls:
        position = model.position_embedding[...]
        np.testing.assert_array_equal(position[0], np.zeros(8))
        np.testing.assert_array_equal(position[1:], arrays[POSITION][0])


def test_without_a_class_token_the_tokens_are_averaged(tmp_path):
    arrays = make_npz(cls=False, positions=9)
    model, _ = import_vit(write_npz(tmp_path, arrays))
    assert model.config == dataclasses.replace(OURS, pool="mean")
    assert model.cls_token is None
    assert_agrees_with_the_head(model, numpy_npz, arrays)


@pytest.mark.parametrize(("cls", "pool"), [(True, "mean"), (False, "cls")])
def test_the_pool_is_that_of_the_training(tmp_path, cls, pool):
    path = write_npz(tmp_path, make_npz(cls=cls, positions=9 + cls))
    other = "cls" if cls else "mean"
    with pytest.raises(ValueError, match=f"pool must be '{other}'.*Got '{pool}'"):
        import_vit(path, pool=pool)
    assert import_vit(path, pool=other)[0].config.pool == other


@pytest.mark.parametrize(
    ("activation", "eps"),
    [("gelu", 1e-12), ("gelu_new", 0.1), ("gelu_pytorch_tanh", EPS)],
)
def test_activation_and_epsilon_of_the_config(tmp_path, activation, eps):
    config = CONFIG | {"hidden_act": activation, "layer_norm_eps": eps}
    tensors = make_hugging_face()
    model, _ = import_vit(write_hugging_face(tmp_path, tensors, config))
    assert model.config.layer_norm_eps == eps
    assert_agrees(model, numpy_hugging_face, tensors, config)


def test_the_config_is_that_of_the_file(tmp_path):
    model, _ = import_vit(write_hugging_face(tmp_path, make_hugging_face()))
    expected = dataclasses.replace(OURS, activation="gelu", layer_norm_eps=EPS)
    assert model.config == expected


@pytest.mark.parametrize("dtype", ["float64", "float16", ml_dtypes.bfloat16])
def test_storage_dtypes_of_hugging_face(tmp_path, dtype):
    tensors = {name: v.astype(dtype) for name, v in make_hugging_face().items()}
    model, _ = import_vit(write_hugging_face(tmp_path, tensors))
    assert_agrees(model, numpy_hugging_face, tensors)
    np.testing.assert_array_equal(
        model.cls_token[...], np.float32(tensors["embeddings.cls_token"])[0, 0]
    )


@pytest.mark.parametrize(
    ("dtype", "order"), [(">f4", "C"), ("float64", "F"), ("float16", "C")]
)
def test_storage_of_npz(tmp_path, dtype, order):
    arrays = {name: np.array(v, dtype, order=order) for name, v in make_npz().items()}
    model, _ = import_vit(write_npz(tmp_path, arrays))
    assert_agrees(model, numpy_npz, arrays)
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_a_compressed_npz(tmp_path):
    arrays = make_npz()
    np.savez_compressed(tmp_path / "vit.npz", **arrays)
    assert_agrees(import_vit(tmp_path / "vit.npz")[0], numpy_npz, arrays)


def upsample(position, old, new):
    """Bilinear interpolation between the centres of patches, held at the edges."""
    prefix = len(position) - old * old
    grid = np.float64(position[prefix:]).reshape(old, old, -1)
    at = (np.arange(new) + 0.5) * old / new - 0.5
    for axis in (0, 1):
        grid = np.apply_along_axis(
            lambda line: np.interp(at, np.arange(old), line), axis, grid
        )
    return np.concatenate([position[:prefix], grid.reshape(new * new, -1)])


@pytest.mark.parametrize(
    ("cls", "positions"),
    [(True, 10), (True, 9), (False, 9)],
    ids=["class token", "class token without a position", "mean"],
)
def test_another_image_size_resamples_the_positions_of_npz(tmp_path, cls, positions):
    arrays = make_npz(cls=cls, positions=positions)
    model, report = import_vit(write_npz(tmp_path, arrays), image_size=12)
    assert model.config.grid == (6, 6)
    assert report.fresh == ()
    resized = upsample(arrays[POSITION][0], 3, 6)
    images = make_images(12, 12)
    assert_agrees_with_the_head(model, numpy_npz, arrays, resized, images=images)


def test_another_image_size_resamples_the_positions_of_hugging_face(tmp_path):
    tensors = make_hugging_face()
    model, _ = import_vit(write_hugging_face(tmp_path, tensors), image_size=12)
    name = "embeddings.position_embeddings"
    resized = tensors | {name: upsample(tensors[name][0], 3, 6)[None]}
    images = make_images(12, 12)
    assert_agrees_with_the_head(model, numpy_hugging_face, resized, images=images)


def test_an_image_size_that_the_patches_do_not_fill(tmp_path):
    path = write_npz(tmp_path, make_npz())
    with pytest.raises(ValueError, match="divisible by patch_size. Got 7 and 2"):
        import_vit(path, image_size=7)


def test_a_rectangle_with_a_config(tmp_path):
    arrays = make_npz(positions=7)
    path = write_npz(tmp_path, arrays)
    with pytest.raises(ValueError, match=r"square grid.* give config=.* Got 7 tokens"):
        import_vit(path)
    config = dataclasses.replace(OURS, image_size=(4, 6))
    model, _ = import_vit(path, config=config)
    images = make_images(4, 6)
    assert_agrees_with_the_head(model, numpy_npz, arrays, images=images)


@pytest.mark.parametrize("naming", ["hugging face", "npz"])
@pytest.mark.parametrize("classes", [3, 0])
def test_another_head_is_zero_and_reported(tmp_path, naming, classes):
    if naming == "npz":
        tensors, oracle = make_npz(classes=classes), numpy_npz
        path = write_npz(tmp_path, tensors)
        stored = ("head/bias", "head/kernel")
    else:
        tensors, oracle = make_hugging_face(classes=classes), numpy_hugging_face
        path = write_hugging_face(tmp_path, tensors)
        stored = ("classifier.bias", "classifier.weight")
    model, report = import_vit(path, num_classes=5)
    assert_agrees(model, oracle, tensors)
    logits = model(jnp.asarray(make_images(), jnp.float32))
    np.testing.assert_array_equal(logits, np.zeros((2, 5)))
    assert report.fresh == ("head.bias", "head.kernel")
    assert report.ignored == (stored if classes else ())


def test_the_head_is_taken_when_its_size_is_asked_for(tmp_path):
    arrays = make_npz()
    model, report = import_vit(write_npz(tmp_path, arrays), num_classes=3)
    assert_agrees_with_the_head(model, numpy_npz, arrays)
    assert report.fresh == ()


@pytest.mark.parametrize("naming", ["hugging face", "npz"])
def test_a_file_without_a_head_needs_num_classes(tmp_path, naming):
    if naming == "npz":
        path = write_npz(tmp_path, make_npz(classes=0))
    else:
        path = write_hugging_face(tmp_path, make_hugging_face(classes=0))
    with pytest.raises(ValueError, match="num_classes must be given: .* has no head"):
        import_vit(path)


def test_a_head_without_its_kernel_is_refused(tmp_path):
    arrays = make_npz()
    del arrays["head/kernel"]
    with pytest.raises(ValueError, match=r"missing .'head/kernel'."):
        import_vit(write_npz(tmp_path, arrays))


def test_pre_logits_are_left_out_only_with_the_head(tmp_path):
    arrays = make_npz()
    extra = random_arrays({"pre_logits/kernel": (8, 8), "pre_logits/bias": (8,)})
    path = write_npz(tmp_path, arrays | extra)
    message = r"unexpected .'pre_logits/bias', 'pre_logits/kernel'."
    for options in ({}, {"num_classes": 3}):
        with pytest.raises(ValueError, match=message):
            import_vit(path, **options)
    model, report = import_vit(path, num_classes=5)
    assert_agrees(model, numpy_npz, arrays)
    heads = {"head/kernel", "head/bias"}
    assert set(report.ignored) == extra.keys() | heads


def test_config_argument_in_place_of_a_config_file(tmp_path):
    tensors = make_hugging_face()
    write_hugging_face(tmp_path, tensors, config=None)
    with pytest.raises(FileNotFoundError, match="argument config, .*Got .*config.json"):
        import_vit(tmp_path)
    config = dataclasses.replace(OURS, activation="gelu", layer_norm_eps=EPS)
    model, _ = import_vit(tmp_path, config=config)
    assert model.config == config
    assert_agrees_with_the_head(model, numpy_hugging_face, tensors)


def test_the_head_asked_for_is_taken_whatever_the_config_says(tmp_path):
    arrays = make_npz()
    path = write_npz(tmp_path, arrays)
    config = dataclasses.replace(OURS, num_classes=10)
    model, report = import_vit(path, config=config, num_classes=3)
    assert report.fresh == ()
    assert_agrees_with_the_head(model, numpy_npz, arrays)


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 3},
        {"depth": 1},
        {"hidden_size": 16},
        {"mlp_dim": 6},
        {"channels": 1},
        {"patch_size": 3},
        # As many pixels to a patch, in another order.
        {"patch_size": 1, "channels": 12},
    ],
)
@pytest.mark.parametrize("naming", ["hugging face", "npz"])
def test_overrides_that_the_weights_do_not_fit(tmp_path, naming, change):
    if naming == "npz":
        path = write_npz(tmp_path, make_npz())
    else:
        path = write_hugging_face(tmp_path, make_hugging_face())
    with pytest.raises(ValueError, match=r" must .*Got "):
        import_vit(path, **change)


@pytest.mark.parametrize("change", [{"depth": 3}, {"mlp_dim": 13}, {"patch_size": 3}])
def test_config_argument_that_does_not_fit(tmp_path, change):
    path = write_npz(tmp_path, make_npz())
    with pytest.raises(ValueError, match="weights must hold exactly the parameters"):
        import_vit(path, config=dataclasses.replace(OURS, **change))


@pytest.mark.parametrize("shape", [(), (8,), (10, 8), (1, 8, 8), (1, 10, 4)])
def test_a_misshapen_position_embedding_is_named(tmp_path, shape):
    name = "embeddings.position_embeddings"
    tensors = make_hugging_face() | {name: np.zeros(shape, np.float32)}
    write_hugging_face(tmp_path, tensors)
    for options in ({}, {"image_size": 12}):
        with pytest.raises(ValueError, match=rf"misshapen \['{name} \("):
            import_vit(tmp_path, **options)


@pytest.mark.parametrize(
    "name",
    [
        "embedding/kernel",
        f"{BLOCK.format(0)}/MlpBlock_3/Dense_0/kernel",
        f"{BLOCK.format(0)}/MultiHeadDotProductAttention_1/query/kernel",
        POSITION,
    ],
)
@pytest.mark.parametrize("value", [None, np.zeros((), np.float32)])
def test_npz_without_what_tells_its_sizes(tmp_path, name, value):
    arrays = make_npz()
    del arrays[name]
    if value is not None:
        arrays[name] = value
    found = f"missing .'{name}'" if value is None else "the shapes"
    with pytest.raises(ValueError, match=f"weights must hold .*{name}.* Got {found}"):
        import_vit(write_npz(tmp_path, arrays))


def test_all_that_an_npz_lacks_is_listed_with_what_tells_its_sizes(tmp_path):
    arrays = make_npz()
    names = ["Transformer/encoder_norm/scale", "cls", "embedding/kernel"]
    for name in names:
        del arrays[name]
    arrays["extra_thing"] = np.zeros(3, np.float32)
    message = re.escape(f"missing {names}, unexpected ['extra_thing'] in")
    with pytest.raises(ValueError, match=message):
        import_vit(write_npz(tmp_path, arrays))


def test_a_missing_class_token_is_called_missing(tmp_path):
    arrays = make_npz()
    del arrays["cls"]
    with pytest.raises(ValueError, match=r"missing \['cls'\], unexpected \[\], missh"):
        import_vit(write_npz(tmp_path, arrays))
    tensors = make_hugging_face()
    (token,) = [name for name in tensors if name.endswith("cls_token")]
    del tensors[token]
    write_hugging_face(tmp_path / "hf", tensors)
    with pytest.raises(
        ValueError, match=r"missing \['(vit.)?embeddings.cls_token'\], un"
    ):
        import_vit(tmp_path / "hf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "deit"),
        ("hidden_act", "relu"),
        ("hidden_act", None),
        ("qkv_bias", False),
    ],
)
def test_config_of_another_architecture(tmp_path, key, value):
    write_hugging_face(tmp_path, make_hugging_face(), CONFIG | {key: value})
    with pytest.raises(ValueError, match=f"config.json must have {key} among .*Got"):
        import_vit(tmp_path)


def test_every_absent_size_is_listed(tmp_path):
    absent = ["image_size", "num_channels"]
    config = {key: value for key, value in CONFIG.items() if key not in absent}
    write_hugging_face(tmp_path, make_hugging_face(), config)
    message = "Got image_size=None, num_channels=None"
    with pytest.raises(ValueError, match=message):
        import_vit(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", "6"),
        ("image_size", 6.5),
        ("image_size", 7),
        ("patch_size", 0),
        ("patch_size", True),
        ("hidden_size", None),
        ("intermediate_size", 12.5),
        ("num_hidden_layers", 1.5),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", -1.0),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_config_values_that_no_vit_has(tmp_path, key, value):
    write_hugging_face(tmp_path, make_hugging_face(), CONFIG | {key: value})
    with pytest.raises(ValueError, match="must"):
        import_vit(tmp_path)


def test_from_pretrained_reads_hugging_face(tmp_path):
    tensors = make_hugging_face()
    write_hugging_face(tmp_path, tensors)
    whole = ViT.from_pretrained(str(tmp_path))
    assert_agrees_with_the_head(whole, numpy_hugging_face, tensors)
    assert_same(ViT.from_pretrained(tmp_path / "model.safetensors"), whole)


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_from_pretrained_reads_npz(tmp_path, kind):
    arrays = make_npz()
    path = write_npz(tmp_path, arrays)
    assert_agrees_with_the_head(ViT.from_pretrained(kind(path)), numpy_npz, arrays)


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_from_pretrained_reads_a_file_of_ours(tmp_path, kind):
    arrays = make_npz()
    model, _ = import_vit(write_npz(tmp_path, arrays))
    path = tmp_path / "vit.safetensors"
    save_vit(path, model)
    loaded = ViT.from_pretrained(kind(path))
    assert loaded.config == model.config
    assert_same(loaded, model)
    wide = ViT.from_pretrained(kind(path), num_classes=7)
    assert wide.head.kernel[...].shape == (8, 7)


def test_from_pretrained_passes_on_its_options(tmp_path):
    options = {"param_dtype": jnp.bfloat16, "num_classes": 7, "image_size": 12}
    tensors = make_hugging_face()
    paths = [
        write_hugging_face(tmp_path, tensors),
        write_npz(tmp_path, make_npz()),
        tmp_path / "ours.safetensors",
    ]
    save_vit(paths[-1], import_vit(paths[0])[0])
    for path in paths:
        loaded = ViT.from_pretrained(path, dtype=jnp.float32, **options)
        assert (loaded.config.num_classes, loaded.config.grid) == (7, (6, 6))
        leaves = jax.tree.leaves(nnx.state(loaded))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
        assert loaded.dtype == jnp.float32


@pytest.mark.parametrize("name", ["absent", "absent.npz", "absent.safetensors"])
def test_from_pretrained_without_a_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"existing file. Got .*{name}"):
        ViT.from_pretrained(tmp_path / name)


def test_from_pretrained_of_a_folder_without_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"Got .'pytorch_model.bin'. in"):
        ViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_unpacks_more_than_is_asked_for_is_refused(tmp_path, method):
    """Of bzip2 and LZMA, zipfile unpacks whole chunks: 1 GB from 665 bytes."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    path = tmp_path / "vit.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("Transformer/encoder_norm/scale.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="must be stored or deflated. Got compression"):
        import_vit(path)
