import copy
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from snnk_jax import ridge
from snnk_jax.estimators import FeatureMapTransformer, SNNKClassifier, SNNKRegressor
from snnk_jax.features import URF, ArcCosine

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {"num_features": 24, "random_state": 0}
GIVEN = {**SMALL, "l2": 1e-2}
WEIGHTS_OF_ROWS = {
    "check_sample_weight_equivalence_on_dense_data": (
        "generalised cross-validation counts rows, whatever their weights"
    )
}


def rows(num=60, dtype="float64"):
    x = np.random.default_rng(0).normal(size=(num, 3))
    y = np.stack([np.sin(2 * x[:, 0]) * x[:, 1], np.abs(x[:, 2])], axis=1)
    return x.astype(dtype), y.astype(dtype)


def labelled(num=60):
    x, y = rows(num)
    return x, np.array(["low", "middle", "top"])[np.digitize(y[:, 0], [-0.4, 0.4])]


def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], y[order]


@parametrize_with_checks([FeatureMapTransformer(**SMALL), SNNKClassifier(**GIVEN)])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([SNNKRegressor(**GIVEN)])
def test_scikit_learn_checks_of_the_regressor(estimator, check):
    check(estimator)


# Checks fit a few rows of toy targets exactly: the least penalty is chosen.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::snnk_jax.ridge.PrecisionWarning")
@parametrize_with_checks(
    [SNNKRegressor(num_features=24), SNNKClassifier(num_features=24)],
    expected_failed_checks=lambda estimator: WEIGHTS_OF_ROWS,
)
def test_scikit_learn_checks_of_a_chosen_penalty(estimator, check):
    check(estimator)


@pytest.mark.parametrize("intercept", [True, False])
def test_it_is_ridge_regression_of_the_transformed_rows(intercept):
    x, y = rows()
    weights = np.linspace(0.5, 2, len(x))
    model = SNNKRegressor(**GIVEN, depth=2, fit_intercept=intercept)
    model.fit(x[:40], y[:40], sample_weight=weights[:40])
    features = FeatureMapTransformer(**SMALL, depth=2).fit(x)
    expected = Ridge(alpha=1e-2 * weights[:40].sum(), fit_intercept=intercept)
    expected.fit(features.transform(x[:40]), y[:40], sample_weight=weights[:40])
    np.testing.assert_allclose(
        model.predict(x[40:]), expected.predict(features.transform(x[40:])), rtol=1e-8
    )
    residual = np.average(
        (model.predict(x[:40]) - y[:40]) ** 2, axis=0, weights=weights[:40]
    )
    np.testing.assert_allclose(model.solution_.residual, residual, rtol=1e-8)


def test_arccos_is_random_relu_neurons_with_biases():
    x, _ = rows()
    features = FeatureMapTransformer(**SMALL, scale=0.7).fit(x)
    omega = features.params_["omega"]
    z = 0.7 * x @ omega[:, :-1].T + omega[:, -1]
    expected = np.maximum(z, 0) * (2 / 24) ** 0.5
    np.testing.assert_allclose(features.transform(x), expected, rtol=1e-12)
    assert FeatureMapTransformer(**SMALL).fit(x).scale_ == 3**-0.5


def test_a_feature_map_is_taken_as_it_is():
    x, _ = rows(dtype="float32")
    fm = ArcCosine(order=0, num_features=16)
    features = FeatureMapTransformer(fm, scale=1.0, random_state=0).fit(x)
    assert features.features_ == fm
    params = jax.tree.map(jnp.asarray, features.params_)
    expected = fm.phi(params, jnp.asarray(x))
    np.testing.assert_array_equal(features.transform(x), expected)
    assert list(features.get_feature_names_out()[:2]) == [
        "featuremaptransformer0",
        "featuremaptransformer1",
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_follows_the_rows(dtype):
    x, y = rows(dtype=dtype)
    model = SNNKRegressor(**GIVEN).fit(x, y)
    assert model.predict(x).dtype == model.stats_.gram.high.dtype == dtype
    assert model.predict(x.astype("float32")).dtype == dtype
    assert FeatureMapTransformer(**SMALL).fit_transform(x).dtype == dtype
    wide = SNNKRegressor(**GIVEN).fit(*rows())
    np.testing.assert_allclose(model.predict(x), wide.predict(x), atol=1e-4)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("kind", [SNNKRegressor, SNNKClassifier])
def test_portions_and_chunks_make_no_difference(kind):
    x, y = labelled() if kind is SNNKClassifier else rows()
    classes = {"classes": np.unique(y)} if kind is SNNKClassifier else {}
    scores = "decision_function" if kind is SNNKClassifier else "predict"
    whole = kind(**GIVEN).fit(x, y)
    parts = kind(**GIVEN, chunk_size=7)
    parts.partial_fit(x[:13], y[:13], **classes)
    for start, stop in ((13, 14), (14, 60)):
        parts.partial_fit(x[start:stop], y[start:stop])
    assert parts.solution_.rows == len(x)
    expected = getattr(whole, scores)(x)
    np.testing.assert_allclose(
        getattr(parts, scores)(x), expected, rtol=1e-9, atol=1e-9
    )
    # fit begins anew.
    np.testing.assert_array_equal(
        getattr(parts.fit(x, y), scores)(x).shape, expected.shape
    )
    assert parts.solution_.rows == len(x)


@pytest.mark.parametrize("kind", [SNNKRegressor, SNNKClassifier])
def test_unlearning_leaves_the_other_rows(kind):
    x, y = labelled() if kind is SNNKClassifier else rows()
    scores = "decision_function" if kind is SNNKClassifier else "predict"
    weights = np.linspace(0.5, 2, len(x))
    model = kind(**GIVEN, chunk_size=8).fit(x, y, sample_weight=weights)
    before = getattr(model, scores)(x)
    model.unlearn(x[:20], y[:20], sample_weight=weights[:20])
    expected = kind(**GIVEN).fit(x[20:], y[20:], sample_weight=weights[20:])
    after = getattr(model, scores)(x)
    np.testing.assert_allclose(
        after, getattr(expected, scores)(x), rtol=1e-9, atol=1e-9
    )
    assert np.abs(after - before).max() > 1e-2
    assert model.solution_.rows == 40


def test_weights_are_repetitions():
    x, y = rows()
    weights = np.arange(len(x)) % 3
    model = SNNKRegressor(**GIVEN).fit(x, y, sample_weight=weights)
    repeated = SNNKRegressor(**GIVEN).fit(x.repeat(weights, 0), y.repeat(weights, 0))
    np.testing.assert_allclose(model.predict(x), repeated.predict(x), rtol=1e-9)
    assert np.abs(SNNKRegressor(**GIVEN).fit(x, y).predict(x) - model.predict(x)).max()


def test_streams_are_solved_once_when_asked(monkeypatch):
    x, y = rows()
    calls = []
    select = ridge.select_l2

    def counted(*args, **kwargs):
        calls.append(args)
        return select(*args, **kwargs)

    monkeypatch.setattr(ridge, "select_l2", counted)
    model = SNNKRegressor(**SMALL)
    for i in range(3):
        model.partial_fit(x[i::3], y[i::3])
    assert not calls
    model.predict(x)
    assert model.l2_ == model.solution_.l2 > 0
    assert 1 < model.dof_ < 25
    assert len(calls) == 1
    model.partial_fit(x, y).predict(x)
    assert len(calls) == 2


def test_nonlinear_targets():
    x, y = rows(500)
    linear = Ridge().fit(x[:400], y[:400]).score(x[400:], y[400:])
    model = SNNKRegressor(num_features=256, random_state=0).fit(x[:400], y[:400])
    assert linear < 0.2
    assert model.score(x[400:], y[400:]) > 0.9
    single = SNNKRegressor(num_features=256, random_state=0, l2=model.l2_)
    predictions = single.fit(x[:400], y[:400, 0]).predict(x[400:])
    assert predictions.shape == (100,)
    np.testing.assert_allclose(predictions, model.predict(x[400:])[:, 0], rtol=1e-5)


def test_digits_in_a_pipeline():
    x, y = digits()
    model = make_pipeline(StandardScaler(), SNNKClassifier(random_state=0))
    assert model.fit(x[:1200], y[:1200]).score(x[1200:], y[1200:]) > 0.95


def test_two_classes_have_one_score():
    x, y = labelled()
    two = y != "middle"
    model = SNNKClassifier(**GIVEN).fit(x[two], y[two])
    scores = model.decision_function(x)
    assert scores.shape == (60,)
    np.testing.assert_array_equal(model.predict(x) == "top", scores > 0)
    assert model.stats_.num_targets == 1
    assert not hasattr(model, "predict_proba")


def test_grid_search_over_everything():
    x, y = rows()
    grid = {
        "snnkregressor__l2": [1e-3, 1e3],
        "snnkregressor__features": ["arccos", ArcCosine(order=0, num_features=24)],
    }
    model = make_pipeline(StandardScaler(), SNNKRegressor(random_state=0))
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(x, y)
    assert search.best_params_["snnkregressor__l2"] == 1e-3
    assert len(search.cv_results_["params"]) == 4


def test_clones_are_unfitted_and_equal():
    model = SNNKRegressor(ArcCosine(num_features=8), depth=2, random_state=3)
    x, y = rows()
    copied = clone(model.fit(x, y))
    assert copied.get_params() == model.get_params()
    assert not hasattr(copied, "solution_")
    with pytest.raises(NotFittedError):
        copied.predict(x)
    np.testing.assert_array_equal(copied.fit(x, y).predict(x), model.predict(x))


def test_equal_maps_compile_once():
    x, y = rows()
    a, b = (SNNKRegressor(**{**GIVEN, "random_state": i}).fit(x, y) for i in range(2))
    assert not np.array_equal(a.params_["omega"], b.params_["omega"])
    assert jax.tree.structure(a._phi()) == jax.tree.structure(b._phi())


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_keep_their_dtype(again):
    x, y = rows()
    model = SNNKRegressor(**GIVEN).fit(x, y)
    copied = again(model)
    np.testing.assert_array_equal(copied.predict(x), model.predict(x))
    assert copied.solution_.kernel.dtype == "float64"
    np.testing.assert_allclose(
        copied.partial_fit(x, -y).predict(x), np.zeros_like(y), atol=1e-12
    )


def test_random_states():
    x, _ = rows()

    def omega(random_state):
        fitted = FeatureMapTransformer(num_features=4, random_state=random_state).fit(x)
        return fitted.params_["omega"]

    np.testing.assert_array_equal(omega(5), omega(np.random.RandomState(5)))
    assert not np.array_equal(omega(5), omega(6))
    assert not np.array_equal(omega(None), omega(None))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"features": "relu"},
            "features must be 'arccos' or a feature map. Got 'relu'",
        ),
        ({"features": 3}, "features must be 'arccos' or a feature map. Got 3."),
        (
            {"features": ArcCosine(num_features=4), "num_features": 4},
            "num_features must be None with a feature map, which has its own. Got 4.",
        ),
        (
            {"num_features": 0},
            "num_features must be a whole number .* Got 0.",
        ),
        ({"depth": 0}, "depth must be at least 1. Got 0."),
        ({"scale": -1.0}, "scale must be positive and finite. Got -1.0."),
        ({"chunk_size": 0}, "chunk_size must be at least 1. Got 0."),
        ({"l2": -1.0}, "l2 must be None, or at least 0 and finite. Got -1.0."),
        ({"l2": float("nan")}, "l2 must be None, or at least 0 and finite. Got nan."),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        SNNKRegressor(**parameters).fit(*rows())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(59), r"sample_weight must be \[60\], one a row. Got \(59,\)."),
        (-np.ones(60), "sample_weight must not be negative, nor all zero."),
        (np.zeros(60), "sample_weight must not be negative, nor all zero."),
        (np.full(60, np.nan), "sample_weight contains NaN"),
    ],
)
def test_wrong_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        SNNKRegressor(**GIVEN).fit(*rows(), sample_weight=weights)


def test_wrong_labels():
    x, y = labelled()
    model = SNNKClassifier(**GIVEN)
    with pytest.raises(ValueError, match="y must hold more than one class. Got"):
        model.fit(x, np.full(60, "low"))
    with pytest.raises(ValueError, match="classes must be given on the first call"):
        model.partial_fit(x, y)
    with pytest.raises(ValueError, match="y must hold labels of .* Got .'middle'"):
        model.partial_fit(x, y, classes=["low", "top"])
    model.partial_fit(x, y, classes=["top", "middle", "low"])
    with pytest.raises(ValueError, match="classes must be those of the first call"):
        model.partial_fit(x, y, classes=["low", "top"])
    with pytest.raises(ValueError, match="y must hold labels of .* Got .'none'"):
        model.partial_fit(x, np.full(60, "none"))
    assert model.solution_.rows == 60


def test_wrong_rows_leave_the_model_alone():
    x, y = rows()
    features = URF(activation="cos", num_features=16)
    model = SNNKRegressor(features, l2=1e-2, random_state=0).fit(x, y)
    before = model.predict(x)
    with pytest.raises(ValueError, match="features must be finite. Got inf or NaN"):
        model.partial_fit(100 * x, y)
    with pytest.raises(ValueError, match=r"y must be \[n, 2\]"):
        model.partial_fit(x, y[:, 0])
    with pytest.raises(ValueError, match="rows to unlearn must have been learned"):
        model.unlearn(np.concatenate([x, x]), np.concatenate([y, y]))
    np.testing.assert_array_equal(model.predict(x), before)


@pytest.mark.parametrize("kind", [SNNKRegressor, SNNKClassifier])
def test_wrong_first_rows_leave_nothing_behind(kind):
    x, y = labelled() if kind is SNNKClassifier else rows()
    classes = {"classes": np.unique(y)} if kind is SNNKClassifier else {}
    model = kind(URF(activation="cos", num_features=16), l2=1e-2, random_state=0)
    before = dict(vars(model))
    with pytest.raises(ValueError, match="features must be finite"):
        model.partial_fit(100 * x, y, **classes)
    with pytest.raises(ValueError, match="features must be finite"):
        model.fit(100 * x, y)
    assert vars(model) == before
    with pytest.raises(NotFittedError):
        model.predict(x)
    model.partial_fit(x[:, :2], y, **classes)
    assert model.predict(x[:, :2]).shape == y.shape


def test_sums_that_overflow_are_refused():
    x, y = rows(dtype="float32")
    model = SNNKRegressor(**GIVEN).fit(x, y)
    before = model.predict(x)
    with pytest.raises(ValueError, match="must be finite in float32. Got inf or NaN"):
        model.partial_fit(x, np.float32(1e20) * y)
    with pytest.raises(ValueError, match="must be finite in float32. Got inf or NaN"):
        SNNKRegressor(**GIVEN).fit(x, np.float32(1e20) * y)
    np.testing.assert_array_equal(model.predict(x), before)


def test_unfitted_models_unlearn_nothing():
    with pytest.raises(NotFittedError):
        SNNKRegressor().unlearn(*rows())
    with pytest.raises(NotFittedError):
        SNNKClassifier().unlearn(*labelled())


def test_without_scikit_learn_the_error_says_what_to_install():
    code = "import sys; sys.modules['sklearn'] = None; import snnk_jax.estimators"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "ImportError: snnk_jax.estimators must have scikit-learn" in result.stderr
    assert 'pip install "snnk_jax[sklearn]"' in result.stderr
