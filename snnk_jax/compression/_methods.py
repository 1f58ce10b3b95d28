"""Ways to make a feed-forward block smaller, under one accounting."""

import abc
import dataclasses
import functools
import math
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax import ridge
from snnk_jax.calibration import balance
from snnk_jax.compression._blocks import Block
from snnk_jax.compression._gather import Task
from snnk_jax.compression._modules import Beside, Int8Linear, linear, low_rank
from snnk_jax.compression._select import eliminate, energies, reduced_rank
from snnk_jax.features import AppendOne, FeatureMap, TowerFeatures
from snnk_jax.nn import SNNKMlp
from snnk_jax.ridge._solve import Moments, moments

# Shares of a linear path that "auto" tries.
_SHARES = (0.0, 0.25, 0.5, 0.75)
# Turns between units and directions of a linear path.
_TURNS = 2
# From here on ReLU, GELU and SiLU are the identity up to float32, or nearly so.
_IDENTITY = 6.0
# Rows to which a random feature map is balanced.
_BALANCED = 4096


@dataclasses.dataclass(frozen=True)
class Site:
    """What a method sees of the block it replaces.

    Attributes:
      task: the block in its model, with the data.
      first: the Linear before the activation.
      second: the one behind it.
      l2: penalty of a fit, None for that of least GCV.
      key: for what is random.
    """

    task: Task
    first: nnx.Linear
    second: nnx.Linear
    l2: float | None
    key: jax.Array

    @property
    def block(self) -> Block:
        """Names and sizes."""
        return self.task.block

    @property
    def judged(self) -> slice:
        """Columns of the targets by which choices are made."""
        return self.task.judged


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a method made of a block.

    Attributes:
      modules: replacements by path.
      solution: of the ridge regression, None where nothing was fitted.
    """

    modules: dict[str, Any]
    solution: ridge.RidgeSolution | None = None


class Method(abc.ABC):
    """Makes a block of a size; the size is a number of units, features or ranks."""

    @abc.abstractmethod
    def cost(self, block: Block, size: int) -> tuple[int, int]:
        """Stored numbers, in units of a float32, and FLOPs a token."""

    @abc.abstractmethod
    def largest(self, block: Block) -> int:
        """The size from which on nothing is left to gain; the least is 0 or 1."""

    @abc.abstractmethod
    def fit(self, site: Site, size: int) -> Fit:
        """Makes the replacement."""

    def size_for(self, block: Block, budget: float, what: str) -> int:
        """The largest size that costs at most ``budget`` numbers or FLOPs.

        Raises:
          ValueError: if the least size costs more.
        """
        index = 0 if what == "parameters" else 1
        low, high = 0, self.largest(block)
        if self.cost(block, low)[index] > budget:
            raise ValueError(
                f"budget must leave {type(self).__name__} at least "
                f"{self.cost(block, low)[index]} {what} for {block.name}. "
                f"Got {budget:.0f}."
            )
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.cost(block, middle)[index] <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


@dataclasses.dataclass(frozen=True, kw_only=True)
class Units(Method):
    r"""Keeps some of the block's own units, and fits what they are read out by.

    The units' input weights are a projection that knows the data. Two Linears of the
    same kind stand in for those of the block, and its own activation between them.

    Args:
      select: ``"elimination"`` takes out the unit that is missed least, again and
        again (:func:`~snnk_jax.compression._select.eliminate`); ``"energy"`` keeps
        those of the largest activation variance times squared readout norm;
        ``"random"`` any.
      refit: fit the readout to the target; without it the units keep their rows, the
        plain structured pruning.
      linear: share of the units that become a linear path: their weights are the
        directions of the inputs that say most of what the kept units leave of the
        target, and their bias is so large that the activation is the identity. For
        ReLU, GELU, SiLU and their like, with a bias; a path in bfloat16 loses digits
        to that bias. ``"auto"`` takes of 0, 1/4, 1/2 and 3/4 what leaves the least
        error in the metric, block by block.
    """

    select: Literal["elimination", "energy", "random"] = "elimination"
    refit: bool = True
    linear: float | Literal["auto"] = 0.0

    def __post_init__(self):
        if self.linear != "auto" and not 0 <= self.linear < 1:
            raise ValueError(f"linear must be in [0, 1), or 'auto'. Got {self.linear}.")
        if self.linear and not (self.refit and self.select == "elimination"):
            raise ValueError(
                "units beside a linear path must be selected by elimination and "
                f"refitted. Got {self.select!r}, refit={self.refit}."
            )
        if self.select not in ("elimination", "energy", "random"):
            raise ValueError(
                "select must be 'elimination', 'energy' or 'random'. "
                f"Got {self.select!r}."
            )

    def cost(self, block: Block, size: int) -> tuple[int, int]:
        d, o = block.dim, block.out
        stored = size * (d + block.biases[0] + o) + o
        return stored, 2 * size * (d + o)

    def largest(self, block: Block) -> int:
        return block.width

    def fit(self, site: Site, size: int) -> Fit:
        if self.linear:
            return self._fit_beside(site, size)
        stats = site.task.gather(hidden, "units")
        kept = self.units(site, stats, size)
        up = site.first
        bias = None if up.bias is None else np.asarray(up.bias[...])[kept]
        narrow = linear(up, np.asarray(up.kernel[...])[:, kept], bias)
        solution = None
        if self.refit:
            solution = solve(subset(stats, kept), site.l2, site.judged)
            readout, offset = values(solution, site.block.out)
        else:
            readout = np.asarray(site.second.kernel[...])[kept]
            whole = site.second.bias
            offset = np.zeros(site.block.out) if whole is None else np.asarray(whole)
        second = linear(site.second, readout, offset)
        return Fit({site.block.first: narrow, site.block.second: second}, solution)

    def units(self, site: Site, stats: ridge.RidgeStats, size: int) -> np.ndarray:
        """Indices of the units that are kept, in order."""
        width = site.block.width
        if self.select == "random":
            order = np.asarray(jax.random.permutation(site.key, width))
            return np.sort(order[:size])
        centred = moments(stats)
        if self.select == "energy":
            own = energies(centred, np.asarray(site.second.kernel[...], np.float64))
            return np.sort(np.argsort(-own)[:size])
        return eliminate(centred, [size], site.judged)[0][size]

    def _fit_beside(self, site: Site, size: int) -> Fit:
        block, up = site.block, site.first
        if up.bias is None:
            raise ValueError(
                f"{block.name} must have a bias before its activation for a linear "
                "path. Got none."
            )
        whole = symmetric(moments(site.task.gather(units_and_inputs, "units-inputs")))
        shares = _SHARES if self.linear == "auto" else (self.linear,)
        found = [
            beside(whole, block.width, size, int(share * size), site.judged)
            for share in dict.fromkeys(shares)
        ]
        kept, a, _ = min(found, key=lambda choice: choice[2])
        gram = whole.gram[block.width :, block.width :]
        mean = whole.phi_mean[block.width :]
        variance = np.sum(a * (gram @ a), axis=0) / whole.weight
        # A direction that the units leave nothing to say stays short.
        a = a / np.sqrt(np.maximum(variance, 1e-8 * variance.max(initial=0)))
        x = np.asarray(site.task.sample(), np.float64)
        reach = np.abs((x - mean) @ a).max(initial=0)
        bias = _IDENTITY + reach - mean @ a
        narrow = linear(
            up,
            np.concatenate([np.asarray(up.kernel[...])[:, kept], a], axis=1),
            np.concatenate([np.asarray(up.bias[...])[kept], bias]),
        )
        blank = linear(site.second, np.zeros((size, block.out)), None)
        changes = {block.first: narrow, block.second: blank}
        stats = site.task.gather(hidden, f"path-{size}", changes)
        solution = solve(stats, site.l2, site.judged)
        second = linear(site.second, *values(solution, block.out))
        return Fit({block.first: narrow, block.second: second}, solution)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features(Method):
    r"""Random features of a map, read out by one matrix.

    The size replaces the map's ``num_features``.

    Args:
      features: the map. Its directions are drawn from a key, which a file of
        :func:`~snnk_jax.compression.save` names instead of holding them.
      fit: solve for the readout; without it the readout is the paper's
        :math:`\Psi(W_1, b_1) W_2`, which the map must be able to give.
      linear: a full linear path beside the features, fitted with them.
      balanced: scale the directions to samples of the block's inputs
        (:func:`snnk_jax.calibration.balance`), which stores two matrices ``[d, d]``.
    """

    features: FeatureMap
    readout: Literal["fit", "psi"] = "fit"
    linear: bool = False
    balanced: bool = False

    def __post_init__(self):
        if self.readout not in ("fit", "psi"):
            raise ValueError(f"readout must be 'fit' or 'psi'. Got {self.readout!r}.")
        if self.linear and self.readout == "psi":
            raise ValueError("a linear path must be fitted. Got readout='psi'.")
        if self.balanced and not isinstance(self.features, TowerFeatures):
            raise ValueError(
                "features must be URF or Exponential to be balanced. "
                f"Got {type(self.features).__name__}."
            )

    def cost(self, block: Block, size: int) -> tuple[int, int]:
        d, o = block.dim, block.out
        stored, flops = size * o + o, 2 * size * (d + o)
        if self.linear:
            stored, flops = stored + d * o, flops + 2 * d * o
        if self.balanced:
            stored, flops = stored + size * d + 2 * d * d, flops + 2 * d * d
        return stored, flops

    def largest(self, block: Block) -> int:
        return 4 * block.width

    def fit(self, site: Site, size: int) -> Fit:
        need_whole(site.block, self)
        if size < 1:
            raise ValueError(f"budget must leave a feature. Got {size}.")
        features = resized(self.features, size)
        rngs = nnx.Rngs(projection=site.key, params=site.key)
        block = SNNKMlp(
            site.block.dim,
            site.block.out,
            features=features,
            dtype=site.first.dtype,
            param_dtype=site.first.param_dtype,
            readout_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )
        params = block.projection.params
        kernel = site.first.kernel[...]
        bias = None if site.first.bias is None else site.first.bias[...]
        if self.balanced:
            x = site.task.sample()[:_BALANCED]
            params = balance(features, params, x.astype(kernel.dtype), kernel, bias)
            block.projection.calibrate(params)
        if self.readout == "psi":
            psi = features.psi(params, kernel, bias)
            block.readout[...] = (psi @ site.second.kernel[...]).astype(psi.dtype)
            if block.bias is not None and site.second.bias is not None:
                block.bias[...] = site.second.bias[...]
            return Fit({site.block.name: block})
        columns = functools.partial(_feature_columns, features, self.linear, params)
        stats = site.task.gather(columns, f"features-{size}")
        solution = solve(stats, site.l2, site.judged)
        readout, offset = values(solution, site.block.out)
        dtype = site.first.param_dtype
        block.readout[...] = jnp.asarray(readout[:size], dtype)
        if block.bias is not None:
            block.bias[...] = jnp.asarray(offset, dtype)
        module: nnx.Module = block
        if self.linear:
            module = Beside(block, linear(site.first, readout[size:], None))
        return Fit({site.block.name: module}, solution)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine(Method):
    """One matrix and a bias, fitted; of lower rank where the budget asks for it."""

    def cost(self, block: Block, size: int) -> tuple[int, int]:
        d, o = block.dim, block.out
        if size >= self.largest(block):
            return d * o + o, 2 * d * o
        return size * (d + o) + o, 2 * size * (d + o)

    def largest(self, block: Block) -> int:
        # From this rank on the two factors hold more than their product.
        return math.ceil(block.dim * block.out / (block.dim + block.out))

    def fit(self, site: Site, size: int) -> Fit:
        need_whole(site.block, self)
        stats = site.task.gather(inputs, "inputs")
        solution = solve(stats, site.l2, site.judged)
        kernel, offset = values(solution, site.block.out)
        if size >= self.largest(site.block):
            return Fit({site.block.name: linear(site.first, kernel, offset)}, solution)
        a, b, offset = plain_targets(site, moments(stats), size)
        return Fit({site.block.name: low_rank(site.first, a, b, offset)}, solution)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Both matrices by two factors of a rank.

    Args:
      data_aware: the second factors and both maps are fitted to the inputs (reduced-
        rank regression: of the pre-activations, then of the target from the units that
        the first map leaves); without it they are the truncated SVD of the weights.
    """

    data_aware: bool = True

    def cost(self, block: Block, size: int) -> tuple[int, int]:
        d, width, o = block.dim, block.width, block.out
        ranked = size * (d + 2 * width + o)
        return ranked + block.biases[0] * width + o, 2 * ranked

    def largest(self, block: Block) -> int:
        return min(block.dim, block.width, block.out)

    def fit(self, site: Site, size: int) -> Fit:
        if size < 1:
            raise ValueError(f"budget must leave a rank of 1. Got {size}.")
        block, up, down = site.block, site.first, site.second
        bias = None if up.bias is None else np.asarray(up.bias[...], np.float64)
        kernel = np.asarray(up.kernel[...], np.float64)
        second = np.asarray(down.kernel[...], np.float64)
        offset = np.zeros(block.out) if down.bias is None else np.asarray(down.bias)
        if not self.data_aware:
            pairs = (truncated(kernel, size), truncated(second, size))
            (a, b), (c, d) = pairs
            return Fit(
                {
                    block.first: low_rank(up, a, b, bias),
                    block.second: low_rank(down, c, d, offset),
                }
            )
        centred = moments(site.task.gather(inputs, "inputs"))
        gram = np.triu(centred.gram)
        gram = gram + np.triu(gram, 1).T
        a, b = reduced_rank(dataclasses.replace(centred, cross=gram @ kernel), size)
        if bias is not None:
            # The mean pre-activation stays what it was.
            bias = bias + centred.phi_mean @ (kernel - a @ b)
        changes = {block.first: low_rank(up, a, b, bias)}
        stats = site.task.gather(hidden, f"hidden-{size}", changes)
        c, d, offset = plain_targets(site, moments(stats), size)
        return Fit(changes | {block.second: low_rank(down, c, d, offset)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """Keeps the largest weights of both matrices, the others zero.

    The size is the number of weights that are not zero; their places are not counted,
    and no FLOP is saved: the products stay dense.
    """

    def cost(self, block: Block, size: int) -> tuple[int, int]:
        return size + block.biases[0] * block.width + block.out, block.flops

    def largest(self, block: Block) -> int:
        return block.width * (block.dim + block.out)

    def fit(self, site: Site, size: int) -> Fit:
        pair = (site.first, site.second)
        kernels = [np.asarray(layer.kernel[...]) for layer in pair]
        sizes = np.concatenate([np.abs(kernel).ravel() for kernel in kernels])
        least = np.sort(sizes)[len(sizes) - size] if size else np.inf
        names = (site.block.first, site.block.second)
        modules = {}
        for name, layer, kernel in zip(names, pair, kernels, strict=True):
            bias = None if layer.bias is None else np.asarray(layer.bias[...])
            kept = np.where(np.abs(kernel) >= least, kernel, 0)
            modules[name] = linear(layer, kept, bias)
        return Fit(modules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(Method):
    """Both matrices in 8 bits with a scale an output; a quarter of the bytes."""

    def cost(self, block: Block, size: int) -> tuple[int, int]:
        scales = block.width + block.out
        biases = block.biases[0] * block.width + block.biases[1] * block.out
        return block.width * (block.dim + block.out) // 4 + scales + biases, block.flops

    def largest(self, block: Block) -> int:
        return 0

    def fit(self, site: Site, size: int) -> Fit:
        names = (site.block.first, site.block.second)
        pair = (site.first, site.second)
        return Fit(
            {n: Int8Linear.from_linear(p) for n, p in zip(names, pair, strict=True)}
        )


def hidden(x: Any, h: Any) -> Any:
    """The units."""
    return h


def inputs(x: Any, h: Any) -> Any:
    """The inputs."""
    return x


@jax.jit
def units_and_inputs(x: Any, h: Any) -> Any:
    """The units, then the inputs."""
    return jnp.concatenate([h, x.astype(h.dtype)], axis=1)


def symmetric(centred: Moments) -> Moments:
    """The same with both triangles of the Gram matrix."""
    gram = np.triu(centred.gram)
    return dataclasses.replace(centred, gram=gram + np.triu(gram, 1).T)


def part(whole: Moments, columns: slice) -> Moments:
    """Moments of some of the features."""
    return dataclasses.replace(
        whole,
        gram=whole.gram[columns, columns],
        cross=whole.cross[columns],
        phi_mean=whole.phi_mean[columns],
    )


def beside(
    whole: Moments, width: int, size: int, ranks: int, judged: slice
) -> tuple[np.ndarray, np.ndarray, float]:
    """Units and directions of the inputs in turns, each for what the others leave.

    Args:
      whole: moments of the units, then the inputs.
      width: number of units.
      size: how many units and directions to keep.
      ranks: how many directions among them.
      judged: columns of the targets.

    Returns:
      The units, the directions ``[d, ranks]``, and the squared error they leave.
    """
    units, rest = slice(0, width), slice(width, None)
    a, kept = np.zeros((len(whole.gram) - width, 0)), np.zeros(0, int)
    if ranks:
        a, _ = reduced_rank(part(whole, rest), ranks, judged)
    for _ in range(_TURNS if ranks else 1):
        left = beyond(whole, units, rest, a)
        kept = eliminate(left, [size - ranks], judged)[0][size - ranks]
        if ranks:
            others = beyond(whole, rest, units, np.eye(width)[:, kept])
            a, _ = reduced_rank(others, ranks, judged)
    others = beyond(whole, rest, units, np.eye(width)[:, kept])
    left = beyond(others, slice(None), slice(None), a)
    return kept, a, float(np.sum(left.y_square[judged]))


def beyond(whole: Moments, columns: slice, others: slice, maps: np.ndarray) -> Moments:
    """Moments of some features and of the targets, ``others @ maps`` regressed out."""
    own = part(whole, columns)
    if not maps.size:
        return own
    gram = maps.T @ whole.gram[others, others] @ maps
    gram[np.diag_indices(len(gram))] += 1e-8 * np.trace(gram) / len(gram)
    across, cross = maps.T @ whole.gram[others, columns], maps.T @ whole.cross[others]
    weights = np.linalg.solve(gram, np.concatenate([across, cross], axis=1))
    features, readout = np.split(weights, [across.shape[1]], axis=1)
    return dataclasses.replace(
        own,
        gram=own.gram - across.T @ features,
        cross=own.cross - across.T @ readout,
        y_square=own.y_square - np.sum(cross * readout, axis=0),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _feature_columns(
    features: FeatureMap, with_inputs: bool, params: Any, x: Any, h: Any
) -> Any:
    phi = features.phi(params, x)
    return jnp.concatenate([phi, x.astype(phi.dtype)], axis=1) if with_inputs else phi


def resized(features: FeatureMap, size: int) -> FeatureMap:
    """The map with another ``num_features``."""
    if isinstance(features, AppendOne):
        return AppendOne(resized(features.features, size))
    return dataclasses.replace(features, num_features=size)


def need_whole(block: Block, method: Method) -> None:
    """Raises ValueError for a block in whose place no other module may stand."""
    if not block.whole:
        raise ValueError(
            f"{block.name} must do nothing but Linear, activation, Linear to be "
            f"replaced by {type(method).__name__}. Got a module that does more."
        )


def subset(stats: ridge.RidgeStats, kept: np.ndarray) -> ridge.RidgeStats:
    """Statistics of some of the features, their indices rising."""
    grid = np.ix_(kept, kept)
    shift = stats.phi_shift
    return stats._replace(
        gram=ridge.Total(*(part[grid] for part in stats.gram)),
        cross=ridge.Total(*(part[kept] for part in stats.cross)),
        phi_sum=ridge.Total(*(part[kept] for part in stats.phi_sum)),
        phi_shift=None if shift is None else shift[kept],
    )


def targets(stats: ridge.RidgeStats, judged: slice) -> ridge.RidgeStats:
    """Statistics of some of the targets."""
    shift = stats.y_shift
    return stats._replace(
        cross=ridge.Total(*(part[:, judged] for part in stats.cross)),
        y_sum=ridge.Total(*(part[judged] for part in stats.y_sum)),
        y_square=ridge.Total(*(part[judged] for part in stats.y_square)),
        y_shift=None if shift is None else shift[judged],
    )


def solve(
    stats: ridge.RidgeStats, l2: float | None, judged: slice
) -> ridge.RidgeSolution:
    """The readout, at the penalty of least GCV in the metric."""
    with warnings.catch_warnings():
        # It warns of the coefficients' digits; here only predictions count.
        warnings.simplefilter("ignore", ridge.PrecisionWarning)
        if l2 is None:
            l2 = ridge.select_l2(targets(stats, judged)).l2
        return ridge.solve(stats, l2)


def values(solution: ridge.RidgeSolution, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Readout and bias of the plain targets."""
    kernel, bias = np.asarray(solution.kernel), np.asarray(solution.bias)
    return kernel[:, :out], bias[:out]


def truncated(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the best approximation of a rank."""
    left, sizes, right = np.linalg.svd(kernel, full_matrices=False)
    return left[:, :rank] * sizes[:rank], right[:rank]


def plain_targets(
    site: Site, centred: Moments, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors of a rank and the bias of the map to the plain targets."""
    out = site.block.out
    a, b = reduced_rank(centred, rank, slice(0, out))
    return a, b, centred.y_mean[:out] - centred.phi_mean @ a @ b
