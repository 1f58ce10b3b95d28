import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.adapters import AdapterBank
from snnk_jax.nn import AdapterParam
from snnk_jax.testing import call

FM = snnk.features.ArcCosine(num_features=8)
X = jax.random.normal(jax.random.key(0), (5, 6))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(6, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.body(x))


def build(module, rngs):
    adapter = snnk.nn.SNNKAdapter(8, features=FM, rngs=rngs)
    return snnk.nn.Adapted(module, adapter)


RULES = [snnk.SwapRule(path="body", build=build)]


def train(model, amount):
    """Stands for training: other adapters and another head."""
    trainable = nnx.Any(AdapterParam, nnx.PathContains("head"))
    graphdef, params, rest = nnx.split(model, trainable, ...)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p + amount, params), rest)


@pytest.fixture
def bank():
    bank = AdapterBank(Model(nnx.Rngs(0)))
    for i, name in enumerate(("a", "b")):
        model = bank.add(name, RULES, rngs=nnx.Rngs(i))
        bank.replace(name, train(model, 0.1 * (i + 1)))
    return bank


def test_switching_keeps_adapters_apart_and_the_base_as_it_was(bank):
    base = call(Model(nnx.Rngs(0)), X)
    outputs = {name: call(bank[name], X) for name in bank}
    assert list(outputs) == ["a", "b"]
    assert len(bank) == 2
    assert np.abs(outputs["a"] - outputs["b"]).max() > 0.01
    assert np.abs(outputs["a"] - base).max() > 0.01
    np.testing.assert_array_equal(call(bank.base, X), base)


def test_models_share_the_arrays_of_the_base(bank):
    kernels = [bank[name].body.base_module.kernel[...] for name in bank]
    pointers = {
        k.unsafe_buffer_pointer() for k in (*kernels, bank.base.body.kernel[...])
    }
    assert len(pointers) == 1


def test_switching_does_not_compile_again(bank):
    traces = 0

    @jax.jit
    def apply(model, x):
        nonlocal traces
        traces += 1
        return model(x)

    for name in bank:
        apply(bank[name], X)
    assert traces == 1


def test_a_removed_adapter_is_gone_and_the_others_stay(bank):
    before = call(bank["b"], X)
    bank.remove("a")
    assert "a" not in bank
    np.testing.assert_array_equal(call(bank["b"], X), before)
    with pytest.raises(ValueError, match=r"one of \['b'\]. Got 'a'"):
        bank["a"]


def test_save_and_load_into_another_bank(bank, tmp_path):
    size = bank.save("b", tmp_path / "b.safetensors", metadata={"task": "b"})
    assert size == (tmp_path / "b.safetensors").stat().st_size
    other = AdapterBank(Model(nnx.Rngs(0)))
    loaded = other.load("again", tmp_path / "b.safetensors")
    np.testing.assert_array_equal(call(loaded, X), call(bank["b"], X))
    assert list(other) == ["again"]


def test_tasks_have_their_own_numbers_of_outputs(bank, tmp_path):
    def head(linear, rngs):
        return nnx.Linear(8, 1, rngs=rngs)

    rules = [*RULES, snnk.SwapRule(path="head", build=head)]
    bank.add("values", rules, rngs=nnx.Rngs(5))
    bank.replace("values", train(bank["values"], 0.3))
    bank.save("values", tmp_path / "v.safetensors")
    other = AdapterBank(Model(nnx.Rngs(0)))
    loaded = other.load("values", tmp_path / "v.safetensors")
    np.testing.assert_array_equal(call(loaded, X), call(bank["values"], X))
    assert call(loaded, X).shape == (5, 1)
    assert call(bank["a"], X).shape == (5, 3)


def test_a_file_of_another_base_is_refused(bank, tmp_path):
    bank.save("a", tmp_path / "a.safetensors")
    other = AdapterBank(Model(nnx.Rngs(9)))
    with pytest.raises(ValueError, match="base_model must be the one"):
        other.load("a", tmp_path / "a.safetensors")
    assert len(other) == 0


def test_a_model_whose_base_was_trained_is_refused(bank):
    changed = nnx.clone(bank["a"])
    changed.body.base_module.bias[...] = jnp.ones(8)
    with pytest.raises(ValueError, match="model must have the base's parameters"):
        bank.replace("a", changed)


@pytest.mark.parametrize("name", ["a", "b"])
def test_names_are_new(bank, name, tmp_path):
    with pytest.raises(ValueError, match=f"a new name. Got '{name}'"):
        bank.add(name, RULES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"a new name. Got '{name}'"):
        bank.load(name, tmp_path / "file")


def test_an_adapted_base_is_refused(bank):
    with pytest.raises(ValueError, match="base_model must have no adapters"):
        AdapterBank(bank["a"])


def test_a_model_with_other_adapters_is_refused(bank):
    with pytest.raises(ValueError, match="must have the adapters of 'a'. Got others"):
        bank.replace("a", bank.base)


def test_a_base_changed_in_place_is_not_saved(bank, tmp_path):
    bank["a"].body.base_module.bias[...] = jnp.ones(8)
    with pytest.raises(ValueError, match="model must have the parameters of the base"):
        bank.save("a", tmp_path / "a.safetensors")


def test_the_head_may_have_another_name(tmp_path):
    class Named(nnx.Module):
        def __init__(self):
            self.body = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
            self.classifier = nnx.Linear(8, 3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.classifier(self.body(x))

    bank = AdapterBank(Named(), exclude="classifier/.*")
    model = nnx.clone(bank.add("a", RULES, rngs=nnx.Rngs(0)))
    model.classifier.bias[...] = jnp.ones(3)
    bank.replace("a", model)
    bank.save("a", tmp_path / "a")
    other = AdapterBank(Named(), exclude="classifier/.*")
    np.testing.assert_array_equal(
        call(other.load("a", tmp_path / "a"), X), call(model, X)
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "changed",
    [
        {"features": snnk.features.URF(activation="cos", num_features=8)},
        {"normalize": False},
        {"standardize": True},
        {"parallel": True},
    ],
)
def test_an_adapter_of_other_settings_is_no_replacement(bank, changed):
    def other(module, rngs):
        options = {"features": FM} | changed
        parallel = options.pop("parallel", False)
        adapter = snnk.nn.SNNKAdapter(8, rngs=rngs, **options)
        return snnk.nn.Adapted(module, adapter, parallel=parallel)

    rules = [snnk.SwapRule(path="body", build=other)]
    model, _ = snnk.swap_modules(bank.base, rules, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="model must have the adapters of 'a'. Got"):
        bank.replace("a", model)


def test_a_replacement_shares_the_arrays_of_the_base(bank):
    graphdef, state = nnx.split(bank["a"])
    model = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    assert model.body.base_module.kernel[...] is not bank.base.body.kernel[...]
    bank.replace("a", model)
    assert bank["a"].body.base_module.kernel[...] is bank.base.body.kernel[...]
    np.testing.assert_array_equal(call(bank["a"], X), call(model, X))


def test_a_file_that_the_bank_could_not_write_is_refused(tmp_path):
    base, pattern = Model(nnx.Rngs(0)), "head/.*|(.*/)?bias"
    model = nnx.clone(base)
    model.body.bias[...] += 1.0
    snnk.adapters.save_adapter(
        tmp_path / "bitfit",
        model,
        base_fingerprint=snnk.adapters.fingerprint(base, exclude=pattern),
        exclude=pattern,
    )
    with pytest.raises(ValueError, match="an exclude that covers all .*'head/"):
        AdapterBank(base).load("bitfit", tmp_path / "bitfit")
    bank = AdapterBank(base, exclude=pattern)
    bank.load("bitfit", tmp_path / "bitfit")
    bank.replace("bitfit", bank["bitfit"])
    bank.save("bitfit", tmp_path / "again")


def test_adapters_that_no_file_could_describe_can_be_replaced():
    relu = dataclasses.replace(snnk.activations.get("relu"), name="mine")

    def own(module, rngs):
        adapter = snnk.nn.BottleneckAdapter(8, 2, activation=relu, rngs=rngs)
        return snnk.nn.Adapted(module, adapter)

    bank = AdapterBank(Model(nnx.Rngs(0)))
    model = bank.add("a", [snnk.SwapRule(path="body", build=own)], rngs=nnx.Rngs(1))
    bank.replace("a", train(model, 0.1))


def test_a_base_with_a_wrapper_of_its_own_shares_its_arrays():
    base = Model(nnx.Rngs(0))
    base.head = nnx.Linear(8, 3, rngs=nnx.Rngs(1))
    base.body = nnx.LoRA(6, 2, 8, base_module=base.body, rngs=nnx.Rngs(2))
    bank = AdapterBank(base)
    model = bank.add("a", RULES, rngs=nnx.Rngs(1))
    graphdef, state = nnx.split(model)
    bank.replace("a", nnx.merge(graphdef, jax.tree.map(jnp.copy, state)))
    kept = bank["a"].body.base_module
    assert kept.base_module.kernel[...] is base.body.base_module.kernel[...]
    assert kept.lora_a[...] is base.body.lora_a[...]
