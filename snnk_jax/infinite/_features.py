"""Feature maps of networks of infinite width."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax import projections
from snnk_jax.infinite import _layers, _positions
from snnk_jax.infinite._activation_features import activate, compress
from snnk_jax.infinite._gradient_features import gradient_features
from snnk_jax.infinite._linear import Vectors, explicit, square_norm
from snnk_jax.infinite.sketches import SRHT
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray

Kind = Literal["ntk", "nngp"]
METHODS = ("random", "sketch", "gradient")
Precision = Literal["default", "high", "highest"]
# Bytes of intermediate features that a batch is meant to take.
_MEMORY = 1 << 28


def features(net: _layers.Layer, num_features: int, **options: Any) -> "Features":
    """Builds the feature map of a network; see :class:`Features`."""
    return Features(net=net, num_features=num_features, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    r"""Features of the NNGP or the NTK, :math:`\Phi(x) \cdot \Phi(y) \approx K(x, y)`.

    Layer by layer, with features :math:`\varphi` of the NNGP and :math:`\psi` of the
    NTK: an affine layer puts the positions of its filter side by side and scales; an
    activation maps :math:`\varphi` to features of :math:`k`, and :math:`\psi` to
    features of :math:`\Theta\, \dot k`, a random projection of :math:`\psi` times a
    feature of :math:`\dot k`; pools average. All but the activation is exact. There

    * the Hermite degrees 0 and 1 of k and 0 of :math:`\dot k` are kept apart, as
      copies that stay exact as long as they have room (``exact``);
    * the rest has random features (``method="random"``: orthogonal directions,
      ``"sketch"``: :class:`sketches.PolySketch` of the Hermite expansion at each
      input's own norm, up to ``degree``);
    * every random block is scaled to the norm that it has in the limit (``normalize``),
      so that :math:`\lVert\Phi(x)\rVert^2` is exact up to the first pool. This is a
      bias of order 1 / width, and much less variance.

    The error falls as the root of ``num_features``, as long as ``width`` grows with it.
    Time and memory are linear in examples and in positions.

    Args:
      net: the network.
      num_features: columns of :meth:`phi`, all of them real.
      kind: ``"ntk"`` or ``"nngp"``.
      method: ``"random"``, ``"sketch"``, or ``"gradient"``, the gradients of a finite
        network as a baseline for the NTK; by default random, except for functions
        that have no features but a series.
      degree: the highest Hermite degree of a sketch.
      width: columns of a random block of each activation but the last, whose blocks
        share out ``num_features``: a number, or one for each. By default the 4th part
        of ``num_features`` without positions, and with positions the 16th part,
        growing as the root of how much fewer the positions become.
      exact: whether low degrees are kept apart.
      normalize: whether norms are corrected.
      projection: of random directions: ``"orthogonal"``, ``"gaussian"``, or
        ``"spherical"`` for homogeneous functions without ``exact``. These are
        leverage-score features: the weight :math:`\lVert w\rVert^2` cancels in
        :math:`\sigma(w^\top x) / \lVert w\rVert`.
      batch_size: examples at a time; 0: by the memory they take.
      precision: of the products, as for ``jax.lax.dot``.

    Raises:
      ValueError: for values out of range, a network that no kernel has (see
        :func:`snnk_jax.infinite.kernel`), or a method that a layer does not have.

    References:
      Zandieh et al., "Scaling Neural Tangent Kernels via Sketching and Random
      Features", arXiv 2106.07880; Han et al., "Fast Neural Kernel Embeddings for
      General Activations", arXiv 2209.04121.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> net = snnk.infinite.serial(
      ...     snnk.infinite.Dense(w_std=2**0.5),
      ...     snnk.infinite.Activation("relu"),
      ...     snnk.infinite.Dense(),
      ... )
      >>> features = net.features(num_features=512)
      >>> x = jax.random.normal(jax.random.key(1), (5, 8))
      >>> params = features.init(jax.random.key(0), x.shape[1:])
      >>> features.phi(params, x).shape
      (5, 512)
    """

    net: _layers.Layer
    num_features: int
    kind: Kind = "ntk"
    method: Literal["auto", "random", "sketch", "gradient"] = "auto"
    degree: int = 8
    width: int | tuple[int, ...] = 0
    exact: bool = True
    normalize: bool = True
    projection: str = "orthogonal"
    batch_size: int = 0
    precision: Precision | None = None

    def __post_init__(self):
        _layers.check_map(self.net, self.kind)
        if self.method not in ("auto", *METHODS):
            raise ValueError(
                f"method must be one of auto, {', '.join(METHODS)}. "
                f"Got {self.method!r}."
            )
        for name, least in (("num_features", 1), ("degree", 1), ("batch_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}. Got {getattr(self, name)}."
                )
        net = self.net
        last = net.layers[-1] if isinstance(net, _layers.Serial) else net
        if self.method == "gradient" and self.kind != "ntk":
            raise ValueError(
                f"kind must be 'ntk' for gradient features. Got {self.kind!r}."
            )
        if self.method == "gradient" and not isinstance(last, _layers.Dense):
            raise ValueError(
                f"net must end in a Dense for gradient features. Got {last!r}."
            )
        if self.precision not in (None, "default", "high", "highest"):
            raise ValueError(
                "precision must be None, 'default', 'high' or 'highest'. "
                f"Got {self.precision!r}."
            )
        self._check_width()
        self._check_functions()

    def _check_width(self) -> None:
        if isinstance(self.width, int):
            if self.width < 0:
                raise ValueError(f"width must not be negative. Got {self.width}.")
            return
        object.__setattr__(self, "width", tuple(self.width))
        inner = max(len(functions(self.net)) - 1, 0)
        if len(self.width) != inner or min(self.width, default=1) < 1:
            raise ValueError(
                f"width must be one positive number for each of {inner} activations "
                f"below the last. Got {self.width}."
            )

    def _check_functions(self) -> None:
        names = (*projections.gaussian_names(), "spherical")
        if self.projection not in names:
            raise ValueError(
                f"projection must be one of {', '.join(names)}. "
                f"Got {self.projection!r}."
            )
        for layer in functions(self.net):
            function: Any = layer.activation
            series = isinstance(function, _layers.NormalizedExponential)
            if series and self.method in ("random", "gradient"):
                raise ValueError(
                    "method must be 'sketch' or 'auto' for NormalizedExponential. "
                    f"Got {self.method!r}."
                )
            if self.projection == "spherical" and (
                self.exact or series or function.degree is None
            ):
                raise ValueError(
                    "projection must be 'orthogonal' or 'gaussian' unless exact=False "
                    "and every activation is homogeneous. Got 'spherical'."
                )
            if layer.jumps and not series and function.degree == 0:
                raise ValueError(
                    "jumps must be False: the NTK of a jump has no features. "
                    f"Got {function.name!r} with jumps."
                )

    def init(
        self,
        key: PRNGKeyArray,
        input_shape: tuple[int, ...],
        dtype: Dtype = jnp.float32,
    ) -> Params:
        """Draws the frozen parameters.

        Args:
          key: random key.
          input_shape: ``x.shape[1:]``, positions and channels.
          dtype: of the parameters.

        Raises:
          ValueError: for a shape that does not fit the network.
        """
        if not input_shape or min(input_shape) < 1:
            raise ValueError(f"input_shape must be positive. Got {input_shape}.")
        makers: list[Callable[[PRNGKeyArray], Any]] = []

        def record(make: Callable[[PRNGKeyArray], Any]) -> Any:
            makers.append(make)
            return make(jax.random.key(0))

        x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
        jax.eval_shape(functools.partial(self._features, record), x)
        words = projections.streams(projections.key_words(key), max(len(makers), 1))
        keys = [jax.random.wrap_key_data(w, impl="threefry2x32") for w in words]
        drawn = tuple(make(k) for make, k in zip(makers, keys, strict=False))

        def cast(leaf: Array) -> Array:
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf.astype(dtype) if floating else leaf

        return jax.tree.map(cast, drawn)

    def phi(self, params: Params, x: Float[Array, "n *s d"]) -> Float[Array, "n m"]:
        """Maps examples to features, each example for itself.

        Raises:
          ValueError: for inputs that are empty, not floating point, or not of the shape
            that the parameters were drawn for.
        """
        if x.ndim < 2 or not len(x):
            raise ValueError(
                "inputs must be [n, *positions, channels] with n at least 1. "
                f"Got shape {x.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"inputs must be real floating point. Got {x.dtype}.")
        shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
        if shapes != _drawn_shapes(self, x.shape[1:]):
            raise ValueError(
                "inputs must be of the shape that params were drawn for. "
                f"Got {x.shape[1:]}."
            )
        return _phi(self, params, x)

    def _features(self, draw: Any, x: Array) -> Array:
        """The features of one batch, in float32 or better."""
        if self.method == "gradient":
            return gradient_features(self.net, x, self.num_features, draw)
        count = len(functions(self.net))
        build = _Build(self, draw, math.prod(x.shape[1:-1]), count)
        start = Vectors(x * x.shape[-1] ** -0.5, exact=True)
        state = State([start], [] if self.kind == "ntk" else None)
        state = walk(self.net, state, build)
        vectors = state.phi if state.psi is None else state.psi
        return _fit(vectors, build)


@functools.lru_cache(maxsize=256)
def _drawn_shapes(
    features: Features, input_shape: tuple[int, ...]
) -> list[tuple[int, ...]]:
    drawn = jax.eval_shape(lambda: features.init(jax.random.key(0), input_shape))
    return [leaf.shape for leaf in jax.tree.leaves(drawn)]


@functools.partial(jax.jit, static_argnums=0)
def _phi(features: Features, params: Params, x: Array) -> Array:
    wide = projections.accumulation_dtype(x.dtype)

    def batch(part: Array) -> Array:
        leaves = iter(params)

        def take(make: Any) -> Any:
            del make
            leaf = next(leaves)
            return jax.tree.map(
                lambda a: (
                    a.astype(wide) if jnp.issubdtype(a.dtype, jnp.floating) else a
                ),
                leaf,
            )

        return features._features(take, part.astype(wide))

    size = min(features.batch_size or _batch_size(features, x.shape[1:]), len(x))
    whole = len(x) - len(x) % size
    parts = x[:whole].reshape(-1, size, *x.shape[1:])
    out = jax.lax.map(batch, parts) if len(parts) > 1 else batch(parts[0])
    out = out.reshape(whole, -1)
    if whole < len(x):
        out = jnp.concatenate([out, batch(x[whole:])])
    return out.astype(x.dtype)


def _batch_size(features: Features, shape: tuple[int, ...]) -> int:
    """Examples whose intermediate features take about ``_MEMORY``."""
    positions = math.prod(shape[:-1])
    width = max(_width(features, 0, positions, positions), shape[-1])
    # Four arrays of nine positions of a filter, of four bytes each.
    return max(1, _MEMORY // (144 * positions * width))


@dataclasses.dataclass(frozen=True)
class State:
    """Features at one layer, those of the NTK None if nobody asked for them."""

    phi: list[Vectors]
    psi: list[Vectors] | None


@dataclasses.dataclass
class _Build:
    """What a walk through the network needs, and how many activations it has seen."""

    options: Features
    draw: Any
    positions: int
    count: int
    seen: int = 0  # activations so far, the current one included

    def shares(
        self, positions: int, fixed: int, energies: Sequence[float]
    ) -> tuple[int, ...]:
        """Columns of the random blocks of an activation.

        In proportion to their energies, which makes the variance of the sum of their
        kernels least; equal with positions, where means over them take most of the
        variance of the largest block, random in sign, away.
        """
        blocks = len(energies)
        if self.seen == self.count:
            total = max(self.options.num_features - 1 - fixed, blocks)
        else:
            index = self.seen - 1
            total = blocks * _width(self.options, index, self.positions, positions)
        weights = np.maximum(energies, 1e-3 * max(sum(energies), 1e-30))
        if self.positions > 1:
            weights = np.ones(blocks)
        columns = np.floor(total * weights / weights.sum()).astype(int)
        if positions > 1:  # whole tiles of a processor, for a few columns less
            columns = np.where(columns < 64, columns, columns // 8 * 8)
        return tuple(int(n) for n in np.maximum(columns, 1))


def _width(options: Features, index: int, positions: int, left: int) -> int:
    if isinstance(options.width, tuple):
        return options.width[index] if options.width else options.num_features
    if options.width:
        return options.width
    if positions == 1:
        return max(64, options.num_features // 4)
    growth = math.sqrt(positions / max(left, 1))
    return max(8, min(options.num_features, int(options.num_features / 16 * growth)))


def functions(layer: _layers.Layer) -> list[_layers.Activation]:
    """All activations of a network, in the order in which they are applied."""
    if isinstance(layer, _layers.Activation):
        return [layer]
    if isinstance(layer, _layers.Serial | _layers.Parallel):
        return [f for inner in layer.layers for f in functions(inner)]
    return functions(layer.branch) if isinstance(layer, _layers.Residual) else []


@functools.singledispatch
def walk(layer: _layers.Layer, state: Any, build: _Build) -> Any:
    """Computes the features after a layer; a tuple of them where branches are open.

    Raises:
      ValueError: for a layer without features.
    """
    raise ValueError(f"layer must be one of snnk_jax.infinite. Got {layer!r}.")


@walk.register(_layers.Dense)
@walk.register(_layers.Conv)
def _(layer: Any, state: State, build: _Build) -> State:
    phi = _affine(_settled(state.phi, build), layer, bias=True)
    if state.psi is None:
        return State(phi, None)
    psi = _affine(_settled(state.psi, build), layer, bias=False)
    return State(phi, [*phi, *psi])


@walk.register
def _(layer: _layers.Activation, state: State, build: _Build) -> State:
    options = build.options
    if isinstance(layer.activation, _layers.NormalizedExponential):
        options = dataclasses.replace(options, method="sketch")
    build.seen += 1
    positions = math.prod(square_norm(state.phi).shape[1:])
    width = functools.partial(build.shares, positions)
    return State(*activate(layer, state.phi, state.psi, options, width, build.draw))


@walk.register
def _(layer: _layers.AvgPool, state: State, build: _Build) -> State:
    def pool(x: Array) -> Array:
        axes, strides = tuple(range(1, x.ndim - 1)), layer.strides
        assert strides is not None
        return _positions.window_mean(
            x, layer.window_shape, strides, layer.padding, axes
        )

    return _each(state, build, pool)


@walk.register
def _(layer: _layers.GlobalAvgPool, state: State, build: _Build) -> State:
    return _each(state, build, lambda x: jnp.mean(x, axis=tuple(range(1, x.ndim - 1))))


@walk.register
def _(layer: _layers.Flatten, state: State, build: _Build) -> State:
    def flatten(x: Array) -> Array:
        positions = math.prod(x.shape[1:-1])
        return x.reshape(len(x), -1) * positions**-0.5

    return _each(state, build, flatten)


@walk.register
def _(layer: _layers.LayerNorm, state: State, build: _Build) -> State:
    square = square_norm(state.phi)
    present = square > 0
    root = jnp.where(present, jax.lax.rsqrt(jnp.where(present, square, 1)), 0)
    total = sum((v.after for v in state.phi), 0.0)
    return _each(state, build, lambda x: x * root[..., None], 1 / max(total, 1e-30))


@walk.register
def _(layer: _layers.Identity, state: Any, build: _Build) -> Any:
    return state


@walk.register
def _(layer: _layers.FanOut, state: State, build: _Build) -> tuple[State, ...]:
    return (state,) * layer.num


@walk.register
def _(layer: _layers.FanInSum, state: tuple, build: _Build) -> State:
    return functools.reduce(_add, state)


@walk.register
def _(layer: _layers.Residual, state: State, build: _Build) -> State:
    return _add(state, walk(layer.branch, state, build))


@walk.register
def _(layer: _layers.Serial, state: Any, build: _Build) -> Any:
    for inner in layer.layers:
        state = walk(inner, state, build)
    return state


@walk.register
def _(layer: _layers.Parallel, state: tuple, build: _Build) -> tuple:
    branches = zip(layer.layers, state, strict=True)
    return tuple(walk(inner, branch, build) for inner, branch in branches)


def _affine(vectors: list[Vectors], layer: Any, bias: bool) -> list[Vectors]:
    """The layer still to be applied; one of the vectors brings its bias."""
    return [
        Vectors(v.array, layer, v.exact, bias and i == 0) for i, v in enumerate(vectors)
    ]


def _settled(vectors: list[Vectors], build: _Build) -> list[Vectors]:
    """Vectors whose layer has been applied, projected where that would be too wide."""
    result, wide = [], []
    for v in vectors:
        if v.layer is None:
            result.append(v)
        elif v.taps == 1 or v.width <= build.options.num_features:
            result.append(Vectors(explicit(v), exact=v.exact, energy=v.after))
        else:
            wide.append(v)
    if wide:
        m = build.options.num_features
        result.append(compress(wide, m, build.options, build.draw))
    return result


def _each(
    state: State, build: _Build, fn: Callable[[Array], Array], gain: float = 1.0
) -> State:
    """Applies a function to all features; the energy changes by the gain."""

    def apply(vectors: list[Vectors] | None) -> Any:
        if vectors is None:
            return None
        settled = _settled(vectors, build)
        return [
            dataclasses.replace(v, array=fn(v.array), energy=gain * v.energy)
            for v in settled
        ]

    return State(apply(state.phi), apply(state.psi))


def _add(one: State, other: State) -> State:
    if one.psi is None or other.psi is None:
        return State(one.phi + other.phi, None)
    return State(one.phi + other.phi, one.psi + other.psi)


def _fit(vectors: list[Vectors], build: _Build) -> Array:
    """Columns side by side, filled up with zeros or compressed to their number."""
    num = build.options.num_features
    if not vectors:
        raise ValueError("net must have a Dense or Conv for its NTK. Got none.")
    parts = [(explicit(v), v.exact) for v in vectors]
    total = sum(x.shape[-1] for x, _ in parts)
    kept = [x for x, exact in parts if exact]
    if 2 * sum(x.shape[-1] for x in kept) > num:
        kept = []
    if parts[0][0].ndim > 2:
        raise ValueError(
            "net must end without positions: Flatten or GlobalAvgPool is missing. "
            f"Got features of shape {parts[0][0].shape}."
        )
    if total > num:
        rest = [x for x, exact in parts if not (exact and kept)]
        wide = jnp.concatenate(rest, axis=-1)
        sketch = SRHT(num_features=num - sum(x.shape[-1] for x in kept))
        params = build.draw(lambda key: sketch.init(key, wide.shape[-1]))
        parts = [(x, True) for x in (*kept, sketch.apply(params, wide))]
    out = jnp.concatenate([x for x, _ in parts], axis=-1)
    return jnp.pad(out, [(0, 0), (0, num - out.shape[-1])])
