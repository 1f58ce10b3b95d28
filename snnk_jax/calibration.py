"""Fitting a feature map to data: scaling its directions, solving for its readout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax._samples import check_finite, check_rows, check_samples, thinned
from snnk_jax.features._base import FeatureMap
from snnk_jax.features._exponential import Exponential
from snnk_jax.features._towers import NUM_REFERENCES, TowerFeatures
from snnk_jax.ops import snnk_dense
from snnk_jax.ridge._rows import RowSpectrum
from snnk_jax.ridge._stats import check_floating
from snnk_jax.typing import Array, Float, Params

# Rows on which candidates are compared.
_JUDGED = 1024
# The gain from which on a matrix is worth its product at run time.
_METRIC_GAIN = 0.97


def balance(
    features: FeatureMap,
    params: Params,
    x: Float[Array, "n d"],
    kernel: Float[Array, "d o"],
    bias: Float[Array, " o"] | None = None,
) -> Params:
    r"""Fits the scaling of an exponential-type map to inputs and weights.

    The variance grows like :math:`e^{E\lVert t\rVert^2 + E\lVert u\rVert^2}` in the
    scaled inputs and weights, whose product :math:`w^\top x = (\Psi^{-\top} w)^\top
    (\Psi x)` leaves any matrix :math:`\Psi` free. The best one gives both the same
    second moment :math:`\Sigma`: with :math:`M_x = E[x x^\top]`,
    :math:`M_w = W W^\top / o`, :math:`R = M_x^{1/2}` and
    :math:`R M_w R = U \Sigma^2 U^\top`,

    .. math:: \Psi = \Sigma^{1/2} U^\top R^{-1}, \qquad
      \kappa \to \lVert M_x^{1/2} M_w^{1/2}\rVert_*.

    Inputs are centred first, their mean going into the bias. In the balanced basis
    each direction gets its own :math:`A_l` (and, for waves, scale) from
    :math:`\sigma_l`. Decaying spectra gain orders of magnitude; isotropic data gain
    nothing, and keep a scalar scale.

    The candidates (as given; centred and rescaled; balanced; balanced with
    :math:`A_l`) are compared on the samples, and the best is returned: never worse
    there than ``params``. A balanced map costs a further ``d x d`` product an input,
    since its size :math:`e^{\lVert \Psi x\rVert^2/2}` needs :math:`\Psi x`.

    Args:
      features: a :class:`~snnk_jax.features.URF` or
        :class:`~snnk_jax.features.Exponential`. With ``shrinkage`` the samples also
        become its reference inputs.
      params: its parameters.
      x: inputs, one row an example; a few times d of them.
      kernel: weights.
      bias: biases.

    Returns:
      Parameters for the same map.

    Raises:
      ValueError: for another kind of map, shapes that do not fit, or values that are
        not finite.

    References:
      Likhosherstov et al., "FAVOR#", arXiv 2302.00787.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.URF(activation="cos", num_features=64)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> x = jax.random.laplace(jax.random.key(1), (100, 8))
      >>> kernel = jax.random.normal(jax.random.key(2), (8, 5)) / 8
      >>> balanced = snnk.calibration.balance(fm, params, x, kernel)
      >>> fm.phi(balanced, x).shape
      (100, 64)
    """
    if not isinstance(features, TowerFeatures):
        raise ValueError(
            "features must be URF or Exponential, whose kernels depend on x @ kernel "
            f"alone. Got {type(features).__name__}."
        )
    check_samples(x, kernel, bias)
    dtype = params["omega" if "omega" in params else "lengths"].dtype
    data = np.asarray(x, np.float64)
    weights = np.asarray(kernel, np.float64)
    start = dict(params)
    if features.shrinkage:
        start = set_references(features, params, x)
    free = {
        name: value
        for name, value in start.items()
        if name not in ("scale", "metric", "dual_metric", "stretch", "mean", "cap")
    }
    mean = data.mean(axis=0)
    centred = data - mean
    sizes = np.sqrt([np.mean(weights**2), np.mean(centred**2)])
    cast = lambda tree: {k: jnp.asarray(v, dtype) for k, v in tree.items()}  # noqa: E731
    # Nothing to scale where all inputs are the same, or all weights zero.
    flat = sizes[1] <= 1e-6 * np.sqrt(np.mean(data**2)) or sizes[0] == 0
    scale = params.get("scale", 1.0) if flat else np.sqrt(sizes[0] / sizes[1])
    rescaled = free | cast({"mean": mean, "scale": scale})
    metrics = [] if flat else _metrics(features, params, centred, weights)
    candidates = [start, rescaled]
    candidates += [free | cast({"mean": mean} | metric) for metric in metrics]
    if features.shrinkage:
        candidates = [
            _capped(features, candidate, quantile)
            for quantile in (0.9, 1.0)
            for candidate in candidates
        ]
    judged = thinned(x, _JUDGED)
    exact = np.asarray(features.exact(judged, kernel, bias), np.float64)
    errors = []
    for candidate in candidates:
        estimate = snnk_dense(features, candidate, judged, kernel, bias)
        error = np.mean((np.asarray(estimate, np.float64) - exact) ** 2)
        errors.append(error if np.isfinite(error) else np.inf)
    # A candidate that needs a d x d product at run time must earn it.
    plain = [
        np.inf if "metric" in candidate else error
        for candidate, error in zip(candidates, errors, strict=True)
    ]
    best = int(np.argmin(errors))
    if errors[best] >= _METRIC_GAIN**2 * min(plain):
        best = int(np.argmin(plain))
    return candidates[best]


def set_references(
    features: FeatureMap, params: Params, x: Float[Array, "n d"]
) -> Params:
    """Makes samples the inputs on which shrinkage is judged, at most 256 of them.

    :func:`balance` does it as well; this leaves the scaling as it is. Inputs whose
    scaled norm is among the upper tenth of the references' or beyond are damped: such
    outliers would be all noise.

    Raises:
      ValueError: for a map without shrinkage, or samples that are not finite or of
        another width.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.URF(activation="cos", num_features=64, shrinkage=True)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> x = jax.random.normal(jax.random.key(1), (100, 8))
      >>> snnk.calibration.set_references(fm, params, x)["reference"].shape
      (100, 8)
    """
    if not isinstance(features, TowerFeatures) or not features.shrinkage:
        raise ValueError(f"features must have shrinkage=True. Got {features}.")
    check_rows(x, "x")
    width = params["reference"].shape[1]
    if x.shape[1] != width:
        raise ValueError(f"x must have width {width}. Got {x.shape}.")
    check_finite(x, "x")
    reference = thinned(x, NUM_REFERENCES).astype(params["reference"].dtype)
    return _capped(features, {**params, "reference": reference}, 0.9)


def _capped(features: TowerFeatures, params: Params, quantile: float) -> Params:
    """Sets where shrinkage damps: from a quantile of the references' norms on."""
    x = np.asarray(params["reference"], np.float64)
    x = x - np.asarray(params.get("mean", 0.0), np.float64)
    if "metric" in params:
        x = x @ np.asarray(params["metric"], np.float64)
    else:
        x = x * float(params["scale"])
    cap = features.cap(params, np.quantile(np.sum(x * x, axis=1), quantile))
    return params | {"cap": cap.astype(params["reference"].dtype)}


def _metrics(
    features: TowerFeatures, params: Params, centred: np.ndarray, weights: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """The balanced basis without and with one A a direction, in float64."""
    num, dim = centred.shape
    # Directions that the samples hardly show must not be blown up.
    floor = 1e-6 + 0.01 * dim / num
    root, inverse_root = _root(centred.T @ centred / num, floor)
    second, _ = _root(weights @ weights.T / weights.shape[1], 1e-6)
    # R M_w R = (M_w^1/2 R)^T (M_w^1/2 R): its singular values are Sigma.
    _, sigma, basis = np.linalg.svd(second @ root)
    to_basis = np.sqrt(sigma)[:, None] * (basis @ inverse_root)
    from_basis = (root @ basis.T) / np.sqrt(sigma)
    rates, shares = _rates(features, params, float(sigma.sum()))
    peak = float(rates @ shares / shares.sum()) * sigma
    balanced = _metric(to_basis, from_basis, np.ones(dim), np.ones(dim))
    if isinstance(features, Exponential):
        # Root of 4 p t^2 + (1 + 4 p) t - 1 = 0 with t = r^2.
        discriminant = np.sqrt((1 + 4 * peak) ** 2 + 16 * peak)
        ratio = np.sqrt(2 / (1 + 4 * peak + discriminant))
        scales = np.ones(dim)
    else:
        ratio = _cubic_root(peak)
        scales = np.sqrt(ratio)
    stretch = np.sqrt((1 + ratio**-2.0) / 2)
    shaped = _metric(to_basis, from_basis, scales, stretch)
    return [balanced, shaped]


def _metric(
    to_basis: np.ndarray,
    from_basis: np.ndarray,
    scales: np.ndarray,
    stretch: np.ndarray,
) -> dict[str, np.ndarray]:
    return {
        "metric": (scales[:, None] * to_basis).T,
        "dual_metric": from_basis / scales,
        "stretch": stretch,
    }


def _root(moment: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric square root and inverse, eigenvalues lifted by ``floor`` means."""
    values, vectors = np.linalg.eigh(moment)
    values = np.maximum(values, 0) + max(floor * values.mean(), np.finfo(float).tiny)
    roots = np.sqrt(values)
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _rates(
    features: TowerFeatures, params: Params, kappa: float
) -> tuple[np.ndarray, np.ndarray]:
    """The rates of the map and how much of the noise each has at ``kappa``."""
    if "rates" in params:
        rates = np.asarray(params["rates"], np.float64)
        sizes = np.log(np.abs(np.asarray(params["weights"], np.float64)) + 1e-30)
    else:
        rates = np.array(features.terms.rates)
        # The weights hold exp(rate * features.kappa) already.
        sizes = np.array(features.terms.weights) - rates * features.kappa
    sizes = sizes + rates * min(kappa, 10.0)
    return rates, np.exp(sizes - sizes.max())


def _cubic_root(p: np.ndarray) -> np.ndarray:
    """The root in (0, 1] of the increasing ``2 p r^3 + r^2 + 2 p r - 1``."""
    low, high = np.zeros_like(p), np.ones_like(p)
    for _ in range(60):
        middle = (low + high) / 2
        above = 2 * p * middle**3 + middle**2 + 2 * p * middle > 1
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return high


@dataclasses.dataclass(frozen=True)
class ReadoutReport:
    """How well a fitted readout explains its targets.

    Attributes:
      l2: the ridge penalty, per example.
      dof: effective number of features, the trace of the hat matrix.
      gcv: generalised cross-validation score, a mean squared error.
      r2: share of each output's variance explained on the samples, ``[o]``.
      loo_r2: the same with each example predicted without itself, ``[o]``.
      total_r2: of all outputs together, on the samples.
      total_loo_r2: of all outputs together, leave-one-out.
    """

    l2: float
    dof: float
    gcv: float
    r2: np.ndarray
    loo_r2: np.ndarray
    total_r2: float
    total_loo_r2: float


def fit_readout(
    features: FeatureMap,
    params: Params,
    x: Float[Array, "n d"],
    targets: Float[Array, "n o"],
    l2: float | None = None,
) -> tuple[Float[Array, "m o"], ReadoutReport]:
    r"""Solves for the readout on samples instead of computing it from weights.

    .. math::
      \Psi = \arg\min_V \tfrac1n \lVert \Phi(X) V - Y\rVert^2
      + \lambda \lVert V\rVert^2,

    in float64 on the host, by the eigenvectors of the smaller Gram matrix
    (:mod:`snnk_jax.ridge`, which also streams what does not fit in memory). Unlike
    ``features.psi`` it is biased, and far more accurate at the same m: it needs no
    variance of a random estimate to be small, only that f can be read off the
    features on these inputs.

    Args:
      features: any feature map.
      params: its parameters.
      x: sample inputs.
      targets: what to predict, for instance ``kernels.ffl(f, x, kernel, bias)``.
      l2: :math:`\lambda`; None takes the minimiser of generalised cross-validation,
        :math:`\tfrac1n \lVert Y - HY\rVert^2 / (1 - \mathrm{tr} H / n)^2`, on a grid.

    Returns:
      The readout in the dtype of ``targets``, and its report.

    Raises:
      ValueError: for shapes that do not fit, values that are not finite, targets that
        are no floats, or a negative ``l2``.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.ArcCosine(num_features=256)
      >>> params = fm.init(jax.random.key(0), 8)
      >>> x = jax.random.normal(jax.random.key(1), (1000, 8))
      >>> y = snnk.kernels.ffl("gelu", x, jax.numpy.eye(8))
      >>> psi, report = snnk.calibration.fit_readout(fm, params, x, y)
      >>> psi.shape, report.total_loo_r2 > 0.9
      ((256, 8), True)
    """
    check_finite(x, "x")
    return fit_linear(features.phi(params, x), targets, l2)


def fit_linear(
    phi: Float[Array, "n m"], targets: Float[Array, "n o"], l2: float | None = None
) -> tuple[Float[Array, "m o"], ReadoutReport]:
    """The ridge regression of :func:`fit_readout` on given columns.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> phi = jnp.array([[1.0], [2.0], [3.0]])
      >>> psi, _ = snnk.calibration.fit_linear(phi, 2 * phi, l2=0.0)
      >>> round(float(psi[0, 0]), 4)
      2.0
    """
    if phi.ndim != 2 or targets.ndim != 2 or len(phi) != len(targets) or not len(phi):
        raise ValueError(
            "inputs must be [n, ...] and targets [n, o] with the same n. "
            f"Got {phi.shape} and {targets.shape}."
        )
    if l2 is not None and not 0 <= l2 < np.inf:
        raise ValueError(f"l2 must be None, or at least 0 and finite. Got {l2}.")
    check_floating(targets, "targets")
    check_finite(phi, "features")
    check_finite(targets, "targets")
    y = np.asarray(targets, np.float64)
    num = len(y)
    spectrum = RowSpectrum.of(np.asarray(phi, np.float64), y, intercept=False)
    if l2 is None:
        l2 = spectrum.best("gcv") / num
    penalty = l2 * num
    residual = spectrum.residual(penalty)
    loo = spectrum.left_out(penalty)
    psi = spectrum.kernel(penalty)
    spread = np.sum((y - y.mean(axis=0)) ** 2, axis=0)
    # The left-out mean is the fair rival of the left-out prediction.
    loo_spread = spread * (num / max(num - 1, 1)) ** 2
    report = ReadoutReport(
        l2=l2,
        dof=dataclasses.replace(spectrum.eigen, penalty=penalty).dof(),
        gcv=spectrum.gcv(penalty),
        r2=_explained(residual, spread),
        loo_r2=_explained(loo, loo_spread),
        total_r2=_total_explained(residual, spread),
        total_loo_r2=_total_explained(loo, loo_spread),
    )
    return jnp.asarray(psi, jax.dtypes.canonicalize_dtype(targets.dtype)), report


def _explained(residual: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """R^2 of each output; NaN for a constant one."""
    error = np.sum(residual**2, axis=0)
    return np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1), np.nan)


def _total_explained(residual: np.ndarray, spread: np.ndarray) -> float:
    total = float(spread.sum())
    return 1 - float(np.sum(residual**2)) / total if total > 0 else float("nan")
