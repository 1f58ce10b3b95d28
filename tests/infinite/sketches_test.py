"""Sketches: unbiased at the predicted rate, by definition, of sparse inputs."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.experimental import sparse

from snnk_jax.infinite import sketches
from snnk_jax.testing import count_traces, tolerance

DIM, KEYS = 12, 4096
CLOSE = tolerance("float32")
VECTORS = {
    "count_sketch": lambda m: sketches.CountSketch(num_features=m),
    "osnap": lambda m: sketches.OSNAP(num_features=m, sparsity=3),
    "srht": lambda m: sketches.SRHT(num_features=m),
    "tensor_sketch": lambda m: sketches.TensorSketch(num_features=m, degree=3),
    "poly_sketch": lambda m: sketches.PolySketch(num_features=m, degree=3),
}
DEGREES = {"tensor_sketch": 3, "poly_sketch": 3}
each = pytest.mark.parametrize("name", VECTORS)


def pair(dim=DIM):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, dim))
    y = 0.6 * x / np.linalg.norm(x) + 0.8 * y / np.linalg.norm(y)
    return (jnp.asarray(v / np.linalg.norm(v), jnp.float32) for v in (x, y))


@functools.cache
def estimates(name, m):
    sketch, (x, y) = VECTORS[name](m), pair()

    def one(key):
        params = sketch.init(key, DIM)
        return jnp.sum(sketch.apply(params, x) * sketch.apply(params, y))

    keys = jax.random.split(jax.random.key(m), KEYS)
    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


@each
def test_unbiased(name):
    x, y = pair()
    values = estimates(name, 8)
    error = values.mean() - float(x @ y) ** DEGREES.get(name, 1)
    assert 0.02 < values.std() < 3
    assert abs(error) < 4 * values.std() / KEYS**0.5


@pytest.mark.parametrize("name", [n for n in VECTORS if n != "srht"])
def test_variance_falls_as_one_over_m(name):
    few, many = (np.var(estimates(name, m)) for m in (8, 32))
    assert 3.3 < few / many < 4.9


def test_variance_of_the_count_sketch_is_the_formula():
    x, y = (np.asarray(v, np.float64) for v in pair())
    predicted = (1 + (x @ y) ** 2 - 2 * np.sum(x**2 * y**2)) / 8
    assert np.var(estimates("count_sketch", 8)) == pytest.approx(predicted, rel=0.1)


def test_srht_without_replacement_beats_independent_rows():
    # A part 1 - (m - 1) / (p - 1) of the variance of m independent rows is left.
    many, few = (np.var(estimates("srht", m)) for m in (8, 1))
    assert many / few == pytest.approx((1 - 7 / 15) / 8, rel=0.15)


def test_srht_of_whole_blocks_keeps_lengths():
    (x, _), sketch = pair(), sketches.SRHT(num_features=32)
    y = sketch.apply(sketch.init(jax.random.key(0), DIM), x)
    np.testing.assert_allclose(jnp.sum(y * y), 1, rtol=1e-5)


def test_srht_is_rows_of_the_hadamard_matrix():
    sketch = sketches.SRHT(num_features=21)
    params = sketch.init(jax.random.key(0), DIM)
    hadamard = scipy.linalg.hadamard(16)[:, :DIM]
    dense = np.concatenate([hadamard * s for s in np.asarray(params["signs"])])[
        params["rows"]
    ]
    np.testing.assert_allclose(
        sketch.apply(params, jnp.eye(DIM)), dense.T / 21**0.5, **CLOSE
    )
    assert len(set(np.asarray(params["rows"]).tolist())) == 21


def test_tensor_sketch_is_the_count_sketch_of_the_tensor_product():
    m, sketch = 7, sketches.TensorSketch(num_features=7, degree=2)
    params = sketch.init(jax.random.key(1), DIM)
    x, _ = pair()
    expected = np.zeros(m)
    signs, buckets = np.asarray(params["signs"]), np.asarray(params["buckets"])
    for i in range(DIM):
        for j in range(DIM):
            bucket = (buckets[0, i] + buckets[1, j]) % m
            expected[bucket] += signs[0, i] * signs[1, j] * float(x[i] * x[j])
    np.testing.assert_allclose(sketch.apply(params, x), expected, **CLOSE)


def test_tensor_srht_is_unbiased_for_two_vectors():
    rng = np.random.default_rng(1)
    x, x2 = jnp.asarray(rng.normal(size=(2, 5)) / 5**0.5, jnp.float32)
    y, y2 = jnp.asarray(rng.normal(size=(2, 3)) / 3**0.5, jnp.float32)
    sketch = sketches.TensorSRHT(num_features=16)

    def one(key):
        params = sketch.init(key, (5, 3))
        return jnp.sum(sketch.apply(params, x, y) * sketch.apply(params, x2, y2))

    keys = jax.random.split(jax.random.key(0), KEYS)
    values = np.asarray(jax.jit(jax.vmap(one))(keys))
    error = values.mean() - float(x @ x2) * float(y @ y2)
    assert abs(error) < 4 * values.std() / KEYS**0.5


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 6])
def test_all_powers_are_unbiased(degree):
    sketch, (x, y) = sketches.PolySketch(num_features=16, degree=degree), pair()

    def one(key):
        params = sketch.init(key, DIM)
        left, right = sketch.powers(params, x), sketch.powers(params, y)
        return jnp.stack([jnp.sum(a * b) for a, b in zip(left, right, strict=True)])

    keys = jax.random.split(jax.random.key(degree), KEYS)
    values = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    assert values.shape == (KEYS, degree)
    exact = float(x @ y) ** np.arange(1, degree + 1)
    np.testing.assert_allclose(values[:, 0], exact[0], rtol=1e-5)
    bound = 4.5 * values.std(axis=0) / KEYS**0.5 + 1e-6
    assert np.all(np.abs(values.mean(axis=0) - exact) < bound)


@pytest.mark.slow
def test_powers_of_a_tree_grow_slower_than_those_of_a_convolution():
    tree = sketches.PolySketch(num_features=64, degree=8)
    flat = sketches.TensorSketch(num_features=64, degree=8)
    x, _ = pair()

    def spread(sketch):
        def one(key):
            y = sketch.apply(sketch.init(key, DIM), x)
            return jnp.sum(y * y)

        keys = jax.random.split(jax.random.key(0), 1024)
        return float(jnp.std(jax.jit(jax.vmap(one))(keys)))

    assert spread(tree) < 0.4 * spread(flat)


@pytest.mark.parametrize(
    "sketch",
    [
        sketches.CountSketch(num_features=9),
        sketches.OSNAP(num_features=9, sparsity=4),
        sketches.TensorSketch(num_features=9, degree=3),
        sketches.PolySketch(num_features=9, degree=3, base="osnap"),
        sketches.PolySketch(num_features=9, degree=2, base="count_sketch"),
    ],
    ids=repr,
)
def test_sparse_inputs_give_what_dense_ones_give(sketch):
    rng = np.random.default_rng(2)
    dense = rng.normal(size=(5, 40)) * (rng.random((5, 40)) < 0.1)
    dense = jnp.asarray(dense, jnp.float32)
    x = sparse.BCOO.fromdense(dense, nse=50)  # more than there are: padded
    if isinstance(sketch, sketches.PolySketch):
        params = sketch.init(jax.random.key(0), 40, sparse=True)
    else:
        params = sketch.init(jax.random.key(0), 40)
    expected = sketch.apply(params, dense)
    assert float(jnp.abs(expected).max()) > 0.1
    np.testing.assert_allclose(sketch.apply(params, x), expected, **CLOSE)
    np.testing.assert_allclose(jax.jit(sketch.apply)(params, x), expected, **CLOSE)


def test_time_of_sparse_inputs_does_not_depend_on_the_width():
    sketch = sketches.OSNAP(num_features=64)

    def flops(width):
        params = jax.eval_shape(lambda: sketch.init(jax.random.key(0), width))
        x = sparse.BCOO(
            (jnp.ones(100), jnp.zeros((100, 2), jnp.int32)), shape=(10, width)
        )
        compiled = jax.jit(sketch.apply).lower(params, x).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(1 << 16) < flops(1 << 10) + (1 << 16) * 4 * 1.5
    # What is left is the scaling of the signs, four a coordinate.


@each
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_any_leading_axes(name, batch):
    sketch = VECTORS[name](10)
    params = sketch.init(jax.random.key(0), DIM)
    x = jax.random.normal(jax.random.key(1), (6, DIM))
    flat = sketch.apply(params, x)
    assert flat.shape == (6, 10)
    shaped = sketch.apply(params, x.reshape(*batch, DIM) if batch else x[0])
    rows = 6 if batch else 1
    np.testing.assert_allclose(shaped.reshape(rows, 10), flat[:rows], **CLOSE)
    mapped = jax.jit(jax.vmap(sketch.apply, in_axes=(None, 0)))(params, x)
    np.testing.assert_allclose(mapped, flat, **CLOSE)


@each
def test_bfloat16_is_kept_and_accumulated_wider(name):
    sketch = VECTORS[name](64)
    params = sketch.init(jax.random.key(0), DIM)
    x, _ = pair()
    y = sketch.apply(params, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    wide = sketch.apply(params, x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=1e-2, atol=2e-3)


@each
def test_gradients_are_finite_at_zero(name):
    sketch = VECTORS[name](10)
    params = sketch.init(jax.random.key(0), DIM)
    gradient = jax.grad(lambda x: jnp.sum(sketch.apply(params, x) ** 2))(jnp.zeros(DIM))
    assert np.all(np.isfinite(gradient))


@each
def test_values_compile_once(name):
    sketch = VECTORS[name](10)
    counted = count_traces(lambda s, params, x: s.apply(params, x))
    apply = jax.jit(counted, static_argnums=0)
    params = sketch.init(jax.random.key(0), DIM)
    apply(sketch, params, jnp.ones(DIM))
    apply(copy.deepcopy(sketch), params, jnp.zeros(DIM))
    assert counted.traces == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sketches.SRHT(num_features=0), "num_features must be a whole"),
        (lambda: sketches.TensorSRHT(num_features=0), "num_features must be"),
        (lambda: sketches.OSNAP(num_features=3), "sparsity must be in"),
        (lambda: sketches.TensorSketch(num_features=3, degree=0), "degree must be"),
        (lambda: sketches.PolySketch(num_features=3, degree=0), "degree must be"),
        (lambda: sketches.PolySketch(num_features=3, base="x"), "base must be one of"),
    ],
)
def test_wrong_fields_are_refused(unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_inputs_are_refused(unchecked):
    key, wrong = jax.random.key(0), jnp.ones((2, DIM + 1))
    for sketch in (make(4) for make in VECTORS.values()):
        with pytest.raises(ValueError, match="dim must be at least 1"):
            sketch.init(key, 0)
    for name in ("count_sketch", "osnap", "srht", "tensor_sketch"):
        sketch = VECTORS[name](4)
        with pytest.raises(ValueError, match="inputs must have width"):
            sketch.apply(sketch.init(key, DIM), wrong)
    x = sparse.BCOO.fromdense(jnp.ones((2, DIM)))
    srht = VECTORS["srht"](4)
    with pytest.raises(ValueError, match="inputs must be dense"):
        srht.apply(srht.init(key, DIM), x)
    osnap = VECTORS["osnap"](4)
    batched = sparse.BCOO.fromdense(jnp.ones((2, DIM)), n_batch=1)
    with pytest.raises(ValueError, match="sparse inputs must be matrices"):
        osnap.apply(osnap.init(key, DIM), batched)
    tree = sketches.PolySketch(num_features=DIM)
    with pytest.raises(ValueError, match="inputs must be dense and at most"):
        tree.apply(tree.init(key, DIM), x)
    with pytest.raises(ValueError, match="base must be 'osnap'"):
        tree.init(key, DIM, sparse=True)
