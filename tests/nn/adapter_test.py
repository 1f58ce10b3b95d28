import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.nn import AdapterParam, RandomProjection
from snnk_jax.testing import call

DIM = 12
ARC = snnk.features.ArcCosine(num_features=8)
COS = snnk.features.URF(activation="cos", num_features=8, scale=1.0)


def snnk_adapter(fm, **options):
    return snnk.nn.SNNKAdapter(DIM, features=fm, rngs=nnx.Rngs(0), **options)


ADAPTERS = {
    "snnk_relu": lambda: snnk_adapter(ARC),
    "snnk_cos": lambda: snnk_adapter(COS),
    "unmodulated": lambda: snnk_adapter(ARC, modulate=False),
    "factored": lambda: snnk_adapter(ARC, rank=3, modulate=False),
    "unnormalized": lambda: snnk_adapter(ARC, normalize=False),
    "bottleneck": lambda: snnk.nn.BottleneckAdapter(DIM, 3, rngs=nnx.Rngs(0)),
}
PARAMETERS = {
    "snnk_relu": (8 + 1) * DIM,
    "snnk_cos": (8 + 1) * DIM,
    "unmodulated": 8 * DIM,
    "factored": 3 * (8 + DIM),
    "unnormalized": (8 + 1) * DIM,
    "bottleneck": 2 * DIM * 3 + 3 + DIM,
}
# What moves in the first step: the zero-initialised maps behind the frozen features.
FIRST_GRADIENTS = {
    "snnk_relu": {"readout"},
    "snnk_cos": {"readout"},
    "unmodulated": {"readout"},
    "factored": {"up"},
    "unnormalized": {"readout"},
    "bottleneck": {"up_kernel", "up_bias"},
}


@pytest.fixture(params=list(ADAPTERS))
def name(request):
    return request.param


def test_is_the_identity_at_the_start(name):
    x = jax.random.normal(jax.random.key(0), (2, 3, DIM))
    np.testing.assert_array_equal(ADAPTERS[name]()(x), x)


def test_counts(name):
    leaves = jax.tree.leaves(nnx.state(ADAPTERS[name](), AdapterParam))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


def test_learns_from_the_first_step(name):
    adapter = ADAPTERS[name]()
    x = jax.random.normal(jax.random.key(0), (5, DIM))
    target = jax.random.normal(jax.random.key(1), (5, DIM))
    graphdef, params, rest = nnx.split(adapter, AdapterParam, ...)

    def loss(params):
        return jnp.mean((nnx.merge(graphdef, params, rest)(x) - target) ** 2)

    grads = jax.grad(loss)(params)
    moving = {
        path[-1] for path, grad in nnx.to_flat_state(grads) if np.any(grad[...] != 0)
    }
    assert moving == FIRST_GRADIENTS[name]
    before = loss(params)
    for _ in range(3):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params))
    assert loss(params) < before


def test_projections_are_not_trainable():
    state = nnx.state(snnk_adapter(ARC), RandomProjection)
    names = {path[-1] for path, _ in nnx.to_flat_state(state)}
    assert names == {"key", "omega"}


def test_normalised_features_do_not_depend_on_the_size_of_the_input():
    adapter = snnk_adapter(COS)
    adapter.readout[...] = jax.random.normal(jax.random.key(2), (8, DIM))
    x = jax.random.normal(jax.random.key(0), (5, DIM))
    np.testing.assert_allclose(
        adapter(x) - x, adapter(1e3 * x) - 1e3 * x, rtol=1e-2, atol=1e-3
    )


def test_zero_input_is_finite_with_finite_gradients(name):
    adapter = ADAPTERS[name]()
    value, grad = jax.value_and_grad(lambda x: jnp.sum(adapter(x)))(jnp.zeros(DIM))
    assert np.isfinite(value)
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_keeps_the_dtype_of_the_residual_stream(name, dtype):
    x = jnp.ones((4, DIM), dtype)
    assert ADAPTERS[name]()(x).dtype == dtype


def test_computes_in_the_asked_dtype_and_returns_the_residual_dtype():
    adapter = snnk_adapter(ARC, dtype=jnp.bfloat16)
    assert adapter(jnp.ones((4, DIM))).dtype == jnp.float32


def test_adapted_passes_arguments_to_the_module():
    class Scale(nnx.Module):
        def __call__(self, x, *, by):
            return x * by

    adapted = snnk.nn.Adapted(Scale(), ADAPTERS["bottleneck"]())
    np.testing.assert_array_equal(adapted(jnp.ones((2, DIM)), by=3.0), 3.0)


def test_rank_must_be_positive():
    with pytest.raises(ValueError, match="rank must be a whole number .* Got 0"):
        snnk_adapter(ARC, rank=0)


def test_bottleneck_must_be_positive():
    with pytest.raises(ValueError, match=r"bottleneck must be a whole .* Got 0"):
        snnk.nn.BottleneckAdapter(DIM, 0, rngs=nnx.Rngs(0))


def test_a_parallel_adapter_reads_what_the_module_reads():
    linear = nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0))
    adapter = ADAPTERS["bottleneck"]()
    adapter.up_bias[...] = jnp.arange(DIM, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, DIM))
    adapted = snnk.nn.Adapted(linear, adapter, parallel=True)
    np.testing.assert_allclose(
        call(adapted, x), linear(x) + adapter.delta(x), rtol=1e-5
    )
    behind = snnk.nn.Adapted(linear, adapter)
    np.testing.assert_allclose(
        call(behind, x), linear(x) + adapter.delta(linear(x)), rtol=1e-5
    )


def test_an_adapter_without_delta_cannot_stand_beside(unchecked):
    linear = nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must have a method delta. Got Linear"):
        snnk.nn.Adapted(linear, linear, parallel=True)


def test_the_scale_of_a_bottleneck_is_that_of_its_change():
    plain, scaled = (
        snnk.nn.BottleneckAdapter(DIM, 3, scale=scale, rngs=nnx.Rngs(0))
        for scale in (1.0, 0.1)
    )
    x = jax.random.normal(jax.random.key(0), (2, DIM))
    for adapter in (plain, scaled):
        adapter.up_kernel[...] = jnp.ones((3, DIM))
    np.testing.assert_allclose(scaled.delta(x), 0.1 * plain.delta(x), rtol=1e-5)


def test_a_trained_projection_is_a_parameter_with_a_gradient():
    adapter = snnk_adapter(COS, train_projection=True)
    adapter.readout[...] = jnp.ones((8, DIM))
    graphdef, params, rest = nnx.split(adapter, AdapterParam, ...)
    x = jax.random.normal(jax.random.key(0), (5, DIM))
    grads = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, rest)(x) ** 2))(params)
    moving = {
        path[-1] for path, grad in nnx.to_flat_state(grads) if np.any(grad[...] != 0)
    }
    assert moving == {"readout", "modulation", "omega", "scale"}
    frozen = nnx.to_flat_state(nnx.state(adapter, RandomProjection))
    assert {path[-1] for path, _ in frozen} == {"key"}


def test_integers_of_a_sketch_cannot_be_trained():
    sketch = snnk.features.Polynomial(
        coefficients=(1.0, 1.0), num_features=8, sketch="tensor_sketch"
    )
    with pytest.raises(ValueError, match="must be of floats. Got Polynomial with"):
        snnk_adapter(sketch, train_projection=True)


class Pair(nnx.Module):
    def __init__(self, **options):
        self.first, self.second = snnk_adapter(COS, **options), snnk_adapter(ARC)


def test_redrawing_changes_the_frozen_directions_alone():
    model = Pair()
    other = snnk.nn.redraw(model, rngs=nnx.Rngs(5))
    again = snnk.nn.redraw(model, rngs=nnx.Rngs(5))
    for name in ("first", "second"):
        old, new, same = (getattr(m, name).projection for m in (model, other, again))
        assert np.all(old.values["omega"][...] != new.values["omega"][...])
        np.testing.assert_array_equal(
            new.values["omega"][...], same.values["omega"][...]
        )
        # The key draws the new values.
        words = new.key[...]
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        np.testing.assert_allclose(new.draw(key)["omega"], new.values["omega"][...])
    np.testing.assert_array_equal(other.first.readout[...], model.first.readout[...])


def test_trained_directions_are_not_redrawn():
    model = Pair(train_projection=True)
    other = snnk.nn.redraw(model, rngs=nnx.Rngs(5))
    old, new = model.first.projection, other.first.projection
    np.testing.assert_array_equal(old.values["omega"][...], new.values["omega"][...])
    with pytest.raises(ValueError, match="frozen randomness to redraw"):
        snnk.nn.redraw(ADAPTERS["bottleneck"](), rngs=nnx.Rngs(0))


def test_a_parallel_adapter_does_not_broadcast():
    adapter = snnk.nn.BottleneckAdapter(8, 2, rngs=nnx.Rngs(0))
    beside = snnk.nn.Adapted(nnx.Linear(8, 1, rngs=nnx.Rngs(1)), adapter, parallel=True)
    with pytest.raises(
        ValueError, match=r"the shape of what .* \(5, 1\). Got \(5, 8\)"
    ):
        beside(jnp.ones((5, 8)))


@pytest.mark.usefixtures("unchecked")
def test_what_makes_no_adapter_is_refused():
    fm, rngs = snnk.features.ArcCosine(num_features=4), nnx.Rngs(0)
    linear = nnx.Linear(8, 8, rngs=rngs)
    bottleneck, snnk_adapter = snnk.nn.BottleneckAdapter, snnk.nn.SNNKAdapter
    size = "must be a whole number of at least 1. Got"
    for build, message in [
        (lambda: bottleneck(0, 2, rngs=rngs), f"dim {size} 0"),
        (lambda: bottleneck(8, 2.5, rngs=rngs), f"bottleneck {size} 2.5"),
        (lambda: bottleneck(8, 2, scale=np.nan, rngs=rngs), "scale must be a finite"),
        (lambda: bottleneck(8, 2, scale="1", rngs=rngs), "scale must be a finite"),
        (lambda: bottleneck(8, 2, rngs=jax.random.key(0)), "rngs must be nnx.Rngs"),
        (lambda: snnk_adapter(-1, features=fm, rngs=rngs), f"dim {size} -1"),
        (lambda: snnk_adapter(8, features=fm, rank=True, rngs=rngs), f"rank {size} Tr"),
        (
            lambda: snnk_adapter(8, features="relu", rngs=rngs),
            "features must be a",
        ),
        (lambda: snnk_adapter(8, features=fm, rngs=0), "rngs must be nnx.Rngs"),
        (
            lambda: snnk_adapter(8, features=fm, dtype="foo", rngs=rngs),
            "dtype must be a dtype. Got 'foo'",
        ),
        (
            lambda: snnk_adapter(8, features=fm, param_dtype=jnp.int32, rngs=rngs),
            "param_dtype must be floating-point. Got int32",
        ),
        (lambda: snnk.nn.SNNKDense(8, 0, features=fm, rngs=rngs), f"out_feat.* {size}"),
        (lambda: snnk.nn.Adapted(None, linear), "base_module must be a module to call"),
        (lambda: snnk.nn.Adapted(linear, None), "adapter must be a module to call"),
        (
            lambda: snnk.features.ArcCosine(num_features=2.5),
            f"num_features {size} 2.5",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
    assert snnk.features.ArcCosine(num_features=np.int64(4)) == fm


@pytest.mark.usefixtures("unchecked")
def test_inputs_that_do_not_fit_are_refused():
    fm = snnk.features.ArcCosine(num_features=4)
    for adapter in (
        snnk.nn.SNNKAdapter(8, features=fm, standardize=True, rngs=nnx.Rngs(0)),
        snnk.nn.BottleneckAdapter(8, 2, rngs=nnx.Rngs(0)),
    ):
        for x in (jnp.ones((2, 1)), jnp.ones((2, 9)), jnp.ones((2, 8), int)):
            with pytest.raises(
                ValueError, match="inputs must be (an array of width 8|float)"
            ):
                adapter(x)
    pair = nnx.Sequential(lambda x: (x, x))
    adapter = snnk.nn.BottleneckAdapter(8, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="an array of width 8. Got tuple"):
        snnk.nn.Adapted(pair, adapter)(jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="what it is added to, a tuple. Got"):
        snnk.nn.Adapted(pair, adapter, parallel=True)(jnp.ones((2, 8)))


def test_a_module_that_returns_more_may_have_an_adapter_of_its_own():
    pair = nnx.Sequential(lambda x: (x, {"times": 3}))
    adapted = snnk.nn.Adapted(pair, nnx.Sequential(lambda y: y[0] * y[1]["times"]))
    np.testing.assert_array_equal(adapted(jnp.ones((2, 8))), 3 * jnp.ones((2, 8)))
