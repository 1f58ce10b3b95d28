r"""Random projections :math:`\Omega \in R^{m \times d}` with :math:`N(0, I_d)` rows.

All randomness comes from :func:`random_bits`, a counter-based generator pinned here
(Threefry-2x32, 20 rounds; Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011). ``jax.random`` promises only its distributions from one version to the
next; a stored adapter that names a key must find the same projection years later.
The bits are the same everywhere; the floats made of them agree to rounding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from snnk_jax.typing import Array, Dtype, Float, PRNGKeyArray, UInt32

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
    parity = words[0] ^ words[1] ^ jnp.uint32(0x1BD11BDA)
    schedule = (words[0], words[1], parity)
    x0 = jnp.arange(count, dtype=jnp.uint32) + schedule[0]
    x1 = jnp.zeros(count, jnp.uint32) + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return jnp.stack([x0, x1])


def normals(
    words: UInt32[Array, "2"], shape: tuple[int, ...], dtype: Dtype = jnp.float32
) -> Float[Array, "..."]:
    """Standard normals of the pinned generator, by the Box-Muller transform.

    They are computed in float32 from 24 bits each (the largest is 5.9) and then cast.
    """
    size = 1
    for length in shape:
        size *= length
    bits = random_bits(words, (size + 1) // 2)
    uniform = ((bits >> jnp.uint32(8)).astype(jnp.float32) + 0.5) * 2.0**-24
    radius = jnp.sqrt(-2.0 * jnp.log(uniform[0]))
    angle = (2.0 * jnp.pi) * uniform[1]
    pair = jnp.concatenate([radius * jnp.cos(angle), radius * jnp.sin(angle)])
    return pair[:size].reshape(shape).astype(dtype)


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
    blocks = -(-num // dim)
    rows = min(num, dim)
    g = normals(key_words(key), (blocks, dim, rows))
    q, r = jnp.linalg.qr(g)
    signs = jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))
    lengths = jnp.linalg.norm(g, axis=-2)
    block = jnp.swapaxes(q * (signs * lengths)[:, None, :], -1, -2)
    return block.reshape(blocks * rows, dim)[:num].astype(dtype)


_PROJECTIONS: dict[str, Callable[..., Float[Array, "num dim"]]] = {
    "gaussian": gaussian,
    "orthogonal": orthogonal,
}


def names() -> tuple[str, ...]:
    """Names that :func:`draw` knows.

    Example:
      >>> from snnk_jax import projections
      >>> projections.names()
      ('gaussian', 'orthogonal')
    """
    return tuple(_PROJECTIONS)


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` is one of :func:`names`."""
    if name not in _PROJECTIONS:
        raise ValueError(
            f"projection must be one of {', '.join(_PROJECTIONS)}. Got {name!r}."
        )


def draw(
    name: str, key: PRNGKeyArray, num: int, dim: int, dtype: Dtype = jnp.float32
) -> Float[Array, "num dim"]:
    """Draws the projection called ``name``.

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


def _check_sizes(num: int, dim: int) -> None:
    if num < 1 or dim < 1:
        raise ValueError(f"num and dim must be at least 1. Got {num} and {dim}.")
