"""What a trained model is judged by: GLUE's metrics, from all its outputs at once."""

from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics

CLASSIFICATION = ("accuracy", "f1", "matthews")
REGRESSION = ("spearman", "pearson")
METRICS = (*CLASSIFICATION, *REGRESSION)


def scores(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of outputs ``[n, k]``, all of which are better the larger they are.

    Args:
      outputs: logits; or predictions, of which the first column counts.
      labels: classes ``int[n]``; or values ``float[n]``, which make it a regression.

    Returns:
      For classes the accuracy, and for two of them F1 of the second and Matthews'
      correlation (0 where only one is predicted); for values Spearman's and Pearson's
      correlation (0 where all predictions or all labels are equal).

    Raises:
      ValueError: if outputs are not finite, whose largest is none.
    """
    if not np.all(np.isfinite(outputs)):
        count = int(np.sum(~np.isfinite(outputs)))
        raise ValueError(f"outputs must be finite. Got {count} that are not.")
    if np.issubdtype(labels.dtype, np.floating):
        predictions = np.asarray(outputs[:, 0], np.float64)
        if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return {"spearman": 0.0, "pearson": 0.0}
        rank: Any = stats.spearmanr(predictions, labels)
        line: Any = stats.pearsonr(predictions, labels)
        return {"spearman": float(rank.statistic), "pearson": float(line.statistic)}
    predicted = np.argmax(outputs, axis=1)
    found = {"accuracy": float(np.mean(predicted == labels))}
    if outputs.shape[1] == 2:
        zero: Any = 0  # the stubs know the default alone
        found["f1"] = float(metrics.f1_score(labels, predicted, zero_division=zero))
        found["matthews"] = float(metrics.matthews_corrcoef(labels, predicted))
    return found
