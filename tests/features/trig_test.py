"""Cosine and sine together: as exact as XLA's, derivatives included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snnk_jax.features._trig import _polynomials, cos_sin


def exact(z):
    z = np.asarray(z, np.float64)
    return np.cos(z), np.sin(z)


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_values_up_to_ten_thousand(size):
    z = jnp.linspace(-size, size, 200_001)
    for ours, true in zip(jax.jit(cos_sin)(z), exact(z), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, true, atol=1.3e-7)


def test_beyond_the_error_is_that_of_rounding_the_argument():
    z = jnp.asarray(np.random.default_rng(0).uniform(1e4, 1e6, 10_000), jnp.float32)
    for ours, true in zip(_polynomials(z), exact(z), strict=True):
        assert np.all(np.abs(ours - true) < np.spacing(np.asarray(z)))
    cosine, sine = _polynomials(jnp.array([1e8, -3e12, 3e38]))
    assert np.abs([cosine, sine]).max() <= 1


def test_infinite_arguments_have_no_value():
    cosine, sine = cos_sin(jnp.array([jnp.inf, -jnp.inf, jnp.nan]))
    assert np.isnan([cosine, sine]).all()


def test_derivatives_are_the_other_function():
    z = jnp.linspace(-9, 9, 1001)
    _, (d_cos, d_sin) = jax.jvp(cos_sin, (z,), (jnp.ones_like(z),))
    cosine, sine = exact(z)
    np.testing.assert_allclose(d_cos, -sine, atol=1.3e-7)
    np.testing.assert_allclose(d_sin, cosine, atol=1.3e-7)
    second = jax.vmap(jax.grad(jax.grad(lambda z: cos_sin(z)[1])))(z)
    np.testing.assert_allclose(second, -sine, atol=1.3e-7)


def test_eager_jit_and_vmap_agree():
    z = jnp.linspace(-20, 20, 64).reshape(8, 8)
    eager = cos_sin(z)
    for other in (jax.jit(cos_sin)(z), jax.vmap(cos_sin)(z)):
        np.testing.assert_allclose(eager, other, atol=1.3e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_dtypes_are_rounded_once(dtype):
    z = jnp.linspace(-10, 10, 500).astype(dtype)
    for ours, true in zip(cos_sin(z), exact(z), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            ours.astype(jnp.float32), true, atol=float(jnp.finfo(dtype).eps)
        )


def test_float64_has_its_digits():
    with jax.enable_x64(True):
        z = jnp.linspace(-50, 50, 1001)
        assert z.dtype == jnp.float64
        for ours, true in zip(cos_sin(z), exact(z), strict=True):
            np.testing.assert_allclose(ours, true, atol=1e-15)
