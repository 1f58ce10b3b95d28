import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.features import Exponential

WIDTH = 8


def unit(num, width, seed=0):
    x = np.random.default_rng(seed).normal(size=(num, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def layer(kappa, width=WIDTH):
    """Inputs and weights with the same norm, their product kappa."""
    x, kernel = unit(8, width), unit(8, width, seed=1).T
    return (jnp.asarray(a * kappa**0.5, "float32") for a in (x, kernel))


def errors(features, x, kernel, keys):
    """Mean squared error over keys, and its standard error."""
    exact = np.exp(np.asarray(x, np.float64) @ np.asarray(kernel, np.float64))

    def one(key):
        params = features.init(key, x.shape[1])
        return snnk.snnk_dense(features, params, x, kernel)

    drawn = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), keys))
    error = np.mean((np.asarray(drawn, np.float64) - exact) ** 2, axis=(1, 2))
    return error.mean(), error.std() / keys**0.5


def log_second_moment(shape, kappa, dim):
    """Log of m E Z^2 for uncorrelated x and w at the best scale: |cx + w/c|^2 = 2 k."""
    growth = 2 * (1 - 4 * shape) / (1 - 8 * shape)
    factor = np.log(1 - 4 * shape) - np.log(1 - 8 * shape) / 2
    return dim * factor + 2 * growth * kappa - 2 * kappa


@pytest.mark.parametrize("shape", [0.0, -0.05])
@pytest.mark.parametrize("projection", ["gaussian", "orthogonal", "sobol"])
def test_features_and_readout_are_positive(shape, projection):
    features = Exponential(num_features=33, shape=shape, projection=projection)
    params = features.init(jax.random.key(0), WIDTH)
    x, kernel = layer(4.0)
    bias = jnp.linspace(-3, 3, 8)
    phi, psi = features.phi(params, x), features.psi(params, kernel, bias)
    assert (phi > 0).all()
    assert (psi > 0).all()
    assert phi.shape == (8, 33)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_exact_degree_gives_positivity_up(degree):
    features = Exponential(num_features=128, exact_degree=degree)
    params = features.init(jax.random.key(0), WIDTH)
    x, _ = layer(1.0)
    assert (features.phi(params, x) < 0).any()


@pytest.mark.parametrize("dim", [4, 64, 768])
@pytest.mark.parametrize("ratio", [1e-3, 0.1, 0.25, 1.0, 10.0])
def test_best_shape_is_the_minimum_of_the_second_moment(dim, ratio):
    kappa = ratio * dim
    best = Exponential.best_shape(kappa, dim)
    shapes = -np.logspace(-7, 2, 200001)
    moments = log_second_moment(shapes, kappa, dim)
    assert best == pytest.approx(shapes[np.argmin(moments)], rel=2e-3, abs=1e-7)
    assert log_second_moment(best, kappa, dim) <= moments.min() + 1e-9 * dim
    assert log_second_moment(best, kappa, dim) < log_second_moment(0.0, kappa, dim)


def test_best_shape_lowers_the_variance():
    # At right angles the mean is 1 and the second moments are the formula's.
    dim, kappa, num_features = 8, 2.0, 512
    x, kernel = jnp.eye(dim)[:4] * kappa**0.5, jnp.eye(dim)[:, 4:] * kappa**0.5
    measured = []
    for shape in (0.0, Exponential.best_shape(kappa, dim)):
        features = Exponential(
            num_features=num_features, shape=shape, scale=1.0, projection="gaussian"
        )
        error, deviation = errors(features, x, kernel, keys=4096)
        expected = np.expm1(log_second_moment(shape, kappa, dim)) / num_features
        assert deviation < 0.1 * expected
        assert abs(error - expected) < 5 * deviation
        measured.append(error)
    assert measured[1] < 0.75 * measured[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [0.0, -0.05])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0, 1e3])
def test_never_infinite(dtype, shape, norm):
    dim = 4096
    features = Exponential(num_features=64, shape=shape)
    params = features.init(jax.random.key(0), dim, jnp.dtype(dtype))
    x = jnp.asarray(unit(4, dim) * norm, dtype)
    kernel = jnp.asarray(unit(4, dim, seed=1).T * norm, dtype)
    bias = jnp.asarray([0.0, 1.0, -50.0, 200.0], dtype)
    phi = np.asarray(features.phi(params, x), np.float64)
    psi = np.asarray(features.psi(params, kernel, bias), np.float64)
    assert not np.isinf(phi).any()
    assert not np.isinf(psi).any()
    # Positive towers fall with the norm: phi is finite at any norm.
    assert np.isfinite(phi).all()
    assert np.isfinite(psi[:, :3]).all()
    if norm <= 1:
        assert (phi > 0).all()
        assert np.isnan(psi[:, 3]).all()  # exp(200)


def test_exponents_are_added_before_the_exponential():
    # exp(130) leaves float32, exp(130 - 50) does not.
    features = Exponential(num_features=2, scale=1.0)
    params = {"omega": jnp.full((2, 4), 6.5), "scale": jnp.ones(())}
    x = jnp.full((1, 4), 5.0)
    phi = features.phi(params, x)
    np.testing.assert_allclose(phi, np.exp(80) / 2**0.5, rtol=1e-4)
    psi = features.psi(params, x.T)
    np.testing.assert_allclose(psi, np.exp(80) / 2**0.5, rtol=1e-4)


@pytest.mark.parametrize("degree", [None, 0, 1, 2])
def test_bias_multiplies(degree):
    features = Exponential(num_features=64, exact_degree=degree)
    params = features.init(jax.random.key(0), WIDTH)
    _, kernel = layer(1.0)
    bias = jnp.linspace(-4, 3, 8)
    psi = features.psi(params, kernel)
    np.testing.assert_allclose(
        features.psi(params, kernel, bias), psi * jnp.exp(bias)[None, :], rtol=1e-5
    )


@pytest.mark.parametrize("shape", [0.0, -0.07])
def test_columns_match_their_formula(shape):
    features = Exponential(num_features=6, shape=shape, scale=0.8)
    params = features.init(jax.random.key(0), WIDTH)
    x, kernel = layer(1.5)
    g, x64, w64 = (np.asarray(a, np.float64) for a in (params["omega"], x, kernel))
    t, u = 0.8 * x64, w64.T / 0.8
    stretch = np.sqrt(1 - 4 * shape)

    def tower(z):
        return np.exp(stretch * z @ g.T - np.sum(z**2, axis=1)[:, None] / 2)

    gaussian = np.exp(2 * shape * np.sum(g**2, axis=1)) * stretch**WIDTH
    np.testing.assert_allclose(
        features.phi(params, x), tower(t) / np.sqrt(6), rtol=2e-5
    )
    np.testing.assert_allclose(
        features.psi(params, kernel).T, gaussian * tower(u) / np.sqrt(6), rtol=2e-5
    )


def test_large_factors_of_the_shape_stay_finite():
    # (1 - 4A)^(d/2) is 1e299 at d = 4096 and A = -.1; it stands in the exponent.
    features = Exponential(num_features=64, shape=-0.1)
    params = features.init(jax.random.key(0), 4096)
    kernel = jnp.asarray(unit(4, 4096).T, jnp.float32)
    psi = np.asarray(features.psi(params, kernel), np.float64)
    assert np.isfinite(psi).all()


def test_bfloat16_is_close_to_float32():
    features = Exponential(num_features=64)
    params = features.init(jax.random.key(0), 64)
    x, kernel = layer(1.0, width=64)
    wide = snnk.snnk_dense(features, params, x, kernel)
    short = snnk.snnk_dense(
        features, params, x.astype("bfloat16"), kernel.astype("bfloat16")
    )
    np.testing.assert_allclose(
        np.asarray(short, np.float64), np.asarray(wide, np.float64), rtol=0.05
    )


@pytest.mark.usefixtures("unchecked")
def test_wrong_fields_are_refused():
    with pytest.raises(ValueError, match="shape must be at most 0 and finite. Got 0.1"):
        Exponential(num_features=4, shape=0.1)
    with pytest.raises(ValueError, match="projection must have Gaussian rows"):
        Exponential(num_features=4, projection="rademacher")
    for degree in (-1, 3):
        with pytest.raises(ValueError, match="exact_degree must be None, 0, 1 or 2"):
            Exponential(num_features=4, exact_degree=degree)
    with pytest.raises(ValueError, match="kappa must be positive and finite. Got 0"):
        Exponential(num_features=4, kappa=0.0)
