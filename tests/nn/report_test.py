import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.diagnostics import Kappa, LayerReport, layer_report
from snnk_jax.models.vit import ViT, ViTConfig
from snnk_jax.nn import ModelReport, _report, model_report

CONFIG = ViTConfig(
    hidden_size=8,
    depth=2,
    num_heads=2,
    mlp_dim=12,
    image_size=8,
    patch_size=4,
    num_classes=3,
)
FC1 = r"blocks/\d+/mlp/fc1"
X = jax.random.normal(jax.random.key(1), (3, 20, 6))


class Mlp(nnx.Module):
    """Two named layers; ``repeated`` is called three times, ``spare`` never."""

    def __init__(self, rngs=None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.up = nnx.Linear(6, 5, rngs=rngs)
        self.repeated = nnx.Linear(5, 5, use_bias=False, rngs=rngs)
        self.spare = nnx.Linear(5, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)

    def __call__(self, x, gain=1.0):
        x = jax.nn.relu(self.up(gain * x))
        for _ in range(3):
            x = self.norm(jnp.tanh(self.repeated(x)))
        return x


@pytest.fixture
def judged(monkeypatch):
    """What the report hands to layer_report, which is replaced by a stub."""
    calls = []

    def stub(activation, x, kernel, bias, **options):
        calls.append((activation.name, x, kernel, bias, options))
        errors = (0.5, 0.4, 0.3, 0.2)
        return LayerReport(Kappa(2.0, 1.0, 0.5), 1.0, *errors, 7, "calibrated")

    monkeypatch.setattr(_report, "layer_report", stub)
    return calls


def rows(x):
    return np.asarray(x).reshape(-1, x.shape[-1])


def test_hands_on_what_each_layer_reads(judged):
    mlp = Mlp()
    mlp.up.bias[...] = jnp.arange(5.0)
    activations = {"repeated": "tanh", "up": "relu"}
    report = model_report(
        mlp, X, activations=activations, num_features=9, tolerance=0.25, gain=2.0
    )
    hidden = [jax.nn.relu(mlp.up(2.0 * X))]
    for _ in range(2):
        hidden.append(mlp.norm(jnp.tanh(mlp.repeated(hidden[-1]))))
    expected = {
        "repeated": np.concatenate([rows(x) for x in hidden]),  # the calls add up
        "up": rows(2.0 * X),
    }
    assert list(report.layers) == list(expected)  # in model order
    for (name, x, kernel, bias, options), path in zip(judged, expected, strict=True):
        linear = getattr(mlp, path)
        assert name == activations[path]
        np.testing.assert_array_equal(x, expected[path])
        np.testing.assert_array_equal(kernel, linear.kernel[...])
        if path == "up":
            np.testing.assert_array_equal(bias, jnp.arange(5.0))
        else:
            assert bias is None
        assert options == {"num_features": 9, "tolerance": 0.25}
    assert report.shapes == {"repeated": (5, 5), "up": (6, 5)}
    assert report.samples == {"repeated": 180, "up": 60}


def test_takes_samples_evenly(judged):
    model_report(Mlp(), X, activations={"up": "relu"}, max_samples=7)
    picks = [0, 8, 17, 25, 34, 42, 51]
    np.testing.assert_array_equal(judged[0][1], rows(X)[picks])


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(False, id="plain", marks=pytest.mark.slow),
        pytest.param(True, id="remat"),
    ],
)
def test_reads_every_feed_forward_block_of_the_vit(judged, remat):
    """With remat the blocks are traced: inputs are recorded all the same."""
    config = dataclasses.replace(CONFIG, remat=remat)
    vit = ViT(config, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    report = model_report(vit, images, activations={FC1: "gelu"})
    assert list(report.layers) == ["blocks/0/mlp/fc1", "blocks/1/mlp/fc1"]
    tokens = vit.patch_embed(snnk.models.vit.patchify(images, 4))
    position = vit.position_embedding[...]
    tokens = tokens + position[None, 1:]
    token = vit.cls_token[...] + position[0]
    token = jnp.broadcast_to(token[None, None], (3, 1, 8))
    h = jnp.concatenate([token, tokens], axis=1)
    for block, call in zip(vit.blocks, judged, strict=True):
        expected = block.norm2(h + block.attention(block.norm1(h)))
        np.testing.assert_allclose(call[1], rows(expected), rtol=1e-5, atol=1e-6)
        h = block(h)


@pytest.mark.parametrize("transform", [nnx.jit, nnx.vmap], ids=["jit", "vmap"])
def test_reads_through_transformations(judged, transform):
    class Wrapped(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))

        def __call__(self, x):
            axes = {"in_axes": (None, 0)} if transform is nnx.vmap else {}
            return transform(lambda linear, x: linear(x), **axes)(self.linear, x)

    model_report(Wrapped(), X, activations={"linear": "relu"})
    np.testing.assert_array_equal(
        np.sort(judged[0][1], axis=0), np.sort(rows(X), axis=0)
    )


@pytest.mark.slow
def test_says_what_layer_report_says():
    vit = ViT(CONFIG, rngs=nnx.Rngs(0))
    vit.blocks[1].mlp.fc1.kernel[...] *= 0.01  # as good as affine
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    report = model_report(vit, images, activations={FC1: "gelu"}, num_features=24)
    h = vit.patch_embed(snnk.models.vit.patchify(images, 4))
    h = h + vit.position_embedding[...][None, 1:]
    token = (vit.cls_token[...] + vit.position_embedding[...][0])[None, None]
    h = jnp.concatenate([jnp.broadcast_to(token, (16, 1, 8)), h], axis=1)
    for block, row in zip(vit.blocks, report.layers.values(), strict=True):
        x = block.norm2(h + block.attention(block.norm1(h))).reshape(-1, 8)
        linear = block.mlp.fc1
        kernel, bias = linear.kernel[...], linear.bias[...]
        expected = layer_report("gelu", x, kernel, bias, num_features=24)
        assert row.verdict == expected.verdict
        for name in (
            "spread",
            "tangent",
            "affine",
            "random",
            "calibrated",
            "num_features",
        ):
            np.testing.assert_allclose(
                getattr(row, name), getattr(expected, name), rtol=1e-3, err_msg=name
            )
        assert row.kappa.raw == pytest.approx(expected.kappa.raw, rel=1e-4)
        h = block(h)
    verdicts = [row.verdict for row in report.layers.values()]
    assert verdicts[1] == "affine" != verdicts[0]
    assert report.counts["affine"] == 1
    assert sum(report.counts.values()) == 2


def test_leaves_the_model_as_it_is(judged):
    def values(model):
        leaves = jax.tree.leaves(nnx.state(model))
        keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
        assert any(keys)
        return [
            np.array(jax.random.key_data(leaf) if key else leaf)
            for leaf, key in zip(leaves, keys, strict=True)
        ]

    class Dropped(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
            self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

        def __call__(self, x):
            self.calls[...] += 1
            return self.dropout(self.linear(x))

    model = Dropped()
    before = values(model)
    model_report(model, X, activations={"linear": "relu"})
    assert len(judged) == 1
    jax.tree.map(np.testing.assert_array_equal, before, values(model))
    assert type(model.linear) is nnx.Linear
    assert int(model.calls[...]) == 0


def test_the_first_expression_counts(judged):
    model_report(Mlp(), X, activations={"up": "relu", "up|repeated": "tanh"})
    assert {(name, x.shape[-1]) for name, x, *_ in judged} == {("relu", 6), ("tanh", 5)}
    with pytest.raises(ValueError, match="every rule must replace.*'u.'"):
        model_report(Mlp(), X, activations={"up": "relu", "u.": "tanh"})


def test_narrow_layers_are_judged_in_float32(judged):
    linear = nnx.Linear(6, 5, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = X.astype(jnp.bfloat16)
    model_report(nnx.Sequential(linear), x, activations={"layers/0": "relu"})
    _, recorded, kernel, bias, _ = judged[0]
    assert {a.dtype for a in (recorded, kernel, bias)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(recorded, rows(x).astype(np.float32))


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ({"fc1": "relu"}, r"only. Got fc1 for nothing; .*'repeated', 'spare', 'up'"),
        ({"up|norm": "relu"}, r"only. Got up.norm for \['norm'\]; .*'repeated'"),
        ({".*": "relu"}, r"only. Got .* for \['', 'norm'\]"),
        ({}, "must name a Linear. Got none; the Linear modules are"),
        ({"(": "relu"}, "path must be a regular expression"),
        ({"up": "rely"}, "relu"),
        ({"up": "relu", "spare": "relu"}, r"must call every.*\['spare'\].*'repeated'"),
    ],
)
def test_wrong_names(activations, message):
    with pytest.raises(ValueError, match=message):
        model_report(Mlp(), X, activations=activations)


def test_a_linear_with_more_to_it_is_refused():
    lora = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
    plain = nnx.Linear(5, 5, rngs=nnx.Rngs(0))
    model = nnx.Sequential(lora, plain)
    with pytest.raises(ValueError, match=r"for \['layers/0'\].*are \['layers/1'\]"):
        model_report(model, X, activations={"layers/.": "relu"})


def test_wrong_samples():
    with pytest.raises(ValueError, match="max_samples must be at least 2. Got 1"):
        model_report(Mlp(), X, activations={"up": "relu"}, max_samples=1)
    x = X.at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="inputs of up must be finite"):
        model_report(Mlp(), x, activations={"up": "relu"})


def layer(verdict, random, num_features=102):
    kappa = Kappa(raw=27.34, balanced=3.2109, spread=0.25)
    return LayerReport(kappa, 0.5, 1.1, 0.921, random, 0.0804, num_features, verdict)


def test_the_table():
    report = ModelReport(
        layers={
            "a/up": layer("leave", float("inf")),
            "blocks/10/up": layer("random", 0.25, 64),
            "c/up": layer("leave", 12345.6),
            "d/up": layer("calibrated", 0.5),
        },
        shapes=dict.fromkeys(["a/up", "blocks/10/up", "c/up", "d/up"], (128, 512)),
        samples={"a/up": 100, "blocks/10/up": 2048, "c/up": 100, "d/up": 100},
        tolerance=0.3,
    )
    assert report.counts == {"random": 1, "calibrated": 1, "affine": 0, "leave": 2}
    assert str(report) == (
        "path           in→out  kappa  balanced  spread  affine    random  calibrated"
        "    m  verdict\n"
        "a/up          128→512   27.3      3.21     0.5   0.921       inf      0.0804"
        "  102  leave\n"
        "blocks/10/up  128→512   27.3      3.21     0.5   0.921      0.25      0.0804"
        "   64  random\n"
        "c/up          128→512   27.3      3.21     0.5   0.921  1.23e+04      0.0804"
        "  102  leave\n"
        "d/up          128→512   27.3      3.21     0.5   0.921       0.5      0.0804"
        "  102  calibrated\n"
        "\n"
        "Relative errors on 100 to 2048 inputs of each layer; 0.3 is good enough.\n"
        "1 of 4 layers can be carried by random features, Psi(W, b) of the given"
        " weights:\n"
        "  blocks/10/up.\n"
        "1 of 4 layers need a readout fitted on samples (calibration.fit_readout):"
        " d/up.\n"
        "2 of 4 layers should be left alone: a/up, c/up."
    )
