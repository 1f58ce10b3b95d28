import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.features import ArcCosine
from tests.features import registry

WIDTH = 8


def make(order, num_features=64, **fields):
    features = ArcCosine(order=order, num_features=num_features, **fields)
    return features, features.init(jax.random.key(0), WIDTH)


def make_inputs(num=5, seed=1):
    return jax.random.normal(jax.random.key(seed), (num, WIDTH))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_phi_matches_its_formula(order):
    features, params = make(order)
    x = make_inputs()
    z = np.asarray(x, np.float64) @ np.asarray(params["omega"], np.float64).T
    expected = np.sqrt(2 / 64) * np.where(z > 0, z**order, 0)
    np.testing.assert_allclose(features.phi(params, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(features.psi(params, x.T), features.phi(params, x).T)


@pytest.mark.parametrize("slope", [0.2, -1.0, 1.0])
def test_leaky_phi_matches_its_formula(slope):
    features, params = make(1, negative_slope=slope)
    x = make_inputs()
    z = np.asarray(x, np.float64) @ np.asarray(params["omega"], np.float64).T
    expected = np.sqrt(2 / 64) * np.where(z > 0, z, slope * z)
    np.testing.assert_allclose(features.phi(params, x), expected, rtol=1e-5, atol=1e-5)
    kernel = make_inputs(3, seed=2).T
    np.testing.assert_array_equal(
        features.exact(x, kernel), snnk.kernels.arc_cosine(x, kernel, 1, slope)
    )


def leaky_second_moment(x, kernel, slope):
    """Of one direction: of 2 s(g.x) s(g.w), by the moment 8 of the squared radius."""

    def rectify(z):
        return np.maximum(z, 0) + slope * np.minimum(z, 0)

    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
    angle = np.arccos(x @ kernel / norms)
    # The mean over a whole turn; the integrand has a continuous derivative.
    t = np.linspace(0, 2 * np.pi, 20000, endpoint=False)
    waves = rectify(np.cos(t)) * rectify(np.cos(t - angle[..., None]))
    return 4 * 8 * norms**2 * np.mean(waves**2, axis=-1)


@pytest.mark.parametrize(("order", "slope"), [(3, 0.0), (1, 0.2), (1, -0.7)])
def test_mean_and_variance(order, slope):
    # Products of sixth powers have heavy tails: many directions for each estimate.
    num_features, keys = 1024, 4096
    features = ArcCosine(
        order=order,
        negative_slope=slope,
        num_features=num_features,
        projection="gaussian",
    )
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3)), rng.normal(size=(3, 2))
    inputs = jnp.asarray(x, "float32"), jnp.asarray(kernel, "float32")

    def one(key):
        return snnk.snnk_dense(features, features.init(key, 3), *inputs)

    values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), keys))
    values = np.asarray(values, np.float64)
    mean = np.asarray(features.exact(*inputs), np.float64)
    if slope:
        second = leaky_second_moment(x, kernel, slope)
    else:
        second = 2 * registry.arc_cosine(x, kernel, 2 * order)
    predicted = (second - mean**2) / num_features
    error = values.mean(axis=0) - mean
    assert np.all(np.abs(error) < 4.5 * np.sqrt(predicted / keys))
    centred = values - values.mean(axis=0)
    variance = np.mean(centred**2, axis=0)
    deviation = np.sqrt((np.mean(centred**4, axis=0) - variance**2) / keys)
    assert np.all(deviation < 0.1 * predicted)
    assert np.all(np.abs(variance - predicted) < 5 * deviation)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_homogeneous(order):
    features, params = make(order)
    x = make_inputs()
    np.testing.assert_allclose(
        features.phi(params, 4 * x), 4**order * features.phi(params, x), rtol=1e-6
    )


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_zero_maps_to_zero(order):
    features, params = make(order)
    np.testing.assert_array_equal(features.phi(params, jnp.zeros(WIDTH)), 0)


def test_deviation_of_orthogonal_unit_vectors():
    # The docstring's 2.98 / sqrt(m): (2 K_2 - K_1^2) / K_1^2 at a right angle.
    x, w = jnp.eye(2)[:1], jnp.eye(2)[:, 1:]
    k1 = float(snnk.kernels.arc_cosine(x, w, 1)[0, 0])
    k2 = float(snnk.kernels.arc_cosine(x, w, 2)[0, 0])
    assert np.sqrt(2 * k2 - k1**2) / k1 == pytest.approx(2.98, abs=5e-3)


def test_order_0_has_zero_gradient():
    features, params = make(0)
    grad = jax.grad(lambda x: jnp.sum(features.phi(params, x)))(make_inputs())
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    for order in (-1, 4):
        with pytest.raises(
            ValueError, match=f"order must be 0, 1, 2 or 3. Got {order}"
        ):
            ArcCosine(order=order, num_features=4)
    with pytest.raises(ValueError, match="negative_slope must be 0 for order 0. Got 1"):
        ArcCosine(order=0, negative_slope=1.0, num_features=4)
    with pytest.raises(ValueError, match="negative_slope must be finite. Got nan"):
        ArcCosine(negative_slope=float("nan"), num_features=4)
    features, params = make(1)
    x = make_inputs()
    with pytest.raises(ValueError, match=r"kernel \[d, o\] with the same d"):
        features.psi(params, x[0])
    with pytest.raises(ValueError, match="no bias term.*Append 1"):
        features.psi(params, x.T, jnp.zeros(5))
    with pytest.raises(ValueError, match="no bias term"):
        features.exact(x, x.T, jnp.zeros(5))
    with pytest.raises(ValueError, match="no bias term"):
        snnk.snnk_dense(features, params, x, x.T, jnp.zeros(5))
