"""Predictions of infinite networks against their definitions and other solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct
from sklearn.kernel_ridge import KernelRidge

import snnk_jax as snnk

infinite = snnk.infinite
RNG = np.random.default_rng(0)
X, NEW = RNG.standard_normal((30, 4)), RNG.standard_normal((6, 4))
Y = np.stack([np.sin(X[:, 0]) + X[:, 1], X[:, 2] ** 2], axis=1)
NET = infinite.serial(
    infinite.Dense(1.4, 0.3), infinite.Activation("gelu"), infinite.Dense(1.0, 0.1)
)


@pytest.fixture(scope="module")
def kernels():
    with jax.enable_x64(True):
        x, new = jnp.asarray(X), jnp.asarray(NEW)
        parts = NET.kernel(x), NET.kernel(new, x), NET.kernel(new)
    return [infinite.Kernels(*map(np.asarray, part)) for part in parts]


def test_kernel_ridge_is_scikit_learns(kernels):
    train, cross, _ = kernels
    model = infinite.kernel_ridge(train.ntk, Y, 1e-3, intercept=False)
    reference = KernelRidge(alpha=1e-3 * len(X), kernel="precomputed")
    expected = reference.fit(train.ntk, Y).predict(cross.ntk)
    np.testing.assert_allclose(model(cross.ntk), expected, rtol=1e-7)


def test_kernel_ridge_with_intercept_is_that_of_features():
    model = infinite.kernel_ridge(X @ X.T, Y + 5, 1e-2)
    single = (jnp.asarray(v, jnp.float32) for v in (X, Y + 5))
    solution = snnk.ridge.fit(*single, 1e-2)
    expected = NEW @ np.asarray(solution.kernel) + np.asarray(solution.bias)
    np.testing.assert_allclose(model(NEW @ X.T), expected, rtol=1e-4, atol=1e-4)


def test_the_penalty_is_chosen_by_cross_validation(kernels):
    train = kernels[0].ntk
    l2s = np.geomspace(1e-8, 10, 10)
    model = infinite.kernel_ridge(train, Y, l2s)

    def gcv(l2):
        n = len(X)
        centre = np.eye(n) - 1 / n
        hat = centre @ train @ centre
        hat = hat @ np.linalg.inv(hat + n * l2 * np.eye(n)) + 1 / n
        return np.sum((Y - hat @ Y) ** 2) / (1 - np.trace(hat) / n) ** 2

    scores = [gcv(l2) for l2 in l2s]
    np.testing.assert_allclose(model.l2, l2s[np.argmin(scores)])
    assert infinite.kernel_ridge(train, Y).l2 > 0


def test_posterior_is_scikit_learns():
    kernel = DotProduct(0.7, "fixed")
    noise = 0.1
    reference = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(X, Y)
    mean, covariance = reference.predict(NEW, return_cov=True)
    parts = kernel(X), Y, kernel(NEW, X), kernel(NEW)
    posterior = infinite.gp_posterior(*parts, noise)
    np.testing.assert_allclose(posterior.mean, mean, rtol=1e-8)
    np.testing.assert_allclose(posterior.covariance, covariance[..., 0], rtol=1e-7)


def test_the_posterior_interpolates_without_noise(kernels):
    train = kernels[0].nngp
    posterior = infinite.gp_posterior(train, Y, train, train, 0.0)
    np.testing.assert_allclose(posterior.mean, Y, atol=1e-6)
    np.testing.assert_allclose(posterior.covariance, 0, atol=1e-8)


@pytest.mark.parametrize("t", [0.0, 0.3, 20.0])
@pytest.mark.parametrize("l2", [0.0, 0.2])
def test_gradient_flow_solves_its_differential_equation(kernels, t, l2):
    train, cross, _ = kernels
    full = np.block([[train.ntk], [cross.ntk]])
    n = len(X)
    # Parameters w of features: dw = Phi^T (y - Phi w) - l2 w, by the exponential.
    generator = -(train.ntk + l2 * np.eye(n))
    response = scipy.linalg.expm(generator * t) - np.eye(n)
    expected = full @ np.linalg.solve(generator, response @ Y)
    value = infinite.gradient_flow(train.ntk, Y, full, t, l2=l2)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-8)


def test_gradient_flow_is_gradient_descent_of_a_linear_model():
    steps, rate = 400, 1e-3
    w = np.zeros((4, 2))
    for _ in range(steps):
        w += rate * X.T @ (Y - X @ w)
    value = infinite.gradient_flow(X @ X.T, Y, NEW @ X.T, steps * rate)
    np.testing.assert_allclose(value, NEW @ w, rtol=2e-2, atol=2e-2)
    end = infinite.gradient_flow(X @ X.T, Y, NEW @ X.T)
    np.testing.assert_allclose(end, NEW @ np.linalg.lstsq(X, Y)[0], rtol=1e-8)


@pytest.mark.parametrize("t", [0.0, 0.5, np.inf])
def test_ensemble_has_the_moments_of_sampled_networks(kernels, t):
    """Start functions drawn from the prior, each trained: linear in its start."""
    train, cross, test = kernels
    posterior = infinite.ensemble(train, Y, cross, test.nngp, t)
    n = len(X)
    response = infinite.gradient_flow(train.ntk, np.eye(n), cross.ntk, t)
    np.testing.assert_allclose(posterior.mean, response @ Y, rtol=1e-8, atol=1e-9)
    # f_t = f_0(test) - response f_0(train) + response y
    joint = np.block([[test.nngp, cross.nngp], [cross.nngp.T, train.nngp]])
    turn = np.concatenate([np.eye(len(NEW)), -response], axis=1)
    np.testing.assert_allclose(posterior.covariance, turn @ joint @ turn.T, atol=1e-8)
    assert np.linalg.eigvalsh(posterior.covariance).min() > -1e-8


def test_one_hot_targets_classify():
    labels = np.arange(30) % 3
    targets = infinite.one_hot(labels, 3)
    np.testing.assert_allclose(targets.sum(1), 0, atol=1e-15)
    x = 3 * np.eye(4)[labels] + 0.3 * RNG.standard_normal((30, 4))
    model = infinite.kernel_ridge(x @ x.T, targets, 1e-3)
    np.testing.assert_array_equal(model(x @ x.T).argmax(1), labels)


def test_blocks_and_disk_hold_the_kernel(tmp_path):
    x = X.astype(np.float32)
    expected = NET.kernel(jnp.asarray(x), get="ntk")
    stored = infinite.save_kernel(tmp_path / "k.npy", NET, x, batch_size=13)
    np.testing.assert_allclose(stored, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(stored, stored.T)
    assert [path.name for path in tmp_path.iterdir()] == ["k.npy"]
    v = RNG.standard_normal((30, 2))
    for product in (
        infinite.stored_product(stored, batch_size=7),
        infinite.computed_product(NET, x, batch_size=13),
    ):
        np.testing.assert_allclose(product(v), expected @ v, rtol=1e-3, atol=1e-4)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(np.lib.format, "open_memmap", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        infinite.save_kernel(tmp_path / "k.npy", NET, X.astype(np.float32))
    assert not list(tmp_path.iterdir())


def test_conjugate_gradients_solve_what_is_never_stored():
    x = RNG.standard_normal((120, 4)).astype(np.float32)
    y = np.sin(x[:, :2]).astype(np.float64)
    k = np.asarray(NET.kernel(jnp.asarray(x), get="ntk"), np.float64)
    l2 = 1e-4
    features = infinite.nystrom(NET, x, 40, np.random.default_rng(0), batch_size=50)
    np.testing.assert_allclose(
        (features.phi @ features.phi.T)[:, features.rows],
        k[:, features.rows],
        rtol=2e-3,
        atol=2e-3,
    )
    expected = np.linalg.solve(k + 120 * l2 * np.eye(120), y - y.mean(0))
    product = infinite.computed_product(NET, x, batch_size=50)
    model, report = infinite.kernel_cg(product, y, l2, features.phi)
    assert report.converged
    np.testing.assert_allclose(k @ model.dual, k @ expected, atol=1e-4)
    plain = infinite.kernel_cg(infinite.stored_product(k), y, l2)[1]
    assert report.steps < plain.steps / 2
    with pytest.warns(snnk.ridge.PrecisionWarning, match="stopped after 2 steps"):
        infinite.kernel_cg(infinite.stored_product(k), y, l2, max_steps=2)


def test_conjugate_gradients_report_the_residual_of_their_solution():
    """That of the recursion falls below the tolerance, the true one does not."""
    rng = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    k = (vectors * np.logspace(4, -4, 60)) @ vectors.T
    y, l2 = rng.standard_normal((60, 1)), 1e-6 / 60
    with pytest.warns(snnk.ridge.PrecisionWarning, match="relative residual"):
        model, report = infinite.kernel_cg(
            infinite.stored_product(k), y, l2, tolerance=1e-10, max_steps=5000
        )
    assert report.steps < 5000
    target = y - y.mean(axis=0)
    left = target - k @ model.dual - 60 * l2 * model.dual
    true = np.linalg.norm(left) / np.linalg.norm(target)
    np.testing.assert_allclose(report.error, true, rtol=1e-3)
    assert not report.converged


@pytest.mark.parametrize("l2", [0, 1e-3])
def test_a_penalty_may_be_any_number(l2):
    solutions = [
        infinite.kernel_ridge(X @ X.T, Y, kind(l2))
        for kind in (float, np.float64, np.asarray)
    ]
    for other in solutions[1:]:
        np.testing.assert_array_equal(other.dual, solutions[0].dual)
        assert other.l2 == l2
    single = infinite.kernel_ridge(X @ X.T, Y, np.float32(l2))
    np.testing.assert_allclose(single.l2, l2, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused(kernels):
    train, cross, test = kernels
    one = np.ones((1, 1))
    with pytest.raises(ValueError, match=r"train must be \[n, n\], not empty"):
        infinite.kernel_ridge(cross.ntk, Y)
    with pytest.raises(ValueError, match="y must have 30 rows, as train has. Got 6"):
        infinite.kernel_ridge(train.ntk, Y[:6])
    with pytest.raises(ValueError, match="y must be finite"):
        infinite.kernel_ridge(train.ntk, np.full_like(Y, np.nan))
    with pytest.raises(ValueError, match="train must be positive definite somewhere"):
        infinite.kernel_ridge(0 * train.ntk, Y)
    with pytest.raises(ValueError, match="l2 must be at least 0 and finite. Got -1"):
        infinite.kernel_ridge(train.ntk, Y, np.float32(-1))
    with pytest.raises(ValueError, match="noise must be finite and at least 0. Got -1"):
        infinite.gp_posterior(train.nngp, Y, cross.nngp, test.nngp, -1)
    with pytest.raises(ValueError, match="Got a singular matrix: raise the noise"):
        infinite.gp_posterior(np.ones((2, 2)), Y[:2], np.ones((1, 2)), one, 0.0)
    with pytest.raises(ValueError, match=r"cross must be \[t, n\] with n = 30"):
        infinite.gradient_flow(train.ntk, Y, cross.ntk.T)
    with pytest.raises(ValueError, match=r"test must be \[t, t\] with t = 6"):
        infinite.gp_posterior(train.nngp, Y, cross.nngp, one, 0.1)
    with pytest.raises(ValueError, match="t must be at least 0. Got -1"):
        infinite.gradient_flow(train.ntk, Y, cross.ntk, -1)
    with pytest.raises(ValueError, match="l2 must be finite and at least 0. Got -1"):
        infinite.gradient_flow(train.ntk, Y, cross.ntk, l2=-1)
    with pytest.raises(ValueError, match="train must hold both kernels"):
        infinite.ensemble(infinite.Kernels(ntk=train.ntk), Y, cross, test.nngp)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\). Got 0 to 2"):
        infinite.one_hot([0, 2], 2)
    with pytest.raises(ValueError, match="labels must be integers"):
        infinite.one_hot([0.5], 2)
    product = infinite.stored_product(train.ntk)
    with pytest.raises(ValueError, match="l2 must be positive and finite. Got 0"):
        infinite.kernel_cg(product, Y, 0.0)
    with pytest.raises(ValueError, match=r"phi must be \[n, m\] with n = 30"):
        infinite.kernel_cg(product, Y, 1.0, np.ones((3, 1)))
    with pytest.raises(ValueError, match="tolerance must be above zero"):
        infinite.kernel_cg(product, Y, 1.0, tolerance=0)
    with pytest.raises(ValueError, match=r"y must be finite and \[n, o\]"):
        infinite.kernel_cg(product, Y[:, 0], 1.0)
    with pytest.raises(ValueError, match=r"kernel must be \[n, n\]"):
        infinite.stored_product(cross.ntk)
    with pytest.raises(ValueError, match="batch_size must be at least 1. Got 0"):
        infinite.stored_product(train.ntk, batch_size=0)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 30\]. Got 31"):
        infinite.nystrom(NET, X, 31, RNG)
    with pytest.raises(ValueError, match="not all without a kernel"):
        infinite.nystrom(infinite.Dense(), 0 * X, 3, RNG)
    with pytest.raises(ValueError, match="x must have a finite kernel"):
        infinite.nystrom(NET, np.nan * X, 3, RNG)
    with pytest.raises(ValueError, match=r"x1 must be .*, not empty. Got \(0, 4"):
        infinite.save_kernel("unused.npy", NET, X[:0])
    with pytest.raises(ValueError, match=r"x2 must be .*, not empty. Got \(0, 4"):
        infinite.blocks(NET, X, X[:0])
    with pytest.raises(ValueError, match="get must be nngp or ntk. Got 'both'"):
        infinite.blocks(NET, X, get="both")
    with pytest.raises(ValueError, match="batch_size must be at least 1. Got 0"):
        infinite.blocks(NET, X, batch_size=0)
