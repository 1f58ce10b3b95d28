"""Activations: one row of facts per function.

Everything the library knows about a function stands in its :class:`Activation`: a
feature map asks the row, not a table of its own. Rows hash by value, so layers that
hold one compile once.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax.typing import Array

# Beyond it the Gaussian weight leaves float64.
_RADIUS = 38
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
# Of a panel's integral, relative to that of the absolute value over the line.
_TOLERANCE = 1e-14
_MAX_PANELS = 2**14


@dataclasses.dataclass(frozen=True)
class Atom:
    r"""One term :math:`a\cos(s z + \theta)` of a finite Fourier representation."""

    frequency: float
    amplitude: float = 1.0
    phase: float = 0.0


@dataclasses.dataclass(frozen=True)
class Spectrum:
    r"""An integrable Fourier transform.

    .. math:: f(z) = \int_0^\infty R(s) \cos(s z + \theta)\, ds

    Args:
      density: R for arrays of s > 0, in float64 on the host. It may take both signs.
        Rows compare by it, as by their ``fn``.
      phase: :math:`\theta`.
      decay: the rate of :math:`R(s) = O(e^{-decay\, s})`; infinite if R falls faster
        than every exponential, 0 if it falls more slowly than every one.

    Raises:
      ValueError: for a density that is not callable, a phase that is not finite or a
        decay below 0.

    Example:
      >>> import numpy as np
      >>> import snnk_jax as snnk
      >>> spectrum = snnk.activations.get("laplace").spectrum
      >>> np.pi * spectrum.density(np.array([1.0, 3.0])), spectrum.decay
      (array([1. , 0.2]), 0.0)
    """

    density: Callable[[np.ndarray], np.ndarray]
    phase: float = 0.0
    decay: float = math.inf

    def __post_init__(self):
        if not callable(self.density):
            raise ValueError(f"density must be callable. Got {self.density!r}.")
        if not math.isfinite(self.phase):
            raise ValueError(f"phase must be finite. Got {self.phase}.")
        if not self.decay >= 0:
            raise ValueError(f"decay must be at least 0. Got {self.decay}.")


@dataclasses.dataclass(frozen=True)
class Dual:
    r"""Names the closed form of :math:`E[f(u) f(v)]` for Gaussian u and v.

    The forms stand in ``snnk_jax.infinite``. Functions of ``atoms`` or
    ``coefficients`` have one without being told.

    ============== ========================= =================================
    family         parameters                function
    ============== ========================= =================================
    ``rectified``  n = 0, 1, 2 or 3, l, r    :math:`r z_+^n + l\,(-z)_+^n`
    ``elu``        s, a                      :math:`s z`; z < 0: :math:`s a (e^z-1)`
    ``erf``        a, b, c                   :math:`a\,\mathrm{erf}(bz)+c`
    ``exp``        a, b                      :math:`a e^{bz}`
    ``gaussian``   a, b                      :math:`a e^{bz^2}`, b < 0
    ``gabor``                                :math:`e^{-z^2}\sin z`
    ``gelu``                                 :math:`z \Phi(z)`
    ``sigmoid``    a, b, c                   :math:`a / (1 + e^{-bz}) + c`
    ``silu``                                 :math:`z / (1 + e^{-z})`
    ``softplus``                             :math:`\log(1 + e^z)`
    ============== ========================= =================================

    Args:
      family: the name.
      parameters: of the function.
    """

    family: str
    parameters: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Activation:
    """A scalar function and what is known about it.

    Args:
      name: how errors and reports call it.
      fn: the function, applied elementwise to arrays, differentiable by JAX. Rows
        compare by it, so pass a module-level function or a ``functools.partial`` kept
        in one place, not a fresh lambda each time.
      atoms: the exact finite Fourier representation ``f(z) = sum of atoms``; empty if
        there is none.
      degree: ``n`` where ``f(c z) = c**n f(z)`` for all ``c > 0``; None otherwise.
      spectrum: the Fourier transform where it is integrable; None otherwise.
      kinks: the points, in increasing order, where f or a low derivative jumps.
      coefficients: ``c`` where ``f(z) = sum of c[n] z**n``; empty if f is not a
        polynomial.
      derivative: the first derivative, for functions that JAX differentiates wrongly
        or poorly; None: by JAX.
      dual: which closed form its dual kernels have; None if none is known or needed.

    Raises:
      ValueError: for functions that are not callable, kinks that are not finite and
        increasing, or coefficients that are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> softsign = snnk.activations.Activation("softsign", lambda z: z / (1 + abs(z)))
      >>> float(softsign(jnp.array(1.0)))
      0.5
    """

    name: str
    fn: Callable[[Array], Array]
    atoms: tuple[Atom, ...] = ()
    degree: int | None = None
    spectrum: Spectrum | None = None
    kinks: tuple[float, ...] = ()
    coefficients: tuple[float, ...] = ()
    derivative: Callable[[Array], Array] | None = None
    dual: Dual | None = None

    def __post_init__(self):
        if not callable(self.fn):
            raise ValueError(f"fn must be callable. Got {self.fn!r}.")
        if self.derivative is not None and not callable(self.derivative):
            raise ValueError(
                f"derivative must be callable or None. Got {self.derivative!r}."
            )
        finite = all(math.isfinite(kink) for kink in self.kinks)
        if not finite or list(self.kinks) != sorted(set(self.kinks)):
            raise ValueError(f"kinks must be finite and increase. Got {self.kinks}.")
        if not all(math.isfinite(c) for c in self.coefficients):
            raise ValueError(f"coefficients must be finite. Got {self.coefficients}.")

    def __call__(self, z: Array) -> Array:
        """Applies the function elementwise."""
        return self.fn(z)

    def grad(self, z: Array, order: int = 1) -> Array:
        r"""Applies the derivative :math:`f^{(n)}` elementwise.

        At a kink it is the one that JAX takes, 0 for ReLU; jumps have none there
        either, so the derivative of a step is 0 everywhere.

        Args:
          z: any shape; dtype and shape are kept.
          order: n; 0 is the function itself.

        Raises:
          ValueError: for an order below 0.

        Example:
          >>> import jax.numpy as jnp
          >>> import snnk_jax as snnk
          >>> z = jnp.array([1.0, 3.0])
          >>> cube = snnk.activations.get("polynomial", coefficients=(0., 0., 0., 1.))
          >>> cube.grad(z).tolist(), cube.grad(z, order=2).tolist()
          ([3.0, 27.0], [6.0, 18.0])
        """
        if order < 0:
            raise ValueError(f"order must be at least 0. Got {order}.")
        fn = self.fn
        if order > 0 and self.derivative is not None:
            fn, order = self.derivative, order - 1
        for _ in range(order):
            fn = _derivative(fn)
        return fn(z)

    def evaluate(self, z: np.ndarray, order: int = 0) -> np.ndarray:
        """Computes the function, or a derivative, in float64 on the host.

        Whatever JAX's default precision, and also while JAX traces.

        Args:
          z: concrete values, any shape.
          order: of the derivative, as in :meth:`grad`.

        Raises:
          ValueError: for an order below 0.

        Example:
          >>> import numpy as np
          >>> import snnk_jax as snnk
          >>> snnk.activations.get("tanh").evaluate(np.array([0.0, 1.0]))
          array([0.        , 0.76159416])
        """
        host = jax.default_device("cpu")
        with host, jax.ensure_compile_time_eval(), jax.enable_x64(True):
            return np.array(self.grad(jnp.asarray(z, jnp.float64), order))

    def hermite(self, num: int, scale: float = 1.0) -> np.ndarray:
        r"""Coefficients of the Hermite expansion at a scale.

        .. math:: a_j(c) = E_{g \sim N(0, 1)}[f(c g) h_j(g)], \qquad
          h_j = \mathrm{He}_j / \sqrt{j!}

        The :math:`h_j` are orthonormal under the Gaussian, so that
        :math:`\sum_j a_j(c)^2 = E f(c g)^2`, and for unit variances and correlation
        :math:`\rho` of g and g' :math:`E f(c g) f(c' g') = \sum_j a_j(c) a_j(c')
        \rho^j`. Computed by adaptive Gauss-Legendre quadrature, to about 1e-13 of
        :math:`E|f(c g) h_j(g)|`, and kept for the next call.

        Args:
          num: coefficients, j = 0 to num - 1.
          scale: c.

        Returns:
          Read-only float64 array, (num,).

        Raises:
          ValueError: for ``num`` below 1, a scale that is not positive and finite, or
            a function whose coefficients are not finite or oscillates too fast.

        Example:
          >>> import snnk_jax as snnk
          >>> snnk.activations.get("relu").hermite(4).round(6) + 0.0
          array([0.398942, 0.5     , 0.282095, 0.      ])

        References:
          Coefficients at the scale of each input instead of one polynomial for all:
          the expansion of Han et al., "Fast Neural Kernel Embeddings for General
          Activations", arXiv 2209.04121, holds only at c = 1.
        """
        if num < 1:
            raise ValueError(f"num must be at least 1. Got {num}.")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite. Got {scale}.")
        return _hermite(self, num, float(scale))


def _derivative(fn: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda z: jax.jvp(fn, (z,), (jnp.ones_like(z),))[1]


@functools.lru_cache(maxsize=4096)
def _hermite(activation: Activation, num: int, scale: float) -> np.ndarray:
    """Halves panels until each agrees with the sum of its halves."""
    # Panels shrink towards 0, or a function narrow against 1 / scale could be missed.
    edges = np.concatenate([2.0 ** np.arange(-20, 1), np.arange(2.0, _RADIUS + 1, 2)])
    kinks = np.asarray(activation.kinks) / scale
    kinks = kinks[np.abs(kinks) < _RADIUS]
    edges = np.unique(np.concatenate([-edges, [0.0], kinks, edges]))
    left, right = edges[:-1], edges[1:]
    whole, size = _panels(activation, num, scale, left, right)
    total = np.zeros(num)
    while len(left) <= _MAX_PANELS:
        middle = (left + right) / 2
        left, right = np.append(left, middle), np.append(middle, right)
        halves, _ = _panels(activation, num, scale, left, right)
        both = halves[:, : len(middle)] + halves[:, len(middle) :]
        rough = np.any(np.abs(both - whole) > _TOLERANCE * size[:, None], axis=0)
        total += both[:, ~rough].sum(axis=1)
        if not rough.any():
            total.setflags(write=False)
            return total
        again = np.append(rough, rough)
        left, right, whole = left[again], right[again], halves[:, again]
    raise ValueError(
        f"activation must be smooth enough for quadrature. "
        f"Got {activation.name!r} at scale {scale}."
    )


def _panels(
    activation: Activation,
    num: int,
    scale: float,
    left: np.ndarray,
    right: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Integrals of each coefficient over each panel; of absolute values over all."""
    half = (right - left)[:, None] / 2
    g = (left + right)[:, None] / 2 + half * _NODES
    value = activation.evaluate(scale * g)
    polynomial, before = np.ones_like(g), np.zeros_like(g)
    integrals, sizes = np.empty((num, len(left))), np.empty(num)
    with np.errstate(invalid="ignore", over="ignore"):  # refused below
        value = value * (half * _WEIGHTS * np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi))
        for j in range(num):
            terms = value * polynomial
            integrals[j], sizes[j] = terms.sum(axis=1), np.abs(terms).sum()
            following = (g * polynomial - math.sqrt(j) * before) / math.sqrt(j + 1)
            polynomial, before = following, polynomial
    if not (np.isfinite(integrals).all() and np.isfinite(sizes).all()):
        raise ValueError(
            f"activation must have finite Hermite coefficients. "
            f"Got {activation.name!r} at scale {scale}."
        )
    return integrals, sizes


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A function with its parameters, hashable by value unlike a partial."""

    fn: Callable[..., Any]
    parameters: tuple[float, ...]

    def __call__(self, z: Any) -> Any:
        return self.fn(z, *self.parameters)


def _bind(fn: Callable[..., Any], *parameters: float) -> _Bound:
    # Python's floats take the dtype of z, those of numpy would impose theirs.
    return _Bound(fn, tuple(float(p) for p in parameters))


# The functions of the rows: ours, at module level, because JAX's do not pickle.


def _abs(z: Array) -> Array:
    return jnp.abs(z)


def _cos(z: Array, a: float, b: float, c: float) -> Array:
    return a * jnp.cos(b * z + c)


def _elu(z: Array, alpha: float) -> Array:
    return jax.nn.elu(z, alpha)


def _erf(z: Array, a: float, b: float, c: float) -> Array:
    return a * jax.lax.erf(b * z) + c


def _exp(z: Array, a: float, b: float) -> Array:
    return a * jnp.exp(b * z)


def _gabor(z: Array) -> Array:
    return jnp.exp(-jnp.square(z)) * jnp.sin(z)


def _gaussian(z: Array, a: float, b: float) -> Array:
    return a * jnp.exp(b * jnp.square(z))


def _gelu(z: Array) -> Array:
    return jax.nn.gelu(z, approximate=False)


def _gelu_by_tanh(z: Array) -> Array:
    return jax.nn.gelu(z, approximate=True)


def _identity(z: Array) -> Array:
    return z


def _laplace(z: Array) -> Array:
    return jnp.exp(-jnp.abs(z))


def _leaky_relu(z: Array, negative_slope: float) -> Array:
    return jax.nn.leaky_relu(z, negative_slope)


def _normal_cdf(z: Array) -> Array:
    return 0.5 * jax.lax.erfc(-math.sqrt(0.5) * z)


def horner(z: Array, *coefficients: float) -> Array:
    r""":math:`\sum_j c_j z^j` elementwise, lowest degree first."""
    value = jnp.full_like(z, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * z + float(coefficient)
    return value


def _rectified_monomial(z: Array, n: float) -> Array:
    return jax.nn.relu(z) ** int(n)


def _relu(z: Array) -> Array:
    return jax.nn.relu(z)


def _sech(z: Array) -> Array:
    # 1 / cosh overflows and takes its gradient to NaN.
    return 2 * jnp.exp(-jnp.logaddexp(z, -z))


def _selu(z: Array) -> Array:
    return jax.nn.selu(z)


def _sigmoid(z: Array) -> Array:
    return jax.nn.sigmoid(z)


def _sign(z: Array) -> Array:
    return jnp.sign(z)


def _silu(z: Array) -> Array:
    return jax.nn.silu(z)


def _sin(z: Array, a: float, b: float, c: float) -> Array:
    return a * jnp.sin(b * z + c)


def _softplus(z: Array) -> Array:
    return jax.nn.softplus(z)


def _step(z: Array) -> Array:
    return jnp.heaviside(z, 0.0)


def _tanh(z: Array) -> Array:
    return jnp.tanh(z)


def _normal(s: np.ndarray, mean: float, std: float) -> np.ndarray:
    return np.exp(-0.5 * ((s - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def _gaussian_density(s: np.ndarray, a: float, b: float) -> np.ndarray:
    return 2 * a * _normal(s, 0.0, math.sqrt(-2 * b))


def _gabor_density(s: np.ndarray) -> np.ndarray:
    return _normal(s, 1.0, math.sqrt(2)) - _normal(s, -1.0, math.sqrt(2))


def _laplace_density(s: np.ndarray) -> np.ndarray:
    return 2 / (math.pi * (1 + s**2))


def _sech_density(s: np.ndarray) -> np.ndarray:
    # As in cosh(pi s / 2), without its overflow.
    decay = np.exp(-math.pi / 2 * s)
    return 2 * decay / (1 + decay**2)


# Rows with parameters.


def _cos_row(a: float = 1.0, b: float = 1.0, c: float = 0.0) -> Activation:
    atom = Atom(float(b), float(a), float(c))
    return Activation("cos", _bind(_cos, a, b, c), atoms=(atom,))


def _sin_row(a: float = 1.0, b: float = 1.0, c: float = 0.0) -> Activation:
    atom = Atom(float(b), float(a), float(c) - math.pi / 2)
    return Activation("sin", _bind(_sin, a, b, c), atoms=(atom,))


def _elu_row(alpha: float = 1.0) -> Activation:
    dual = Dual("elu", (1.0, float(alpha)))
    return Activation("elu", _bind(_elu, alpha), kinks=(0.0,), dual=dual)


def _erf_row(a: float = 1.0, b: float = 1.0, c: float = 0.0) -> Activation:
    fn = _bind(_erf, a, b, c)
    return Activation("erf", fn, dual=Dual("erf", fn.parameters))


def _exp_row(a: float = 1.0, b: float = 1.0) -> Activation:
    fn = _bind(_exp, a, b)
    return Activation("exp", fn, dual=Dual("exp", fn.parameters))


def _gaussian_row(
    scale: float | None = None, a: float = 1.0, b: float | None = None
) -> Activation:
    if scale is not None and b is not None:
        raise ValueError(f"scale must be absent if b is given. Got {scale} and {b}.")
    scale = 1.0 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite. Got {scale}.")
    b = -0.5 / scale**2 if b is None else b
    if not -math.inf < b < 0:
        raise ValueError(f"b must be negative and finite. Got {b}.")
    fn = _bind(_gaussian, a, b)
    return Activation(
        "gaussian",
        fn,
        spectrum=Spectrum(_bind(_gaussian_density, a, b)),
        dual=Dual("gaussian", fn.parameters),
    )


def _gelu_row(approximate: bool = False) -> Activation:
    if approximate:
        return Activation("gelu", _gelu_by_tanh)
    return Activation("gelu", _gelu, dual=Dual("gelu"))


def _hermite_row(n: int | float = 2) -> Activation:
    n = _degree(n)
    series = np.polynomial.hermite_e.herme2poly(np.eye(1, n + 1, n)[0])
    return _series_row("hermite", series / math.sqrt(math.factorial(n)))


def _leaky_relu_row(negative_slope: float = 0.01) -> Activation:
    fn = _bind(_leaky_relu, negative_slope)
    dual = Dual("rectified", (1.0, -float(negative_slope), 1.0))
    return Activation("leaky_relu", fn, degree=1, kinks=(0.0,), dual=dual)


def _monomial_row(n: int | float = 2) -> Activation:
    n = _degree(n)
    return _series_row("monomial", np.eye(1, n + 1, n)[0])


def _polynomial_row(coefficients: Sequence[float] = (0.0, 0.0, 1.0)) -> Activation:
    if len(coefficients) == 0:
        raise ValueError("coefficients must have at least one entry. Got none.")
    return _series_row("polynomial", coefficients)


def _rbf_row(gamma: float = 0.5) -> Activation:
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite. Got {gamma}.")
    row = _sin_row(math.sqrt(2), math.sqrt(2 * gamma), math.pi / 4)
    return dataclasses.replace(row, name="rbf")


def _rectified_monomial_row(n: int | float = 2) -> Activation:
    n = _degree(n)
    fn = _bind(_rectified_monomial, float(n)) if n else _step
    dual = Dual("rectified", (float(n), 0.0, 1.0)) if n <= 3 else None
    return Activation("rectified_monomial", fn, degree=n, kinks=(0.0,), dual=dual)


def _sigmoid_like_row() -> Activation:
    row = _erf_row(0.5, 1 / 2.4020563531719796, 0.5)
    return dataclasses.replace(row, name="sigmoid_like")


def _series_row(name: str, coefficients: Sequence[float] | np.ndarray) -> Activation:
    fn = _bind(horner, *coefficients)
    degrees = [n for n, coefficient in enumerate(fn.parameters) if coefficient != 0]
    degree = degrees[0] if len(degrees) == 1 else None
    return Activation(name, fn, degree=degree, coefficients=fn.parameters)


def _degree(n: int | float) -> int:
    if not 0 <= n < math.inf or n != int(n):
        raise ValueError(f"n must be an integer of at least 0. Got {n}.")
    return int(n)


_FAMILIES: dict[str, Callable[..., Activation]] = {
    "cos": _cos_row,
    "elu": _elu_row,
    "erf": _erf_row,
    "exp": _exp_row,
    "gaussian": _gaussian_row,
    "gelu": _gelu_row,
    "hermite": _hermite_row,
    "leaky_relu": _leaky_relu_row,
    "monomial": _monomial_row,
    "polynomial": _polynomial_row,
    "rbf": _rbf_row,
    "rectified_monomial": _rectified_monomial_row,
    "sigmoid_like": _sigmoid_like_row,
    "sin": _sin_row,
}

# Rows without parameters, and their aliases.
_ROWS: dict[str, Activation] = {
    "abs": Activation(
        "abs", _abs, degree=1, kinks=(0.0,), dual=Dual("rectified", (1.0, 1.0, 1.0))
    ),
    "gabor": Activation(
        "gabor",
        _gabor,
        spectrum=Spectrum(_gabor_density, phase=-math.pi / 2),
        dual=Dual("gabor"),
    ),
    "identity": Activation("identity", _identity, degree=1, coefficients=(0.0, 1.0)),
    "laplace": Activation(
        "laplace",
        _laplace,
        spectrum=Spectrum(_laplace_density, decay=0.0),
        kinks=(0.0,),
    ),
    "normal_cdf": Activation(
        "normal_cdf", _normal_cdf, dual=Dual("erf", (0.5, math.sqrt(0.5), 0.5))
    ),
    "relu": Activation(
        "relu", _relu, degree=1, kinks=(0.0,), dual=Dual("rectified", (1.0, 0.0, 1.0))
    ),
    "sech": Activation(
        "sech", _sech, spectrum=Spectrum(_sech_density, decay=math.pi / 2)
    ),
    "selu": Activation(
        "selu",
        _selu,
        kinks=(0.0,),
        # The constants of jax.nn.selu.
        dual=Dual("elu", (1.0507009873554804934, 1.6732632423543772848)),
    ),
    "sigmoid": Activation("sigmoid", _sigmoid, dual=Dual("sigmoid", (1.0, 1.0, 0.0))),
    "sign": Activation(
        "sign", _sign, degree=0, kinks=(0.0,), dual=Dual("rectified", (0.0, -1.0, 1.0))
    ),
    "silu": Activation("silu", _silu, dual=Dual("silu")),
    "softplus": Activation("softplus", _softplus, dual=Dual("softplus")),
    "step": Activation(
        "step", _step, degree=0, kinks=(0.0,), dual=Dual("rectified", (0.0, 0.0, 1.0))
    ),
    "swish": Activation("silu", _silu, dual=Dual("silu")),
    "tanh": Activation("tanh", _tanh, dual=Dual("sigmoid", (2.0, 2.0, -1.0))),
}


def names() -> tuple[str, ...]:
    """Names that :func:`get` knows, in alphabetical order.

    Example:
      >>> import snnk_jax as snnk
      >>> "gelu" in snnk.activations.names()
      True
    """
    return tuple(sorted([*_FAMILIES, *_ROWS]))


def get(
    activation: str | Activation | Callable[[Array], Array],
    **parameters: int | float | bool | Sequence[float],
) -> Activation:
    r"""Returns the row of an activation.

    Rows with parameters, with their defaults:

    ==================================== ==========================================
    ``cos``, ``sin``: ``a=1, b=1, c=0``  :math:`a\cos(bz+c)`, :math:`a\sin(bz+c)`
    ``elu``: ``alpha=1``                 z, or :math:`\alpha(e^z-1)` below 0
    ``erf``: ``a=1, b=1, c=0``           :math:`a\,\mathrm{erf}(bz)+c`
    ``exp``: ``a=1, b=1``                :math:`a e^{bz}`
    ``gaussian``: ``scale=1, a=1``       :math:`a e^{-z^2/(2\,scale^2)}`
    ``gaussian``: ``a=1, b``             :math:`a e^{bz^2}`, b < 0
    ``gelu``: ``approximate=False``      :math:`z\Phi(z)`; True: the form by tanh
    ``hermite``, ``monomial``: ``n=2``   :math:`\mathrm{He}_n(z)/\sqrt{n!}`, :math:`z^n`
    ``leaky_relu``:                      z, or ``negative_slope`` times z below 0
    ``negative_slope=0.01``
    ``polynomial``:                      :math:`\sum_n c_n z^n`
    ``coefficients=(0, 0, 1)``
    ``rbf``: ``gamma=0.5``               :math:`\sqrt2\sin(\sqrt{2\gamma}z+\pi/4)`
    ``rectified_monomial``: ``n=2``      :math:`z_+^n`
    ==================================== ==========================================

    Of the others, ``gabor`` is :math:`e^{-z^2}\sin z`, ``laplace`` :math:`e^{-|z|}`,
    ``step`` is 1 for z > 0 and 0 elsewhere, ``normal_cdf`` is :math:`\Phi`,
    ``sigmoid_like`` is :math:`(1 + \mathrm{erf}(z / 2.402\dots)) / 2`, near the
    sigmoid, and ``swish`` another name of ``silu``.

    Args:
      activation: a name of :func:`names`, a row (returned as it is), or a function.
      **parameters: parameters of the named row.

    Raises:
      ValueError: for an unknown name, with the nearest known ones, or parameters that
        the row does not have or allow.

    Example:
      >>> import snnk_jax as snnk
      >>> snnk.activations.get("cos", b=2.0).atoms
      (Atom(frequency=2.0, amplitude=1.0, phase=0.0),)
    """
    if isinstance(activation, str):
        return _named(activation, parameters)
    if parameters:
        raise ValueError(
            f"parameters must come with a name. Got {parameters} for {activation!r}."
        )
    if isinstance(activation, Activation):
        return activation
    if not callable(activation):
        raise ValueError(
            f"activation must be a name, an Activation or a function. "
            f"Got {activation!r}."
        )
    return Activation(getattr(activation, "__name__", repr(activation)), activation)


def _named(name: str, parameters: dict[str, Any]) -> Activation:
    if name in _FAMILIES:
        try:
            return _FAMILIES[name](**parameters)
        except TypeError as error:
            raise ValueError(
                f"parameters must be those of {name}. Got {parameters}: {error}."
            ) from error
        except OverflowError as error:
            raise ValueError(
                f"parameters must keep {name} in the range of numbers. "
                f"Got {parameters}: {error}."
            ) from error
    if name in _ROWS:
        if parameters:
            raise ValueError(
                f"parameters must be absent: {name} has none. Got {parameters}."
            )
        return _ROWS[name]
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"activation must be one of {', '.join(names())}, an Activation or a "
        f"function. Got {name!r}.{hint}"
    )
