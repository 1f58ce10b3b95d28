"""Random features in the place of a block."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from snnk_jax.calibration import balance
from snnk_jax.compression._blocks import Block
from snnk_jax.compression._methods import Fit, Method, Site, need_whole, solve, values
from snnk_jax.compression._modules import Beside, linear
from snnk_jax.features import AppendOne, Chain, FeatureMap, TowerFeatures
from snnk_jax.nn import SNNKMlp

# Rows to which a random feature map is balanced.
_BALANCED = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features(Method):
    r"""Random features of a map, read out by one matrix.

    The size replaces the map's ``num_features``.

    Args:
      features: the map. Its directions are drawn from a key, which a file of
        :func:`~snnk_jax.compression.save` names instead of holding them.
      readout: ``"fit"`` solves for it; ``"psi"`` takes the paper's
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
        if not _has_size(self.features):
            raise ValueError(
                "features must be a map whose num_features can be chosen. "
                f"Got {self.features!r}."
            )
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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _feature_columns(
    features: FeatureMap, with_inputs: bool, params: Any, x: Any, h: Any
) -> Any:
    phi = features.phi(params, x)
    return jnp.concatenate([phi, x.astype(phi.dtype)], axis=1) if with_inputs else phi


def _has_size(features: Any) -> bool:
    if isinstance(features, AppendOne):
        return _has_size(features.features)
    return isinstance(features, FeatureMap) and not isinstance(features, Chain)


def resized(features: FeatureMap, size: int) -> FeatureMap:
    """The map with another ``num_features``."""
    if isinstance(features, AppendOne):
        return AppendOne(resized(features.features, size))
    return dataclasses.replace(features, num_features=size)
