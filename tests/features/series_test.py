import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import snnk_jax as snnk
from snnk_jax.features import URF, fourier_series


def softsign(z):
    return z / (1 + abs(z))


def normal_cdf(z):
    return scipy.special.ndtr(z)


# The function and upper limits of the sup and L2 errors of six waves on [-6, 6].
REFERENCES = {
    "gelu": (lambda z: z * normal_cdf(z), 0.004, 0.006),
    "silu": (lambda z: z * scipy.special.expit(z), 0.004, 0.006),
    "softplus": (lambda z: np.logaddexp(0, z), 0.004, 0.006),
    "tanh": (np.tanh, 0.006, 0.004),
    "erf": (scipy.special.erf, 0.005, 0.003),
    "sigmoid": (scipy.special.expit, 2e-5, 2e-5),
    "relu": (lambda z: np.maximum(z, 0), 0.12, 0.03),
    "softsign": (softsign, 0.04, 0.02),
}
each_activation = pytest.mark.parametrize("name", REFERENCES)


def fit(name, *args):
    return fourier_series(softsign if name == "softsign" else name, *args)


def evaluate(series, z):
    value = series.constant + series.slope * z
    for atom in series.atoms:
        value = value + atom.amplitude * np.cos(atom.frequency * z + atom.phase)
    return value


def errors(name, series):
    """Sup and weighted L2 error on a grid that is not the fit's."""
    half_width = series.half_width
    z = np.linspace(-half_width, half_width, 30011)
    error = evaluate(series, z) - REFERENCES[name][0](z)
    weight = np.exp(-0.5 * (3 * z / half_width) ** 2)
    sup = np.abs(error[np.abs(z) <= half_width / 2]).max()
    return sup, np.sqrt(np.sum(weight * error**2) / weight.sum())


@each_activation
@pytest.mark.parametrize(("num_terms", "half_width"), [(6, 6.0), (3, 4.0), (12, 8.0)])
def test_reported_errors_are_the_errors(name, num_terms, half_width):
    series = fit(name, num_terms, half_width)
    sup, l2 = errors(name, series)
    assert series.sup_error == pytest.approx(sup, rel=1e-3)
    assert series.l2_error == pytest.approx(l2, rel=0.01)


@each_activation
def test_errors_stay_below_their_limits(name):
    series = fit(name)
    _, sup, l2 = REFERENCES[name]
    assert sup / 4 < series.sup_error < sup
    assert l2 / 4 < series.l2_error < l2


@each_activation
def test_series_is_the_weighted_least_squares_fit(name):
    # By QR on a grid of its own, without the ridge.
    z = np.linspace(-6, 6, 6001)
    angle = z[:, None] * np.pi / 6 * np.arange(1, 7)
    design = np.concatenate(
        [np.ones((6001, 1)), z[:, None], np.cos(angle), np.sin(angle)], axis=1
    )
    root = np.exp(-0.25 * (z / 2) ** 2)
    target = REFERENCES[name][0](z)
    best, *_ = np.linalg.lstsq(design * root[:, None], target * root)
    least = np.sqrt(np.sum((root * (design @ best - target)) ** 2) / np.sum(root**2))
    l2 = fit(name).l2_error
    assert 0.99 * least < l2 < 1.05 * least + 2e-4


@pytest.mark.parametrize("name", ["gelu", "silu", "softplus"])
def test_slope_and_parity_of_half_linear_functions(name):
    # Each is z / 2 and an even function: no sines, phases 0 or pi.
    series = fit(name)
    assert series.slope == pytest.approx(0.5, abs=5e-5)
    for atom in series.atoms:
        assert abs(math.sin(atom.phase)) < 2e-3


@pytest.mark.parametrize("name", ["tanh", "erf", "softsign"])
def test_odd_functions_have_no_constant(name):
    series = fit(name)
    assert series.constant == 0
    for atom in series.atoms:
        assert abs(math.cos(atom.phase)) < 2e-3


@each_activation
def test_call_evaluates_the_series(name):
    series = fit(name)
    z = np.linspace(-5, 5, 23, dtype=np.float32).reshape(1, 23)
    value = jax.jit(series)(jnp.asarray(z))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(
        value, evaluate(series, z.astype(np.float64)), rtol=1e-5, atol=2e-6
    )


@each_activation
def test_amplification_is_its_formula(name):
    series = fit(name)
    sizes = np.array([abs(atom.amplitude) for atom in series.atoms])
    rates = np.array([atom.frequency for atom in series.atoms])
    for kappa in (0.0, 0.5, 2.0):
        expected = np.sum(sizes * np.exp(rates * kappa))
        assert series.amplification(kappa) == pytest.approx(expected, rel=1e-12)


def test_amplification_predicts_the_noise():
    # Independent directions, inputs orthogonal to the weights: the waves' second
    # moment is half the square of the sum, by the formula of URF.
    kappa, num_features = 1.0, 2**12
    features = URF(
        activation="gelu",
        num_features=num_features,
        projection="gaussian",
        scale=1.0,
        kappa=kappa,
    )
    x, kernel = jnp.eye(8)[:4], jnp.eye(8)[:, 4:]
    expected = evaluate(features.series, 0.0)

    def one(key):
        y = snnk.snnk_dense(features, features.init(key, 8), x, kernel)
        return jnp.mean((y - expected) ** 2)

    keys = jax.random.split(jax.random.key(0), 128)
    rmse = float(jnp.sqrt(jnp.mean(jax.jit(jax.vmap(one))(keys))))
    bound = features.series.amplification(kappa) / num_features**0.5
    assert 0.7 * bound < rmse < 1.05 * bound


@each_activation
def test_more_terms_are_never_much_worse(name):
    l2 = [fit(name, num_terms).l2_error for num_terms in range(1, 17)]
    for fewer, more in itertools.pairwise(l2):
        assert more <= 1.02 * fewer + 1e-4
    assert l2[-1] < 0.3 * l2[1]


def test_frequencies_are_multiples_of_the_lowest():
    series = fourier_series("sigmoid", 5, 4.0)
    assert series.half_width == 4.0
    np.testing.assert_allclose(
        [atom.frequency for atom in series.atoms], np.pi / 4 * np.arange(1, 6)
    )


def test_an_affine_function_has_no_waves():
    series = fourier_series(snnk.activations.get("polynomial", coefficients=(2.0, 3.0)))
    assert series.constant == pytest.approx(2, rel=1e-4)
    assert series.slope == pytest.approx(3, rel=1e-4)
    assert series.atoms == ()


def test_fits_are_kept_and_hash_by_value():
    series = fourier_series("gelu")
    assert fourier_series(snnk.activations.get("gelu"), 6, 6.0) is series
    assert fourier_series("gelu", 7) != series
    assert fourier_series("gelu", 6, 5.0) != series
    assert hash(series) == hash(fourier_series("gelu"))
    assert len({series, fourier_series("gelu"), fourier_series("silu")}) == 2


def test_fit_is_the_same_while_jax_traces():
    seen = []

    def traced(x):
        seen.append(fourier_series("gelu", 9))
        return x

    jax.jit(traced)(jnp.ones(2))
    sup, _ = errors("gelu", seen[0])
    assert seen[0].sup_error == pytest.approx(sup, rel=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_terms must be at least 1. Got 0"):
        fourier_series("gelu", num_terms=0)
    for half_width in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="half_width must be positive and finite"):
            fourier_series("gelu", half_width=half_width)
    with pytest.raises(ValueError, match=r"must be finite on \[-6.0, 6.0\].*'log'"):
        fourier_series(jnp.log)
    with pytest.raises(ValueError, match="Did you mean 'gelu'"):
        fourier_series("gellu")
