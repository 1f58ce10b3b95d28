"""Layers of infinitely wide networks: values that say what a layer is.

A layer is a frozen dataclass that hashes by value and holds no arrays. What it does to
kernels, variances and features stands in :mod:`._kernel` and :mod:`._features`, one
function a layer.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from snnk_jax import activations
from snnk_jax._arguments import check_size
from snnk_jax.typing import Array

if TYPE_CHECKING:
    import jax

    from snnk_jax.infinite._kernel import Kernels

Padding = Literal["SAME", "VALID", "CIRCULAR"]
PADDINGS = ("SAME", "VALID", "CIRCULAR")
GET = ("nngp", "ntk")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer, or a network of them, of infinite width."""

    def kernel(
        self,
        x1: Array,
        x2: Array | None = None,
        get: str | Sequence[str] = GET,
        *,
        batch_size: int | None = None,
        mesh: "jax.sharding.Mesh | None" = None,
    ) -> "Kernels | Array":
        """Computes the exact kernels, see :func:`snnk_jax.infinite.kernel`."""
        from snnk_jax.infinite import _kernel

        return _kernel.kernel(self, x1, x2, get, batch_size=batch_size, mesh=mesh)

    def features(self, num_features: int, **options: Any) -> Any:
        """Builds the feature map, see :func:`snnk_jax.infinite.features`."""
        from snnk_jax.infinite import _features

        return _features.features(self, num_features, **options)


@dataclasses.dataclass(frozen=True)
class Dense(Layer):
    r"""A fully connected layer in the NTK parameterisation.

    .. math:: y = \tfrac{w\_std}{\sqrt{d}} W x + b\_std\, b, \qquad W, b \sim N(0, 1)

    so that :math:`K \leftarrow w\_std^2 K + b\_std^2` and
    :math:`\Theta \leftarrow K + w\_std^2 \Theta` with the new K.

    Args:
      w_std: scale of the weights.
      b_std: scale of the bias.

    Raises:
      ValueError: for a scale that is negative or not finite.
    """

    w_std: float = 1.0
    b_std: float = 0.0

    def __post_init__(self):
        _check_scales(self)


@dataclasses.dataclass(frozen=True)
class NormalizedExponential:
    r"""The dual of the normalised exponential kernel; no function of width one has it.

    .. math:: k(p, q, r) = \sqrt{p r}\, e^{\gamma (\rho - 1)}, \qquad
      \dot k = \gamma e^{\gamma (\rho - 1)}, \qquad \rho = q / \sqrt{p r}

    It takes the place of an activation, ``Activation(NormalizedExponential())``.

    Args:
      gamma: :math:`\gamma`.

    Raises:
      ValueError: for a gamma that is not positive and finite.

    References:
      Shankar et al., "Neural Kernels Without Tangents", arXiv 2003.02237.
    """

    gamma: float = 1.0

    def __post_init__(self):
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be positive and finite. Got {self.gamma}.")
        object.__setattr__(self, "gamma", float(self.gamma))


@dataclasses.dataclass(frozen=True)
class Activation(Layer):
    r"""A function applied to each unit.

    It turns K into :math:`k = E[\sigma(u) \sigma(v)]` and multiplies the NTK by
    :math:`\dot k = E[\sigma'(u) \sigma'(v)]`, for Gaussian u, v with the variances and
    covariance of the layer below.

    Args:
      activation: a name, a row of ``snnk_jax.activations``, a function or a
        :class:`NormalizedExponential`.
      jumps: whether the derivative of a jump is a delta function. By default it is
        zero, as for a network that is trained by gradient descent, so the NTK of
        ``sign`` and ``step`` keeps only the layers above.

    Raises:
      ValueError: for an unknown activation.
    """

    activation: activations.Activation | NormalizedExponential
    jumps: bool = False

    def __init__(
        self,
        activation: str
        | activations.Activation
        | NormalizedExponential
        | Callable[[Array], Array],
        jumps: bool = False,
    ):
        if not isinstance(activation, NormalizedExponential):
            activation = activations.get(activation)
        object.__setattr__(self, "activation", activation)
        object.__setattr__(self, "jumps", bool(jumps))


@dataclasses.dataclass(frozen=True)
class Conv(Layer):
    r"""A convolution in the NTK parameterisation.

    As :class:`Dense` with K and :math:`\Theta` averaged over the positions of the
    filter; positions outside of the image are zeros, also in the average.

    Args:
      filter_shape: extent along each spatial axis.
      strides: steps along each spatial axis; None for ones.
      padding: ``"SAME"``, ``"VALID"`` or ``"CIRCULAR"``.
      w_std: scale of the weights.
      b_std: scale of the bias.

    Raises:
      ValueError: for shapes that are not positive or do not fit each other, an unknown
        padding, or a scale that is negative or not finite.
    """

    filter_shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    padding: Padding = "SAME"
    w_std: float = 1.0
    b_std: float = 0.0

    def __post_init__(self):
        _check_window(self, "filter_shape", default_stride=1)
        _check_scales(self)


@dataclasses.dataclass(frozen=True)
class AvgPool(Layer):
    """The mean over windows; positions outside of the image are zeros in it.

    Args:
      window_shape: extent along each spatial axis.
      strides: steps along each spatial axis; None for the window, which then tiles.
      padding: ``"SAME"``, ``"VALID"`` or ``"CIRCULAR"``.

    Raises:
      ValueError: for shapes that are not positive or do not fit each other, or an
        unknown padding.
    """

    window_shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    padding: Padding = "VALID"

    def __post_init__(self):
        _check_window(self, "window_shape", default_stride=None)


@dataclasses.dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """The mean over all positions."""


@dataclasses.dataclass(frozen=True)
class Flatten(Layer):
    """Puts all positions side by side."""


@dataclasses.dataclass(frozen=True)
class LayerNorm(Layer):
    """Divides each position by the root mean square of its channels.

    The mean of the channels, which layer normalisation takes away, is zero for
    pre-activations of infinite width.
    """


@dataclasses.dataclass(frozen=True)
class Identity(Layer):
    """Changes nothing."""


@dataclasses.dataclass(frozen=True)
class FanOut(Layer):
    """Copies its input for the branches of a :func:`parallel` that follows.

    Args:
      num: how many copies.

    Raises:
      ValueError: for anything but a whole number of at least 1.
    """

    num: int

    def __post_init__(self):
        object.__setattr__(self, "num", check_size("num", self.num))


@dataclasses.dataclass(frozen=True)
class FanInSum(Layer):
    """Adds the branches of the :func:`parallel` before it."""


@dataclasses.dataclass(frozen=True)
class Residual(Layer):
    """The input plus the output of a branch.

    Args:
      branch: a network that keeps shapes and holds a Dense or Conv after its last
        activation.
    """

    branch: Layer

    def __post_init__(self):
        _check_layers("branch", (self.branch,))


@dataclasses.dataclass(frozen=True)
class Serial(Layer):
    """Layers one after the other, see :func:`serial`."""

    layers: tuple[Layer, ...]

    def __post_init__(self):
        _check_layers("layers", self.layers)


@dataclasses.dataclass(frozen=True)
class Parallel(Layer):
    """Layers side by side, see :func:`parallel`."""

    layers: tuple[Layer, ...]

    def __post_init__(self):
        _check_layers("layers", self.layers)


def serial(*layers: Layer) -> Serial:
    """Composes layers, the first one first.

    Raises:
      ValueError: for something that is not a layer, or none.

    Example:
      >>> import snnk_jax as snnk
      >>> net = snnk.infinite.serial(
      ...     snnk.infinite.Dense(w_std=1.5, b_std=0.1),
      ...     snnk.infinite.Activation("gelu"),
      ...     snnk.infinite.Dense(),
      ... )
      >>> len(net.layers)
      3
    """
    flat: list[Layer] = []
    for layer in layers:
        flat += layer.layers if isinstance(layer, Serial) else (layer,)
    return Serial(tuple(flat))


def parallel(*layers: Layer) -> Parallel:
    """Applies each layer to its own copy of the input, which a :class:`FanOut` makes.

    Raises:
      ValueError: for something that is not a layer, or none.

    Example:
      >>> import snnk_jax as snnk
      >>> block = snnk.infinite.serial(
      ...     snnk.infinite.FanOut(2),
      ...     snnk.infinite.parallel(snnk.infinite.Identity(), snnk.infinite.Dense()),
      ...     snnk.infinite.FanInSum(),
      ... )
      >>> len(block.layers)
      3
    """
    return Parallel(tuple(layers))


def pools(layer: Layer) -> bool:
    """Whether a layer mixes positions of its input with a mean, not a filter."""
    if isinstance(layer, Serial | Parallel):
        return any(pools(inner) for inner in layer.layers)
    if isinstance(layer, Residual):
        return pools(layer.branch)
    return isinstance(layer, AvgPool | GlobalAvgPool)


class _Flow(NamedTuple):
    """What is known of the units at one place of a network.

    Attributes:
      gaussian: whether they are Gaussian.
      fresh: for each open fan-out, the innermost last, whether weights lie between.
    """

    gaussian: bool
    fresh: tuple[bool, ...] = ()


def check_map(net: Any, kind: Any) -> None:
    """Raises ValueError unless a feature map can be of this network and kernel."""
    if not isinstance(net, Layer):
        raise ValueError(f"net must be a layer of infinite. Got {net!r}.")
    if kind not in GET:
        raise ValueError(f"kind must be 'ntk' or 'nngp'. Got {kind!r}.")
    check_network(net)


def check_network(layer: Layer) -> None:
    """Raises ValueError unless the kernel of a network has the formulas of its layers.

    An activation takes Gaussian units of one variance, so a Dense or Conv comes before
    it, and no Flatten between. Branches that are added are independent: all but one
    hold a Dense or Conv of their own after their last activation.
    """
    flow = _flow(layer, _Flow(gaussian=False))
    if isinstance(flow, list):
        raise ValueError("network must end in one branch: FanInSum is missing.")


def _flow(layer: Layer, flow: Any) -> Any:
    if isinstance(layer, Serial):
        return functools.reduce(lambda f, inner: _flow(inner, f), layer.layers, flow)
    if isinstance(layer, Parallel):
        if not isinstance(flow, list) or len(flow) != len(layer.layers):
            raise ValueError(
                f"parallel must follow a FanOut({len(layer.layers)}), one copy for "
                "each of its layers."
            )
        return [_flow(*pair) for pair in zip(layer.layers, flow, strict=True)]
    if isinstance(layer, FanInSum):
        return _summed(layer, flow)
    if isinstance(flow, list):
        raise ValueError(
            f"layer must stand in a parallel while branches are open. Got {layer!r}."
        )
    if isinstance(layer, FanOut):
        return [flow._replace(fresh=(*flow.fresh, False))] * layer.num
    if isinstance(layer, Residual):
        start = flow._replace(fresh=(*flow.fresh, False))
        return _summed(layer, [start, _flow(layer.branch, start)])
    if isinstance(layer, Dense | Conv):
        return _Flow(gaussian=True, fresh=(True,) * len(flow.fresh))
    if isinstance(layer, Activation):
        if not flow.gaussian:
            raise ValueError(
                f"{layer!r} must come after a Dense or Conv, with no other activation "
                "and no Flatten between."
            )
        return _Flow(gaussian=False, fresh=(False,) * len(flow.fresh))
    if isinstance(layer, Flatten):
        # The units of each position have a variance of their own.
        return flow._replace(gaussian=False)
    return flow


def _summed(layer: Layer, flow: Any) -> _Flow:
    if not isinstance(flow, list) or any(isinstance(f, list) for f in flow):
        raise ValueError(f"{layer!r} must follow the branches of one parallel.")
    if sum(not branch.fresh[-1] for branch in flow) > 1:
        raise ValueError(
            f"branches of {layer!r} must be independent: all but one must hold a Dense "
            "or Conv after their last activation."
        )
    outer = zip(*(branch.fresh[:-1] for branch in flow), strict=True)
    return _Flow(
        gaussian=all(branch.gaussian for branch in flow),
        fresh=tuple(all(marks) for marks in outer),
    )


def _check_scales(layer: Any) -> None:
    for name in ("w_std", "b_std"):
        value = getattr(layer, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0. Got {value}.")
        object.__setattr__(layer, name, float(value))


def _check_window(layer: Any, name: str, default_stride: int | None) -> None:
    shape, strides = _integers(getattr(layer, name)), layer.strides
    if not shape or min(shape) < 1:
        raise ValueError(
            f"{name} must be positive integers. Got {getattr(layer, name)}."
        )
    if strides is None:
        strides = shape if default_stride is None else (default_stride,) * len(shape)
    given, strides = strides, _integers(strides)
    if len(strides) != len(shape) or min(strides) < 1:
        raise ValueError(
            f"strides must be positive integers, one for each of {name} {shape}. "
            f"Got {given}."
        )
    if layer.padding not in PADDINGS:
        raise ValueError(
            f"padding must be one of {', '.join(PADDINGS)}. Got {layer.padding!r}."
        )
    object.__setattr__(layer, name, shape)
    object.__setattr__(layer, "strides", strides)


def _integers(values: Any) -> tuple[int, ...]:
    """The values as integers; none of them if one is no integer."""
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        return ()


def _check_layers(name: str, layers: Any) -> None:
    if not isinstance(layers, tuple) or not layers:
        raise ValueError(f"{name} must be at least one layer. Got {layers!r}.")
    for layer in layers:
        if not isinstance(layer, Layer):
            raise ValueError(
                f"{name} must be layers of snnk_jax.infinite. Got {layer!r}."
            )
