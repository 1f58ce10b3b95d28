r"""Random projections :math:`\Omega \in R^{m \times d}`, each row of covariance I.

=============  ====================  =================================================
name           law of a row          rows together
=============  ====================  =================================================
gaussian       N(0, I)               independent
orthogonal     N(0, I)               orthogonal within blocks of d
simplex        N(0, I)               equal obtuse angles within blocks of d
antithetic     N(0, I)               in pairs g, -g
sobol          N(0, I)               evenly spread (quasi-Monte Carlo)
hadamard       N(0, I) nearly        orthogonal, applied in :math:`O(d \log d)`
rademacher     signs, not Gaussian   independent
=============  ====================  =================================================

A feature map stores what :func:`params` returns and multiplies by it with
:func:`apply`; :func:`draw` and :func:`matrix` give the dense matrix.

All randomness comes from :func:`random_bits`, a counter-based generator pinned here
(Threefry-2x32, 20 rounds; Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011). ``jax.random`` promises only its distributions from one version to the
next; a stored adapter that names a key must find the same projection years later.
The bits are the same everywhere; the floats made of them agree to rounding.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from snnk_jax.typing import Array, Dtype, Float, Int, PRNGKeyArray, UInt32

GENERATOR = "threefry2x32-20/box-muller/1"
"""Names the generator in stored files; changes whenever its output would."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def key_words(key: PRNGKeyArray) -> UInt32[Array, "2"]:
    """Returns the two 32-bit words of a Threefry key.

    Args:
      key: a typed key of ``jax.random.key`` with the default implementation.

    Raises:
      ValueError: for keys of another implementation.

    Example:
      >>> import jax
      >>> from snnk_jax import projections
      >>> projections.key_words(jax.random.key(7))
      Array([0, 7], dtype=uint32)
    """
    words = jax.random.key_data(key)
    if words.shape != (2,):
        raise ValueError(
            "key must be a single threefry2x32 key. "
            f"Got key data of shape {words.shape}."
        )
    return words


@functools.partial(jax.jit, static_argnames="count")
def random_bits(words: UInt32[Array, "2"], count: int) -> UInt32[Array, "2 count"]:
    """Threefry-2x32-20 of the counters ``(i, 0)``, ``i = 0 .. count - 1``.

    Args:
      words: the two words of the key.
      count: number of counters; each gives two words.

    Example:
      >>> import jax.numpy as jnp
      >>> from snnk_jax import projections
      >>> words = projections.random_bits(jnp.zeros(2, "uint32"), 1)
      >>> [hex(int(word)) for word in words[:, 0]]
      ['0x6b200159', '0x99ba4efe']
    """
    counter = jnp.arange(count, dtype=jnp.uint32)
    return _threefry(words, counter, jnp.zeros(count, jnp.uint32))


@functools.partial(jax.jit, static_argnames="count")
def streams(words: UInt32[Array, "2"], count: int) -> UInt32[Array, "count 2"]:
    """Words of ``count`` further keys, for parts that must be independent.

    They are Threefry of the counters ``(i, 1)``, which :func:`random_bits` never uses.

    Example:
      >>> import jax
      >>> from snnk_jax import projections
      >>> projections.streams(projections.key_words(jax.random.key(7)), 3).shape
      (3, 2)
    """
    counter = jnp.arange(count, dtype=jnp.uint32)
    return _threefry(words, counter, jnp.ones(count, jnp.uint32)).T


def _threefry(
    words: UInt32[Array, "2"], x0: UInt32[Array, " n"], x1: UInt32[Array, " n"]
) -> UInt32[Array, "2 n"]:
    """Threefry-2x32-20 of the counters ``(x0, x1)``."""
    parity = words[0] ^ words[1] ^ jnp.uint32(0x1BD11BDA)
    schedule = (words[0], words[1], parity)
    x0 = x0 + schedule[0]
    x1 = x1 + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return jnp.stack([x0, x1])


def uniforms(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Uniform float32 numbers in (0, 1], of the first 24 bits of each word."""
    return ((bits >> jnp.uint32(8)).astype(jnp.float32) + 0.5) * 2.0**-24


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normals(
    words: UInt32[Array, "2"], shape: tuple[int, ...], dtype: Dtype = jnp.float32
) -> Float[Array, "..."]:
    """Standard normals of the pinned generator, by the Box-Muller transform.

    They are computed in float32 from 24 bits each (the largest is 5.9) and then cast.
    """
    size = math.prod(shape)
    bits = random_bits(words, (size + 1) // 2)
    uniform = uniforms(bits)
    radius = jnp.sqrt(-2.0 * jnp.log(uniform[0]))
    angle = (2.0 * jnp.pi) * uniform[1]
    pair = jnp.concatenate([radius * jnp.cos(angle), radius * jnp.sin(angle)])
    return pair[:size].reshape(shape).astype(dtype)


def integers(words: UInt32[Array, "2"], limits: np.ndarray) -> Int[Array, "..."]:
    """Independent uniform integers below ``limits``, in its shape.

    The remainders of 32-bit words: uniform for powers of two, and for other limits up
    to a relative ``limit / 2**32``.
    """
    bits = random_bits(words, (limits.size + 1) // 2)
    bits = bits.ravel()[: limits.size].reshape(limits.shape)
    return (bits % jnp.asarray(limits, jnp.uint32)).astype(jnp.int32)


def _signs(
    words: UInt32[Array, "2"], shape: tuple[int, ...], dtype: Dtype
) -> Float[Array, "..."]:
    """Independent signs, the top bits of the words of :func:`random_bits`."""
    size = math.prod(shape)
    bits = random_bits(words, (size + 1) // 2).ravel()[:size].reshape(shape)
    return 1 - 2 * (bits >> jnp.uint32(31)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("num", "dim", "dtype"))
def gaussian(
    key: PRNGKeyArray, num: int, dim: int, dtype: Dtype = jnp.float32
) -> Float[Array, "num dim"]:
    """Independent rows :math:`N(0, I_d)`.

    Example:
      >>> import jax
      >>> from snnk_jax import projections
      >>> projections.gaussian(jax.random.key(0), 4, 3).shape
      (4, 3)
    """
    _check_sizes(num, dim)
    return normals(key_words(key), (num, dim), dtype)


@functools.partial(jax.jit, static_argnames=("num", "dim", "dtype"))
def orthogonal(
    key: PRNGKeyArray, num: int, dim: int, dtype: Dtype = jnp.float32
) -> Float[Array, "num dim"]:
    r"""Rows :math:`N(0, I_d)` each, orthogonal within blocks of ``dim`` rows.

    A block is :math:`\mathrm{diag}(\lVert g_i\rVert)\, Q` with Q from the QR
    decomposition of a Gaussian block G, signs fixed so that Q is Haar distributed. Q
    does not depend on the lengths :math:`\lVert g_i\rVert` of the rows of G, so these
    serve as the independent :math:`\chi_d` lengths (Yu et al., "Orthogonal Random
    Features", arXiv 1610.09072).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from snnk_jax import projections
      >>> omega = projections.orthogonal(jax.random.key(0), 3, 8)
      >>> gram = omega @ omega.T
      >>> bool(jnp.allclose(gram, jnp.diag(jnp.diag(gram)), atol=1e-4))
      True
    """
    _check_sizes(num, dim)
    q, lengths = _haar(key_words(key), num, dim)
    return (q * lengths[..., None]).reshape(-1, dim)[:num].astype(dtype)


@functools.partial(jax.jit, static_argnames=("num", "dim", "dtype"))
def simplex(
    key: PRNGKeyArray, num: int, dim: int, dtype: Dtype = jnp.float32
) -> Float[Array, "num dim"]:
    r"""Rows :math:`N(0, I_d)` each, at equal obtuse angles within blocks of ``dim``.

    A block is :math:`\mathrm{diag}(\chi_d)\, S\, Q`: independent lengths, the unit
    vertices S of a regular simplex and a Haar orthogonal matrix Q. Two directions of a
    block have the cosine :math:`-1 / (d - 1)`; d of them have no wider angle (Reid et
    al., "Simplex Random Features", arXiv 2301.13856). The paper's vertices

    .. math::
      s_i = \sqrt{\tfrac{d}{d-1}}\, e_i - \tfrac{\sqrt{d} + 1}{(d-1)^{3/2}}
        (1, \dots, 1, 0), \quad i < d, \qquad
      s_d = \tfrac{1}{\sqrt{d-1}} (1, \dots, 1, 0)

    are here turned so that S is lower triangular, which Q makes equal in law: the
    first rows then need only the first rows of Q. With ``num < dim`` the rows are the
    first ones of a block. With ``dim = 1`` they are those of :func:`gaussian`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from snnk_jax import projections
      >>> omega = projections.simplex(jax.random.key(0), 5, 5)
      >>> unit = omega / jnp.linalg.norm(omega, axis=1, keepdims=True)
      >>> round(float(unit[0] @ unit[3]), 3)
      -0.25
    """
    _check_sizes(num, dim)
    if dim == 1:
        return gaussian(key, num, dim, dtype)
    q, lengths = _haar(key_words(key), num, dim)
    rows = q.shape[1]
    left = dim - np.arange(rows)  # vertices that column j still has to balance
    diagonal = np.sqrt(dim * (left - 1) / ((dim - 1) * left))
    below = diagonal / np.maximum(left - 1, 1)
    vertices = np.diag(diagonal) - np.tril(np.ones((rows, rows)), -1) * below
    scaled = lengths[..., None] * jnp.asarray(vertices, q.dtype)[None]
    block = jnp.matmul(scaled, q, precision="highest")
    return block.reshape(-1, dim)[:num].astype(dtype)


def _haar(
    words: UInt32[Array, "2"], num: int, dim: int
) -> tuple[Float[Array, "blocks rows dim"], Float[Array, "blocks rows"]]:
    r"""First rows of Haar orthogonal matrices and independent :math:`\chi_d` lengths.

    See :func:`orthogonal`.
    """
    blocks = -(-num // dim)
    rows = min(num, dim)
    g = normals(words, (blocks, dim, rows))
    q, r = jnp.linalg.qr(g)
    signs = jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))
    lengths = jnp.linalg.norm(g, axis=-2)
    return jnp.swapaxes(q * signs[:, None, :], -1, -2), lengths


@functools.partial(jax.jit, static_argnames=("num", "dim", "dtype"))
def antithetic(
    key: PRNGKeyArray, num: int, dim: int, dtype: Dtype = jnp.float32
) -> Float[Array, "num dim"]:
    """Independent rows :math:`N(0, I_d)`, each followed by its negative.

    Rows ``2 i`` and ``2 i + 1`` are a pair; with an odd ``num`` the last row has no
    partner. Averages of odd functions vanish.

    Example:
      >>> import jax
      >>> from snnk_jax import projections
      >>> omega = projections.antithetic(jax.random.key(0), 4, 3)
      >>> bool((omega[1::2] == -omega[::2]).all())
      True
    """
    _check_sizes(num, dim)
    half = normals(key_words(key), ((num + 1) // 2, dim), dtype)
    return jnp.stack([half, -half], axis=1).reshape(-1, dim)[:num]


def sobol(
    key: PRNGKeyArray, num: int, dim: int, dtype: Dtype = jnp.float32
) -> Float[Array, "num dim"]:
    r"""Rows :math:`N(0, I_d)` each: :math:`\Phi^{-1}` of randomly shifted Sobol points.

    The first 23 bits of coordinate j of all points (those of SciPy, with the direction
    numbers of Joe and Kuo) are XORed with one random word :math:`s_j`: a digital shift,
    which makes each point uniform and keeps the points evenly spread (L'Ecuyer and
    Lemieux, "Recent Advances in Randomized Quasi-Monte Carlo Methods", 2002). The
    midpoints of the cells go through the inverse normal distribution function: the
    largest entry is 5.3. Any ``num`` is allowed, powers of two are spread best.

    Raises:
      ValueError: for ``dim`` above 21201, where the direction numbers end.

    Example:
      >>> import jax
      >>> from snnk_jax import projections
      >>> omega = projections.sobol(jax.random.key(0), 8, 3)
      >>> (omega > 0).sum(axis=0)
      Array([4, 4, 4], dtype=int32)
    """
    from scipy.stats import qmc  # slow to import

    _check_sizes(num, dim)
    if dim > qmc.Sobol.MAXDIM:
        raise ValueError(f"dim must be at most {qmc.Sobol.MAXDIM}. Got {dim}.")
    # A power of two of them, or SciPy warns. They do not depend on the key.
    points = qmc.Sobol(dim, scramble=False).random_base2((num - 1).bit_length())
    cells = (points[:num] * 2**23).astype(np.uint32)
    return _shifted(jnp.asarray(cells), key_words(key)).astype(dtype)


@jax.jit
def _shifted(
    cells: UInt32[Array, "num dim"], words: UInt32[Array, "2"]
) -> Float[Array, "num dim"]:
    """Normal numbers of Sobol points under a random digital shift."""
    dim = cells.shape[1]
    shift = random_bits(words, (dim + 1) // 2).ravel()[:dim]
    cells = cells ^ (shift >> jnp.uint32(9))[None]
    # 23 bits and the half fill float32's mantissa: no midpoint rounds to 1.
    return ndtri((cells.astype(jnp.float32) + 0.5) * 2.0**-23)


def hadamard(
    key: PRNGKeyArray, num: int, dim: int, dtype: Dtype = jnp.float32
) -> Float[Array, "num dim"]:
    r"""Rows of :math:`H D_3 H D_2 H D_1` with random signs and lengths, densely.

    With p the next power of two :math:`\ge d`, the Walsh-Hadamard matrix H of size p
    and diagonal matrices :math:`D_i` of independent signs, a block of p rows is

    .. math::
      \mathrm{diag}(\chi_p)\, p^{-3/2} H D_3 H D_2 H D_1

    with independent lengths :math:`\chi_p`, cut to its first d columns (Yu et al.,
    "Orthogonal Random Features", arXiv 1610.09072; Choromanski et al., "The
    Unreasonable Effectiveness of Structured Random Orthogonal Embeddings", arXiv
    1703.00864). Within a block the rows are orthogonal if d = p.

    Mean and covariance of a row are exactly 0 and :math:`I_d`, its law is only close
    to normal: what is unbiased with Gaussian rows has a bias that falls with d and is
    largest for sparse inputs. Measured for :math:`E \cos(g^\top v)` with
    :math:`\lVert v\rVert = 2`: up to 0.14 for d = 4, 0.0044 for d = 16, and below the
    error of the measurement, 0.0004, for d = 64.

    :func:`params` and :func:`apply` never build this matrix.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from snnk_jax import projections
      >>> omega = projections.hadamard(jax.random.key(0), 3, 8)
      >>> gram = omega @ omega.T
      >>> bool(jnp.allclose(gram, jnp.diag(jnp.diag(gram)), atol=1e-4))
      True
    """
    return matrix(_hadamard_params(key, num, dim, jnp.float32)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("num", "dim", "dtype"))
def _hadamard_params(
    key: PRNGKeyArray, num: int, dim: int, dtype: Dtype
) -> dict[str, Array]:
    _check_sizes(num, dim)
    p = power_of_two(dim)
    sign_words, length_words = streams(key_words(key), 2)
    signs = _signs(sign_words, (-(-num // p), 3, p), dtype)
    lengths = jnp.linalg.norm(normals(length_words, (num, p)), axis=-1)
    return {
        "input_signs": signs[:, 0, :dim],
        "signs": signs[:, 1:],
        "lengths": (p**-1.5 * lengths).astype(dtype),
    }


@functools.partial(jax.jit, static_argnames=("num", "dim", "dtype"))
def rademacher(
    key: PRNGKeyArray, num: int, dim: int, dtype: Dtype = jnp.float32
) -> Float[Array, "num dim"]:
    r"""Independent entries :math:`\pm 1`: covariance :math:`I_d`, but not Gaussian.

    For sketches of polynomials, which need only second moments and have a lower
    variance than with Gaussian rows (Wacker et al., "Improved Random Features for Dot
    Product Kernels", arXiv 2201.08712).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from snnk_jax import projections
      >>> jnp.unique(projections.rademacher(jax.random.key(0), 4, 3))
      Array([-1.,  1.], dtype=float32)
    """
    _check_sizes(num, dim)
    return _signs(key_words(key), (num, dim), dtype)


_PROJECTIONS: dict[str, Callable[..., Float[Array, "num dim"]]] = {
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "simplex": simplex,
    "antithetic": antithetic,
    "sobol": sobol,
    "hadamard": hadamard,
    "rademacher": rademacher,
}


def names() -> tuple[str, ...]:
    """Names that :func:`draw` knows.

    Example:
      >>> from snnk_jax import projections
      >>> projections.names()
      ('gaussian', 'orthogonal', 'simplex', 'antithetic', 'sobol', 'hadamard',
       'rademacher')
    """
    return tuple(_PROJECTIONS)


def gaussian_names() -> tuple[str, ...]:
    """Names whose rows are :math:`N(0, I_d)`, exactly or (hadamard) nearly.

    Example:
      >>> from snnk_jax import projections
      >>> set(projections.names()) - set(projections.gaussian_names())
      {'rademacher'}
    """
    return tuple(name for name in _PROJECTIONS if name != "rademacher")


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` is one of :func:`names`."""
    if name not in _PROJECTIONS:
        raise ValueError(
            f"projection must be one of {', '.join(_PROJECTIONS)}. Got {name!r}."
        )


def draw(
    name: str, key: PRNGKeyArray, num: int, dim: int, dtype: Dtype = jnp.float32
) -> Float[Array, "num dim"]:
    """Draws the projection called ``name`` as a dense matrix.

    Raises:
      ValueError: for an unknown name or sizes below 1.

    Example:
      >>> import jax
      >>> from snnk_jax import projections
      >>> projections.draw("orthogonal", jax.random.key(0), 16, 8).shape
      (16, 8)
    """
    check_name(name)
    return _PROJECTIONS[name](key, num, dim, dtype)


def params(
    name: str, key: PRNGKeyArray, num: int, dim: int, dtype: Dtype = jnp.float32
) -> dict[str, Array]:
    r"""Draws what :func:`apply` needs of the projection called ``name``.

    ``{"omega": [num, dim]}``, except for ``"hadamard"``: ``{"input_signs": [blocks,
    dim], "signs": [blocks, 2, p], "lengths": [num]}``, with the diagonals of
    :math:`D_1` (p - dim of its signs would meet zeros) and :math:`D_2, D_3`, and
    :math:`p^{-3/2} \chi_p`.

    Raises:
      ValueError: for an unknown name or sizes below 1.

    Example:
      >>> import jax
      >>> from snnk_jax import projections
      >>> params = projections.params("hadamard", jax.random.key(0), 10, 6)
      >>> {name: value.shape for name, value in params.items()}
      {'input_signs': (2, 6), 'lengths': (10,), 'signs': (2, 2, 8)}
    """
    check_name(name)
    if name == "hadamard":
        return _hadamard_params(key, num, dim, dtype)
    return {"omega": draw(name, key, num, dim, dtype)}


def apply(
    params: dict[str, Array],
    x: Float[Array, "*b d"],
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*b num"]:
    r"""Computes :math:`x \Omega^\top`, accumulated in float32 or better.

    Args:
      params: what :func:`params` returned.
      x: inputs of any floating dtype.
      precision: of the matrix products, as for ``jax.lax.dot``.

    Returns:
      The products, not rounded back to a dtype narrower than float32.

    Raises:
      ValueError: for inputs of another width, or not of a real floating dtype.

    Example:
      >>> import jax
      >>> from snnk_jax import projections
      >>> params = projections.params("hadamard", jax.random.key(0), 10, 6)
      >>> projections.apply(params, jax.numpy.ones((5, 6))).shape
      (5, 10)
    """
    dense = "omega" in params
    width = params["omega" if dense else "input_signs"].shape[1]
    check_inputs(x, width)
    dtype = accumulation_dtype(x.dtype)
    if dense:
        omega = params["omega"].T.astype(x.dtype)
        return jnp.matmul(x, omega, precision=precision, preferred_element_type=dtype)

    def scale(y, factors):
        return y * jnp.broadcast_to(factors.astype(dtype), y.shape)

    blocks, _, p = params["signs"].shape
    y = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], blocks, width))
    y = scale(y.astype(dtype), params["input_signs"])
    y = jnp.pad(y, [(0, 0)] * x.ndim + [(0, p - width)])
    for i in range(2):
        y = scale(walsh_hadamard(y, precision), params["signs"][:, i])
    y = walsh_hadamard(y, precision).reshape(*x.shape[:-1], blocks * p)
    lengths = params["lengths"]
    return scale(y[..., : len(lengths)], lengths)


def matrix(params: dict[str, Array]) -> Float[Array, "num d"]:
    """The dense matrix that :func:`apply` multiplies by, in the dtype of ``params``.

    Example:
      >>> import jax
      >>> from snnk_jax import projections
      >>> params = projections.params("hadamard", jax.random.key(0), 10, 6)
      >>> projections.matrix(params).shape
      (10, 6)
    """
    if "omega" in params:
        return params["omega"]
    dtype = params["lengths"].dtype
    identity = jnp.eye(params["input_signs"].shape[1], dtype=dtype)
    return apply(params, identity, "highest").T.astype(dtype)


def walsh_hadamard(
    x: Float[Array, "*b n"], precision: jax.lax.PrecisionLike = None
) -> Float[Array, "*b n"]:
    r"""Unnormalised fast Walsh-Hadamard transform along the last axis.

    Computes :math:`x H_n` in :math:`O(n \log n)` with :math:`H_1 = 1` and Sylvester's
    :math:`H_{2n} = [[H_n, H_n], [H_n, -H_n]]`, so that twice is n times the identity.
    Sums are accumulated in float32 or better and returned in the dtype of ``x``.

    Args:
      x: n values, a power of two, along the last axis.
      precision: of the matrix products, as for ``jax.lax.dot``.

    Raises:
      ValueError: for other lengths, or inputs not of a real floating dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from snnk_jax import projections
      >>> projections.walsh_hadamard(jnp.array([1.0, 2.0, 3.0, 4.0]))
      Array([10., -2., -4.,  0.], dtype=float32)
    """
    n = x.shape[-1] if x.ndim else 0
    if n < 1 or n & (n - 1):
        raise ValueError(
            f"inputs must have a power of two as width. Got shape {x.shape}."
        )
    _check_floating(x)
    y = x.astype(accumulation_dtype(x.dtype))
    left = n
    while left > 1:
        # H_n is a Kronecker product of factors of size 64 and less, one per digit of
        # the index. Each pass transforms the first digit and moves it to the end, a
        # plain matrix product; after all passes the digits are in order again.
        radix = min(left, _RADIX)
        y = y.reshape(*x.shape[:-1], radix, n // radix)
        factor = jnp.asarray(_sylvester(radix), y.dtype)
        y = jnp.einsum("...rk,rs->...ks", y, factor, precision=precision)
        left //= radix
    return y.reshape(x.shape).astype(x.dtype)


_RADIX = 64  # two passes up to 4096; on a CPU no slower than 16, 32 or 128


def _sylvester(n: int) -> np.ndarray:
    """The Walsh-Hadamard matrix of size n, a power of two."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def cyclic_convolution(factors: Sequence[Float[Array, "*b n"]]) -> Float[Array, "*b n"]:
    """Cyclic convolution of the factors along the last axis, by the FFT."""
    if len(factors) == 1:
        return factors[0]
    product = functools.reduce(operator.mul, map(jnp.fft.rfft, factors))
    return jnp.fft.irfft(product, n=factors[0].shape[-1])


def accumulation_dtype(dtype: Dtype) -> Dtype:
    """float32 for narrower types, the type itself otherwise."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def power_of_two(num: int) -> int:
    """The least power of two that is not below ``num``."""
    return 1 << (num - 1).bit_length()


def check_inputs(x: Array, width: int) -> None:
    """Raises ValueError unless ``x`` is real floating point and of the width."""
    if x.shape[-1:] != (width,):
        raise ValueError(f"inputs must have width {width}. Got shape {x.shape}.")
    _check_floating(x)


def _check_floating(x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"inputs must be real floating point. Got {x.dtype}.")


def _check_sizes(num: int, dim: int) -> None:
    if num < 1 or dim < 1:
        raise ValueError(f"num and dim must be at least 1. Got {num} and {dim}.")
