"""What networks of infinite width predict, in closed form from their kernels.

All in float64 on the host, as ``snnk_jax.ridge``: kernel matrices are badly
conditioned.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from snnk_jax import ridge
from snnk_jax.infinite._kernel import Kernels


class KernelRidge(NamedTuple):
    """A solution of kernel ridge regression.

    Attributes:
      dual: coefficients of the training rows, [n, o].
      bias: intercept, [o].
      l2: penalty per example.
    """

    dual: np.ndarray
    bias: np.ndarray
    l2: float

    def __call__(self, cross: Any) -> np.ndarray:
        """Predicts from the kernel of new inputs with the training inputs, [t, n]."""
        return _host("cross", cross, 2) @ self.dual + self.bias


class Posterior(NamedTuple):
    """A Gaussian over the outputs at t test inputs, independent between outputs.

    Attributes:
      mean: [t, o].
      covariance: [t, t], that of each output.
    """

    mean: np.ndarray
    covariance: np.ndarray


def kernel_ridge(
    train: Any,
    y: Any,
    l2: float | np.number | Sequence[float] | np.ndarray | None = None,
    *,
    intercept: bool = True,
) -> KernelRidge:
    r"""Fits kernel ridge regression, with the penalty chosen if it is not given.

    .. math:: \min_\alpha \tfrac1n |y - K \alpha - b|^2 + l2\, \alpha^\top K \alpha

    The kernel is the Gram matrix of features, its scaled eigenvectors, and
    ``snnk_jax.ridge`` does the rest: the meaning of ``l2``, the intercept and
    generalised cross-validation are those of feature ridge.

    Args:
      train: kernel of the training inputs, [n, n].
      y: targets, [n, o].
      l2: penalty per example, zero or more; several above zero, or None for a grid, of
        which generalised cross-validation takes the best.
      intercept: fit b, without penalty.

    Raises:
      ValueError: for shapes that do not fit, values that are not finite, or a penalty
        out of range.

    Example:
      >>> import numpy as np
      >>> import snnk_jax as snnk
      >>> x = np.linspace(-1, 1, 9)[:, None]
      >>> model = snnk.infinite.kernel_ridge(x @ x.T, 3 * x + 1, l2=1e-9)
      >>> model(np.array([[2.0]]) @ x.T).round(4)
      array([[7.]])
    """
    k, targets = _square("train", train), _targets(y, len(train))
    values, vectors = np.linalg.eigh(k)
    # The rest is rounding noise of the kernel, and has no root.
    floor = len(k) * np.finfo(_dtype(train)).eps * max(values[-1], 0.0)
    keep = values > floor
    if not keep.any():
        raise ValueError("train must be positive definite somewhere. Got none of it.")
    roots = np.sqrt(values[keep])
    phi = vectors[:, keep] * roots
    with jax.enable_x64(True):
        dtype = jnp.float64
        stats = ridge.init(phi.shape[1], targets.shape[1], dtype=dtype)
        stats = ridge.update(stats, jnp.asarray(phi), jnp.asarray(targets))
        penalty: Any = l2
        if l2 is None or np.ndim(l2):
            path = ridge.select_l2(stats, penalty, intercept=intercept)
            solution = path.solution
        else:
            solution = ridge.solve(stats, float(penalty), intercept=intercept)
    dual = (vectors[:, keep] / roots) @ np.asarray(solution.kernel, np.float64)
    return KernelRidge(dual, np.asarray(solution.bias, np.float64), solution.l2)


def gp_posterior(train: Any, y: Any, cross: Any, test: Any, noise: float) -> Posterior:
    r"""Computes the posterior of a Gaussian process: an infinite Bayesian network.

    .. math:: \mu = K_* (K + s I)^{-1} y, \qquad
      \Sigma = K_{**} - K_* (K + s I)^{-1} K_*^\top

    Args:
      train: NNGP kernel of the training inputs, [n, n].
      y: targets, [n, o].
      cross: kernel of test with training inputs, [t, n].
      test: kernel of the test inputs, [t, t].
      noise: variance s of the noise in the targets, zero or more.

    Raises:
      ValueError: for shapes that do not fit, values that are not finite, a negative
        noise, or a matrix that is singular without more of it.

    Example:
      >>> import numpy as np
      >>> import snnk_jax as snnk
      >>> one = np.ones((1, 1))
      >>> posterior = snnk.infinite.gp_posterior(one, 2 * one, one, one, noise=1.0)
      >>> posterior.mean, posterior.covariance
      (array([[1.]]), array([[0.5]]))
    """
    k, targets = _square("train", train), _targets(y, len(train))
    across, own = _crossing(cross, test, len(k))
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be finite and at least 0. Got {noise}.")
    factor = _cholesky(k + noise * np.eye(len(k)))
    half = scipy.linalg.solve_triangular(factor, across.T, lower=True)
    mean = half.T @ scipy.linalg.solve_triangular(factor, targets, lower=True)
    return Posterior(mean, own - half.T @ half)


def gradient_flow(
    train: Any, y: Any, cross: Any, t: float = math.inf, *, l2: float = 0.0
) -> np.ndarray:
    r"""Predicts with the mean of infinite networks trained by gradient flow.

    The network f descends :math:`\tfrac12 |f - y|^2` over the training set, at unit
    rate for time t. From networks whose outputs have mean zero at the start,

    .. math:: \mu_t = \Theta_* (\Theta + \lambda)^{-1}
      (1 - e^{-(\Theta + \lambda) t})\, y.

    Gradient descent with mean squared error and step size s is at
    :math:`t = s \cdot steps / n`, with n training examples, after so many steps, if
    the loss is :math:`\tfrac{1}{2 n} |f - y|^2`.

    Args:
      train: tangent kernel of the training inputs, [n, n].
      y: targets, [n, o].
      cross: tangent kernel of test with training inputs, [t, n].
      t: time, at least 0; infinite for the end of training.
      l2: :math:`\lambda`, a penalty on the way from the first parameters.

    Raises:
      ValueError: for shapes that do not fit, values that are not finite, or a negative
        time or penalty.

    Example:
      >>> import numpy as np
      >>> import snnk_jax as snnk
      >>> one = np.ones((1, 1))
      >>> snnk.infinite.gradient_flow(one, 2 * one, one)
      array([[2.]])
      >>> snnk.infinite.gradient_flow(one, 2 * one, one, t=np.log(2))
      array([[1.]])

    References:
      Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models", arXiv
      1902.06720.
    """
    k, targets = _square("train", train), _targets(y, len(train))
    across = _host("cross", cross, 2)
    _check_columns(across, len(k))
    return across @ (_response(k, t, l2, _dtype(train)) @ targets)


def ensemble(
    train: Kernels,
    y: Any,
    cross: Kernels,
    test: Any,
    t: float = math.inf,
    *,
    l2: float = 0.0,
) -> Posterior:
    r"""Computes mean and covariance of infinite networks trained by gradient flow.

    With :math:`A = (\Theta + \lambda)^{-1} (1 - e^{-(\Theta + \lambda) t})`, the
    outputs at test inputs over random first parameters are Gaussian, of the mean of
    :func:`gradient_flow` and covariance

    .. math:: K_{**} + \Theta_* A K A \Theta_*^\top
      - \Theta_* A K_*^\top - K_* A \Theta_*^\top.

    Args:
      train: both kernels of the training inputs, as ``net.kernel(x)`` gives.
      y: targets, [n, o].
      cross: both kernels of test with training inputs.
      test: NNGP kernel of the test inputs, [t, t].
      t: time, as for :func:`gradient_flow`.
      l2: :math:`\lambda`.

    Raises:
      ValueError: as for :func:`gradient_flow`, and for a kernel that is missing.

    Example:
      >>> import numpy as np
      >>> import snnk_jax as snnk
      >>> one = np.ones((1, 1))
      >>> both = snnk.infinite.Kernels(nngp=one, ntk=2 * one)
      >>> snnk.infinite.ensemble(both, 3 * one, both, one)  # interpolates
      Posterior(mean=array([[3.]]), covariance=array([[0.]]))
    """
    for name, kernels in (("train", train), ("cross", cross)):
        if kernels.nngp is None or kernels.ntk is None:
            raise ValueError(f"{name} must hold both kernels. Got one.")
    theta, k = _square("train.ntk", train.ntk), _square("train.nngp", train.nngp)
    targets = _targets(y, len(theta))
    across, own = _crossing(cross.ntk, test, len(theta))
    k_across = _host("cross.nngp", cross.nngp, 2)
    response = across @ _response(theta, t, l2, _dtype(train.ntk))
    mixed = response @ k_across.T
    covariance = own + response @ k @ response.T - mixed - mixed.T
    return Posterior(response @ targets, covariance)


def one_hot(labels: Any, num_classes: int) -> np.ndarray:
    """Targets for classification: 1 for the class, less the mean of a row.

    Args:
      labels: integers in [0, num_classes), [n].
      num_classes: o.

    Returns:
      Float64, [n, o], each row of mean zero. The class of a prediction is that of its
      largest output.

    Raises:
      ValueError: for labels outside of the range.

    Example:
      >>> import snnk_jax as snnk
      >>> snnk.infinite.one_hot([1, 0], 2)
      array([[-0.5,  0.5],
             [ 0.5, -0.5]])
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers, [n]. Got {labels.dtype}{list(labels.shape)}."
        )
    if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"labels must be in [0, {num_classes}). "
            f"Got {labels.min()} to {labels.max()}."
        )
    return np.eye(num_classes)[labels] - 1 / num_classes


def _response(k: np.ndarray, t: float, l2: float, dtype: Any) -> np.ndarray:
    """``(k + l2)^{-1} (1 - e^{-(k + l2) t})`` by eigenvectors; rounding noise is 0."""
    if not t >= 0:
        raise ValueError(f"t must be at least 0. Got {t}.")
    if not 0 <= l2 < math.inf:
        raise ValueError(f"l2 must be finite and at least 0. Got {l2}.")
    values, vectors = np.linalg.eigh(k)
    rates = np.maximum(values, 0) + l2
    floor = len(k) * np.finfo(dtype).eps * rates[-1]
    safe = np.where(rates > floor, rates, 1)
    scale = np.where(rates > floor, -np.expm1(-safe * t) / safe, 0)
    return (vectors * scale) @ vectors.T


def _cholesky(a: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.cholesky(a)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "train plus noise must be positive definite. Got a singular matrix: raise "
            "the noise."
        ) from error


def _dtype(x: Any) -> Any:
    return np.float64 if np.asarray(x).dtype == np.float64 else np.float32


def _host(name: str, x: Any, ndim: int) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != ndim or not np.isfinite(x).all():
        raise ValueError(
            f"{name} must be finite, with {ndim} axes. Got shape {x.shape}"
            + (", not finite." if x.ndim == ndim else ".")
        )
    return x


def _square(name: str, x: Any) -> np.ndarray:
    x = _host(name, x, 2)
    if x.shape[0] != x.shape[1] or not len(x):
        raise ValueError(f"{name} must be [n, n], not empty. Got {x.shape}.")
    return (x + x.T) / 2


def _targets(y: Any, rows: int) -> np.ndarray:
    y = _host("y", y, 2)
    if len(y) != rows:
        raise ValueError(f"y must have {rows} rows, as train has. Got {len(y)}.")
    return y


def _check_columns(cross: np.ndarray, rows: int) -> None:
    if cross.shape[1] != rows:
        raise ValueError(
            f"cross must be [t, n] with n = {rows} training inputs. Got {cross.shape}."
        )


def _crossing(cross: Any, test: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    across, own = _host("cross", cross, 2), _square("test", test)
    _check_columns(across, rows)
    if len(own) != len(across):
        raise ValueError(
            f"test must be [t, t] with t = {len(across)} test inputs. Got {own.shape}."
        )
    return across, own
