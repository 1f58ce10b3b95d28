"""The scales of adapters' inputs: measured, used, kept in files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.nn import AdapterParam, InputStatistic

DIM = 6
FEATURES = snnk.features.ArcCosine(num_features=8)


def make_adapter(**fields):
    fields = {"standardize": True, "rngs": nnx.Rngs(0)} | fields
    return snnk.nn.SNNKAdapter(DIM, features=FEATURES, **fields)


def make_model(parallel=False, standardize=True):
    base = nnx.Sequential(
        nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0)), nnx.Linear(DIM, DIM, rngs=nnx.Rngs(1))
    )

    def build(module, rngs):
        adapter = make_adapter(standardize=standardize, rngs=rngs)
        return snnk.nn.Adapted(module, adapter, parallel=parallel)

    rules = [snnk.SwapRule(path=r"layers/\d", build=build)]
    return base, snnk.swap_modules(base, rules, rngs=nnx.Rngs(2))[0]


def samples(shape=(50,), seed=0):
    x = jax.random.normal(jax.random.key(seed), (*shape, DIM))
    return 3 + x * jnp.arange(1.0, DIM + 1).reshape((1,) * len(shape) + (-1,))


@pytest.mark.parametrize("parallel", [False, True])
def test_every_adapter_measures_its_own_inputs(parallel):
    base, model = make_model(parallel)
    x = samples()
    measured = snnk.nn.standardize(model, x)
    first = base.layers[0](x)
    inputs = [x, first] if parallel else [first, base.layers[1](first)]
    for layer, z in zip(measured.layers, inputs, strict=True):
        mean, deviation = layer.adapter.statistics
        np.testing.assert_allclose(mean[...], z.mean(axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(deviation[...], z.std(axis=0), rtol=1e-5)
    # The given model is as it was, and the output too: adapters start as identities.
    assert np.all(np.asarray(model.layers[0].adapter.statistics[0][...]) == 0)
    np.testing.assert_array_equal(measured(x), base(x))


def test_masked_positions_do_not_count():
    x = samples((4, 5))
    mask = np.arange(5)[None] < np.array([5, 3, 1, 2])[:, None]
    adapter = snnk.nn.standardize(make_adapter(), x, where=mask)
    mean, deviation = adapter.statistics
    kept = np.asarray(x)[mask]
    np.testing.assert_allclose(mean[...], kept.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(deviation[...], kept.std(axis=0), rtol=1e-5)


def test_features_do_not_depend_on_the_scales_of_coordinates():
    x = samples()
    shift, scale = jnp.full((1, DIM), 7.0), jnp.full((1, DIM), 3.0).at[0, 2].set(1e3)
    readout = jax.random.normal(jax.random.key(3), (8, DIM))

    def features(x):
        adapter = snnk.nn.standardize(make_adapter(), x)
        adapter.readout[...] = readout
        return adapter.delta(x)

    np.testing.assert_allclose(features(x), features(x * scale + shift), atol=1e-3)


def test_a_constant_coordinate_stays_finite():
    x = samples().at[:, 1].set(4.0)
    adapter = snnk.nn.standardize(make_adapter(), x)
    assert float(adapter.statistics[1][1]) == 1
    assert np.all(np.isfinite(adapter.delta(x)))


def test_statistics_are_not_trained_and_travel_in_the_file(tmp_path):
    base, model = make_model()
    measured = snnk.nn.standardize(model, samples())
    assert not jax.tree.leaves(
        nnx.filter_state(nnx.state(measured, AdapterParam), InputStatistic)
    )
    for layer in measured.layers:
        layer.adapter.readout[...] = jnp.ones((8, DIM))
    file = tmp_path / "adapter.safetensors"
    mark = snnk.adapters.fingerprint(base)
    assert snnk.adapters.fingerprint(measured) == mark
    snnk.adapters.save_adapter(file, measured, base_fingerprint=mark)
    loaded = snnk.adapters.load_adapter(file, base)
    x = samples(seed=1)
    np.testing.assert_array_equal(loaded(x), measured(x))
    assert not np.allclose(measured(x), base(x))


def test_bfloat16_keeps_the_statistics_in_float32():
    x = samples((4, 5)).astype(jnp.bfloat16)
    adapter = snnk.nn.standardize(make_adapter(), x)
    assert all(v[...].dtype == jnp.float32 for v in adapter.statistics)
    assert adapter(x).dtype == jnp.bfloat16


def test_refusals():
    plain = make_model(standardize=False)[1]
    with pytest.raises(ValueError, match="standardize=True"):
        snnk.nn.standardize(plain, samples())

    class Skips(nnx.Module):
        def __init__(self):
            self.unused = make_adapter()
            self.used = make_adapter(rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="calls only some of"):
        snnk.nn.standardize(Skips(), samples())
    with pytest.raises(ValueError, match="not finite"):
        snnk.nn.standardize(make_adapter(), samples().at[0, 0].set(jnp.nan))


def test_all_calls_of_a_shared_adapter_count():
    class Twice(nnx.Module):
        def __init__(self):
            self.adapter = make_adapter()

        def __call__(self, x):
            return self.adapter(x), self.adapter(5 - 2 * x[:20])

    x = samples()
    mean, deviation = snnk.nn.standardize(Twice(), x).adapter.statistics
    seen = np.concatenate([x, 5 - 2 * x[:20]])
    np.testing.assert_allclose(mean[...], seen.mean(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(deviation[...], seen.std(axis=0), rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1000.1])
def test_rounding_of_a_constant_coordinate_is_no_deviation(value):
    x = jax.random.normal(jax.random.key(0), (512, DIM)).at[:, 3].set(value)
    adapter = snnk.nn.standardize(make_adapter(), x)
    mean, deviation = adapter.statistics
    assert float(mean[3]) == pytest.approx(value)
    assert float(deviation[3]) == 1
    # One that moves by a unit in the last place is none either.
    moved = np.nextafter(np.float32(value), 2 * value)
    values = jnp.where(jnp.arange(512) % 3, jnp.float32(value), moved)
    adapter = snnk.nn.standardize(make_adapter(), x.at[:, 3].set(values))
    assert float(adapter.statistics[1][3]) == 1


@pytest.mark.parametrize(("mean", "std"), [(10, 0.25), (15.5, 0.42), (-40, 1.1)])
def test_deviations_of_large_means_in_bfloat16_are_measured(mean, std):
    x = mean + std * jax.random.normal(jax.random.key(0), (4096, DIM))
    x = x.astype(jnp.bfloat16)
    deviation = snnk.nn.standardize(make_adapter(), x).statistics[1]
    np.testing.assert_allclose(deviation[...], np.std(np.float32(x), axis=0), rtol=1e-3)


def test_small_deviations_far_from_zero_are_measured():
    x = 1000 + 0.1 * jax.random.normal(jax.random.key(0), (512, DIM))
    deviation = snnk.nn.standardize(make_adapter(), x).statistics[1]
    np.testing.assert_allclose(deviation[...], np.std(x, axis=0), rtol=1e-3)


def test_storage_in_bfloat16_does_not_round_the_inputs():
    x = 100 + 0.1 * jax.random.normal(jax.random.key(0), (256, DIM))
    adapter = snnk.nn.standardize(make_adapter(param_dtype=jnp.bfloat16), x)
    assert adapter.readout.dtype == jnp.bfloat16
    assert adapter.statistics[0].dtype == jnp.float32
    # Rounded to 8 bits, most of the rows would be one and the same.
    assert len(np.unique(np.asarray(adapter.phi(x), np.float32), axis=0)) > 250


def test_options_that_are_no_streams_stay_what_they_are():
    class Repeated(nnx.Module):
        def __init__(self):
            self.adapter = make_adapter()

        def __call__(self, x, *, times):
            for _ in range(int(times)):
                x = self.adapter(x)
            return x

    model = snnk.nn.standardize(Repeated(), samples(), times=np.array(2))
    assert float(model.adapter.statistics[1][0]) > 0.5


def test_random_streams_may_be_among_the_options():
    class Noisy(nnx.Module):
        def __init__(self):
            self.adapter = make_adapter()
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x, *, rngs, scale):
            return self.adapter(scale * self.dropout(x, rngs=rngs))

    model = snnk.nn.standardize(Noisy(), samples(), rngs=nnx.Rngs(0), scale=2.0)
    assert float(model.adapter.statistics[1][0]) > 2


@pytest.mark.usefixtures("unchecked")
def test_a_mask_of_another_shape_is_refused():
    for where in (np.ones(4), np.ones((3, 2))):
        with pytest.raises(ValueError, match=r"where must be over leading .* \(3,\)"):
            snnk.nn.standardize(make_adapter(), samples((3,)), where=where)
