import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from snnk_jax import projections
from tests.projections_golden import PATH, make_golden

MASK = 0xFFFFFFFF


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


def test_bits_are_those_of_the_golden_file():
    golden = json.loads(PATH.read_text())
    made = make_golden()
    assert made["generator"] == golden["generator"]
    for new, old in zip(made["entries"], golden["entries"], strict=True):
        assert new["words"] == old["words"]
        assert new["bits"] == old["bits"]


@pytest.mark.parametrize("name", ["normals", "gaussian", "orthogonal"])
def test_floats_are_those_of_the_golden_file(name):
    golden = json.loads(PATH.read_text())
    for new, old in zip(make_golden()["entries"], golden["entries"], strict=True):
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
    ("num", "dim"), [(1, 1), (4, 1), (1, 4), (3, 4), (4, 4), (5, 4), (13, 4)]
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
@pytest.mark.parametrize(("num", "dim"), [(6, 4), (3, 4)])
def test_rows_are_standard_normal_vectors(name, num, dim):
    omega = many(name, num, dim)
    keys = len(omega)
    assert np.all(np.abs(omega.mean(axis=0)) < 5 / keys**0.5)
    second = np.einsum("kni,knj->nij", omega, omega) / keys
    deviation = np.where(np.eye(dim), 2, 1) ** 0.5 / keys**0.5
    assert np.all(np.abs(second - np.eye(dim)) < 5 * deviation)
    least = 1e-3 / (2 * num)  # a p-value per law and row: Bonferroni's bound
    for row in range(num):
        lengths = np.linalg.norm(omega[:, row], axis=1)
        assert scipy.stats.kstest(lengths, scipy.stats.chi(dim).cdf).pvalue > least
        assert scipy.stats.kstest(omega[:, row, 0], "norm").pvalue > least


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


def test_orthogonal_lengths_are_independent_of_directions_and_each_other():
    omega = many("orthogonal", 3, 4)
    lengths = np.linalg.norm(omega, axis=2)
    unit = omega / lengths[..., None]
    features = np.concatenate([unit, unit**2], axis=2).reshape(len(unit), -1)
    centred = (lengths - lengths.mean(0)) / lengths.std(0)
    features = (features - features.mean(0)) / features.std(0)
    bound = 5 / len(unit) ** 0.5
    assert np.abs(centred.T @ features / len(unit)).max() < bound
    correlation = centred.T @ centred / len(unit)
    assert np.abs(correlation - np.eye(3)).max() < bound


def test_orthogonal_blocks_are_independent():
    omega = many("orthogonal", 8, 4)
    unit = omega / np.linalg.norm(omega, axis=2, keepdims=True)
    first, second = unit[:, :4], unit[:, 4:]
    inner = np.einsum("kni,kmi->knm", first, second)
    # Independent unit vectors: E u.v = 0 and E (u.v)^2 = 1 / d; within a block both 0.
    assert np.all(np.abs(inner.mean(axis=0)) < 5 * 0.5 / len(unit) ** 0.5)
    assert np.all(np.abs(np.mean(inner**2, axis=0) - 0.25) < 0.02)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    key = jax.random.key(0)
    for name in projections.names():
        for num, dim in [(0, 3), (3, 0), (-1, 3)]:
            with pytest.raises(
                ValueError, match=f"must be at least 1. Got {num} and {dim}"
            ):
                projections.draw(name, key, num, dim)
    words = "projection must be one of gaussian, orthogonal. Got 'sobel'"
    with pytest.raises(ValueError, match=words):
        projections.draw("sobel", key, 2, 2)
    with pytest.raises(ValueError, match=words):
        projections.check_name("sobel")
