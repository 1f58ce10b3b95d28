import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

import snnk_jax as snnk
from snnk_jax.features._polynomial import Polynomial
from snnk_jax.testing import tolerance

SKETCHES = ("maclaurin", "tensor_sketch", "tensor_srht")
COEFFICIENTS = (0.5, -1.0, 0.7, 0.4)
DIM, KEYS = 5, 4096
CLOSE = tolerance("float32")

each_sketch = pytest.mark.parametrize("sketch", SKETCHES)


def make(sketch="tensor_srht", num_features=16, coefficients=COEFFICIENTS, **fields):
    return Polynomial(
        coefficients=tuple(map(float, coefficients)),
        num_features=num_features,
        sketch=sketch,
        **fields,
    )


def make_inputs(dtype="float32"):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, DIM)), rng.normal(size=(DIM, 3))
    x *= 0.7 / np.linalg.norm(x, axis=1, keepdims=True)
    kernel *= 0.7 / np.linalg.norm(kernel, axis=0)
    kernel[:, 2] = x[2]  # a parallel pair, where the variance is largest
    bias = np.array([0.3, -0.8, 1.2])
    return tuple(jnp.asarray(a, dtype) for a in (x, kernel, bias))


# Statistics over keys.


@functools.cache
def estimates(sketch, num_features, with_bias, seed=0):
    """Estimates under many keys, [keys, examples, outputs]."""
    features = make(sketch, num_features, kappa=0.5, bias_scale=1.0)
    x, kernel, bias = make_inputs()

    def one(key):
        params = features.init(key, DIM)
        return snnk.snnk_dense(features, params, x, kernel, bias if with_bias else None)

    keys = jax.random.split(jax.random.key(seed), KEYS)
    return features, np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


@each_sketch
@pytest.mark.parametrize("with_bias", [False, True])
def test_unbiased_and_of_the_variance_it_tells(sketch, with_bias):
    features, values = estimates(sketch, 16, with_bias)
    x, kernel, bias = make_inputs()
    layer = (x, kernel, bias if with_bias else None)
    predicted = np.asarray(features.variance(*layer), np.float64)
    error = values.mean(axis=0) - np.asarray(features.exact(*layer), np.float64)
    assert np.all(np.sqrt(predicted / KEYS) < 0.05)  # small enough for a bias to show
    assert np.all(np.abs(error) < 4.5 * np.sqrt(predicted / KEYS))
    centred = values - values.mean(axis=0)
    variance = np.mean(centred**2, axis=0)
    deviation = np.sqrt((np.mean(centred**4, axis=0) - variance**2) / KEYS)
    assert np.all(deviation < 0.1 * predicted)
    assert np.all(np.abs(variance - predicted) < 5 * deviation)


@each_sketch
def test_error_falls_as_one_over_m(sketch):
    few, many = (
        np.mean(np.var(estimates(sketch, m, True, seed=m)[1], axis=0)) for m in (16, 64)
    )
    assert 3.4 < few / many < 4.7


def test_variance_of_maclaurin_is_the_sum_over_all_signs():
    # One column of degree 3: the second moment of one factor, cubed.
    x, kernel, _ = (np.asarray(a, np.float64) for a in make_inputs())
    signs = np.stack(np.meshgrid(*[[-1, 1]] * DIM)).reshape(DIM, -1)
    products = (x @ signs)[:, None, :] * (kernel.T @ signs)[None]
    second = np.mean(products**2, axis=-1) ** 3
    features = make("maclaurin", 7, (0, 0, 0, 1), kappa=1.0)
    assert features.columns == (1, 1, 1, 4)
    predicted = features.variance(*make_inputs()[:2])
    np.testing.assert_allclose(
        predicted, (second - (x @ kernel) ** 6) / 4, rtol=1e-4, atol=1e-7
    )


@each_sketch
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [1, 2, 5])
def test_variance_is_within_its_bound(sketch, degree, columns):
    features = make(sketch, degree + columns, (0,) * degree + (1,), kappa=1e6)
    assert features.columns[-1] == columns
    rng = np.random.default_rng(degree)
    for dim in (1, 4):
        x, w = rng.normal(size=(2, 100, dim))
        x = np.concatenate([x, w, -w, np.eye(dim)])  # also parallel, and along axes
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        w /= np.linalg.norm(w, axis=1, keepdims=True)
        layer = jnp.asarray(x, "float32"), jnp.asarray(w.T, "float32")
        scaled = features.variance(*layer) * columns / (3**degree - 1)
        assert np.min(scaled) > -1e-5
        assert np.max(scaled) < 1 + 1e-5
    if sketch != "tensor_sketch" and dim == 4:
        assert np.max(scaled) > 0.4  # and the bound is not idle


# The sketches, against their definitions.


def split(features, array, scales):
    """Blocks of the factors: one list of [..., m_j] for each degree from 1 on."""
    blocks, start = [], 0
    for j, (m, scale) in enumerate(zip(features.columns[1:], scales, strict=True), 1):
        block = [array[..., start + i * m : start + (i + 1) * m] for i in range(j)]
        blocks.append((block, m, scale))
        start += j * m
    return blocks


def products(features, factors):
    scales = [m**-0.5 for m in features.columns[1:]]
    columns = [
        scale * np.prod(block, axis=0)
        for block, _, scale in split(features, factors, scales)
    ]
    return np.concatenate([np.ones((*factors.shape[:-1], 1)), *columns], axis=-1)


def test_maclaurin_is_a_product_of_projections_on_signs():
    features = make("maclaurin")
    params = features.init(jax.random.key(1), DIM)
    assert set(np.unique(params["omega"])) == {-1, 1}
    x, *_ = make_inputs()
    factors = np.asarray(x, np.float64) @ np.asarray(params["omega"], np.float64).T
    np.testing.assert_allclose(
        features.phi(params, x), products(features, factors), **CLOSE
    )


def test_tensor_srht_is_a_product_of_rows_of_transforms():
    features = make("tensor_srht")
    params = features.init(jax.random.key(1), DIM)
    x, *_ = make_inputs()
    signs, rows = np.asarray(params["signs"], np.float64), np.asarray(params["rows"])
    hadamard = scipy.linalg.hadamard(8)[:, :DIM]
    transforms = np.concatenate([hadamard * sign for sign in signs])
    factors = np.asarray(x, np.float64) @ transforms[rows].T
    np.testing.assert_allclose(
        features.phi(params, x), products(features, factors), **CLOSE
    )
    # Factor l of any degree has its own transform.
    blocks = split(features, rows, [1.0] * 3)
    for block, _, _ in blocks:
        assert [set(part // 8) for part in block] == [{i} for i in range(len(block))]


def test_tensor_sketch_is_the_count_sketch_of_the_tensor_power():
    features = make("tensor_sketch", num_features=17)
    params = features.init(jax.random.key(1), DIM)
    x, *_ = (np.asarray(a, np.float64) for a in make_inputs())
    signs, buckets = (np.asarray(params[name]) for name in ("signs", "buckets"))
    expected, factor, start = [np.ones((3, 1))], 0, 0
    for j, m in enumerate(features.columns[1:], 1):
        sketch = np.zeros((3, m))
        for index in np.ndindex(*[DIM] * j):
            of = [(factor + i, index[i]) for i in range(j)]
            place = sum(buckets[k] - start - i * m for i, k in enumerate(of)) % m
            sketch[:, place] += np.prod([signs[k] for k in of]) * np.prod(
                x[:, list(index)], axis=1
            )
        expected.append(sketch)
        factor, start = factor + j, start + j * m
    np.testing.assert_allclose(
        features.phi(params, make_inputs()[0]), np.hstack(expected), **CLOSE
    )


@each_sketch
def test_psi_is_the_taylor_expansion_around_the_bias(sketch):
    features = make(sketch)
    params = features.init(jax.random.key(1), DIM)
    _, kernel, bias = make_inputs()
    f = np.polynomial.Polynomial(COEFFICIENTS)
    sketches = np.asarray(features.phi(params, kernel.T), np.float64)
    slopes = [f(bias), f.deriv(1)(bias), f.deriv(2)(bias) / 2, f.deriv(3)(bias) / 6]
    expected = sketches * np.repeat(np.stack(slopes, axis=1), features.columns, axis=1)
    np.testing.assert_allclose(features.psi(params, kernel, bias), expected.T, **CLOSE)


@each_sketch
def test_the_constant_is_exact(sketch):
    features = make(sketch)
    params = features.init(jax.random.key(1), DIM)
    x, kernel, bias = make_inputs()
    layer = snnk.snnk_dense(features, params, 0 * x, kernel, bias)
    expected = np.polyval(COEFFICIENTS[::-1], np.asarray(bias, np.float64))
    np.testing.assert_allclose(layer, np.tile(expected, (3, 1)), rtol=1e-6)


def test_exact_is_the_polynomial():
    x, kernel, bias = make_inputs()
    z = np.asarray(x @ kernel + bias[None], np.float64)
    np.testing.assert_allclose(
        make().exact(x, kernel, bias), np.polyval(COEFFICIENTS[::-1], z), **CLOSE
    )


# The allocation.


def test_columns():
    def columns(num_features, coefficients, **fields):
        return make("tensor_srht", num_features, coefficients, **fields).columns

    assert columns(4, (1, 2, 3, 4)) == (1, 1, 1, 1)
    assert columns(24, (9, -1, 0, 3)) == (1, 6, 1, 16)
    assert columns(103, (0, 1, 1), kappa=3.0) == (1, 26, 76)
    # Around b = 2: (2 + z)^2 = 4 + 4 z + z^2.
    assert columns(13, (0, 0, 1), bias_scale=2.0) == (1, 9, 3)
    for num_features in range(4, 60):
        assert sum(columns(num_features, COEFFICIENTS, kappa=0.3)) == num_features
    assert columns(24, (9, -1, 0, 3), kappa=1e-200) == (1, 21, 1, 1)
    assert columns(24, (9, -1, 0, 3), kappa=1e200) == (1, 1, 1, 21)


def test_allocation_lowers_the_variance():
    layer = make_inputs()[:2]
    made, other = (
        make("maclaurin", 64, (0, 4, 0.5), kappa=kappa).variance(*layer)
        for kappa in (0.5, 50.0)
    )
    assert np.mean(made) < 0.5 * np.mean(other)


@pytest.mark.usefixtures("unchecked")
def test_equal_polynomials_are_equal_maps():
    features = make(coefficients=(1, 2))
    for coefficients in ([1.0, 2.0], (1, 2, 0.0), np.array([1.0, 2.0])):
        twin = Polynomial(coefficients=coefficients, num_features=16)
        assert twin == features
        assert hash(twin) == hash(features)
    assert features.coefficients == (1.0, 2.0)
    assert features.degree == 1
    assert make(coefficients=(1, 3)) != features


def test_fields_survive_json():
    features = make("tensor_sketch", bias_scale=0.5)
    fields = json.loads(json.dumps(dataclasses.asdict(features)))
    assert Polynomial(**fields) == features


# Parameters, dtypes, transformations.


@each_sketch
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_dtypes(sketch, dtype):
    features = make(sketch)
    with jax.enable_x64(dtype == "float64"):
        params = features.init(jax.random.key(1), DIM, jnp.dtype(dtype))
        kinds = {name: value.dtype.name for name, value in params.items()}
        assert {kinds.pop(name, "int32") for name in ("rows", "buckets")} == {"int32"}
        assert set(kinds.values()) == {dtype}
        x, kernel, bias = make_inputs(dtype)
        layer = snnk.snnk_dense(features, params, x, kernel, bias)
        assert layer.dtype == jnp.dtype(dtype)
        # Signs are exact in any dtype: the same sketch, wide inside.
        wide = np.asarray(features.phi(params, x.astype("float32")), np.float64)
        phi = features.phi(params, x)
        assert phi.dtype == jnp.dtype(dtype)
        rtol = 2.0**-8 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(np.asarray(phi, np.float64), wide, rtol, 1e-5)


@each_sketch
def test_every_part_of_the_draw_depends_on_the_key(sketch):
    # Wide enough for repetitions to be no accident.
    features = make(sketch, num_features=40)
    first, other = (features.init(jax.random.key(seed), 64) for seed in (0, 1))
    for name, value in first.items():
        same = np.mean(np.asarray(value) == np.asarray(other[name]))
        assert same < (0.6 if name in ("omega", "signs") else 0.3)
        rows = np.asarray(value) if value.ndim == 2 else np.asarray(value)[None]
        assert len({tuple(row) for row in rows}) == len(rows)


@each_sketch
def test_draws_are_uniform(sketch):
    features = make(sketch, num_features=13, coefficients=(0, 1, 2))
    _, first, second = features.columns
    keys = jax.random.split(jax.random.key(0), 512)
    params = jax.vmap(lambda key: features.init(key, 8))(keys)
    for name in params.keys() & {"omega", "signs"}:
        mean = np.mean(params[name], axis=(0, 2))
        assert np.all(np.abs(mean) < 5 / np.sqrt(512 * 8))
    if sketch == "tensor_srht":
        draws, size = np.asarray(params["rows"])[:, first : first + second], 8
    elif sketch == "tensor_sketch":
        draws, size = np.asarray(params["buckets"])[:, 1] - first, second
    else:
        return
    share = np.bincount(draws.ravel(), minlength=size) / draws.size
    assert len(share) == size
    assert np.all(np.abs(share - 1 / size) < 5 / np.sqrt(size * draws.size))


@each_sketch
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_any_width(sketch, dim):
    features = make(sketch, 400, (0, 1.0, -1.0))
    params = features.init(jax.random.key(1), dim)
    x = jnp.full((2, dim), 0.6 / dim**0.5)
    layer = snnk.snnk_dense(features, params, x, x.T)
    deviation = np.sqrt(features.variance(x, x.T))
    assert np.all(np.abs(layer - features.exact(x, x.T)) <= 5 * deviation + 1e-5)


@each_sketch
def test_jit_of_everything(sketch):
    features = make(sketch)
    x, kernel, bias = make_inputs()

    def layer(key):
        return snnk.snnk_dense(features, features.init(key, DIM), x, kernel, bias)

    key = jax.random.key(2)
    np.testing.assert_allclose(jax.jit(layer)(key), layer(key), **CLOSE)


@each_sketch
def test_gradient(sketch):
    features = make(sketch)
    params = features.init(jax.random.key(1), DIM)
    x, kernel, bias = make_inputs()

    def total(layer):
        return jnp.sum(snnk.snnk_dense(features, params, *layer) ** 2)

    grads = jax.grad(total)((x, kernel, bias))
    step = jax.tree.map(jnp.ones_like, (x, kernel, bias))
    slope = sum(jnp.sum(g) for g in grads)
    ends = (
        jax.tree.map(lambda a, s, h=h: a + h * s, (x, kernel, bias), step)
        for h in (1e-2, -1e-2)
    )
    up, down = map(total, ends)
    np.testing.assert_allclose(slope, (up - down) / 2e-2, rtol=1e-2)
    grads = jax.grad(total)((0 * x, 0 * kernel, bias))
    assert all(np.isfinite(leaf).all() for leaf in grads)


@each_sketch
def test_in_a_layer(sketch):
    linear = nnx.Linear(DIM, 3, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.array([0.3, -0.8, 1.2])
    features = make(sketch, 2048, bias_scale=1.0)
    layer = snnk.nn.SNNKDense.from_linear(linear, features=features, rngs=nnx.Rngs(1))
    x, *_ = make_inputs()
    kernel, bias = linear.kernel[...], linear.bias[...]
    deviation = np.sqrt(features.variance(x, kernel, bias))
    error = np.abs(layer(x) - features.exact(x, kernel, bias))
    assert np.all(error < 5 * deviation)
    assert np.max(deviation) < 0.3


@each_sketch
def test_an_adapter_file_names_the_draw(sketch, tmp_path, monkeypatch):
    monkeypatch.setattr(snnk.features, "Polynomial", Polynomial, raising=False)
    base = nnx.Sequential(nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0)))
    adapter = snnk.nn.SNNKAdapter(DIM, features=make(sketch), rngs=nnx.Rngs(1))
    adapter.readout[...] = jnp.ones((16, DIM))
    rule = snnk.SwapRule(
        path=".*/0", build=lambda module, rngs: snnk.nn.Adapted(module, adapter)
    )
    model, _ = snnk.swap_modules(base, [rule], rngs=nnx.Rngs(2))
    file = tmp_path / "a.safetensors"
    mark = snnk.adapters.fingerprint(base)
    snnk.adapters.save_adapter(file, model, base_fingerprint=mark)
    x, *_ = make_inputs()
    loaded = snnk.adapters.load_adapter(file, base)
    np.testing.assert_array_equal(loaded(x), model(x))
    assert not np.allclose(loaded(x), base(x))


# Errors.


@pytest.mark.usefixtures("unchecked")
def test_wrong_fields_are_refused():
    for coefficients in ((), (1.0,), (1.0, 0.0), (0.0, np.nan), (np.inf, 1.0)):
        with pytest.raises(ValueError, match="coefficients must be finite, one of"):
            make(coefficients=coefficients)
    with pytest.raises(ValueError, match="sketch must be 'maclaurin', .*Got 'srht'"):
        make("srht")
    with pytest.raises(ValueError, match="num_features must be at least 4 for degree"):
        make(num_features=3)
    for kappa in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="kappa must be positive and finite"):
            make(kappa=kappa)
    for scale in (-1.0, np.inf, np.nan):
        with pytest.raises(
            ValueError, match="bias_scale must be at least 0 and finite"
        ):
            make(bias_scale=scale)
    with pytest.raises(ValueError, match="projection must be left alone.*'gaussian'"):
        make(projection="gaussian")


@each_sketch
@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused(sketch):
    features = make(sketch)
    params = features.init(jax.random.key(1), DIM)
    x, kernel, bias = make_inputs()
    for inputs in (x[:, :3], x[0, 0]):
        with pytest.raises(ValueError, match="inputs must have width 5. Got shape"):
            features.phi(params, inputs)
    with pytest.raises(ValueError, match="inputs must have width 5. Got shape"):
        features.psi(params, kernel[:3], bias)
    with pytest.raises(ValueError, match="must be real floating point. Got int32"):
        features.phi(params, jnp.ones((2, DIM), jnp.int32))
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\)"):
        features.psi(params, kernel, jnp.zeros(4))
    with pytest.raises(ValueError, match="num and dim must be at least 1"):
        features.init(jax.random.key(1), 0)


@pytest.mark.parametrize("sketch", SKETCHES[1:])
@pytest.mark.usefixtures("unchecked")
def test_rounded_indices_are_refused(sketch):
    features = make(sketch)
    params = features.init(jax.random.key(1), DIM)
    rounded = {name: value.astype("bfloat16") for name, value in params.items()}
    with pytest.raises((TypeError, ValueError), match="integer"):
        features.phi(rounded, make_inputs()[0])


@each_sketch
def test_no_examples_have_no_features(sketch):
    features = make(sketch)
    params = features.init(jax.random.key(0), 4)
    assert features.phi(params, jnp.zeros((0, 4))).shape == (0, 16)
