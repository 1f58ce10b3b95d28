import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from snnk_jax import projections
from tests.projections_golden import PATH, make_golden
from tests.tiers import slow_but

MASK = 0xFFFFFFFF
EXACT = ("gaussian", "orthogonal", "simplex", "antithetic", "sobol")
BLOCKS = ("orthogonal", "simplex", "hadamard")


def threefry2x32(counter, key, rounds=20):
    """Plain-Python Threefry-2x32, from the paper and not from the library."""
    rotations = (13, 15, 26, 6, 17, 29, 16, 24)
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = ((c + k) & MASK for c, k in zip(counter, keys, strict=False))
    for i in range(rounds):
        r = rotations[i % 8]
        x = (x + y) & MASK
        y = ((y << r | y >> (32 - r)) & MASK) ^ x
        if i % 4 == 3:
            s = i // 4 + 1
            x = (x + keys[s % 3]) & MASK
            y = (y + keys[(s + 1) % 3] + s) & MASK
    return x, y


# Random123's kat_vectors, threefry2x32 20: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((MASK, MASK), (MASK, MASK), (0x1CB996FC, 0xBB002BE7)),
    (
        (0x243F6A88, 0x85A308D3),
        (0x13198A2E, 0x03707344),
        (0xC4923A9C, 0x483DF7A0),
    ),
]


def key_of(*words):
    return jax.random.wrap_key_data(np.array(words, np.uint32))


@functools.cache
def many(name, num, dim, keys=4096):
    """The projections of many keys, [keys, num, dim]."""
    draw = jax.vmap(lambda key: projections.draw(name, key, num, dim))
    omega = jax.jit(draw)(jax.random.split(jax.random.key(0), keys))
    return np.asarray(omega, np.float64)


# Bits.


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_plain_python_reference_gives_the_known_answers(counter, key, answer):
    assert threefry2x32(counter, key) == answer


@pytest.mark.parametrize(
    "words", [(0, 0), (MASK, MASK), (0x13198A2E, 0x03707344), (0, 7)]
)
def test_bits_are_threefry_of_the_counter(words):
    bits = np.asarray(projections.random_bits(jnp.array(words, jnp.uint32), 300))
    expected = [threefry2x32((i, 0), words) for i in range(300)]
    np.testing.assert_array_equal(bits.T, expected)


def test_first_bits_are_the_known_answer():
    bits = projections.random_bits(jnp.zeros(2, jnp.uint32), 1)[:, 0]
    assert tuple(int(x) for x in bits) == KNOWN_ANSWERS[0][2]


golden_now = functools.cache(make_golden)


def test_streams_are_other_counters():
    words = (0x13198A2E, 0x03707344)
    made = projections.streams(jnp.array(words, jnp.uint32), 5)
    assert made.tolist() == [list(threefry2x32((i, 1), words)) for i in range(5)]


def test_bits_are_those_of_the_golden_file():
    golden = json.loads(PATH.read_text())
    made = golden_now()
    assert made["generator"] == golden["generator"]
    for new, old in zip(made["entries"], golden["entries"], strict=True):
        assert new["words"] == old["words"]
        assert new["bits"] == old["bits"]


@pytest.mark.parametrize("name", ["normals", *projections.names()])
def test_floats_are_those_of_the_golden_file(name):
    golden = json.loads(PATH.read_text())
    for new, old in zip(golden_now()["entries"], golden["entries"], strict=True):
        np.testing.assert_allclose(new[name], old[name], rtol=1e-4, atol=1e-5)


def test_golden_file_covers_every_projection():
    entry = json.loads(PATH.read_text())["entries"][0]
    assert set(projections.names()) <= set(entry)


def test_key_words():
    words = projections.key_words(jax.random.key(2**31 + 5))
    assert words.dtype == jnp.uint32
    assert [int(word) for word in words] == [0, 2**31 + 5]


@pytest.mark.usefixtures("unchecked")
def test_other_keys_are_refused():
    with pytest.raises(ValueError, match=r"single threefry2x32 key.*shape \(4,\)"):
        projections.key_words(jax.random.key(0, impl="rbg"))
    with pytest.raises(ValueError, match=r"single threefry2x32 key.*shape \(3, 2\)"):
        projections.key_words(jax.random.split(jax.random.key(0), 3))


# Normals.


def test_normals_have_the_law():
    num = 200_000
    z = np.asarray(projections.normals(jnp.array([1, 2], jnp.uint32), (num,)))
    assert np.isfinite(z).all()
    assert np.abs(z).max() < 5.9
    z = z.astype(np.float64)
    # Standard errors of mean, variance, skewness and kurtosis of a normal sample.
    assert abs(z.mean()) < 4 * (1 / num) ** 0.5
    assert abs(z.var() - 1) < 4 * (2 / num) ** 0.5
    assert abs(scipy.stats.skew(z)) < 4 * (6 / num) ** 0.5
    assert abs(scipy.stats.kurtosis(z)) < 4 * (24 / num) ** 0.5
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
    # The two halves are the cosines and sines of the same pairs.
    cosine, sine = np.split(z, 2)
    assert abs(np.mean(cosine * sine)) < 4 * (2 / num) ** 0.5
    assert abs(np.mean(cosine**2 * sine**2) - 1) < 4 * (16 / num) ** 0.5
    assert abs(np.mean(z[1:] * z[:-1])) < 4 * (1 / num) ** 0.5


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (3, 1, 5), (0, 4)], ids=str)
def test_normals_of_any_shape(shape):
    words = jnp.array([1, 2], jnp.uint32)
    z = projections.normals(words, shape)
    assert z.shape == shape
    assert z.dtype == jnp.float32
    flat = projections.normals(words, (z.size,))
    np.testing.assert_array_equal(z.ravel(), flat)


@pytest.mark.parametrize("name", projections.names())
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes_are_casts(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        key = jax.random.key(3)
        wide = projections.draw(name, key, 5, 3)
        cast = projections.draw(name, key, 5, 3, jnp.dtype(dtype))
        assert cast.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(cast, wide.astype(dtype))


# Projections.


@pytest.mark.parametrize("name", projections.names())
@pytest.mark.parametrize(
    ("num", "dim"),
    [
        *[(1, 1), (1, 4), (5, 4), (13, 4)],
        *(
            pytest.param(n, d, marks=pytest.mark.slow)
            for n, d in [(4, 1), (3, 4), (4, 4)]
        ),
    ],
)
def test_shapes(name, num, dim):
    omega = projections.draw(name, jax.random.key(0), num, dim)
    assert omega.shape == (num, dim)
    assert np.isfinite(omega).all()
    assert np.all(np.linalg.norm(omega, axis=1) > 0)


@pytest.mark.parametrize("name", projections.names())
def test_function_of_the_key(name):
    def draw(seed):
        return projections.draw(name, jax.random.key(seed), 6, 4)

    np.testing.assert_array_equal(draw(3), draw(3))
    assert not np.allclose(draw(3), draw(4))
    compiled = jax.jit(lambda key: projections.draw(name, key, 6, 4))
    np.testing.assert_allclose(compiled(jax.random.key(3)), draw(3), atol=1e-5)
    assert not np.allclose(
        projections.draw(name, key_of(1, 3), 6, 4), draw(3)
    )  # both words count


@pytest.mark.parametrize("name", projections.names())
@pytest.mark.parametrize(("num", "dim"), [(6, 4), (3, 4), (5, 3)])
def test_rows_have_mean_zero_and_identity_covariance(name, num, dim):
    omega = many(name, num, dim)
    error = 5 / len(omega) ** 0.5
    assert np.all(np.abs(omega.mean(axis=0)) < error * omega.std(axis=0))
    products = omega[..., :, None] * omega[..., None, :]
    deviation = np.abs(products.mean(axis=0) - np.eye(dim))
    assert np.all(deviation <= error * products.std(axis=0))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("num", "dim"), [(6, 4), (3, 4)])
def test_rows_are_standard_normal_vectors(name, num, dim):
    omega = many(name, num, dim)
    least = 1e-3 / (2 * num)  # a p-value per law and row: Bonferroni's bound
    for row in range(num):
        lengths = np.linalg.norm(omega[:, row], axis=1)
        assert scipy.stats.kstest(lengths, scipy.stats.chi(dim).cdf).pvalue > least
        assert scipy.stats.kstest(omega[:, row, 0], "norm").pvalue > least


@pytest.mark.parametrize("name", EXACT)
def test_characteristic_function_is_unbiased(name):
    v = np.array([1.0, -0.5, 0.25, 1.0])
    z = many(name, 6, 4) @ v
    error = 5 / len(z) ** 0.5
    waves = np.exp(1j * z)
    waves = np.column_stack([waves, waves.mean(axis=1)])  # each row, and the average
    bias = np.abs(waves.real.mean(axis=0) - np.exp(-v @ v / 2))
    assert np.all(bias < error * waves.real.std(axis=0))
    # The sines of an antithetic set cancel, up to rounding.
    drift = np.abs(waves.imag.mean(axis=0))
    assert np.all(drift < error * waves.imag.std(axis=0) + 1e-12)


def test_gaussian_rows_are_independent():
    omega = many("gaussian", 3, 4)
    inner = np.einsum("ki,ki->k", omega[:, 0], omega[:, 1])
    assert abs(inner.var() - 4) < 0.6
    assert abs(inner.mean()) < 5 * 2 / len(omega) ** 0.5


@pytest.mark.parametrize(("num", "dim"), [(3, 8), (8, 8), (13, 4), (64, 64)])
def test_blocks_are_orthogonal(num, dim):
    omega = projections.orthogonal(jax.random.key(1), num, dim)
    omega = np.asarray(omega, np.float64)
    unit = omega / np.linalg.norm(omega, axis=1, keepdims=True)
    for start in range(0, num, dim):
        block = unit[start : start + dim]
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), atol=1e-5)


def test_orthogonal_directions_are_haar():
    omega = many("orthogonal", 4, 4)
    unit = omega / np.linalg.norm(omega, axis=2, keepdims=True)
    keys = len(unit)
    # Rows of a Haar matrix: mean 0, E u_i u_j = I / d, E u_i^4 = 3 / (d (d + 2)).
    assert np.all(np.abs(unit.mean(axis=0)) < 5 * 0.5 / keys**0.5)
    second = np.einsum("kni,knj->nij", unit, unit) / keys
    assert np.all(np.abs(second - np.eye(4) / 4) < 0.02)
    assert np.all(np.abs(np.mean(unit**4, axis=0) - 3 / 24) < 0.015)
    # Both orientations occur equally often: without the sign fix only one does.
    signs = np.sign(np.linalg.det(unit))
    assert abs(signs.mean()) < 5 / keys**0.5
    assert np.all(np.abs(np.mean(np.sign(np.einsum("kii->ki", unit)), 0)) < 0.08)


@pytest.mark.parametrize("name", BLOCKS)
def test_lengths_are_independent_of_directions_and_each_other(name):
    omega = many(name, 3, 4)
    lengths = np.linalg.norm(omega, axis=2)
    unit = omega / lengths[..., None]
    features = np.concatenate([unit, unit**2], axis=2).reshape(len(unit), -1)
    centred = (lengths - lengths.mean(0)) / lengths.std(0)
    features = (features - features.mean(0)) / features.std(0)
    bound = 5 / len(unit) ** 0.5
    assert np.abs(centred.T @ features / len(unit)).max() < bound
    correlation = centred.T @ centred / len(unit)
    assert np.abs(correlation - np.eye(3)).max() < bound


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_independent(name):
    omega = many(name, 8, 4)
    unit = omega / np.linalg.norm(omega, axis=2, keepdims=True)
    first, second = unit[:, :4], unit[:, 4:]
    inner = np.einsum("kni,kmi->knm", first, second)
    # Independent unit vectors: E u.v = 0 and E (u.v)^2 = 1 / d; within a block both 0.
    assert np.all(np.abs(inner.mean(axis=0)) < 5 * 0.5 / len(unit) ** 0.5)
    assert np.all(np.abs(np.mean(inner**2, axis=0) - 0.25) < 0.02)


@pytest.mark.parametrize(("num", "dim"), [(3, 8), (8, 8), (7, 3), (4, 2), (64, 64)])
def test_simplex_has_the_angles_of_the_paper(num, dim):
    # The vertices of arXiv 2301.13856, from the paper and not from the library.
    vertices = (dim / (dim - 1)) ** 0.5 * np.eye(dim)
    vertices[:, :-1] -= (dim**0.5 + 1) / (dim - 1) ** 1.5
    vertices[-1] = [1 / (dim - 1) ** 0.5] * (dim - 1) + [0]
    gram = vertices @ vertices.T
    cosines = np.where(np.eye(dim), 1, -1 / (dim - 1))
    np.testing.assert_allclose(gram, cosines, atol=1e-12)
    omega = projections.simplex(jax.random.key(1), num, dim)
    unit = omega / np.linalg.norm(omega, axis=1, keepdims=True)
    for start in range(0, num, dim):
        block = unit[start : start + dim]
        rows = len(block)
        np.testing.assert_allclose(block @ block.T, gram[:rows, :rows], atol=1e-5)


def test_simplex_in_one_dimension_is_gaussian():
    key = jax.random.key(1)
    np.testing.assert_array_equal(
        projections.simplex(key, 7, 1), projections.gaussian(key, 7, 1)
    )


@pytest.mark.parametrize("num", [1, 2, 6, 7])
def test_antithetic_pairs(num):
    omega = np.asarray(projections.antithetic(jax.random.key(1), num, 3))
    half = (num + 1) // 2
    np.testing.assert_array_equal(omega[1::2], -omega[::2][: num // 2])
    assert len(np.unique(np.abs(omega[:, 0]))) == half


def test_antithetic_halves_are_independent():
    omega = many("antithetic", 6, 4)[:, ::2]
    inner = np.einsum("ki,ki->k", omega[:, 0], omega[:, 1])
    assert abs(inner.mean()) < 5 * 2 / len(omega) ** 0.5
    assert abs(inner.var() - 4) < 0.6


@pytest.mark.parametrize("num", [1, 50, 64])
def test_sobol_is_scipy_but_for_the_shift(num):
    key = jax.random.key(1)
    omega = np.asarray(projections.sobol(key, num, 30), np.float64)
    # Points of the first 2^6 have 6 bits: the bits below are those of the shift.
    cells = (scipy.stats.norm.cdf(omega) * 2**10).astype(int)
    shift = projections.random_bits(projections.key_words(key), 15).ravel() >> 22
    points = scipy.stats.qmc.Sobol(30, scramble=False).random_base2(6)[:num]
    np.testing.assert_array_equal(cells ^ np.asarray(shift, int), points * 2**10)


def test_sobol_integrates_better_than_independent_rows():
    def error(name):
        waves = np.cos(many(name, 200, 4, 256) @ np.array([0.5, -0.5, 0.25, 0.5]))
        return np.sqrt(np.mean((waves.mean(axis=1) - np.exp(-0.8125 / 2)) ** 2))

    assert error("sobol") < 0.25 * error("gaussian")


def test_sobol_is_finite_at_the_ends(monkeypatch):
    for word in (0, MASK):
        bits = functools.partial(jnp.full, fill_value=word, dtype=jnp.uint32)
        monkeypatch.setattr(
            projections, "random_bits", lambda _, count, bits=bits: bits((2, count))
        )
        with jax.disable_jit():
            end = float(projections.sobol(jax.random.key(0), 1, 1)[0, 0])
        expected = scipy.stats.norm.ppf(2.0**-24) * (-1 if word else 1)
        assert end == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("num", "dim"), [(5, 16), (64, 32)])
def test_hadamard_blocks_are_orthogonal(num, dim):
    omega = np.asarray(projections.hadamard(jax.random.key(1), num, dim), np.float64)
    unit = omega / np.linalg.norm(omega, axis=1, keepdims=True)
    for start in range(0, num, dim):
        block = unit[start : start + dim]
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), atol=1e-5)


def test_hadamard_lengths_are_chi():
    # Of the whole row of p = 8, whatever part of it the inputs meet.
    make = jax.vmap(lambda key: projections.params("hadamard", key, 2, 5))
    lengths = make(jax.random.split(jax.random.key(0), 4096))["lengths"]
    for row in np.asarray(lengths, np.float64).T * 8**1.5:
        assert scipy.stats.kstest(row, scipy.stats.chi(8).cdf).pvalue > 1e-3 / 2


def test_hadamard_is_nearly_gaussian_in_wide_spaces_only():
    def bias(dim, v):
        waves = np.cos(many("hadamard", dim, dim) @ np.resize(v, dim)).mean(axis=1)
        return waves.mean() - np.exp(-np.sum(np.square(v)) / 2)

    sparse = [2**0.5, 2**0.5] + [0] * 14  # norm 2; measured 0.0013 for d = 16
    assert abs(bias(16, sparse)) < 0.013
    assert bias(4, sparse[:4]) > 0.08  # measured 0.096: rows of four are not Gaussian


def test_rademacher_entries_are_independent_signs():
    omega = many("rademacher", 3, 4)
    assert set(np.unique(omega)) == {-1, 1}
    flat = omega.reshape(len(omega), -1)
    error = 5 / len(omega) ** 0.5
    assert np.abs(flat.T @ flat / len(omega) - np.eye(12)).max() < error
    # The fourth moments of independent signs, which the quadratic kernel sees.
    x, w = np.array([1, 2, -1, 0.5]), np.array([0.5, 1, 1, -1])
    squares = (omega[:, 0] @ x) ** 2 * (omega[:, 0] @ w) ** 2
    expected = x @ x * (w @ w) + 2 * (x @ w) ** 2 - 2 * np.sum(x**2 * w**2)
    assert abs(squares.mean() - expected) < error * squares.std()


# What feature maps store.


@pytest.mark.parametrize("name", projections.names())
@pytest.mark.parametrize(("num", "dim"), [(1, 1), (20, 12)])
def test_apply_multiplies_by_the_drawn_matrix(name, num, dim):
    key = jax.random.key(2)
    params = projections.params(name, key, num, dim)
    omega = projections.draw(name, key, num, dim)
    np.testing.assert_allclose(projections.matrix(params), omega, rtol=1e-6, atol=1e-6)
    for lead in [(), (2, 3), (0, 2)]:
        x = jax.random.normal(jax.random.key(3), (*lead, dim))
        z = projections.apply(params, x)
        assert z.shape == (*lead, num)
        np.testing.assert_allclose(z, np.asarray(x) @ omega.T, atol=1e-4)


@pytest.mark.parametrize(("num", "dim"), [(3, 1), (5, 3), (16, 16), (20, 16), (90, 48)])
def test_hadamard_is_the_product_of_its_factors(num, dim):
    params = projections.params("hadamard", jax.random.key(2), num, dim)
    inputs, signs, lengths = (
        np.asarray(params[name], np.float64)
        for name in ("input_signs", "signs", "lengths")
    )
    h = scipy.linalg.hadamard(signs.shape[2])
    blocks = [
        h @ np.diag(d3) @ h @ np.diag(d2) @ h[:, :dim] @ np.diag(d1)
        for d1, (d2, d3) in zip(inputs, signs, strict=True)
    ]
    expected = lengths[:, None] * np.concatenate(blocks)[:num]
    np.testing.assert_allclose(projections.matrix(params), expected, rtol=1e-5)


DTYPES = ("bfloat16", "float32", "float64")


@pytest.mark.parametrize("name", projections.names())
@pytest.mark.parametrize("stored", slow_but(("float32",), DTYPES))
@pytest.mark.parametrize("given", DTYPES)
def test_apply_accumulates_in_float32_or_better(name, stored, given):
    with jax.enable_x64(True):
        params = projections.params(name, jax.random.key(2), 40, 24, jnp.dtype(stored))
        assert {value.dtype for value in params.values()} == {jnp.dtype(stored)}
        omega = projections.matrix(params)
        assert omega.dtype == jnp.dtype(stored)
        x = jax.random.normal(jax.random.key(3), (5, 24), jnp.dtype(given))
        z = projections.apply(params, x)
        assert z.dtype == jnp.dtype("float64" if given == "float64" else "float32")
        if name == "hadamard":  # its matrix is rounded once more, its product is not
            wide = {key: value.astype("float64") for key, value in params.items()}
            omega = projections.matrix(wide)
        else:
            omega = omega.astype(given)
        expected = np.asarray(x, np.float64) @ np.asarray(omega, np.float64).T
        atol = 1e-12 if given == "float64" else 1e-5
        np.testing.assert_allclose(z, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", projections.names())
def test_jit_and_vmap_change_nothing(name):
    x = jax.random.normal(jax.random.key(3), (5, 6))

    def project(key, x):
        return projections.apply(projections.params(name, key, 10, 6), x)

    keys = jax.random.split(jax.random.key(4), 3)
    eager = np.stack([project(key, x) for key in keys])
    np.testing.assert_allclose(jax.jit(project)(keys[0], x), eager[0], atol=1e-5)
    mapped = jax.jit(jax.vmap(project, (0, None)))(keys, x)
    np.testing.assert_allclose(mapped, eager, atol=1e-5)
    rows = jax.vmap(project, (None, 0))(keys[0], x)
    np.testing.assert_allclose(rows, eager[0], atol=1e-5)


def test_hadamard_never_makes_the_matrix():
    n = 1024
    size = {}
    for name in ("gaussian", "hadamard"):
        params = projections.params(name, jax.random.key(0), n, n)
        compiled = jax.jit(projections.apply).lower(params, jnp.ones((1, n))).compile()
        memory = compiled.memory_analysis()
        size[name] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert size["gaussian"] >= 4 * n * n
    assert size["hadamard"] < 4 * n * n / 20


# The Walsh-Hadamard transform.


@pytest.mark.parametrize("n", [2**k for k in range(9)])
def test_walsh_hadamard_is_scipys(n):
    h = scipy.linalg.hadamard(n)
    np.testing.assert_array_equal(projections.walsh_hadamard(jnp.eye(n)), h)


@pytest.mark.parametrize("n", [4096, 8192])
def test_walsh_hadamard_of_long_inputs(n):
    at = [0, 1, 100, n - 1]
    parity = [[(i & j).bit_count() % 2 for j in range(n)] for i in at]
    basis = jnp.zeros((4, n)).at[jnp.arange(4), jnp.array(at)].set(1)
    np.testing.assert_array_equal(
        projections.walsh_hadamard(basis), 1 - 2 * np.array(parity)
    )


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_walsh_hadamard_of_any_rank_and_dtype(lead, dtype):
    with jax.enable_x64(True):
        x = jax.random.randint(jax.random.key(0), (*lead, 128), 0, 200)
        y = projections.walsh_hadamard(x.astype(dtype))
        # Exact until the last rounding: partial sums need more than bfloat16's bits.
        expected = jnp.asarray(np.asarray(x) @ scipy.linalg.hadamard(128)).astype(dtype)
        assert y.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(y, expected)


def test_walsh_hadamard_is_its_own_inverse_transpose_and_gradient():
    x, c = jax.random.normal(jax.random.key(0), (2, 5, 128))
    twice = projections.walsh_hadamard(projections.walsh_hadamard(x))
    np.testing.assert_allclose(twice, 128 * x, atol=1e-3)
    gradient = jax.grad(lambda x: jnp.vdot(projections.walsh_hadamard(x), c))(x)
    np.testing.assert_allclose(gradient, projections.walsh_hadamard(c), atol=1e-4)


# Errors.


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    key = jax.random.key(0)
    for name in projections.names():
        for num, dim in [(0, 3), (3, 0), (-1, 3)]:
            with pytest.raises(
                ValueError, match=f"must be at least 1. Got {num} and {dim}"
            ):
                projections.draw(name, key, num, dim)
    words = "projection must be one of gaussian, orthogonal, .*. Got 'sobel'"
    with pytest.raises(ValueError, match=words):
        projections.draw("sobel", key, 2, 2)
    with pytest.raises(ValueError, match=words):
        projections.params("sobel", key, 2, 2)
    with pytest.raises(ValueError, match=words):
        projections.check_name("sobel")
    with pytest.raises(ValueError, match="dim must be at most 21201. Got 21202."):
        projections.draw("sobol", key, 2, 21202)


@pytest.mark.parametrize("name", projections.names())
@pytest.mark.usefixtures("unchecked")
def test_wrong_inputs_are_refused(name):
    params = projections.params(name, jax.random.key(0), 5, 6)
    for shape in [(6, 5), (2, 8), (6, 1), ()]:
        words = f"inputs must have width 6. Got shape {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=words):
            projections.apply(params, jnp.ones(shape))
    for dtype in ("int32", "complex64", "bool"):
        with pytest.raises(ValueError, match=f"real floating point. Got {dtype}."):
            projections.apply(params, jnp.ones((2, 6), dtype))


@pytest.mark.usefixtures("unchecked")
def test_walsh_hadamard_refuses_other_inputs():
    for shape in [(), (0,), (8, 3), (2, 12)]:
        words = f"a power of two as width. Got shape {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=words):
            projections.walsh_hadamard(jnp.ones(shape))
    for dtype in ("int32", "complex64"):
        with pytest.raises(ValueError, match=f"real floating point. Got {dtype}."):
            projections.walsh_hadamard(jnp.ones(4, dtype))
