"""The weights as they are, fewer of them or in fewer bits."""

import dataclasses

import numpy as np

from snnk_jax.compression._blocks import Block
from snnk_jax.compression._methods import Fit, Method, Site
from snnk_jax.compression._modules import Int8Linear, linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """Keeps the largest weights of both matrices, the others zero.

    The size is the number of weights that are not zero; their places are not counted,
    and no FLOP is saved: the products stay dense.
    """

    least = 0

    def cost(self, block: Block, size: int) -> tuple[int, int]:
        return size + block.biases[0] * block.width + block.out, block.flops

    def largest(self, block: Block) -> int:
        return block.width * (block.dim + block.out)

    def fit(self, site: Site, size: int) -> Fit:
        pair = (site.first, site.second)
        kernels = [np.asarray(layer.kernel[...]) for layer in pair]
        flat = np.concatenate([kernel.ravel() for kernel in kernels])
        # Of equal ones the first are kept.
        flat[np.argsort(-np.abs(flat), kind="stable")[size:]] = 0
        names = (site.block.first, site.block.second)
        modules = {}
        for name, layer, kept in zip(
            names, pair, np.split(flat, [kernels[0].size]), strict=True
        ):
            bias = None if layer.bias is None else np.asarray(layer.bias[...])
            modules[name] = linear(layer, kept.reshape(layer.kernel.shape), bias)
        return Fit(modules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(Method):
    """Both matrices in 8 bits with a scale an output; a quarter of the bytes."""

    least = 0

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
