"""Solutions against scipy and scikit-learn, criteria against refits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

import snnk_jax as snnk
from snnk_jax import ridge
from snnk_jax.ridge import _factor
from snnk_jax.ridge._rows import RowSpectrum, centred_rows


def of(problem, rows=slice(None), weights=None):
    phi, y = problem.phi[rows], problem.y[rows]
    w = None if weights is None else jnp.asarray(weights[rows])
    stats = ridge.init(phi.shape[1], y.shape[1])
    return ridge.update(stats, jnp.asarray(phi), jnp.asarray(y), w)


def jnp_rows(problem, rows=slice(None)):
    return jnp.asarray(problem.phi[rows]), jnp.asarray(problem.y[rows])


@pytest.mark.parametrize("method", ["auto", "cholesky", "eigh"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_coefficients_are_scikit_learns(make_problem, method, intercept, weighted):
    problem = make_problem()
    weights = problem.weights if weighted else None
    solution = ridge.solve(
        of(problem, weights=weights), 0.02, intercept=intercept, method=method
    )
    total = weights.sum() if weighted else len(problem.y)
    model = Ridge(alpha=0.02 * total, fit_intercept=intercept)
    model.fit(problem.phi.astype(float), problem.y.astype(float), weights)
    np.testing.assert_allclose(solution.kernel.T, model.coef_, atol=2e-6)
    np.testing.assert_allclose(solution.bias, model.intercept_ * intercept, atol=2e-5)
    phi = jnp.asarray(problem.phi)
    np.testing.assert_allclose(
        solution(phi), model.predict(problem.phi), rtol=1e-5, atol=1e-4
    )
    w = np.ones(300) if weights is None else weights
    error = (problem.y - np.asarray(solution(phi), np.float64)) ** 2
    np.testing.assert_allclose(solution.residual, w @ error / total, rtol=1e-3)
    assert solution.method == ("eigh" if method == "eigh" else "cholesky")


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
@pytest.mark.parametrize("penalty", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("m", [16, 128])
def test_digits_above_the_stated_penalty(make_problem, condition, penalty, m):
    problem = make_problem(n=6000, m=m, condition=condition, seed=m)
    z = problem.phi - problem.phi.mean(axis=0)
    top = np.linalg.norm(z.astype(np.float64), 2) ** 2
    l2 = penalty * top / len(z)
    kernel, _, _ = problem.coefficients(l2)
    solution = ridge.solve(
        ridge.update_chunks(ridge.init(m, 3), *jnp_rows(problem), chunk_size=2048), l2
    )
    error = np.linalg.norm(solution.kernel - kernel) / np.linalg.norm(kernel)
    assert error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "n",
    [pytest.param(6000, marks=pytest.mark.slow), 20_000],
    ids=["compiled", "blas"],
)
def test_digits_of_wide_features(make_problem, n):
    problem = make_problem(n=n, m=1024, condition=1e6)
    z = problem.phi - problem.phi.mean(axis=0)
    l2 = 1e-4 * float(np.linalg.norm(z.T @ z, 2)) / n
    kernel, _, _ = problem.coefficients(l2)
    stats = ridge.update_chunks(ridge.init(1024, 3), *jnp_rows(problem))
    error = ridge.solve(stats, l2).kernel - kernel
    assert np.linalg.norm(error) < 1e-4 * np.linalg.norm(kernel)


def test_a_warning_below_it(make_problem):
    problem = make_problem(n=2000, condition=1e6)
    stats = of(problem)
    top = float(np.linalg.norm(problem.phi - problem.phi.mean(axis=0), 2)) ** 2 / 2000
    with pytest.warns(ridge.PrecisionWarning, match="Raise l2, or gather"):
        ridge.solve(stats, 1e-5 * top)
    ridge.solve(of(make_problem()), 0.0)  # a good matrix needs no penalty


def test_a_singular_matrix_is_solved_by_its_eigenvectors(make_problem):
    problem = make_problem(n=200, m=6)
    double = dataclasses.replace(problem, phi=np.tile(problem.phi, (1, 2)))
    with pytest.warns(ridge.PrecisionWarning):
        solution = ridge.solve(of(double), 0.0)
    assert solution.method == "eigh"
    single = ridge.solve(of(problem), 0.0)
    np.testing.assert_allclose(
        solution(jnp.asarray(double.phi)), single(jnp.asarray(problem.phi)), atol=1e-3
    )
    # The least norm shares the coefficients out.
    np.testing.assert_allclose(solution.kernel[:6], solution.kernel[6:], atol=1e-3)
    with pytest.raises(ValueError, match="positive definite .* Got 0.0"):
        ridge.solve(of(double), 0.0, method="cholesky")


@pytest.mark.parametrize("block", [3, 7, 20, 40])
def test_blocks_of_the_factor_do_not_matter(monkeypatch, block):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 20))
    gram = z.T @ z
    monkeypatch.setattr(_factor, "_BLOCK", block)
    found = _factor.cholesky(gram.copy(), 0.5)
    whole = gram + 0.5 * np.eye(20)
    np.testing.assert_allclose(np.tril(found.lower), np.linalg.cholesky(whole))
    b = rng.normal(size=(20, 3))
    np.testing.assert_allclose(found.solve(b), np.linalg.solve(whole, b))
    # Not positive in the last block only.
    gram[-1, -1] = -9.0
    assert _factor.cholesky(gram, 0.5) is None


@pytest.mark.slow
def test_a_matrix_as_wide_as_openblas_crashes_at():
    """It did with several threads, in the process that runs the test."""
    gram = np.zeros((16384, 16384))
    gram[np.diag_indices(16384)] = 2.0
    found = _factor.cholesky(gram, 1.0)
    np.testing.assert_allclose(found.solve(np.ones((16384, 1))), 1 / 3)


def test_condition_numbers_are_those_of_the_matrix(make_problem):
    problem = make_problem(n=500, condition=1e4)
    z = (problem.phi - problem.phi.mean(axis=0)).astype(np.float64)
    l2 = 1e-3
    exact = np.linalg.cond(z.T @ z + l2 * 500 * np.eye(20))
    for method in ("cholesky", "eigh"):
        found = ridge.solve(of(problem), l2, method=method).condition
        np.testing.assert_allclose(found, exact, rtol=0.2)


@pytest.mark.parametrize("method", ["cholesky", "eigh", "fit", "dual"])
@pytest.mark.parametrize("weighted", [True, False])
def test_errors_and_degrees_of_freedom(make_problem, method, weighted):
    problem = make_problem(n=300 if method != "dual" else 15)
    n = len(problem.y)
    weights = problem.weights if weighted else np.ones(n, np.float32)
    l2 = 0.05
    if method in ("fit", "dual"):
        solution = ridge.fit(*jnp_rows(problem), l2, jnp.asarray(weights))
        assert solution.method == ("dual" if method == "dual" else "cholesky")
    else:
        solution = ridge.solve(of(problem, weights=weights), l2, method=method)
    w = weights.astype(np.float64)
    z = problem.phi - w @ problem.phi / w.sum()
    root = np.sqrt(w)[:, None] * z
    inverse = np.linalg.inv(root.T @ root + l2 * w.sum() * np.eye(20))
    hat = np.diagonal(root @ inverse @ root.T) + w / w.sum()
    np.testing.assert_allclose(solution.dof, hat.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        solution.leverage(jnp.asarray(problem.phi), jnp.asarray(weights)),
        hat,
        atol=1e-5,
    )
    sandwich = np.diagonal(inverse @ root.T @ root @ inverse)
    variance = solution.residual * w.sum() / (n - hat.sum())
    np.testing.assert_allclose(
        solution.standard_errors(),
        np.sqrt(sandwich[:, None] * variance),
        rtol=1e-3,
    )
    gcv = solution.residual.mean() / (1 - hat.sum() / n) ** 2
    np.testing.assert_allclose(solution.gcv, gcv, rtol=1e-5)


def test_standard_errors_are_the_spread_of_refits(make_problem):
    problem = make_problem(n=80, m=4, o=1)
    rng = np.random.default_rng(1)
    found, stated = [], []
    signal = problem.phi @ np.ones((4, 1), np.float32)
    for _ in range(400):
        y = jnp.asarray(signal + rng.normal(size=(80, 1)).astype(np.float32))
        solution = ridge.fit(jnp.asarray(problem.phi), y, 0.01)
        found.append(np.asarray(solution.kernel))
        stated.append(solution.standard_errors())
    # The deviation of a deviation of 400 draws is 3.5 per cent.
    np.testing.assert_allclose(
        np.mean(stated, axis=0), np.std(found, axis=0), rtol=0.15
    )


@pytest.mark.parametrize("how", ["solve", "fit", "dual"])
def test_left_out_residuals_are_those_of_refits(make_problem, how):
    problem = make_problem(n=25 if how == "dual" else 60, m=30 if how == "dual" else 8)
    n, l2 = len(problem.y), 0.1
    phi, y = jnp_rows(problem)
    solution = ridge.solve(of(problem), l2) if how == "solve" else ridge.fit(phi, y, l2)
    found = ridge.leave_one_out(solution, phi, y)
    for i in (0, 7, n - 1):
        rest = np.delete(np.arange(n), i)
        kernel, bias, _ = dataclasses.replace(
            problem, phi=problem.phi[rest], y=problem.y[rest]
        ).coefficients(l2 * n / (n - 1))  # the same lambda
        expected = problem.y[i] - problem.phi[i] @ kernel - bias
        np.testing.assert_allclose(found[i], expected, rtol=1e-3, atol=1e-4)
    half = ridge.leave_one_out(solution, phi[:10], y[:10])
    np.testing.assert_allclose(half, found[:10], rtol=1e-6)


@pytest.mark.parametrize("l2", [1e-2, 1e-6, 1e-8, 1e-10, 1e-14, 0.0])
@pytest.mark.parametrize(
    ("weighted", "intercept"), [(True, True), (False, True), (False, False)]
)
def test_left_out_residuals_keep_their_digits_without_a_penalty(
    make_problem, l2, weighted, intercept
):
    problem = make_problem(n=30, m=60)
    weights = problem.weights if weighted else np.ones(30, np.float32)
    weights[3] = 0  # was not seen
    rows = centred_rows(problem.phi, problem.y, weights, intercept)
    spectrum = RowSpectrum.of(rows.phi, rows.y, intercept, rows.shares)
    seen = weights > 0
    expected = spectrum.left_out(l2 * rows.moments.weight)
    expected /= np.sqrt(weights[seen].astype(float))[:, None]
    solution = ridge.fit(
        *jnp_rows(problem), l2, jnp.asarray(weights), intercept=intercept
    )
    found = ridge.leave_one_out(solution, *jnp_rows(problem), jnp.asarray(weights))
    np.testing.assert_allclose(found[seen], expected, rtol=1e-5)
    plain = problem.y[3] - np.asarray(solution(jnp.asarray(problem.phi[3:4])))[0]
    np.testing.assert_allclose(found[3], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:l2=:snnk_jax.ridge.PrecisionWarning")
def test_left_out_residuals_without_digits_are_warned_of(make_problem):
    problem = make_problem(n=30, m=60)
    stats = of(problem)
    with pytest.warns(
        ridge.PrecisionWarning, match="rows have a leverage within 1e-05"
    ):
        ridge.leave_one_out(ridge.solve(stats, 1e-8), *jnp_rows(problem))
    # One row alone has a feature that the others lack.
    phi = jnp.eye(4, 3).at[3, 0].set(1)
    solution = ridge.fit(phi, jnp.arange(4.0)[:, None], 0.0, intercept=False)
    with pytest.warns(ridge.PrecisionWarning, match="^2 rows .* Raise l2"):
        found = ridge.leave_one_out(solution, phi, jnp.arange(4.0)[:, None])
    np.testing.assert_allclose(found[[0, 3], 0], [-3, 3])


def test_path_scores_are_those_of_each_solution(make_problem):
    problem = make_problem(noise=3.0)
    stats = of(problem)
    l2s = [10.0, 1e-2, 1.0]
    path = ridge.select_l2(stats, l2s)
    np.testing.assert_allclose(path.l2s, sorted(l2s))
    for l2, score, dof in zip(path.l2s, path.scores, path.dofs, strict=True):
        solution = ridge.solve(stats, l2)
        np.testing.assert_allclose(score, solution.gcv, rtol=1e-5)
        np.testing.assert_allclose(dof, solution.dof, rtol=1e-6)
    assert path.l2 == path.l2s[np.argmin(path.scores)]
    np.testing.assert_allclose(
        path.solution.kernel, ridge.solve(stats, path.l2).kernel, atol=1e-6
    )


def test_wide_matrices_are_factored_for_each_penalty(make_problem, monkeypatch):
    problem = make_problem(noise=3.0)
    held_out = of(make_problem(noise=3.0, seed=0), slice(200, 300))
    stats = of(problem, slice(0, 200))
    options = {"criterion": "validation", "validation": held_out}
    for chosen in ({}, options):
        narrow = ridge.select_l2(stats, [0.1, 1.0], **chosen)
        free = ridge.select_l2(stats, **chosen)
        monkeypatch.setattr("snnk_jax.ridge._solve._EIGH_WIDTH", 4)
        wide = ridge.select_l2(stats, [0.1, 1.0], **chosen)
        coarse = ridge.select_l2(stats, **chosen)
        monkeypatch.undo()
        np.testing.assert_allclose(wide.scores, narrow.scores, rtol=1e-6)
        assert wide.solution.method == "cholesky"
        assert len(coarse.l2s) < len(free.l2s) / 2
        assert coarse.scores.min() < 1.02 * free.scores.min()


def test_a_weight_without_rows_is_no_statistics(make_problem):
    """What is left of the weight when all rows are unlearned is rounding."""
    stats = of(make_problem())
    weight = stats.weight._replace(high=jnp.float32(2.4e-5))
    empty = stats._replace(weight=weight, rows=jnp.int32(0))
    calls = (
        lambda: ridge.solve(empty, 1e-3),
        lambda: ridge.select_l2(empty),
        lambda: ridge.solve_cg(jax.random.key(0), empty, 1e-3, rank=4),
        lambda: ridge.select_l2(stats, criterion="validation", validation=empty),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match="must hold rows. Got 0 of a weight of 2.4"
        ):
            call()


def test_validation_scores_are_errors_on_other_rows(make_problem):
    problem = make_problem(noise=3.0)
    train, rest = of(problem, slice(0, 200)), slice(200, 300)
    path = ridge.select_l2(
        train,
        [0.01, 0.1, 1.0],
        criterion="validation",
        validation=of(problem, rest),
    )
    phi, y = jnp_rows(problem, rest)
    for l2, score in zip(path.l2s, path.scores, strict=True):
        error = np.mean((np.asarray(ridge.solve(train, l2)(phi)) - y) ** 2)
        np.testing.assert_allclose(score, error, rtol=1e-4)


@pytest.mark.parametrize("shape", [(80, 20), (20, 80), (40, 40)])
@pytest.mark.parametrize("criterion", ["gcv", "loo"])
@pytest.mark.parametrize("intercept", [True, False])
def test_fit_chooses_as_a_search_would(make_problem, shape, criterion, intercept):
    n, m = shape
    problem = make_problem(n=n, m=m, noise=2.0)
    phi, y = jnp_rows(problem)
    chosen = ridge.fit(phi, y, intercept=intercept, criterion=criterion)

    def score(l2):
        solution = ridge.fit(phi, y, l2, intercept=intercept)
        if criterion == "gcv":
            return solution.gcv
        return np.mean(ridge.leave_one_out(solution, phi, y) ** 2)

    best = score(chosen.l2)
    for factor in (0.2, 0.8, 1.25, 5.0):
        assert best < score(chosen.l2 * factor) * 1.001
    fixed = ridge.fit(phi, y, chosen.l2, intercept=intercept)
    np.testing.assert_allclose(chosen.kernel, fixed.kernel, atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 12), (12, 60)])
@pytest.mark.parametrize("l2", [1e-3, 1e-12, 0.0])
def test_fit_is_the_formula_and_loses_no_digits(make_problem, shape, l2):
    n, m = shape
    problem = make_problem(n=n, m=m, condition=1e8)
    solution = ridge.fit(*jnp_rows(problem), l2)
    phi, y = problem.phi.astype(float), problem.y.astype(float)
    z, t = phi - phi.mean(axis=0), y - y.mean(axis=0)
    rows = np.concatenate([z, np.sqrt(l2 * n) * np.eye(m)])
    targets = np.concatenate([t, np.zeros((m, 3))])
    expected = np.linalg.lstsq(rows, targets, rcond=1e-13)[0]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        solution.kernel / scale, expected / scale, atol=1e-6, rtol=0
    )
    if l2 == 0 and m > n:
        assert solution.method == "svd"
        assert solution.residual.max() < 1e-12


@pytest.mark.usefixtures("unchecked")
def test_fit_takes_float64_of_numpy_without_x64(make_problem):
    problem = make_problem()
    phi, y = problem.phi.astype(float), problem.y.astype(float)
    solution = ridge.fit(phi, y, 0.1)  # a warning would be an error here
    assert solution.kernel.dtype == solution.bias.dtype == jnp.float32
    np.testing.assert_allclose(
        solution.kernel, problem.coefficients(0.1)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(12, 4), (6, 9)])
@pytest.mark.parametrize("intercept", [True, False])
def test_left_out_residuals_of_uneven_weights_are_those_of_refits(
    make_problem, shape, intercept
):
    n, m = shape
    problem = make_problem(n=n, m=m)
    weights, penalty = np.r_[40, np.ones(n - 1)], 20.0
    rows = centred_rows(problem.phi, problem.y, weights, intercept)
    spectrum = RowSpectrum.of(rows.phi, rows.y, intercept, rows.shares)
    found = spectrum.left_out(penalty) / np.sqrt(weights)[:, None]
    for i in range(n):
        rest = np.delete(np.arange(n), i)
        kernel, bias, _ = dataclasses.replace(
            problem, phi=problem.phi[rest], y=problem.y[rest]
        ).coefficients(penalty / weights[rest].sum(), weights[rest], intercept)
        expected = problem.y[i] - problem.phi[i] @ kernel - bias * intercept
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", ["gcv", "loo"])
@pytest.mark.parametrize("shape", [(40, 8), (12, 30)])
def test_rows_of_weight_zero_do_not_choose_the_penalty(make_problem, shape, criterion):
    n, m = shape
    problem = make_problem(n=n + 5, m=m, noise=3.0)
    phi, y = jnp_rows(problem)
    weights = jnp.asarray(problem.weights).at[n:].set(0)
    found = ridge.fit(phi, y, weights=weights, criterion=criterion)
    alone = ridge.fit(phi[:n], y[:n], weights=weights[:n], criterion=criterion)
    np.testing.assert_allclose(found.l2, alone.l2, rtol=1e-6)
    np.testing.assert_allclose(found.kernel, alone.kernel, atol=1e-5)
    assert found.rows == alone.rows == n


def test_fit_leaves_one_out_which_beats_gcv_with_few_rows():
    """GCV falls for next to no penalty in some draws of 40 rows and 128 features."""
    fm = snnk.features.ArcCosine(num_features=128)

    def errors(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        x = jax.random.normal(keys[0], (540, 5))
        clean = jnp.sign(x[:, :1])
        flips = jax.random.bernoulli(keys[1], 0.15, (40, 1))
        phi = fm.phi(fm.init(keys[2], 5), x)
        train = phi[:40], jnp.where(flips, -clean[:40], clean[:40])
        kinds = ({}, {"criterion": "loo"}, {"criterion": "gcv"})
        chosen = [ridge.fit(*train, **kind) for kind in kinds]
        return [float(jnp.mean((s(phi[40:]) - clean[40:]) ** 2)) for s in chosen]

    default, loo, gcv = np.mean([errors(seed) for seed in range(20)], axis=0)
    assert default == loo
    assert loo < 0.97 * gcv


@pytest.mark.slow
def test_no_interpolation_spike_on_digits():
    """The test accuracy at m = n must not fall below that at a quarter of it."""
    digits = load_digits()
    x = jnp.asarray(digits.data / 16, jnp.float32)
    one_hot = jnp.asarray(np.eye(10)[digits.target], jnp.float32)
    train, test = slice(0, 800), slice(1347, None)
    accuracy = {}
    for m in (200, 800):
        fm = snnk.features.ArcCosine(num_features=m, projection="gaussian")
        phi = fm.phi(fm.init(jax.random.key(3), 64), x)
        stats = ridge.update(ridge.init(m, 10), phi[train], one_hot[train])
        solution = ridge.select_l2(stats).solution
        guess = np.argmax(np.asarray(solution(phi[test])), axis=1)
        accuracy[m] = np.mean(guess == digits.target[test])
        if m == 800:  # which is there to be seen without a penalty
            bare = ridge.fit(phi[train], one_hot[train], 1e-9)
            guess = np.argmax(np.asarray(bare(phi[test])), axis=1)
            spike = np.mean(guess == digits.target[test])
    assert accuracy[800] >= accuracy[200]
    assert spike < accuracy[200] - 0.02


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: ridge.solve(s, -1.0), "l2 must be at least 0 and finite. Got -1"),
        (lambda s: ridge.solve(s, np.inf), "l2 must be at least 0 and finite"),
        (lambda s: ridge.solve(s, 1.0, method="lu"), "method must be .* Got 'lu'"),
        (lambda s: ridge.solve(ridge.init(2, 1), 1.0), "must hold rows"),
        (lambda s: ridge.select_l2(s, []), "l2s must be a sequence of penalties"),
        (lambda s: ridge.select_l2(s, [0.0, 1.0]), "l2s must be positive"),
        (lambda s: ridge.select_l2(s, 1e-3), "l2s must be a sequence .* Got 0.001"),
        (lambda s: ridge.select_l2(s, [1.0, np.inf]), "l2s must be positive and fin"),
        (
            lambda s: ridge.select_l2(
                s, criterion="validation", validation=ridge.init(3, 1)
            ),
            "validation must have 2 features and 1 targets.* Got 3 and 1",
        ),
        (
            lambda s: ridge.select_l2(
                s, criterion="validation", validation=ridge.init(2, 4)
            ),
            "validation must have 2 features and 1 targets.* Got 2 and 4",
        ),
        (lambda s: ridge.select_l2(s, criterion="aic"), "gcv or validation. Got 'aic'"),
        (lambda s: ridge.select_l2(s, criterion="validation"), "validation must be"),
        (lambda s: ridge.select_l2(s, validation=s), "and only then. Got criterion='"),
        (lambda s: ridge.fit(jnp.ones((3, 2)), jnp.ones((2, 1))), "the same n"),
        (
            lambda s: ridge.fit(jnp.ones((3, 2)), jnp.ones((3, 1), int)),
            "y must be floating; one-hot encode classes. Got int32",
        ),
        (
            lambda s: ridge.fit(jnp.ones((3, 2)), jnp.ones((3, 1), bool)),
            "one-hot encode classes. Got bool",
        ),
        (
            lambda s: ridge.fit(jnp.ones((3, 2)), jnp.ones((3, 1)) * jnp.nan),
            "targets must be finite",
        ),
        (
            lambda s: ridge.fit(jnp.ones((3, 2)), jnp.ones((3, 1)), 1.0, -jnp.ones(3)),
            "weights must not be negative",
        ),
        (
            lambda s: ridge.solve(
                ridge.update(s, jnp.full((1, 2), jnp.inf), jnp.ones((1, 1))), 1.0
            ),
            "features and targets must be finite",
        ),
        (
            lambda s: dataclasses.replace(ridge.solve(s, 1.0), factor=None).dof,
            "must keep its factor",
        ),
        (
            lambda s: ridge.fit(jnp.eye(3), jnp.ones((3, 1)), 0.0).standard_errors(),
            "must have rows above the degrees of freedom. Got 3 rows and 3.0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_told(call, words):
    phi = jnp.arange(6.0).reshape(3, 2) ** 2
    stats = ridge.update(ridge.init(2, 1), phi, jnp.arange(3.0)[:, None])
    with pytest.raises(ValueError, match=words):
        call(stats)
