"""ELU and SELU against quadrature in 30 digits, and their gradients."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import snnk_jax as snnk
from snnk_jax.infinite import _duals, _elu

PATH = pathlib.Path(__file__).parent.parent / "golden" / "infinite_elu.json"
GOLDEN = json.loads(PATH.read_text())
CLOSE = {"float64": 1e-10, "float32": 1e-5}


def pair_at(s, t, rho, dtype):
    """Both as columns; the gap from the correlation in double precision."""
    s, t, rho = (np.asarray(z, np.float64) for z in (s, t, rho))
    values = s * s, rho * s * t, t * t, (1 - rho) * (1 + rho)
    return _duals.Pair(*(jnp.asarray(v, dtype) for v in values))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["elu", pytest.param("selu", marks=pytest.mark.slow)])
def test_duals_to_thirty_digits(name, dtype):
    """Norms from 1e-3 to 1e3, correlations up to 1e-6 from the ends and at them."""
    rows = [row[1:] for row in GOLDEN["pairs"] if row[0] == name]
    s, t, rho, k, kdot, size, size_dot = np.array(rows, float).T
    assert len(rows) == 90
    with jax.enable_x64(dtype == "float64"):
        dual = jax.jit(lambda pair: _duals.dual(snnk.activations.get(name), pair))
        for pair in (pair_at(s, t, rho, dtype), pair_at(t, s, rho, dtype)):
            value = dual(pair)
            assert value.k.dtype == dtype
            close = CLOSE[dtype] / 4
            np.testing.assert_allclose(value.k / size, k / size, rtol=0, atol=close)
            np.testing.assert_allclose(
                value.kdot / size_dot, kdot / size_dot, rtol=0, atol=close
            )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["elu", "selu"])
def test_networks_of_depth_four(name, dtype):
    """Of equal, independent and opposite inputs, of norms from about 1e-3 to 1e3."""
    dense = snnk.infinite.Dense(1.5, 0.25)
    middle = snnk.infinite.Activation(name)
    net = snnk.infinite.serial(*[dense, middle] * 4, dense)
    cases = [case for case in GOLDEN["networks"] if case["activation"] == name]
    x = np.concatenate([case["x"] for case in cases])
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(x, dtype)
        kernels = net.kernel(x[::3], x)
        for i, case in enumerate(cases):
            own = np.array(case["own"])
            size = np.sqrt(own[0] * own)
            for j, part in enumerate(("nngp", "ntk")):
                k = getattr(kernels, part)
                np.testing.assert_allclose(
                    k[i, 3 * i : 3 * i + 3] / size[:, j],
                    np.array(case["values"])[:, j] / size[:, j],
                    rtol=0,
                    atol=CLOSE[dtype],
                )


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.6, 1.0, 0.0])
def test_gradients_are_those_of_differences(alpha):
    function = snnk.activations.get("elu", alpha=alpha)
    norms = [0.004, 0.3, 2.0, 40.0]
    s, t, rho = (z.ravel() for z in np.meshgrid(norms, [0.3, 5.0], [-0.9, 0.2, 0.999]))
    with jax.enable_x64(True):

        @jax.jit
        def both(p, q, r):
            # The gap as it follows from the others, differences move it as well.
            pair = _duals.Pair(p, q, r, 1 - q * q / (p * r))
            k, kdot, _ = _duals.dual(function, pair)
            return k, kdot

        p, q, r, _ = pair_at(s, t, rho, jnp.float64)
        still, geometric, step = jnp.zeros_like(p), jnp.sqrt(p * r), 1e-6
        for move in (
            (p, still, still),
            (still, geometric, still),
            (still, still, r),
        ):
            _, slopes = jax.jvp(both, (p, q, r), move)
            above, below = (
                both(*(v + h * d for v, d in zip((p, q, r), move, strict=True)))
                for h in (step, -step)
            )
            for slope, up, down, size in zip(
                slopes, above, below, (geometric, jnp.ones_like(p)), strict=True
            ):
                numeric = np.asarray((up - down) / (2 * step) / size)
                np.testing.assert_allclose(slope / size, numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ends_zeros_and_huge_norms(dtype):
    """Finite everywhere; equal inputs have the variance exactly."""
    function = snnk.activations.get("selu")
    norms = np.array([0.0, 1e-12, 1e-3, 1.0, 1e3, 1e7])
    s, t, rho = (z.ravel() for z in np.meshgrid(norms, norms, [-1.0, 0.0, 1.0]))
    with jax.enable_x64(dtype == "float64"):
        p, q, r, gap = pair_at(s, t, rho, dtype)

        @jax.jit
        def total(p, q, r):
            value = _duals.dual(function, _duals.Pair(p, q, r, gap))
            return value.k.sum() + value.kdot.sum(), value

        slopes, value = jax.grad(total, (0, 1, 2), has_aux=True)(p, q, r)
        for leaf in jax.tree.leaves((slopes, value)):
            assert leaf.dtype == dtype
            assert np.isfinite(leaf).all()
        equal = (s == t) & (rho == 1)
        own = _duals.diagonal(function, p)
        np.testing.assert_allclose(value.k[equal], own[equal], rtol=1e-6)
        assert not np.asarray(value.k)[(s == 0) | (t == 0)].any()
        # Far from 0 the function is ReLU, up to its scale.
        for sign, where in ((1, rho == 1), (-1, rho == -1)):
            large = where & (s == 1e7) & (t == 1e7)
            expected = 1.0507009873554805**2 / 2 * 1e14 if sign == 1 else 0.0
            np.testing.assert_allclose(
                value.k[large] / 1e14, expected / 1e14, atol=1e-6
            )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scaled_complementary_error_function(dtype):
    a = np.concatenate([[0.0], np.geomspace(1e-8, 1e10, 2001)]).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        value = np.asarray(_elu._erfcx(jnp.asarray(a)), np.float64)
    expected = scipy.special.erfcx(np.float64(a) / np.sqrt(2))
    np.testing.assert_allclose(value, expected, rtol=16 * np.finfo(dtype).eps)
