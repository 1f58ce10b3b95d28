r"""Bundling: a readout and the linear map behind it become one matrix.

A layer of random features is linear behind its feature map, so the next linear map
merges into its readout (:func:`merge_readout`). Where every layer is one of random
features the whole network becomes a feature map without trained parameters and a
single readout (:func:`bundle`).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax import calibration
from snnk_jax.features import AppendOne, ArcCosine, Chain, FeatureMap, TowerFeatures
from snnk_jax.kernels import check_layer
from snnk_jax.ops import contract
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray

# Isotropic inputs that stand in for samples, drawn once and for all.
_ROWS, _SEED = 64, 20231013


def merge_readout(
    psi: Float[Array, "m l"], next_kernel: Float[Array, "l o"]
) -> Float[Array, "m o"]:
    r"""Merges a readout with the linear map behind it: :math:`\Psi W`.

    With :func:`merge_bias` it is exact: :math:`(\Phi(x)\Psi + b) W + b' =
    \Phi(x)(\Psi W) + (b W + b')`. An SNNK layer and a Linear then cost
    ``2 m (d + o)`` operations an example in place of ``2 m (d + l) + 2 l o``.

    Args:
      psi: the readout :math:`\Psi` of the SNNK layer.
      next_kernel: the weights W of the Linear, in Flax layout.

    Returns:
      One matrix, accumulated in float32 or better, in the dtype of ``psi``.

    Raises:
      ValueError: if the widths differ.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> snnk.bundling.merge_readout(jnp.ones((64, 3072)), jnp.ones((3072, 768))).shape
      (64, 768)
    """
    # Done once: at the full precision of the dtype on every backend.
    return contract(psi, next_kernel, precision="highest")


def merge_bias(
    bias: Float[Array, " l"] | None,
    next_kernel: Float[Array, "l o"],
    next_bias: Float[Array, " o"] | None,
) -> Float[Array, " o"] | None:
    r"""The bias that belongs to :func:`merge_readout`: :math:`b W + b'`.

    Args:
      bias: what the SNNK layer adds behind its readout, or None. The bias of the layer
        that it replaced, inside the activation, is in :math:`\Psi` already.
      next_kernel: the weights W of the Linear.
      next_bias: the bias of the Linear, or None.

    Returns:
      The merged bias; None where there is none.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> snnk.bundling.merge_bias(jnp.ones(3), jnp.ones((3, 2)), jnp.ones(2))
      Array([4., 4.], dtype=float32)
    """
    check_layer(next_kernel.T, next_kernel, next_bias)
    if bias is None:
        return next_bias
    merged = contract(bias, next_kernel, precision="highest")
    return merged if next_bias is None else merged + next_bias.astype(merged.dtype)


@dataclasses.dataclass(frozen=True)
class Level:
    r"""What :func:`bundle` met and did at one level k.

    Attributes:
      frequency: the largest frequency s of the map; like ``kappa`` None for maps
        without exponentials.
      kappa: :math:`\kappa_k = s \lVert\Phi_{k-1}(x)\rVert \lVert T_k\rVert` before
        rescaling, of the mean norms over inputs and outputs.
      rescale: the factor :math:`\gamma \le 1` by which the argument of the activation
        was multiplied; 1 leaves the function as it is.
      input_norm: mean of :math:`\lVert\Phi_{k-1}(x)\rVert`.
      weight_norm: mean norm of the columns of :math:`T_k`, before rescaling.
    """

    frequency: float | None
    kappa: float | None
    rescale: float
    input_norm: float
    weight_norm: float


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sizes of a layer or network.

    Attributes:
      trained: numbers that are trained.
      frozen: numbers that are drawn once: a key stands for them in a file.
      flops: operations an example, two for each multiplication of a matrix product.
    """

    trained: int
    frozen: int
    flops: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.trained + other.trained,
            self.frozen + other.frozen,
            self.flops + other.flops,
        )


def counts(
    dim: int,
    outputs: int,
    num_features: Sequence[int] = (),
    *,
    directions: Sequence[int] | None = None,
    use_bias: bool = True,
) -> Counts:
    r"""Counts parameters and operations by formula.

    With d inputs, o outputs, :math:`m_1, \dots, m_L` features and :math:`m_0 = d`:

    ===================  ===========  ======================  ====================
    ``num_features``     trained      frozen                  FLOPs
    ===================  ===========  ======================  ====================
    ``()``               ``d o``      0                       ``2 d o``
    ``(m,)``             ``m o``      ``m d``                 ``2 m (d + o)``
    ``(m_1, ..., m_L)``  ``m_L o``    sum of ``m_k m_{k-1}``  twice the sum of both
    ===================  ===========  ======================  ====================

    The first is a Linear with an activation. The second is an SNNK layer; one merged
    with the Linear behind it is the same with the outputs of that Linear, whatever the
    width between them. The third is a bundled network.

    A bias behind adds o trained numbers. Random features make a layer cheaper iff
    ``m < d o / (d + o)``. Only matrix products are counted as operations.

    Args:
      dim: d.
      outputs: o.
      num_features: :math:`m_k` of each level.
      directions: random directions of each level, where they are not :math:`m_k`: a
        wave of a :class:`~snnk_jax.features.URF` has two columns for each.
      use_bias: count o biases.

    Raises:
      ValueError: for sizes below 1, or another number of directions than of levels.

    Example:
      >>> import snnk_jax as snnk
      >>> snnk.bundling.counts(768, 3072, use_bias=False)
      Counts(trained=2359296, frozen=0, flops=4718592)
      >>> snnk.bundling.counts(768, 768, (64,), use_bias=False)
      Counts(trained=49152, frozen=49152, flops=196608)
    """
    rows = num_features if directions is None else directions
    sizes = (dim, outputs, *num_features, *rows)
    if min(sizes) < 1 or len(rows) != len(num_features):
        raise ValueError(
            "dim, outputs, num_features and directions must be at least 1, the last "
            f"two of the same length. Got {dim}, {outputs}, {tuple(num_features)} and "
            f"{tuple(rows)}."
        )
    widths = (dim, *num_features)
    frozen = sum(n * m for n, m in zip(widths, rows, strict=False))
    readout = widths[-1] * outputs
    return Counts(
        trained=readout + (outputs if use_bias else 0),
        frozen=frozen,
        flops=2 * (readout + frozen),
    )


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Counts the operations of a function as XLA does, without running it.

    Unlike :func:`counts` it sees elementwise operations too.

    Args:
      fn: a function that :func:`jax.jit` takes.
      *args: its arguments, or :class:`jax.ShapeDtypeStruct` in their place.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> snnk.bundling.count_flops(jnp.dot, jnp.ones((1, 8)), jnp.ones((8, 3)))
      48
    """
    cost: Any = jax.jit(fn).lower(*args).cost_analysis()
    return int(cost["flops"])


@dataclasses.dataclass(frozen=True)
class BundledNet:
    r"""A network in two towers: :math:`\bar\Phi(x)\,\bar\Psi + b`; see :func:`bundle`.

    A pytree of ``params``, ``readout`` and ``bias``. Only the last two are meant to be
    trained, ``dataclasses.replace(net, readout=..., bias=...)`` puts others in.

    Attributes:
      features: :math:`\bar\Phi = \Phi_L \circ \dots \circ \Phi_1`.
      params: its frozen parameters.
      readout: :math:`\bar\Psi`, ``[m_L, o]``.
      bias: what is added behind, ``[o]``, or None.
      levels: what :func:`bundle` met at each level.
    """

    features: Chain
    params: Params
    # Arrays, or what a tree transformation puts in their place.
    readout: Any
    bias: Any
    levels: tuple[Level, ...]

    def phi(self, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        r"""The features :math:`\bar\Phi(x)`, which no trained number enters."""
        return self.features.phi(self.params, x)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        y = contract(self.phi(x), self.readout, precision=self.features.precision)
        if self.bias is None:
            return y
        return y + self.bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    def count(self, dim: int) -> Counts:
        """Counts arrays, and operations as XLA does, elementwise ones included.

        Args:
          dim: width of the inputs.

        Example:
          >>> import jax
          >>> import snnk_jax as snnk
          >>> fm = snnk.features.ArcCosine(num_features=64)
          >>> net = snnk.bundle([jax.numpy.ones((8, 3))], None, [fm], jax.random.key(0))
          >>> net.count(8).trained, net.count(8).frozen
          (192, 512)
        """
        x = jax.ShapeDtypeStruct((dim,), self.readout.dtype)
        bias = 0 if self.bias is None else self.bias.size
        return Counts(
            trained=self.readout.size + bias,
            frozen=sum(leaf.size for leaf in jax.tree.leaves(self.params)),
            flops=count_flops(type(self).__call__, self, x),
        )


jax.tree_util.register_dataclass(
    BundledNet,
    data_fields=["params", "readout", "bias"],
    meta_fields=["features", "levels"],
)


def bundle(
    kernels: Sequence[Float[Array, "_ _"]],
    biases: Sequence[Float[Array, " _"] | None] | None,
    feature_maps: Sequence[FeatureMap],
    key: PRNGKeyArray,
    *,
    x: Float[Array, "n d"] | float = 1.0,
    max_kappa: float = 10.0,
    rescale: bool = False,
) -> BundledNet:
    r"""Bundles a network :math:`f_L(\dots f_1(x W_1 + b_1) \dots W_L + b_L)` whole.

    .. math::
      T_1 = W_1, \qquad \Psi_k = \Psi_{f_k}(T_k, b_k), \qquad
      T_{k+1} = \Psi_k W_{k+1},

    so that with :math:`\bar\Phi = \Phi_L \circ \dots \circ \Phi_1` the output is
    :math:`\bar\Phi(x)\Psi_L`: two towers, one of the inputs alone, one of the weights
    alone. A last linear layer merges into the readout, :math:`\Psi_L W_{L+1}`. It has
    ``o m_L`` trained numbers in place of all the weights (:func:`counts`).

    **Bundling is no approximation of a deep network.** One level is an unbiased
    estimate of its layer. From the second on, :math:`\Phi_k` estimates the kernel of
    :math:`f_k` between the *features* :math:`\Phi_{k-1}(x)` and :math:`T_k`, whose
    product is only a noisy copy of the pre-activations: nonlinear functions of it are
    biased, and kernels that depend on norms, as arc-cosine ones do, are others even in
    the limit of many features: two levels of 32 units are off by more than half of the
    function's size, three by three quarters, at 512 features as at 2048. Train the
    readout, or solve for it in closed form.

    Exponential-type maps (:class:`~snnk_jax.features.URF`,
    :class:`~snnk_jax.features.Exponential`) moreover raise
    :math:`\kappa_k = s \lVert\Phi_{k-1}(x)\rVert \lVert T_k\rVert` from level to level,
    to about :math:`e^{\kappa_k} \lVert w_{k+1}\rVert`, until they overflow; their
    second moments go as :math:`e^{2\kappa}`. A map whose ``scale`` is None therefore
    gets the balanced :math:`c^2 = \lVert T_k\rVert / \lVert\Phi_{k-1}(x)\rVert`, which
    changes the noise and not the estimate, and one with ``shrinkage`` the features of
    the inputs as references; and :math:`\kappa_k` is held below ``max_kappa``.
    :class:`~snnk_jax.features.ArcCosine` keeps norms and needs no such guard. With a
    bias it stands in an
    :class:`~snnk_jax.features.AppendOne`. All of this looks at the values of the
    arrays: it does not run under ``jax.jit``, what it returns does.

    Args:
      kernels: :math:`W_1, \dots, W_L` in Flax layout, and :math:`W_{L+1}` of a last
        linear layer where there is one.
      biases: one for each kernel, or None for any or all of them.
      feature_maps: a map for each of the L activations.
      key: key of all random directions, drawn as
        ``net.features.init(key, d)`` does.
      x: sample inputs on which the levels are judged, or the norm of isotropic ones.
      max_kappa: largest :math:`\kappa` that a level may have; infinite for no limit.
      rescale: where a level has a larger one, multiply the argument of its activation,
        :math:`T_k` and :math:`b_k`, by :math:`\gamma = \kappa_{max} / \kappa_k`
        instead of raising. The level is then one of :math:`z \mapsto f_k(\gamma z)`,
        **another function**, flatter by :math:`\gamma`; ``net.levels[k - 1].rescale``
        tells.

    Returns:
      The network, with a report of each level in ``net.levels``.

    Raises:
      ValueError: if shapes or numbers do not fit; naming the level, if its
        :math:`\kappa` is above ``max_kappa`` without ``rescale`` or its features or
        readout are not finite.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225.

    Example:
      The two towers with a readout solved for in closed form (:mod:`snnk_jax.ridge`
      streams it, for any number of rows, and adds an intercept for ``bias``):

      >>> import dataclasses
      >>> import jax
      >>> import snnk_jax as snnk
      >>> kernels = [jax.numpy.eye(8), jax.numpy.ones((8, 2))]
      >>> maps = [snnk.features.ArcCosine(num_features=256)] * 2
      >>> net = snnk.bundle(kernels, None, maps, jax.random.key(0))
      >>> x = jax.random.normal(jax.random.key(1), (500, 8))
      >>> y = jax.numpy.abs(x[:, :2])
      >>> readout, _ = snnk.calibration.fit_linear(net.phi(x), y)
      >>> net = dataclasses.replace(net, readout=readout)
      >>> net(x).shape, bool(((net(x) - y) ** 2).mean() < 0.1 * y.var())
      ((500, 2), True)
    """
    biases = [None] * len(kernels) if biases is None else biases
    _check_network(kernels, biases, feature_maps)
    if not max_kappa > 0:
        raise ValueError(f"max_kappa must be positive. Got {max_kappa}.")
    dim, dtype = kernels[0].shape[0], kernels[0].dtype
    hidden = _inputs(x, dim, dtype)
    chain = Chain(
        tuple(
            AppendOne(fm) if isinstance(fm, ArcCosine) and bias is not None else fm
            for fm, bias in zip(feature_maps, biases, strict=False)
        )
    )
    params = dict(chain.init(key, dim, dtype))
    readout, levels = jnp.eye(dim, dtype=dtype), []
    for i, (fm, bias) in enumerate(zip(chain.maps, biases, strict=False)):
        prefix = f"map{i}_"
        part = {
            name.removeprefix(prefix): value
            for name, value in params.items()
            if name.startswith(prefix)
        }
        kernel = merge_readout(readout, kernels[i]) if i else kernels[0]
        level = _level(fm, part, hidden, kernel)
        if level.kappa is not None and level.kappa > max_kappa:
            if not rescale:
                raise ValueError(_too_large(i, level, max_kappa))
            level = dataclasses.replace(level, rescale=max_kappa / level.kappa)
            kernel = level.rescale * kernel
            bias = None if bias is None else level.rescale * bias
        part = _tuned(fm, part, hidden, level)
        readout, hidden = fm.psi(part, kernel, bias), fm.phi(part, hidden)
        if not (np.all(np.isfinite(readout)) and np.all(np.isfinite(hidden))):
            raise ValueError(
                f"features and readout must be finite. Got inf or NaN at level {i + 1} "
                f"of {len(chain.maps)}, {_sizes(level)}. Scale the inputs or the "
                "weights down, or take ArcCosine, which keeps norms."
            )
        params |= {prefix + name: value for name, value in part.items()}
        levels.append(level)
    last_bias = None
    if len(kernels) > len(levels):
        readout, last_bias = merge_readout(readout, kernels[-1]), biases[-1]
    return BundledNet(chain, params, readout, last_bias, tuple(levels))


def _check_network(
    kernels: Sequence[Array],
    biases: Sequence[Array | None],
    feature_maps: Sequence[FeatureMap],
) -> None:
    if not feature_maps or len(kernels) - len(feature_maps) not in (0, 1):
        raise ValueError(
            "kernels must be as many as feature_maps, at least one, or one more for a "
            f"last linear layer. Got {len(kernels)} and {len(feature_maps)}."
        )
    if len(biases) != len(kernels):
        raise ValueError(
            "biases must be None or one for each kernel. "
            f"Got {len(biases)} for {len(kernels)} kernels."
        )
    shapes = [kernel.shape for kernel in kernels]
    fits = all(len(shape) == 2 for shape in shapes)
    if not fits or any(a[1] != b[0] for a, b in itertools.pairwise(shapes)):
        raise ValueError(
            f"kernels must be matrices [in, out], each after the other. Got {shapes}."
        )
    if len({kernel.dtype for kernel in kernels}) > 1:
        raise ValueError(
            "kernels must be of one dtype. "
            f"Got {', '.join(str(kernel.dtype) for kernel in kernels)}."
        )
    for kernel, bias in zip(kernels, biases, strict=True):
        check_layer(kernel.T, kernel, bias)


def _inputs(x: Array | float, dim: int, dtype: Dtype) -> Array:
    """The samples, or isotropic inputs of the norm."""
    if np.ndim(x):
        samples = jnp.asarray(x, dtype)
        if samples.ndim != 2 or samples.shape[1] != dim or not len(samples):
            raise ValueError(f"x must be samples [n, {dim}]. Got {samples.shape}.")
        if not np.all(np.isfinite(samples)):
            raise ValueError("x must be finite. Got inf or NaN among the samples.")
        return samples
    if not 0 < x < math.inf:
        raise ValueError(f"x must be samples or a positive finite norm. Got {x}.")
    normals = np.random.default_rng(_SEED).normal(size=(_ROWS, dim))
    normals *= x / np.linalg.norm(normals, axis=1, keepdims=True)
    return jnp.asarray(normals, dtype)


def _level(fm: FeatureMap, part: Params, hidden: Array, kernel: Array) -> Level:
    inputs = np.linalg.norm(np.asarray(hidden, np.float64), axis=1)
    weights = np.linalg.norm(np.asarray(kernel, np.float64), axis=0)
    input_norm, weight_norm = float(inputs.mean()), float(weights.mean())
    frequency = kappa = None
    if isinstance(fm, TowerFeatures):
        rates = part.get("rates", fm.terms.rates)
        frequency = float(np.max(np.asarray(rates, np.float64)))
        kappa = frequency * input_norm * weight_norm
    return Level(frequency, kappa, 1.0, input_norm, weight_norm)


def _tuned(fm: FeatureMap, part: Params, hidden: Array, level: Level) -> Params:
    """Balances a scale that was left open; references are the inputs of the level."""
    if not isinstance(fm, TowerFeatures):
        return part
    sizes = level.rescale * level.weight_norm, level.input_norm
    if fm.scale is None and min(sizes) > 0:
        scale = jnp.asarray(math.sqrt(sizes[0] / sizes[1]), part["scale"].dtype)
        part = part | {"scale": scale}
    return calibration.set_references(fm, part, hidden) if fm.shrinkage else part


def _sizes(level: Level) -> str:
    norms = f"|Φ| {level.input_norm:.3g} and |T| {level.weight_norm:.3g}"
    if level.kappa is None:
        return f"where {norms}"
    return f"where kappa {level.kappa:.3g}, frequency {level.frequency:.3g}, {norms}"


def _too_large(index: int, level: Level, max_kappa: float) -> str:
    return (
        f"kappa must be at most {max_kappa:g} at every level: features have second "
        f"moments of e^(2 kappa). Got level {index + 1}, {_sizes(level)}. Scale the "
        "inputs or the weights down, take ArcCosine, which keeps norms, or pass "
        "rescale=True for flatter activations."
    )
