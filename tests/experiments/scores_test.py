import numpy as np
import pytest

from experiments.scores import METRICS, scores


def one_hot(predicted, classes=2):
    return np.eye(classes)[predicted]


def test_two_classes_by_the_formulas():
    labels = np.array([1, 1, 1, 0, 0, 1, 0, 0])
    predicted = np.array([1, 1, 0, 0, 1, 1, 0, 0])
    tp, fp, fn, tn = 3, 1, 1, 3
    found = scores(one_hot(predicted), labels)
    assert found["accuracy"] == 6 / 8
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    bottom = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / bottom)


def test_more_classes_have_an_accuracy_alone():
    found = scores(one_hot([0, 1, 2, 2], 3), np.array([0, 1, 2, 1]))
    assert found == {"accuracy": 0.75}


def test_one_class_predicted_is_no_correlation():
    found = scores(one_hot([0, 0, 0]), np.array([0, 1, 0]))
    assert (found["f1"], found["matthews"]) == (0.0, 0.0)


def test_values_are_correlated():
    labels = np.array([0.1, 0.4, 0.2, 0.9], np.float32)
    found = scores(np.exp(5 * labels)[:, None], labels)
    assert found["spearman"] == pytest.approx(1)
    assert 0.5 < found["pearson"] < 0.99
    assert scores(-labels[:, None], labels)["pearson"] == pytest.approx(-1)


def test_equal_predictions_are_no_correlation():
    found = scores(np.ones((3, 1)), np.array([0.1, 0.2, 0.3]))
    assert found == {"spearman": 0.0, "pearson": 0.0}


def test_every_metric_is_among_the_scores():
    rng = np.random.default_rng(0)
    classes = scores(rng.normal(size=(9, 2)), rng.integers(0, 2, 9))
    values = scores(rng.normal(size=(9, 1)), rng.normal(size=9))
    assert {*classes, *values} == set(METRICS)


def test_constant_labels_have_no_correlation():
    found = scores(np.arange(3.0)[:, None], np.full(3, 0.5))
    assert found == {"spearman": 0.0, "pearson": 0.0}


@pytest.mark.parametrize("labels", [np.array([0, 1]), np.array([0.1, 0.2])])
def test_nan_is_no_prediction(labels):
    """The largest of NaN logits is the first: class 0 by accident."""
    with pytest.raises(ValueError, match="outputs must be finite. Got 4"):
        scores(np.full((2, 2), np.nan), labels)
