import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import snnk_jax as snnk
from snnk_jax import calibration
from snnk_jax.diagnostics import (
    affine_rmse,
    block_linearity,
    kappa,
    layer_report,
    predicted_rmse,
    suggest_num_features,
)
from snnk_jax.features import (
    URF,
    ArcCosine,
    Chain,
    Exponential,
    Polynomial,
    TowerFeatures,
)

WIDTH = 16
# What `redraw` draws anew; the rest of the parameters is calibrated.
DRAWN = {"omega", "rates", "weights", "input_signs", "signs", "lengths", "rows"}


def make_layer(size, power=0.0, num=400, width=WIDTH, outputs=32, seed=0):
    """Inputs and weights of spectrum i^-power, the product of the norms ``size``."""
    rng = np.random.default_rng(seed)
    root = np.arange(1, width + 1.0) ** (-power / 2)

    def draw(count):
        basis, _ = np.linalg.qr(rng.normal(size=(width, width)))
        sample = rng.normal(size=(count, width)) * root @ basis
        return sample * (size / np.mean(np.sum(sample**2, axis=1))) ** 0.5

    x, kernel, bias = draw(num), draw(outputs).T, rng.normal(size=outputs)
    return [jnp.asarray(a, jnp.float32) for a in (x, kernel, bias)]


def float64(a):
    return np.asarray(a, np.float64)


def error(features, params, *layer):
    y = snnk.snnk_dense(features, params, *layer)
    return np.sqrt(np.mean(float64(y - features.exact(*layer)) ** 2))


# Kappa.


@pytest.mark.parametrize(("num", "power"), [(400, 0.0), (400, 2.0), (9, 1.0)])
def test_kappa_is_its_formula(num, power):
    x, kernel, _ = make_layer(3.0, power, num)
    x = x + 0.5
    found = kappa(x, kernel)
    x, kernel = float64(x), float64(kernel)
    norms = np.linalg.norm(x, axis=1).mean(), np.linalg.norm(kernel, axis=0).mean()
    assert found.raw == pytest.approx(norms[0] * norms[1], rel=1e-6)
    centred = x - x.mean(axis=0)
    assert found.spread == pytest.approx(
        np.sqrt(np.mean((centred @ kernel) ** 2)), rel=1e-6
    )
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    inputs = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    weights = scipy.linalg.sqrtm(kernel @ kernel.T / kernel.shape[1]).real
    nuclear = np.linalg.svd(inputs @ weights, compute_uv=False).sum()
    assert found.balanced == pytest.approx(nuclear, rel=1e-4)


def test_balancing_reaches_the_balanced_kappa():
    x, kernel, _ = make_layer(8.0, 2.0, 2000)
    sizes = kappa(x, kernel)
    assert sizes.balanced < 0.7 * sizes.raw
    features = URF(num_features=512)
    params = features.init(jax.random.key(0), WIDTH)
    params = calibration.balance(features, params, x, kernel)
    t = (float64(x) - float64(params["mean"])) @ float64(params["metric"])
    u = float64(kernel).T @ float64(params["dual_metric"])
    # The scales of each direction cancel in the product of the two sizes.
    product = np.sqrt(np.mean(t**2, axis=0) * np.mean(u**2, axis=0)).sum()
    assert product == pytest.approx(sizes.balanced, rel=0.02)


def test_kappa_of_fewer_samples_than_the_width_needs_no_square_matrix():
    x, kernel, _ = make_layer(1.0, num=3)
    assert math.isfinite(kappa(x, kernel).balanced)
    assert kappa(x[:1], kernel).balanced == pytest.approx(0, abs=1e-6)


# Predictions.

MAPS = {
    "cos": URF(num_features=512, scale=1.0),
    "gelu": URF(activation="gelu", num_features=1024, scale=1.0),
    "tanh": URF(activation="tanh", num_features=1024, scale=1.0),
    "exp": Exponential(num_features=2048, scale=1.0),
    "arccos": ArcCosine(num_features=512),
    "polynomial": Polynomial(
        coefficients=(0.0, 0.5, 0.5, 0.2), num_features=512, sketch="maclaurin"
    ),
}
VARIANTS = {
    "plain": {},
    "exact": {"exact_degree": 1},
    "shrunk": {"exact_degree": 1, "shrinkage": True},
    "balanced": {},
    "balanced_shrunk": {"exact_degree": 1, "shrinkage": True},
}


def quiet(name, variant, size):
    """Whether 20 keys tell the error: fourth moments grow as e^(8 kappa)."""
    if name in ("arccos", "polynomial") or "balanced" in variant or variant == "shrunk":
        return True
    return size <= (0.5 if name == "exp" else 1.0)


PREDICTED = [
    (name, variant, size)
    for name, features in MAPS.items()
    for variant in (VARIANTS if isinstance(features, TowerFeatures) else ["plain"])
    for size in (0.5, 1.0, 2.0)
    if quiet(name, variant, size)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant", "size"), PREDICTED)
def test_predicted_error_is_the_error(name, variant, size):
    # Of other keys: 20 of them, everything calibrated kept.
    fields = dict(VARIANTS[variant])
    if name != "arccos":
        fields["kappa"] = size
    features = dataclasses.replace(MAPS[name], **fields)
    x, kernel, bias = make_layer(size, 1.0, num=256, outputs=64)
    bias = None if name == "arccos" else bias / 2
    params = features.init(jax.random.key(0), WIDTH)
    if "balanced" in variant:
        params = calibration.balance(features, params, x, kernel, bias)
    predicted = predicted_rmse(features, params, x, kernel, bias)
    squares = []
    for key in jax.random.split(jax.random.key(7), 20):
        drawn = features.init(key, WIDTH)
        fresh = {k: v for k, v in drawn.items() if k in DRAWN}
        squares.append(error(features, params | fresh, x, kernel, bias) ** 2)
    assert predicted == pytest.approx(np.mean(squares) ** 0.5, rel=0.15)


@pytest.mark.parametrize("regime", ["isotropic", "decaying"])
def test_redrawing_keeps_what_was_calibrated(regime):
    features = URF(num_features=80, exact_degree=1, shrinkage=True)
    x, kernel, bias = make_layer(2.0, 3.0 if regime == "decaying" else 0.0)
    params = features.init(jax.random.key(0), WIDTH)
    params = calibration.balance(features, params, x, kernel, bias)
    fresh = features.redraw(params, jax.random.key(1), WIDTH)
    assert not np.allclose(fresh["omega"], params["omega"])
    assert set(fresh) == set(params)
    for name in set(params) - {"omega"}:
        np.testing.assert_array_equal(fresh[name], params[name])


def test_prediction_is_a_number_and_not_a_draw():
    features = URF(num_features=64, scale=1.0)
    x, kernel, _ = make_layer(0.5)
    first, other = (
        predicted_rmse(features, features.init(jax.random.key(seed), WIDTH), x, kernel)
        for seed in (0, 1)
    )
    assert first == other


def test_prediction_of_an_overflow_is_infinite():
    features = URF(num_features=64, scale=1.0)
    params = features.init(jax.random.key(0), WIDTH)
    x, kernel, _ = make_layer(1e4)
    assert predicted_rmse(features, params, x, kernel) == math.inf


def test_many_samples_and_outputs_are_thinned():
    features = URF(num_features=256, scale=1.0)
    params = features.init(jax.random.key(0), WIDTH)
    x, kernel, bias = make_layer(0.5, num=600, outputs=600)
    few = predicted_rmse(features, params, x[::3], kernel[:, ::3], bias[::3])
    assert predicted_rmse(features, params, x, kernel, bias) == pytest.approx(
        few, rel=0.1
    )


# Suggestions.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "size", "power", "target"),
    [("gelu", 0.5, 0.0, 0.005), ("cos", 1.0, 1.0, 0.03), ("tanh", 2.0, 3.0, 0.06)],
)
def test_suggested_number_reaches_the_target(activation, size, power, target):
    x, kernel, bias = make_layer(size, power, num=1500)
    found = suggest_num_features(activation, x[:1000], kernel, bias, target_rmse=target)
    assert found.num_features == found.features.num_features
    assert found.predicted_rmse <= target
    held_out = error(found.features, found.params, x[1000:], kernel, bias)
    assert 0.3 * target < held_out < 1.1 * target
    assert f"{found.num_features} features reach" in found.reason
    assert found.kappa == kappa(x[:1000], kernel)
    # It needs them: the affine map does not reach it, nor does a third of m.
    assert found.affine_rmse > target
    assert found.num_features > 81
    fewer = dataclasses.replace(
        found.features, num_features=max(81, found.num_features // 3)
    )
    params = fewer.init(jax.random.key(0), WIDTH)
    params = calibration.balance(fewer, params, x[:1000], kernel, bias)
    assert predicted_rmse(fewer, params, x[:1000], kernel, bias) > target


@pytest.mark.slow
def test_a_large_kappa_is_infeasible_and_said_so():
    x, kernel, _ = make_layer(10.0)
    found = suggest_num_features(
        "cos", x, kernel, target_rmse=0.01, max_num_features=512
    )
    assert found.num_features is None
    assert found.predicted_rmse > 0.01
    assert found.features.num_features <= 512
    raw = f"kappa is {found.kappa.raw:.3g}, balanced {found.kappa.balanced:.3g}"
    assert raw in found.reason
    for remedy in ("Scale inputs", "lower rank", "fit_readout", "leave the layer"):
        assert remedy in found.reason
    assert "not 0.01" in found.reason


@pytest.mark.slow
def test_the_floor_of_the_series_is_named():
    x, kernel, _ = make_layer(0.5)
    found = suggest_num_features(
        "relu", x, kernel, target_rmse=0.005, max_num_features=256
    )
    floor = snnk.features.fourier_series("relu").l2_error
    assert found.num_features is None
    assert f"series of relu itself is off by {floor:.3g}" in found.reason
    assert "num_terms" in found.reason


@pytest.mark.slow
def test_the_affine_map_is_named_where_it_is_enough():
    x, kernel, _ = make_layer(0.5)
    found = suggest_num_features("gelu", x, kernel, target_rmse=0.05)
    assert found.affine_rmse == affine_rmse("gelu", x, kernel)
    assert found.reason.startswith(
        f"the affine map alone reaches {found.affine_rmse:.3g}"
    )
    assert found.num_features == 81  # the smallest it tries


@pytest.mark.slow
def test_a_limit_below_the_smallest_map_is_named():
    x, kernel, _ = make_layer(0.5)
    found = suggest_num_features(
        "gelu", x, kernel, target_rmse=0.05, max_num_features=20
    )
    assert found.num_features is None
    assert "max_num_features" in found.reason
    assert "not 0.05" not in found.reason  # the smallest map does reach it


def test_the_largest_number_is_tried():
    # Twice the smallest, 69 for inputs of width 4, would be beyond the maximum.
    x, kernel, _ = make_layer(1.0, width=4, outputs=8)

    def suggest(target):
        return suggest_num_features(
            "cos", x, kernel, target_rmse=target, max_num_features=137
        )

    best = suggest(1e-9)
    assert best.num_features is None
    assert best.features.num_features == 137
    found = suggest(1.001 * best.predicted_rmse)
    assert found.num_features is not None
    assert found.num_features > 69


def test_a_chain_is_predicted_on_its_inner_features():
    chain = Chain((ArcCosine(num_features=16), ArcCosine(num_features=512)))
    params = chain.init(jax.random.key(0), WIDTH)
    x, kernel, _ = make_layer(1.0)
    # The layer is one of the inner features, whatever the width of the inputs.
    inner = chain.inner(params, x)
    found = predicted_rmse(chain, params, x, kernel)
    last = {"omega": params["map1_omega"]}
    plain = predicted_rmse(chain.maps[1], last, inner, kernel)
    assert found == pytest.approx(plain, rel=0.3)
    y = snnk.snnk_dense(chain, params, x, kernel)
    error = np.sqrt(np.mean(float64(y - chain.exact(inner, kernel)) ** 2))
    assert error == pytest.approx(found, rel=0.5)


@pytest.mark.usefixtures("unchecked")
def test_samples_are_rows_of_finite_numbers():
    x, kernel, bias = make_layer(0.5)
    features = URF(num_features=64)
    params = features.init(jax.random.key(0), WIDTH)
    shrunk = URF(num_features=64, shrinkage=True)
    references = shrunk.init(jax.random.key(0), WIDTH)
    calls = {
        "kappa": lambda x: kappa(x, kernel),
        "predicted_rmse": lambda x: predicted_rmse(features, params, x, kernel),
        "affine_rmse": lambda x: affine_rmse("gelu", x, kernel, bias),
        "block_linearity": lambda x: block_linearity(x, x),
        "layer_report": lambda x: layer_report("gelu", x, kernel),
        "suggest": lambda x: suggest_num_features("gelu", x, kernel, target_rmse=1.0),
        "balance": lambda x: calibration.balance(features, params, x, kernel),
        "references": lambda x: calibration.set_references(shrunk, references, x),
    }
    for call in calls.values():
        for wrong in (x.reshape(5, -1, WIDTH), x[0], x[:0]):
            with pytest.raises(ValueError, match=r"x must be rows \[n, d\].* Got \("):
                call(wrong)
        with pytest.raises(ValueError, match="must be finite. Got inf or NaN"):
            call(x.at[1, 2].set(math.nan))
    with pytest.raises(ValueError, match="kernel must be finite"):
        calibration.balance(features, params, x, kernel.at[0, 0].set(math.inf))
    with pytest.raises(ValueError, match=r"x must have width 16. Got \(400, 3\)"):
        calibration.set_references(shrunk, references, x[:, :3])


@pytest.mark.usefixtures("unchecked")
def test_wrong_targets_are_refused():
    x, kernel, bias = make_layer(0.5)
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="target_rmse must be positive and fin"):
            suggest_num_features("gelu", x, kernel, target_rmse=target)
    for call in (
        lambda: suggest_num_features("gelu", x[:, :3], kernel, target_rmse=1.0),
        lambda: kappa(x[:, :3], kernel),
        lambda: layer_report("gelu", x[:, :3], kernel),
    ):
        with pytest.raises(ValueError, match=r"kernel \[d, o\] with the same d"):
            call()
    with pytest.raises(ValueError, match="bias must have shape"):
        layer_report("gelu", x, kernel, bias[:3])


# Affine parts.


def test_affine_rmse_is_its_formula():
    x, kernel, bias = make_layer(2.0)
    x = x + 0.3
    z = float64(x) @ float64(kernel) + float64(bias)
    middle = z.mean(axis=0)
    slope = 1 - np.tanh(middle) ** 2
    line = np.tanh(middle) + slope * (z - middle)
    expected = np.sqrt(np.mean((np.tanh(z) - line) ** 2))
    assert affine_rmse("tanh", x, kernel, bias) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num", [60, 12])
def test_linearity_is_leave_one_out_least_squares(num):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num, 5)).astype(np.float32)
    y = np.tanh(x @ rng.normal(size=(5, 3))).astype(np.float32)
    found = block_linearity(jnp.asarray(x), jnp.asarray(y))
    _, fit = calibration.fit_linear(
        jnp.asarray(np.column_stack([np.ones(num, np.float32), x])), jnp.asarray(y)
    )
    columns = np.column_stack([np.ones(num), float64(x)])
    wrong, spread = np.zeros_like(y), np.zeros_like(y)
    for i in range(num):
        rest = np.arange(num) != i
        # A ridge of the same penalty: least squares with rows of their own for it.
        design = np.concatenate([columns[rest], (num * fit.l2) ** 0.5 * np.eye(6)])
        target = np.concatenate([y[rest], np.zeros((6, 3))])
        best, *_ = np.linalg.lstsq(design, target)
        wrong[i] = y[i] - columns[i] @ best
        spread[i] = y[i] - y[rest].mean(axis=0)
    expected = 1 - np.sum(wrong**2, axis=0) / np.sum(spread**2, axis=0)
    np.testing.assert_allclose(found.r2, expected, rtol=1e-4, atol=1e-5)
    total = 1 - np.sum(wrong**2) / np.sum(spread**2)
    assert found.total_r2 == pytest.approx(total, rel=1e-4)
    assert found.total_r2 < 0.99


def test_linearity_of_linear_and_nonlinear_blocks():
    x, kernel, bias = make_layer(4.0)
    linear = block_linearity(x, x @ kernel + bias[None])
    np.testing.assert_allclose(linear.r2, 1, atol=1e-5)
    assert linear.total_r2 == pytest.approx(1, abs=1e-5)
    gelu = block_linearity(x, snnk.kernels.ffl("gelu", x, kernel))
    assert gelu.r2.shape == (32,)
    assert 0.5 < gelu.total_r2 < 0.95
    noise = jax.random.normal(jax.random.key(0), (400, 2))
    assert abs(block_linearity(x, noise).total_r2) < 0.1


# Verdicts.


@pytest.mark.slow
def test_small_kappa_is_affine():
    x, kernel, bias = make_layer(0.5, num=1000, outputs=64)
    report = layer_report("gelu", x, kernel, bias, num_features=64)
    assert report.verdict == "affine"
    assert report.affine < 0.3
    assert report.random < 1.05 * report.tangent


@pytest.mark.slow
def test_decaying_spectra_are_carried_by_random_features():
    x, kernel, bias = make_layer(3.0, 4.0, num=1000, outputs=64)
    report = layer_report("cos", x, kernel, bias, num_features=256)
    assert report.verdict == "random"
    assert report.random < 0.3 < report.affine
    # As measured on the layer itself.
    spread = np.std(float64(snnk.kernels.ffl("cos", x, kernel, bias)), axis=0)
    assert report.spread == pytest.approx(np.sqrt(np.mean(spread**2)), rel=1e-4)
    assert report.num_features == 256


@pytest.mark.slow
def test_a_fitted_readout_carries_what_random_features_do_not():
    x, kernel, bias = make_layer(10.0, num=1500, outputs=64)
    report = layer_report("relu", x, kernel, bias, num_features=200)
    assert report.verdict == "calibrated"
    assert report.calibrated < 0.3 < min(report.random, report.affine)


@pytest.mark.slow
def test_a_hopeless_layer_is_left():
    x, kernel, bias = make_layer(60.0, num=1000, outputs=64)
    report = layer_report("cos", x, kernel, bias, num_features=64)
    assert report.verdict == "leave"
    assert min(report.affine, report.random, report.calibrated) > 0.8


@pytest.mark.slow
def test_tolerance_moves_the_verdict():
    x, kernel, bias = make_layer(3.0, 4.0, num=1000, outputs=64)
    strict = layer_report("cos", x, kernel, bias, num_features=64, tolerance=1e-3)
    loose = layer_report("cos", x, kernel, bias, num_features=64, tolerance=2.0)
    assert strict.verdict == "leave"
    assert loose.verdict == "affine"
    assert strict.random == loose.random


def test_default_number_is_the_break_even():
    x, kernel, bias = make_layer(0.5, outputs=32)
    report = layer_report("gelu", x, kernel, bias)
    assert report.num_features == 16 * 32 // 48
    assert report.random == math.inf  # too narrow for the affine part
    assert report.verdict == "affine"


@pytest.mark.parametrize(
    "activation",
    [
        "identity",
        snnk.activations.get("polynomial", coefficients=(0.0, 1.0, 0.0)),
        lambda z: 2 * z + 1,
    ],
    ids=["identity", "polynomial", "function"],
)
def test_an_affine_activation_is_affine(activation):
    x, kernel, bias = make_layer(1.0)
    report = layer_report(activation, x, kernel, bias, num_features=64)
    assert report.verdict == "affine"
    assert report.affine < 1e-5
    with pytest.raises(ValueError, match="must not be affine"):
        suggest_num_features(activation, x, kernel, target_rmse=0.1)
