import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import snnk_jax as snnk
from snnk_jax import kernels
from snnk_jax.testing import tolerance
from tests.features import registry

ANGLES = np.array(
    [0, 1e-6, 1e-3, 0.1, 0.7, np.pi / 3, np.pi / 2, 2.0, 3.0, np.pi - 1e-3, np.pi]
)


def at_angles(x_norm=1.3, w_norm=0.6):
    """One input, and weight columns at the angles to it."""
    x = x_norm * np.array([[1.0, 0.0, 0.0]])
    kernel = w_norm * np.stack([np.cos(ANGLES), np.sin(ANGLES), 0 * ANGLES])
    return x, kernel


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
def test_ffl_is_the_layer(dtype, with_bias, batch):
    with jax.enable_x64(dtype == "float64"):
        x, kernel = (
            jnp.asarray(a, dtype) for a in (normal(*batch, 4), normal(4, 3, seed=1))
        )
        bias = jnp.asarray(normal(3, seed=2), dtype) if with_bias else None
        y = kernels.ffl("gelu", x, kernel, bias)
        z = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
        if with_bias:
            z = z + np.asarray(bias, np.float64)
        assert y.dtype == x.dtype
        assert y.shape == (*batch, 3)
        expected = z * scipy.special.ndtr(z)
        error = np.abs(np.asarray(y, np.float64) - expected)
        # Rounding of z counts with its own size, not with that of gelu(z).
        limits = tolerance(dtype)
        assert np.all(error <= limits["atol"] + limits["rtol"] * (1 + np.abs(z)))


def test_ffl_takes_names_rows_and_functions():
    x, kernel = jnp.asarray(normal(5, 4), "float32"), jnp.ones((4, 2))
    by_name = kernels.ffl("tanh", x, kernel)
    np.testing.assert_array_equal(kernels.ffl(jnp.tanh, x, kernel), by_name)
    row = snnk.activations.get("tanh")
    np.testing.assert_array_equal(kernels.ffl(row, x, kernel), by_name)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_arc_cosine_is_the_integral(order):
    x, kernel = at_angles()
    expected = registry.arc_cosine(x, kernel, order)
    with jax.enable_x64(True):
        value = kernels.arc_cosine(jnp.asarray(x), jnp.asarray(kernel), order)
        # Order 0 is pi - angle: near 0 and pi it keeps half of the digits of cos.
        atol = 3e-8 if order == 0 else 1e-13
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=atol)
    single = kernels.arc_cosine(
        jnp.asarray(x, "float32"), jnp.asarray(kernel, "float32"), order
    )
    assert single.dtype == jnp.float32
    atol = 3e-4 if order == 0 else 2e-6
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_arc_cosine_at_random(order):
    x, kernel = normal(7, 5), normal(5, 4, seed=1)
    expected = registry.arc_cosine(x, kernel, order)
    value = kernels.arc_cosine(
        jnp.asarray(x, "float32"), jnp.asarray(kernel, "float32"), order
    )
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_arc_cosine_at_known_angles():
    x, y = np.array([[2.0, 0.0]], "float32"), np.array([[0.0], [3.0]], "float32")
    for order, right_angle in [(0, 0.5), (1, 6 / np.pi), (2, 36 / 2)]:
        value = float(kernels.arc_cosine(jnp.asarray(x), jnp.asarray(y), order)[0, 0])
        assert value == pytest.approx(right_angle, rel=1e-5)
        same = float(kernels.arc_cosine(jnp.asarray(x), jnp.asarray(x.T), order)[0, 0])
        assert same == pytest.approx([1, 4, 3 * 16][order], rel=1e-3)
        opposite = kernels.arc_cosine(jnp.asarray(x), jnp.asarray(-x.T), order)
        assert float(opposite[0, 0]) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_arc_cosine_of_zero_is_zero(order):
    zero, x = jnp.zeros((2, 3)), jnp.ones((2, 3))
    for a, b in [(zero, x.T), (x, zero.T), (zero, zero.T)]:
        np.testing.assert_array_equal(kernels.arc_cosine(a, b, order), 0)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("at", ["angles", "zero_input", "zero_kernel"])
def test_arc_cosine_gradients_are_finite(order, at):
    x, kernel = (jnp.asarray(a, "float32") for a in at_angles())
    x = jnp.zeros_like(x) if at == "zero_input" else x
    kernel = jnp.zeros_like(kernel) if at == "zero_kernel" else kernel

    def total(x, kernel):
        return jnp.sum(kernels.arc_cosine(x, kernel, order))

    for grad in jax.grad(total, argnums=(0, 1))(x, kernel):
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("order", [1, 2])
def test_arc_cosine_gradient_of_parallel_vectors(order):
    # K_1(x, x) = |x|^2 and K_2(x, x) = 3 |x|^4, as a function of both arguments.
    x = jnp.array([0.3, -0.4, 1.2])

    def norm(x):
        return kernels.arc_cosine(x, x[:, None], order)[0]

    square = float(jnp.sum(x * x))
    expected = 2 * x if order == 1 else 12 * square * x
    np.testing.assert_allclose(jax.grad(norm)(x), expected, rtol=1e-2)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    x, kernel = jnp.ones((2, 4)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"same d. Got \(2, 4\) and \(3, 4\)"):
        kernels.ffl("relu", x, kernel.T)
    with pytest.raises(ValueError, match="x must be"):
        kernels.ffl("relu", jnp.ones(()), kernel)
    with pytest.raises(ValueError, match="x must be"):
        kernels.arc_cosine(x, jnp.ones(4))
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\). Got \(1,\)"):
        kernels.ffl("relu", x, kernel, jnp.ones(1))
    with pytest.raises(ValueError, match="Did you mean 'relu'"):
        kernels.ffl("relo", x, kernel)
    with pytest.raises(ValueError, match="order must be 0, 1 or 2. Got 3"):
        kernels.arc_cosine(x, kernel, order=3)
