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
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from snnk_jax import activations, projections
from snnk_jax.infinite import _hermite, _layers
from snnk_jax.infinite._duals import safe_sqrt
from snnk_jax.infinite._linear import Vectors, explicit, project, square_norm
from snnk_jax.infinite.sketches import PolySketch
from snnk_jax.typing import Array, PRNGKeyArray

Draw = Callable[[Callable[[PRNGKeyArray], Any]], Any]
"""Returns what a function of a key draws; the function knows the shapes."""


# Few directions among many are nearly orthogonal anyhow, and far cheaper to draw.
_WIDE = 4


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
    width: Callable[[int, int], int],
    draw: Draw,
) -> tuple[list[Vectors], list[Vectors] | None]:
    """Computes features of both kernels after an activation from those before.

    Args:
      layer: the activation.
      phi: features of the NNGP.
      psi: those of the NTK; None if nobody asked for it, empty where it is zero.
      options: see :func:`snnk_jax.infinite.features`.
      width: the columns of a random block, of the number of exact columns and of the
        number of random blocks.
      draw: the source of the parameters.
    """
    function = layer.activation
    if psi is not None and not _differentiable(layer):
        psi = []
    exact_phi, noisy_phi = _cut(phi, options.exact)
    exact_psi, noisy_psi = _cut(psi or [], options.exact)

    def columns() -> int:
        blocks = 1 + bool(psi)
        if options.exact:
            blocks += bool(noisy_phi) + bool(noisy_psi)
        return width(_columns(exact_phi) + _columns(exact_psi) + options.exact, blocks)

    m = columns()
    # Copies are for what a projection would not make smaller.
    if _columns(exact_phi) > m:
        exact_phi, noisy_phi = [], phi
        m = columns()
    if _columns(exact_psi) > m:
        exact_psi, noisy_psi = [], psi or []
        m = columns()

    c = safe_sqrt(square_norm(phi))
    square = _hermite.power(function, c)
    own = functools.partial(_block, options=options)
    if options.exact:
        a = _hermite.coefficients(function, 2, c)
        constant, linear = a[..., 0], _ratio(a[..., 1], c)
    else:
        constant = linear = jnp.zeros_like(c)
    slope = _mean_slope(function, c) if options.exact and psi else jnp.zeros_like(c)
    rest = _sketched if options.method == "sketch" else _random
    r, s = rest(layer, phi, c, constant, linear, slope, bool(psi), m, options, draw)
    energy = square - constant**2 - (linear * c) ** 2
    noisy = [own(r, energy)]
    copies = [_scaled(explicit(v), linear) for v in exact_phi]
    if options.exact:
        copies = [constant[..., None], *copies]
        if noisy_phi:
            kept = _isometry(noisy_phi, m, options, draw)
            energy = linear**2 * square_norm(noisy_phi)
            noisy = [own(_scaled(kept, linear), energy), *noisy]
    after_phi = _vectors(copies, noisy)
    if not psi:
        return after_phi, psi
    u = _isometry(psi, m, options, draw)
    steep = _hermite.power(function, c, derivative=True) - slope**2
    noisy = [own(s * u, square_norm(psi) * steep)]
    copies = [_scaled(explicit(v), slope) for v in exact_psi]
    if options.exact and noisy_psi:
        kept = _isometry(noisy_psi, m, options, draw)
        energy = slope**2 * square_norm(noisy_psi)
        noisy = [own(_scaled(kept, slope), energy), *noisy]
    return after_phi, _vectors(copies, noisy)


def compress(
    vectors: Sequence[Vectors], m: int, options: Options, draw: Draw
) -> Vectors:
    """Projects vectors side by side to m columns, of the same norm."""
    kept = _isometry(vectors, m, options, draw)
    return Vectors(_block(kept, square_norm(vectors), options))


def _random(
    layer: _layers.Activation,
    phi: list[Vectors],
    c: Array,
    constant: Array,
    linear: Array,
    slope: Array,
    derivative: bool,
    m: int,
    options: Options,
    draw: Draw,
) -> tuple[Array, Array]:
    """R and s at random directions, columns that average to the kernels."""
    function: Any = layer.activation
    width = _columns(phi)
    spherical = options.projection == "spherical"
    name = "orthogonal" if spherical else options.projection
    if name == "orthogonal" and width > _WIDE * m:
        name = "gaussian"

    def rows(key: PRNGKeyArray) -> Array:
        omega = projections.draw(name, key, m, width)
        return _of_length(omega, width) if spherical else omega

    z = project(phi, draw(rows), options.precision)
    r = function(z) - constant[..., None] - _scaled(z, linear)
    s = function.grad(z) - slope[..., None] if derivative else r
    return r, s


def _sketched(
    layer: _layers.Activation,
    phi: list[Vectors],
    c: Array,
    constant: Array,
    linear: Array,
    slope: Array,
    derivative: bool,
    m: int,
    options: Options,
    draw: Draw,
) -> tuple[Array, Array]:
    r"""Sketches of the Hermite expansions of r and s up to the degree.

    The sketches of different degrees are added up under random signs: as unbiased as
    side by side, every column serves every degree.
    """
    del constant, linear, slope
    function, degree = layer.activation, options.degree
    sketch = PolySketch(num_features=m, degree=degree)
    width = _columns(phi)

    def parameters(key: PRNGKeyArray) -> Any:
        words = projections.streams(projections.key_words(key), 2)
        first, second = (
            jax.random.wrap_key_data(w, impl="threefry2x32") for w in words
        )
        signs = projections.rademacher(second, degree, m)
        return sketch.init(first, width), signs

    params, signs = draw(parameters)
    x = jnp.concatenate([explicit(v) for v in phi], axis=-1)
    powers = sketch.powers(params, _scaled(x, _ratio(jnp.ones_like(c), c)))
    signed = [
        s * e.reshape((1,) * c.ndim + (-1,)) for s, e in zip(powers, signs, strict=True)
    ]
    low = 2 if options.exact else 0
    a = _hermite.coefficients(function, degree + 1, c)
    first = 1 if options.exact else 0
    r = _combine(signed, a, low)
    if not derivative:
        return r, r
    if isinstance(function, _layers.NormalizedExponential):
        roots = jnp.sqrt(jnp.arange(1, degree + 1, dtype=c.dtype))
        b = a[..., 1:] * roots.reshape((1,) * c.ndim + (-1,))
        b = b * _ratio(jnp.ones_like(c), c)[..., None]
        b = jnp.concatenate([b, jnp.zeros_like(b[..., :1])], axis=-1)
    else:
        b = _hermite.coefficients(derivative_of(function), degree + 1, c)
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


def derivative_of(activation: activations.Activation) -> activations.Activation:
    """The row of the derivative; jumps have none."""
    degree = activation.degree
    return activations.Activation(
        f"derivative of {activation.name}",
        _Derivative(activation),
        degree=degree - 1 if degree else None,
        kinks=activation.kinks,
    )


@dataclasses.dataclass(frozen=True)
class _Derivative:
    """The derivative of an activation, hashable by value."""

    activation: activations.Activation

    def __call__(self, z: Array) -> Array:
        return self.activation.grad(z)


def _mean_slope(function: Any, c: Array) -> Array:
    """``E f'(c g)``."""
    if isinstance(function, _layers.NormalizedExponential):
        return _ratio(_hermite.coefficients(function, 2, c)[..., 1], c)
    return _hermite.coefficients(derivative_of(function), 1, c)[..., 0]


def _differentiable(layer: _layers.Activation) -> bool:
    """Whether the derivative is more than jumps."""
    function = layer.activation
    return getattr(function, "degree", None) != 0


def _cut(vectors: list[Vectors], keep: bool) -> tuple[list[Vectors], list[Vectors]]:
    exact = [v for v in vectors if v.exact and keep]
    return exact, [v for v in vectors if not (v.exact and keep)]


def _columns(vectors: Sequence[Vectors]) -> int:
    return sum(v.width for v in vectors)


def _vectors(copies: list[Array], noisy: list[Array]) -> list[Vectors]:
    result = []
    if copies:
        result.append(Vectors(jnp.concatenate(copies, axis=-1), exact=True))
    return [*result, Vectors(jnp.concatenate(noisy, axis=-1))]


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
