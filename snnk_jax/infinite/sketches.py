r"""Sketches: random linear maps S of vectors and of their tensor products.

Each is unbiased for inner products, :math:`E[S x \cdot S y] = x \cdot y`, with a
variance of order 1/m in the m columns it has, and real.

===============  ==========================  =========================================
name             of                          time for one vector
===============  ==========================  =========================================
``CountSketch``  x                           O(nnz)
``OSNAP``        x                           O(s nnz)
``SRHT``         x                           O(d log d)
``TensorSRHT``   :math:`x \otimes y`         O(d log d + m)
``TensorSketch`` :math:`x^{\otimes t}`       O(t (nnz + m log m))
``PolySketch``   :math:`x^{\otimes j}`,      O(t log t m log m) for all, and the leaves
                 all j up to t
===============  ==========================  =========================================

A sketch is a frozen dataclass that hashes by value; :meth:`init` draws its parameters
and :meth:`apply` is linear in each argument and pure. Where the time is O(nnz), inputs
may be two-dimensional ``jax.experimental.sparse.BCOO`` matrices.
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from snnk_jax import projections
from snnk_jax._arguments import check_size
from snnk_jax.projections import accumulation_dtype
from snnk_jax.typing import Array, Dtype, Float, Int, Params, PRNGKeyArray, UInt32

Base = Literal["srht", "osnap", "count_sketch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sketch(abc.ABC):
    """A sketch of vectors.

    Args:
      num_features: m, the columns of the result.
    """

    num_features: int

    def __post_init__(self):
        num_features = check_size("num_features", self.num_features)
        object.__setattr__(self, "num_features", num_features)

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws the parameters for vectors of width ``dim``."""

    @abc.abstractmethod
    def apply(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Sketches vectors along the last axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OSNAP(Sketch):
    r"""Each coordinate goes, with a random sign, to one bucket of each of s blocks.

    The m columns are shared out over s blocks, each a count sketch, over
    :math:`\sqrt s`: the variance is O(1/m) as for s = 1, the tails fall with s.

    Args:
      num_features: m, at least ``sparsity``.
      sparsity: s, buckets of a coordinate.

    Parameters: ``signs [s, d]`` and the integers ``buckets [s, d]``.

    References:
      Nelson and Nguyen, "OSNAP: Faster Numerical Linear Algebra Algorithms via Sparser
      Subspace Embeddings", arXiv 1211.1002.

    Example:
      >>> import jax
      >>> from jax.experimental import sparse
      >>> from snnk_jax.infinite import sketches
      >>> sketch = sketches.OSNAP(num_features=16)
      >>> params = sketch.init(jax.random.key(0), 100)
      >>> x = sparse.BCOO.fromdense(jax.numpy.eye(3, 100))
      >>> sketch.apply(params, x).shape
      (3, 16)
    """

    sparsity: int = 4

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.sparsity <= self.num_features:
            raise ValueError(
                f"sparsity must be in [1, {self.num_features}], at most num_features. "
                f"Got {self.sparsity}."
            )

    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws signs and buckets."""
        _check_dim(dim)
        first, second = _split(key, 2)
        edges = np.linspace(0, self.num_features, self.sparsity + 1).astype(np.int32)
        sizes = np.repeat(np.diff(edges)[:, None], dim, axis=1)
        within = projections.integers(projections.key_words(second), sizes)
        return {
            "signs": projections.rademacher(first, self.sparsity, dim, dtype),
            "buckets": within + edges[:-1, None],
        }

    def apply(
        self, params: Params, x: Float[Array, "*b d"] | BCOO
    ) -> Float[Array, "*b m"]:
        """Sketches the rows of a dense or sparse matrix."""
        signs, buckets = params["signs"], params["buckets"]
        _check_width(x, signs.shape[-1], sparse=True)
        wide = accumulation_dtype(x.dtype)
        scale = signs.astype(wide) * self.sparsity**-0.5
        if isinstance(x, BCOO):
            row, column = x.indices.T
            # Entries beyond the matrix are padding: they get a sign of zero.
            sign = jnp.take(scale, column, axis=1, mode="fill", fill_value=0)
            into = jnp.take(buckets, column, axis=1, mode="clip")
            out = jnp.zeros((x.shape[0], self.num_features), wide)
            row = jnp.broadcast_to(row[None], into.shape)
            out = out.at[row, into].add(sign * x.data.astype(wide)[None], mode="drop")
            return out.astype(x.dtype)
        # Vectors last: sums of whole rows, twice as fast as a product with a matrix.
        y = jnp.moveaxis(x, -1, 0).astype(wide)
        y = jnp.expand_dims(scale, tuple(range(2, 1 + x.ndim))) * y[None]
        y = y.reshape(-1, *y.shape[2:])
        out = jax.ops.segment_sum(y, buckets.ravel(), num_segments=self.num_features)
        return jnp.moveaxis(out, 0, -1).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountSketch(OSNAP):
    r"""Each coordinate goes to one bucket with a random sign: OSNAP with s = 1.

    .. math:: \mathrm{Var} = \tfrac{1}{m} \left(\lVert x\rVert^2 \lVert y\rVert^2 +
      (x \cdot y)^2 - 2 \textstyle\sum_i x_i^2 y_i^2\right)

    References:
      Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", 2002.

    Example:
      >>> import jax
      >>> from snnk_jax.infinite import sketches
      >>> sketch = sketches.CountSketch(num_features=16)
      >>> params = sketch.init(jax.random.key(0), 100)
      >>> sketch.apply(params, jax.numpy.ones((3, 100))).shape
      (3, 16)
    """

    sparsity: int = dataclasses.field(default=1, init=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRHT(Sketch):
    r"""Random rows of the randomised Hadamard transform, :math:`P H D x / \sqrt m`.

    H is the Walsh-Hadamard matrix of size p, the next power of two :math:`\ge d`, D
    are random signs, P takes m of its rows without replacement; with m above p further
    blocks have signs of their own. With m a multiple of p lengths are kept exactly.

    Parameters: ``signs [blocks, d]`` and the integers ``rows [m]``.

    References:
      Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform", 2009; Tropp,
      "Improved analysis of the subsampled randomized Hadamard transform", arXiv
      1011.1595.

    Example:
      >>> import jax
      >>> from snnk_jax.infinite import sketches
      >>> sketch = sketches.SRHT(num_features=16)
      >>> params = sketch.init(jax.random.key(0), 100)
      >>> sketch.apply(params, jax.numpy.ones((3, 100))).shape
      (3, 16)
    """

    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws signs and rows."""
        _check_dim(dim)
        first, second = _split(key, 2)
        p = projections.power_of_two(dim)
        blocks = -(-self.num_features // p)
        block = np.arange(self.num_features, dtype=np.int32) // p * p
        rows = _rows(projections.key_words(second), self.num_features, p) + block
        return {
            "signs": projections.rademacher(first, blocks, dim, dtype),
            "rows": rows,
        }

    def apply(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Sketches vectors along the last axis."""
        signs = params["signs"]
        _check_width(x, signs.shape[-1])
        wide = accumulation_dtype(x.dtype)
        y = _hadamard(signs, x[..., None, :].astype(wide))
        y = jnp.take(y.reshape(*x.shape[:-1], -1), params["rows"], axis=-1)
        return (y * self.num_features**-0.5).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSketch(Sketch):
    r"""The count sketch of :math:`x^{\otimes t}`, without forming it.

    The cyclic convolution of t count sketches of x is the count sketch of the t-fold
    product whose buckets add up modulo m and whose signs multiply. Its variance is at
    most :math:`(3^t - 1) \lVert x\rVert^{2t} \lVert y\rVert^{2t} / m`: for high degrees
    see :class:`PolySketch`.

    Args:
      num_features: m.
      degree: t.

    Parameters: ``signs [t, d]`` and the integers ``buckets [t, d]``.

    References:
      Pham and Pagh, "Fast and Scalable Polynomial Kernels via Explicit Feature Maps",
      KDD 2013.

    Example:
      >>> import jax
      >>> from snnk_jax.infinite import sketches
      >>> sketch = sketches.TensorSketch(num_features=16, degree=3)
      >>> params = sketch.init(jax.random.key(0), 100)
      >>> sketch.apply(params, jax.numpy.ones((3, 100))).shape
      (3, 16)
    """

    degree: int = 2

    def __post_init__(self):
        super().__post_init__()
        _check_degree(self.degree)

    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws the count sketch of each factor."""
        parts = [self._factor.init(k, dim, dtype) for k in _split(key, self.degree)]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def apply(
        self, params: Params, x: Float[Array, "*b d"] | BCOO
    ) -> Float[Array, "*b m"]:
        """Sketches the t-fold tensor products of the rows with themselves."""
        factors = []
        for i in range(self.degree):
            own = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params)
            y = self._factor.apply(own, x)
            factors.append(y.astype(accumulation_dtype(y.dtype)))
        return projections.cyclic_convolution(factors).astype(x.dtype)

    @property
    def _factor(self) -> CountSketch:
        return CountSketch(num_features=self.num_features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSRHT:
    r"""Random entries of :math:`(H D_1 x) \otimes (H D_2 y)`, over :math:`\sqrt m`.

    Of each factor a random row of its own goes into a column, no row again before all
    have been: :math:`E[S(x \otimes y) \cdot S(x' \otimes y')] = (x \cdot x')
    (y \cdot y')`.

    Args:
      num_features: m.

    Parameters: ``signs``, a pair of ``[d_1], [d_2]``, and the integers ``rows [2, m]``.

    References:
      Ahle et al., "Oblivious Sketching of High-Degree Polynomial Kernels", arXiv
      1909.01410.

    Example:
      >>> import jax
      >>> from snnk_jax.infinite import sketches
      >>> sketch = sketches.TensorSRHT(num_features=16)
      >>> params = sketch.init(jax.random.key(0), (100, 7))
      >>> x, y = jax.numpy.ones((3, 100)), jax.numpy.ones((3, 7))
      >>> sketch.apply(params, x, y).shape
      (3, 16)
    """

    num_features: int

    def __post_init__(self):
        SRHT(num_features=self.num_features)

    def init(
        self, key: PRNGKeyArray, dims: tuple[int, int], dtype: Dtype = jnp.float32
    ) -> Params:
        """Draws signs and rows for factors of two widths."""
        for dim in dims:
            _check_dim(dim)
        first, second, *keys = _split(key, 4)
        rows = [
            _rows(projections.key_words(k), self.num_features, p)
            for k, p in zip(keys, map(projections.power_of_two, dims), strict=True)
        ]
        return {
            "signs": (
                projections.rademacher(first, 1, dims[0], dtype)[0],
                projections.rademacher(second, 1, dims[1], dtype)[0],
            ),
            "rows": jnp.stack(rows),
        }

    def apply(
        self, params: Params, x: Float[Array, "*b d1"], y: Float[Array, "*b d2"]
    ) -> Float[Array, "*b m"]:
        """Sketches the tensor products of two vectors each."""
        wide = accumulation_dtype(x.dtype)
        factors = []
        for vector, signs, rows in zip(
            (x, y), params["signs"], params["rows"], strict=True
        ):
            _check_width(vector, signs.shape[-1])
            z = _hadamard(signs, vector.astype(wide))
            factors.append(jnp.take(z, rows, axis=-1))
        product = factors[0] * factors[1] * self.num_features**-0.5
        return product.astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolySketch(Sketch):
    r"""Sketches of all powers :math:`x^{\otimes j}`, j = 1 to t, from one tree.

    The t leaves are independent sketches of x, each inner node is a
    :class:`TensorSRHT` of its children. The power j takes the first j leaves: nodes
    that are whole are shared by all powers, and the tree may have any number of
    leaves. The variance is polynomial in t, not exponential as for
    :class:`TensorSketch`.

    Dense vectors of width at most m enter as they are, filled up with zeros, so that
    the first power is exact then.

    Args:
      num_features: m, the width of every node.
      degree: t, any number from 1 on.
      base: sketch of the leaves that are wider than m or sparse: ``"srht"`` (dense
        only), ``"osnap"`` or ``"count_sketch"``.

    Parameters: ``leaves``, those of the t sketches or None, and ``nodes``.

    References:
      Ahle et al., "Oblivious Sketching of High-Degree Polynomial Kernels", arXiv
      1909.01410, whose tree has a power of two of leaves.

    Example:
      >>> import jax
      >>> from snnk_jax.infinite import sketches
      >>> sketch = sketches.PolySketch(num_features=16, degree=5)
      >>> params = sketch.init(jax.random.key(0), 100)
      >>> x = jax.numpy.ones((3, 100))
      >>> sketch.apply(params, x).shape, len(sketch.powers(params, x))
      ((3, 16), 5)
    """

    degree: int = 2
    base: Base = "srht"

    def __post_init__(self):
        super().__post_init__()
        _check_degree(self.degree)
        if self.base not in _BASES:
            raise ValueError(
                f"base must be one of {', '.join(_BASES)}. Got {self.base!r}."
            )

    def init(
        self,
        key: PRNGKeyArray,
        dim: int,
        dtype: Dtype = jnp.float32,
        *,
        sparse: bool = False,
    ) -> Params:
        """Draws the leaves and the nodes.

        Args:
          key: random key.
          dim: d.
          dtype: of the signs.
          sparse: whether inputs are sparse matrices, whose leaves are always sketched.
        """
        _check_dim(dim)
        if sparse and self.base == "srht":
            raise ValueError(
                "base must be 'osnap' or 'count_sketch' for sparse inputs. Got 'srht'."
            )
        m = self.num_features
        keys = _split(key, 2 * self.degree - 1)
        leaves = None
        if sparse or dim > m:
            leaves = tuple(self._leaf.init(k, dim, dtype) for k in keys[: self.degree])
        node = TensorSRHT(num_features=m)
        nodes = tuple(node.init(k, (m, m), dtype) for k in keys[self.degree :])
        return {"leaves": leaves, "nodes": nodes}

    def apply(
        self, params: Params, x: Float[Array, "*b d"] | BCOO
    ) -> Float[Array, "*b m"]:
        """Sketches the highest power."""
        return self.powers(params, x)[-1]

    def powers(
        self, params: Params, x: Float[Array, "*b d"] | BCOO
    ) -> tuple[Float[Array, "*b m"], ...]:
        """Sketches all powers, the first one first."""
        leaves = params["leaves"]
        if leaves is None:
            m = self.num_features
            if x.shape[-1] > m or isinstance(x, BCOO):
                raise ValueError(
                    f"inputs must be dense and at most {m} wide, as init was told. "
                    f"Got {type(x).__name__} of shape {x.shape}."
                )
            padding = [(0, 0)] * (x.ndim - 1) + [(0, m - x.shape[-1])]
            sketched = [jnp.pad(x, padding)] * self.degree
        else:
            sketched = [self._leaf.apply(leaf, x) for leaf in leaves]
        return tuple(self._prefixes(sketched, iter(params["nodes"])))

    def _prefixes(self, leaves: list[Array], nodes: Iterator[Any]) -> list[Array]:
        """The products of the first leaf, the first two, ... all of a subtree."""
        if len(leaves) == 1:
            return leaves
        own = next(nodes)
        half = (len(leaves) + 1) // 2
        left = self._prefixes(leaves[:half], nodes)
        right = self._prefixes(leaves[half:], nodes)
        node = TensorSRHT(num_features=self.num_features)
        return [*left, *(node.apply(own, left[-1], part) for part in right)]

    @property
    def _leaf(self) -> Any:
        return _BASES[self.base](num_features=self.num_features)


_BASES: dict[str, Any] = {"srht": SRHT, "osnap": OSNAP, "count_sketch": CountSketch}


def _split(key: PRNGKeyArray, num: int) -> list[PRNGKeyArray]:
    """Further keys of the pinned generator."""
    words = projections.streams(projections.key_words(key), num)
    return [jax.random.wrap_key_data(w, impl="threefry2x32") for w in words]


def _rows(words: UInt32[Array, "2"], num: int, size: int) -> Int[Array, " num"]:
    """Numbers below ``size`` in random order, each once before any comes again."""
    rounds = -(-num // size)
    bits = projections.random_bits(words, (rounds * size + 1) // 2)
    bits = bits.ravel()[: rounds * size].reshape(rounds, size)
    return jnp.argsort(bits, axis=1).ravel()[:num].astype(jnp.int32)


def _hadamard(signs: Array, x: Array) -> Array:
    """``H D x`` along the last axis, filled up to a power of two."""
    width = x.shape[-1]
    y = x * jnp.expand_dims(signs, tuple(range(x.ndim - signs.ndim))).astype(x.dtype)
    padding = projections.power_of_two(width) - width
    y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, padding)])
    return projections.walsh_hadamard(y)


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim must be at least 1. Got {dim}.")


def _check_degree(degree: int) -> None:
    if degree < 1:
        raise ValueError(f"degree must be at least 1. Got {degree}.")


def _check_width(x: Any, width: int, sparse: bool = False) -> None:
    """Raises ValueError unless the inputs are of the width and of a kind that fits."""
    if not isinstance(x, BCOO):
        return projections.check_inputs(x, width)
    if not sparse:
        raise ValueError(
            "inputs must be dense here: sketch them by OSNAP first. Got BCOO."
        )
    if x.n_batch or x.n_dense or x.shape[1:] != (width,):
        raise ValueError(
            f"sparse inputs must be matrices of width {width} without batch or dense "
            f"axes. Got shape {x.shape}, n_batch={x.n_batch} and n_dense={x.n_dense}."
        )
