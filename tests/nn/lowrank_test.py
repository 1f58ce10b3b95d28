import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.nn import AdapterParam, RandomProjection
from snnk_jax.testing import call

DIM, OUT = 6, 4


def make_linear(use_bias=True, **options):
    init = nnx.initializers.normal(0.5)
    return nnx.Linear(
        DIM, OUT, use_bias=use_bias, bias_init=init, rngs=nnx.Rngs(0), **options
    )


KINDS = {
    "dora": lambda linear: snnk.nn.DoRA(linear, 2, rngs=nnx.Rngs(1)),
    "vera": lambda linear: snnk.nn.VeRA(linear, 8, rngs=nnx.Rngs(1)),
    "output": lambda linear: snnk.nn.Scaled(linear, "output"),
    "input": lambda linear: snnk.nn.Scaled(linear, "input"),
}
PARAMETERS = {"dora": 2 * (DIM + OUT) + OUT, "vera": 8 + OUT, "output": 4, "input": 6}
FIRST_GRADIENTS = {
    "dora": {"up", "norms"},
    "vera": {"outer"},
    "output": {"scale"},
    "input": {"scale"},
}


@pytest.fixture(params=list(KINDS))
def name(request):
    return request.param


def scrambled(name, linear):
    """An adapter with parameters that no initialiser gives."""
    graphdef, params, rest = nnx.split(KINDS[name](linear), AdapterParam, ...)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape), params)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    return nnx.merge(graphdef, params, rest)


def inputs(*batch):
    return jax.random.normal(jax.random.key(0), (*batch, DIM))


def expected(name, adapter, x):
    """The formulas of the papers, in float64."""
    at = {
        path[-1]: np.float64(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(adapter, nnx.Variable))
        if path[-1] not in ("key", "bias")
    }
    base = adapter.base_module
    kernel, x = at["kernel"], np.float64(x)
    bias = 0.0 if base.bias is None else np.float64(base.bias[...])
    if name == "dora":
        changed = kernel + at["down"] @ at["up"]
        return x @ changed * (at["norms"] / np.linalg.norm(changed, axis=0)) + bias
    if name == "vera":
        values = {k: np.float64(v[...]) for k, v in adapter.basis.values.items()}
        low = (x @ values["down"]) * at["inner"]
        return x @ kernel + bias + low @ values["up"] * at["outer"]
    if name == "output":
        return (x @ kernel + bias) * at["scale"]
    return (x * at["scale"]) @ kernel + bias


@pytest.mark.parametrize("use_bias", [True, False])
def test_computes_the_formula_and_merges_into_a_linear(name, use_bias):
    adapter = scrambled(name, make_linear(use_bias))
    x = inputs(2, 5)
    wanted = expected(name, adapter, x)
    np.testing.assert_allclose(call(adapter, x), wanted, rtol=1e-4, atol=1e-5)
    kernel, bias = adapter.merged()
    assert (bias is not None) == use_bias
    merged = x @ kernel + (0 if bias is None else bias[None, None])
    np.testing.assert_allclose(merged, wanted, rtol=1e-4, atol=1e-5)
    assert not np.allclose(wanted, call(adapter.base_module, x), atol=0.05)


def test_is_the_identity_at_the_start(name):
    linear = make_linear()
    x = inputs(3)
    y = call(KINDS[name](linear), x)
    np.testing.assert_allclose(y, call(linear, x), rtol=1e-5, atol=1e-6)


def test_counts(name):
    leaves = jax.tree.leaves(nnx.state(KINDS[name](make_linear()), AdapterParam))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


def test_learns_from_the_first_step(name):
    graphdef, params, rest = nnx.split(KINDS[name](make_linear()), AdapterParam, ...)
    x, target = inputs(5), jax.random.normal(jax.random.key(1), (5, OUT))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.mean((nnx.merge(graphdef, params, rest)(x) - target) ** 2)

    before, grads = loss(params)
    moving = {
        path[-1] for path, grad in nnx.to_flat_state(grads) if np.any(grad[...] != 0)
    }
    assert moving == FIRST_GRADIENTS[name]
    params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    assert loss(params)[0] < before


def test_no_gradient_flows_through_the_norm_of_dora():
    adapter = scrambled("dora", make_linear(use_bias=False))
    graphdef, params, rest = nnx.split(adapter, AdapterParam, ...)
    x = inputs(5)
    grads = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, rest)(x)))(params)
    changed = adapter.base_module.kernel[...] + adapter.down[...] @ adapter.up[...]
    factor = adapter.norms[...] / jnp.linalg.norm(changed, axis=0)
    # d sum(x V c) / dB with c fixed.
    wanted = adapter.down[...].T @ x.T @ jnp.broadcast_to(factor[None], (5, OUT))
    np.testing.assert_allclose(grads["up"][...], wanted, rtol=1e-4, atol=1e-5)


def test_the_basis_of_vera_is_frozen_and_named_by_its_key():
    first, same, other = (
        snnk.nn.VeRA(make_linear(), 8, rngs=nnx.Rngs(seed)).basis.params
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first["down"], same["down"])
    np.testing.assert_array_equal(first["up"], same["up"])
    assert np.all(first["down"] != other["down"])
    state = nnx.state(KINDS["vera"](make_linear()), RandomProjection)
    names = {path[-1] for path, _ in nnx.to_flat_state(state)}
    assert names == {"key", "down", "up"}


def test_the_basis_of_vera_keeps_the_size_of_its_inputs():
    linear = nnx.Linear(256, 512, rngs=nnx.Rngs(0))
    values = snnk.nn.VeRA(linear, 128, rngs=nnx.Rngs(1)).basis.params
    # Variances 1 / d and 1 / r, known to sqrt(2 / entries).
    np.testing.assert_allclose(np.var(values["down"]) * 256, 1, rtol=0.04)
    np.testing.assert_allclose(np.var(values["up"]) * 128, 1, rtol=0.04)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_the_dtype_of_its_linear(name, dtype):
    adapter = KINDS[name](make_linear(dtype=dtype))
    assert call(adapter, inputs(3).astype(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda x: snnk.nn.DoRA(x, 0, rngs=nnx.Rngs(0)), "rank must be a whole"),
        (lambda x: snnk.nn.VeRA(x, 0, rngs=nnx.Rngs(0)), "rank must be a whole"),
        (lambda x: snnk.nn.Scaled(x, "both"), "where must be 'output' or 'input'"),
    ],
)
def test_mistakes_are_told(build, message, unchecked):
    with pytest.raises(ValueError, match=message):
        build(make_linear())


class Doubled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize(
    "module",
    [
        lambda: nnx.LinearGeneral(DIM, (2, 2), rngs=nnx.Rngs(0)),
        lambda: nnx.Conv(DIM, OUT, (3,), rngs=nnx.Rngs(0)),
        lambda: Doubled(DIM, OUT, rngs=nnx.Rngs(0)),
        lambda: nnx.LoRALinear(DIM, OUT, lora_rank=2, rngs=nnx.Rngs(0)),
    ],
)
def test_what_is_no_plain_linear_is_refused(name, module, unchecked):
    with pytest.raises(ValueError, match="base_module must be an nnx.Linear with the"):
        KINDS[name](module())


def test_dora_leaves_columns_of_zeros_and_small_ones_finite():
    zero = nnx.Linear(
        DIM, OUT, kernel_init=nnx.initializers.zeros_init(), rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(
        call(KINDS["dora"](zero), inputs(3)), np.zeros((3, 4))
    )
    # Whose squares are zero in float16.
    small = make_linear(param_dtype=jnp.float16)
    small.kernel[...] = small.kernel[...] * jnp.float16(1e-4)
    x = inputs(3).astype(jnp.float16)
    np.testing.assert_array_equal(call(KINDS["dora"](small), x), call(small, x))


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_dora_of_a_bfloat16_base(param_dtype):
    """The identity at the start; then small changes count as far as they are kept."""
    linear = make_linear(param_dtype=jnp.bfloat16)
    linear.bias[...] = jnp.zeros(OUT, jnp.bfloat16)
    adapter = snnk.nn.DoRA(linear, 2, param_dtype=param_dtype, rngs=nnx.Rngs(1))
    x = inputs(3).astype(jnp.bfloat16)
    np.testing.assert_array_equal(call(adapter, x), call(linear, x))
    if param_dtype == jnp.float32:
        before, _ = adapter._direction()
        adapter.up[...] = jnp.full((2, OUT), 1e-5)
        after, _ = adapter._direction()
        assert 1e-6 < float(jnp.abs(after - before).max()) < 1e-4


def test_dora_multiplies_as_its_base_does():
    def doubled(x, kernel, dims, **options):
        return 2 * jax.lax.dot_general(x, kernel, dims, precision=options["precision"])

    linear = make_linear(dot_general=doubled, precision="highest")
    adapter, x = snnk.nn.DoRA(linear, 2, rngs=nnx.Rngs(1)), inputs(3)
    np.testing.assert_allclose(adapter(x), linear(x), rtol=1e-6)
    assert "HIGHEST" in str(jax.make_jaxpr(lambda x: adapter(x))(x))
    linear = make_linear(
        use_bias=False, dtype=jnp.bfloat16, preferred_element_type=jnp.float32
    )
    adapter = snnk.nn.DoRA(linear, 2, rngs=nnx.Rngs(1))
    assert call(adapter, x).dtype == call(linear, x).dtype == jnp.float32


def test_shapes_of_a_base_are_enough_to_count():
    base = nnx.Sequential(nnx.eval_shape(make_linear))
    for name, build in KINDS.items():
        rule = snnk.SwapRule(path="layers/0", build=lambda m, rngs, f=build: f(m))
        model, _ = snnk.swap_modules(base, [rule], rngs=nnx.Rngs(0))
        assert snnk.nn.count_parameters(model).trained == PARAMETERS[name]


@pytest.mark.parametrize("where", ["output", "input"])
def test_scaling_is_merged_with_one_rounding(where):
    linear = make_linear(param_dtype=jnp.bfloat16)
    adapter = snnk.nn.Scaled(linear, where)
    adapter.scale[...] = jnp.linspace(0.31, 2.9, adapter.scale.shape[0])
    scale = np.float64(adapter.scale[...])
    factors = scale if where == "output" else scale[:, None]
    exact = np.float64(linear.kernel[...]) * factors
    expected = jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(adapter.merged()[0], expected)


@pytest.mark.usefixtures("unchecked")
def test_inputs_of_another_width_are_refused(name):
    adapter = KINDS[name](make_linear())
    for width in (1, DIM + 1):
        with pytest.raises(
            ValueError, match=f"inputs must be an array of width {DIM}. Got"
        ):
            adapter(jnp.ones((2, width)))


@pytest.mark.usefixtures("unchecked")
def test_whole_numbers_are_inputs_as_of_a_linear(name):
    adapter = scrambled(name, make_linear())
    x = jnp.eye(DIM, dtype=int)
    with jax.numpy_dtype_promotion("standard"):  # nnx.Linear needs it too
        found = adapter(x)
    np.testing.assert_allclose(found, adapter(x.astype(float)), rtol=1e-6)
