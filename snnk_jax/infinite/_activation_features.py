r"""Features of an activation: low Hermite degrees exactly, random ones for the rest.

For pre-activations of variance :math:`p = c^2`, with the coefficients
:math:`a_j(c) = E[\sigma(c g) h_j(g)]`,

.. math:: \sigma(z) = a_0(c) + \tfrac{a_1(c)}{c} z + r(z), \qquad
  \sigma'(z) = E[\sigma'(c g)] + s(z).

Under random directions r and s are orthogonal to what they leave out, so that the
kernel is the sum of three: a constant, a multiple of the kernel below, and the kernel
of r. Only the last one needs random features, and all that is random is scaled to the
norm that it has in the limit, which is known.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax import projections
from snnk_jax.infinite import _hermite, _layers
from snnk_jax.infinite._linear import Vectors, explicit, project, square_norm
from snnk_jax.infinite._root import safe_sqrt
from snnk_jax.infinite.sketches import PolySketch
from snnk_jax.typing import Array, PRNGKeyArray

Draw = Callable[[Callable[[PRNGKeyArray], Any]], Any]
"""Returns what a function of a key draws; the function knows the shapes."""


# Few directions among many are nearly orthogonal anyhow, and far cheaper to draw.
_WIDE = 4


@runtime_checkable
class Options(Protocol):
    """What the features of an activation depend on besides its input."""

    @property
    def method(self) -> str: ...
    @property
    def degree(self) -> int: ...
    @property
    def exact(self) -> bool: ...
    @property
    def normalize(self) -> bool: ...
    @property
    def projection(self) -> str: ...
    @property
    def precision(self) -> Any: ...


def activate(
    layer: _layers.Activation,
    phi: list[Vectors],
    psi: list[Vectors] | None,
    options: Options,
    width: Callable[[int, Sequence[float]], tuple[int, ...]],
    draw: Draw,
) -> tuple[list[Vectors], list[Vectors] | None]:
    """Computes features of both kernels after an activation from those before.

    Args:
      layer: the activation.
      phi: features of the NNGP.
      psi: those of the NTK; None if nobody asked for it, empty where it is zero.
      options: see :func:`snnk_jax.infinite.features`.
      width: shares columns out: of the number of exact ones, and the energies of the
        random blocks.
      draw: the source of the parameters.
    """
    function = layer.activation
    if psi is not None and not _differentiable(layer):
        psi = []
    exact_phi, noisy_phi = _cut(phi, options.exact)
    exact_psi, noisy_psi = _cut(psi or [], options.exact)

    level = _energies(layer, phi, psi or [], options)

    def columns() -> tuple[int, ...]:
        fixed = _columns(exact_phi) + _columns(exact_psi) + options.exact
        parts = [level.rest]
        if noisy_phi and options.exact:
            parts.append(level.linear**2 * _energy(noisy_phi))
        if psi:
            parts.append(level.steep * _energy(psi))
        if noisy_psi and options.exact:
            parts.append(level.slope**2 * _energy(noisy_psi))
        return width(fixed, parts)

    shares = columns()
    # Copies are for what a projection would not make smaller.
    if _columns(exact_phi) > np.mean(shares):
        exact_phi, noisy_phi = [], phi
        shares = columns()
    if _columns(exact_psi) > np.mean(shares):
        exact_psi, noisy_psi = [], psi or []
        shares = columns()
    parts = list(shares)
    m_rest = parts.pop(0)
    m_phi = parts.pop(0) if noisy_phi and options.exact else 0
    m_steep = parts.pop(0) if psi else 0
    m_psi = parts.pop(0) if noisy_psi and options.exact else 0

    c = safe_sqrt(square_norm(phi))
    own = functools.partial(_block, options=options)
    if options.exact:
        a = _hermite.coefficients(function, 2, c)
        constant, linear = a[..., 0], _ratio(a[..., 1], c)
    else:
        constant = linear = jnp.zeros_like(c)
    slope = _mean_slope(function, c) if options.exact and psi else jnp.zeros_like(c)
    rest = _sketched if options.method == "sketch" else _random
    m = max(m_rest, m_steep)
    source = _Source(
        function, phi, c, constant, linear, slope, bool(psi), options, draw
    )
    r, s = rest(source, m)
    energy = _hermite.power(function, c) - constant**2 - (linear * c) ** 2
    noisy = [own(r[..., :m_rest], energy)]
    copies = [_scaled(explicit(v), linear) for v in exact_phi]
    copied = level.linear**2 * _energy(exact_phi)
    random = level.rest
    if options.exact:
        copies, copied = [constant[..., None], *copies], copied + level.constant**2
    if m_phi:
        kept = _isometry(noisy_phi, m_phi, options, draw)
        energy = linear**2 * square_norm(noisy_phi)
        noisy = [own(_scaled(kept, linear), energy), *noisy]
        random += level.linear**2 * _energy(noisy_phi)
    after_phi = _vectors(copies, noisy, copied, random)
    if not psi:
        return after_phi, psi
    u = _isometry(psi, m_steep, options, draw)
    steep = _hermite.power(function, c, derivative=True) - slope**2
    noisy = [own(s[..., :m_steep] * u, square_norm(psi) * steep)]
    random = level.steep * _energy(psi)
    copies = [_scaled(explicit(v), slope) for v in exact_psi]
    copied = level.slope**2 * _energy(exact_psi)
    if m_psi:
        kept = _isometry(noisy_psi, m_psi, options, draw)
        energy = slope**2 * square_norm(noisy_psi)
        noisy = [own(_scaled(kept, slope), energy), *noisy]
        random += level.slope**2 * _energy(noisy_psi)
    return after_phi, _vectors(copies, noisy, copied, random)


@dataclasses.dataclass(frozen=True)
class _Level:
    """What the parts of an activation are worth at inputs of mean square one."""

    constant: float
    linear: float
    rest: float
    slope: float
    steep: float


def _energies(
    layer: _layers.Activation,
    phi: list[Vectors],
    psi: list[Vectors],
    options: Options,
) -> _Level:
    function = layer.activation
    size = _energy(phi) ** 0.5
    with jax.ensure_compile_time_eval():
        c = jnp.asarray([size], jnp.float32)
        square = float(_hermite.power(function, c)[0])
        steep = float(_hermite.power(function, c, derivative=True)[0]) if psi else 0.0
        if not options.exact:
            return _Level(0.0, 0.0, square, 0.0, steep)
        a0, a1 = _hermite.coefficients(function, 2, c)[0].tolist()
        slope = float(_mean_slope(function, c)[0]) if psi else 0.0
    linear = a1 / size if size else 0.0
    return _Level(a0, linear, square - a0**2 - a1**2, slope, steep - slope**2)


def _energy(vectors: Sequence[Vectors]) -> float:
    return sum((v.after for v in vectors), 0.0)


def compress(
    vectors: Sequence[Vectors], m: int, options: Options, draw: Draw
) -> Vectors:
    """Projects vectors side by side to m columns, of the same norm."""
    kept = _isometry(vectors, m, options, draw)
    block = _block(kept, square_norm(vectors), options)
    return Vectors(block, energy=_energy(vectors))


@dataclasses.dataclass(frozen=True)
class _Source:
    """What features of r and s are made from.

    Attributes:
      function: the activation.
      phi: features of the pre-activations.
      c: their norms.
      constant: a_0(c).
      linear: a_1(c) / c.
      slope: E[f'(c g)].
      derivative: whether s is asked for.
      options: see :func:`snnk_jax.infinite.features`.
      draw: the source of the parameters.
    """

    function: Any
    phi: list[Vectors]
    c: Array
    constant: Array
    linear: Array
    slope: Array
    derivative: bool
    options: Options
    draw: Draw


def _random(source: _Source, m: int) -> tuple[Array, Array]:
    """R and s at random directions, columns that average to the kernels."""
    width = _columns(source.phi)
    spherical = source.options.projection == "spherical"
    name = "orthogonal" if spherical else source.options.projection
    if name == "orthogonal" and width > _WIDE * m:
        name = "gaussian"

    def rows(key: PRNGKeyArray) -> Array:
        omega = projections.draw(name, key, m, width)
        return _of_length(omega, width) if spherical else omega

    z = project(source.phi, source.draw(rows), source.options.precision)
    function = source.function
    r = function(z) - source.constant[..., None] - _scaled(z, source.linear)
    return r, function.grad(z) - source.slope[..., None] if source.derivative else r


def _sketched(source: _Source, m: int) -> tuple[Array, Array]:
    r"""Sketches of the Hermite expansions of r and s up to the degree.

    The sketches of different degrees are added up under random signs: as unbiased as
    side by side, every column serves every degree.
    """
    function, phi, c, options = source.function, source.phi, source.c, source.options
    degree = options.degree
    sketch = PolySketch(num_features=m, degree=degree)
    width = _columns(phi)

    def parameters(key: PRNGKeyArray) -> Any:
        words = projections.streams(projections.key_words(key), 2)
        first, second = (
            jax.random.wrap_key_data(w, impl="threefry2x32") for w in words
        )
        signs = projections.rademacher(second, degree, m)
        return sketch.init(first, width), signs

    params, signs = source.draw(parameters)
    x = jnp.concatenate([explicit(v) for v in phi], axis=-1)
    powers = sketch.powers(params, _scaled(x, _ratio(jnp.ones_like(c), c)))
    signed = [
        s * e.reshape((1,) * c.ndim + (-1,)) for s, e in zip(powers, signs, strict=True)
    ]
    low = 2 if options.exact else 0
    a = _hermite.coefficients(function, degree + 1, c)
    first = 1 if options.exact else 0
    r = _combine(signed, a, low)
    if not source.derivative:
        return r, r
    if isinstance(function, _layers.NormalizedExponential):
        roots = jnp.sqrt(jnp.arange(1, degree + 1, dtype=c.dtype))
        b = a[..., 1:] * roots.reshape((1,) * c.ndim + (-1,))
        b = b * _ratio(jnp.ones_like(c), c)[..., None]
        b = jnp.concatenate([b, jnp.zeros_like(b[..., :1])], axis=-1)
    else:
        b = _hermite.coefficients(_hermite.derivative_of(function), degree + 1, c)
    return r, _combine(signed, b, first)


def _combine(signed: list[Array], a: Array, low: int) -> Array:
    """The sum over degrees, each column of mean square one for each unit of energy."""
    m = signed[0].shape[-1]
    total = jnp.zeros_like(signed[0])
    if low == 0:
        total = total + a[..., :1]
    for j, sketch in enumerate(signed, 1):
        if j >= low:
            total = total + a[..., j : j + 1] * sketch * m**0.5
    return total


def _mean_slope(function: Any, c: Array) -> Array:
    """``E f'(c g)``."""
    if isinstance(function, _layers.NormalizedExponential):
        return _ratio(_hermite.coefficients(function, 2, c)[..., 1], c)
    return _hermite.coefficients(_hermite.derivative_of(function), 1, c)[..., 0]


def _differentiable(layer: _layers.Activation) -> bool:
    """Whether the derivative is more than jumps."""
    function = layer.activation
    return getattr(function, "degree", None) != 0


def _cut(vectors: list[Vectors], keep: bool) -> tuple[list[Vectors], list[Vectors]]:
    exact = [v for v in vectors if v.exact and keep]
    return exact, [v for v in vectors if not (v.exact and keep)]


def _columns(vectors: Sequence[Vectors]) -> int:
    return sum(v.width for v in vectors)


def _vectors(
    copies: list[Array], noisy: list[Array], copied: float, random: float
) -> list[Vectors]:
    result = [Vectors(jnp.concatenate(noisy, axis=-1), energy=max(random, 0.0))]
    if copies:
        columns = jnp.concatenate(copies, axis=-1)
        result = [Vectors(columns, exact=True, energy=copied), *result]
    return result


def _isometry(
    vectors: Sequence[Vectors], m: int, options: Options, draw: Draw
) -> Array:
    """Projections to m columns, whose products are m times those of the vectors."""
    width = _columns(vectors)

    def rows(key: PRNGKeyArray) -> Array:
        if width > _WIDE * m:
            return projections.rademacher(key, m, width)
        return _of_length(projections.orthogonal(key, m, width), width)

    return project(vectors, draw(rows), options.precision)


def _of_length(rows: Array, width: int) -> Array:
    return rows * (width**0.5 / jnp.linalg.norm(rows, axis=1, keepdims=True))


def _block(columns: Array, energy: Array, options: Options) -> Array:
    """Columns over the root of their number, of the squared norm that they have."""
    columns = columns * columns.shape[-1] ** -0.5
    if not options.normalize:
        return columns
    square = jnp.sum(columns * columns, axis=-1)
    present = (square > 0) & (energy > 0)
    ratio = jnp.where(present, energy, 1) / jnp.where(present, square, 1)
    return _scaled(columns, jnp.where(present, jnp.sqrt(ratio), 0))


def _scaled(x: Array, factor: Array) -> Array:
    return x * factor[..., None]


def _ratio(a: Array, c: Array) -> Array:
    return jnp.where(c > 0, a / jnp.where(c > 0, c, 1), 0)
