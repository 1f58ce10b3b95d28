import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.compression import (
    Affine,
    Features,
    Int8,
    LowRank,
    Magnitude,
    Units,
    find_blocks,
    num_parameters,
)
from snnk_jax.compression._blocks import inspect
from tests.tiers import slow_but

DIM, WIDTH, TOKENS = 6, 24, 96


class Mlp(nnx.Module):
    def __init__(self, rngs, width=WIDTH):
        self.up = nnx.Linear(DIM, width, rngs=rngs)
        self.down = nnx.Linear(width, DIM, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class Residual(nnx.Module):
    """Pre-norm: what it returns is the sum."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)
        self.ffn = Mlp(rngs)

    def __call__(self, x):
        return x + self.ffn(self.norm(x))


class PostNorm(nnx.Module):
    """Post-norm, the Linears in the layer itself, the sum inside."""

    def __init__(self, rngs):
        self.linear1 = nnx.Linear(DIM, WIDTH, rngs=rngs)
        self.linear2 = nnx.Linear(WIDTH, DIM, rngs=rngs)
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)
        self.norm.scale[...] = jax.random.uniform(rngs.params(), (DIM,)) + 0.5

    def __call__(self, x):
        return self.norm(x + self.linear2(nnx.relu(self.linear1(x))))


class Net(nnx.Module):
    def __init__(self, layer, depth=2, seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List(layer(rngs) for _ in range(depth))
        self.head = nnx.Linear(DIM, 3, rngs=rngs)

    def __call__(self, x, mask=None):
        for layer in self.layers:
            x = layer(x)
        kept = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(x.dtype)
        total = jnp.sum(x * kept[..., None], axis=-2)
        return self.head(total / jnp.sum(kept, axis=-1)[..., None])


PRE = [snnk.CompressRule(path="layers/[0-9]+/ffn", first="up", second="down")]
POST = [
    snnk.CompressRule(
        path="layers/[0-9]+", first="linear1", second="linear2", norm="norm"
    )
]


def batches(num=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), num)
    return [jax.random.normal(key, (12, TOKENS // 12, DIM)) for key in keys]


@pytest.fixture(scope="module")
def net():
    return Net(Residual)


@pytest.fixture(scope="module")
def post():
    return Net(PostNorm)


def states_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


def test_all_units_give_the_model_back_and_leave_it_alone(net):
    before = jax.tree.map(jnp.copy, nnx.state(net))
    small, report = snnk.compress(net, batches(), PRE, budget=1.0, l2=1e-9)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(net))
    x = batches(1, seed=5)[0]
    np.testing.assert_allclose(small(x), net(x), rtol=1e-3, atol=1e-3)
    assert report.parameters == report.dense_parameters == num_parameters(net)
    assert [b.share for b in report.blocks] == [1.0, 1.0]
    assert report.output_r2 > 0.99999


@pytest.mark.slow
def test_duplicated_units_are_found(net):
    """A block whose second half repeats its first needs half of its units."""
    model = nnx.clone(net)
    for layer in model.layers:
        up = layer.ffn.up
        half = WIDTH // 2
        up.kernel[...] = jnp.tile(up.kernel[...][:, :half], (1, 2))
        up.bias[...] = jnp.tile(up.bias[...][:half], 2)
    small, report = snnk.compress(
        model, batches(), PRE, budget=dict.fromkeys(names(), WIDTH // 2)
    )
    assert small.layers[0].ffn.up.kernel.shape == (DIM, WIDTH // 2)
    assert report.output_r2 > 0.9999
    assert min(block.r2 for block in report.blocks) > 0.9999
    _, other = snnk.compress(
        model,
        batches(),
        PRE,
        budget=dict.fromkeys(names(), WIDTH // 2),
        method=Units(select="random", refit=False),
    )
    assert other.output_r2 < 0.99


def names():
    return [f"layers/{i}/ffn" for i in range(2)]


def test_the_report_adds_up(net):
    small, report = snnk.compress(
        net, batches(), PRE, budget=0.4, evaluate=lambda m: m.head.out_features
    )
    size = report.blocks[0].size
    block = size * (2 * DIM + 1) + DIM
    assert (
        report.blocks[0].parameters == block <= 0.4 * report.blocks[0].dense_parameters
    )
    assert block + 2 * DIM + 1 > 0.4 * report.blocks[0].dense_parameters
    assert report.parameters == num_parameters(small)
    saved = sum(b.dense_parameters - b.parameters for b in report.blocks)
    assert report.dense_parameters - report.parameters == saved
    assert report.blocks[0].flop_share == size / WIDTH
    assert (report.score, report.dense_score) == (3.0, 3.0)
    record = json.loads(report.to_json())
    assert record["blocks"][1]["name"] == "layers/1/ffn"
    assert "layers/1/ffn" in str(report)
    for b in report.blocks:
        assert 0 < b.linear_r2 < 1
        assert 0 < b.r2_metric <= 1
        assert b.l2 > 0
        assert b.condition > 1
        assert b.effective_rank <= size + 1


@pytest.mark.parametrize("metric", ["plain", "norm", "gauss_newton"])
def test_a_post_norm_layer_that_holds_its_linears(post, metric):
    small, report = snnk.compress(post, batches(), POST, budget=0.5, metric=metric)
    assert small.layers[1].linear1.out_features < WIDTH
    assert report.output_r2 > 0.8
    # The residual sum is aimed at: without the correction the outputs are worse.
    with pytest.raises(ValueError, match="must do nothing but Linear"):
        snnk.compress(post, batches(), POST, budget=0.5, method=Affine())


def test_correction_brings_the_sum_back(net):
    reports = [
        snnk.compress(net, batches(), PRE, budget=0.3, metric="plain", corrected=c)[1]
        for c in (False, True)
    ]
    # The first block is the same; the second makes good what the first lost.
    np.testing.assert_allclose(*(r.blocks[0].r2 for r in reports), rtol=1e-5)
    assert reports[1].output_r2 > reports[0].output_r2


METHODS = {
    "units": Units(),
    "units+linear": Units(linear=0.3),
    "units+auto": Units(linear="auto"),
    "energy": Units(select="energy"),
    "pruned": Units(select="energy", refit=False),
    "affine": Affine(),
    "relu": Features(features=snnk.features.ArcCosine(num_features=1)),
    "relu+linear": Features(
        features=snnk.features.ArcCosine(num_features=1), linear=True
    ),
    "balanced": Features(
        features=snnk.features.URF(activation="cos", num_features=1), balanced=True
    ),
    "psi": Features(
        features=snnk.features.URF(activation="gelu", num_features=1, exact_degree=0),
        readout="psi",
    ),
    "svd": LowRank(data_aware=False),
    "data-aware svd": LowRank(),
    "magnitude": Magnitude(),
    "int8": Int8(),
}


@functools.cache
def compressed(name):
    model = Net(Residual, depth=1)
    budget = 0.9
    return model, *snnk.compress(
        model, batches(), PRE, budget=budget, method=METHODS[name], metric="plain"
    )


@pytest.mark.parametrize(
    "name", slow_but(("units", "units+linear", "data-aware svd", "int8"), METHODS)
)
def test_every_method(name, tmp_path):
    model, small, report = compressed(name)
    x = batches(1, seed=3)[0]
    assert np.all(np.isfinite(small(x)))
    assert report.share <= 0.9 or name == "int8"
    # What is reported as R^2 is what the block does.
    block, own = small.layers[0].ffn, model.layers[0].ffn
    inputs = jnp.concatenate(
        [model.layers[0].norm(b).reshape(-1, DIM) for b in batches()]
    )
    wanted = np.asarray(own(inputs), np.float64)
    error = np.sum((np.asarray(block(inputs), np.float64) - wanted) ** 2)
    r2 = 1 - error / np.sum((wanted - wanted.mean(axis=0)) ** 2)
    np.testing.assert_allclose(report.blocks[0].r2, r2, rtol=1e-3, atol=1e-3)
    # The file gives the same function to a model of the architecture.
    file = tmp_path / "small.safetensors"
    size = snnk.compression.save(file, small, model, metadata={"a": "b"})
    assert size == file.stat().st_size
    again = snnk.compression.load(file, Net(Residual, depth=1, seed=9))
    np.testing.assert_array_equal(again(x), small(x))
    assert snnk.compression.read_metadata(file) == {"a": "b"}


@pytest.mark.slow
def test_refitting_and_selection_help():
    r2 = {name: compressed(name)[2].blocks[0].r2 for name in METHODS}
    assert r2["units"] >= r2["energy"] - 1e-6
    assert r2["energy"] > r2["pruned"]
    assert r2["units+auto"] >= max(r2["units+linear"], r2["units"]) - 1e-3
    assert r2["relu+linear"] > r2["affine"]
    assert r2["data-aware svd"] > r2["svd"]
    assert r2["relu"] > r2["psi"]
    assert r2["int8"] > 0.999


def test_a_linear_path_takes_what_is_linear():
    """Four units that bend, and ten pairs that make a map of rank two."""
    model = Net(Residual, depth=1)
    up, down = model.layers[0].ffn.up, model.layers[0].ffn.down
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (DIM, 10))
    v = jax.random.normal(keys[1], (10, 2)) @ jax.random.normal(keys[2], (2, DIM))
    # gelu(z) - gelu(-z) = z
    up.kernel[...] = up.kernel[...].at[:, 4:].set(jnp.concatenate([w, -w], axis=1))
    up.bias[...] = up.bias[...].at[4:].set(0.0)
    down.kernel[...] = down.kernel[...].at[4:].set(jnp.concatenate([v, -v]) / 10)
    (beside, report), (_, plain) = (
        snnk.compress(
            model,
            batches(),
            PRE,
            budget={"layers/0/ffn": 6},
            method=Units(linear=share),
            l2=1e-9,
        )
        for share in (1 / 3, 0.0)
    )
    block = beside.layers[0].ffn
    kept = np.asarray(block.up.kernel[...])[:, :4]
    np.testing.assert_array_equal(kept, up.kernel[...][:, :4])
    assert report.blocks[0].r2 > 0.999 > 0.95 > plain.blocks[0].r2
    # The bias keeps the activation straight.
    assert np.asarray(block.up.bias[...])[4:].min() > 6


@pytest.mark.slow
def test_a_second_sweep(net):
    """Forward it finds what it found; backward it sees the blocks before replaced."""

    def run(order, sweeps):
        return snnk.compress(
            net, batches(), PRE, budget=0.3, order=order, sweeps=sweeps
        )

    (once, report), (twice, again) = run("forward", 1), run("forward", 2)
    states_equal(once, twice)
    assert [b.name for b in again.blocks] == [b.name for b in report.blocks]
    backward, _ = run("backward", 1)
    last = [model.layers[1].ffn.down.kernel[...] for model in (backward, once)]
    assert not np.array_equal(*last)
    states_equal(run("backward", 2)[0], once)


@pytest.mark.parametrize("method", [Affine(), LowRank()])
def test_maps_of_a_rank_obey_the_penalty_and_report_their_norm(method):
    model, norms = Net(Residual, depth=1), []
    for l2 in (1e-6, 100.0):
        small, report = snnk.compress(
            model, batches(), PRE, budget={"layers/0/ffn": 2}, method=method, l2=l2
        )
        block, found = small.layers[0].ffn, report.blocks[0]
        pair = block if isinstance(method, Affine) else block.down
        a, b = (np.asarray(layer.kernel[...]) for layer in pair.layers)
        norms.append(np.linalg.norm(a @ b))
        if isinstance(method, Affine):
            np.testing.assert_allclose(found.readout_norm, norms[-1], rtol=1e-5)
            assert found.l2 == l2
        assert np.isnan(found.effective_rank)
    assert norms[1] < 0.1 * norms[0]


def test_magnitude_takes_of_equal_weights_no_more_than_its_size():
    model = Net(Residual, depth=1)
    mlp = model.layers[0].ffn
    for layer in (mlp.up, mlp.down):
        layer.kernel[...] = jnp.sign(layer.kernel[...])
    small, _ = snnk.compress(
        model, batches(1), PRE, budget={"layers/0/ffn": 32}, method=Magnitude()
    )
    mlp = small.layers[0].ffn
    kept = sum(int(jnp.sum(m.kernel[...] != 0)) for m in (mlp.up, mlp.down))
    assert kept == 32


def test_magnitude_keeps_so_many_weights():
    _, small, report = compressed("magnitude")
    mlp = small.layers[0].ffn
    kept = sum(int(jnp.sum(m.kernel[...] != 0)) for m in (mlp.up, mlp.down))
    assert kept == report.blocks[0].size
    assert kept + WIDTH + DIM == report.blocks[0].parameters


def test_kept_sums_forgive_rounding_and_nothing_else(tmp_path):
    from snnk_jax.compression._gather import _Store, _summary

    values = np.random.default_rng(0).normal(size=(50, 4))
    store = _Store(tmp_path / "sums.safetensors", "identity", _summary(values))
    stats = snnk.ridge.init(2, 1)
    store.save(stats, 3)
    noise = 1 + 1e-6 * np.random.default_rng(1).normal(size=values.shape)
    other = dataclasses.replace(store, summary=_summary(values * noise))
    assert other.load()[1] == 3
    for changed in (values[::-1], 1.1 * values, values[:, :3]):
        other = dataclasses.replace(store, summary=_summary(changed))
        with pytest.raises(ValueError, match="same model, data and settings"):
            other.load()


@pytest.mark.parametrize(
    "precision",
    ["highest", jax.lax.Precision.HIGHEST, jax.lax.DotAlgorithmPreset.F32_F32_F32],
)
@pytest.mark.parametrize("method", [Magnitude(), Int8()])
def test_precision_is_kept_in_models_and_files(method, precision, tmp_path):
    dense = Net(Residual, depth=1)
    for layer in (dense.layers[0].ffn.up, dense.layers[0].ffn.down):
        layer.precision = precision
    size = method.largest(find_blocks(dense, PRE)[0])
    small, _ = snnk.compress(
        dense, batches(1), PRE, budget={"layers/0/ffn": size}, method=method
    )
    file = tmp_path / "small.safetensors"
    snnk.compression.save(file, small, dense)
    for model in (small, snnk.compression.load(file, dense)):
        for layer in (model.layers[0].ffn.up, model.layers[0].ffn.down):
            if isinstance(precision, jax.lax.DotAlgorithmPreset):
                assert layer.precision == precision
            else:
                assert jax.lax.Precision(layer.precision) == jax.lax.Precision.HIGHEST


def test_a_precision_that_this_jax_lacks_is_refused(tmp_path):
    from snnk_jax._files import read_record, write_record

    file, dense = tmp_path / "small.safetensors", Net(Residual, depth=1)
    small, _ = snnk.compress(dense, batches(1), PRE, budget=0.5, metric="plain")
    snnk.compression.save(file, small, dense)
    record, arrays = read_record(file, "", "", "snnk_jax.compressed.1")
    for spec in record["modules"].values():
        spec["precision"] = {"preset": "F1_F1_F1"}
    write_record(file, record, arrays)
    with pytest.raises(ValueError, match="Preset of this JAX.*Got 'F1_F1_F1'"):
        snnk.compression.load(file, dense)


def test_inputs_that_are_all_the_same_have_no_map_of_low_rank():
    model = Net(Residual, depth=1)
    zeros = [jnp.zeros_like(batches(1)[0])]
    with pytest.raises(ValueError, match="inputs must be finite, and vary"):
        snnk.compress(model, zeros, PRE, budget=0.5, method=LowRank(), metric="plain")


def test_padding_does_not_count(net):
    weights = lambda batch: batch["mask"]  # noqa: E731
    mask = jnp.arange(TOKENS // 12) < 5
    mask = jnp.broadcast_to(mask, (12, TOKENS // 12))
    full, padded = [], []
    for x in batches():
        full.append({"x": x[:, :5]})
        noise = jnp.where(mask[..., None], x, 100.0)
        padded.append({"x": noise, "mask": mask})
    kernels = [
        snnk.compress(net, data, PRE, budget=0.4, weights=w, metric="plain")[0]
        .layers[1]
        .ffn.down.kernel[...]
        for data, w in ((full, None), (padded, weights))
    ]
    np.testing.assert_allclose(*kernels, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="shape of the tokens"):
        snnk.compress(net, padded, PRE, budget=0.4, weights=lambda b: b["mask"][:, 0])


@pytest.mark.slow
def test_a_common_budget_goes_where_it_helps(net):
    model = nnx.clone(net)
    # Of the first block, nothing but two units matters.
    model.layers[0].ffn.down.kernel[...] = (
        model.layers[0].ffn.down.kernel[...].at[2:].multiply(1e-4)
    )
    _, report = snnk.compress(model, batches(), PRE, budget=0.6, spread="curves")
    sizes = [block.size for block in report.blocks]
    assert sizes[0] < sizes[1]
    assert report.share <= 0.6


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    "when", [3, *(pytest.param(when, marks=pytest.mark.slow) for when in (9, 14))]
)
def test_a_killed_run_goes_on_from_its_sums(net, tmp_path, when, monkeypatch):
    from snnk_jax.compression import _gather

    monkeypatch.setattr(_gather.Data, "save_every", 1, raising=False)
    data, seen = batches(6), []

    def stream(limit):
        def read():
            for batch in data:
                seen.append(len(seen))
                if limit and len(seen) > limit:
                    raise KilledError
                yield batch

        return read

    options = {"budget": 0.4, "metric": "plain", "probes": 1}
    whole, _ = snnk.compress(net, data, PRE, **options)
    with pytest.raises(KilledError):
        snnk.compress(net, stream(when), PRE, state_dir=tmp_path, **options)
    seen.clear()
    resumed, _ = snnk.compress(net, stream(0), PRE, state_dir=tmp_path, **options)
    states_equal(whole, resumed)
    # Sums of other settings are not mixed in.
    with pytest.raises(ValueError, match="same model, data and settings"):
        snnk.compress(Net(Residual, seed=4), data, PRE, state_dir=tmp_path, **options)


def test_sums_of_other_columns_weights_or_outputs_are_refused(tmp_path):
    model = Net(Residual, depth=1)
    relu = Features(features=snnk.features.ArcCosine(num_features=1))
    cos = Features(features=snnk.features.URF(num_features=1, activation="cos"))
    options = {"metric": "plain", "probes": 1, "state_dir": tmp_path}

    def run(method=relu, **changes):
        budget = {"layers/0/ffn": 16}
        return snnk.compress(
            model, batches(), PRE, budget=budget, method=method, **options, **changes
        )[0]

    first = run()
    states_equal(first, run())
    for method, changes in (
        (cos, {}),
        (dataclasses.replace(relu, linear=True), {}),
        (relu, {"seed": 1}),
        (relu, {"weights": lambda x: x[..., 0] > 0}),
        (relu, {"apply": lambda m, x: m(x[..., ::-1])}),
    ):
        with pytest.raises(ValueError, match="same model, data and settings"):
            run(method, **changes)
    states_equal(first, run())


@pytest.mark.slow
def test_the_memory_of_the_sums_does_not_grow(net, tmp_path):
    sizes = []
    for num in (2, 6):
        folder = tmp_path / str(num)
        snnk.compress(
            net, batches(num), PRE, budget=0.4, metric="plain", state_dir=folder
        )
        sizes.append([f.stat().st_size for f in sorted(folder.iterdir())])
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 2


def test_export_of_a_compressed_model(net):
    small, _ = snnk.compress(net, batches(), PRE, budget=0.4, metric="plain")
    graphdef, state = nnx.split(small)
    run = jax.jit(lambda x: nnx.merge(graphdef, state)(x))
    x = batches(1)[0]
    exported = jax.export.export(run)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    np.testing.assert_allclose(exported.call(x), small(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_vision_transformer_never_seen():
    config = snnk.models.vit.ViTConfig(
        image_size=8,
        patch_size=4,
        num_classes=4,
        hidden_size=8,
        depth=2,
        num_heads=2,
        mlp_dim=32,
    )
    model = snnk.models.vit.ViT(config, rngs=nnx.Rngs(0))
    shape = model.head.kernel.shape
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), shape)
    images = jax.random.normal(jax.random.key(0), (3, 64, 8, 8, 3))
    rules = [snnk.CompressRule(path=r"blocks/[0-9]+/mlp", where=slice(1, None))]
    small, report = snnk.compress(model, list(images), rules, budget=0.25)
    assert small.blocks[0].mlp.fc1.out_features == 32
    assert small.blocks[1].mlp.fc1.out_features == report.blocks[0].size == 7
    assert report.output_r2 > 0.9


def test_wrong_files_are_refused(net, tmp_path):
    small, _ = snnk.compress(net, batches(), PRE, budget=0.4, metric="plain")
    file = tmp_path / "small.safetensors"
    snnk.compression.save(file, small, net)
    with pytest.raises(ValueError, match="architecture that was compressed"):
        snnk.compression.load(file, Net(Residual, depth=3))
    with pytest.raises(ValueError, match="architecture that was compressed"):
        snnk.compression.load(file, Net(PostNorm))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="was changed or damaged"):
        snnk.compression.load(file, net)
    with pytest.raises(FileNotFoundError, match="compressed model"):
        snnk.compression.load(tmp_path / "none", net)
    small.head.kernel[...] = small.head.kernel[...] * jnp.nan
    with pytest.raises(ValueError, match="head/kernel must be finite"):
        snnk.compression.save(file, small, net)


class Dropped(Residual):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return self.dropout(super().__call__(x))


def test_a_model_with_random_streams_is_kept_and_resumed(tmp_path):
    model, other = (Net(Dropped, depth=1, seed=seed) for seed in (0, 1))
    options = {"budget": 0.4, "metric": "plain", "probes": 1, "state_dir": tmp_path}
    small, _ = snnk.compress(model, batches(), PRE, **options)
    resumed, _ = snnk.compress(model, batches(), PRE, **options)
    x = batches(1, seed=5)[0]
    np.testing.assert_array_equal(resumed(x), small(x))
    file = tmp_path / "small.safetensors"
    snnk.compression.save(file, small, model)
    again = snnk.compression.load(file, other)
    np.testing.assert_array_equal(again(x), small(x))
    small.train()
    assert not np.array_equal(small(x), again(x))
    for each in (again, other):
        each.train()
    mask = again.layers[0].dropout(x) == 0
    np.testing.assert_array_equal(mask, other.layers[0].dropout(x) == 0)


BAD = {
    r"budget must be in \(0, 1\]": {"budget": 0.0},
    "at least 19 parameters": {"budget": 0.001},
    "budget must name the blocks": {"budget": {"layers/0/ffn": 3}},
    "sizes must be 1 to 24": {"budget": dict.fromkeys(names(), 25)},
    "sizes must be 1 to 6": {
        "budget": dict.fromkeys(names(), 0),
        "method": LowRank(),
    },
    "metric must be one of": {"budget": 0.5, "metric": "l1"},
    "metric 'norm' must have the norm": {"budget": 0.5, "metric": "norm"},
    "spread 'curves' must": {"budget": 0.5, "spread": "curves", "method": Affine()},
    "method must be a Method": {"budget": 0.5, "method": "units"},
    "probes must be at least 1": {"budget": 0.5, "probes": 0},
    "sweeps must be at least 1": {"budget": 0.5, "sweeps": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings(net, message, unchecked):
    with pytest.raises(ValueError, match=message):
        snnk.compress(net, batches(), PRE, **BAD[message])


def test_a_map_that_has_no_size_of_its_own_is_refused():
    arc = snnk.features.ArcCosine(num_features=8)
    chain = snnk.features.Chain(maps=(arc, arc))
    for features in (chain, snnk.features.AppendOne(chain)):
        with pytest.raises(ValueError, match="features must be a map whose num_feat"):
            Features(features=features)


def test_blocks_are_found_by_rules_in_model_order(net, post):
    first = [dataclasses.replace(PRE[0], path="layers/1/ffn"), *PRE]
    blocks = find_blocks(net, [dataclasses.replace(r, where=slice(1)) for r in first])
    assert [block.name for block in blocks] == names()
    block = blocks[0]
    assert (block.first, block.second) == ("layers/0/ffn/up", "layers/0/ffn/down")
    assert (block.stream, block.post_norm) == ("layers/0", False)
    assert (block.dim, block.width, block.out) == (DIM, WIDTH, DIM)
    assert block.biases == (True, True)
    held = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net.layers[0].ffn)))
    assert block.parameters == held
    assert block.flops == 4 * WIDTH * DIM
    (last,) = find_blocks(post, [dataclasses.replace(POST[0], where=slice(1, None))])
    assert (last.name, last.stream) == ("layers/1", "layers/1/norm")
    assert last.post_norm


def test_bad_rules(net, post):
    rule = functools.partial(snnk.CompressRule, first="up", second="down")
    for rules, message in (
        ([], "at least one CompressRule"),
        ([rule(path="blocks/.*")], "must match a module"),
        ([snnk.CompressRule(path="layers/[0-9]+/ffn")], "must hold nnx.Linear"),
        ([rule(path="layers/[0-9]+/ffn", norm="other")], "norm must be a module"),
    ):
        with pytest.raises(ValueError, match=message):
            snnk.compress(net, batches(), rules, budget=0.5)
    with pytest.raises(ValueError, match="must be a regular expression"):
        snnk.CompressRule(path="(")
    with pytest.raises(ValueError, match="first must name a module"):
        snnk.CompressRule(path=".*", first="")
    with pytest.raises(ValueError, match="must hold batches"):
        snnk.compress(net, [], PRE, budget=0.5)


def test_a_post_norm_layer_without_its_norm_is_refused(post):
    rules = [snnk.CompressRule(path="layers/[0-9]+", first="linear1", second="linear2")]
    with pytest.raises(ValueError, match="name the LayerNorm behind a post-norm"):
        snnk.compress(post, batches(), rules, budget=0.5)


class Scaled(nnx.Module):
    """A sum of a scale, and what is made of it."""

    def __init__(self, rngs, scale, after):
        self.ffn, self.scale, self.after = Mlp(rngs), scale, after

    def __call__(self, x):
        return self.after(self.scale * x + self.ffn(x))


@pytest.mark.parametrize(
    ("dtype", "scale"), [("bfloat16", 3.0), ("bfloat16", 300.0), ("float32", 1e6)]
)
def test_a_sum_is_known_at_any_scale_and_dtype(dtype, scale):
    rules = [snnk.CompressRule(path="layers/0/ffn", first="up", second="down")]
    x = batches(1)[0].astype(dtype)

    def inspected(after):
        model = nnx.Sequential(Scaled(nnx.Rngs(0), scale, after))
        for layer in (model.layers[0].ffn.up, model.layers[0].ffn.down):
            layer.dtype = jnp.dtype(dtype)
        return inspect(model, find_blocks(model, rules), x, lambda m, x: m(x))

    (block,) = inspected(lambda y: y)
    assert block.whole
    for other in (
        lambda y: y / 2,
        lambda y: y + jnp.abs(y),
        lambda y: scale * jnp.tanh(y / scale),
        lambda y: scale * (y / jnp.max(jnp.abs(y))),
    ):
        with pytest.raises(ValueError, match="must be a sum with the output"):
            inspected(other)


def test_outputs_that_do_not_depend_on_a_block(net):
    model = nnx.clone(net)
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    with pytest.raises(ValueError, match="outputs must depend on every block"):
        snnk.compress(model, batches(), PRE, budget=0.5)
