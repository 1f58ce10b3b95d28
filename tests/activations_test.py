import copy
import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

import snnk_jax as snnk
from snnk_jax.activations import Activation, Atom, Spectrum
from snnk_jax.testing import count_traces, tolerance
from tests.tiers import slow_but

Z = np.concatenate([np.linspace(-6, 6, 101), [0.0]])
NAMES = [
    *("cos", "sin", "exp", "gaussian", "sech", "erf", "tanh", "sigmoid", "gelu"),
    *("silu", "swish", "softplus", "relu", "leaky_relu", "elu", "selu", "abs", "step"),
    *("sign", "identity", "polynomial", "gabor", "laplace", "hermite", "monomial"),
    *("normal_cdf", "rbf", "rectified_monomial", "sigmoid_like"),
]
SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805


def elu(z, alpha=1.0):
    return np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0)))


def tanh_gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


# Every row: its name, its parameters and what it is.
ROWS = {
    "abs": ("abs", {}, np.abs),
    "cos": ("cos", {}, np.cos),
    "cos-abc": (
        "cos",
        {"a": 0.8, "b": 1.5, "c": 0.4},
        lambda z: 0.8 * np.cos(1.5 * z + 0.4),
    ),
    "elu": ("elu", {}, elu),
    "elu-alpha": ("elu", {"alpha": 0.3}, lambda z: elu(z, 0.3)),
    "erf": ("erf", {}, scipy.special.erf),
    "erf-abc": (
        "erf",
        {"a": 0.5, "b": 0.4, "c": 0.5},
        lambda z: 0.5 * scipy.special.erf(0.4 * z) + 0.5,
    ),
    "exp": ("exp", {}, np.exp),
    "exp-ab": ("exp", {"a": 0.5, "b": -0.4}, lambda z: 0.5 * np.exp(-0.4 * z)),
    "gabor": ("gabor", {}, lambda z: np.exp(-(z**2)) * np.sin(z)),
    "gaussian": ("gaussian", {}, lambda z: np.exp(-(z**2) / 2)),
    "gaussian-scale": (
        "gaussian",
        {"scale": 2.5},
        lambda z: np.exp(-(z**2) / 2 / 2.5**2),
    ),
    "gaussian-ab": (
        "gaussian",
        {"a": 1.5, "b": -0.3},
        lambda z: 1.5 * np.exp(-0.3 * z**2),
    ),
    "gelu": ("gelu", {}, lambda z: z * scipy.special.ndtr(z)),
    "gelu-exact": (
        "gelu",
        {"approximate": False},
        lambda z: z * scipy.special.ndtr(z),
    ),
    "gelu-tanh": ("gelu", {"approximate": True}, tanh_gelu),
    "hermite": ("hermite", {}, lambda z: (z**2 - 1) / np.sqrt(2)),
    "hermite-cubic": ("hermite", {"n": 3}, lambda z: (z**3 - 3 * z) / np.sqrt(6)),
    "identity": ("identity", {}, lambda z: z),
    "laplace": ("laplace", {}, lambda z: np.exp(-np.abs(z))),
    "leaky_relu": ("leaky_relu", {}, lambda z: np.where(z > 0, z, 0.01 * z)),
    "leaky_relu-slope": (
        "leaky_relu",
        {"negative_slope": 0.2},
        lambda z: np.where(z > 0, z, 0.2 * z),
    ),
    "monomial": ("monomial", {}, lambda z: z**2),
    "monomial-cubic": ("monomial", {"n": 3}, lambda z: z**3),
    "normal_cdf": ("normal_cdf", {}, scipy.special.ndtr),
    "polynomial": ("polynomial", {}, lambda z: z**2),
    "polynomial-cubic": (
        "polynomial",
        {"coefficients": (0.0, 0.0, 0.0, -0.5)},
        lambda z: -0.5 * z**3,
    ),
    "polynomial-mixed": (
        "polynomial",
        {"coefficients": [0.5, -1.0, 0.25]},
        lambda z: 0.5 - z + 0.25 * z**2,
    ),
    "rbf": ("rbf", {}, lambda z: np.sqrt(2) * np.sin(z + np.pi / 4)),
    "rbf-gamma": (
        "rbf",
        {"gamma": 2.0},
        lambda z: np.sqrt(2) * np.sin(2 * z + np.pi / 4),
    ),
    "rectified_monomial": (
        "rectified_monomial",
        {},
        lambda z: np.maximum(z, 0) ** 2,
    ),
    "rectified_monomial-step": (
        "rectified_monomial",
        {"n": 0},
        lambda z: np.heaviside(z, 0),
    ),
    "relu": ("relu", {}, lambda z: np.maximum(z, 0)),
    "sech": ("sech", {}, lambda z: 1 / np.cosh(z)),
    "selu": ("selu", {}, lambda z: SELU_SCALE * elu(z, SELU_ALPHA)),
    "sigmoid": ("sigmoid", {}, scipy.special.expit),
    "sigmoid_like": (
        "sigmoid_like",
        {},
        lambda z: 0.5 * scipy.special.erf(z / 2.4020563531719796) + 0.5,
    ),
    "sign": ("sign", {}, np.sign),
    "silu": ("silu", {}, lambda z: z * scipy.special.expit(z)),
    "sin": ("sin", {}, np.sin),
    "sin-abc": (
        "sin",
        {"a": 0.8, "b": -2.0, "c": 0.4},
        lambda z: 0.8 * np.sin(-2 * z + 0.4),
    ),
    "softplus": ("softplus", {}, lambda z: np.logaddexp(z, 0)),
    "step": ("step", {}, lambda z: np.heaviside(z, 0)),
    "swish": ("swish", {}, lambda z: z * scipy.special.expit(z)),
    "tanh": ("tanh", {}, np.tanh),
}
KINKED = {
    *("relu", "leaky_relu", "elu", "selu", "abs", "step", "sign", "laplace"),
    "rectified_monomial",
}
SERIES = {"identity", "polynomial", "monomial", "hermite"}
every_row = pytest.mark.parametrize("label", ROWS)


def make(label):
    name, parameters, _ = ROWS[label]
    return snnk.activations.get(name, **parameters)


def labels(keep):
    return [label for label, (name, _, _) in ROWS.items() if keep(name)]


def softsign(z):
    return z / (1 + jnp.abs(z))


def shifted_relu(z):
    return jax.nn.relu(z - 0.3)


def test_every_name_has_a_reference():
    names = snnk.activations.names()
    assert set(names) == set(NAMES) == {name for name, _, _ in ROWS.values()}
    assert len(set(names)) == len(names)


@every_row
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_values(label, dtype):
    with jax.enable_x64(dtype == "float64"):
        z = jnp.asarray(Z, dtype)
        value = make(label)(z)
        assert value.dtype == z.dtype
        assert value.shape == z.shape
        expected = ROWS[label][2](np.asarray(z, np.float64))
        close = tolerance(dtype)
        if dtype == "bfloat16" and label in ("cos-abc", "sin-abc", "rbf", "rbf-gamma"):
            close["atol"] = 0.04  # the phase rounds, by 2^-8 of up to 12
        np.testing.assert_allclose(np.asarray(value, np.float64), expected, **close)


@every_row
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_are_those_of_finite_differences(label, order):
    row = make(label)
    z = Z[np.abs(Z) > 0.05] if row.kinks else Z
    step = 1e-5
    below = row.evaluate(z - step, order - 1)
    above = row.evaluate(z + step, order - 1)
    np.testing.assert_allclose(
        row.evaluate(z, order), (above - below) / (2 * step), rtol=1e-7, atol=1e-8
    )


@every_row
@pytest.mark.parametrize("dtype", slow_but(("float32",), ("float32", "bfloat16")))
def test_grad_keeps_dtype_and_shape_under_transformations(label, dtype):
    row = make(label)
    z = jnp.asarray(Z.reshape(6, 17), dtype)
    expected = row.evaluate(np.asarray(z, np.float64), order=1)
    for grad in (row.grad, jax.jit(row.grad), jax.vmap(row.grad)):
        value = grad(z)
        assert value.dtype == z.dtype
        assert value.shape == z.shape
        rounded = tolerance(dtype)
        # Products of factors of order ten cancel, in bfloat16 to a tenth.
        atol = 1e-5 if dtype == "float32" else 0.1
        np.testing.assert_allclose(
            np.asarray(value, np.float64), expected, rtol=rounded["rtol"], atol=atol
        )


@every_row
def test_gradients_are_finite_far_out(label):
    row = make(label)
    far = [0.0, -100.0] if row.name == "exp" and not ROWS[label][1] else [0, -100, 100]
    z = jnp.asarray([*far, 1e-30, -1e-30], jnp.float32)
    assert np.isfinite(row(z)).all()
    for order in (1, 2):
        assert np.isfinite(row.grad(z, order)).all()
    assert np.isfinite(jax.vmap(jax.grad(row))(z)).all()


def test_a_given_derivative_is_the_one_used():
    # Not the derivative of sin, so that it shows.
    row = Activation("sin", jnp.sin, derivative=lambda z: 3 * z * z)
    z = jnp.asarray([0.5, 2.0])
    np.testing.assert_allclose(row.grad(z, order=0), np.sin(z), rtol=1e-6)
    np.testing.assert_allclose(row.grad(z), 3 * z * z)
    np.testing.assert_allclose(row.grad(z, order=2), 6 * z)
    np.testing.assert_allclose(row.evaluate(np.asarray(z), 2), 6 * z)


@every_row
def test_atoms_are_the_function(label):
    row = make(label)
    assert bool(row.atoms) == (row.name in ("cos", "sin", "rbf"))
    if row.atoms:
        value = sum(a.amplitude * np.cos(a.frequency * Z + a.phase) for a in row.atoms)
        np.testing.assert_allclose(value, ROWS[label][2](Z), atol=1e-14)


@every_row
def test_coefficients_are_the_function(label):
    row = make(label)
    assert bool(row.coefficients) == (row.name in SERIES)
    if row.coefficients:
        value = np.polynomial.polynomial.polyval(Z, row.coefficients)
        np.testing.assert_allclose(value, ROWS[label][2](Z), rtol=1e-14)


@every_row
def test_degree_is_that_of_homogeneity(label):
    f = ROWS[label][2]
    degrees = [
        n
        for n in range(5)
        if all(np.allclose(f(c * Z), c**n * f(Z)) for c in (0.5, 3.0))
    ]
    assert [make(label).degree] == (degrees or [None])


@every_row
def test_kinks_are_where_a_low_derivative_jumps(label):
    row = make(label)
    assert row.kinks == ((0.0,) if row.name in KINKED else ())
    jumps = [np.ptp(row.evaluate(np.array([-1e-9, 1e-9]), n)) for n in range(3)]
    assert (max(jumps) > 1e-3) == bool(row.kinks)


@every_row
def test_spectrum_is_the_fourier_transform(label):
    row = make(label)
    assert (row.spectrum is not None) == (
        row.name in ("gaussian", "sech", "gabor", "laplace")
    )
    if row.spectrum is None:
        return
    spectrum = row.spectrum

    def density(s):
        return spectrum.density(np.array([s]))[0]

    for z in (-3.0, -0.5, 0.3, 1.0, 2.5):
        cosine, sine = (
            scipy.integrate.quad(density, 0, np.inf, weight=wave, wvar=z)[0]
            for wave in ("cos", "sin")
        )
        value = math.cos(spectrum.phase) * cosine - math.sin(spectrum.phase) * sine
        np.testing.assert_allclose(value, ROWS[label][2](np.float64(z)), atol=1e-7)


@pytest.mark.parametrize(
    "label", ["gaussian", "gaussian-scale", "gaussian-ab", "sech", "gabor"]
)
def test_spectrum_at_the_ends_has_no_nan(label):
    density = make(label).spectrum.density(np.array([1e-300, 1e4]))
    assert density.dtype == np.float64
    assert density[1] == 0
    assert np.isfinite(density[0])


def test_spectrum_decays_at_its_rate():
    for label in ["gaussian", "gaussian-scale", "sech", "gabor", "laplace"]:
        spectrum = make(label).spectrum
        near, further = (
            -np.diff(np.log(spectrum.density(np.array([s, s + 0.5]))))[0] / 0.5
            for s in (5.0, 10.0)
        )
        if spectrum.decay == math.inf:
            assert further > 1.5 * near > 0, label
        elif spectrum.decay == 0:
            assert 0 < further < 0.7 * near, label
        else:
            np.testing.assert_allclose([near, further], spectrum.decay, rtol=1e-6)


def factorial_power(c, j):
    """``c^j / sqrt(j!)``."""
    return np.exp(j * np.log(c) - scipy.special.gammaln(j + 1) / 2)


def relu_coefficients(c, j):
    even = (j >= 2) & (j % 2 == 0)
    value = np.where(
        even,
        (-1.0) ** (j // 2 + 1)
        * scipy.special.factorial2(np.maximum(j - 3, 1))
        / np.sqrt(2 * np.pi * scipy.special.factorial(j)),
        0.0,
    )
    value[:2] = 1 / math.sqrt(2 * math.pi), 0.5
    return c * value


def wave_coefficients(c, j, phase):
    """Of ``cos(z + phase)``."""
    wave = np.cos(phase + j * np.pi / 2)
    return math.exp(-(c**2) / 2) * factorial_power(c, j) * wave


HERMITE = {
    "relu": relu_coefficients,
    "abs": lambda c, j: relu_coefficients(c, j) * np.where(j % 2, 0, 2),
    "exp": lambda c, j: math.exp(c**2 / 2) * factorial_power(c, j),
    "cos": lambda c, j: wave_coefficients(c, j, 0.0),
    "sin": lambda c, j: wave_coefficients(c, j, -np.pi / 2),
    "polynomial": lambda c, j: c**2 * ((j == 0) + math.sqrt(2) * (j == 2)),
    "identity": lambda c, j: c * (j == 1),
}


@pytest.mark.parametrize("name", HERMITE)
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_hermite_against_closed_forms(name, scale):
    value = snnk.activations.get(name).hermite(64, scale)
    expected = HERMITE[name](scale, np.arange(64))
    np.testing.assert_allclose(value, expected, atol=1e-13 * np.abs(expected).max())


def test_hermite_where_the_mean_is_far_out():
    value = snnk.activations.get("exp").hermite(64, 12.0)
    np.testing.assert_allclose(value, HERMITE["exp"](12.0, np.arange(64)), rtol=1e-12)


def test_hermite_of_narrow_and_fast_functions():
    for b in (1e-2, 30.0, 1e3):
        wave = snnk.activations.get("cos", b=b).hermite(8)
        expected = wave_coefficients(b, np.arange(8), 0.0)
        np.testing.assert_allclose(wave, expected, atol=1e-13)
    for width in (1e-5, 1e-3, 1e3):
        bump = snnk.activations.get("gaussian", scale=width).hermite(1, 2.0)
        np.testing.assert_allclose(bump, 1 / np.sqrt(1 + 4 / width**2), rtol=1e-12)


@pytest.mark.parametrize("label", labels(lambda name: name not in KINKED))
def test_hermite_of_smooth_rows_keeps_the_power(label):
    f = ROWS[label][2]
    scale = 0.5
    power, _ = scipy.integrate.quad(
        lambda g: f(np.float64(scale * g)) ** 2 * scipy.stats.norm.pdf(g),
        *(-15, 15),
        epsabs=1e-13,
        limit=200,
    )
    coefficients = make(label).hermite(64, scale)
    assert coefficients.dtype == np.float64
    np.testing.assert_allclose(np.sum(coefficients**2), power, rtol=1e-11)


@pytest.mark.parametrize("label", labels(lambda name: name in KINKED))
@pytest.mark.parametrize("j", [0, 1, 2, 7])
def test_hermite_of_kinked_rows_by_quadrature(label, j):
    f = ROWS[label][2]
    scale = 1.7

    def integrand(g):
        polynomial = scipy.special.eval_hermitenorm(j, g) / math.sqrt(math.factorial(j))
        return f(np.float64(scale * g)) * polynomial * scipy.stats.norm.pdf(g)

    expected = sum(
        scipy.integrate.quad(integrand, *ends, epsabs=1e-13, limit=200)[0]
        for ends in ((-15, 0), (0, 15))
    )
    value = make(label).hermite(8, scale)[j]
    np.testing.assert_allclose(value, expected, atol=1e-12)


def test_hermite_is_kept_and_read_only():
    row = snnk.activations.get("gaussian", scale=0.7)
    first = row.hermite(5, 1.3)
    assert snnk.activations.get("gaussian", scale=0.7).hermite(5, 1.3) is first
    assert first.shape == (5,)
    np.testing.assert_allclose(row.hermite(3, 1.3), first[:3], atol=1e-14)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


@every_row
def test_rows_hash_by_value(label):
    row = make(label)
    assert make(label) == row
    for twin in (make(label), copy.deepcopy(row), pickle.loads(pickle.dumps(row))):
        assert twin == row
        assert hash(twin) == hash(row)
    assert snnk.activations.get(row) is row
    assert dataclasses.replace(row, name="other") != row


def test_rows_of_other_parameters_differ():
    rows = {make(label) for label in ROWS}
    # Two aliases: swish, and the explicit form of gelu's default.
    assert len(rows) == len(ROWS) - 2
    assert snnk.activations.get("swish") == snnk.activations.get("silu")
    assert make("gelu") == make("gelu-exact")
    row = snnk.activations.get("sin", a=2.0, b=3.0)
    assert row.atoms == (Atom(3.0, 2.0, -np.pi / 2),)
    assert row != snnk.activations.get("sin", a=2.0, b=3.5)


def test_equal_rows_compile_once():
    counted = count_traces(lambda z, row: row.grad(z))
    compiled = jax.jit(counted, static_argnums=1)
    for _ in range(2):
        compiled(jnp.ones(3), snnk.activations.get("gaussian", scale=2.0))
    assert counted.traces == 1


def test_parameters_of_numpy_impose_no_dtype():
    z = jnp.ones(3, jnp.bfloat16)
    for name in ("exp", "cos", "erf"):
        row = snnk.activations.get(name, b=np.float64(0.5))
        assert row(z).dtype == jnp.bfloat16
        assert row == snnk.activations.get(name, b=0.5)
    row = snnk.activations.get("polynomial", coefficients=tuple(np.array([0.5, 2.0])))
    assert row(z).dtype == jnp.bfloat16
    assert row == snnk.activations.get("polynomial", coefficients=(0.5, 2.0))


def test_user_functions():
    row = snnk.activations.get(softsign)
    assert row == Activation("softsign", softsign)
    assert row == snnk.activations.get(softsign)
    assert (row.atoms, row.degree, row.spectrum) == ((), None, None)
    assert (row.kinks, row.coefficients, row.derivative) == ((), (), None)
    assert float(row(jnp.array(1.0))) == 0.5
    np.testing.assert_allclose(row.grad(jnp.array([1.0, -3.0])), [0.25, 0.0625])
    np.testing.assert_allclose(row.evaluate(np.array([1.0]), order=2), [-0.25])


def test_hermite_of_a_jump_not_declared():
    jump = Activation("jump", lambda z: jnp.sign(z - 0.3))
    expected = [1 - 2 * scipy.stats.norm.cdf(0.3), 2 * scipy.stats.norm.pdf(0.3)]
    np.testing.assert_allclose(jump.hermite(2), expected, atol=1e-13)


def test_hermite_of_a_user_function_with_a_kink_not_declared():
    c, t = 1.3, 0.3
    normal = scipy.stats.norm
    expected = [
        c * normal.pdf(t / c) - t * normal.sf(t / c),
        c * normal.sf(t / c),
        c * normal.pdf(t / c) / math.sqrt(2),
    ]
    value = snnk.activations.get(shifted_relu).hermite(3, c)
    np.testing.assert_allclose(value, expected, atol=1e-13)


def test_evaluate_is_float64_whatever_the_default():
    row = snnk.activations.get("tanh")
    assert not jax.config.jax_enable_x64
    z = np.array([[0.1, 2.0]])
    value = row.evaluate(z)
    assert value.dtype == np.float64
    assert value.shape == z.shape
    np.testing.assert_allclose(value, np.tanh(z), rtol=1e-15)
    slope = row.evaluate(z.astype(np.float32), order=1)
    np.testing.assert_allclose(slope, 1 - np.tanh(z.astype(np.float32)) ** 2, rtol=1e-6)
    assert slope.dtype == np.float64
    value[0] = 0.0  # the caller's own
    assert jnp.ones(()).dtype == jnp.float32


@every_row
def test_evaluate_and_hermite_while_tracing(label):
    row = make(label)
    seen = []

    def f(z):
        seen.append((row.evaluate(Z), row.evaluate(Z, 1), row.hermite(4, 0.77)))
        return row(z).sum()

    z = jnp.asarray(Z, jnp.float32)
    value = jax.jit(jax.value_and_grad(f))(z)[0]
    assert value.dtype == jnp.float32
    values, slopes, coefficients = seen[0]
    np.testing.assert_allclose(values, ROWS[label][2](Z), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(slopes, row.evaluate(Z, 1))
    twin = dataclasses.replace(row, name="twin")  # not the kept one
    np.testing.assert_array_equal(coefficients, twin.hermite(4, 0.77))


@pytest.mark.usefixtures("unchecked")
def test_wrong_names_and_parameters_are_refused():
    get = snnk.activations.get
    with pytest.raises(ValueError, match=r"must be one of .*gelu.*Did you mean 'gelu'"):
        get("gellu")
    with pytest.raises(ValueError, match=r"Got 'qqq'\.$"):
        get("qqq")
    with pytest.raises(ValueError, match=r"parameters must be those of cos.*'d'"):
        get("cos", d=1.0)
    with pytest.raises(ValueError, match=r"parameters must be absent: tanh has none."):
        get("tanh", a=1.0)
    with pytest.raises(ValueError, match="parameters must come with a name"):
        get(softsign, a=1.0)
    with pytest.raises(ValueError, match="a name, an Activation or a function. Got 3"):
        get(3)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale must be positive and finite. Got"):
            get("gaussian", scale=scale)
    for b in (0.0, 1.0, -math.inf, math.nan):
        with pytest.raises(ValueError, match="b must be negative and finite. Got"):
            get("gaussian", b=b)
    with pytest.raises(ValueError, match="scale must be absent if b is given. Got 1"):
        get("gaussian", scale=1.0, b=-1.0)
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma must be positive and finite. Got"):
            get("rbf", gamma=gamma)
    for name in ("monomial", "hermite", "rectified_monomial"):
        for n in (-1, 1.5):
            with pytest.raises(ValueError, match="n must be an integer of at least 0"):
                get(name, n=n)
        assert get(name, n=3.0) == get(name, n=3)
    with pytest.raises(ValueError, match="keep hermite in the range of numbers"):
        get("hermite", n=200)
    with pytest.raises(ValueError, match="coefficients must have at least one entry"):
        get("polynomial", coefficients=())
    with pytest.raises(ValueError, match="coefficients must be finite. Got"):
        get("polynomial", coefficients=(1.0, math.inf))


@pytest.mark.usefixtures("unchecked")
def test_wrong_fields_are_refused():
    with pytest.raises(ValueError, match="fn must be callable. Got 3"):
        Activation("three", 3)
    with pytest.raises(ValueError, match="derivative must be callable or None. Got 3"):
        Activation("three", softsign, derivative=3)
    for kinks in ((1.0, 0.0), (0.0, 0.0), (math.nan,), (0.0, math.inf)):
        with pytest.raises(ValueError, match="kinks must be finite and increase. Got"):
            Activation("softsign", softsign, kinks=kinks)
    with pytest.raises(ValueError, match="density must be callable. Got 3"):
        Spectrum(3)
    with pytest.raises(ValueError, match="phase must be finite. Got nan"):
        Spectrum(np.exp, phase=math.nan)
    for decay in (-1.0, math.nan):
        with pytest.raises(ValueError, match="decay must be at least 0. Got"):
            Spectrum(np.exp, decay=decay)


def test_wrong_orders_and_scales_are_refused():
    row = snnk.activations.get("exp")
    with pytest.raises(ValueError, match="order must be at least 0. Got -1"):
        row.grad(jnp.ones(2), -1)
    with pytest.raises(ValueError, match="order must be at least 0. Got -1"):
        row.evaluate(np.ones(2), -1)
    with pytest.raises(ValueError, match="num must be at least 1. Got 0"):
        row.hermite(0)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale must be positive and finite. Got"):
            row.hermite(2, scale)


def test_functions_without_hermite_coefficients_are_refused():
    get = snnk.activations.get
    with pytest.raises(ValueError, match="finite Hermite coefficients. Got 'exp' at"):
        get("exp").hermite(4, 30.0)
    with pytest.raises(ValueError, match="finite Hermite coefficients. Got 'log' at"):
        Activation("log", jnp.log).hermite(4)
    with pytest.raises(ValueError, match="smooth enough for quadrature. Got 'cos' at"):
        get("cos", b=1e6).hermite(2)
