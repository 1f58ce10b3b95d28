import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from sklearn.linear_model import LogisticRegression, PoissonRegressor

import snnk_jax as snnk
from snnk_jax.ridge import ConvergenceWarning, _glm, fit_glm
from snnk_jax.testing import count_traces

LOSSES = ("logistic", "poisson")
NUM, WIDTH = 301, 6


def make(loss, outputs=2, seed=0, mean=1.0):
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(NUM, WIDTH)).astype("float32")
    eta = phi @ rng.normal(size=(WIDTH, outputs)) * 0.7 + 0.3
    if loss == "logistic":
        y = rng.uniform(size=eta.shape) < special.expit(eta)
    else:
        y = rng.poisson(np.exp(eta))
    return jnp.asarray(phi + np.float32(mean)), jnp.asarray(y, "float32")


def objective(coefficients, phi, y, weights, loss, l2):
    """The objective of the docstring, in float64, written for jax.grad."""
    kernel, bias = coefficients
    eta = phi @ kernel + bias[None]
    link = jax.nn.softplus(eta) if loss == "logistic" else jnp.exp(eta)
    mean = weights @ (link - y * eta) / jnp.sum(weights)
    return jnp.sum(mean) + l2 / 2 * jnp.sum(kernel**2)


def doubles(*arrays):
    return [jnp.asarray(np.asarray(a), "float64") for a in arrays]


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_logistic_equals_scikit_learn(l2, intercept):
    phi, y = make("logistic")
    solution = fit_glm(phi, y, loss="logistic", l2=l2, intercept=intercept)
    assert solution.converged.all()
    for i in range(2):
        other = LogisticRegression(
            C=1 / (l2 * NUM), fit_intercept=intercept, tol=1e-10, max_iter=1000
        ).fit(np.asarray(phi, float), np.asarray(y[:, i]))
        np.testing.assert_allclose(solution.kernel[:, i], other.coef_[0], atol=1e-5)
        np.testing.assert_allclose(solution.bias[i], other.intercept_, atol=1e-5)
        expected = other.predict_proba(np.asarray(phi, float))[:, 1]
        np.testing.assert_allclose(solution.mean(phi)[:, i], expected, atol=1e-5)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_poisson_equals_scikit_learn(l2, intercept):
    phi, y = make("poisson")
    weights = jnp.asarray(np.random.default_rng(1).uniform(size=NUM), "float32")
    solution = fit_glm(
        phi, y, loss="poisson", l2=l2, weights=weights, intercept=intercept
    )
    assert solution.converged.all()
    for i in range(2):
        other = PoissonRegressor(
            alpha=l2, fit_intercept=intercept, tol=1e-10, solver="newton-cholesky"
        ).fit(np.asarray(phi, float), np.asarray(y[:, i]), np.asarray(weights))
        np.testing.assert_allclose(solution.kernel[:, i], other.coef_, atol=1e-5)
        np.testing.assert_allclose(solution.bias[i], other.intercept_, atol=1e-5)
        expected = other.predict(np.asarray(phi, float))
        np.testing.assert_allclose(solution.mean(phi)[:, i], expected, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("intercept", [True, False])
def test_the_gradient_is_zero_at_the_solution(loss, intercept):
    phi, y = make(loss, outputs=3)
    weights = jnp.asarray(np.random.default_rng(1).uniform(size=NUM), "float32")
    if loss == "logistic":
        y = 0.1 + 0.8 * y  # probabilities
    with jax.enable_x64(True):
        phi, y, weights = doubles(phi, y, weights)
        solution = fit_glm(
            phi, y, loss=loss, l2=0.01, weights=weights, intercept=intercept
        )
        assert solution.kernel.dtype == jnp.float64
        args = (phi, y, weights, loss, 0.01)
        start = (jnp.zeros((WIDTH, 3)), jnp.zeros(3))
        coefficients = (solution.kernel, solution.bias)
        slope, bias_slope = jax.grad(objective)(coefficients, *args)
        assert np.abs(jax.grad(objective)(start, *args)[0]).max() > 0.1
        np.testing.assert_allclose(slope, 0, atol=1e-12)
        if intercept:
            np.testing.assert_allclose(bias_slope, 0, atol=1e-12)
        else:
            np.testing.assert_array_equal(solution.bias, 0)
        total = objective(coefficients, *args)
        np.testing.assert_allclose(solution.objective.sum(), total, rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_chunk_size_changes_nothing(loss):
    phi, y = make(loss, mean=100.0)
    whole = fit_glm(phi, y, loss=loss, l2=1e-3)
    for size in (7, 100, NUM):
        parts = fit_glm(phi, y, loss=loss, l2=1e-3, chunk_size=size)
        np.testing.assert_allclose(parts.kernel, whole.kernel, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(parts.bias, whole.bias, rtol=1e-6)
        np.testing.assert_allclose(parts.objective, whole.objective, rtol=1e-12)
        np.testing.assert_allclose(
            parts.standard_errors, whole.standard_errors, rtol=1e-6
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_are_repetitions(loss):
    phi, y = make(loss)
    counts = np.random.default_rng(2).integers(0, 4, size=NUM)
    weighted = fit_glm(
        phi, y, loss=loss, l2=0.01, weights=jnp.asarray(counts, "float32")
    )
    index = np.repeat(np.arange(NUM), counts)
    repeated = fit_glm(phi[index], y[index], loss=loss, l2=0.01)
    np.testing.assert_allclose(weighted.kernel, repeated.kernel, rtol=1e-5)
    np.testing.assert_allclose(weighted.bias, repeated.bias, rtol=1e-5)
    np.testing.assert_allclose(weighted.objective, repeated.objective, rtol=1e-10)
    np.testing.assert_allclose(
        weighted.standard_errors, repeated.standard_errors, rtol=1e-6
    )


def test_rows_of_no_weight_do_not_count():
    phi, y = make("poisson")
    weights = jnp.ones(NUM).at[:5].set(0.0)
    spoilt = phi.at[:5].set(1e30), y.at[:5].set(1e30)
    solution = fit_glm(*spoilt, loss="poisson", l2=0.01, weights=weights)
    expected = fit_glm(phi[5:], y[5:], loss="poisson", l2=0.01)
    assert solution.converged.all()
    np.testing.assert_allclose(solution.objective, expected.objective, rtol=1e-10)


def test_features_are_computed_on_the_way():
    x, y = make("logistic")
    fm = snnk.features.ArcCosine(num_features=16)
    counted = count_traces(lambda params, x: fm.phi(params, x["a"] - x["b"]))
    inputs = {"a": x, "b": jnp.ones_like(x)}
    for seed in range(2):
        params = fm.init(jax.random.key(seed), WIDTH)
        whole = fit_glm(fm.phi(params, x - 1), y, loss="logistic", l2=1e-2)
        parts = fit_glm(
            inputs,
            y,
            loss="logistic",
            l2=1e-2,
            phi=functools.partial(counted, params),
            chunk_size=64,
        )
        np.testing.assert_allclose(parts.kernel, whole.kernel, atol=1e-5)
        np.testing.assert_allclose(parts.bias, whole.bias, atol=1e-5)
    assert counted.traces == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_the_objective_never_rises(loss):
    phi, y = make(loss, outputs=1)
    if loss == "poisson":
        # A full first step would take the loss of the first row from 2 to e^91.
        phi = jnp.zeros((100, 1)).at[0].set(1.0)
        y = jnp.full((100, 1), 1e-3).at[0].set(5.0)
    solutions = []
    for steps in range(1, 15):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            solution = fit_glm(phi, y, loss=loss, l2=1e-4, max_steps=steps)
        assert bool(caught) == (not solution.converged[0])
        assert solution.steps[0] <= steps
        solutions.append(solution)
    values = [solution.objective[0] for solution in solutions]
    assert not solutions[0].converged[0]
    assert solutions[0].steps[0] == 1
    assert solution.converged[0]
    assert values[0] > values[-1]
    assert np.all(np.diff(values) <= 1e-12 * (1 + abs(values[-1])))


def test_overflowing_steps_are_halved(monkeypatch):
    # The first full step takes the linear predictor of the first row to 1400.
    phi = jnp.zeros((2000, 1)).at[0].set(1.0)
    y = jnp.full((2000, 1), 1e-3).at[0].set(5.0)
    overflowed = []

    def evaluate(*args):
        point = original(*args)
        overflowed.append(point is None)
        return point

    original = _glm._evaluate
    monkeypatch.setattr(_glm, "_evaluate", evaluate)
    solution = fit_glm(phi, y, loss="poisson", l2=0.0)
    assert overflowed[1]
    assert solution.converged[0]
    np.testing.assert_allclose(solution.mean(phi), y, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_standard_errors_are_the_fisher_information(loss):
    phi, y = make(loss)
    l2 = 0.02
    solution = fit_glm(phi, y, loss=loss, l2=l2)
    z = np.concatenate([np.asarray(phi, float), np.ones((NUM, 1))], axis=1)
    penalty = l2 * NUM * np.diag([1.0] * WIDTH + [0.0])
    for i in range(2):
        mean = np.asarray(solution.mean(phi)[:, i], float)
        variance = mean * (1 - mean) if loss == "logistic" else mean
        information = z.T @ (variance[:, None] * z)
        inverse = np.linalg.inv(information + penalty)
        expected = np.sqrt(np.diag(inverse @ information @ inverse)[:-1])
        np.testing.assert_allclose(solution.standard_errors[:, i], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_standard_errors_cover_the_truth(loss):
    rng = np.random.default_rng(3)
    phi = rng.normal(size=(1000, 3)).astype("float32")
    kernel = np.array([[0.5], [-0.3], [0.0]])
    eta = phi @ kernel - 0.5
    scores = []
    for _ in range(200):
        if loss == "logistic":
            y = rng.uniform(size=eta.shape) < special.expit(eta)
        else:
            y = rng.poisson(np.exp(eta))
        solution = fit_glm(
            jnp.asarray(phi), jnp.asarray(y, "float32"), loss=loss, l2=0.0
        )
        scores.append((solution.kernel - kernel) / solution.standard_errors)
    # A variance of 600 values is within 4 * sqrt(2 / 600) of 1.
    assert abs(np.var(scores) - 1) < 0.24
    assert abs(np.mean(scores)) < 4.5 / np.sqrt(600)


def test_complete_separation_is_reported():
    phi, _ = make("logistic")
    y = jnp.stack([phi[:, 0] > 1, phi[:, 0] + phi[:, 1] > 4], axis=1)
    y = y.astype("float32")
    y = y.at[0, 1].set(1 - y[0, 1])  # the second: but for one row
    with pytest.warns(ConvergenceWarning, match="y.:, .0.. have no minimum"):
        solution = fit_glm(phi, y, loss="logistic", l2=0.0)
    assert solution.converged.tolist() == [False, True]
    assert np.isfinite(solution.kernel).all()
    assert np.all((solution(phi)[:, 0] > 0) == (y[:, 0] == 1))
    # The least penalty makes it finite.
    assert fit_glm(phi, y, loss="logistic", l2=1e-8).converged.all()


@pytest.mark.parametrize("loss", LOSSES)
def test_quasi_complete_separation_does_not_pass_for_convergence(loss):
    phi, y = make(loss, outputs=1)
    group = (np.arange(NUM) % 10 == 0).astype("float32")[:, None]
    phi = jnp.concatenate([phi, jnp.asarray(group)], axis=1)
    y = jnp.where(group > 0, 1.0 if loss == "logistic" else 0.0, y).astype("float32")
    with pytest.warns(ConvergenceWarning, match="did not converge in max_steps=50"):
        solution = fit_glm(phi, y, loss=loss, l2=0.0)
    assert not solution.converged[0]
    assert np.isfinite(solution.kernel).all()
    assert np.isnan(solution.standard_errors).all()
    assert abs(solution.kernel[-1, 0]) > 20


@pytest.mark.parametrize("loss", LOSSES)
def test_collinear_features_without_a_penalty(loss):
    phi, y = make(loss, outputs=1)
    plain = fit_glm(phi, y, loss=loss, l2=0.0)
    constant = jnp.full((NUM, 1), 3.0)
    wide = jnp.concatenate([phi, phi[:, :2], constant], axis=1)
    doubled = fit_glm(wide, y, loss=loss, l2=0.0)
    assert doubled.converged[0]
    np.testing.assert_allclose(doubled.objective, plain.objective, rtol=1e-10)
    np.testing.assert_allclose(doubled(wide), plain(phi), atol=1e-4)
    assert np.isfinite(plain.standard_errors).all()
    assert np.isnan(doubled.standard_errors).all()


def test_more_features_than_rows():
    rng = np.random.default_rng(4)
    phi = jnp.asarray(rng.normal(size=(40, 100)), "float32")
    y = jnp.asarray(1 + rng.poisson(3.0, size=(40, 1)), "float32")
    solution = fit_glm(phi, y, loss="poisson", l2=0.0)
    assert solution.converged[0]
    np.testing.assert_allclose(solution.mean(phi), y, rtol=1e-4)


def test_features_of_nothing():
    _, y = make("logistic", outputs=1)
    solution = fit_glm(jnp.zeros((NUM, 2)), y, loss="logistic", l2=0.0)
    assert solution.converged[0]
    np.testing.assert_array_equal(solution.kernel, 0)
    mean = float(y.mean())
    np.testing.assert_allclose(solution.bias[0], special.logit(mean), rtol=1e-5)


def test_a_large_mean_costs_no_digits():
    phi, y = make("logistic", outputs=1, mean=0.0)
    near = fit_glm(phi, y, loss="logistic", l2=0.0)
    with jax.enable_x64(True):
        far_phi, y64 = doubles(phi, y)
        far = fit_glm(far_phi + 1e6, y64, loss="logistic", l2=0.0)
    assert far.converged[0]
    np.testing.assert_allclose(far.kernel, near.kernel, atol=1e-6)


def test_bfloat16_and_any_batch():
    phi, y = make("logistic")
    half = phi.astype("bfloat16")
    solution = fit_glm(half, y, loss="logistic", l2=0.1)
    same = fit_glm(half.astype("float32"), y, loss="logistic", l2=0.1)
    np.testing.assert_array_equal(solution.kernel, same.kernel)
    assert solution.mean(half).dtype == jnp.bfloat16
    batch = phi[:6].reshape(2, 3, WIDTH)
    np.testing.assert_allclose(
        solution(batch).reshape(6, 2), solution(phi[:6]), rtol=1e-5, atol=1e-6
    )
    assert solution(phi[0]).shape == (2,)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    phi, y = make("logistic")
    fit = functools.partial(fit_glm, loss="logistic", l2=0.1)
    for match, call in {
        "loss must be logistic or poisson. Got 'hinge'": lambda: fit(
            phi, y, loss="hinge"
        ),
        "l2 must be at least 0": lambda: fit(phi, y, l2=-1.0),
        "chunk_size must be at least 1": lambda: fit(phi, y, chunk_size=0),
        "max_steps must be at least 1": lambda: fit(phi, y, max_steps=0),
        "tolerance must be positive": lambda: fit(phi, y, tolerance=0.0),
        r"y must be \[n, o\]": lambda: fit(phi, y[:, 0]),
        "same number of rows": lambda: fit(phi[:-1], y),
        "y must be floating": lambda: fit(phi, y.astype("int32")),
        "weights must be .301.": lambda: fit(phi, y, weights=y[1:, 0]),
        "weights must be finite and not": lambda: fit(phi, y, weights=-y[:, 0]),
        "nor all zero": lambda: fit(phi, y, weights=0 * y[:, 0]),
        r"finite and in \[0, 1\]. Got values from 0.0 to 2.0": lambda: fit(phi, 2 * y),
        "finite and at least 0": lambda: fit(phi, -y, loss="poisson"),
        "y must be finite": lambda: fit(phi, y.at[3].set(jnp.nan)),
        "both classes in every column": lambda: fit(phi, y.at[:, 1].set(1)),
        "a count above 0": lambda: fit(phi, y.at[:, 1].set(0), loss="poisson"),
        "features must be finite": lambda: fit(phi.at[300, 2].set(jnp.inf), y),
        r"phi must map 301 rows to \[301, m\]": lambda: fit(
            phi, y, phi=lambda x: x[:, 0]
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    # One class among rows that count; and it is fine without an intercept.
    with pytest.raises(ValueError, match="both classes"):
        fit(phi, y, weights=y[:, 1])
    assert fit(phi, y.at[:, 1].set(1), intercept=False).converged.all()
