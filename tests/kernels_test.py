import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
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


@pytest.mark.parametrize("order", [0, 1, 2, 3])
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
    atol = [3e-4, 2e-6, 2e-6, 1e-5][order]
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_arc_cosine_at_random(order):
    x, kernel = normal(7, 5), normal(5, 4, seed=1)
    expected = registry.arc_cosine(x, kernel, order)
    value = kernels.arc_cosine(
        jnp.asarray(x, "float32"), jnp.asarray(kernel, "float32"), order
    )
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_arc_cosine_at_known_angles():
    x, y = np.array([[2.0, 0.0]], "float32"), np.array([[0.0], [3.0]], "float32")
    for order, right_angle in [(0, 0.5), (1, 6 / np.pi), (2, 18), (3, 864 / np.pi)]:
        value = float(kernels.arc_cosine(jnp.asarray(x), jnp.asarray(y), order)[0, 0])
        assert value == pytest.approx(right_angle, rel=1e-5)
        same = float(kernels.arc_cosine(jnp.asarray(x), jnp.asarray(x.T), order)[0, 0])
        assert same == pytest.approx([1, 4, 3 * 16, 15 * 64][order], rel=1e-3)
        opposite = kernels.arc_cosine(jnp.asarray(x), jnp.asarray(-x.T), order)
        assert float(opposite[0, 0]) == pytest.approx(0, abs=1e-3)


def leaky(x, kernel, slope):
    """The kernel of the leaky ReLU by quadrature in the plane of x and w."""

    def rectify(z):
        return np.maximum(z, 0) + slope * np.minimum(z, 0)

    def angular(angle):
        # In pieces between the kinks, on which the integrand is smooth.
        kinks = np.sort(np.mod([0.5, 1.5, 0.5 + angle / np.pi, 1.5 + angle / np.pi], 2))
        edges = np.pi * np.concatenate([[0], kinks, [2]])
        return sum(
            scipy.integrate.quad(
                lambda t: rectify(np.cos(t)) * rectify(np.cos(t - angle)), lo, hi
            )[0]
            for lo, hi in itertools.pairwise(edges)
        )

    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
    angle = np.arccos(np.clip(x @ kernel / norms, -1, 1))
    return 2 / np.pi * norms * np.vectorize(angular)(angle)


@pytest.mark.parametrize("slope", [0.2, -1.0, 3.0])
def test_leaky_arc_cosine_is_the_integral(slope):
    x, kernel = normal(7, 5), normal(5, 4, seed=1)
    for pair in [(x, kernel), at_angles()]:
        single = (jnp.asarray(a, "float32") for a in pair)
        value = kernels.arc_cosine(*single, negative_slope=slope)
        expected = leaky(*pair, slope)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=2e-5)


def test_leaky_arc_cosine_of_slopes_0_and_1():
    x, kernel = jnp.asarray(normal(7, 5)), jnp.asarray(normal(5, 4, seed=1))
    np.testing.assert_array_equal(
        kernels.arc_cosine(x, kernel, negative_slope=0.0),
        kernels.arc_cosine(x, kernel),
    )
    linear = kernels.arc_cosine(x, kernel, negative_slope=1.0)
    np.testing.assert_allclose(linear, 2 * x @ kernel, rtol=1e-6)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_arc_cosine_of_zero_is_zero(order):
    zero, x = jnp.zeros((2, 3)), jnp.ones((2, 3))
    for a, b in [(zero, x.T), (x, zero.T), (zero, zero.T)]:
        np.testing.assert_array_equal(kernels.arc_cosine(a, b, order), 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
def test_polynomial_and_exponential_are_their_functions(dtype, with_bias, batch):
    coefficients = (0.5, 0.0, -1.0, 0.25)
    with jax.enable_x64(dtype == "float64"):
        x, kernel = (
            jnp.asarray(0.5 * a, dtype)
            for a in (normal(*batch, 4), normal(4, 3, seed=1))
        )
        bias = jnp.asarray(normal(3, seed=2), dtype) if with_bias else None
        z = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
        if with_bias:
            z = z + np.asarray(bias, np.float64)
        for y, expected in [
            (
                kernels.polynomial(coefficients, x, kernel, bias),
                np.polyval(coefficients[::-1], z),
            ),
            (kernels.exponential(x, kernel, bias), np.exp(z)),
        ]:
            assert y.dtype == x.dtype
            assert y.shape == (*batch, 3)
            error = np.abs(np.asarray(y, np.float64) - expected)
            # Rounding of z counts with its own size and the slope there.
            limits = tolerance(dtype)
            slope = 1 + np.exp(np.abs(z)) + z**2
            assert np.all(error <= limits["atol"] + limits["rtol"] * slope)


def test_polynomial_of_one_coefficient_is_constant():
    value = kernels.polynomial((np.float64(2.5),), jnp.ones((2, 4)), jnp.ones((4, 3)))
    np.testing.assert_array_equal(value, np.full((2, 3), 2.5))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("at", ["angles", "zero_input", "zero_kernel"])
def test_arc_cosine_gradients_are_finite(order, at):
    x, kernel = (jnp.asarray(a, "float32") for a in at_angles())
    x = jnp.zeros_like(x) if at == "zero_input" else x
    kernel = jnp.zeros_like(kernel) if at == "zero_kernel" else kernel

    def total(x, kernel):
        return jnp.sum(kernels.arc_cosine(x, kernel, order))

    for grad in jax.grad(total, argnums=(0, 1))(x, kernel):
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_arc_cosine_gradient_of_parallel_vectors(order):
    # K_n(x, x) is |x|^2, 3 |x|^4 and 15 |x|^6, as a function of both arguments.
    x = jnp.array([0.3, -0.4, 1.2])

    def norm(x):
        return kernels.arc_cosine(x, x[:, None], order)[0]

    square = float(jnp.sum(x * x))
    expected = [2, 12 * square, 90 * square**2][order - 1] * x
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
    for order in (-1, 4):
        with pytest.raises(
            ValueError, match=f"order must be 0, 1, 2 or 3. Got {order}"
        ):
            kernels.arc_cosine(x, kernel, order=order)
    with pytest.raises(
        ValueError, match="negative_slope must be 0 for order 2. Got 0.1"
    ):
        kernels.arc_cosine(x, kernel, 2, 0.1)
    for slope in (np.inf, np.nan):
        with pytest.raises(ValueError, match="negative_slope must be finite. Got"):
            kernels.arc_cosine(x, kernel, negative_slope=slope)
    with pytest.raises(ValueError, match="coefficients must be at least one number"):
        kernels.polynomial((), x, kernel)
    for kernel_of in (kernels.exponential, functools.partial(kernels.polynomial, (1,))):
        with pytest.raises(ValueError, match=r"same d. Got \(2, 4\) and \(3, 4\)"):
            kernel_of(x, kernel.T)
        with pytest.raises(
            ValueError, match=r"bias must have shape \(3,\). Got \(1,\)"
        ):
            kernel_of(x, kernel, jnp.ones(1))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_narrow_kernels_round_once(order):
    x, kernel = (
        jnp.asarray(a, jnp.bfloat16) for a in (normal(6, 64), normal(64, 5, seed=1))
    )
    wide = [a.astype(jnp.float32) for a in (x, kernel)]
    for exact in (
        functools.partial(kernels.arc_cosine, order=order),
        functools.partial(kernels.ffl, "tanh"),
        kernels.exponential,
        functools.partial(kernels.polynomial, (0.5, -1.0, 0.3)),
    ):
        found = exact(x, kernel / 8)
        expected = exact(wide[0], wide[1] / 8).astype(jnp.bfloat16)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("unchecked")
def test_whole_numbers_are_computed_as_floats():
    x, kernel = jnp.array([[3]]), jnp.array([[1]])
    np.testing.assert_allclose(kernels.polynomial((0.0, 0.5), x, kernel), [[1.5]])
    np.testing.assert_allclose(kernels.ffl("tanh", x, kernel), np.tanh([[3.0]]))


@pytest.mark.usefixtures("unchecked")
def test_float64_of_numpy_is_taken_without_x64():
    x, kernel = normal(5, 4), normal(4, 3, seed=1)
    for exact in (functools.partial(kernels.ffl, "tanh"), kernels.arc_cosine):
        assert exact(x, kernel).dtype == jnp.float32
