"""Conjugate gradients against the factored solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snnk_jax import ridge
from snnk_jax.ridge._solve import moments


def of(problem, **options):
    m, o = problem.phi.shape[1], problem.y.shape[1]
    stats = ridge.init(m, o, **options)
    return ridge.update(stats, jnp.asarray(problem.phi), jnp.asarray(problem.y))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("rank", [1, 20, 100])
def test_the_solution_is_the_factored_one(make_problem, intercept, shift, rank):
    problem = make_problem(n=2000, m=100, condition=1e3, mean=0.1)
    stats = of(problem, shift=shift)
    exact = ridge.solve(stats, 1e-2, intercept=intercept)
    found, report = ridge.solve_cg(
        jax.random.key(0), stats, 1e-2, rank=rank, intercept=intercept
    )
    assert report.converged
    assert report.error < 1e-5
    scale = np.abs(exact.kernel).max()
    np.testing.assert_allclose(found.kernel / scale, exact.kernel / scale, atol=2e-3)
    phi = jnp.asarray(problem.phi)
    np.testing.assert_allclose(found(phi), exact(phi), atol=0.02)
    np.testing.assert_allclose(found.residual, exact.residual, rtol=0.05)


@pytest.mark.parametrize("intercept", [True, False])
def test_residuals_are_those_of_the_coefficients(make_problem, intercept):
    stats = of(make_problem(n=2000, m=100, condition=10, noise=1e-3))
    found, _ = ridge.solve_cg(
        jax.random.key(0), stats, 1e-4, rank=10, tolerance=1e-3, intercept=intercept
    )
    sums = moments(stats, intercept)
    gram = np.triu(sums.gram) + np.triu(sums.gram, 1).T
    v = np.asarray(found.kernel, float)
    exact = sums.y_square + np.sum(v * (gram @ v - 2 * sums.cross), axis=0)
    floor = 1e-7 * sums.y_square.max() / sums.weight
    np.testing.assert_allclose(
        found.residual, exact / sums.weight, rtol=1e-3, atol=floor
    )


@pytest.mark.slow
def test_the_preconditioner_saves_steps(make_problem):
    problem = make_problem(n=3000, m=300, condition=1e6)
    stats = of(problem)
    steps = [
        ridge.solve_cg(jax.random.key(0), stats, 1e-5, rank=rank, tolerance=1e-4)[1]
        for rank in (1, 60, 200)
    ]
    assert steps[1].steps < 0.7 * steps[0].steps
    assert steps[2].steps < 0.5 * steps[1].steps
    assert steps[2].steps < 20


def test_targets_that_are_zero_stay_zero(make_problem):
    problem = make_problem()
    y = jnp.asarray(problem.y).at[:, 1].set(0)
    stats = ridge.update(ridge.init(20, 3), jnp.asarray(problem.phi), y)
    solution, report = ridge.solve_cg(jax.random.key(0), stats, 0.1, rank=5)
    assert report.converged
    np.testing.assert_array_equal(solution.kernel[:, 1], 0)


def test_giving_up_is_said(make_problem):
    stats = of(make_problem(m=50, condition=1e6))
    with pytest.warns(ridge.PrecisionWarning, match="stopped after 3 steps at a rel"):
        _, report = ridge.solve_cg(jax.random.key(0), stats, 1e-6, rank=2, max_steps=3)
    assert not report.converged
    assert report.error > 1e-5


def test_a_sharded_matrix_is_not_gathered(make_problem):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    problem = make_problem(n=500, m=64)
    stats = of(problem)
    placed = jax.device_put(stats, ridge.shardings(stats, mesh, features="model"))
    found, _ = ridge.solve_cg(jax.random.key(0), placed, 0.1, rank=8)
    np.testing.assert_allclose(found.kernel, ridge.solve(stats, 0.1).kernel, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"l2": 0.0}, "l2 must be above zero for conjugate gradients. Got 0.0"),
        ({"l2": -1.0}, "l2 must be at least 0"),
        ({"rank": 21}, r"rank must be in \[1, 20\]. Got 21"),
        ({"tolerance": 0.0}, "tolerance must be above zero"),
    ],
    ids=str,
)
def test_mistakes_are_told(make_problem, options, words):
    options = {"l2": 0.1, "rank": 4} | options
    with pytest.raises(ValueError, match=words):
        ridge.solve_cg(jax.random.key(0), of(make_problem()), **options)


def test_statistics_that_cannot_be_solved():
    with pytest.raises(ValueError, match="must hold rows"):
        ridge.solve_cg(jax.random.key(0), ridge.init(20, 3), 0.1, rank=4)
    spoilt = ridge.update(ridge.init(2, 1), jnp.full((3, 2), jnp.nan), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="must be finite"):
        ridge.solve_cg(jax.random.key(0), spoilt, 0.1, rank=1)
