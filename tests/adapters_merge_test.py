import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax import adapters
from snnk_jax.nn import AdapterParam
from snnk_jax.testing import call

BUILDS = {
    "lora": lambda linear, rngs: nnx.LoRA(
        linear.in_features,
        2,
        linear.out_features,
        base_module=linear,
        lora_param_type=AdapterParam,
        rngs=rngs,
    ),
    "dora": lambda linear, rngs: snnk.nn.DoRA(linear, 2, rngs=rngs),
    "vera": lambda linear, rngs: snnk.nn.VeRA(linear, 8, rngs=rngs),
    "ia3": lambda linear, rngs: snnk.nn.Scaled(linear, "output"),
}
FM = snnk.features.ArcCosine(num_features=8)


def make_base():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(6, 8, rngs=rngs),
        nnx.relu,
        nnx.Linear(8, 3, use_bias=False, rngs=rngs),
    )


def trained(build, path=r"layers/\d"):
    rules = [snnk.SwapRule(path=path, build=build)]
    model, _ = snnk.swap_modules(make_base(), rules, rngs=nnx.Rngs(1))
    graphdef, params, rest = nnx.split(model, AdapterParam, ...)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), params
    )
    return nnx.merge(graphdef, params, rest)


X = jax.random.normal(jax.random.key(0), (5, 6))


@pytest.mark.parametrize("kind", BUILDS)
def test_a_merged_model_is_plain_and_computes_the_same(kind):
    model = trained(BUILDS[kind])
    before = call(model, X)
    merged, report = adapters.merge_adapters(model)
    assert report.merged == ("layers/0", "layers/2")
    assert report.max_error < 1e-5
    assert not jax.tree.leaves(nnx.state(merged, AdapterParam))
    assert [type(m) for m in merged.layers[::2]] == [nnx.Linear, nnx.Linear]
    assert merged.layers[2].bias is None
    np.testing.assert_allclose(call(merged, X), before, rtol=1e-4, atol=1e-5)
    assert not np.allclose(before, call(make_base(), X), atol=0.05)
    # The given model and its base stay as they are.
    np.testing.assert_array_equal(call(model, X), before)


def test_one_adapter_around_another_is_merged_too():
    inner = trained(BUILDS["vera"])
    outer = nnx.clone(inner)
    outer.layers[0] = nnx.LoRA(
        *(6, 2, 8),
        base_module=inner.layers[0],
        lora_param_type=AdapterParam,
        rngs=nnx.Rngs(3),
    )
    outer.layers[0].lora_b[...] = jnp.ones((2, 8))
    merged, report = adapters.merge_adapters(outer)
    assert type(merged.layers[0]) is nnx.Linear
    np.testing.assert_allclose(call(merged, X), call(outer, X), rtol=1e-4, atol=1e-4)
    assert report.max_error < 1e-5


def test_the_error_is_that_of_rounding_and_reported():
    linear = nnx.Linear(6, 8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    adapter = snnk.nn.Scaled(linear, "output", param_dtype=jnp.bfloat16)
    adapter.scale[...] = jnp.linspace(0.3, 3, 8, dtype=jnp.bfloat16)
    report = adapters.merge_adapters(nnx.Sequential(adapter))[1]
    # The merged kernel is rounded to 8 bits.
    assert 1e-4 < report.max_error < 2.0**-5


@pytest.mark.parametrize(
    "build",
    [
        lambda m, rngs: snnk.nn.Adapted(
            m, snnk.nn.SNNKAdapter(m.out_features, features=FM, rngs=rngs)
        ),
        lambda m, rngs: snnk.nn.Adapted(
            m, snnk.nn.BottleneckAdapter(m.out_features, 2, rngs=rngs)
        ),
    ],
    ids=["snnk", "bottleneck"],
)
def test_adapters_that_are_not_linear_are_refused(build):
    with pytest.raises(
        ValueError, match=r"linear maps .* Got {'layers/0': '\w+Adapter'"
    ):
        adapters.merge_adapters(trained(build))


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="and no others. Got none"):
        adapters.merge_adapters(make_base())


def test_an_adapter_of_an_unknown_kind_is_refused():
    class Own(nnx.Module):
        def __init__(self, linear):
            self.base_module = linear
            self.factor = AdapterParam(jnp.ones(()))

        def __call__(self, x):
            return self.base_module(x) * self.factor[...]

    with pytest.raises(ValueError, match=r"no others. Got \['layers/0/factor'"):
        adapters.merge_adapters(trained(lambda m, rngs: Own(m)))


def test_an_adapter_that_rounding_would_take_is_refused():
    """The base is bfloat16, the adapter float32 and small."""
    linear = nnx.Linear(6, 8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    adapter = BUILDS["lora"](linear, nnx.Rngs(1))
    adapter.lora_b[...] = jnp.full((2, 8), 1e-5)
    with pytest.raises(ValueError, match="merging must keep what the adapter at laye"):
        adapters.merge_adapters(nnx.Sequential(adapter))
    adapter.lora_b[...] = jnp.full((2, 8), 1.0)
    assert adapters.merge_adapters(nnx.Sequential(adapter))[1].max_error < 0.02


def test_nan_is_refused():
    model = trained(BUILDS["dora"])
    model.layers[2].norms[...] = jnp.full(3, jnp.nan)
    with pytest.raises(ValueError, match="layers/2 must return finite numbers"):
        adapters.merge_adapters(model)


def test_what_computes_something_else_is_refused():
    class Doubled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class ScaledLoRA(nnx.LoRA):
        def __call__(self, x):
            return super().__call__(x) * 4

    inside = nnx.Sequential(
        BUILDS["lora"](Doubled(6, 8, rngs=nnx.Rngs(0)), nnx.Rngs(1))
    )
    with pytest.raises(
        ValueError, match=r"inside the adapter at layers/0 must be an n"
    ):
        adapters.merge_adapters(inside)
    linear = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    around = ScaledLoRA(
        *(6, 2, 8), base_module=linear, lora_param_type=AdapterParam, rngs=nnx.Rngs(1)
    )
    with pytest.raises(ValueError, match="and no others. Got"):
        adapters.merge_adapters(nnx.Sequential(around))


@pytest.mark.parametrize("kind", BUILDS)
def test_a_small_change_merges_where_only_the_computation_is_narrow(kind):
    """Parameters in float32, products in bfloat16: the merge itself rounds nothing."""
    linear = nnx.Linear(64, 64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    adapter = BUILDS[kind](linear, nnx.Rngs(1))
    graphdef, params, rest = nnx.split(adapter, AdapterParam, ...)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + jnp.asarray(1e-3 * rng.normal(size=p.shape), p.dtype), params
    )
    model = nnx.Sequential(nnx.merge(graphdef, params, rest))
    assert adapters.merge_adapters(model)[1].max_error < 1e-5


def test_a_change_is_added_before_it_is_rounded():
    linear = nnx.Linear(6, 8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    adapter = BUILDS["lora"](linear, nnx.Rngs(1))
    adapter.lora_b[...] = jax.random.normal(jax.random.key(0), (2, 8))
    merged = adapters.merge_adapters(nnx.Sequential(adapter))[0].layers[0]
    change = np.float64(adapter.lora_a[...]) @ np.float64(adapter.lora_b[...])
    exact = np.float64(linear.kernel[...]) + change
    expected = jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(merged.kernel[...], expected)


def test_a_base_and_an_adapter_of_different_16_bits():
    linear = nnx.Linear(6, 8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    for adapter in (
        snnk.nn.VeRA(linear, 4, param_dtype=jnp.float16, rngs=nnx.Rngs(1)),
        snnk.nn.Scaled(linear, "output", param_dtype=jnp.float16),
    ):
        assert adapters.merge_adapters(nnx.Sequential(adapter))[1].max_error == 0
