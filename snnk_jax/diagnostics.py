"""What random features can do for a layer, told before training."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax import activations, calibration, kernels
from snnk_jax._samples import check_rows, check_samples, thinned
from snnk_jax.features._arccos import ArcCosine
from snnk_jax.features._base import FeatureMap
from snnk_jax.features._urf import URF
from snnk_jax.ops import snnk_dense
from snnk_jax.typing import Array, Float, Params

_ActivationLike = str | activations.Activation | Callable[[Array], Array]

# Samples and outputs on which errors are predicted, and projections redrawn for it.
_ROWS, _COLUMNS, _DRAWS = 256, 256, 8
# The draws are fixed, like the nodes of a quadrature: a prediction is a number, not a
# random variable.
_SEED = 20231013


@dataclasses.dataclass(frozen=True)
class Kappa:
    r"""Sizes of :math:`w^\top x` that decide the variance of random features.

    Attributes:
      raw: mean of :math:`\lVert x\rVert` times mean of :math:`\lVert w\rVert`.
      balanced: the same after :func:`snnk_jax.calibration.balance`,
        :math:`\lVert M_x^{1/2} M_w^{1/2}\rVert_*` of the centred second moments.
      spread: root mean square of :math:`w^\top (x - \mu)`, the signal.
    """

    raw: float
    balanced: float
    spread: float


def kappa(x: Float[Array, "n d"], kernel: Float[Array, "d o"]) -> Kappa:
    r"""Measures :math:`\kappa = \lVert x\rVert \lVert w\rVert` of a layer.

    Plain universal random features of unit frequency have a second moment of
    :math:`e^{2\kappa}`: m must exceed it, and no choice of projection changes the
    exponent. Balancing does, where the spectra of inputs and weights decay.

    Raises:
      ValueError: if shapes do not fit or values are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> snnk.diagnostics.kappa(jnp.eye(4), jnp.eye(4)).raw
      1.0
    """
    check_samples(x, kernel)
    data, weights = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    centred = data - data.mean(axis=0)
    # The nuclear norm of X W up to the size of the samples.
    values = np.linalg.svd(_triangle(centred) @ weights, compute_uv=False)
    return Kappa(
        raw=float(
            np.linalg.norm(data, axis=1).mean() * np.linalg.norm(weights, axis=0).mean()
        ),
        balanced=float(values.sum() / math.sqrt(len(data) * weights.shape[1])),
        spread=float(np.sqrt(np.mean((centred @ weights) ** 2))),
    )


def _triangle(x: np.ndarray) -> np.ndarray:
    """A factor with the same Gram matrix and at most d rows."""
    return np.asarray(np.linalg.qr(x, mode="r")) if len(x) > x.shape[1] else x


def predicted_rmse(
    features: FeatureMap,
    params: Params,
    x: Float[Array, "n d"],
    kernel: Float[Array, "d o"],
    bias: Float[Array, " o"] | None = None,
) -> float:
    r"""Root mean square error to expect of a map on a layer, over draws of it.

    The random parts of ``params`` are drawn anew 8 times, what was calibrated is kept,
    and the squared error against ``features.exact`` is averaged over draws, at most 256
    of the samples and 256 outputs: bias, coupled projections, exact columns and
    shrinkage are all in it. It is infinite where features overflow. The layer of a
    :class:`~snnk_jax.features.Chain` is one of its inner features.

    Raises:
      ValueError: if shapes do not fit or values are not finite.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.URF(activation="cos", num_features=4096, scale=1.0)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> x = jax.random.normal(jax.random.key(1), (50, 8)) / 8**0.5
      >>> kernel = jax.random.normal(jax.random.key(2), (8, 3)) / 8**0.5
      >>> 0.01 < snnk.diagnostics.predicted_rmse(fm, params, x, kernel) < 0.1
      True
    """
    check_rows(x, "x")
    check_samples(features.inner(params, x), kernel, bias)
    x = thinned(x, _ROWS)
    kernel = thinned(kernel, _COLUMNS, axis=1)
    bias = None if bias is None else thinned(bias, _COLUMNS)
    errors = []
    # Not compiled as a whole: it runs a few times only, at a size of its own.
    for key in jax.random.split(jax.random.key(_SEED), _DRAWS):
        fresh = features.redraw(params, key, x.shape[1])
        inner = features.inner(fresh, x)
        exact = np.asarray(features.exact(inner, kernel, bias), np.float64)
        estimate = snnk_dense(features, fresh, x, kernel, bias)
        errors.append(np.mean((np.asarray(estimate, np.float64) - exact) ** 2))
    mean = float(np.mean(errors))
    return math.sqrt(mean) if math.isfinite(mean) else math.inf


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """What :func:`suggest_num_features` found.

    Attributes:
      num_features: the smallest m tried that is predicted to reach the target, or
        None: infeasible.
      predicted_rmse: at that m, or the best that was found.
      kappa: of the layer.
      affine_rmse: error of the exact affine map alone, the rival without randomness.
      features: the map, ready to use with ``params``; the closest one if infeasible.
      params: its balanced parameters.
      reason: one sentence: why, and where infeasible what would help.
    """

    num_features: int | None
    predicted_rmse: float
    kappa: Kappa
    affine_rmse: float
    features: FeatureMap
    params: Params
    reason: str


def suggest_num_features(
    activation: _ActivationLike,
    x: Float[Array, "n d"],
    kernel: Float[Array, "d o"],
    bias: Float[Array, " o"] | None = None,
    *,
    target_rmse: float,
    max_num_features: int = 16384,
    projection: str = "orthogonal",
) -> Suggestion:
    r"""The number of features that brings a layer's error down to a target.

    Tries balanced universal random features with an exact affine part and shrinkage,
    at growing m: twice as many each time up to the maximum, then three times between
    the last two.

    Args:
      activation: f, by name, row or function.
      x: sample inputs.
      kernel: weights.
      bias: biases.
      target_rmse: root mean square error of the outputs, in their units.
      max_num_features: where to give up.
      projection: how directions are drawn.

    Raises:
      ValueError: if shapes do not fit, values are not finite, the target is not
        positive, or f is affine: it needs no features.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> x = jax.random.normal(jax.random.key(1), (200, 8)) / 8**0.5
      >>> kernel = jax.random.normal(jax.random.key(2), (8, 16)) / 8**0.5
      >>> found = snnk.diagnostics.suggest_num_features(
      ...     "gelu", x, kernel, target_rmse=0.07
      ... )
      >>> found.num_features is not None and found.predicted_rmse <= 0.07
      True
    """
    check_samples(x, kernel, bias)
    if not 0 < target_rmse < math.inf:
        raise ValueError(f"target_rmse must be positive and finite. Got {target_rmse}.")
    row = activations.get(activation)
    dim = kernel.shape[0]
    sizes = kappa(x, kernel)
    affine = affine_rmse(row, x, kernel, bias)

    def attempt(num_features: int) -> tuple[float, FeatureMap, Params]:
        features = _shrunk_urf(row, num_features, sizes, projection=projection)
        params = features.init(jax.random.key(_SEED), dim)
        params = calibration.balance(features, params, x, kernel, bias)
        return predicted_rmse(features, params, x, kernel, bias), features, params

    smallest = 1 + dim + 2 * max(32, dim // 2)
    tried: list[tuple[int, float, FeatureMap, Params]] = []
    num_features = smallest
    while num_features <= max_num_features:
        tried.append((num_features, *attempt(num_features)))
        if tried[-1][1] <= target_rmse or num_features == max_num_features:
            break
        num_features = min(2 * num_features, max_num_features)
    if tried and tried[-1][1] <= target_rmse:
        if len(tried) > 1:
            low = tried[-2][0]
            for _ in range(3):
                middle = (low + tried[-1][0]) // 2
                result = (middle, *attempt(middle))
                if result[1] <= target_rmse:
                    tried.append(result)
                else:
                    low = middle
        num, rmse, features, params = tried[-1]
        outputs = kernel.shape[1]
        cheaper = num < dim * outputs / (dim + outputs)
        reason = f"{num} features reach {rmse:.3g}; " + (
            "they cost less than the dense layer."
            if cheaper
            else "they cost more than the dense layer, which is exact."
        )
        if affine <= target_rmse:
            reason = f"the affine map alone reaches {affine:.3g}; " + reason
        return Suggestion(num, rmse, sizes, affine, features, params, reason)
    if not tried:
        rmse, features, params = attempt(smallest)
        reason = (
            f"max_num_features {max_num_features} is below {smallest}, the smallest "
            f"map tried for inputs of width {dim}, which reaches {rmse:.3g}."
        )
        return Suggestion(None, rmse, sizes, affine, features, params, reason)
    num, rmse, features, params = min(tried, key=lambda result: result[1])
    reason = _why_infeasible(row, features, sizes, rmse, num, target_rmse)
    return Suggestion(None, rmse, sizes, affine, features, params, reason)


def _shrunk_urf(
    row: activations.Activation,
    num_features: int,
    sizes: Kappa,
    *,
    exact_degree: int = 1,
    projection: str = URF.projection,
) -> URF:
    """The safe map for a layer of these sizes, to be balanced."""
    return URF(
        activation=row,
        num_features=num_features,
        projection=projection,
        spectrum="auto" if row.atoms else "series",
        exact_degree=exact_degree,
        shrinkage=True,
        kappa=max(min(sizes.balanced, 20.0), 1e-3),
    )


def _why_infeasible(
    row: activations.Activation,
    features: FeatureMap,
    sizes: Kappa,
    rmse: float,
    num: int,
    target: float,
) -> str:
    head = f"{num} features reach {rmse:.3g}, not {target:.3g}: "
    series = features.series if isinstance(features, URF) else None
    if series is not None and series.l2_error > target:
        return head + (
            f"the Fourier series of {row.name} itself is off by {series.l2_error:.3g}; "
            "raise num_terms, or half_width where pre-activations leave it."
        )
    return head + (
        f"kappa is {sizes.raw:.3g}, balanced {sizes.balanced:.3g}, and the error falls "
        f"as exp(kappa) / sqrt(m) while the outputs vary by {sizes.spread:.3g}. Scale "
        "inputs or weights down, use inputs of lower rank, fit the readout "
        "(calibration.fit_readout), or leave the layer dense."
    )


def affine_rmse(
    activation: _ActivationLike,
    x: Float[Array, "n d"],
    kernel: Float[Array, "d o"],
    bias: Float[Array, " o"] | None = None,
) -> float:
    r"""Error of :math:`f(b') + f'(b')\, w^\top (x - \mu)`, :math:`b' = b + w^\top\mu`.

    The exact affine map that ``exact_degree=1`` carries after centring, where f has no
    kinks: what random features have to beat.

    Raises:
      ValueError: if shapes do not fit or values are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> x = jnp.array([[-1.0], [1.0]])
      >>> snnk.diagnostics.affine_rmse("identity", x, jnp.ones((1, 1)))
      0.0
    """
    check_samples(x, kernel, bias)
    row = activations.get(activation)
    z = jnp.matmul(x, kernel)
    if bias is not None:
        z = z + bias[None, :]
    middle = jnp.mean(z, axis=0)
    affine = row(middle)[None, :] + row.grad(middle)[None, :] * (z - middle[None, :])
    return float(jnp.sqrt(jnp.mean((row(z) - affine) ** 2)))


@dataclasses.dataclass(frozen=True)
class Linearity:
    """How much of a layer an affine map of its inputs explains.

    Attributes:
      r2: leave-one-out share of variance, per output.
      total_r2: of all outputs together.
    """

    r2: np.ndarray
    total_r2: float


def block_linearity(x: Float[Array, "n d"], outputs: Float[Array, "n o"]) -> Linearity:
    r"""Fits the best affine map from inputs to outputs and says how good it is.

    A block with a share near 1 needs no random features at all: a matrix does.

    Raises:
      ValueError: for shapes that do not fit or values that are not finite.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> x = jax.random.normal(jax.random.key(0), (100, 4))
      >>> round(snnk.diagnostics.block_linearity(x, 2 * x + 1).total_r2, 3)
      1.0
    """
    check_rows(x, "x")
    columns = jnp.concatenate([jnp.ones((len(x), 1), x.dtype), x], axis=1)
    _, report = calibration.fit_linear(columns, outputs)
    return Linearity(report.loo_r2, report.total_loo_r2)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What :func:`layer_report` says of one layer.

    Attributes:
      kappa: of the layer.
      spread: standard deviation of the outputs over the samples.
      tangent: relative error of the exact affine map at the mean input.
      affine: relative error of the affine map fitted on samples, leave-one-out.
      random: predicted relative error of balanced random features, Psi(W, b).
      calibrated: relative error of a readout fitted on samples, leave-one-out.
      num_features: m of both.
      verdict: ``"affine"`` (an affine map is good enough), ``"random"`` (random
        features carry the layer), ``"calibrated"`` (a fitted readout does) or
        ``"leave"``.
    """

    kappa: Kappa
    spread: float
    tangent: float
    affine: float
    random: float
    calibrated: float
    num_features: int
    verdict: str


def layer_report(
    activation: _ActivationLike,
    x: Float[Array, "n d"],
    kernel: Float[Array, "d o"],
    bias: Float[Array, " o"] | None = None,
    *,
    num_features: int | None = None,
    tolerance: float = 0.3,
) -> LayerReport:
    r"""Judges one layer: what carries :math:`f(xW + b)` within a relative error.

    Errors are those of all outputs together, relative to their spread over the samples:
    an output that varies little weighs little. Random features
    are balanced, with shrinkage; the calibrated readout is that of ReLU features. Both
    have m columns, of which the affine part takes d + 1 where m is twice that.

    Args:
      activation: f, by name, row or function.
      x: sample inputs, several times m of them for the readout.
      kernel: weights.
      bias: biases.
      num_features: m; None takes the largest that is still cheaper than the layer,
        ``d o / (d + o)``.
      tolerance: the relative error that is good enough; 0.3 is an R^2 of 0.91.

    Raises:
      ValueError: if shapes do not fit or values are not finite.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> x = jax.random.normal(jax.random.key(1), (500, 16)) / 16
      >>> kernel = jax.random.normal(jax.random.key(2), (16, 64)) / 4
      >>> snnk.diagnostics.layer_report("gelu", x, kernel, num_features=64).verdict
      'affine'
    """
    check_samples(x, kernel, bias)
    row = activations.get(activation)
    dim, outputs = kernel.shape
    if num_features is None:
        num_features = max(2, dim * outputs // (dim + outputs))
    sizes = kappa(x, kernel)
    target = kernels.ffl(row, x, kernel, bias)
    spread = float(jnp.sqrt(jnp.mean(jnp.var(target, axis=0))))
    unit = spread or 1.0
    tangent = affine_rmse(row, x, kernel, bias) / unit
    ones = jnp.ones((len(x), 1), x.dtype)
    affine = math.sqrt(max(0.0, 1 - block_linearity(x, target).total_r2))
    random = math.inf
    wide = num_features >= 2 * (dim + 1)
    degree = 1 if wide else 0
    try:
        features = _shrunk_urf(row, num_features, sizes, exact_degree=degree)
        params = features.init(jax.random.key(_SEED), dim)
    except ValueError:
        pass  # affine, or fewer columns than the linear part of the series takes
    else:
        params = calibration.balance(features, params, x, kernel, bias)
        random = predicted_rmse(features, params, x, kernel, bias) / unit
    columns = [ones, x] if wide else [ones]
    relu = ArcCosine(
        num_features=max(1, num_features - sum(c.shape[1] for c in columns))
    )
    columns.append(relu.phi(relu.init(jax.random.key(_SEED), dim), x))
    _, fit = calibration.fit_linear(jnp.concatenate(columns, axis=1), target)
    calibrated = math.sqrt(max(0.0, 1 - fit.total_loo_r2))
    if min(tangent, affine) <= tolerance:
        verdict = "affine"
    elif random <= tolerance:
        verdict = "random"
    elif calibrated <= tolerance:
        verdict = "calibrated"
    else:
        verdict = "leave"
    errors = (tangent, affine, random, calibrated)
    return LayerReport(sizes, spread, *errors, num_features, verdict)
