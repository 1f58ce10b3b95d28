import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.features import URF, ArcCosine, Exponential

WIDTH = 6
MAPS = {
    "cos": URF(num_features=64, scale=1.0),
    "shaped": URF(num_features=64, scale=1.0, shape=-0.05),
    "sech": URF(activation="sech", num_features=64, kappa=0.5),
    "gelu": URF(activation="gelu", num_features=64, scale=1.0),
    "tanh": URF(activation="tanh", num_features=64, projection="sobol"),
    "exp": Exponential(num_features=64, scale=1.0),
}


def each(names, quick):
    """All the names, those that are not quick in the slow tier."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [n if n in quick else pytest.param(n, marks=slow) for n in names]
    )


each_map = each(MAPS, ("cos", "gelu"))
each_kind = each(("cos", "gelu", "exp"), ("cos",))
each_degree = pytest.mark.parametrize("degree", [0, 1, 2])


def make(name, degree, **fields):
    return dataclasses.replace(MAPS[name], exact_degree=degree, **fields)


def unit(num, width, seed=0):
    x = np.random.default_rng(seed).normal(size=(num, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def inputs(norm, width=WIDTH, num=4, outputs=5):
    x = jnp.asarray(unit(num, width) * norm, "float32")
    kernel = jnp.asarray(unit(outputs, width, seed=1).T, "float32")
    return x, kernel, jnp.linspace(-1, 1.5, outputs)


def relative_error(features, x, kernel, bias=None, keys=20, offset=False):
    """Root mean square error over keys; of the norm, or of the spread of outputs."""
    exact = np.asarray(features.exact(x, kernel, bias), np.float64)

    def one(key):
        params = features.init(key, x.shape[1])
        return snnk.snnk_dense(features, params, x, kernel, bias)

    drawn = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), keys))
    square = np.mean((np.asarray(drawn, np.float64) - exact) ** 2)
    size = np.mean(np.var(exact, axis=0) if offset else exact**2)
    return np.sqrt(square / size)


# The polynomial part is exact.


@each_map
@each_degree
def test_error_falls_with_the_next_power_of_the_norm(name, degree):
    with jax.enable_x64(True):
        features = make(name, degree)
        params = features.init(jax.random.key(0), WIDTH, jnp.float64)
        x, kernel, bias = (a.astype(jnp.float64) for a in inputs(1.0))

        def error(norm):
            y = snnk.snnk_dense(features, params, norm * x, kernel, bias)
            return float(jnp.abs(y - features.exact(norm * x, kernel, bias)).max())

        # Of one draw, not of a mean: the random part itself has no lower degree.
        large, small = error(1e-2), error(1e-3)
    assert large < 100 * 1e-2 ** (degree + 1)
    assert large / small == pytest.approx(10 ** (degree + 1), rel=0.2)


@each_kind
@each_degree
def test_taylor_part_at_zero_is_that_of_the_function(name, degree):
    with jax.enable_x64(True):
        features = make(name, degree)
        params = features.init(jax.random.key(1), WIDTH, jnp.float64)
        _, kernel, bias = (a.astype(jnp.float64) for a in inputs(1.0))
        zero = jnp.zeros(WIDTH, jnp.float64)
        layer = functools.partial(snnk.snnk_dense, features, params)
        for order in range(3):
            estimate, exact = layer, features.exact
            for _ in range(order):
                estimate = jax.jacfwd(estimate)
                exact = jax.jacfwd(exact)
            values = estimate(zero, kernel, bias), exact(zero, kernel, bias)
            if order <= degree:
                np.testing.assert_allclose(*values, rtol=1e-9, atol=1e-9)
            else:
                assert not np.allclose(*values, rtol=1e-3, atol=1e-4)


@each_kind
@each_degree
def test_random_columns_have_no_lower_taylor_part(name, degree):
    with jax.enable_x64(True):
        features = make(name, degree)
        params = features.init(jax.random.key(0), WIDTH, jnp.float64)
        first = features.layout(WIDTH).exact
        zero = jnp.zeros(WIDTH, jnp.float64)
        phi = functools.partial(features.phi, params)
        psi = lambda w: features.psi(params, w[:, None])[:, 0]  # noqa: E731
        for order in range(degree + 1):
            for tower in (phi, psi):
                part = tower
                for _ in range(order):
                    part = jax.jacfwd(part)
                np.testing.assert_allclose(part(zero)[first:], 0, atol=1e-12)


@each_map
@each_degree
def test_mean_of_the_random_part_is_the_rest(name, degree):
    # Over keys, at inputs of norm 1: unbiased, so the subtraction costs no bias.
    features = make(name, degree, projection="gaussian")
    x, kernel, bias = inputs(0.8, num=2, outputs=3)
    shift = np.asarray(bias, np.float64)
    target = np.asarray(features.exact(x, kernel, bias), np.float64)
    if isinstance(features, URF) and features.series is not None:
        z = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
        (row,), series = features.carried, features.series
        approximation = snnk.activations.Activation("series", series)
        target = approximation.evaluate(z + shift)
        for n in range(degree + 1):
            gap = row.evaluate(shift, n) - approximation.evaluate(shift, n)
            target = target + gap * z**n / (1, 1, 2)[n]

    def one(key):
        params = features.init(key, WIDTH)
        return snnk.snnk_dense(features, params, x, kernel, bias)

    values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), 2048))
    values = np.asarray(values, np.float64)
    deviation = values.std(axis=0, ddof=1) / 2048**0.5
    assert np.all(deviation < 0.04)
    assert np.all(np.abs(values.mean(axis=0) - target) < 4.5 * deviation)


@pytest.mark.parametrize("name", ["relu", "abs"])
@each_degree
def test_exact_parts_help_at_a_kink(name, degree):
    # All biases are at the kink, where f and its series have other derivatives.
    x, kernel, _ = inputs(0.5, width=4, num=64, outputs=8)
    plain = URF(activation=name, num_features=2048, scale=1.0)
    exact = dataclasses.replace(plain, exact_degree=degree)
    errors = [relative_error(fm, x, kernel, keys=4) for fm in (plain, exact)]
    assert errors[1] < 0.9 * errors[0]


# What it gains.


@pytest.fixture(scope="module")
def half():
    """The layer of kappa .5 and d = 64 that the notes measure."""
    x = jnp.asarray(unit(64, 64) * 0.5**0.5, "float32")
    kernel = jnp.asarray(unit(64, 64, seed=1).T * 0.5**0.5, "float32")
    bias = jnp.asarray(np.random.default_rng(2).normal(size=64), "float32")
    return x, kernel, bias


@pytest.mark.parametrize(
    ("degree", "low", "high"),
    [(None, 0.7, 1.6), (0, 0.35, 0.6), (1, 0.15, 0.29), (2, 0.01, 0.06)],
)
def test_error_beside_the_spread_of_the_outputs(half, degree, low, high):
    columns = 512 + (64 * 65 // 2 if degree == 2 else 0)
    features = URF(num_features=columns, exact_degree=degree, scale=1.0, kappa=0.5)
    assert low < relative_error(features, *half, offset=True) < high


@pytest.mark.parametrize(
    ("num_features", "low", "high"), [(64, 0.025, 0.055), (512, 0.008, 0.018)]
)
def test_constant_and_antithetic_beat_simplex(half, num_features, low, high):
    # The notes' best coupling alone: .046 and .016.
    features = URF(
        num_features=num_features, projection="antithetic", exact_degree=0, scale=1.0
    )
    assert low < relative_error(features, *half[:2]) < high


@pytest.mark.parametrize(
    ("num_features", "low", "high"), [(64, 0.17, 0.21), (512, 0.055, 0.075)]
)
def test_simplex_lowers_the_error_of_arc_cosine(num_features, low, high):
    features = ArcCosine(order=1, num_features=num_features, projection="simplex")
    x = jnp.asarray(unit(64, 64), "float32")
    kernel = jnp.asarray(unit(64, 64, seed=1).T, "float32")
    assert low < relative_error(features, x, kernel) < high


# Columns.


@pytest.mark.parametrize("name", ["cos", "exp"])
def test_column_counts(name):
    per = MAPS[name].columns_per_direction
    exact = [0, 1, 1 + WIDTH, 1 + WIDTH + WIDTH * (WIDTH + 1) // 2]
    for degree, columns in zip([None, 0, 1, 2], exact, strict=True):
        layout = make(name, degree).layout(WIDTH)
        assert layout.exact == columns
        assert layout.directions == (64 - columns) // per
        assert layout.padding == (64 - columns) % per
        least = make(name, degree, num_features=columns + per)
        assert least.layout(WIDTH).directions == 1


def test_a_series_with_a_slope_carries_its_affine_part():
    for degree, columns in [(None, 7), (0, 7), (1, 7), (2, 28)]:
        layout = make("gelu", degree).layout(WIDTH)
        assert layout.exact == columns
        assert len(layout.counts) == len(make("gelu", degree).series.atoms)


@each_kind
@each_degree
def test_exact_columns_come_first_and_are_the_monomials(name, degree):
    features = make(name, degree)
    params = features.init(jax.random.key(0), WIDTH)
    x, kernel, bias = inputs(0.7)
    phi, psi = features.phi(params, x), features.psi(params, kernel, bias)
    np.testing.assert_array_equal(phi[:, 0], 1)
    np.testing.assert_allclose(psi[0], features.row(bias), rtol=1e-6)
    if degree >= 1:
        np.testing.assert_array_equal(phi[:, 1 : 1 + WIDTH], x)
        np.testing.assert_allclose(
            psi[1 : 1 + WIDTH], features.row.grad(bias)[None] * kernel, rtol=1e-5
        )
    if degree == 2:
        pairs = slice(1 + WIDTH, 28)
        product = phi[:, pairs] @ psi[pairs]
        expected = (x @ kernel) ** 2 * features.row.grad(bias, 2)[None] / 2
        np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_features", [20, 21])
@each_degree
def test_padding_is_zero(num_features, degree):
    width = 3
    features = make("cos", degree, num_features=num_features)
    layout = features.layout(width)
    assert layout.padding == (num_features - layout.exact) % 2
    params = features.init(jax.random.key(0), width)
    x, kernel, bias = inputs(0.7, width)
    phi, psi = features.phi(params, x), features.psi(params, kernel, bias)
    assert phi.shape[1] == psi.shape[0] == num_features
    end = num_features - layout.padding
    np.testing.assert_array_equal(phi[:, end:], 0)
    np.testing.assert_array_equal(psi[end:], 0)
    assert (phi[:, :end] != 0).any(axis=0).all()
    assert (psi[:end] != 0).any(axis=1).all()


@pytest.mark.usefixtures("unchecked")
def test_too_few_columns_are_refused():
    for name, degree, least in [
        ("cos", None, 2),
        ("cos", 0, 3),
        ("cos", 1, 9),
        ("cos", 2, 30),
        ("exp", 1, 8),
        ("gelu", 1, 19),
    ]:
        make(name, degree, num_features=least).init(jax.random.key(0), WIDTH)
        short = make(name, degree, num_features=least - 1)
        words = f"inputs of width 6 and .* at least {least}. Got {least - 1}"
        with pytest.raises(ValueError, match=words):
            short.init(jax.random.key(0), WIDTH)
