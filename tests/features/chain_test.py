import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.features import ArcCosine
from snnk_jax.features._chain import Chain
from snnk_jax.features._polynomial import Polynomial
from snnk_jax.testing import count_traces, tolerance

DIM = 4
CLOSE = tolerance("float32")
FIRST = ArcCosine(num_features=6)
SECOND = Polynomial(coefficients=(0.3, -0.5, 0.2), num_features=12, precision="high")
CHAIN = Chain((FIRST, SECOND))
WORDS = snnk.projections.key_words


def make(chain=CHAIN, dtype="float32"):
    params = chain.init(jax.random.key(3), DIM, jnp.dtype(dtype))
    x = jax.random.normal(jax.random.key(5), (6, DIM)).astype(dtype)
    return chain, params, x


def part(params, i):
    prefix = f"map{i}_"
    return {
        k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)
    }


def test_it_is_the_composition():
    chain, params, x = make()
    assert set(params) == {"map0_omega", "map1_signs", "map1_rows"}
    hidden = FIRST.phi(part(params, 0), x)
    np.testing.assert_array_equal(chain.inner(params, x), hidden)
    expected = SECOND.phi(part(params, 1), hidden)
    np.testing.assert_array_equal(chain.phi(params, x), expected)
    assert (chain.num_features, chain.precision) == (12, "high")
    kernel, bias = jnp.ones((6, 2)), jnp.ones(2)
    np.testing.assert_array_equal(
        chain.psi(params, kernel, bias), SECOND.psi(part(params, 1), kernel, bias)
    )
    np.testing.assert_array_equal(
        chain.exact(hidden, kernel, bias), SECOND.exact(hidden, kernel, bias)
    )


def test_eleven_maps_keep_apart():
    # "map1_" and "map10_" begin alike.
    maps = (ArcCosine(num_features=DIM),) * 11
    chain, params, x = make(Chain(maps))
    expected = x
    for i, fm in enumerate(maps):
        expected = fm.phi(part(params, i), expected)
    np.testing.assert_array_equal(chain.phi(params, x), expected)


def test_a_chain_of_chains_is_the_long_chain():
    inner = Chain((FIRST, FIRST))
    chain, params, x = make(Chain((inner, SECOND)))
    flat = dict(part(params, 0)) | {
        k.replace("map1_", "map2_"): v for k, v in params.items() if "map1_" in k[:5]
    }
    long = Chain((FIRST, FIRST, SECOND))
    np.testing.assert_array_equal(chain.phi(params, x), long.phi(flat, x))
    # The weights are over the features before the last map of all.
    last = Chain((FIRST, Chain((FIRST, SECOND))))
    params = last.init(jax.random.key(0), DIM)
    kernel = jnp.ones((FIRST.num_features, 2))
    np.testing.assert_allclose(
        snnk.snnk_dense(last, params, x, kernel),
        SECOND.phi(part(part(params, 1), 1), last.inner(params, x))
        @ last.psi(params, kernel),
        rtol=1e-5,
    )


def test_maps_draw_from_keys_of_their_own():
    square = ArcCosine(num_features=DIM, projection="gaussian")
    _, params, _ = make(Chain((square, square)))
    alone = square.init(jax.random.key(3), DIM)["omega"]
    first, second = params["map0_omega"], params["map1_omega"]
    for a, b in [(first, second), (first, alone), (second, alone)]:
        assert np.all(np.asarray(a) != np.asarray(b))


def test_the_keys_are_pinned():
    # Stored adapters name a key: the draw must not change with JAX.
    _, params, _ = make()
    words = snnk.projections.streams(WORDS(jax.random.key(3)), 2)
    key = jax.random.wrap_key_data(words[0], impl="threefry2x32")
    np.testing.assert_array_equal(params["map0_omega"], FIRST.init(key, DIM)["omega"])


def test_unbiased_given_the_first_maps():
    _, params, x = make()
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    kernel = 0.4 * jax.random.normal(jax.random.key(6), (6, 3))
    bias = jnp.array([0.3, -0.8, 1.2])

    def one(key):
        drawn = {f"map1_{k}": v for k, v in SECOND.init(key, 6).items()}
        mixed = {"map0_omega": params["map0_omega"], **drawn}
        return snnk.contract(CHAIN.phi(mixed, x), CHAIN.psi(mixed, kernel, bias))

    values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 2048))
    hidden = CHAIN.inner(params, x)
    error = np.mean(values, axis=0) - CHAIN.exact(hidden, kernel, bias)
    deviation = np.std(values, axis=0) / 2048**0.5
    assert np.all(deviation < 0.1)
    assert np.all(np.abs(error) < 4.5 * deviation)


def test_arc_cosine_keeps_norms():
    chain = Chain((FIRST, FIRST, FIRST))
    _, _, x = make()

    def one(key):
        return jnp.sum(chain.phi(chain.init(key, DIM), x) ** 2, axis=-1)

    squares = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 2048))
    error = np.mean(squares, axis=0) - np.sum(x * x, axis=-1)
    assert np.all(np.abs(error) < 4.5 * np.std(squares, axis=0) / 2048**0.5)


def test_redraw_keeps_what_is_not_random():
    chain, params, _ = make()
    params["map0_calibrated"] = jnp.ones(3)
    drawn = chain.redraw(params, jax.random.key(4), DIM)
    assert drawn.keys() == params.keys()
    np.testing.assert_array_equal(drawn["map0_calibrated"], 1)
    fresh = chain.init(jax.random.key(4), DIM)
    for name, value in fresh.items():
        np.testing.assert_array_equal(drawn[name], value)
        assert not np.array_equal(params[name], value)


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)], ids=str)
def test_jit_vmap_and_any_batch_agree(batch):
    chain, params, x = make()
    eager = chain.phi(params, x)
    shaped = chain.phi(params, x.reshape(*batch, DIM) if batch else x[0])
    assert shaped.shape == (*batch, 12)
    expected = eager if batch else eager[:1]
    np.testing.assert_allclose(shaped.reshape(-1, 12), expected, **CLOSE)
    np.testing.assert_allclose(jax.jit(chain.phi)(params, x), eager, **CLOSE)
    mapped = jax.vmap(chain.phi, in_axes=(None, 0))(params, x)
    np.testing.assert_allclose(mapped, eager, **CLOSE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_dtype_in_is_dtype_out(dtype):
    with jax.enable_x64(dtype == "float64"):
        chain, params, x = make(dtype=dtype)
        assert chain.phi(params, x).dtype == jnp.dtype(dtype)
        assert params["map0_omega"].dtype == jnp.dtype(dtype)
        assert params["map1_signs"].dtype == jnp.dtype(dtype)


def test_gradients_flow_through_all_maps():
    chain, params, x = make()

    def total(omega, x):
        return jnp.sum(chain.phi(params | {"map0_omega": omega}, x) ** 2)

    for grad in jax.grad(total, argnums=(0, 1))(params["map0_omega"], x):
        assert np.isfinite(grad).all()
        assert np.any(grad != 0)
    zero = jax.grad(total, argnums=1)(params["map0_omega"], jnp.zeros(DIM))
    assert np.isfinite(zero).all()


def test_chains_hash_and_compile_by_value():
    chain, params, x = make()
    counted = count_traces(lambda chain, params, x: chain.phi(params, x))
    phi = jax.jit(counted, static_argnums=0)
    phi(chain, params, x)
    for twin in (
        copy.deepcopy(chain),
        pickle.loads(pickle.dumps(chain)),
        Chain(maps=(FIRST, SECOND)),
    ):
        assert twin == chain
        assert hash(twin) == hash(chain)
        phi(twin, params, x)
    assert counted.traces == 1
    assert Chain((FIRST, FIRST)) != chain
    assert repr(Chain((FIRST,))) == f"Chain(maps=({FIRST!r},))"


def test_in_layers():
    x = make()[2]
    layer = snnk.nn.SNNKDense(DIM, 3, features=CHAIN, rngs=nnx.Rngs(0))
    values = {k: v[...] for k, v in layer.projection.values.items()}
    expected = snnk.contract(CHAIN.phi(values, x), layer.readout[...])
    np.testing.assert_allclose(layer(x), expected, **CLOSE)
    adapter = snnk.nn.SNNKAdapter(DIM, features=CHAIN, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(adapter(x), x)

    def loss(adapter):
        return jnp.sum((adapter(x) - 1) ** 2)

    grads = nnx.grad(loss, argnums=nnx.DiffState(0, snnk.nn.AdapterParam))(adapter)
    assert np.any(grads["readout"][...] != 0)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    for maps in ((), ("relu",), (FIRST, None)):
        with pytest.raises(ValueError, match="maps must be feature maps, at least one"):
            Chain(maps)
    chain, params, x = make()
    with pytest.raises(ValueError, match="inputs must have width 4"):
        chain.phi(params, x[:, :3])
    # Weights over the inputs, where those over the first features belong.
    with pytest.raises(ValueError, match="inputs must have width 6"):
        chain.psi(params, jnp.ones((DIM, 3)))
    with pytest.raises(ValueError, match="num and dim must be at least 1"):
        chain.init(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="readout of a Chain"):
        snnk.nn.SNNKDense.from_linear(
            nnx.Linear(6, 3, use_bias=False, rngs=nnx.Rngs(0)),
            features=chain,
            rngs=nnx.Rngs(1),
        )
