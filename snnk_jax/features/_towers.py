"""What universal and exponential random features share: two exponential towers."""

import abc
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax import activations, kernels, projections
from snnk_jax.features._base import (
    FeatureMap,
    accumulation_dtype,
    compiled,
    share_out,
    squared_norm,
)
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray, UInt32

# Inputs on which shrinkage is judged; against at most a dozen factors per output.
NUM_REFERENCES = 256
# Independent words of a key: the first ones belong to the projections.
_STREAMS = 16
# What `redraw` keeps: everything that does not come from the random directions.
_CALIBRATED = (
    *("mean", "metric", "dual_metric", "stretch", "scale", "reference", "cap"),
)


@dataclasses.dataclass(frozen=True)
class Terms:
    r"""The function as :math:`c_0 + \beta z + \sum` of waves or exponentials.

    Attributes:
      constant: :math:`c_0`.
      slope: :math:`\beta`.
      rates: the :math:`s_k`, one per group of directions; empty where each direction
        draws its own.
      weights: the share of each group that :meth:`TowerFeatures.layout` hands out
        directions by, up to a common factor, as logarithms.
    """

    constant: float
    slope: float
    rates: tuple[float, ...]
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which columns of ``phi`` hold what, for inputs of one width.

    Attributes:
      exact: columns of the part that is carried exactly.
      counts: directions of each group.
      padding: columns left over, always zero.
    """

    exact: int
    counts: tuple[int, ...]
    padding: int

    @property
    def directions(self) -> int:
        return sum(self.counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerFeatures(FeatureMap):
    r"""Base of the exponential-type maps; see :class:`URF` and :class:`Exponential`.

    Both write their kernel with :math:`e^{t^\top u} = E_g[\Lambda_g(t)\Lambda_g(u)]`,
    :math:`\Lambda_g(z) = \prod_l (1 - 4A_l)^{1/4} \exp(\sum_l A_l g_l^2 +
    \sqrt{1 - 4A_l}\, g_l z_l - z_l^2 / 2)`, where t is the scaled input (times i for
    waves) and u the scaled weight, :math:`t^\top u = s\, w^\top x`.

    Args:
      scale: c, ``t = sqrt(s) c x`` and ``u = sqrt(s) w / c``; None takes
        :math:`d^{-1/4}`. The best one is :math:`c^2 = \lVert w\rVert / \lVert
        x\rVert`.
      shape: A, at most 0; it bounds the towers and pays where :math:`\kappa` reaches
        the width d.
      kappa: the product of the norms of inputs and weights that the map is made for.
      exact_degree: 0, 1 or 2 carry the constant, the linear and the quadratic part of
        f around zero exactly, by 1, ``1 + d`` or ``1 + d + d (d + 1) / 2`` of the
        columns, and subtract from both random towers their own Taylor part of this
        degree. The estimate stays unbiased, since the parts of different degree of
        the two towers are uncorrelated. Where the map estimates a series of a function
        with kinks, the parts are those of the series: at a kink f has none. With
        shrinkage each output takes the better of the two. None leaves the towers as
        they are.
      shrinkage: multiply the random part of each output, frequency by frequency, by
        the factors in [0, 1] that minimise the squared error on reference inputs:
        isotropic ones with :math:`\lVert x\rVert = \sqrt\kappa / c`, or samples, see
        :func:`snnk_jax.calibration.balance` and
        :func:`snnk_jax.calibration.set_references`; only samples of the actual inputs
        make it a promise for them. Beyond the norms of the references (a
        half more in :math:`\lVert x\rVert^2`, or their upper tenth) the random
        columns are damped by :math:`e^{-\text{excess}/2}`, so that they stay finite
        at any norm. The map is then biased, and with ``exact_degree=1`` no worse than
        the exact affine map.
    """

    scale: float | None = None
    shape: float = 0.0
    kappa: float = 1.0
    exact_degree: int | None = None
    shrinkage: bool = False

    columns_per_direction = 2

    def __post_init__(self):
        super().__post_init__()
        if self.projection not in projections.gaussian_names():
            raise ValueError(
                "projection must have Gaussian rows: "
                f"{', '.join(projections.gaussian_names())}. Got {self.projection!r}."
            )
        for name in ("scale", "kappa"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite. Got {value}.")
        if not -math.inf < self.shape <= 0:
            raise ValueError(f"shape must be at most 0 and finite. Got {self.shape}.")
        if self.exact_degree not in (None, 0, 1, 2):
            raise ValueError(
                f"exact_degree must be None, 0, 1 or 2. Got {self.exact_degree}."
            )

    @property
    @abc.abstractmethod
    def row(self) -> activations.Activation:
        """The activation f."""

    @property
    def carried(self) -> tuple[activations.Activation, ...]:
        """The functions whose Taylor part the exact columns may carry, best first."""
        return (self.row,)

    @property
    @abc.abstractmethod
    def terms(self) -> Terms:
        """How f is taken apart."""

    @abc.abstractmethod
    def _draw_rates(self, words: UInt32[Array, "2"], num: int, dtype: Dtype) -> Params:
        """Random frequencies and their weights, where the map has them."""

    @abc.abstractmethod
    def _waves(self, params: Params, layout: Layout) -> tuple[Array, Array, Array]:
        """Rate, amplitude and phase of each direction; the first may be a scalar."""

    @abc.abstractmethod
    def _input_tower(self, z: Array, square: Array, cap: Array | None) -> list[Array]:
        """The blocks of columns of phi, their Taylor part subtracted.

        Where ``square`` is above ``cap`` all is multiplied by
        ``exp((cap - square) / 2)``, inside the exponential.
        """

    @abc.abstractmethod
    def _weight_factors(self, phase: Array) -> list[Array]:
        """What the phase multiplies the weight tower with, for each block."""

    def layout(self, dim: int) -> Layout:
        """Shares out the columns for inputs of width ``dim``.

        Raises:
          ValueError: if ``num_features`` does not hold the exact part and a direction
            for each frequency.
        """
        degree = self._carried_degree
        exact = (0, 1, 1 + dim, 1 + dim + dim * (dim + 1) // 2)[degree + 1]
        per = self.columns_per_direction
        directions = (self.num_features - exact) // per
        groups = len(self.terms.weights)
        if directions < groups:
            what = "one direction" if groups == 1 else f"{groups} directions"
            raise ValueError(
                f"num_features must hold {exact} exact columns for inputs of width "
                f"{dim} and {what} of {per} columns: at least {exact + per * groups}. "
                f"Got {self.num_features}."
            )
        weights = np.array(self.terms.weights)
        counts = share_out(directions, np.exp(weights - weights.max()))
        return Layout(exact, counts, self.num_features - exact - per * directions)

    @property
    def _carried_degree(self) -> int:
        """Degree of the polynomial part with columns of its own; -1 for none."""
        terms = self.terms
        own = 1 if terms.slope else (0 if terms.constant else -1)
        return own if self.exact_degree is None else max(own, self.exact_degree)

    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws the directions; see :class:`FeatureMap`."""
        if dim < 1:
            raise ValueError(f"num and dim must be at least 1. Got dim {dim}.")
        layout = self.layout(dim)
        words = projections.streams(projections.key_words(key), _STREAMS)
        scale = dim**-0.25 if self.scale is None else self.scale
        params = {
            **self.directions(key, layout.directions, dim, dtype),
            **self._draw_rates(words[_STREAMS - 2], layout.directions, dtype),
            "scale": jnp.asarray(scale, dtype),
        }
        if self.shrinkage:
            shape = (NUM_REFERENCES, dim)
            x = projections.normals(words[_STREAMS - 1], shape)
            norm = math.sqrt(self.kappa) / scale
            x = x * (norm / jnp.linalg.norm(x, axis=1, keepdims=True))
            params["reference"] = x.astype(dtype)
            params["cap"] = self.cap(params, 1.5 * self.kappa).astype(dtype)
        return params

    def cap(self, params: Params, square: Array | float) -> Array:
        """The squared norm to damp from: ``square``, or where e^(rate square) ends."""
        limit = 120 / self._max_rate(params)
        return jnp.minimum(jnp.asarray(square, jnp.float32), limit)

    def _max_rate(self, params: Params) -> Array:
        rates = params.get("rates", jnp.asarray(self.terms.rates or (1.0,)))
        return jnp.max(rates.astype(jnp.float32))

    def redraw(self, params: Params, key: PRNGKeyArray, dim: int) -> Params:
        """Draws the random parts of ``params`` anew and keeps what was calibrated."""
        fresh = super().redraw(params, key, dim)
        kept = {name: params[name] for name in _CALIBRATED if name in params}
        return {name: kept.get(name, fresh[name]) for name in params}

    @compiled
    def phi(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Maps inputs to features."""
        self._check_width(params, x)
        layout = self.layout(x.shape[-1])
        x = _centred(params, x)
        blocks = self._random_columns(params, x, layout)
        if layout.exact:
            blocks = _exact_columns(x, self._carried_degree) + blocks
        if layout.padding:
            blocks = [*blocks, jnp.zeros((*x.shape[:-1], layout.padding), x.dtype)]
        return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=-1)

    @compiled
    def psi(
        self,
        params: Params,
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "m o"]:
        """Maps weights and biases to the readout."""
        self._check_width(params, kernel.T)
        kernels.check_layer(kernel.T, kernel, bias)
        layout = self.layout(kernel.shape[0])
        wide = accumulation_dtype(kernel.dtype)
        shift = jnp.zeros(kernel.shape[1], wide)
        if bias is not None:
            shift = shift + bias.astype(wide)
        if "mean" in params:
            mean = params["mean"].astype(wide)
            product = jnp.matmul(mean, kernel.astype(wide), precision=self.precision)
            shift = shift + product
        blocks = self._random_readout(params, kernel, shift, layout)
        exact = [
            self._exact_readout(kernel.astype(wide), shift, function)
            for function in self.carried
        ]
        if self.shrinkage:
            blocks = self._shrunk(params, kernel, shift, layout, exact, blocks)
        else:
            blocks = exact[0] + blocks
        if layout.padding:
            blocks = [*blocks, jnp.zeros((layout.padding, kernel.shape[1]), wide)]
        return _finite(jnp.concatenate(blocks, axis=0), kernel.dtype)

    def exact(
        self,
        x: Float[Array, "*b d"],
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "*b o"]:
        """The feed-forward layer of the activation."""
        return kernels.ffl(self.row, x, kernel, bias)

    def max_input_norm(self, params: Params, dtype: Dtype = jnp.float32) -> Array:
        """An input norm up to which :meth:`phi` is finite in ``dtype``.

        Without balancing it is the exact limit for waves; :meth:`phi` is NaN beyond.
        Inputs that balancing centres may be anywhere at this norm.
        """
        limit = math.log(float(jnp.finfo(dtype).max))
        if "metric" in params:
            size = jnp.linalg.norm(params["metric"].astype(jnp.float32), ord=2)
        else:
            size = params["scale"].astype(jnp.float32)
        distance = (2 * limit / self._max_rate(params)) ** 0.5 / size
        if "mean" not in params:
            return distance
        mean = jnp.linalg.norm(params["mean"].astype(jnp.float32))
        return jnp.maximum(distance - mean, 0)

    def _check_width(self, params: Params, x: Array) -> None:
        omega = params["omega" if "omega" in params else "input_signs"]
        projections.check_inputs(x, omega.shape[-1])

    def _tower(
        self, params: Params, x: Array, metric: str, power: int
    ) -> tuple[Array, Array]:
        """Projections of the scaled inputs and their squared norms, rates left out."""
        if metric in params:
            t = jnp.matmul(
                x,
                params[metric].astype(x.dtype),
                precision=self.precision,
                preferred_element_type=accumulation_dtype(x.dtype),
            )
            stretch = params["stretch"].astype(t.dtype)
            stretched = t * stretch.reshape((1,) * (t.ndim - 1) + stretch.shape)
            return self.project(params, stretched), squared_norm(t)[..., None]
        z = self.project(params, x)
        scale = params["scale"].astype(z.dtype) ** power
        stretch = math.sqrt(1 - 4 * self.shape)
        return (scale * stretch) * z, (scale * scale) * squared_norm(x)[..., None]

    def _random_columns(self, params: Params, x: Array, layout: Layout) -> list[Array]:
        z, square = self._tower(params, x, "metric", 1)
        rates = self._waves(params, layout)[0].astype(z.dtype)
        root, rates = _along_last(jnp.sqrt(rates), z), _along_last(rates, z)
        factor = layout.directions**-0.5
        cap = rates * params["cap"].astype(z.dtype) if "cap" in params else None
        blocks = self._input_tower(root * z, rates * square, cap)
        return [_finite(factor * block, x.dtype) for block in blocks]

    def _random_readout(
        self, params: Params, kernel: Array, shift: Array, layout: Layout
    ) -> list[Array]:
        """Blocks ``[directions, o]`` of the readout, in the accumulation dtype."""
        z, square = self._tower(params, kernel.T, "dual_metric", -1)
        rates, amplitudes, phases = (
            _along_last(jnp.asarray(a, z.dtype), z) for a in self._waves(params, layout)
        )
        z, square = jnp.sqrt(rates) * z, rates * square
        log_shape = self._log_shape(params).astype(z.dtype)
        tower = jnp.exp(log_shape + z - square / 2)
        if self.exact_degree is not None:
            tower = tower - jnp.exp(log_shape) * taylor(z, square, self.exact_degree)
        tower = (amplitudes * layout.directions**0.5) * tower
        phase = rates * shift.astype(z.dtype)[:, None] + phases
        return [(factor * tower).T for factor in self._weight_factors(phase)]

    def _log_shape(self, params: Params) -> Array:
        r""":math:`\tfrac12 \sum_l \log(1 - 4A_l) + 2 \sum_l A_l g_l^2`, ``[1, k]``.

        The factors of both towers that hold A alone; they stand with the weights.
        """
        if "stretch" not in params and self.shape == 0:
            return jnp.zeros((1, 1))
        g = projections.matrix(params)
        g = g.astype(accumulation_dtype(g.dtype))
        stretch = params.get("stretch", jnp.asarray(math.sqrt(1 - 4 * self.shape)))
        stretch = jnp.broadcast_to(stretch.astype(g.dtype), g.shape[1:])
        shape = (1 - stretch * stretch) / 4
        # An exponent: a bfloat16 pass would cost its digits.
        exponent = jnp.matmul(g * g, shape, precision="highest")
        return (jnp.sum(jnp.log(stretch)) + 2 * exponent)[None, :]

    def _exact_readout(
        self, kernel: Array, shift: Array, function: activations.Activation
    ) -> list[Array]:
        """Rows that carry the polynomial part, in the order of the exact columns."""
        terms, degree = self.terms, self.exact_degree
        own = -1 if degree is None else degree
        rows = []
        if self._carried_degree < 0:
            return rows
        if own >= 0:
            rows.append(function(shift)[None, :])
        else:
            rows.append((terms.constant + terms.slope * shift)[None, :])
        if self._carried_degree >= 1:
            slope = function.grad(shift)[None, :] if own >= 1 else terms.slope
            rows.append(slope * kernel)
        if own >= 2:
            second, both = _pairs(kernel.T), function.grad(shift, 2)[None, :]
            rows.append(0.5 * both * second.T)
        return rows

    def _shrunk(
        self,
        params: Params,
        kernel: Array,
        shift: Array,
        layout: Layout,
        exact: list[list[Array]],
        blocks: list[Array],
    ) -> list[Array]:
        """Exact rows, and random ones times the factors, best on the references."""
        x = params["reference"].astype(shift.dtype)
        x = _centred(params, x)
        wide = kernel.astype(shift.dtype)
        product = functools.partial(jnp.matmul, precision=self.precision)
        target = self.row(product(x, wide) + shift[None, :])
        columns = self._random_columns(params, x, layout)
        edges = np.cumsum((0, *layout.counts))
        parts = jnp.stack(
            [
                sum(
                    product(column[:, lo:hi], block[lo:hi])
                    for column, block in zip(columns, blocks, strict=True)
                )
                for lo, hi in itertools.pairwise(edges)
            ]
        )
        monomials = jnp.concatenate(_exact_columns(x, self._carried_degree), axis=-1)
        best, least = [], None
        for rows in exact:
            rest = target
            if rows:
                rest = target - product(monomials, jnp.concatenate(rows))
            # Chosen once, like a hyperparameter: no gradient through the choice.
            factors, error = jax.lax.stop_gradient(_shrinkage_factors(parts, rest))
            factors = jnp.repeat(factors, np.array(layout.counts), axis=0)
            random = [jnp.where(factors > 0, factors * block, 0) for block in blocks]
            if least is None:
                best, least = rows + random, error
                continue
            better = (error < least)[None, :]
            pairs = zip(rows + random, best, strict=True)
            best = [jnp.where(better, new, old) for new, old in pairs]
            least = jnp.minimum(error, least)
        return best


def log_damping(square: Array, cap: Array | None) -> Array:
    """The logarithm of what columns beyond the cap are multiplied with."""
    return jnp.zeros_like(square) if cap is None else jnp.minimum(cap - square, 0) / 2


def taylor(z: Array, square: Array, degree: int) -> Array | int:
    """The part of ``exp(z - square / 2)`` up to a degree of the vector behind both."""
    return sum((1, z, (z * z - square) / 2)[: degree + 1])


def _shrinkage_factors(parts: Array, target: Array) -> tuple[Array, Array]:
    """Factors in [0, 1] of each part, ``[groups, n, o]``, best for ``[n, o]``.

    Beside them stands the squared error ``[o]`` that they leave.

    Two proposals, each with the best common factor: one factor a group by least
    squares, which drops the noisy frequencies, and no difference between the groups,
    which is right where noise is small. Neither is worse than dropping the random part.
    """
    usable = jnp.all(jnp.isfinite(parts), axis=1, keepdims=True)
    parts = jnp.where(usable, parts, 0)
    # In units of each part's own size: they span many orders of magnitude.
    size = jnp.sqrt(jnp.mean(parts * parts, axis=1, keepdims=True))
    size = jnp.where(size > 0, size, 1)
    scaled = jnp.moveaxis(parts / size, -1, 0)  # [o, groups, n]
    gram = jnp.matmul(scaled, jnp.swapaxes(scaled, 1, 2), precision="highest")
    moment = jnp.einsum("ogn,no->og", scaled, target, precision="highest")
    gram, moment = gram / target.shape[0], moment / target.shape[0]
    gram = gram + 1e-4 * jnp.eye(len(parts), dtype=gram.dtype)[None]
    solution = jnp.linalg.solve(gram, moment[..., None])
    single = jnp.clip(solution[..., 0].T / size[:, 0], 0, 1)
    single, single_error = _scaled_down(single, parts, target)
    common, common_error = _scaled_down(jnp.ones_like(single), parts, target)
    factors = jnp.where((single_error < common_error)[None, :], single, common)
    return factors, jnp.minimum(single_error, common_error)


def _scaled_down(factors: Array, parts: Array, target: Array) -> tuple[Array, Array]:
    """The factors times the best common one in [0, 1], and the squared error."""
    total = jnp.einsum("go,gno->no", factors, parts)
    square = jnp.sum(total * total, axis=0)
    best = jnp.sum(total * target, axis=0) / jnp.where(square > 0, square, 1)
    best = jnp.clip(best, 0, 1)
    error = jnp.sum((target - best[None, :] * total) ** 2, axis=0)
    return factors * best[None, :], error


def _centred(params: Params, x: Array) -> Array:
    if "mean" not in params:
        return x
    wide = x.astype(accumulation_dtype(x.dtype))
    mean = params["mean"].astype(wide.dtype)
    return (wide - mean.reshape((1,) * (x.ndim - 1) + mean.shape)).astype(x.dtype)


def _along_last(values: Array, like: Array) -> Array:
    """A scalar or a vector of the last axis, ready to broadcast."""
    shape = values.shape if values.ndim else (1,)
    return values.reshape((1,) * (like.ndim - 1) + shape)


def _exact_columns(x: Array, degree: int) -> list[Array]:
    columns = [jnp.ones((*x.shape[:-1], 1), x.dtype)]
    if degree >= 1:
        columns.append(x)
    if degree >= 2:
        columns.append(_pairs(x))
    return columns


def _pairs(x: Array) -> Array:
    """The products x_i x_j, i <= j, weighted so that dot products are squared ones."""
    i, j = np.triu_indices(x.shape[-1])
    weight = np.where(i == j, 1.0, math.sqrt(2))
    wide = x.astype(accumulation_dtype(x.dtype))
    weight = jnp.asarray(weight, wide.dtype).reshape((1,) * (x.ndim - 1) + i.shape)
    return _finite(weight * wide[..., i] * wide[..., j], x.dtype)


def _finite(value: Array, dtype: Dtype) -> Array:
    """Casts; NaN where ``dtype`` cannot hold the value, never inf."""
    held = jnp.abs(value) <= float(jnp.finfo(dtype).max)
    return jnp.where(held, value, jnp.nan).astype(dtype)
