"""Stacks of SNNK layers with the linear maps between them merged."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from snnk_jax import projections
from snnk_jax.bundling import Counts, count_flops, merge_bias, merge_readout
from snnk_jax.features import AppendOne, ArcCosine, FeatureMap
from snnk_jax.nn._arguments import float_dtype
from snnk_jax.nn._dense import SNNKDense
from snnk_jax.nn._linear import is_plain
from snnk_jax.nn._projection import Projection
from snnk_jax.nn._variables import RandomProjection
from snnk_jax.ops import contract
from snnk_jax.typing import Array, Dtype, Float


class FoldedFeatures(nnx.Module):
    r"""Arc-cosine features of an affine map, :math:`\Phi(xA + a)`, by one matrix.

    The matrix is trained, though one of its two factors was frozen: the product is all
    that is kept. A bias is its last row.

    Args:
      features: :math:`\Phi`, an :class:`~snnk_jax.features.ArcCosine`.
      omega: its directions, ``[m, l]``.
      kernel: A, ``[n, l]``.
      bias: a, ``[l]``, or None.
    """

    def __init__(
        self,
        features: FeatureMap,
        omega: Float[Array, "m l"],
        kernel: Float[Array, "n l"],
        bias: Float[Array, " l"] | None,
    ):
        folded = merge_readout(kernel, omega.T)
        if bias is not None:
            offset = contract(bias, omega.T, precision="highest")
            folded = jnp.concatenate([folded, offset[None, :].astype(folded.dtype)])
        self.features = features if bias is None else AppendOne(features)
        self.kernel = nnx.Param(folded)

    def __call__(self, x: Float[Array, "*b n"]) -> Float[Array, "*b m"]:
        return self.features.phi({"omega": self.kernel[...].T}, x)


class BundledStack(nnx.Module):
    """Feature maps one after the other and a readout; see :func:`bundle_stack`.

    Args:
      stages: the feature maps as modules.
      readout: ``[m, o]``.
      bias: ``[o]``, or None.
      dtype: computation dtype; None takes that of the inputs.
    """

    def __init__(
        self,
        stages: Sequence[Projection | FoldedFeatures],
        readout: Float[Array, "m o"],
        bias: Float[Array, " o"] | None,
        *,
        dtype: Dtype | None = None,
    ):
        self.stages = nnx.List(stages)
        self.readout = nnx.Param(readout)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        if self.dtype is not None:
            x = x.astype(self.dtype)
        for stage in self.stages:
            x = stage(x)
        precision = self.stages[-1].features.precision
        y = contract(x, self.readout[...], precision=precision)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(y.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


@dataclasses.dataclass(frozen=True)
class StackReport:
    """What :func:`bundle_stack` saved, by counting arrays and operations.

    Attributes:
      before: of the modules one after the other.
      after: of the bundled stack.
    """

    before: Counts
    after: Counts


def bundle_stack(
    modules: Sequence[SNNKDense | nnx.Linear],
) -> tuple[BundledStack, StackReport]:
    r"""Merges the linear maps of a stack of SNNK layers and Linears, exactly.

    Between two nonlinearities everything is affine: a readout :math:`\Psi_k` with its
    bias :math:`b_k`, Linears, and the directions :math:`\Omega_{k+1}` of the next
    layer. They become one matrix,

    .. math::
      \Omega_{k+1}(\Psi_k^\top \phi + b_k) = (\Omega_{k+1}\Psi_k^\top)\,\phi
        + \Omega_{k+1} b_k,

    and the stack returns the same numbers up to rounding, in the dtype of its inputs
    (a Linear of wider parameters would have widened them). Where :math:`\Psi_k` goes
    from :math:`m_k` features to :math:`l_k` outputs that takes
    :math:`m_k m_{k+1}` multiplications in place of :math:`m_k l_k + l_k m_{k+1}`:
    fewer for wide layers, more for narrow ones. The report tells which.

    This needs features of :math:`\Omega x` alone, those of
    :class:`~snnk_jax.features.ArcCosine`. Exponential maps also read
    :math:`\lVert x\rVert^2`, which takes the vector x of width :math:`l_k`; they may
    come first. Unlike :func:`snnk_jax.bundling.bundle`
    nothing is approximated, and the products of readouts and directions are trained.

    Args:
      modules: :class:`SNNKDense` and ``nnx.Linear``, applied in this order with
        nothing between them, at least one of the former.

    Returns:
      A module of its own, which shares no variable with the others, and its report.

    Raises:
      ValueError: for other modules, widths or dtypes that do not fit, or a feature map
        behind another module that is not an arc-cosine one.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> fm = snnk.features.ArcCosine(num_features=64)
      >>> rngs = nnx.Rngs(0)
      >>> up = snnk.nn.SNNKDense(768, 3072, features=fm, rngs=rngs)
      >>> stack, report = snnk.nn.bundle_stack([up, nnx.Linear(3072, 768, rngs=rngs)])
      >>> stack(jnp.ones((2, 768))).shape
      (2, 768)
      >>> report.after.flops < 0.05 * report.before.flops
      True
    """
    _check_modules(modules)
    stages: list[Projection | FoldedFeatures] = []
    kernel = bias = None  # of all that is affine since the last features
    for module in modules:
        own_bias = None if module.bias is None else module.bias[...]
        if isinstance(module, SNNKDense):
            projection = module.projection
            if kernel is None:
                stages.append(nnx.clone(projection))
            else:
                omega = projections.matrix(projection.params)
                stages.append(FoldedFeatures(projection.features, omega, kernel, bias))
            kernel, bias = module.readout[...], own_bias
        elif kernel is None:
            kernel, bias = module.kernel[...], own_bias
        else:
            bias = merge_bias(bias, module.kernel[...], own_bias)
            kernel = merge_readout(kernel, module.kernel[...])
    assert kernel is not None
    stack = BundledStack(stages, kernel, bias, dtype=modules[0].dtype)
    dim = modules[0].in_features
    parts = [_count(module, module.in_features) for module in modules]
    return stack, StackReport(sum(parts, Counts(0, 0, 0)), _count(stack, dim))


def _check_modules(modules: Sequence[SNNKDense | nnx.Linear]) -> None:
    kinds = [type(module).__name__ for module in modules]
    known = all(isinstance(m, SNNKDense) or is_plain(m) for m in modules)
    if not known or not any(isinstance(module, SNNKDense) for module in modules):
        raise ValueError(
            "modules must be SNNKDense and nnx.Linear, at least one SNNKDense. "
            f"Got {', '.join(kinds) or 'none'}."
        )
    widths = [(module.in_features, module.out_features) for module in modules]
    if any(a[1] != b[0] for a, b in itertools.pairwise(widths)):
        raise ValueError(
            f"modules must read what the one before writes. Got widths {widths}."
        )
    dtypes = {float_dtype("dtype", module.dtype) for module in modules}
    if len(dtypes) > 1:
        raise ValueError(f"modules must compute in one dtype. Got {dtypes}.")
    for index, module in enumerate(modules[1:], start=1):
        if isinstance(module, SNNKDense):
            features = module.projection.features
            if not isinstance(features, ArcCosine):
                raise ValueError(
                    f"features behind another module must be ArcCosine, which reads "
                    f"its inputs x by Ω x alone. Got {type(features).__name__} in "
                    f"module {index}; exponential maps also read |x|², which takes "
                    f"all {module.in_features} inputs. Bundle the parts around it."
                )


def _count(module: SNNKDense | nnx.Linear | BundledStack, dim: int) -> Counts:
    random = nnx.to_flat_state(nnx.state(module, RandomProjection))
    params = jax.tree.leaves(nnx.state(module, nnx.Param))
    x = jax.ShapeDtypeStruct((1, dim), module.dtype or jnp.float32)
    return Counts(
        trained=sum(leaf.size for leaf in params),
        frozen=sum(value[...].size for path, value in random if path[-1] != "key"),
        flops=count_flops(lambda module, x: module(x), module, x),
    )
