import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model

import snnk_jax as snnk
from snnk_jax.calibration import balance, fit_linear, fit_readout, set_references
from snnk_jax.features import URF, ArcCosine, Exponential, Polynomial
from tests.tiers import slow_but

WIDTH, OUTPUTS = 16, 24


def make_layer(
    kappa=1.0, power=0.0, mean=0.0, num=256, width=WIDTH, outputs=OUTPUTS, seed=0
):
    """Inputs and weights of spectrum i^-power in bases of their own."""
    rng = np.random.default_rng(seed)
    root = np.arange(1, width + 1.0) ** (-power / 2)

    def draw(count):
        basis, _ = np.linalg.qr(rng.normal(size=(width, width)))
        sample = rng.normal(size=(count, width)) * root @ basis
        return sample * (kappa / np.mean(np.sum(sample**2, axis=1))) ** 0.5

    x, kernel = draw(num), draw(outputs).T
    x = x + mean * rng.normal(size=width)
    bias = rng.normal(size=outputs)
    return [jnp.asarray(a, jnp.float32) for a in (x, kernel, bias)]


def mse(features, params, x, kernel, bias=None):
    y = np.asarray(snnk.snnk_dense(features, params, x, kernel, bias), np.float64)
    error = np.mean((y - np.asarray(features.exact(x, kernel, bias), np.float64)) ** 2)
    return error if np.isfinite(error) else np.inf


def float64(a):
    return np.asarray(a, np.float64)


# Balancing.

REGIMES = {
    "isotropic": {},
    "isotropic_large": {"kappa": 4.0},
    "decaying": {"kappa": 4.0, "power": 1.0},
    "steep": {"kappa": 20.0, "power": 2.0},
    "mean": {"kappa": 1.0, "mean": 2.0},
    "few_samples": {"kappa": 2.0, "power": 1.0, "num": 10},
    "one_sample": {"num": 1},
    "tiny": {"kappa": 1e-6},
    "one_output": {"kappa": 2.0, "outputs": 1},
}
MAPS = {
    "cos": URF(num_features=64),
    "cos_exact": URF(num_features=65, exact_degree=1, scale=1.0),
    "gelu": URF(activation="gelu", num_features=96, kappa=2.0),
    "sech": URF(activation="sech", num_features=64, spectrum="sampled"),
    "exp": Exponential(num_features=64),
    "hadamard": URF(num_features=64, projection="hadamard"),
    "shrunk": URF(activation="gelu", num_features=96, exact_degree=1, shrinkage=True),
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", slow_but(("cos", "gelu"), MAPS))
def test_never_worse_on_the_samples(name, regime):
    features = MAPS[name]
    layer = make_layer(**REGIMES[regime])
    params = features.init(jax.random.key(0), WIDTH)
    if features.shrinkage:  # which looks at the samples in any case
        params |= {"reference": layer[0]}
    before = mse(features, params, *layer)
    balanced = balance(features, params, *layer)
    after = mse(features, balanced, *layer)
    assert np.isfinite(after)
    assert after <= before * (1 + 1e-5)
    # Never changed: the random directions themselves.
    for field in set(params) & {"omega", "rates", "weights", "input_signs"}:
        np.testing.assert_array_equal(balanced[field], params[field])


def moments(params, x, kernel):
    t = (float64(x) - float64(params["mean"])) @ float64(params["metric"])
    u = float64(kernel).T @ float64(params["dual_metric"])
    return t.T @ t / len(t), u.T @ u / len(u)


@pytest.mark.parametrize("activation", ["cos", "exp"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_metric_is_the_documented_one(activation, mean):
    x, kernel, bias = make_layer(kappa=8.0, power=1.5, mean=mean)
    features = MAPS[activation]
    params = features.init(jax.random.key(0), WIDTH)
    params = balance(features, params, x, kernel, bias)
    product = float64(params["metric"]) @ float64(params["dual_metric"]).T
    np.testing.assert_allclose(product, np.eye(WIDTH), atol=2e-4)
    np.testing.assert_allclose(params["mean"], x.mean(axis=0), atol=1e-6)
    t, u = moments(params, x, kernel)
    # Both are diagonal, and equal up to the scale that goes with each A_l.
    off = np.abs(t - np.diag(np.diag(t))).max() / np.abs(t).max()
    assert off < 2e-3  # of directions that the samples hardly show
    ratio = np.diag(t) / np.diag(u)
    stretch = float64(params["stretch"])
    shape = (1 - stretch**2) / 4
    assert np.all(shape <= 0)
    scale = np.ones(WIDTH) if activation == "exp" else 1 / np.sqrt(2 * stretch**2 - 1)
    # A_l = (1 - 1 / r^2) / 8, that is stretch^2 = (1 + 1 / r^2) / 2, and c^2 = r.
    np.testing.assert_allclose(ratio[:8], scale[:8] ** 2, rtol=0.05)


def test_moments_agree_and_are_the_nuclear_norm():
    # Of the exponential, whose A_l leave the metric alone.
    x, kernel, _ = make_layer(kappa=3.0, power=2.0, num=4096)
    features = Exponential(num_features=2048)
    params = balance(features, features.init(jax.random.key(0), WIDTH), x, kernel)
    t, u = moments(params, x, kernel)
    np.testing.assert_allclose(t, u, rtol=0.02, atol=0.005 * t.max())
    kappa = snnk.diagnostics.kappa(x, kernel).balanced
    np.testing.assert_allclose(np.trace(t), kappa, rtol=0.01)
    np.testing.assert_allclose(np.trace(u), kappa, rtol=0.01)


@pytest.mark.parametrize("name", ["cos", "cos_exact", "exp"])
def test_balanced_maps_are_unbiased(name):
    fields = {"projection": "gaussian", "kappa": 0.5}
    features = dataclasses.replace(MAPS[name], **fields)
    x, kernel, bias = make_layer(kappa=2.0, power=2.0, mean=0.2, num=64)
    bias = bias / 4
    params = features.init(jax.random.key(0), WIDTH)
    params = balance(features, params, x, kernel, bias)
    assert "metric" in params
    x, kernel, bias = x[:4], kernel[:, :3], bias[:3]

    def one(key):
        drawn = features.init(key, WIDTH)
        fresh = {k: v for k, v in drawn.items() if k != "scale"}
        return snnk.snnk_dense(features, params | fresh, x, kernel, bias)

    values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 4096))
    values = float64(values)
    error = values.mean(axis=0) - float64(features.exact(x, kernel, bias))
    deviation = values.std(axis=0, ddof=1) / 64
    assert np.all(deviation < 0.02)
    assert np.all(np.abs(error) < 4.5 * deviation)


@pytest.mark.parametrize(("kappa", "gain"), [(4.0, 1e2), (10.0, 1e8)])
def test_decaying_spectra_gain_orders_of_magnitude(kappa, gain):
    # A.8 of the notes: relative errors of 2e12 and .32 at kappa 10, m = 512.
    x, kernel, _ = make_layer(kappa, 2.0, num=2048, width=64, outputs=64)
    x, fresh = x[:1024], x[1024:]
    features = URF(num_features=512, scale=1.0)
    params = features.init(jax.random.key(0), 64)
    before = mse(features, params, fresh, kernel)
    balanced = balance(features, params, x, kernel)
    after = mse(features, balanced, fresh, kernel)
    assert after < before / gain
    assert after < 0.5


def test_isotropic_data_keep_a_scalar_scale():
    x, kernel, _ = make_layer(0.5, num=1024)
    params = MAPS["cos"].init(jax.random.key(0), WIDTH)
    balanced = balance(MAPS["cos"], params, x, kernel)
    assert "metric" not in balanced
    assert balanced["scale"].shape == ()


def test_centring_takes_a_large_mean_out():
    features = URF(num_features=128, scale=1.0)
    params = features.init(jax.random.key(0), WIDTH)
    x, kernel, bias = make_layer(0.5, mean=2.0)
    balanced = balance(features, params, x, kernel, bias)
    np.testing.assert_allclose(balanced["mean"], x.mean(axis=0), atol=1e-6)
    after = mse(features, balanced, x, kernel, bias)
    assert after < 1e-3 * mse(features, params, x, kernel, bias)
    # As good as the same data without the mean: it goes into the bias, exactly.
    mean = x.mean(axis=0)
    shift = bias + mean @ kernel
    centred = {k: v for k, v in balanced.items() if k != "mean"}
    moved = mse(features, centred, x - mean[None], kernel, shift)
    np.testing.assert_allclose(after, moved, rtol=1e-3)


def test_ordered_samples_are_judged_from_end_to_end():
    # Small inputs first: fewer rows than twice those that are judged.
    rng = np.random.default_rng(0)
    norms = np.repeat([0.1, 3.0], [1024, 976])[:, None]
    x = rng.normal(size=(2000, 4))
    x = jnp.asarray(norms * x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(4, 6)) / 2, jnp.float32)
    features = URF(num_features=64, scale=0.6)
    params = features.init(jax.random.key(1), 4)
    balanced = balance(features, params, x, kernel)
    assert mse(features, balanced, x, kernel) <= mse(features, params, x, kernel)
    shrunk = URF(num_features=64, scale=0.6, shrinkage=True)
    params = shrunk.init(jax.random.key(1), 4)
    reference = set_references(shrunk, params, x[1024 - 256 :][:511])["reference"]
    assert np.linalg.norm(reference, axis=1).max() > 2


@pytest.mark.slow
def test_shrinkage_takes_the_samples_as_references():
    features = MAPS["shrunk"]
    x, kernel, bias = make_layer(2.0, 1.0, mean=0.5, num=2048)
    x, fresh = x[:1024], x[1024:]
    params = features.init(jax.random.key(0), WIDTH)
    balanced = balance(features, params, x, kernel, bias)
    assert balanced["reference"].shape == (256, WIDTH)
    np.testing.assert_array_equal(balanced["reference"], x[::4])
    # Damped beyond the upper tenth of the references, or beyond them all.
    t = float64(balanced["reference"]) - float64(balanced.get("mean", 0.0))
    if "metric" in balanced:
        t = t @ float64(balanced["metric"])
    else:
        t = t * float(balanced["scale"])
    ends = np.quantile(np.sum(t**2, axis=1), [0.9, 1.0])
    assert np.isclose(float(balanced["cap"]), ends, rtol=1e-4).any()
    middle, row = x.mean(axis=0), features.row
    shift = bias + middle @ kernel
    signal = (fresh - middle[None]) @ kernel
    line = row(shift)[None] + row.grad(shift)[None] * signal
    exact = features.exact(fresh, kernel, bias)
    error = mse(features, balanced, fresh, kernel, bias)
    assert error**0.5 < 1.05 * np.mean(float64(line - exact) ** 2) ** 0.5


@pytest.mark.parametrize(
    "name", slow_but(("cos_exact",), ("cos", "cos_exact", "hadamard", "shrunk"))
)
def test_bfloat16_params(name):
    features = MAPS[name]
    x, kernel, bias = make_layer(10.0, 3.0)
    params = features.init(jax.random.key(0), WIDTH, jnp.bfloat16)
    balanced = balance(features, params, x, kernel, bias)
    assert {leaf.dtype for leaf in jax.tree.leaves(balanced)} == {jnp.dtype("bfloat16")}
    before = mse(features, params, x, kernel, bias)
    assert mse(features, balanced, x, kernel, bias) < 0.5 * before
    short = [a.astype(jnp.bfloat16) for a in (x, kernel, bias)]
    assert np.isfinite(mse(features, balanced, *short))


def test_hadamard_metric_agrees_with_its_dense_directions():
    features = MAPS["hadamard"]
    x, kernel, bias = make_layer(6.0, 1.5)
    params = features.init(jax.random.key(0), WIDTH)
    balanced = balance(features, params, x, kernel, bias)
    assert "metric" in balanced
    dense = {k: v for k, v in balanced.items() if k not in params}
    dense["omega"] = snnk.projections.matrix(params)
    np.testing.assert_allclose(
        snnk.snnk_dense(features, balanced, x, kernel, bias),
        snnk.snnk_dense(MAPS["cos"], dense, x, kernel, bias),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_balanced_is_refused():
    x, kernel, bias = make_layer()
    for features in (
        ArcCosine(num_features=8),
        Polynomial(coefficients=(0.0, 0.0, 1.0), num_features=8),
    ):
        name = type(features).__name__
        params = features.init(jax.random.key(0), WIDTH)
        with pytest.raises(ValueError, match=f"URF or Exponential.* Got {name}"):
            balance(features, params, x, kernel)
    features = MAPS["cos"]
    params = features.init(jax.random.key(0), WIDTH)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="x must be finite. Got inf or NaN"):
            balance(features, params, x.at[3, 2].set(bad), kernel)
    with pytest.raises(ValueError, match=r"kernel \[d, o\] with the same d"):
        balance(features, params, x[:, :3], kernel)
    with pytest.raises(ValueError, match=r"bias must have shape \(24,\)"):
        balance(features, params, x, kernel, bias[:3])


# Fitting.


def problem(num, width, outputs=3, noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(num, width)) * np.arange(1, width + 1) ** -0.5
    y = phi @ rng.normal(size=(width, outputs)) + noise * rng.normal(
        size=(num, outputs)
    )
    return jnp.asarray(phi, jnp.float32), jnp.asarray(y, jnp.float32)


def hat(phi, l2):
    gram = phi @ phi.T
    return gram @ np.linalg.inv(gram + l2 * np.eye(len(phi)))


@pytest.mark.parametrize(("num", "width"), [(80, 12), (12, 80), (30, 30)])
@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
def test_equals_ridge_regression(num, width, l2):
    phi, y = problem(num, width)
    psi, report = fit_linear(phi, y, l2)
    ridge = sklearn.linear_model.Ridge(
        alpha=l2 * num, fit_intercept=False, solver="svd"
    )
    expected = ridge.fit(float64(phi), float64(y)).coef_.T
    np.testing.assert_allclose(psi, expected, rtol=2e-5, atol=1e-6)
    assert psi.dtype == jnp.float32
    assert report.l2 == l2


def test_no_penalty_is_least_squares():
    phi, y = problem(40, 8)
    psi, report = fit_linear(phi, y, 0.0)
    expected, *_ = np.linalg.lstsq(float64(phi), float64(y))
    np.testing.assert_allclose(psi, expected, rtol=1e-5, atol=1e-6)
    assert report.dof == pytest.approx(8, abs=1e-6)
    # The minimum norm solution where there are many, and where columns repeat.
    phi, y = problem(8, 40)
    psi, _ = fit_linear(phi, y, 0.0)
    expected = np.linalg.pinv(float64(phi)) @ float64(y)
    np.testing.assert_allclose(psi, expected, rtol=1e-4, atol=1e-5)
    twice = jnp.concatenate([phi.T, phi.T], axis=1)
    psi, _ = fit_linear(twice, phi.T[:, :2], 0.0)
    halves = (np.eye(16, 2) + np.eye(16, 2, -8)) / 2
    np.testing.assert_allclose(psi, halves, atol=1e-5)


@pytest.mark.parametrize(("num", "width"), [(40, 10), (30, 30), (20, 35)])
@pytest.mark.parametrize("seed", range(6))
def test_scores_are_their_definitions(num, width, seed):
    phi, y = problem(num, width, seed=seed)
    _, report = fit_linear(phi, y)
    phi, y = float64(phi), float64(y)

    def gcv(l2):
        # 1 - H = l2 (K + l2)^-1: l2 cancels, and no digits with it.
        rest = np.linalg.inv(phi @ phi.T + l2 * np.eye(num))
        return num * np.sum((rest @ y) ** 2) / np.trace(rest) ** 2

    assert report.gcv == pytest.approx(gcv(num * report.l2), rel=1e-3)
    assert report.dof == pytest.approx(np.trace(hat(phi, num * report.l2)), rel=1e-6)
    largest = np.linalg.norm(phi, ord=2) ** 2
    scores = [gcv(l2) for l2 in largest * np.logspace(-10, 2, 400)]
    # The minimum of a finer grid is hardly lower.
    assert 0.999 * min(scores) < report.gcv < 1.01 * min(scores)
    spread = np.sum((y - y.mean(axis=0)) ** 2, axis=0)
    residual = y - hat(phi, num * report.l2) @ y
    r2 = 1 - np.sum(residual**2, axis=0) / spread
    np.testing.assert_allclose(report.r2, r2, rtol=1e-6)
    total = 1 - np.sum(residual**2) / spread.sum()
    assert report.total_r2 == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(("num", "width"), [(24, 6), (12, 20)])
@pytest.mark.parametrize("l2", [None, 0.3, 1e-6])
def test_leave_one_out_is_refitting(num, width, l2):
    phi, y = problem(num, width)
    _, report = fit_linear(phi, y, l2)
    phi, y = float64(phi), float64(y)
    error, spread = np.zeros_like(y), np.zeros_like(y)
    for i in range(num):
        rest = np.arange(num) != i
        gram = phi[rest] @ phi[rest].T + num * report.l2 * np.eye(num - 1)
        psi = phi[rest].T @ np.linalg.solve(gram, y[rest])
        error[i] = y[i] - phi[i] @ psi
        spread[i] = y[i] - y[rest].mean(axis=0)
    expected = 1 - np.sum(error**2, axis=0) / np.sum(spread**2, axis=0)
    np.testing.assert_allclose(report.loo_r2, expected, rtol=1e-4, atol=1e-5)
    total = 1 - np.sum(error**2) / np.sum(spread**2)
    assert report.total_loo_r2 == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert report.total_loo_r2 < report.total_r2


def test_no_peak_where_features_reach_the_samples():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3 * 256, 16)), jnp.float32)
    y = jnp.sin(x @ jnp.asarray(rng.normal(size=(16, 4)) / 4, jnp.float32))
    y = y + jnp.asarray(0.3 * rng.normal(size=y.shape), jnp.float32)
    errors, plain = {}, {}
    for num_features in (64, 256):
        features = ArcCosine(num_features=num_features)
        params = features.init(jax.random.key(0), 16)
        for l2, record in ((None, errors), (1e-6, plain)):
            psi, report = fit_readout(features, params, x[:256], y[:256], l2)
            test = snnk.contract(features.phi(params, x[256:]), psi)
            record[num_features] = float(jnp.mean((test - y[256:]) ** 2))
        assert report.total_r2 > report.total_loo_r2
    assert errors[256] < errors[64]
    assert plain[256] > 5 * plain[64]  # the peak is there without a penalty


def test_leave_one_out_predicts_the_test_error():
    x, kernel, bias = make_layer(4.0, num=2000)
    features = ArcCosine(num_features=128)
    params = features.init(jax.random.key(0), WIDTH)
    y = snnk.kernels.ffl("gelu", x, kernel, bias)
    psi, report = fit_readout(features, params, x[:500], y[:500])
    rest = float64(snnk.contract(features.phi(params, x[500:]), psi) - y[500:])
    spread = np.sum(np.var(float64(y[500:]), axis=0))
    tested = 1 - np.sum(np.mean(rest**2, axis=0)) / spread
    assert 1 - report.total_loo_r2 == pytest.approx(1 - tested, rel=0.15)


def test_shares_are_of_each_output():
    phi, y = problem(60, 5, outputs=2, noise=0.0)
    rng = np.random.default_rng(1)
    y = y.at[:, 1].set(jnp.asarray(rng.normal(size=60), jnp.float32))
    _, report = fit_linear(phi, y, 1e-6)
    assert report.r2.shape == report.loo_r2.shape == (2,)
    assert report.r2[0] > 0.999
    assert report.r2[1] < 0.4
    assert report.r2[1] < report.total_r2 < report.r2[0]


def test_a_constant_output_has_no_share():
    phi, y = problem(30, 4, outputs=2)
    y = y.at[:, 0].set(2.0)
    _, report = fit_linear(phi, y)
    assert np.isnan(report.r2[0])
    assert np.isnan(report.loo_r2[0])
    assert np.isfinite(report.r2[1])
    assert np.isfinite(report.total_r2)
    _, report = fit_linear(phi, y[:, :1])
    assert np.isnan(report.total_r2)
    assert np.isnan(report.total_loo_r2)


def test_fit_readout_is_fit_linear_on_the_columns():
    features = ArcCosine(num_features=32)
    params = features.init(jax.random.key(0), WIDTH)
    x, kernel, _ = make_layer()
    y = snnk.kernels.ffl("relu", x, kernel)
    psi, report = fit_readout(features, params, x, y)
    expected, same = fit_linear(features.phi(params, x), y)
    np.testing.assert_array_equal(psi, expected)
    assert report.l2 == same.l2
    assert psi.shape == (32, OUTPUTS)


def test_fitted_readout_beats_the_one_from_weights():
    features = URF(activation="gelu", num_features=256, exact_degree=1)
    x, kernel, bias = make_layer(2.0, num=2000)
    params = features.init(jax.random.key(0), WIDTH)
    y = snnk.kernels.ffl("gelu", x, kernel, bias)
    psi, _ = fit_readout(features, params, x[:1000], y[:1000])
    fitted = snnk.contract(features.phi(params, x[1000:]), psi)
    error = np.mean(float64(fitted - y[1000:]) ** 2)
    assert error < 0.1 * mse(features, params, x[1000:], kernel, bias)


@pytest.mark.usefixtures("unchecked")
def test_float64_targets_of_numpy_are_taken_without_x64():
    phi, y = problem(20, 4)
    psi, _ = fit_linear(phi, np.asarray(y, np.float64))
    np.testing.assert_array_equal(psi, fit_linear(phi, y)[0])


def test_readout_takes_the_dtype_of_the_targets():
    phi, y = problem(20, 4)
    psi, _ = fit_linear(phi, y.astype(jnp.bfloat16))
    assert psi.dtype == jnp.bfloat16


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_fitted_is_refused():
    phi, y = problem(10, 4)
    for dtype in (jnp.int32, bool):
        with pytest.raises(ValueError, match="floating; one-hot encode classes. Got"):
            fit_linear(phi, y.astype(dtype))
    for bad in (phi[:5], phi[0], phi[None]):
        with pytest.raises(ValueError, match=r"targets \[n, o\] with the same n"):
            fit_linear(bad, y)
    with pytest.raises(ValueError, match="with the same n"):
        fit_linear(phi[:0], y[:0])
    for l2 in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="l2 must be None, or at least 0"):
            fit_linear(phi, y, l2)
    with pytest.raises(ValueError, match="features must be finite"):
        fit_linear(phi.at[0, 0].set(np.nan), y)
    with pytest.raises(ValueError, match="targets must be finite"):
        fit_linear(phi, y.at[0, 0].set(np.inf))
    features = ArcCosine(num_features=8)
    params = features.init(jax.random.key(0), 4)
    with pytest.raises(ValueError, match="x must be finite"):
        fit_readout(features, params, phi.at[0, 0].set(np.nan), y)
