"""Sketches of polynomial kernels."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax import activations, kernels, projections
from snnk_jax.features._base import (
    FeatureMap,
    accumulation_dtype,
    compiled,
    share_out,
)
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray

Sketch = Literal["maclaurin", "tensor_sketch", "tensor_srht"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial(FeatureMap):
    r"""Features of :math:`f(w^\top x + b)` for a polynomial f.

    The Taylor expansion around the bias splits by degree,

    .. math::
      f(w^\top x + b) = \sum_{j=0}^{D} \frac{f^{(j)}(b)}{j!} (w^\top x)^j, \qquad
      E[S_j(x) \cdot S_j(w)] = (w^\top x)^j,

    so that :math:`\Phi` holds one and the sketches :math:`S_j(x)`, :math:`\Psi` holds
    f(b) and :math:`S_j(w) f^{(j)}(b) / j!`. Coefficients of either sign and the bias
    need no columns of their own, and degree 0 is exact.

    A column of the sketch of degree j is a product of j factors:

    * ``"maclaurin"``: :math:`\prod_{l \le j} g_l^\top x / \sqrt{m_j}` with independent
      random signs :math:`g_l`; :math:`O(d \sum_j j m_j)` an example.
    * ``"tensor_srht"``: the :math:`g_l` are random rows of :math:`H D_l`, with the
      Walsh-Hadamard matrix H of size p, the next power of two :math:`\ge d`, and
      random signs :math:`D_l`, the same for all degrees: :math:`O(D\, p \log p +
      \sum_j j m_j)`. Any two columns are uncorrelated, since :math:`(H D_l x) \cdot
      (H D_l w) = p\, x^\top w` whatever the signs.
    * ``"tensor_sketch"``: the count sketch of the j-fold tensor product, as the cyclic
      convolution of count sketches of x: :math:`O(\sum_j j (d + m_j \log m_j))`.

    With :math:`t = (x^\top w)^2`, :math:`s = \sum_i x_i^2 w_i^2`, :math:`a = \lVert
    x\rVert^2 \lVert w\rVert^2 - s` and :math:`c = t - s` the sketch of degree j has
    the variance :math:`[(t + a + c)^j - t^j] / m_j`, for ``"tensor_sketch"``

    .. math::
      \frac{(t + a)^j + (t + c)^j - 2 t^j}{m_j} + \frac{\gcd(2, m_j)}{m_j^2}
        \left[(t + a + c)^j - (t + a)^j - (t + c)^j + t^j\right];

    both are at most :math:`(3^j - 1) \lVert x\rVert^{2j} \lVert w\rVert^{2j} / m_j`.
    Sketches of different degrees are uncorrelated, so that :meth:`variance` is exact.

    Args:
      coefficients: :math:`c_0, \dots, c_D` of f, lowest degree first; kept as a tuple
        without zeros at the end.
      num_features: m, at least D + 1; see :attr:`columns`.
      sketch: one of the three above.
      kappa: typical :math:`\lVert x\rVert \lVert w\rVert`, for the allocation.
      bias_scale: typical :math:`|b|`, for the allocation. With zero, the default,
        degrees that only a bias brings in get one column each.
      projection: has no meaning here and must be left alone.

    Parameters: ``omega [k, d]`` with k the sum of :math:`j m_j`; or ``signs [D, d]``
    and the integers ``rows [k]`` into the stacked :math:`H D_l x`; or ``signs`` and the
    integers ``buckets``, both ``[D (D + 1) / 2, d]``.

    Raises:
      ValueError: for a constant f, too few features and fields out of range.

    References:
      Kar and Karnick, "Random Feature Maps for Dot Product Kernels", arXiv 1201.6530;
      Pham and Pagh, "Fast and Scalable Polynomial Kernels via Explicit Feature Maps",
      KDD 2013; Ahle et al., "Oblivious Sketching of High-Degree Polynomial Kernels",
      arXiv 1909.01410 (TensorSRHT).

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> fm = snnk.features.Polynomial(coefficients=(0.5, -1.0, 2.0), num_features=64)
      >>> params = fm.init(jax.random.key(0), 6)
      >>> fm.phi(params, jax.numpy.ones((5, 6))).shape
      (5, 64)
    """

    coefficients: Sequence[float]
    sketch: Sketch = "tensor_srht"
    kappa: float = 1.0
    bias_scale: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        coefficients = [float(c) for c in self.coefficients]
        while coefficients and coefficients[-1] == 0:
            coefficients.pop()
        # Any sequence will do, as the list that a file holds; only a tuple hashes.
        object.__setattr__(self, "coefficients", tuple(coefficients))
        if not all(map(math.isfinite, coefficients)) or not any(coefficients[1:]):
            raise ValueError(
                "coefficients must be finite, one of degree 1 or more not zero. "
                f"Got {tuple(coefficients)}."
            )
        if self.sketch not in ("maclaurin", "tensor_sketch", "tensor_srht"):
            raise ValueError(
                "sketch must be 'maclaurin', 'tensor_sketch' or 'tensor_srht'. "
                f"Got {self.sketch!r}."
            )
        if not 0 < self.kappa < math.inf:
            raise ValueError(f"kappa must be positive and finite. Got {self.kappa}.")
        if not 0 <= self.bias_scale < math.inf:
            raise ValueError(
                f"bias_scale must be at least 0 and finite. Got {self.bias_scale}."
            )
        if self.projection != FeatureMap.projection:
            raise ValueError(
                "projection must be left alone for Polynomial, whose directions the "
                f"sketch decides on. Got {self.projection!r}."
            )
        if self.num_features <= self.degree:
            raise ValueError(
                f"num_features must be at least {self.degree + 1} for degree "
                f"{self.degree}: a column for each. Got {self.num_features}."
            )

    @property
    def degree(self) -> int:
        """D."""
        return len(self.coefficients) - 1

    @property
    def columns(self) -> tuple[int, ...]:
        r"""How many columns each degree has, ``(1, m_1, ..., m_D)``.

        One for degree 0 and at least one for each other; the rest in proportion to
        :math:`\kappa^j \sum_{i \ge j} \binom{i}{j} |c_i| \beta^{i - j}` with
        :math:`\beta` the ``bias_scale``: by the deviation of a column, which makes the
        variance least.

        Example:
          >>> import snnk_jax as snnk
          >>> cubic = (1.0, -1.0, 0.0, 3.0)
          >>> fm = snnk.features.Polynomial(coefficients=cubic, num_features=24)
          >>> fm.columns
          (1, 6, 1, 16)
        """
        sizes = _derivatives(tuple(map(abs, self.coefficients)))
        values = [float(np.polyval(row[::-1], self.bias_scale)) for row in sizes[1:]]
        # Powers of kappa leave the range of numbers long before their ratios matter.
        logs = np.array(
            [
                j * math.log(self.kappa) + (math.log(v) if v else -math.inf)
                for j, v in enumerate(values, 1)
            ]
        )
        return 1, *share_out(self.num_features - 1, np.exp(logs - logs.max()))

    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws the sketches; see :class:`FeatureMap`."""
        sizes = self._factor_sizes
        if self.sketch == "maclaurin":
            return {"omega": projections.rademacher(key, sum(sizes), dim, dtype)}
        sign_words, word = projections.streams(projections.key_words(key), 2)
        sign_key = jax.random.wrap_key_data(sign_words, impl="threefry2x32")
        if self.sketch == "tensor_srht":
            signs = projections.rademacher(sign_key, self.degree, dim, dtype)
            width = projections.power_of_two(dim)
            factor = [f for j in range(1, self.degree + 1) for f in range(j)]
            start = np.repeat(np.array(factor, np.int32) * width, sizes)
            rows = start + projections.integers(word, np.full_like(start, width))
            return {"signs": signs, "rows": rows}
        signs = projections.rademacher(sign_key, len(sizes), dim, dtype)
        size = np.repeat(np.array(sizes, np.int32)[:, None], dim, axis=1)
        start = np.cumsum(size, axis=0, dtype=np.int32) - size
        return {"signs": signs, "buckets": start + projections.integers(word, size)}

    @compiled
    def phi(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Maps inputs to features."""
        blocks = self._sketches(params, x)
        one = jnp.ones((*x.shape[:-1], 1), blocks[0].dtype)
        return jnp.concatenate([one, *blocks], axis=-1).astype(x.dtype)

    @compiled
    def psi(
        self,
        params: Params,
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "m o"]:
        """Maps weights and biases to the readout."""
        sketches = self._sketches(params, kernel.T)
        kernels.check_layer(kernel.T, kernel, bias)
        constant, *slopes = self._taylor(kernel, bias)
        blocks = [
            slope[None, :] * sketch.T
            for slope, sketch in zip(slopes, sketches, strict=True)
        ]
        return jnp.concatenate([constant[None, :], *blocks]).astype(kernel.dtype)

    def exact(
        self,
        x: Float[Array, "*b d"],
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "*b o"]:
        """The polynomial of the layer."""
        return kernels.polynomial(self.coefficients, x, kernel, bias)

    def variance(
        self,
        x: Float[Array, "*b d"],
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "*b o"]:
        """The variance of ``phi(x) @ psi(kernel, bias)`` over keys, by the formula.

        Example:
          >>> import jax.numpy as jnp
          >>> import snnk_jax as snnk
          >>> fm = snnk.features.Polynomial(coefficients=(0.0, 1.0), num_features=11)
          >>> fm.variance(jnp.array([3.0, 4.0]), jnp.array([[2.0], [1.0]]))
          Array([12.1], dtype=float32)
        """
        kernels.check_layer(x, kernel, bias)
        product = functools.partial(jnp.matmul, precision="highest")
        x_square, w_square = x * x, kernel * kernel
        t = product(x, kernel) ** 2
        s = product(x_square, w_square)
        norms = product(
            jnp.sum(x_square, axis=-1, keepdims=True),
            jnp.sum(w_square, axis=0, keepdims=True),
        )
        a, c = norms - s, t - s
        total = jnp.zeros_like(t)
        slopes = self._taylor(kernel, bias)[1:]
        for j, (m, slope) in enumerate(zip(self.columns[1:], slopes, strict=True), 1):
            both = (t + a + c) ** j
            one = (t + a) ** j + (t + c) ** j
            if self.sketch == "tensor_sketch":
                term = (one - 2 * t**j) / m
                term = term + math.gcd(2, m) / m**2 * (both - one + t**j)
            else:
                term = (both - t**j) / m
            slope = slope.reshape((1,) * (t.ndim - 1) + slope.shape)
            total = total + slope**2 * term
        return total

    @property
    def _factor_sizes(self) -> list[int]:
        """The columns of each factor, those of degree 1 first."""
        return [m for j, m in enumerate(self.columns) for _ in range(j)]

    def _sketches(self, params: Params, x: Array) -> list[Array]:
        """The blocks of degrees 1 to D, in the accumulation dtype."""
        edges = np.cumsum(self._factor_sizes)[:-1]
        factors = iter(jnp.split(self._factors(params, x), edges, axis=-1))
        blocks = []
        for j, m in enumerate(self.columns[1:], 1):
            group = list(itertools.islice(factors, j))
            if self.sketch == "tensor_sketch":
                blocks.append(projections.cyclic_convolution(group))
            else:
                blocks.append(m**-0.5 * functools.reduce(operator.mul, group))
        return blocks

    def _factors(self, params: Params, x: Array) -> Array:
        """All factors of all columns, side by side."""
        if self.sketch == "maclaurin":
            return self.project(params, x)
        signs = params["signs"]
        width = signs.shape[-1]
        projections.check_inputs(x, width)
        wide = accumulation_dtype(x.dtype)
        signs = signs.reshape((1,) * (x.ndim - 1) + signs.shape).astype(wide)
        y = x[..., None, :].astype(wide) * signs
        if self.sketch == "tensor_srht":
            padding = projections.power_of_two(width) - width
            y = jnp.pad(y, [(0, 0)] * x.ndim + [(0, padding)])
            y = projections.walsh_hadamard(y, self.precision)
            y = y.reshape(*x.shape[:-1], y.shape[-2] * y.shape[-1])
            return jnp.take(y, params["rows"], axis=-1)
        # Examples last: sums of whole rows, twice as fast as a product with a one-hot
        # matrix and exact at any precision.
        y = y.reshape(*x.shape[:-1], y.shape[-2] * y.shape[-1])
        y = jnp.moveaxis(y, -1, 0)
        total = sum(self._factor_sizes)
        y = jax.ops.segment_sum(y, params["buckets"].ravel(), num_segments=total)
        return jnp.moveaxis(y, 0, -1)

    def _taylor(self, kernel: Array, bias: Array | None) -> list[Array]:
        """The Taylor coefficients of f at the biases, ``D + 1`` times ``[o]``."""
        wide = accumulation_dtype(kernel.dtype)
        shift = jnp.zeros(kernel.shape[1], wide) if bias is None else bias.astype(wide)
        return [
            activations.horner(shift, *row) for row in _derivatives(self.coefficients)
        ]


def _derivatives(coefficients: Sequence[float]) -> list[list[float]]:
    """Coefficients of the j-th derivatives over j!."""
    return [
        [math.comb(i, j) * c for i, c in enumerate(coefficients) if i >= j]
        for j in range(len(coefficients))
    ]
