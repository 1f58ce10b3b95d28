import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import snnk_jax as snnk
from snnk_jax.ridge import clip_rows, privatize
from snnk_jax.ridge._privacy import gaussian_sigma

PHI_BOUND, Y_BOUND = 3.0, 0.5
BUDGETS = [
    (1e-3, 1e-6),
    (0.1, 1e-5),
    (1.0, 1e-6),
    (1.0, 0.2),
    (8.0, 1e-9),
    (50.0, 0.01),
]


def rows(num=400, width=5, outputs=2, seed=0):
    """Rows of norms from zero to the bounds."""
    rng = np.random.default_rng(seed)
    phi, y = rng.normal(size=(num, width)), rng.normal(size=(num, outputs))
    for a, bound in ((phi, PHI_BOUND), (y, Y_BOUND)):
        a *= bound * rng.uniform(size=(num, 1)) / np.linalg.norm(a, axis=1)[:, None]
    return jnp.asarray(phi, "float32"), jnp.asarray(y, "float32")


def gather(phi, y, weights=None):
    empty = snnk.ridge.init(phi.shape[1], y.shape[1], phi.dtype, shift=False)
    return snnk.ridge.update(empty, phi, y, weights)


def release(stats, seed=0, epsilon=1.0, delta=1e-6, bounds=(PHI_BOUND, Y_BOUND)):
    return privatize(
        jax.random.key(seed),
        stats,
        epsilon=epsilon,
        delta=delta,
        phi_bound=bounds[0],
        y_bound=bounds[1],
    )


def sums(stats, bounds=(PHI_BOUND, Y_BOUND)):
    """The six sums in units of the bounds, of the Gram matrix the upper triangle."""
    b, r = bounds
    upper = np.triu_indices(stats.num_features)
    units = {
        "gram": b * b,
        "cross": b * r,
        "phi_sum": b,
        "y_sum": r,
        "y_square": r * r,
        "weight": 1,
    }
    parts = {}
    for name, unit in units.items():
        total = getattr(stats, name)
        value = np.asarray(total.high, float) + np.asarray(total.low, float)
        parts[name] = (value[upper] if name == "gram" else value.reshape(-1)) / unit
    return parts


def distance(a, b):
    a, b = sums(a), sums(b)
    return math.sqrt(sum(np.sum((a[name] - b[name]) ** 2) for name in a))


def spent(sigma, epsilon, sensitivity):
    """δ at ε: the mass that the likelihood ratio of two Gaussians leaves above e^ε."""
    p, q = stats.norm(0, sigma), stats.norm(sensitivity, sigma)

    def above(x):
        return max(q.pdf(x) - math.exp(epsilon) * p.pdf(x), 0.0)

    # The ratio is e^epsilon at the edge and grows from there.
    edge = sensitivity / 2 + epsilon * sigma**2 / sensitivity
    width = min(sigma, sigma**2 / sensitivity)
    ends = edge + width * np.array([0, 0.1, 1, 5, 20, 100])
    return sum(
        integrate.quad(above, *part, epsabs=0, epsrel=1e-9)[0]
        for part in itertools.pairwise(ends)
    )


@pytest.mark.parametrize(("epsilon", "delta"), BUDGETS)
@pytest.mark.parametrize("sensitivity", [0.3, math.sqrt(6)])
def test_sigma_spends_the_budget(epsilon, delta, sensitivity):
    sigma = gaussian_sigma(epsilon, delta, sensitivity)
    np.testing.assert_allclose(spent(sigma, epsilon, sensitivity), delta, rtol=1e-4)
    assert spent(0.99 * sigma, epsilon, sensitivity) > delta
    if epsilon < 1:
        classical = sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
        assert 0.3 * classical < sigma < classical


def test_sigma_at_the_ends():
    # Never below what the exact curve asks for, however little is left of the digits.
    for epsilon in (1e-12, 1e-6, 1.0, 100.0, 1e5):
        previous = 0.0
        for delta in (0.999999, 0.1, 1e-8, 1e-15, 1e-30, 1e-300):
            sigma = gaussian_sigma(epsilon, delta, 1.0)
            assert previous < sigma < math.inf
            previous = sigma
    # For a tiny epsilon delta is the total variation, 2 Phi(1 / (2 sigma)) - 1.
    sigma = gaussian_sigma(1e-12, 0.01, 1.0)
    np.testing.assert_allclose(2 * stats.norm.cdf(0.5 / sigma) - 1, 0.01, rtol=1e-6)


def test_one_row_moves_the_sums_by_no_more_than_the_sensitivity():
    phi, y = rows()
    clipped = clip_rows(5 * phi, 5 * y, PHI_BOUND, Y_BOUND)
    weights = jnp.asarray(np.random.default_rng(1).uniform(size=len(y)), "float32")
    sensitivity = release(gather(phi, y))[1].sensitivity
    assert sensitivity == math.sqrt(6)
    farthest = 0.0
    for own in (None, weights):
        everything = gather(*clipped, own)
        for i in range(20):
            one = np.s_[i : i + 1]
            row = clipped[0][one], clipped[1][one]
            without = snnk.ridge.downdate(
                everything, *row, None if own is None else own[one]
            )
            farthest = max(farthest, distance(everything, without))
    assert 0.7 * sensitivity < farthest < sensitivity


@pytest.mark.parametrize("bounds", [(PHI_BOUND, Y_BOUND), (0.01, 100.0)])
def test_the_sensitivity_is_attained(bounds):
    phi = jnp.zeros((1, 4)).at[0, 2].set(1.0)
    y = jnp.zeros((1, 3)).at[0, 1].set(-1.0)
    phi, y = clip_rows(1e3 * phi, 1e3 * y, *bounds)
    change = sums(gather(phi, y), bounds)
    norm = math.sqrt(sum(np.sum(part**2) for part in change.values()))
    np.testing.assert_allclose(norm, math.sqrt(6), rtol=1e-5)
    assert norm <= math.sqrt(6)
    for part in change.values():
        assert 0.999 < np.linalg.norm(part) <= 1


def test_noise_has_the_stated_size_and_no_mean():
    # As many rows as leave nothing to project: a release is the sums plus noise.
    phi, y = rows(num=20000)
    exact = gather(phi, y)
    released = [release(exact, seed) for seed in range(200)]
    sigma = released[0][1].sigma
    assert all(report.projected == 0 for _, report in released)
    truth = sums(exact)
    noise = {
        name: np.stack([sums(private)[name] - truth[name] for private, _ in released])
        for name in truth
    }
    for name, part in noise.items():
        # Five standard errors of a mean and of a variance.
        assert np.abs(part.mean(axis=0)).max() < 5 * sigma / math.sqrt(200), name
        error = part.var() / sigma**2 - 1
        assert abs(error) < 5 * math.sqrt(2 / part.size), name
    # Independent, the sums of one kind and of different kinds.
    joint = np.concatenate(list(noise.values()), axis=1)
    correlation = np.corrcoef(joint.T) - np.eye(joint.shape[1])
    assert np.abs(correlation).max() < 5 / math.sqrt(200)


def test_everything_released_is_noisy():
    phi, y = rows()
    exact = gather(phi, y)
    # Something of the rows in the part of the Gram matrix that has no meaning.
    below = exact.gram.high + jnp.tril(jnp.full((5, 5), 1e6), -1)
    exact = exact._replace(gram=snnk.ridge.Total(below, exact.gram.low))
    private, _ = release(exact)
    for name in ("gram", "cross", "phi_sum", "y_sum", "y_square", "weight"):
        for before, after in zip(
            getattr(exact, name), getattr(private, name), strict=True
        ):
            assert np.all(np.asarray(before) != np.asarray(after)), name
    np.testing.assert_array_equal(private.gram.high, private.gram.high.T)
    assert np.abs(private.gram.high).max() < 1e5
    assert int(private.rows) == round(float(private.weight.high)) != len(y)
    assert private.phi_shift is None
    assert private.y_shift is None
    assert jax.tree.structure(private) == jax.tree.structure(exact)
    for before, after in zip(*map(jax.tree.leaves, (exact, private)), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_keys_choose_the_noise():
    exact = gather(*rows())
    first, again, other = (release(exact, seed)[0] for seed in (1, 1, 2))
    for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(np.asarray(first.cross.high) != np.asarray(other.cross.high))


def test_units_do_not_matter():
    phi, y = rows(num=50)
    here, report = release(gather(phi, y))
    there, scaled = release(gather(phi * 4, y / 8), bounds=(4 * PHI_BOUND, Y_BOUND / 8))
    assert report.sigma == scaled.sigma
    for name, part in sums(there, (4 * PHI_BOUND, Y_BOUND / 8)).items():
        np.testing.assert_allclose(part, sums(here)[name], rtol=1e-10, atol=1e-12)


def test_a_noisy_gram_matrix_is_projected():
    few = gather(*rows(num=20))
    private, report = release(few, epsilon=0.1)
    b = PHI_BOUND
    moments = np.zeros((6, 6))
    moments[:-1, :-1] = np.asarray(private.gram.high, float) / b**2
    moments[:-1, -1] = moments[-1, :-1] = np.asarray(private.phi_sum.high) / b
    moments[-1, -1] = float(private.weight.high)
    values = np.linalg.eigvalsh(moments)
    assert report.projected > 0
    assert values[0] > -1e-5 * values[-1]
    assert np.sum(np.abs(values) < 1e-5 * values[-1]) == report.projected
    assert float(private.weight.high) >= 0
    assert np.all(np.asarray(private.y_square.high) >= 0)
    solution = snnk.ridge.solve(private, l2=1.0)
    assert np.isfinite(solution.kernel).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_little_noise_changes_little(dtype):
    with jax.enable_x64(dtype == "float64"):
        phi, y = rows()
        phi, y = phi.astype(dtype), y.astype(dtype)
        exact = gather(phi, y)
        errors = []
        for epsilon in (1e4, 1e6, 1e8):
            private, report = release(exact, epsilon=epsilon)
            assert report.projected == 0
            assert private.gram.high.dtype == jnp.dtype(dtype)
            pair = (snnk.ridge.solve(s, l2=1e-2) for s in (private, exact))
            a, b = (solution.kernel for solution in pair)
            errors.append(float(jnp.abs(a - b).max() / jnp.abs(b).max()))
        # Noise falls as the root of epsilon here.
        assert errors[0] < 3e-2
        assert errors[2] < 2e-2 * errors[0]
        assert int(private.rows) == len(y)


def test_a_regression_of_many_rows_is_useful():
    rng = np.random.default_rng(5)
    phi = rng.normal(size=(50000, 8)) / 4
    y = phi @ rng.normal(size=(8, 1)) + 0.1 * rng.normal(size=(50000, 1))
    phi, y = jnp.asarray(phi, "float32"), jnp.asarray(y, "float32")
    stats = gather(*clip_rows(phi[:40000], y[:40000], 1.0, 2.0))
    test_phi, test_y = phi[40000:], y[40000:]

    def error(stats, l2):
        return float(jnp.mean((snnk.ridge.solve(stats, l2)(test_phi) - test_y) ** 2))

    best, nothing = error(stats, 1e-5), float(jnp.var(test_y))
    private, report = release(stats, epsilon=1.0, bounds=(1.0, 2.0))
    # The penalty that the docstring gives.
    l2 = 2 * report.sigma * math.sqrt(8) / float(private.weight.high)
    assert best < 0.03 * nothing
    assert error(private, l2) < best + 0.02 * nothing
    stricter, _ = release(stats, epsilon=0.01, bounds=(1.0, 2.0))
    assert error(stricter, l2) > error(private, l2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_clipped_rows_are_inside_the_bounds(dtype):
    with jax.enable_x64(dtype == "float64"):
        phi, y = (10 * a for a in rows(num=1000, width=64))
        phi, y = phi.astype(dtype), y.astype(dtype)
        clip = functools.partial(clip_rows, phi_bound=PHI_BOUND, y_bound=Y_BOUND)
        for before, after, bound in zip(
            (phi, y), jax.jit(clip)(phi, y), (PHI_BOUND, Y_BOUND), strict=True
        ):
            assert after.dtype == before.dtype
            before, after = (np.asarray(a).astype(float) for a in (before, after))
            norms = np.linalg.norm(before, axis=1)
            clipped = np.linalg.norm(after, axis=1)
            inside = norms < 0.98 * bound
            assert 0.05 < inside.mean() < 0.15
            np.testing.assert_array_equal(after[inside], before[inside])
            outside = norms > bound
            assert np.all(clipped <= bound)
            assert np.all(clipped[outside] > 0.97 * bound)
            cosine = np.sum(before * after, axis=1) / (norms * clipped)
            np.testing.assert_allclose(cosine, 1, atol=1e-4)


def test_clipping_of_extremes():
    phi = jnp.array([[0.0, 0.0], [1e-30, 0.0], [1e30, -1e30], [PHI_BOUND, 0.0]])
    y = jnp.zeros((4, 1))
    clipped, same = clip_rows(phi, y, PHI_BOUND, Y_BOUND)
    np.testing.assert_array_equal(clipped[:2], phi[:2])
    assert np.all(np.linalg.norm(np.asarray(clipped, float), axis=1) <= PHI_BOUND)
    np.testing.assert_allclose(clipped[3], phi[3], rtol=1e-5)
    np.testing.assert_array_equal(same, y)


@pytest.mark.usefixtures("unchecked")
def test_clipped_rows_of_numpy_are_inside_the_bounds_without_x64():
    rng = np.random.default_rng(0)
    phi, y = rng.normal(size=(1000, 64)), rng.normal(size=(1000, 2))
    clipped, _ = clip_rows(phi, y, 1.0, 1.0)
    assert clipped.dtype == jnp.float32
    norms = np.linalg.norm(np.asarray(clipped, float), axis=1)
    assert 0.9999 < norms.min() <= norms.max() <= 1


@pytest.mark.parametrize("size", [3e38, 1e20, 1e-25])
def test_rows_whose_squares_overflow_or_vanish_are_clipped(size):
    bound = min(1.0, size / 100)
    phi = size * jnp.array([[0.6, -0.8], [1.0, 1.0], [0.0, 1.0]])
    clipped, _ = clip_rows(phi, phi[:, :1], bound, bound)
    clipped = np.asarray(clipped, float) / bound
    expected = np.array([[0.6, -0.8], [0.5**0.5, 0.5**0.5], [0.0, 1.0]])
    np.testing.assert_allclose(clipped, expected, rtol=1e-5)
    assert np.all(np.linalg.norm(clipped, axis=1) <= 1)


def test_no_rows_are_released_like_any():
    # An error would tell that there are none.
    private, _ = release(snnk.ridge.init(3, 1, shift=False))
    assert float(private.weight.high) >= 0


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    phi, y = rows()
    exact = gather(phi, y)
    for epsilon in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="epsilon must be positive and finite"):
            release(exact, epsilon=epsilon)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta must be above 0 and below 1"):
            release(exact, delta=delta)
    for bound in (0.0, math.inf):
        with pytest.raises(ValueError, match="phi_bound must be positive"):
            release(exact, bounds=(bound, 1.0))
        with pytest.raises(ValueError, match="y_bound must be positive"):
            clip_rows(phi, y, 1.0, bound)
    shifted = snnk.ridge.update(snnk.ridge.init(5, 2), phi, y)
    with pytest.raises(ValueError, match="a shift is a mean of rows"):
        release(shifted)
    for bounds in ((PHI_BOUND / 4, Y_BOUND), (PHI_BOUND, Y_BOUND / 4)):
        with pytest.raises(ValueError, match="rows must go through clip_rows"):
            release(exact, bounds=bounds)
    with pytest.raises(ValueError, match="must be finite"):
        release(gather(phi.at[0, 0].set(jnp.nan), y))
    with pytest.raises(ValueError, match="key must be a single key"):
        privatize(
            jax.random.split(jax.random.key(0)),
            exact,
            epsilon=1.0,
            delta=1e-6,
            phi_bound=PHI_BOUND,
            y_bound=Y_BOUND,
        )
