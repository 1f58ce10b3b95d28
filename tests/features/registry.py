"""Every feature map of the library, once: what the invariants are tested on."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.integrate

import snnk_jax as snnk
from snnk_jax.features import FeatureMap

DIM, EXAMPLES, OUTPUTS = 4, 3, 3
NORM = 0.7  # of inputs and of weight columns: small, so that variances stay small


@dataclasses.dataclass(frozen=True)
class Case:
    """A feature map and what is known about it.

    Args:
      name: in the names of the tests.
      features: the map.
      bias: whether it is tested with one.
      variance: of one estimate with independent directions, a function of the map and
        float64 arrays x [n, d], kernel [d, o] and bias [o].
    """

    name: str
    features: FeatureMap
    bias: bool
    variance: Callable[[Any, np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    def replace(self, **changes) -> FeatureMap:
        return dataclasses.replace(self.features, **changes)

    def inputs(self, dtype="float32"):
        """Inputs, kernel and bias (or None): nothing parallel, nothing orthogonal."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(EXAMPLES, DIM))
        kernel = rng.normal(size=(DIM, OUTPUTS))
        x *= NORM / np.linalg.norm(x, axis=1, keepdims=True)
        kernel *= NORM / np.linalg.norm(kernel, axis=0, keepdims=True)
        bias = jnp.asarray([0.3, -0.8, 1.7], dtype) if self.bias else None
        return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), bias


def urf_variance(features, x, kernel, bias):
    """Second moment of one direction, by E exp(g.v) = exp(v.v / 2) for complex v."""
    atom = snnk.activations.get(features.activation).atoms[0]
    s, c = atom.frequency, features.scale
    p = (s * c) ** 2 * np.sum(x**2, axis=1)[:, None]
    q = np.sum(kernel**2, axis=0) / c**2
    z, beta = s * (x @ kernel), s * bias + atom.phase
    second = 0.5 * (np.exp(p + q) + np.exp(q - p) * np.cos(4 * z + 2 * beta))
    directions = features.num_features // 2
    return atom.amplitude**2 * (second - np.cos(z + beta) ** 2) / directions


def arc_cosine(x, kernel, order):
    """K_n of any order by quadrature, in float64, in polar coordinates of the plane.

    The squared radius of a plane Gaussian has the moments 2^n n!.
    """

    def angular(angle):
        value, _ = scipy.integrate.quad(
            lambda t: (np.cos(t) * np.cos(t - angle)) ** order,
            angle - np.pi / 2,
            np.pi / 2,
            epsabs=1e-13,
        )
        return value

    x_norm = np.linalg.norm(x, axis=1)[:, None]
    w_norm = np.linalg.norm(kernel, axis=0)
    unit_x, unit_w = x / x_norm, (kernel / w_norm).T
    # Kahan's formula, exact near 0 and pi where arccos of the product is not.
    angle = 2 * np.arctan2(
        np.linalg.norm(unit_x[:, None] - unit_w, axis=-1),
        np.linalg.norm(unit_x[:, None] + unit_w, axis=-1),
    )
    moment = 2.0**order * math.factorial(order) / np.pi
    return moment * (x_norm * w_norm) ** order * np.vectorize(angular)(angle)


def arc_cosine_variance(features, x, kernel, bias):
    del bias
    square = arc_cosine(x, kernel, 2 * features.order)
    mean = arc_cosine(x, kernel, features.order)
    return (2 * square - mean**2) / features.num_features


def _cases() -> Iterable[Case]:
    URF, ArcCosine = snnk.features.URF, snnk.features.ArcCosine
    wave = snnk.activations.get("cos", a=0.8, b=1.5, c=0.4)
    maps = {
        "urf_cos_bias": (URF(activation="cos", num_features=16, scale=1.0), True),
        "urf_sin": (URF(activation="sin", num_features=16, scale=1.0), False),
        "urf_sin_bias": (URF(activation="sin", num_features=16, scale=1.1), True),
        "urf_wave_bias": (URF(activation=wave, num_features=16, scale=0.8), True),
        "arccos_0": (ArcCosine(order=0, num_features=16), False),
        "arccos_1": (ArcCosine(order=1, num_features=16), False),
        "arccos_2": (ArcCosine(order=2, num_features=16), False),
    }
    variances = {URF: urf_variance, ArcCosine: arc_cosine_variance}
    for name, (features, bias) in maps.items():
        for projection in ("gaussian", "orthogonal"):
            yield Case(
                f"{name}_{projection}",
                dataclasses.replace(features, projection=projection),
                bias,
                variances[type(features)],
            )


CASES = tuple(_cases())


def unregistered(module: Any, cases: Iterable[Case]) -> set[str]:
    """Names of the concrete feature maps in ``module`` that no case tests."""
    maps = {
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, FeatureMap)
        and not inspect.isabstract(value)
    }
    return {cls.__name__ for cls in maps - {type(case.features) for case in cases}}
