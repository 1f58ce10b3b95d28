import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import snnk_jax as snnk
from snnk_jax import projections
from snnk_jax.features import URF, _sampling

WIDTH, EXAMPLES, OUTPUTS = 8, 4, 3
# The density of the rates: |R(s)|, whose integral over s > 0 need not be 1.
DENSITIES = {
    "gaussian": lambda s: 2 * scipy.stats.norm.pdf(s),
    "sech": lambda s: 1 / np.cosh(np.pi * s / 2),
    "gabor": lambda s: (
        scipy.stats.norm.pdf(s, 1, 2**0.5) - scipy.stats.norm.pdf(s, -1, 2**0.5)
    ),
}
FUNCTIONS = {
    "gaussian": lambda z: np.exp(-(z**2) / 2),
    "sech": lambda z: 1 / np.cosh(z),
    "gabor": lambda z: np.exp(-(z**2)) * np.sin(z),
}
each_activation = pytest.mark.parametrize("name", DENSITIES)
each_law = pytest.mark.parametrize("importance", [False, True], ids=["plain", "is"])


def layer(kappa, width=WIDTH, examples=EXAMPLES, outputs=OUTPUTS):
    """Inputs and weights with the same norm, their product kappa."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, width))
    kernel = rng.normal(size=(width, outputs))
    x *= kappa**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
    kernel *= kappa**0.5 / np.linalg.norm(kernel, axis=0)
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


def make(name, kappa, num_features=64, **fields):
    fields = {"spectrum": "sampled", "scale": 1.0} | fields
    return URF(activation=name, num_features=num_features, kappa=kappa, **fields)


def estimates(features, x, kernel, bias=None, keys=1024):
    def one(key):
        params = features.init(key, x.shape[1])
        return snnk.snnk_dense(features, params, x, kernel, bias)

    return np.asarray(
        jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), keys)), np.float64
    )


def rates_and_weights(name, num, kappa, importance, seed=0):
    spectrum = snnk.activations.get(name).spectrum
    words = projections.key_words(jax.random.key(seed))
    drawn = _sampling.sample_rates(spectrum, words, num, kappa, importance)
    return (np.asarray(a, np.float64) for a in drawn)


def law(name, kappa):
    """The tilted cdf, by quadrature on a grid finer than the library's."""
    s = np.linspace(1e-9, 60, 300001)
    tilted = DENSITIES[name](s) * np.exp(s * kappa)
    cdf = scipy.integrate.cumulative_trapezoid(tilted, s, initial=0)
    return lambda at: np.interp(at, s, cdf / cdf[-1])


# Estimates.


@pytest.mark.slow
@each_activation
@each_law
@pytest.mark.parametrize("kappa", [0.2, 0.6])
def test_unbiased(name, importance, kappa):
    x, kernel = layer(kappa)
    bias = jnp.asarray([0.4, -1.1, 2.0])
    features = make(name, kappa, importance=importance)
    values = estimates(features, x, kernel, bias, keys=4096)
    z = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    error = values.mean(axis=0) - FUNCTIONS[name](z + np.asarray(bias, np.float64))
    deviation = values.std(axis=0, ddof=1) / len(values) ** 0.5
    assert np.all(deviation < 0.01)
    assert np.all(np.abs(error) < 4.5 * deviation)


def test_importance_lowers_the_error():
    # A.2 of the notes: .031 against .016 for sech at kappa .7.
    x, kernel = layer(0.7, width=64, examples=16, outputs=16)
    z = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    errors = []
    for importance in (False, True):
        features = make("sech", 0.7, 4096, importance=importance, projection="gaussian")
        values = estimates(features, x, kernel, keys=16)
        errors.append(np.sqrt(np.mean((values - 1 / np.cosh(z)) ** 2)))
    plain, tilted = errors
    assert 0.015 < tilted < 0.03
    assert tilted < 0.85 * plain


def test_second_moment_is_the_amplified_mass():
    # Waves at right angles: E Z^2 = mass^2 / 2 a pair of columns, of m / 2 pairs.
    kappa, num_features = 0.8, 2**13
    features = make("sech", kappa, num_features, projection="gaussian")
    x, kernel = jnp.eye(8)[:4] * kappa**0.5, jnp.eye(8)[:, 4:] * kappa**0.5
    values = estimates(features, x, kernel, keys=128)
    mass, _ = scipy.integrate.quad(
        lambda s: DENSITIES["sech"](s) * math.exp(s * kappa), 0, 40
    )
    rmse = np.sqrt(np.mean((values - 1) ** 2))
    assert 0.6 < rmse / (mass / num_features**0.5) < 1.05
    spectrum = features.row.spectrum
    assert _sampling.amplified_mass(spectrum, kappa, True) == pytest.approx(
        mass, rel=1e-3
    )
    # kappa / 2 without importance: sqrt(mass(0) mass(2 kappa)), and mass(0) = f(0).
    assert _sampling.amplified_mass(spectrum, kappa / 2, False) == pytest.approx(
        mass**0.5, rel=1e-3
    )


# The law of the rates.


@each_activation
@each_law
@pytest.mark.parametrize("kappa", [0.3, 1.2])
def test_one_rate_in_each_cell_of_equal_probability(name, importance, kappa):
    num = 256
    rates, _ = rates_and_weights(name, num, kappa, importance)
    quantiles = law(name, kappa if importance else 0.0)(rates) * num
    # The table of the library interpolates: a little slack at the walls of a cell.
    assert np.all(quantiles > np.arange(num) - 0.01)
    assert np.all(quantiles < np.arange(1, num + 1) + 0.01)


@each_activation
@each_law
def test_rates_follow_the_law(name, importance):
    # One rate a key: without stratification, so that the test's level holds.
    kappa, keys = 0.7, 4000
    spectrum = snnk.activations.get(name).spectrum

    def one(key):
        words = projections.key_words(key)
        return _sampling.sample_rates(spectrum, words, 1, kappa, importance)[0]

    rates = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), keys))
    rates = np.asarray(rates[:, 0], np.float64)
    right = scipy.stats.kstest(rates, law(name, kappa if importance else 0.0))
    assert right.pvalue > 1e-3
    wrong = scipy.stats.kstest(rates, law(name, 0.0 if importance else kappa))
    assert wrong.pvalue < 1e-6


@pytest.mark.parametrize("name", ["gaussian", "sech"])
def test_rates_follow_the_closed_form(name):
    # s ~ |N(0, 1)|, and s = 2 / pi log tan(pi / 4 (1 + U)).
    rates, weights = rates_and_weights(name, 4096, 0.0, True)
    u = (np.arange(4096) + 0.5) / 4096
    if name == "gaussian":
        expected = scipy.stats.norm.ppf((1 + u) / 2)
    else:
        expected = 2 / np.pi * np.log(np.tan(np.pi / 4 * (1 + u)))
    np.testing.assert_allclose(rates[:4000], expected[:4000], rtol=0.02, atol=3e-3)
    np.testing.assert_allclose(weights, 1, rtol=5e-3)


@each_activation
@each_law
@pytest.mark.parametrize("kappa", [0.3, 1.2])
def test_weights_are_the_density_over_the_law(name, importance, kappa):
    rates, weights = rates_and_weights(name, 512, kappa, importance)
    tilt = np.exp(rates * (kappa if importance else 0.0))
    s = np.linspace(1e-9, 60, 300001)
    tilted = DENSITIES[name](s) * np.exp(s * (kappa if importance else 0.0))
    mass = scipy.integrate.trapezoid(tilted, s)
    np.testing.assert_allclose(weights, mass / tilt, rtol=0.03)


def test_waves_average_to_the_function():
    # Stratified rates are a quadrature: the error falls as 1 / k, not 1 / sqrt(k).
    z = np.linspace(-3, 3, 41)
    for name, phase in [("gaussian", 0), ("sech", 0), ("gabor", -np.pi / 2)]:
        rates, weights = rates_and_weights(name, 1024, 0.5, True)
        value = np.mean(weights * np.cos(rates * z[:, None] + phase), axis=1)
        np.testing.assert_allclose(value, FUNCTIONS[name](z), atol=2e-3)


@pytest.mark.parametrize(
    ("function", "density"),
    [
        (  # zero at 1
            lambda z: z**2 * np.exp(-(z**2) / 2),
            lambda s: 2 * (1 - s**2) * scipy.stats.norm.pdf(s),
        ),
        (  # two bands with nothing between them
            lambda z: np.exp(-(z**2) / 2) * (1 + np.cos(14 * z)),
            lambda s: 2 * scipy.stats.norm.pdf(s) + scipy.stats.norm.pdf(s, 14),
        ),
    ],
    ids=["zero", "gap"],
)
def test_a_zero_and_a_gap_are_no_end_of_the_spectrum(function, density):
    spectrum = snnk.activations.Spectrum(density)
    words = projections.key_words(jax.random.key(0))
    drawn = _sampling.sample_rates(spectrum, words, 4096, 0.02, True)
    rates, weights = (np.asarray(a, np.float64) for a in drawn)
    z = np.linspace(-3, 3, 41)
    value = np.mean(weights * np.cos(rates * z[:, None]), axis=1)
    np.testing.assert_allclose(value, function(z), atol=5e-3)


# Choosing.


def test_auto_takes_the_atoms_of_waves():
    features = make("cos", 0.1, spectrum="auto")
    assert "rates" not in features.init(jax.random.key(0), WIDTH)
    assert features.series is None
    assert features.terms.rates == (1.0,)


def test_auto_samples_where_it_is_quiet():
    features = make("gaussian", 0.1, spectrum="auto")
    assert features.series is None
    params = features.init(jax.random.key(0), WIDTH)
    assert params["rates"].shape == params["weights"].shape == (32,)


def test_auto_takes_the_series_where_sampling_is_loud():
    # Of sech, whose second moment ends at pi / 2 with importance sampling.
    assert make("sech", 0.3, spectrum="auto").series is None
    for kappa in (1.55, 1.6):
        features = make("sech", kappa, spectrum="auto")
        assert features.series is not None
        assert "rates" not in features.init(jax.random.key(0), WIDTH)


@pytest.mark.parametrize("name", ["gelu", "tanh", "relu", "laplace"])
def test_auto_takes_the_series_without_a_spectrum(name):
    features = make(name, 0.1, spectrum="auto")
    assert features.series == snnk.features.fourier_series(name)


def test_series_is_taken_on_demand():
    assert make("sech", 0.3, spectrum="series").series is not None


# Errors.


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_sampled_is_refused():
    for importance in (True, False):
        with pytest.raises(ValueError, match="kappa must be below 0 to sample 'lapl"):
            make("laplace", 0.1, importance=importance)
        with pytest.raises(ValueError, match="integrable Fourier transform.*'gelu'"):
            make("gelu", 0.1, importance=importance)
    limit = math.pi / 4
    make("sech", 0.95 * limit, importance=False)
    with pytest.raises(ValueError, match="below 0.785 to sample 'sech'.*infinite"):
        make("sech", limit, importance=False)
    make("sech", 1.9 * limit)
    with pytest.raises(ValueError, match="kappa must be smaller to sample 'gaussian'"):
        make("gaussian", 40.0)
    with pytest.raises(ValueError, match="below 1.57 to sample 'sech'.*infinite"):
        make("sech", 2 * limit)


def test_gaussian_tails_are_sampled_at_any_kappa():
    for importance in (True, False):
        params = make("gaussian", 4.0, importance=importance).init(
            jax.random.key(0), WIDTH
        )
        assert np.isfinite(params["rates"]).all()
        assert np.isfinite(params["weights"]).all()
