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
from snnk_jax.features import (
    URF,
    AppendOne,
    ArcCosine,
    Chain,
    Exponential,
    FeatureMap,
    Polynomial,
    TowerFeatures,
)

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
        float64 arrays x [n, d], kernel [d, o] and bias [o]; None without a formula.
      expected: what is estimated without bias, a function of ``x @ kernel`` and bias,
        where it is not ``features.exact``.
      many: a map of four times as many random directions.
      biased: whether no law of its estimates is claimed.
    """

    name: str
    features: FeatureMap
    bias: bool
    variance: Callable[[Any, np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None
    expected: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    many: FeatureMap | None = None
    biased: bool = False

    @property
    def sketch(self) -> bool:
        """Whether the map has a sketch of its own in place of a projection."""
        return isinstance(self.features, Polynomial)

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


def wave_variance(features, x, kernel, bias):
    """Second moment of one direction, by E exp(g.v) = exp(v.v / 2) for complex v."""
    atom = snnk.activations.get(features.activation).atoms[0]
    s, c, shape = atom.frequency, features.scale, features.shape
    p = s * c**2 * np.sum(x**2, axis=1)[:, None]
    q = s * np.sum(kernel**2, axis=0) / c**2
    z, beta = s * (x @ kernel), s * bias + atom.phase
    # E |Z|^2 and E Z^2 with Z = Lambda(i t) Lambda(u); A enters by the Gaussian
    # integral E exp(4 A |g|^2 + g.v) = (1 - 8A)^(-d/2) exp(v.v / (2 (1 - 8A))).
    ratio = (1 - 4 * shape) / (1 - 8 * shape)
    factor = (ratio * (1 - 4 * shape)) ** (x.shape[1] / 2)
    modulus = factor * np.exp(p + (2 * ratio - 1) * q)
    square = factor * np.exp((1 - 2 * ratio) * (p - q))
    square = square * np.cos(4 * ratio * z + 2 * beta)
    directions = features.num_features // 2
    second = 0.5 * (modulus + square)
    return atom.amplitude**2 * (second - np.cos(z + beta) ** 2) / directions


def exponential_variance(features, x, kernel, bias):
    c, shape = features.scale, features.shape
    t, u = c * x, kernel.T / c
    v = t[:, None] + u[None]
    p, q = np.sum(t**2, axis=1)[:, None], np.sum(u**2, axis=1)
    factor = ((1 - 4 * shape) / (1 - 8 * shape) ** 0.5) ** x.shape[1]
    growth = 2 * (1 - 4 * shape) / (1 - 8 * shape)
    second = factor * np.exp(growth * np.sum(v**2, axis=-1) - p - q)
    scale = np.exp(bias)
    mean = np.exp(x @ kernel)
    return scale**2 * (second - mean**2) / features.num_features


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


def arc_variance(features, x, kernel, bias):
    del bias
    square = arc_cosine(x, kernel, 2 * features.order)
    mean = arc_cosine(x, kernel, features.order)
    return (2 * square - mean**2) / features.num_features


def polynomial_variance(features, x, kernel, bias):
    return np.asarray(features.variance(*(jnp.float32(a) for a in (x, kernel, bias))))


def with_directions(features, directions):
    """The map at as many columns as so many random directions take."""
    if isinstance(features, TowerFeatures):
        exact = dataclasses.replace(features, num_features=10**6).layout(DIM).exact
        directions = exact + features.columns_per_direction * directions
    return dataclasses.replace(features, num_features=directions)


def _cases() -> Iterable[Case]:
    def urf(activation, **fields):
        fields = {"num_features": 16, "scale": 1.0, "kappa": NORM**2} | fields
        return URF(activation=activation, **fields)

    wave = snnk.activations.get("cos", a=0.8, b=1.5, c=0.4)
    softsign = snnk.activations.Activation("softsign", _softsign, kinks=(0.0,))
    # Name: the map, its directions, whether with a bias, its variance.
    maps = {
        "urf_cos_bias": (urf("cos"), 8, True, wave_variance),
        "urf_sin": (urf("sin"), 8, False, wave_variance),
        "urf_sin_bias": (urf("sin", scale=1.1), 8, True, wave_variance),
        "urf_wave_bias": (urf(wave, scale=0.8), 16, True, wave_variance),
        "urf_shape_bias": (urf(wave, shape=-0.05), 32, True, wave_variance),
        "urf_exact_0_bias": (urf("cos", exact_degree=0), 8, True, None),
        "urf_exact_1_bias": (urf(wave, exact_degree=1), 8, True, None),
        "urf_exact_2_bias": (
            urf(wave, exact_degree=2, shape=-0.05),
            *(64, True, None),
        ),
        "urf_sampled_gaussian_bias": (urf("gaussian"), 8, True, None),
        "urf_sampled_sech_bias": (urf("sech", exact_degree=1), 8, True, None),
        "urf_sampled_plain": (
            urf("gabor", spectrum="sampled", importance=False),
            *(8, False, None),
        ),
        "urf_gelu_bias": (urf("gelu", exact_degree=1), 64, True, None),
        "urf_tanh_bias": (urf("tanh"), 64, True, None),
        "urf_relu_bias": (urf("relu", exact_degree=0, num_terms=3), 32, True, None),
        "urf_user_bias": (urf(softsign, exact_degree=2), 64, True, None),
        "exponential_bias": (
            Exponential(num_features=16, scale=1.0),
            *(64, True, exponential_variance),
        ),
        "exponential_shape": (
            Exponential(num_features=16, scale=1.1, shape=-0.05),
            *(16, False, exponential_variance),
        ),
        "exponential_exact_2": (
            Exponential(num_features=16, scale=1.0, exact_degree=2),
            *(64, False, None),
        ),
        "arccos_0": (ArcCosine(order=0, num_features=16), 16, False, arc_variance),
        "arccos_1": (ArcCosine(order=1, num_features=16), 16, False, arc_variance),
        "arccos_2": (ArcCosine(order=2, num_features=16), 16, False, arc_variance),
        "arccos_3": (ArcCosine(order=3, num_features=16), 256, False, arc_variance),
        "arccos_leaky": (
            ArcCosine(num_features=16, negative_slope=0.2),
            *(16, False, None),
        ),
    }
    for name, (features, directions, bias, variance) in maps.items():
        # Where the law is known to the second moment, coupled directions as well.
        for projection in ("gaussian", "orthogonal")[: 2 if variance else 1]:
            coupled = dataclasses.replace(features, projection=projection)
            yield Case(
                f"{name}_{projection}",
                with_directions(coupled, directions),
                bias,
                variance,
                _estimated(features),
                with_directions(coupled, 4 * directions),
            )

    polynomial = Polynomial(
        coefficients=(0.5, -1.0, 0.7, 0.4),
        num_features=17,
        bias_scale=1.0,
        kappa=NORM**2,
    )
    square = Polynomial(coefficients=(0.0, 0.0, 1.0), num_features=17, kappa=NORM**2)
    shrunk = {
        "urf_shrunk": urf("cos", exact_degree=1, shrinkage=True, num_features=21),
        "urf_shrunk_gelu": urf(
            "gelu", exact_degree=1, shrinkage=True, num_features=64, projection="sobol"
        ),
        "exponential_shrunk": Exponential(
            num_features=21, exact_degree=0, shrinkage=True, projection="hadamard"
        ),
    }
    for name, features in shrunk.items():
        yield Case(name, features, True, None, biased=True)
    sketches = {
        f"polynomial_{sketch}_bias": dataclasses.replace(polynomial, sketch=sketch)
        for sketch in ("maclaurin", "tensor_sketch", "tensor_srht")
    }
    for name, features in {**sketches, "polynomial_square": square}.items():
        bias = features is not square
        many = dataclasses.replace(features, num_features=1 + 4 * 16)
        yield Case(name, features, bias, polynomial_variance, None, many)


def _softsign(z):
    return z / (1 + abs(z))


def _estimated(features):
    """What a series map estimates, a function of x @ kernel and bias in float64.

    f itself up to the exact degree, if it has no kinks, the series beyond.
    """
    if not isinstance(features, URF) or features.series is None:
        return None
    series, row = features.series, features.row
    none = features.exact_degree is None or row.kinks
    exact = range(0 if none else features.exact_degree + 1)

    def derivative(b, order):
        value = sum(
            atom.amplitude
            * atom.frequency**order
            * np.cos(atom.frequency * b + atom.phase + order * np.pi / 2)
            for atom in series.atoms
        )
        affine = (series.constant + series.slope * b, series.slope)
        return value + (affine[order] if order < 2 else 0)

    def estimated(z, b):
        value = derivative(z + b, 0)
        for n in exact:
            taylor = row.evaluate(b, n) - derivative(b, n)
            value = value + taylor * z**n / math.factorial(n)
        return value

    return estimated


CASES = tuple(_cases())


def unregistered(module: Any, cases: Iterable[Case]) -> set[str]:
    """Names of the concrete feature maps in ``module`` that no case tests.

    Not of the maps of maps: Chain has no kernel between its inputs and weights
    (chain_test.py), AppendOne takes all from the map inside (bundling_test.py).
    """
    maps = {
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, FeatureMap)
        and not inspect.isabstract(value)
        and value not in (AppendOne, Chain)
    }
    return {cls.__name__ for cls in maps - {type(case.features) for case in cases}}
