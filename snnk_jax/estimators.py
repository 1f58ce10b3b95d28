r"""scikit-learn estimators: random features and a ridge readout, in closed form.

They need scikit-learn (``pip install "snnk_jax[sklearn]"``) and are not imported with
the package: ``from snnk_jax.estimators import SNNKRegressor``.

All of them compute in the dtype of the ``X`` that they are fitted on, as scikit-learn
does: lists, integers and float64 arrays in float64, whatever ``jax_enable_x64`` says,
and float32 arrays in float32. Give float32 to an accelerator that has no fast float64.
"""

# ruff: noqa: N803 (X is scikit-learn's name)

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax import ridge
from snnk_jax.features import AppendOne, ArcCosine, Chain, FeatureMap
from snnk_jax.ops import contract
from snnk_jax.ridge import RidgeSolution, RidgeStats

try:
    from sklearn.base import (
        BaseEstimator,
        ClassifierMixin,
        ClassNamePrefixFeaturesOutMixin,
        MultiOutputMixin,
        RegressorMixin,
        TransformerMixin,
    )
    from sklearn.preprocessing import label_binarize
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "snnk_jax.estimators must have scikit-learn 1.6 or newer: "
        'pip install "snnk_jax[sklearn]"'
    ) from error

_NUM_FEATURES = 512


class _RandomFeatures(BaseEstimator):
    """What the estimators share: a feature map, drawn for the width of ``X``."""

    features: str | FeatureMap
    num_features: int | None
    depth: int
    scale: float | None
    chunk_size: int
    random_state: Any
    n_features_in_: int

    def __init__(
        self,
        features="arccos",
        *,
        num_features=None,
        depth=1,
        scale=None,
        chunk_size=8192,
        random_state=None,
    ):
        self.features = features
        self.num_features = num_features
        self.depth = depth
        self.scale = scale
        self.chunk_size = chunk_size
        self.random_state = random_state

    def _validate(self, *data: Any, first: bool, **options: Any) -> Any:
        """Checked X or (X, y): the first of either dtype, later ones of the same."""
        dtype = (np.float64, np.float32) if first else self.dtype_
        return validate_data(self, *data, dtype=dtype, reset=first, **options)

    def _draw(self, dtype: np.dtype) -> None:
        """Draws the features for ``n_features_in_`` inputs."""
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1. Got {self.depth}.")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1. Got {self.chunk_size}.")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite. Got {self.scale}.")
        level = self._level()
        features = level if self.depth == 1 else Chain((level,) * self.depth)
        seed = check_random_state(self.random_state).randint(2**31)
        self.dtype_ = dtype
        with self._dtype():
            params = _init(features, jax.random.key(seed), self.n_features_in_, dtype)
        self.features_ = features
        self.params_ = _to_host(params)
        self.scale_ = float(self.scale or self.n_features_in_**-0.5)

    def _level(self) -> FeatureMap:
        if isinstance(self.features, FeatureMap):
            if self.num_features is not None:
                raise ValueError(
                    "num_features must be None with a feature map, which has its own. "
                    f"Got {self.num_features}."
                )
            return self.features
        if self.features != "arccos":
            raise ValueError(
                f"features must be 'arccos' or a feature map. Got {self.features!r}."
            )
        num = _NUM_FEATURES if self.num_features is None else self.num_features
        return AppendOne(ArcCosine(num_features=num))

    def _dtype(self) -> Any:
        """A context in which arrays may have ``dtype_``."""
        return jax.enable_x64(self.dtype_ == np.float64)

    def _phi(self) -> jax.tree_util.Partial:
        """Maps inputs to features; a pytree."""
        phi = _ScaledPhi(self.features_)
        return jax.tree_util.Partial(phi, self.params_, self.scale_)

    def _map_rows(self, fn: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
        """``fn`` of all rows, a chunk at a time, on the host."""
        with self._dtype():
            return np.concatenate(
                [np.asarray(fn(x[rows])) for rows in _chunks(len(x), self.chunk_size)]
            )


class FeatureMapTransformer(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, _RandomFeatures
):
    r"""Random features of a neural network kernel, as a transformer.

    .. math::
      X \mapsto \Phi_{depth}(\dots \Phi_1(scale \cdot X)).

    ``fit`` draws the random parameters for the width of ``X`` and looks at nothing
    else. Before a ridge regression it is :class:`SNNKRegressor`, without streaming.

    Args:
      features: ``"arccos"``, which is :class:`snnk_jax.features.ArcCosine` of order 1
        with a constant input (random ReLU neurons with biases), or a feature map. Maps
        with exponential features, as :class:`snnk_jax.features.URF`, let the longest
        rows outweigh all others: bring the rows to one norm before.
      num_features: columns of each level of ``"arccos"``; None takes 512. Must be None
        with a feature map, which has its own.
      depth: levels of the same map, each on the features of the one before.
      scale: factor of the inputs, the inverse of a length scale. None takes
        ``n_features_in_ ** -0.5``, at which standardised inputs have norm 1, like the
        constant input.
      chunk_size: rows on the device at a time.
      random_state: seed, ``numpy.random.RandomState`` or None, as usual.

    Attributes:
      features_: the feature map, all levels.
      params_: its random parameters.
      scale_: the factor.
      dtype_: dtype of ``X`` in ``fit`` and of everything computed from then on.
      n_features_in_, feature_names_in_: as usual.

    Raises:
      ValueError: for parameters out of their range, in ``fit``.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225; Cho and
      Saul, "Kernel Methods for Deep Learning", NIPS 2009.

    Example:
      >>> from sklearn.datasets import load_digits
      >>> from sklearn.linear_model import RidgeClassifier
      >>> from sklearn.pipeline import make_pipeline
      >>> from sklearn.preprocessing import StandardScaler
      >>> from snnk_jax.estimators import FeatureMapTransformer
      >>> x, y = load_digits(return_X_y=True)
      >>> features = FeatureMapTransformer(num_features=256, random_state=0)
      >>> model = make_pipeline(StandardScaler(), features, RidgeClassifier(0.1))
      >>> model.fit(x[:1000], y[:1000]).score(x[1000:], y[1000:]) > 0.9
      True
    """

    def fit(self, X, y=None):
        """Draws the random parameters for inputs ``X [n, d]``; y is not looked at."""
        del y
        self._draw(self._validate(X, first=True).dtype)
        return self

    def transform(self, X):
        """The features of ``X [n, d]``, ``[n, num_features]`` in ``dtype_``."""
        check_is_fitted(self, "features_")
        phi = self._phi()
        return self._map_rows(
            lambda x: _features(phi, x), self._validate(X, first=False)
        )

    @property
    def _n_features_out(self) -> int:
        return self.features_.num_features

    def __sklearn_tags__(self):
        tags: Any = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class _RidgeOnFeatures(_RandomFeatures):
    """Statistics of rows, and their ridge solution."""

    # Not pickled: it follows from the statistics, and JAX would read its float64
    # arrays back as float32.
    _solution: RidgeSolution | None = None

    def __init__(
        self,
        features="arccos",
        *,
        num_features=None,
        depth=1,
        scale=None,
        l2=None,
        fit_intercept=True,
        chunk_size=8192,
        random_state=None,
    ):
        super().__init__(
            features,
            num_features=num_features,
            depth=depth,
            scale=scale,
            chunk_size=chunk_size,
            random_state=random_state,
        )
        self.l2 = l2
        self.fit_intercept = fit_intercept

    def __getstate__(self):
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_solution"}

    @property
    def solution_(self) -> RidgeSolution:
        """The ridge solution of the rows so far, solved when it is first asked for."""
        check_is_fitted(self, "stats_")
        return self._solve()

    @property
    def l2_(self) -> float:
        """The penalty per example: ``l2``, or the one that was chosen."""
        return self.solution_.l2

    @property
    def dof_(self) -> float:
        """Effective degrees of freedom."""
        return self.solution_.dof

    def _start(self, dtype: np.dtype, num_targets: int) -> None:
        """Draws the features and forgets all rows."""
        if self.l2 is not None and not 0 <= self.l2 < math.inf:
            raise ValueError(
                f"l2 must be None, or at least 0 and finite. Got {self.l2}."
            )
        self._draw(dtype)
        with self._dtype():
            stats = ridge.init(self.features_.num_features, num_targets, dtype)
        self.stats_ = _to_host(stats)

    def _become(self, new: "_RidgeOnFeatures") -> None:
        """Takes over all of a copy, which learns in its place: it may be refused."""
        vars(self).update(vars(new))

    def _add(self, x: np.ndarray, y: np.ndarray, weights: np.ndarray | None) -> None:
        self._keep(self._changed(ridge.update_chunks, x, y, weights))

    def _changed(self, change: Any, x: Any, y: Any, weights: Any) -> ridge.RidgeStats:
        """The statistics with the rows or without them."""
        with self._dtype():
            return change(
                self.stats_,
                jnp.asarray(x),
                jnp.asarray(y),
                None if weights is None else jnp.asarray(weights),
                phi=self._phi(),
                chunk_size=self.chunk_size,
            )

    def _take(self, x: np.ndarray, y: np.ndarray, weights: np.ndarray | None) -> None:
        stats = self._changed(ridge.downdate_chunks, x, y, weights)
        if stats.rows < 0:
            raise ValueError(
                f"rows to unlearn must have been learned. Got {len(x)} for the "
                f"{int(self.stats_.rows)} that are left."
            )
        self._keep(stats)

    def _solve(self) -> RidgeSolution:
        if self._solution is None:
            stats, intercept = self.stats_, self.fit_intercept
            with self._dtype():
                if self.l2 is None:
                    path = ridge.select_l2(stats, intercept=intercept)
                    self._solution = path.solution
                else:
                    self._solution = ridge.solve(stats, self.l2, intercept=intercept)
        return self._solution

    def _keep(self, stats: RidgeStats) -> None:
        squares = np.diagonal(stats.gram.high)
        if not (np.isfinite(stats.phi_sum.high).all() and np.isfinite(squares).all()):
            raise ValueError(
                "features must be finite. Got inf or NaN among them: "
                f"{self.features_!r} does not reach inputs of this size; lower scale."
            )
        sums = stats.cross, stats.y_sum, stats.y_square, stats.weight
        if not all(np.isfinite(total.high).all() for total in sums):
            raise ValueError(
                "sums of targets, their squares and weights must be finite in "
                f"{self.dtype_.name}. Got inf or NaN among them: scale y down."
            )
        self.stats_ = _to_host(stats)
        self._solution = None

    def _scores(self, X: Any) -> np.ndarray:
        """The linear readout, ``[n, o]``."""
        check_is_fitted(self, "stats_")
        x = self._validate(X, first=False)
        phi, solution = self._phi(), self.solution_
        return self._map_rows(
            lambda rows: _readout(phi, solution.kernel, solution.bias, rows), x
        )


class SNNKRegressor(MultiOutputMixin, RegressorMixin, _RidgeOnFeatures):
    r"""Ridge regression on random features of a neural network kernel.

    With weights w, ``sample_weight`` or ones, it minimises

    .. math::
      \sum_i w_i |y_i - V^\top \Phi(x_i) - b|^2 / \sum_i w_i + l2 |V|^2

    in closed form, by one pass over the rows: memory goes with the square of
    ``num_features`` and not with the rows. scikit-learn's ``alpha`` is ``l2`` times the
    sum of the weights. ``partial_fit`` adds rows and ``unlearn`` takes them out, in
    any order and portions: the model is that of one ``fit`` on the rows that are left,
    up to rounding.

    Standardise the inputs, or choose ``scale``.

    Args:
      features, num_features, depth, scale, random_state: see
        :class:`FeatureMapTransformer`.
      l2: the penalty, per example; None takes the one of the least generalised
        cross-validation, see :func:`snnk_jax.ridge.select_l2`. There a row counts
        once whatever its weight: a weight of two equals two rows only at a given
        ``l2``.
      fit_intercept: fit b, without penalty.
      chunk_size: rows at a time whose features are in memory.

    Attributes:
      solution_: :class:`snnk_jax.ridge.RidgeSolution` of the rows so far, with its
        diagnostics; after ``partial_fit`` and ``unlearn`` it is solved when it is first
        needed. Its arrays are in ``dtype_``.
      l2_: the penalty.
      dof_: effective degrees of freedom.
      stats_: :class:`snnk_jax.ridge.RidgeStats`, on the host.
      features_, params_, scale_, dtype_, n_features_in_, feature_names_in_: see
        :class:`FeatureMapTransformer`.

    Raises:
      ValueError: for parameters or data out of their range, or features or sums that
        are not finite; nothing is changed then.

    Warns:
      snnk_jax.ridge.PrecisionWarning: where ``l2`` asks more of the statistics than
        ``dtype_`` resolves; most likely in float32.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225.

    Example:
      >>> import numpy as np
      >>> from snnk_jax.estimators import SNNKRegressor
      >>> x = np.random.default_rng(0).normal(size=(500, 2))
      >>> y = np.sin(2 * x[:, 0]) * x[:, 1]
      >>> model = SNNKRegressor(num_features=256, random_state=0)
      >>> model.fit(x[:400], y[:400]).score(x[400:], y[400:]) > 0.95
      True
      >>> model.unlearn(x[:100], y[:100]).solution_.rows
      300
    """

    def fit(self, X, y, sample_weight=None):
        """Fits rows ``X [n, d]`` and ``y [n]`` or ``[n, o]``; forgets others."""
        new = copy.copy(self)
        new._add(*new._rows(X, y, sample_weight, first=True))
        new._solve()
        self._become(new)
        return self

    def partial_fit(self, X, y, sample_weight=None):
        """Adds rows; the first draw the features."""
        first = not hasattr(self, "stats_")
        new = copy.copy(self)
        new._add(*new._rows(X, y, sample_weight, first))
        self._become(new)
        return self

    def unlearn(self, X, y, sample_weight=None):
        """Takes rows out that were learned, with the weights that they had.

        Exact: the statistics that are left are those of the other rows. That the rows
        were learned cannot be checked, only that there were as many.
        """
        check_is_fitted(self, "stats_")
        self._take(*self._rows(X, y, sample_weight, first=False))
        return self

    def predict(self, X):
        """Predictions for ``X [n, d]``, of the rank of the targets."""
        scores = self._scores(X)
        return scores[:, 0] if self._flat else scores

    def _rows(self, X, y, sample_weight, first):
        x, y = self._validate(X, y, first=first, multi_output=True, y_numeric=True)
        weights = _checked_weights(sample_weight, x)
        targets = y.astype(x.dtype).reshape(len(y), -1)
        if first:
            self._start(x.dtype, targets.shape[1])
            self._flat = y.ndim == 1
        return x, targets, weights


class SNNKClassifier(ClassifierMixin, _RidgeOnFeatures):
    r"""Classification by ridge regression on random features of a neural kernel.

    :class:`SNNKRegressor` of targets 1 for the class of a row and -1 for the others,
    one target for two classes: everything said there holds. Scores are least squares
    and no logits, so there is no ``predict_proba``; ``CalibratedClassifierCV`` of
    scikit-learn makes probabilities of them.

    Args:
      features, num_features, depth, scale, l2, fit_intercept, chunk_size,
        random_state: see :class:`SNNKRegressor`.

    Attributes:
      classes_: the labels, sorted.
      solution_, l2_, dof_, stats_, features_, params_, scale_, dtype_,
        n_features_in_, feature_names_in_: see :class:`SNNKRegressor`.

    Raises:
      ValueError: as :class:`SNNKRegressor`, and for fewer than two classes or labels
        that are not among them.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225.

    Example:
      >>> from sklearn.datasets import load_digits
      >>> from sklearn.pipeline import make_pipeline
      >>> from sklearn.preprocessing import StandardScaler
      >>> from snnk_jax.estimators import SNNKClassifier
      >>> x, y = load_digits(return_X_y=True)
      >>> model = SNNKClassifier(num_features=256, random_state=0)
      >>> model = make_pipeline(StandardScaler(), model)
      >>> model.fit(x[:1000], y[:1000]).score(x[1000:], y[1000:]) > 0.9
      True
    """

    def fit(self, X, y, sample_weight=None):
        """Fits rows ``X [n, d]`` and labels ``y [n]``; forgets others."""
        new = copy.copy(self)
        new._add(*new._rows(X, y, None, sample_weight, first=True))
        new._solve()
        self._become(new)
        return self

    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Adds rows; the first draw the features.

        ``classes`` must be all labels that will come, on the first call; later it may
        be left out.
        """
        first = not hasattr(self, "stats_")
        if first and classes is None:
            raise ValueError(
                "classes must be given on the first call of partial_fit. Got None."
            )
        if not (first or classes is None or set(classes) == set(self.classes_)):
            raise ValueError(
                f"classes must be those of the first call, {self.classes_}. "
                f"Got {classes}."
            )
        new = copy.copy(self)
        new._add(*new._rows(X, y, classes, sample_weight, first))
        self._become(new)
        return self

    def unlearn(self, X, y, sample_weight=None):
        """Takes rows out again; see :meth:`SNNKRegressor.unlearn`."""
        check_is_fitted(self, "stats_")
        self._take(*self._rows(X, y, None, sample_weight, first=False))
        return self

    def decision_function(self, X):
        """Scores of ``X [n, d]``: ``[n, classes]``, or ``[n]`` of the second of two."""
        scores = self._scores(X)
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X):
        """The labels of the highest score."""
        scores = self._scores(X)
        two = len(self.classes_) == 2
        best = (scores[:, 0] > 0).astype(int) if two else np.argmax(scores, axis=1)
        return self.classes_[best]

    def _rows(self, X, y, classes, sample_weight, first):
        x, y = self._validate(X, y, first=first)
        weights = _checked_weights(sample_weight, x)
        check_classification_targets(y)
        known = np.unique(y if classes is None else classes) if first else self.classes_
        if len(known) < 2:
            raise ValueError(f"y must hold more than one class. Got {known}.")
        new = np.setdiff1d(y, known)
        if len(new):
            raise ValueError(f"y must hold labels of {known} only. Got {new}.")
        if first:
            self._start(x.dtype, 1 if len(known) == 2 else len(known))
            self.classes_ = known
        targets = label_binarize(y, classes=known, neg_label=-1, pos_label=1)
        return x, np.asarray(targets, x.dtype), weights


@dataclasses.dataclass(frozen=True)
class _ScaledPhi:
    """Features of scaled inputs; of equal maps equal, so that they compile once."""

    features: FeatureMap

    def __call__(self, params: Any, scale: Any, x: Any) -> Any:
        return self.features.phi(params, scale * x)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _init(features, key, dim, dtype):
    return features.init(key, dim, dtype)


@jax.jit
def _features(phi, x):
    return phi(x)


@jax.jit
def _readout(phi, kernel, bias, x):
    return contract(phi(x), kernel, precision="highest") + bias[None]


def _checked_weights(sample_weight: Any, x: np.ndarray) -> np.ndarray | None:
    if sample_weight is None:
        return None
    options: Any = {"dtype": x.dtype, "ensure_2d": False}
    weights = check_array(sample_weight, input_name="sample_weight", **options)
    if weights.shape != x.shape[:1]:
        raise ValueError(
            f"sample_weight must be [{len(x)}], one a row. Got {weights.shape}."
        )
    if np.any(weights < 0) or not np.any(weights):
        raise ValueError(
            f"sample_weight must not be negative, nor all zero. Got {weights}."
        )
    return weights


def _to_host(tree: Any) -> Any:
    """NumPy arrays: pickles and copies of them keep their dtype without x64."""
    return jax.tree.map(np.asarray, tree)


def _chunks(num: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, num, size)]
