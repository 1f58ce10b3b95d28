import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import snnk_jax as snnk
from snnk_jax import adapters
from snnk_jax._files import read_record, write_record
from snnk_jax.models.vit import ViT, ViTConfig
from snnk_jax.nn import Adapted, AdapterParam
from snnk_jax.testing import call
from tests.tiers import slow_but

SIZES = {
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_classes": 3,
}
ARC = snnk.features.ArcCosine(num_features=8)
COS = snnk.features.URF(activation="cos", num_features=8, scale=1.0)


def make_base(seed=0, **changes):
    return ViT(ViTConfig(**(SIZES | changes)), rngs=nnx.Rngs(seed))


def snnk_build(fm):
    def build(module, rngs):
        return Adapted(module, snnk.nn.SNNKAdapter(16, features=fm, rngs=rngs))

    return build


def factored_build(module, rngs):
    adapter = snnk.nn.SNNKAdapter(
        16, features=COS, rank=2, modulate=False, normalize=False, rngs=rngs
    )
    return Adapted(module, adapter)


def bottleneck_build(module, rngs):
    return Adapted(module, snnk.nn.BottleneckAdapter(16, 3, rngs=rngs))


def lora_build(linear, rngs):
    return nnx.LoRA(
        16, 2, 16, base_module=linear, lora_param_type=AdapterParam, rngs=rngs
    )


def adaptformer_build(module, rngs):
    adapter = snnk.nn.BottleneckAdapter(16, 3, activation="relu", scale=0.1, rngs=rngs)
    return Adapted(module, adapter, parallel=True)


def trained_projection_build(module, rngs):
    adapter = snnk.nn.SNNKAdapter(16, features=COS, train_projection=True, rngs=rngs)
    return Adapted(module, adapter)


RULES = {
    "snnk_relu": [snnk.SwapRule(path=r".*/(attention|mlp)", build=snnk_build(ARC))],
    "snnk_cos": [snnk.SwapRule(path=r".*/mlp", build=snnk_build(COS))],
    "factored": [snnk.SwapRule(path=r".*/mlp", build=factored_build)],
    "bottleneck": [snnk.SwapRule(path=r".*/mlp", build=bottleneck_build)],
    "lora": [snnk.SwapRule(path=r".*/(query|value)", build=lora_build)],
    "adaptformer": [snnk.SwapRule(path=r".*/mlp", build=adaptformer_build)],
    "trained": [snnk.SwapRule(path=r".*/mlp", build=trained_projection_build)],
    "after the block": [snnk.SwapRule(path=r"blocks/\d+", build=snnk_build(ARC))],
    "chain": [
        snnk.SwapRule(path=r".*/mlp", build=snnk_build(snnk.features.Chain((ARC, ARC))))
    ],
    "dora": [
        snnk.SwapRule(
            path=r".*/(query|value)",
            build=lambda linear, rngs: snnk.nn.DoRA(linear, 2, rngs=rngs),
        )
    ],
    "vera": [
        snnk.SwapRule(
            path=r".*/(query|value)",
            build=lambda linear, rngs: snnk.nn.VeRA(linear, 8, rngs=rngs),
        )
    ],
    "ia3": [
        snnk.SwapRule(
            path=r".*/(key|value)",
            build=lambda linear, rngs: snnk.nn.Scaled(linear, "output"),
        ),
        snnk.SwapRule(
            path=r".*/fc2",
            build=lambda linear, rngs: snnk.nn.Scaled(linear, "input"),
        ),
    ],
}


def scramble(model, filter_=AdapterParam):
    """Gives the selected parameters and the head values no initialiser would."""
    graphdef, chosen, rest = nnx.split(
        model, nnx.Any(filter_, nnx.PathContains("head")), ...
    )
    keys = iter(jax.random.split(jax.random.key(5), 100))
    chosen = jax.tree.map(
        lambda p: 0.1 * jax.random.normal(next(keys), p.shape, p.dtype), chosen
    )
    return nnx.merge(graphdef, chosen, rest)


def trained(kind, base):
    model, _ = snnk.swap_modules(base, RULES[kind], rngs=nnx.Rngs(7))
    return scramble(model)


IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


@pytest.fixture(scope="module")
def base():
    return make_base()


@pytest.fixture
def saved(base, tmp_path):
    file = tmp_path / "adapter.safetensors"
    model = trained("snnk_relu", base)
    adapters.save_adapter(file, model, base_fingerprint=adapters.fingerprint(base))
    return file, model


@pytest.mark.parametrize(
    "kind", slow_but(("snnk_relu", "bottleneck", "lora", "after the block"), RULES)
)
def test_round_trip_from_the_plain_base(kind, base, tmp_path):
    file = tmp_path / "a.safetensors"
    model = trained(kind, base)
    size = adapters.save_adapter(
        file, model, base_fingerprint=adapters.fingerprint(base)
    )
    assert size == file.stat().st_size
    before = nnx.split(base)[1]
    loaded = adapters.load_adapter(file, base)
    logits = call(loaded, IMAGES)
    np.testing.assert_array_equal(logits, call(model, IMAGES))
    assert not np.allclose(logits, call(base, IMAGES))
    same = jax.tree.map(lambda a, b: (a == b).all(), before, nnx.split(base)[1])
    assert jax.tree.all(same)


@pytest.mark.parametrize("kind", ["snnk_cos", "bottleneck", "lora", "vera"])
def test_round_trip_into_an_adapted_model(kind, base, tmp_path):
    file = tmp_path / "a.safetensors"
    model = trained(kind, base)
    adapters.save_adapter(file, model, base_fingerprint=adapters.fingerprint(base))
    other, _ = snnk.swap_modules(base, RULES[kind], rngs=nnx.Rngs(99))
    np.testing.assert_array_equal(
        adapters.load_adapter(file, other)(IMAGES), model(IMAGES)
    )


def test_adapters_around_adapters(base, tmp_path):
    model, _ = snnk.swap_modules(base, RULES["lora"], rngs=nnx.Rngs(1))
    outer = [snnk.SwapRule(path=r"blocks/\d+/attention", build=snnk_build(ARC))]
    model, _ = snnk.swap_modules(model, outer, rngs=nnx.Rngs(2))
    model, _ = snnk.swap_modules(
        model,
        [snnk.SwapRule(path=r"blocks/0/attention", build=bottleneck_build)],
        rngs=nnx.Rngs(3),
    )
    model = scramble(model)
    file = tmp_path / "a.safetensors"
    adapters.save_adapter(file, model, base_fingerprint=adapters.fingerprint(base))
    loaded = adapters.load_adapter(file, base)
    np.testing.assert_array_equal(loaded(IMAGES), model(IMAGES))


def test_bitfit_saves_biases_alone(base, tmp_path):
    pattern = r"head/.*|(.*/)?bias"
    file = tmp_path / "a.safetensors"
    model = scramble(nnx.clone(base), nnx.PathContains("bias"))
    mark = adapters.fingerprint(base, exclude=pattern)
    adapters.save_adapter(
        file, model, base_fingerprint=mark, trained=pattern, exclude=pattern
    )
    assert all(name.endswith("bias") or "head" in name for name in load_file(file))
    np.testing.assert_array_equal(
        adapters.load_adapter(file, base)(IMAGES), model(IMAGES)
    )


def test_projections_are_named_by_key_unless_they_were_changed(base, tmp_path, saved):
    file, model = saved
    assert not any("projection" in name for name in load_file(file))
    omega = model.blocks[0].mlp.adapter.projection.values["omega"]
    omega[...] = 2.0 * omega[...]
    adapters.save_adapter(file, model, base_fingerprint=adapters.fingerprint(base))
    stored = [name for name in load_file(file) if name.endswith("omega")]
    assert stored == ["blocks/0/mlp/adapter/projection/values/omega"]
    loaded = adapters.load_adapter(file, base)
    np.testing.assert_array_equal(loaded(IMAGES), model(IMAGES))


def test_a_calibrated_projection_is_stored_whole(base, tmp_path):
    balanced = snnk.features.URF(activation="cos", num_features=8)
    rules = [snnk.SwapRule(path=r".*/mlp", build=snnk_build(balanced))]
    model, _ = snnk.swap_modules(base, rules, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 16)) / np.arange(1, 17) ** 2, jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    projection = model.blocks[0].mlp.adapter.projection
    params = projection.params
    given = {
        **{k: v for k, v in params.items() if k != "scale"},
        "mean": x.mean(axis=0),
        "metric": jnp.eye(16) * 0.5,
        "dual_metric": jnp.eye(16) * 2,
        "stretch": jnp.ones(16),
    }
    projection.calibrate(given)
    projection.features.psi(projection.params, kernel)
    path = tmp_path / "adapter.safetensors"
    print_of_base = adapters.fingerprint(base)
    adapters.save_adapter(path, model, base_fingerprint=print_of_base)
    loaded = adapters.load_adapter(path, base)
    found = loaded.blocks[0].mlp.adapter.projection.params
    assert found.keys() == given.keys()
    jax.tree.map(np.testing.assert_array_equal, found, given)
    image = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    np.testing.assert_array_equal(loaded(image), model(image))


def test_the_file_is_kilobytes_however_wide_the_projection(tmp_path):
    wide = make_base(hidden_size=128, mlp_dim=128)
    fm = snnk.features.ArcCosine(num_features=16)

    def build(module, rngs):
        adapter = snnk.nn.SNNKAdapter(128, features=fm, modulate=False, rngs=rngs)
        return Adapted(module, adapter)

    rules = [snnk.SwapRule(path=r".*/mlp", build=build)]
    model, _ = snnk.swap_modules(wide, rules, rngs=nnx.Rngs(0))
    size = adapters.save_adapter(
        tmp_path / "a.safetensors",
        model,
        base_fingerprint=adapters.fingerprint(wide),
    )
    trained_bytes = 4 * (2 * 16 * 128 + 128 * 3 + 3)
    assert size < trained_bytes + 4096


def test_bfloat16_parameters_survive(base, tmp_path):
    def build(module, rngs):
        adapter = snnk.nn.SNNKAdapter(
            16, features=ARC, param_dtype=jnp.bfloat16, rngs=rngs
        )
        return Adapted(module, adapter)

    rules = [snnk.SwapRule(path=r".*/mlp", build=build)]
    model, _ = snnk.swap_modules(base, rules, rngs=nnx.Rngs(0))
    model = scramble(model)
    file = tmp_path / "a.safetensors"
    adapters.save_adapter(file, model, base_fingerprint=adapters.fingerprint(base))
    loaded = adapters.load_adapter(file, base)
    assert loaded.blocks[0].mlp.adapter.readout.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded(IMAGES), model(IMAGES))


def test_another_base_is_refused(saved):
    file, _ = saved
    with pytest.raises(ValueError, match="base_model must be the one the adapter was"):
        adapters.load_adapter(file, make_base(seed=1))


def test_the_head_takes_the_outputs_of_the_file(saved, base):
    """A head belongs to the task, and tasks have their own numbers of classes."""
    file, model = saved
    other = make_base(num_classes=5)
    loaded = adapters.load_adapter(file, other)
    assert loaded.head.out_features == 3
    np.testing.assert_array_equal(call(loaded, IMAGES), call(model, IMAGES))
    assert call(other, IMAGES).shape == (4, 5)


def test_another_shape_is_refused_by_name(base, tmp_path):
    file = tmp_path / "a.safetensors"
    model, _ = snnk.swap_modules(base, RULES["snnk_relu"], rngs=nnx.Rngs(7))
    found = adapters.fingerprint(base)
    adapters.save_adapter(file, model, base_fingerprint=found)
    wide = snnk.SwapRule(
        path="head",
        build=lambda head, rngs: nnx.Linear(8, 3, rngs=rngs),
    )
    other, _ = snnk.swap_modules(base, [wide], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"head/kernel \(16, 3\) instead of \(8, 3\)"):
        adapters.load_adapter(file, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["modules"][0].pop("dim"), "must have the settings of its kind"),
        (lambda r: r["modules"][0].update(dim="x"), "must have the settings of its"),
        (lambda r: r["modules"][0].update(kind="exec"), "kinds must be among"),
        (lambda r: r["modules"][0]["features"].update(kind="x"), "a known feature map"),
        (
            lambda r: r["modules"][0]["features"]["fields"].update(num_features=10**7),
            r"readout \(8, 16\) instead of \(10000000, 16\)",
        ),
    ],
)
def test_settings_with_a_checksum_of_their_own_are_refused_undrawn(
    saved, base, change, message
):
    """The checksum is no signature: whoever writes a file can write that too."""
    file, _ = saved
    with safe_open(file, framework="numpy") as opened:
        record = json.loads(opened.metadata()["record"])
    change(record)
    write_record(file, record, load_file(file))
    with pytest.raises(ValueError, match=message):
        adapters.load_adapter(file, base)


def test_another_structure_is_refused_by_name(saved, base):
    file, _ = saved
    model, _ = snnk.swap_modules(base, RULES["snnk_cos"], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="adapters of the file, or none. Got some at"):
        adapters.load_adapter(file, model)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, base, share):
    file, _ = saved
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="adapter must be a whole safetensors file"):
        adapters.load_adapter(file, base)


def test_a_changed_array_is_refused(saved, base):
    file, _ = saved
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="adapter must match its checksum"):
        adapters.load_adapter(file, base)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["base"].update(fingerprint="0" * 64),
        lambda record: record["modules"][0].update(dim=99),
        lambda record: record.update(generator="other"),
    ],
)
def test_a_changed_header_is_refused(saved, base, change):
    file, _ = saved
    with safe_open(file, framework="numpy") as opened:
        header = opened.metadata()
    record = json.loads(header["record"])
    change(record)
    save_file(load_file(file), file, header | {"record": json.dumps(record)})
    with pytest.raises(ValueError, match="adapter must match its checksum"):
        adapters.load_adapter(file, base)


def test_a_foreign_file_is_refused(tmp_path, base):
    file = tmp_path / "a.safetensors"
    save_file({"x": np.zeros(3)}, file)
    with pytest.raises(ValueError, match="adapter must be a file of save_adapter"):
        adapters.load_adapter(file, base)
    with pytest.raises(FileNotFoundError, match="adapter must be an existing file"):
        adapters.load_adapter(tmp_path / "none", base)


def test_a_generator_that_draws_otherwise_is_noticed(saved, base, monkeypatch):
    file, _ = saved
    words = snnk.projections.random_bits
    with jax.disable_jit():  # or what was compiled before would still be called
        adapters.load_adapter(file, base)
        monkeypatch.setattr(
            snnk.projections, "random_bits", lambda key, count: words(key, count)[::-1]
        )
        with pytest.raises(ValueError, match="must be drawn as it was"):
            adapters.load_adapter(file, base)


def test_non_finite_and_empty_are_not_saved(base, tmp_path):
    file = tmp_path / "a.safetensors"
    mark = adapters.fingerprint(base)
    model = trained("bottleneck", base)
    model.blocks[1].mlp.adapter.up_bias[...] = jnp.full(16, jnp.nan)
    with pytest.raises(ValueError, match=r"blocks/1/mlp/adapter/up_bias must be finit"):
        adapters.save_adapter(file, model, base_fingerprint=mark)
    with pytest.raises(ValueError, match="model must have AdapterParam"):
        adapters.save_adapter(file, base, base_fingerprint=mark, trained="none")
    assert list(tmp_path.iterdir()) == []


def test_a_feature_map_that_json_cannot_hold_is_refused(base, tmp_path):
    fm = snnk.features.URF(
        activation=snnk.activations.get("cos", b=2.0), num_features=8
    )
    rules = [snnk.SwapRule(path=r".*/mlp", build=snnk_build(fm))]
    model, _ = snnk.swap_modules(base, rules, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="settings must be names and numbers"):
        adapters.save_adapter(
            tmp_path / "a", model, base_fingerprint=adapters.fingerprint(base)
        )


def test_metadata(base, tmp_path):
    file = tmp_path / "a.safetensors"
    adapters.save_adapter(
        file,
        trained("lora", base),
        base_fingerprint=adapters.fingerprint(base),
        metadata={"task": "digits"},
    )
    assert adapters.read_metadata(file) == {"task": "digits"}


def test_fingerprint_ignores_adapters_and_head_and_sees_the_rest(base):
    mark = adapters.fingerprint(base)
    assert adapters.fingerprint(trained("snnk_relu", base)) == mark
    assert adapters.fingerprint(trained("lora", base)) == mark
    changed = nnx.clone(base)
    changed.norm.bias[...] = changed.norm.bias[...] + 1e-6
    assert adapters.fingerprint(changed) != mark


class Small(nnx.Module):
    """A model whose head has a name and a place of its own."""

    def __init__(self, seed=0, dtype=jnp.float32):
        rngs = nnx.Rngs(seed)
        self.fc = nnx.Linear(8, 8, param_dtype=dtype, rngs=rngs)
        self.classifier = nnx.Linear(8, 3, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.classifier(self.fc(x))


ROWS = jax.random.normal(jax.random.key(1), (5, 8))


def small(build, base=None, train_head=True):
    """A small base, and one with an adapter around ``fc``, trained."""
    base = Small() if base is None else base
    rules = [snnk.SwapRule(path="fc", build=build)]
    model, _ = snnk.swap_modules(base, rules, rngs=nnx.Rngs(3))
    model = scramble(model)
    if train_head:
        model.classifier.bias[...] = jnp.ones(3, model.classifier.bias.dtype)
    return base, model


def arc_build(module, rngs):
    return Adapted(module, snnk.nn.SNNKAdapter(8, features=ARC, rngs=rngs))


def save(file, base, model, **options):
    exclude = options.get("exclude", "head/.*")
    mark = adapters.fingerprint(base, exclude=exclude)
    return adapters.save_adapter(file, model, base_fingerprint=mark, **options)


def test_a_trained_head_of_another_name_is_not_lost(tmp_path):
    base, model = small(arc_build)
    with pytest.raises(ValueError, match="model must have the parameters of the base"):
        save(tmp_path / "a", base, model)
    assert not list(tmp_path.iterdir())
    save(tmp_path / "a", base, model, exclude="classifier/.*")
    loaded = adapters.load_adapter(tmp_path / "a", base)
    np.testing.assert_array_equal(call(loaded, ROWS), call(model, ROWS))


def test_what_exclude_leaves_out_must_be_trained(tmp_path):
    base, model = small(arc_build)
    with pytest.raises(ValueError, match=r"would lose it. Got 'fc/.*classifier/kernel"):
        save(tmp_path / "a", base, model, trained="fc/.*", exclude="classifier/.*")
    with pytest.raises(ValueError, match="trained must match parameters"):
        save(tmp_path / "a", base, model, trained="haed/.*")


def test_trained_names_are_those_of_the_base(tmp_path):
    """The bias of a Linear inside an adapter is one of the base."""
    pattern = "classifier/.*|fc/bias"
    base, model = small(arc_build)
    model.fc.base_module.bias[...] = jnp.full(8, 2.0)
    save(tmp_path / "a", base, model, exclude=pattern)
    loaded = adapters.load_adapter(tmp_path / "a", base)
    np.testing.assert_array_equal(call(loaded, ROWS), call(model, ROWS))


def test_lora_that_would_not_be_saved_is_refused(tmp_path):
    def build(linear, rngs):
        return nnx.LoRA(8, 2, 8, base_module=linear, rngs=rngs)

    base, model = small(build)
    with pytest.raises(ValueError, match="LoRA without lora_param_type"):
        save(tmp_path / "a", base, model, exclude="classifier/.*")
    # Where the fingerprint covers what was trained, there is nothing to compare with.
    with pytest.raises(ValueError, match=r"exclude must match all .*without .'fc/"):
        save(tmp_path / "a", base, model, trained="fc/.*bias|head/.*")


@pytest.mark.parametrize(
    "activation",
    [
        snnk.activations.get("leaky_relu", negative_slope=0.5),
        jax.nn.gelu,  # the form by tanh
        lambda z: z * z,
    ],
)
def test_an_activation_whose_name_means_another_is_refused(activation, tmp_path):
    def build(module, rngs):
        adapter = snnk.nn.BottleneckAdapter(8, 2, activation=activation, rngs=rngs)
        return Adapted(module, adapter)

    with pytest.raises(ValueError, match="settings must be names and numbers"):
        save(tmp_path / "a", *small(build, train_head=False))


def test_a_subclass_is_not_taken_for_its_parent(tmp_path):
    class Scaled(snnk.nn.SNNKAdapter):
        def delta(self, x):
            return 2 * super().delta(x)

    def build(module, rngs):
        return Adapted(module, Scaled(8, features=ARC, rngs=rngs))

    base, model = small(build, train_head=False)
    save(tmp_path / "a", base, model)
    with pytest.raises(ValueError, match="must have a projection at fc/adapter"):
        adapters.load_adapter(tmp_path / "a", base)
    other, _ = snnk.swap_modules(
        base, [snnk.SwapRule(path="fc", build=build)], rngs=nnx.Rngs(9)
    )
    loaded = adapters.load_adapter(tmp_path / "a", other)
    np.testing.assert_array_equal(call(loaded, ROWS), call(model, ROWS))


def test_an_adapted_model_with_other_settings_is_refused(tmp_path):
    def build(parallel, scale):
        return lambda module, rngs: Adapted(
            module,
            snnk.nn.BottleneckAdapter(8, 2, scale=scale, rngs=rngs),
            parallel=parallel,
        )

    base, model = small(build(True, 0.1), train_head=False)
    save(tmp_path / "a", base, model)
    other, _ = snnk.swap_modules(
        base, [snnk.SwapRule(path="fc", build=build(False, 1.0))], rngs=nnx.Rngs(9)
    )
    with pytest.raises(
        ValueError, match=r"settings of the file.*'scale': \(1.0, 0.1\)"
    ):
        adapters.load_adapter(tmp_path / "a", other)


def test_a_head_keeps_its_dtype(tmp_path):
    base, model = small(arc_build, Small(dtype=jnp.bfloat16))
    model.classifier = nnx.Linear(8, 5, rngs=nnx.Rngs(4))
    save(tmp_path / "a", base, model, exclude="classifier/.*")
    loaded = adapters.load_adapter(tmp_path / "a", base)
    assert loaded.classifier.kernel.dtype == jnp.float32
    np.testing.assert_array_equal(
        loaded.classifier.kernel[...], model.classifier.kernel[...]
    )


def test_batch_statistics_belong_to_the_base():
    class Normed(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(1))

    first, second = Normed(), Normed()
    mark = adapters.fingerprint(first)
    first.dropout(jnp.ones(3))  # counts on
    assert adapters.fingerprint(first) == mark
    second.norm.mean[...] = jnp.full(4, 0.5)
    assert adapters.fingerprint(second) != mark


def test_two_arrays_of_one_name_are_refused():
    class Wrapper(nnx.Module):
        def __init__(self):
            self.base_module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.kernel = nnx.Param(jnp.ones(2))

    with pytest.raises(ValueError, match="names that differ .* Got kernel twice"):
        adapters.fingerprint(Wrapper())


def test_a_base_with_a_base_module_of_its_own(tmp_path):
    class Halved(nnx.Module):
        def __init__(self):
            self.base_module = make_base()

        def __call__(self, x):
            return self.base_module(x) / 2

    base = Halved()
    paths = ("base_module/blocks/0/attention", "base_module/blocks/1/mlp/fc2")
    builds = (snnk_build(ARC), bottleneck_build)
    rules = [snnk.SwapRule(path=p, build=b) for p, b in zip(paths, builds, strict=True)]
    model = scramble(snnk.swap_modules(base, rules, rngs=nnx.Rngs(1))[0])
    save(tmp_path / "a", base, model)
    for loads in (base, snnk.swap_modules(base, rules, rngs=nnx.Rngs(2))[0]):
        loaded = adapters.load_adapter(tmp_path / "a", loads)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
        assert type(loaded.base_module.blocks[1].mlp.fc2) is Adapted


def test_adapters_of_a_scan_travel(tmp_path):
    """One draw for each layer: no single key stands for them."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(keys):
        adapter = snnk.nn.SNNKAdapter(8, features=ARC, rngs=nnx.Rngs(keys))
        return Adapted(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), adapter)

    class Scanned(nnx.Module):
        def __init__(self, seed):
            self.layers = stack(jax.random.split(jax.random.key(seed), 3))

    model, other = scramble(Scanned(0)), Scanned(1)
    with pytest.raises(ValueError, match="must have one key to be redrawn"):
        snnk.nn.redraw(model, rngs=nnx.Rngs(0))
    save(tmp_path / "a", other, model)
    loaded = adapters.load_adapter(tmp_path / "a", other)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda r: r.pop("base"), "base"),
        (lambda r: r.update(modules={}), "modules"),
        (lambda r: r["modules"].append("x"), "modules"),
        (lambda r: r["base"].update(exclude="("), "base"),
        (lambda r: r["projections"].update(x={"key": [1]}), "projections"),
        (lambda r: r["projections"].update(x={"key": [1, -2], "probes": {}}), "proj"),
    ],
)
def test_a_record_without_its_parts_is_refused(saved, base, change, what):
    file, _ = saved
    with safe_open(file, framework="numpy") as opened:
        record = json.loads(opened.metadata()["record"])
    change(record)
    write_record(file, record, load_file(file))
    with pytest.raises(ValueError, match=f"must have a whole record.*{what}"):
        adapters.load_adapter(file, base)


@pytest.mark.parametrize(("kind", "field"), [("lora", "lora_rank"), ("vera", "rank")])
def test_a_rank_beyond_the_file_is_refused_undrawn(kind, field, base, tmp_path):
    file = tmp_path / "a"
    save(file, base, trained(kind, base))
    with safe_open(file, framework="numpy") as opened:
        record = json.loads(opened.metadata()["record"])
    record["modules"][0][field] = 10**13
    write_record(file, record, load_file(file))
    with pytest.raises(
        ValueError, match=r"rank of at most|instead of \(16, 1000000000"
    ):
        adapters.load_adapter(file, base)


def test_a_head_that_was_trained_alone_is_saved_alone(tmp_path):
    """On states that were kept, say: there is no base to compare."""

    class Alone(nnx.Module):
        def __init__(self):
            self.classifier = nnx.Linear(8, 3, rngs=nnx.Rngs(8))

    base, head = Small(), Alone()
    mark = adapters.fingerprint(base, exclude="classifier/.*")
    file = tmp_path / "a"
    options = {"exclude": "classifier/.*", "base_fingerprint": mark}
    adapters.save_adapter(file, head, **options)
    loaded = adapters.load_adapter(file, base)
    np.testing.assert_array_equal(
        call(loaded, ROWS), call(head.classifier, call(base.fc, ROWS))
    )


class Gated(Adapted):
    """A wrapper of one's own: what is saved as Adapted would be another function."""

    def __call__(self, x):
        return self.base_module(x) + 0.1 * (super().__call__(x) - self.base_module(x))


def test_a_wrapper_of_ones_own_is_not_rebuilt_as_another(tmp_path):
    def build(module, rngs):
        return Gated(module, snnk.nn.SNNKAdapter(8, features=ARC, rngs=rngs))

    base, model = small(build, train_head=False)
    save(tmp_path / "a", base, model)
    with pytest.raises(ValueError, match="Got missing|must have a projection at"):
        adapters.load_adapter(tmp_path / "a", base)
    loaded = adapters.load_adapter(tmp_path / "a", model)
    np.testing.assert_array_equal(call(loaded, ROWS), call(model, ROWS))


def test_a_map_of_ones_own_is_not_rebuilt_as_its_namesake(tmp_path):
    class ArcCosine(snnk.features.ArcCosine):
        def phi(self, params, x):
            return 2 * super().phi(params, x)

    fm = ArcCosine(num_features=8)
    assert fm != ARC
    base, model = small(
        lambda m, rngs: Adapted(m, snnk.nn.SNNKAdapter(8, features=fm, rngs=rngs)),
        train_head=False,
    )
    save(tmp_path / "a", base, model)
    with pytest.raises(
        ValueError, match="features must be a known .*custom:ArcCosine'"
    ):
        adapters.load_adapter(tmp_path / "a", base)
    np.testing.assert_array_equal(
        call(adapters.load_adapter(tmp_path / "a", model), ROWS), call(model, ROWS)
    )


def test_what_is_trained_must_be_out_of_the_fingerprint(tmp_path):
    """Or nothing says whether something else was trained and would be lost."""
    base, model = Small(), Small()
    model.fc.bias[...] = jnp.ones(8)
    model.classifier.kernel[...] += 1
    with pytest.raises(ValueError, match=r"exclude must match all .*'fc/bias'"):
        save(tmp_path / "a", base, model, trained="fc/bias")
    with pytest.raises(ValueError, match="model must have the parameters of the base"):
        save(tmp_path / "a", base, model, exclude="fc/bias")


@pytest.mark.usefixtures("unchecked")
def test_what_no_file_could_hold_is_refused_before_it_is_written(tmp_path):
    base, model = small(arc_build, train_head=False)
    mark = adapters.fingerprint(base)
    for metadata in ("my run", ["a"], {"lr": np.float32(1e-3)}, {1: "a"}):
        with pytest.raises(ValueError, match="metadata must be a dict of strings"):
            save(tmp_path / "a", base, model, metadata=metadata)
    with pytest.raises(ValueError, match="base_fingerprint must be what .* Got 'junk'"):
        adapters.save_adapter(tmp_path / "a", model, base_fingerprint="junk")
    for options in ({"exclude": "("}, {"trained": "("}):
        with pytest.raises(ValueError, match=r"must be a regular expression. Got '\('"):
            adapters.save_adapter(
                tmp_path / "a", model, base_fingerprint=mark, **options
            )
    with pytest.raises(ValueError, match=r"exclude must be a regular .* Got '\('"):
        adapters.fingerprint(base, exclude="(")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["snnk_relu", "bottleneck", "lora", "dora", "vera"])
def test_loaded_adapters_run_the_program_of_those_they_were_saved_from(name, tmp_path):
    base = make_base()
    model, _ = snnk.swap_modules(base, RULES[name], rngs=nnx.Rngs(1))
    mark = adapters.fingerprint(base)
    adapters.save_adapter(tmp_path / "a", model, base_fingerprint=mark)
    loaded = adapters.load_adapter(tmp_path / "a", base)
    assert nnx.split(loaded)[0] == nnx.split(model)[0]


def test_the_plain_model_of_a_loaded_task_can_be_saved(tmp_path):
    """A file brings a head of its own size, of which the config does not know."""
    from snnk_jax.models.vit_params import load_vit, save_vit

    three, five = make_base(), make_base(num_classes=5)
    model, _ = snnk.swap_modules(three, RULES["lora"], rngs=nnx.Rngs(1))
    mark = adapters.fingerprint(three)
    adapters.save_adapter(tmp_path / "a", model, base_fingerprint=mark)
    loaded = adapters.load_adapter(tmp_path / "a", five)
    with pytest.raises(ValueError, match="parameters of a plain ViT: merge or remove"):
        save_vit(tmp_path / "vit.safetensors", loaded)
    for query in (block.attention.query for block in loaded.blocks):
        query.lora_b[...] += 1.0
    for value in (block.attention.value for block in loaded.blocks):
        value.lora_b[...] += 1.0
    save_vit(tmp_path / "vit.safetensors", adapters.merge_adapters(loaded)[0])
    assert load_vit(tmp_path / "vit.safetensors").head.out_features == 3


def test_files_with_statistics_in_bfloat16_are_read(tmp_path):
    """As adapters of that dtype had them at first."""
    base = Small(dtype=jnp.bfloat16)
    model = small(
        lambda m, rngs: Adapted(
            m,
            snnk.nn.SNNKAdapter(
                *(8,), features=ARC, standardize=True, param_dtype="bfloat16", rngs=rngs
            ),
        ),
        base,
        train_head=False,
    )[1]
    mean = model.fc.adapter.statistics[0]
    mean[...] = jnp.arange(8, dtype=jnp.float32)
    save(tmp_path / "a", base, model)
    record, arrays = read_record(tmp_path / "a", "", "", "snnk_jax.adapter.1")
    old = {
        name: value.astype(jnp.bfloat16) if "statistics" in name else value
        for name, value in arrays.items()
    }
    write_record(tmp_path / "a", record, old)
    loaded = adapters.load_adapter(tmp_path / "a", base)
    found = loaded.fc.adapter.statistics[0]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[...], mean[...])
