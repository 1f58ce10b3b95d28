"""Duals without a golden value: quadrature, logistic mixtures, edges, gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.infinite import _duals, _hermite, _mixture
from snnk_jax.infinite._arctan import angle
from snnk_jax.infinite._duals import Pair
from tests.tiers import slow_but

get = snnk.activations.get
CLOSED = {
    "relu": get("relu"),
    "leaky_relu": get("leaky_relu", negative_slope=0.2),
    "abs": get("abs"),
    "sign": get("sign"),
    "step": get("step"),
    "cubic": get("rectified_monomial", n=3),
    "monomial": get("monomial", n=3),
    "polynomial": get("polynomial", coefficients=(0.5, -1.0, 0.25)),
    "hermite": get("hermite", n=3),
    "erf": get("erf", a=1.2, b=0.7, c=0.1),
    "sigmoid_like": get("sigmoid_like"),
    "normal_cdf": get("normal_cdf"),
    "gelu": get("gelu"),
    "sin": get("sin", a=1.3, b=0.7, c=0.4),
    "cos": get("cos"),
    "rbf": get("rbf", gamma=0.3),
    "exp": get("exp", a=0.8, b=0.5),
    "gaussian": get("gaussian", a=1.5, b=-0.4),
    "gabor": get("gabor"),
    "identity": get("identity"),
}
LOGISTIC = {name: get(name) for name in ("sigmoid", "tanh", "softplus", "silu")}
SECTORS = {"elu": get("elu", alpha=0.7), "selu": get("selu")}
OPEN = {
    "bare_elu": snnk.activations.Activation("bare_elu", jax.nn.elu, kinks=(0.0,)),
    "shifted": snnk.activations.Activation(
        "shifted", lambda z: jax.nn.relu(z - 0.3), kinks=(0.3,)
    ),
}
EVERY = {
    **CLOSED,
    **LOGISTIC,
    **SECTORS,
    **OPEN,
    "normalized": snnk.infinite.NormalizedExponential(gamma=1.5),
}
RHO = np.array([-1.0, -0.95, -0.3, 0.0, 0.4, 0.9, 0.999, 1.0])


def pair_at(p, r, rho, dtype):
    p, r, rho = np.broadcast_arrays(*map(np.float64, (p, r, rho)))
    values = p, rho * np.sqrt(p * r), r, (1 - rho) * (1 + rho)
    return Pair(*(jnp.asarray(v, dtype) for v in values))


def quadrature(f, p, r, rho):
    """``E f(u) f(v)`` by panels in u, and in v towards where v changes sign."""
    g, weights = _hermite.panels(_hermite._EDGES)
    if abs(rho) == 1:
        u, v = math.sqrt(p) * g, rho * math.sqrt(r) * g
        return np.sum(weights * f(u) * f(v))
    spread = math.sqrt(1 - rho**2)
    # Where v changes sign, for each u.
    roots = (-rho * g / spread)[:, None]
    edges = np.broadcast_to(_hermite._EDGES, (len(g), len(_hermite._EDGES)))
    edges = np.sort(np.clip(np.concatenate([edges, edges + roots], 1), -16, 16), 1)
    inner, w = _hermite.panels(edges)
    v = math.sqrt(r) * (rho * g[:, None] + spread * inner)
    return np.sum(weights * f(math.sqrt(p) * g) * np.sum(w * f(v), axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "softplus", "silu"])
@pytest.mark.parametrize("scale", [0.5, 30.0])
def test_logistic_functions_against_quadrature(name, scale):
    f = {
        "tanh": np.tanh,
        "softplus": lambda z: np.logaddexp(z, 0),
        "silu": lambda z: z / (1 + np.exp(-np.clip(z, -700, 700))),
    }[name]
    p, r = scale**2, 2 * scale**2
    expected = [quadrature(f, p, r, rho) for rho in (-0.6, 0.9)]
    size = math.sqrt(quadrature(f, p, p, 1.0) * quadrature(f, r, r, 1.0))
    with jax.enable_x64(True):
        pair = pair_at(p, r, [-0.6, 0.9], jnp.float64)
        k = np.asarray(_duals.dual(LOGISTIC[name], pair).k)
    np.testing.assert_allclose(k / size, np.array(expected) / size, atol=1e-10)
    k = _duals.dual(LOGISTIC[name], pair_at(p, r, [-0.6, 0.9], jnp.float32)).k
    np.testing.assert_allclose(k / size, np.array(expected) / size, atol=2e-6)


def test_the_mixture_is_the_logistic_function():
    z = np.concatenate([np.linspace(-20, 20, 401), [1e3, -1e3]])
    for num, close in ((16, 1e-11), (8, 1e-7)):
        scales, weights = _mixture.mixture(num)
        normal = np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))
        value = normal(z[:, None] / scales) @ weights
        np.testing.assert_allclose(value, 0.5 * (1 + np.tanh(z / 2)), atol=close)
        assert abs(weights.sum() - 1) < 1e-12


@pytest.mark.parametrize("name", slow_but(("bare_elu",), OPEN))
def test_functions_without_a_closed_form_against_quadrature(name):
    function = OPEN[name]
    f = function.evaluate
    p, r, rho = 1.7, 0.6, 0.8
    kinked = name == "shifted"
    with jax.enable_x64(True):
        ends = pair_at(p, p, [1.0, -1.0], jnp.float64)
        value, inside = jax.tree.map(
            np.asarray,
            [
                _duals.dual(function, pair)
                for pair in (ends, pair_at(p, r, [rho], jnp.float64))
            ],
        )
    for sign, k in zip((1.0, -1.0), value.k, strict=True):
        if not kinked:
            np.testing.assert_allclose(k, quadrature(f, p, p, sign), rtol=1e-12)
    expected = quadrature(f, p, r, rho)
    # The reference itself takes no notice of a kink elsewhere than at 0.
    np.testing.assert_allclose(inside.k[0], expected, rtol=1e-4 if kinked else 1e-6)
    if not kinked:
        slope = quadrature(lambda z: function.evaluate(z, 1), p, r, rho)
        np.testing.assert_allclose(inside.kdot[0], slope, rtol=1e-5)


@pytest.mark.parametrize("name", CLOSED)
def test_the_expansion_at_each_norm_is_the_closed_form(name):
    """Of smooth functions to rounding, of others to the truncation at degree 64."""
    function = CLOSED[name]
    bare = snnk.activations.Activation(name, function.fn, kinks=function.kinks)
    smooth = not function.kinks
    with jax.enable_x64(True):
        pair = pair_at(0.49, 1.21, RHO, jnp.float64)
        exact, expanded = jax.tree.map(
            np.asarray, [_duals.dual(f, pair) for f in (function, bare)]
        )
        size = np.sqrt(
            _duals.diagonal(function, pair.p) * _duals.diagonal(function, pair.r)
        )
    error = np.abs(exact.k - expanded.k) / size
    assert error.max() < (1e-9 if smooth else 5e-2 if function.degree == 0 else 1e-4)
    if smooth:
        np.testing.assert_allclose(exact.kdot, expanded.kdot, rtol=1e-7, atol=1e-9)


_QUICK = ("relu", "sign", "gelu", "tanh", "hermite")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            *(name, dtype),
            marks=() if (name in _QUICK and dtype == "float32") else pytest.mark.slow,
        )
        for name in EVERY
        for dtype in ("float32", "float64")
    ],
)
def test_edges_and_gradients_are_finite(name, dtype):
    """Equal, opposite and zero inputs; k and its slope by Price's theorem."""
    function = EVERY[name]
    with jax.enable_x64(dtype == "float64"):
        p = jnp.asarray([[1.0], [0.0], [2.5]], dtype)
        r = jnp.asarray([[1.0, 0.0, 2.5, 0.7]], dtype)
        rho = np.array([[1, 0, 0.3, -0.2], [0, 0, 0, 0], [-1, 0, -1, 0.999]])
        q = jnp.asarray(rho, dtype) * jnp.sqrt(p * r)
        gap = jnp.asarray((1 - rho) * (1 + rho), dtype)

        @jax.jit
        def both(p, q, r):
            def total(p, q, r):
                value = _duals.dual(function, Pair(p, q, r, gap))
                return value.k.sum() + value.kdot.sum(), value

            return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(p, q, r)

        (_, value), slopes = jax.tree.map(np.asarray, both(p, q, r))
        slope = jax.grad(lambda q: _duals.dual(function, Pair(p, q, r, gap)).k.sum())(q)
        jumps = getattr(function, "degree", None) == 0 and bool(function.kinks)
        expected = _duals.dual(function, Pair(p, q, r, gap), jumps=jumps).kdot
        q, slope, expected = map(np.asarray, (q, slope, expected))
        inside = (np.asarray(gap) > 0) & (np.asarray(p * r) > 0)
    for leaf in jax.tree.leaves((value, slopes)):
        assert leaf.dtype == q.dtype
        assert np.isfinite(leaf).all()
    assert (value.gap >= 0).all()
    assert (value.gap <= 1).all()
    close = 1e-6 if dtype == "float64" else 2e-4
    if name in CLOSED or name in LOGISTIC or name in SECTORS:
        np.testing.assert_allclose(
            slope[inside], expected[inside], rtol=close, atol=close
        )


@pytest.mark.parametrize("name", [*CLOSED, *LOGISTIC, *SECTORS])
def test_the_diagonal_is_the_second_moment(name):
    function = EVERY[name]
    g, weights = _hermite.panels(_hermite._EDGES)
    p = np.array([0.0, 0.3, 2.0])
    values = function.evaluate(np.sqrt(p)[:, None] * g)
    slopes = function.evaluate(np.sqrt(p)[:, None] * g, 1)
    with jax.enable_x64(True):
        k, kdot = (
            np.asarray(_duals.diagonal(function, jnp.asarray(p), derivative=derivative))
            for derivative in (False, True)
        )
    np.testing.assert_allclose(k, values**2 @ weights, rtol=1e-9, atol=1e-12)
    positive = slice(1, None)  # at 0 the derivative of a kinked function is its choice
    expected = (slopes**2 @ weights)[positive]
    np.testing.assert_allclose(kdot[positive], expected, rtol=2e-9, atol=1e-12)


def test_the_derivative_of_a_jump_is_an_option():
    pair = pair_at(1.0, 4.0, [0.5, 0.0], jnp.float32)
    for name, scale in (("sign", 4.0), ("step", 1.0)):
        assert not _duals.dual(CLOSED[name], pair).kdot.any()
        slope = _duals.dual(CLOSED[name], pair, jumps=True).kdot
        root = np.sqrt(4.0 - np.array([1.0, 0.0]) ** 2)
        np.testing.assert_allclose(slope, scale / (2 * np.pi * root), rtol=1e-6)


def test_truncation_bounds_the_error_and_is_met_on_the_diagonal():
    with jax.enable_x64(True):
        for name, degree in (("gelu", 8), ("erf", 6), ("relu", 10), ("tanh", 8)):
            function = EVERY[name]
            pair = pair_at(1.3, 0.8, RHO, jnp.float64)
            a, b = (
                _hermite.coefficients(function, degree + 1, jnp.sqrt(v))
                for v in (pair.p, pair.r)
            )
            powers = jnp.asarray(np.asarray(RHO)[:, None] ** np.arange(degree + 1.0))
            error = jnp.abs(_duals.dual(function, pair).k - jnp.sum(a * b * powers, 1))
            tau = [
                _hermite.truncation(function, c, jnp.sqrt(v))
                for c, v in ((a, pair.p), (b, pair.r))
            ]
            assert (error <= jnp.sqrt(tau[0] * tau[1]) * (1 + 1e-9)).all()
            own = _duals.diagonal(function, pair.p) - jnp.sum(a * a, axis=1)
            np.testing.assert_allclose(tau[0], own, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_angle_is_atan2(dtype):
    with jax.enable_x64(dtype == "float64"):
        y = np.concatenate([np.geomspace(1e-12, 1e6, 400), [0.0]]).astype(dtype)
        for x in (0.0, 1e-3, 1.0):
            for sign in (1, -1):
                z = jnp.asarray(sign * y)
                value = jax.jit(angle)(z, jnp.full_like(z, x))
                exact = np.float64(np.dtype(dtype).type(x))
                expected = np.arctan2(np.float64(sign * y), exact)
                np.testing.assert_allclose(
                    value, expected, rtol=8 * np.finfo(dtype).eps
                )
        zero = jnp.zeros((), dtype)
        slopes = jax.grad(lambda y, x: angle(y, x), (0, 1))(zero, zero)
        assert slopes[0] == 0


def test_hermite_coefficients_are_those_of_the_row():
    with jax.enable_x64(True):
        c = jnp.asarray([[0.05, 1.0], [3.0, 20.0]])
        for name in ("gelu", "elu", "relu", "sin", "polynomial", "gabor", "tanh"):
            function = EVERY[name]
            a = jax.jit(_hermite.coefficients, static_argnums=(0, 1))(function, 12, c)
            expected = [[function.hermite(12, float(v)) for v in row] for row in c]
            size = np.abs(expected).max()
            np.testing.assert_allclose(a, expected, atol=1e-12 * size)
        shifted = OPEN["shifted"]
        a = _hermite.coefficients(shifted, 12, c)
        expected = [[shifted.hermite(12, float(v)) for v in row] for row in c]
        np.testing.assert_allclose(a, expected, atol=1e-11)


def test_unknown_families_are_refused():
    row = snnk.activations.Activation("odd", jnp.sin, dual=snnk.activations.Dual("odd"))
    with pytest.raises(ValueError, match="family must be one of rectified, elu.*'odd'"):
        _duals.diagonal(row, jnp.ones(2))
    with pytest.raises(ValueError, match="num must be at least 1. Got 0"):
        _hermite.coefficients(row, 0, jnp.ones(2))
    with pytest.raises(ValueError, match="gamma must be positive and finite. Got 0"):
        snnk.infinite.NormalizedExponential(gamma=0.0)
