"""Logistic and Poisson regression of features, by Newton's method on the host."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from snnk_jax.ridge import _factor
from snnk_jax.ridge._accumulate import Map, as_pytree
from snnk_jax.ridge._factor import blas
from snnk_jax.ridge._solve import check_l2
from snnk_jax.typing import Array, Float

# Penalties below this many times ``m * eps`` of the norm of the Hessian are raised to
# it in the step, not in the objective: Levenberg's damping, which gives a singular
# Hessian factors and leaves the minimum where it is.
_DAMPING = 20
# Of the decrease that the slope promises, what a step must keep (Armijo's rule).
_KEPT = 1e-4
# Differences of the objective that may be rounding.
_ROUNDING = 1e-12


class ConvergenceWarning(UserWarning):
    """An iteration ended before its minimum, or there is none."""


class _Loss(NamedTuple):
    """A loss of the linear predictor, in numpy.

    Attributes:
      value: negative log-likelihood of ``(eta, y)``.
      slope: its derivative in eta.
      curvature: its second derivative, of eta alone.
      escapes: whether the loss falls for ever as eta is scaled up.
      link: the linear predictor of a mean.
      mean: the mean of a linear predictor, in JAX.
      top: targets lie in ``[0, top]``, and their mean inside.
    """

    value: Callable[..., np.ndarray]
    slope: Callable[..., np.ndarray]
    curvature: Callable[..., np.ndarray]
    escapes: Callable[..., np.ndarray]
    link: Callable[[float], float]
    mean: Callable[[Any], Any]
    top: float


# Written with expit(-eta) for 1 - expit(eta), which has no digits left for large eta.
_LOSSES = {
    "logistic": _Loss(
        value=lambda eta, y: (1 - y) * np.logaddexp(0, eta) + y * np.logaddexp(0, -eta),
        slope=lambda eta, y: (1 - y) * special.expit(eta) - y * special.expit(-eta),
        curvature=lambda eta: special.expit(eta) * special.expit(-eta),
        escapes=lambda eta, y: ((y == 1) & (eta > 0)) | ((y == 0) & (eta < 0)),
        link=lambda mean: math.log(mean) - math.log1p(-mean),
        mean=jax.nn.sigmoid,
        top=1.0,
    ),
    "poisson": _Loss(
        value=lambda eta, y: np.exp(eta) - y * eta,
        slope=lambda eta, y: np.exp(eta) - y,
        curvature=np.exp,
        escapes=lambda eta, y: (y == 0) & (eta < 0),
        link=math.log,
        mean=jnp.exp,
        top=math.inf,
    ),
}


@dataclasses.dataclass(frozen=True)
class GLMSolution:
    r"""Coefficients of a generalised linear model; a call gives linear predictors.

    Attributes:
      kernel: V, ``[m, o]``.
      bias: b, ``[o]``; zeros without intercept.
      l2: the penalty, per example.
      objective: what was minimised, at the solution, ``[o]``.
      steps: Newton steps of each column, ``[o]``.
      converged: whether the last full step moved no linear predictor by more than the
        tolerance, ``[o]``.
      standard_errors: standard deviations of V, ``[m, o]``: with the Fisher
        information of all rows :math:`I = \sum_i w_i \, \mathrm{var}_i (\phi_i -
        \bar\phi)(\phi_i - \bar\phi)^\top` about its own weighted mean, and
        :math:`\lambda = \mathrm{l2} \sum_i w_i`, the roots of the diagonal of
        :math:`(I + \lambda)^{-1} I (I + \lambda)^{-1}`. A row of weight k counts as k
        rows; the bias that the penalty brings is not in them. NaN in columns where
        :math:`I + \lambda` is singular to working precision.
      loss: ``"logistic"`` or ``"poisson"``.
    """

    kernel: Float[Array, "m o"]
    bias: Float[Array, " o"]
    l2: float
    objective: np.ndarray
    steps: np.ndarray
    converged: np.ndarray
    standard_errors: np.ndarray = dataclasses.field(repr=False)
    loss: Literal["logistic", "poisson"]

    def __call__(self, phi: Float[Array, "*b m"]) -> Float[Array, "*b o"]:
        """The linear predictors ``phi @ kernel + bias``."""
        eta = phi @ self.kernel.astype(phi.dtype)
        bias = self.bias.astype(phi.dtype)
        return eta + bias.reshape((1,) * (eta.ndim - 1) + bias.shape)

    def mean(self, phi: Float[Array, "*b m"]) -> Float[Array, "*b o"]:
        """The means: probabilities, or expected counts."""
        return _LOSSES[self.loss].mean(self(phi))


def fit_glm(
    x: Any,
    y: Float[Array, "n o"],
    *,
    loss: Literal["logistic", "poisson"],
    l2: float,
    weights: Float[Array, " n"] | None = None,
    phi: Map | None = None,
    intercept: bool = True,
    chunk_size: int = 8192,
    max_steps: int = 50,
    tolerance: float = 1e-8,
) -> GLMSolution:
    r"""Fits each column of the targets by iteratively reweighted least squares.

    The minimum over V and b, with :math:`\eta_i = V^\top \phi_i + b`, of

    .. math::
      \frac{\sum_i w_i \ell(\eta_i, y_i)}{\sum_i w_i} + \frac{\mathrm{l2}}{2}
      \lVert V\rVert^2, \qquad
      \ell = \log(1 + e^\eta) - y \eta \ \text{(logistic)}, \quad
      \ell = e^\eta - y \eta \ \text{(Poisson, without } \log y! \text{)}.

    A step of Newton's method solves :math:`(\Phi^\top S \Phi + \mathrm{l2} I)
    \Delta = -\nabla` with the weights :math:`S = w \ell''(\eta)`, :math:`\mu (1 - \mu)`
    or :math:`\mu` times w; it is halved until the objective falls. As the gradient is
    computed afresh in float64 at every step, errors of a step do not stay.

    Features are computed chunk by chunk, once a step and column: memory for the
    Hessian and one chunk, :math:`O(m^2 + \text{chunk\_size} \cdot m)`, in float64 on
    the host. With half the squared error for a loss the minimum would be that of
    :func:`solve` at the same ``l2``. scikit-learn's ``C`` is ``1 / (l2 *
    sum(weights))``, the ``alpha`` of its PoissonRegressor is ``l2``.

    Args:
      x: inputs, an array or a pytree of arrays with n leading rows.
      y: targets, classes one-hot or probabilities in [0, 1] for ``"logistic"``, one
        model against the rest each; counts or rates, zero or more, for ``"poisson"``.
      loss: ``"logistic"`` or ``"poisson"``.
      l2: penalty per example.
      weights: row weights, not negative.
      phi: maps a chunk of inputs to features, as for :func:`update_chunks`. None: x
        are the features.
      intercept: fit b, without penalty.
      chunk_size: rows at a time.
      max_steps: Newton steps at most.
      tolerance: a column has converged when a full step changes no linear predictor
        by more than this. On the way to a minimum at infinity steps stay near 1,
        however flat the objective has become.

    Returns:
      The solution, in the dtype of ``y``.

    Raises:
      ValueError: for shapes that do not fit, values that are not finite or outside
        their range, a column whose mean lies on the edge of it with an intercept (one
        class, or no counts), a negative penalty or weight, or settings below their
        least value.

    Warns:
      ConvergenceWarning: if a column ran out of steps, or its classes can be told
        apart without error and no penalty keeps the coefficients finite; the
        coefficients reached so far are returned, with ``converged`` False.

    References:
      McCullagh and Nelder, "Generalized Linear Models", 1989; Green, "Iteratively
      reweighted least squares for maximum likelihood estimation", JRSS B 1984;
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225 (readouts
      of bundled networks).

    Example:
      >>> import functools, jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.ArcCosine(num_features=64)
      >>> params = fm.init(jax.random.key(0), 2)
      >>> x = jax.random.normal(jax.random.key(1), (1000, 2))
      >>> inside = jax.numpy.sum(x**2, axis=1, keepdims=True) < 1.4
      >>> y = inside.astype("float32")
      >>> solution = snnk.ridge.fit_glm(
      ...     x, y, loss="logistic", l2=1e-4, phi=functools.partial(fm.phi, params)
      ... )
      >>> predicted = solution.mean(fm.phi(params, x)) > 0.5
      >>> bool(solution.converged[0]), float((predicted == inside).mean()) > 0.95
      (True, True)
    """
    _check_settings(loss, l2, chunk_size, max_steps, tolerance)
    targets, w, means = _checked_rows(x, y, weights, _LOSSES[loss].top, intercept)
    x = jax.tree.map(jnp.asarray, x)
    rows = _Rows(x, as_pytree(phi), w / w.sum(), chunk_size, np.zeros(1))
    at, first = next(rows.chunks())
    # Without weight in the first chunk there is no shift.
    share = max(rows.weights[at].sum(), np.finfo(np.float64).tiny)
    shift = rows.weights[at] @ first / share * intercept
    rows = dataclasses.replace(rows, shift=shift)
    fits = [
        _newton(
            functools.partial(_evaluate, rows, target, _LOSSES[loss], l2, intercept),
            np.zeros(len(shift)),
            _LOSSES[loss].link(float(mean)) if intercept else 0.0,
            l2,
            max_steps,
            tolerance,
        )
        for target, mean in zip(targets.T, means, strict=True)
    ]
    _warn(fits, max_steps)
    kernel = np.stack([fit.kernel for fit in fits], axis=1)
    bias = np.array([fit.bias for fit in fits]) - shift @ kernel
    spread = np.stack([fit.spread for fit in fits], axis=1)
    return GLMSolution(
        kernel=jnp.asarray(kernel, y.dtype),
        bias=jnp.asarray(bias, y.dtype),
        l2=float(l2),
        objective=np.array([fit.objective for fit in fits]),
        steps=np.array([fit.steps for fit in fits]),
        converged=np.array([fit.converged for fit in fits]),
        standard_errors=spread / np.sqrt(w.sum()),
        loss=loss,
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Inputs, the map of their features, and weights of sum 1.

    The shift is taken from all features: a mean far above the spread would take the
    digits of the spread.
    """

    x: Any
    phi: Map
    weights: np.ndarray
    chunk_size: int
    shift: np.ndarray

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Where each chunk lies, and its features in float64."""
        num = len(self.weights)
        size = min(self.chunk_size, num)
        for begin in range(0, num, size):
            # The last chunk reaches back over rows that were there before: all are of
            # one size, and compile once.
            start = min(begin, num - size)
            z = _features(self.phi, self.x, start, size)
            if z.ndim != 2 or z.shape[0] != size:
                raise ValueError(
                    f"phi must map {size} rows to [{size}, m]. Got {z.shape}."
                )
            z = np.asarray(z)[begin - start :].astype(np.float64)
            if not np.all(np.isfinite(z)):
                raise ValueError("features must be finite. Got inf or NaN among them.")
            yield slice(begin, begin + len(z)), z - self.shift


@functools.partial(jax.jit, static_argnums=3)
def _features(phi: Map, x: Any, start: Any, size: int) -> Any:
    return phi(jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), x))


class _Point(NamedTuple):
    """The objective at some coefficients and its derivatives.

    Those in V are at the best b for every V: the features are centred at their mean
    under the weights of the Hessian, as ridge regression centres them.

    Attributes:
      objective: the penalised mean loss.
      eta: linear predictors, ``[n]``.
      slope: gradient in V, ``[m]``.
      bias_slope: derivative in b; zero without intercept.
      gram: Hessian in V without the penalty; the upper triangle.
      mean: the mean that was taken out, ``[m]``.
      curvature: second derivative in b; one without intercept.
      escapes: whether scaling the coefficients up lowers every loss for ever.
    """

    objective: float
    eta: np.ndarray
    slope: np.ndarray
    bias_slope: float
    gram: np.ndarray
    mean: np.ndarray
    curvature: float
    escapes: bool


def _evaluate(
    rows: _Rows,
    y: np.ndarray,
    loss: _Loss,
    l2: float,
    intercept: bool,
    kernel: np.ndarray,
    bias: float,
) -> _Point | None:
    """One pass over the rows; None if the objective is not finite."""
    total, total_slope, total_curvature, escapes = 0.0, 0.0, 0.0, True
    size, eta = len(kernel), np.empty(len(y))
    slope, phi_sum, gram = np.zeros(size), np.zeros(size), np.zeros((size, size))
    for at, z in rows.chunks():
        w = rows.weights[at]
        with np.errstate(over="ignore", invalid="ignore"):
            # Rows that do not count neither overflow nor hold up convergence.
            eta[at] = np.where(w > 0, z @ kernel + bias, 0.0)
            total += float(w @ loss.value(eta[at], y[at]))
        if not np.isfinite(total):
            return None
        first = w * loss.slope(eta[at], y[at])
        second = w * loss.curvature(eta[at])
        escapes &= bool(np.all(loss.escapes(eta[at], y[at]) | (w == 0)))
        slope += z.T @ first
        phi_sum += z.T @ second
        total_slope += float(first.sum())
        total_curvature += float(second.sum())
        z *= np.sqrt(second)[:, None]
        blas.dsyrk(1.0, z.T, beta=1.0, c=gram.T, lower=1, overwrite_c=1)
    if not intercept:
        phi_sum, total_slope, total_curvature = np.zeros(size), 0.0, 1.0
    blas.dsyr(-1 / total_curvature, phi_sum, lower=1, a=gram.T, overwrite_a=1)
    return _Point(
        objective=total + l2 / 2 * float(kernel @ kernel),
        eta=eta,
        slope=slope + l2 * kernel,
        bias_slope=total_slope,
        gram=gram,
        mean=phi_sum / total_curvature,
        curvature=total_curvature,
        escapes=escapes,
    )


class _Fit(NamedTuple):
    """One column; ``spread`` is its standard errors times the root of the weight."""

    kernel: np.ndarray
    bias: float
    objective: float
    steps: int
    converged: bool
    escaped: bool
    spread: np.ndarray


def _newton(
    evaluate: Callable[[np.ndarray, float], _Point | None],
    kernel: np.ndarray,
    bias: float,
    l2: float,
    max_steps: int,
    tolerance: float,
) -> _Fit:
    """Newton's method with steps that never raise the objective."""
    point = evaluate(kernel, bias)
    if point is None:
        raise ValueError("y must keep sums of the loss finite. Got larger values.")
    steps, converged, escaped = 0, False, False
    while steps < max_steps and not converged and not escaped:
        factor, _ = _factored(point, l2)
        step = factor.solve(point.slope - point.mean * point.bias_slope)
        bias_step = point.bias_slope / point.curvature - float(point.mean @ step)
        promised = float(point.slope @ step) + point.bias_slope * bias_step
        slack = _ROUNDING * (1 + abs(point.objective))
        scale, trial = 1.0, evaluate(kernel - step, bias - bias_step)
        while trial is None or not (
            trial.objective <= point.objective - _KEPT * scale * promised + slack
        ):
            scale /= 2
            trial = evaluate(kernel - scale * step, bias - scale * bias_step)
        change = np.max(np.abs(trial.eta - point.eta))
        kernel, bias = kernel - scale * step, bias - scale * bias_step
        point, steps = trial, steps + 1
        converged = scale == 1 and bool(change <= tolerance)
        escaped = l2 == 0 and point.escapes
    converged &= not escaped
    factor, singular = _factored(point, l2)
    variance = np.full(len(kernel), np.nan) if singular else factor.sandwich()
    spread = np.sqrt(np.maximum(variance, 0))
    return _Fit(kernel, bias, point.objective, steps, converged, escaped, spread)


def _factored(point: _Point, l2: float) -> tuple[_factor.Cholesky, bool]:
    """Factors of the Hessian, damped if need be, and whether it is singular.

    They overwrite it.
    """
    size = len(point.gram)
    norm = _factor.largest(point.gram)
    # The mean was taken out; the rounding of its square was not.
    whole = norm + point.curvature * float(point.mean @ point.mean)
    floor = _DAMPING * size * np.finfo(np.float64).eps * whole
    # Features that are all zero have no norm to go by.
    penalty = max(l2, float(floor)) or 1.0
    factor = _factor.cholesky(point.gram, penalty)
    if factor is None or not np.isfinite(factor.condition):
        raise ValueError(
            f"features must have a Hessian with Cholesky factors. Got one of norm "
            f"{norm:.1e} that has none at a penalty of {penalty:.1e}."
        )
    lowest = (norm + penalty) / factor.condition
    return factor, l2 < penalty and bool(lowest < 2 * penalty)


def _warn(fits: list[_Fit], max_steps: int) -> None:
    """Says which columns did not converge, and why."""
    escaped = [i for i, fit in enumerate(fits) if fit.escaped]
    stopped = [i for i, fit in enumerate(fits) if not (fit.converged or fit.escaped)]
    if escaped:
        warnings.warn(
            f"y[:, {escaped}] have no minimum: the features fit every row ever better "
            "as the coefficients grow. Set l2 above 0.",
            ConvergenceWarning,
            stacklevel=3,
        )
    if stopped:
        warnings.warn(
            f"y[:, {stopped}] did not converge in max_steps={max_steps}. With l2=0 "
            "there may be no minimum; else raise max_steps.",
            ConvergenceWarning,
            stacklevel=3,
        )


def _check_settings(
    loss: str, l2: float, chunk_size: int, max_steps: int, tolerance: float
) -> None:
    if loss not in _LOSSES:
        raise ValueError(f"loss must be {' or '.join(_LOSSES)}. Got {loss!r}.")
    check_l2(l2)
    for name, value in (("chunk_size", chunk_size), ("max_steps", max_steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1. Got {value}.")
    if not 0 < tolerance < np.inf:
        raise ValueError(f"tolerance must be positive and finite. Got {tolerance}.")


def _checked_rows(
    x: Any, y: Any, weights: Any, top: float, intercept: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, weights and mean targets in float64, if they are what the loss needs."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    if y.ndim != 2 or not y.size:
        raise ValueError(f"y must be [n, o], n and o at least 1. Got {y.shape}.")
    if not shapes or any(shape[:1] != y.shape[:1] for shape in shapes):
        raise ValueError(
            f"x and y must have the same number of rows. Got {shapes} and {y.shape}."
        )
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"y must be floating. Got {y.dtype.name}.")
    if weights is not None and weights.shape != y.shape[:1]:
        raise ValueError(f"weights must be [{len(y)}], one a row. Got {weights.shape}.")
    targets = np.asarray(y).astype(np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights).astype(np.float64)
    if not np.all(np.isfinite(targets)) or targets.min() < 0 or targets.max() > top:
        span = "in [0, 1]" if top == 1 else "at least 0"
        raise ValueError(
            f"y must be finite and {span}. "
            f"Got values from {targets.min()} to {targets.max()}."
        )
    if not np.all(np.isfinite(w)) or w.min() < 0 or not w.max() > 0:
        raise ValueError(
            f"weights must be finite and not negative, nor all zero. Got {w}."
        )
    means = w @ targets / w.sum()
    if intercept and not np.all((means > 0) & (means < top)):
        kinds = "both classes" if top == 1 else "a count above 0"
        raise ValueError(
            f"y must have {kinds} in every column, or intercept be False. "
            f"Got means of {means}."
        )
    return targets, w, means
