"""How many features, and which Hermite degree, a target error asks for."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax.infinite import _hermite, _layers, _positions
from snnk_jax.infinite._features import Features
from snnk_jax.infinite._kernel import kernel
from snnk_jax.infinite._variance import input_variance, variance
from snnk_jax.typing import Array, Float, PRNGKeyArray

_PILOT = 1024
_SEEDS = 2
_MAX_DEGREE = 64


class Suggestion(NamedTuple):
    """What :func:`suggest_features` found.

    Attributes:
      num_features: a number of features that should meet the target.
      error: the error that is predicted for it.
      degree: the least degree of a sketch whose truncation takes at most half of the
        target from any k of the sample; None if 64 are not enough.
      truncation: what that degree leaves out at most, relative to k.
      pilot_features: the number of features that was tried.
      pilot_error: the error that it had.
    """

    num_features: int
    error: float
    degree: int | None
    truncation: float
    pilot_features: int
    pilot_error: float


def suggest_features(
    net: _layers.Layer,
    x: Float[Array, "n *s d"],
    target_error: float,
    key: PRNGKeyArray,
    **options: Any,
) -> Suggestion:
    r"""Finds how many features keep the error of a kernel below a target.

    The error is :math:`\lVert \Phi \Phi^\top - K\rVert_F / \lVert K\rVert_F` on a
    sample. It is measured with 1024 features, against the exact kernel, and falls as
    the root of their number.

    Args:
      net: the network.
      x: a sample of inputs; its kernel is computed exactly, so tens of them.
      target_error: above 0, below 1.
      key: random key.
      **options: fields of :class:`Features`, other than the width.

    Raises:
      ValueError: for a target out of range or fewer than two inputs.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> net = snnk.infinite.serial(
      ...     snnk.infinite.Dense(), snnk.infinite.Activation("relu"),
      ...     snnk.infinite.Dense(),
      ... )
      >>> x = jax.random.normal(jax.random.key(1), (16, 8))
      >>> found = snnk.infinite.suggest_features(net, x, 0.1, jax.random.key(0))
      >>> found.error <= 0.1, found.degree
      (True, 2)
    """
    if not 0 < target_error < 1:
        raise ValueError(f"target_error must be in (0, 1). Got {target_error}.")
    if len(x) < 2:
        raise ValueError(f"x must hold at least two inputs. Got shape {x.shape}.")
    pilot = Features(net=net, num_features=_PILOT, **options)
    exact = np.asarray(kernel(net, x, get=pilot.kind), np.float64)
    errors = []
    for k in jax.random.split(key, _SEEDS):
        phi = np.asarray(pilot.phi(pilot.init(k, x.shape[1:]), x), np.float64)
        errors.append(np.linalg.norm(phi @ phi.T - exact) / np.linalg.norm(exact))
    error = float(np.sqrt(np.mean(np.square(errors))))
    num = max(64, 64 * math.ceil(_PILOT * (error / target_error) ** 2 / 64))
    degree, left = _degree(net, x, target_error / 2)
    predicted = error * math.sqrt(_PILOT / num)
    return Suggestion(num, predicted, degree, left, _PILOT, error)


def _degree(net: _layers.Layer, x: Array, share: float) -> tuple[int | None, float]:
    """The least degree that leaves out at most a share, and what it leaves out."""
    found: list[tuple[Any, Array]] = []
    _norms(net, input_variance(x), found)
    left = np.zeros(_MAX_DEGREE)
    for function, c in found:
        a = _hermite.coefficients(function, _MAX_DEGREE, c.ravel())
        total = np.asarray(_hermite.power(function, c.ravel()), np.float64)[:, None]
        kept = np.cumsum(np.asarray(a, np.float64) ** 2, axis=1)
        ratio = np.where(total > 0, 1 - kept / np.where(total > 0, total, 1), 0)
        left = np.maximum(left, np.max(ratio, axis=0))
    enough = np.flatnonzero(left <= share)
    if not len(enough):
        return None, float(left[-1])
    return max(int(enough[0]), 1), max(float(left[max(enough[0], 1)]), 0.0)


def _norms(layer: _layers.Layer, p: Any, found: list[tuple[Any, Array]]) -> Any:
    """Collects the norms before activations; a pool takes the mean, which is more."""
    if isinstance(layer, _layers.Serial):
        for inner in layer.layers:
            p = _norms(inner, p, found)
        return p
    if isinstance(layer, _layers.Parallel):
        branches = zip(layer.layers, p, strict=True)
        return tuple(_norms(inner, branch, found) for inner, branch in branches)
    if isinstance(layer, _layers.Residual):
        return p + _norms(layer.branch, p, found)
    if isinstance(layer, _layers.GlobalAvgPool):
        return jnp.mean(p, axis=tuple(range(1, p.ndim)))
    if isinstance(layer, _layers.AvgPool):
        axes = tuple(range(1, p.ndim))
        return _positions.window_mean(
            p, layer.window_shape, layer.strides or (), layer.padding, axes
        )
    if isinstance(layer, _layers.Activation):
        found.append((layer.activation, jnp.sqrt(p)))
    return variance(layer, p)
