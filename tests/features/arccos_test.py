import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.features import ArcCosine

WIDTH = 8


def make(order, num_features=64):
    features = ArcCosine(order=order, num_features=num_features)
    return features, features.init(jax.random.key(0), WIDTH)


def make_inputs(num=5, seed=1):
    return jax.random.normal(jax.random.key(seed), (num, WIDTH))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_phi_matches_its_formula(order):
    features, params = make(order)
    x = make_inputs()
    z = np.asarray(x, np.float64) @ np.asarray(params["omega"], np.float64).T
    expected = np.sqrt(2 / 64) * np.where(z > 0, z**order, 0)
    np.testing.assert_allclose(features.phi(params, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(features.psi(params, x.T), features.phi(params, x).T)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_homogeneous(order):
    features, params = make(order)
    x = make_inputs()
    np.testing.assert_allclose(
        features.phi(params, 4 * x), 4**order * features.phi(params, x), rtol=1e-6
    )


@pytest.mark.parametrize("order", [0, 1, 2])
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
    for order in (-1, 3):
        with pytest.raises(ValueError, match=f"order must be 0, 1 or 2. Got {order}"):
            ArcCosine(order=order, num_features=4)
    features, params = make(1)
    x = make_inputs()
    with pytest.raises(ValueError, match="no bias term.*Append 1"):
        features.psi(params, x.T, jnp.zeros(5))
    with pytest.raises(ValueError, match="no bias term"):
        features.exact(x, x.T, jnp.zeros(5))
    with pytest.raises(ValueError, match="no bias term"):
        snnk.snnk_dense(features, params, x, x.T, jnp.zeros(5))
