"""What stands in for a feed-forward block or one of its Linears."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax.typing import Array, Dtype, Float


class Int8Linear(nnx.Module):
    r"""Linear map with its kernel in 8 bits, one scale an output.

    :math:`y = (x K) \odot s + b` with integers :math:`K` in [-127, 127].

    Args:
      in_features: d.
      out_features: o.
      use_bias: whether there is a bias.
      dtype: computation dtype; None takes that of the inputs.
      param_dtype: storage dtype of scales and bias.
      precision: of the product, as for ``nnx.Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
    ):
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision = precision
        self.kernel = nnx.Variable(jnp.zeros((in_features, out_features), jnp.int8))
        self.scale = nnx.Variable(jnp.zeros(out_features, param_dtype))
        bias = jnp.zeros(out_features, param_dtype)
        self.bias = nnx.Param(bias) if use_bias else None

    @classmethod
    def from_linear(cls, linear: nnx.Linear) -> "Int8Linear":
        """Rounds a Linear to the nearest, the largest weight of an output to 127."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            use_bias=linear.bias is not None,
            dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            precision=linear.precision,
        )
        kernel = np.asarray(linear.kernel[...], np.float32)
        scale = np.maximum(np.abs(kernel).max(axis=0), np.finfo(np.float32).tiny) / 127
        layer.kernel[...] = jnp.asarray(np.rint(kernel / scale), jnp.int8)
        layer.scale[...] = jnp.asarray(scale, linear.param_dtype)
        if layer.bias is not None and linear.bias is not None:
            layer.bias[...] = linear.bias[...]
        return layer

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        if self.dtype is not None:
            x = x.astype(self.dtype)
        kernel = self.kernel[...].astype(x.dtype)
        y = jnp.matmul(x, kernel, precision=self.precision)
        y = y * _like(self.scale[...], y)
        return y if self.bias is None else y + _like(self.bias[...], y)


class Beside(nnx.Module):
    """The sum of two modules of the same input: features beside a linear path.

    Args:
      first: a module.
      second: another one.
    """

    def __init__(self, first: nnx.Module, second: nnx.Module):
        self.first, self.second = first, second

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        first, second = self.first, self.second
        return first(x) + second(x)


def _like(vector: Array, y: Array) -> Array:
    return vector.astype(y.dtype).reshape((1,) * (y.ndim - 1) + vector.shape)


def linear(like: nnx.Linear, kernel: np.ndarray, bias: np.ndarray | None) -> nnx.Linear:
    """A Linear with these values and the dtypes and precision of another."""
    new = nnx.Linear(
        *kernel.shape,
        use_bias=bias is not None,
        dtype=like.dtype,
        param_dtype=like.param_dtype,
        precision=like.precision,
        kernel_init=nnx.initializers.zeros_init(),
        rngs=nnx.Rngs(0),
    )
    new.kernel[...] = jnp.asarray(kernel, like.param_dtype)
    if new.bias is not None and bias is not None:
        new.bias[...] = jnp.asarray(bias, like.param_dtype)
    return new


def low_rank(
    like: nnx.Linear, a: np.ndarray, b: np.ndarray, bias: np.ndarray | None
) -> nnx.Sequential:
    """A Linear of a rank: two of them in a row."""
    return nnx.Sequential(linear(like, a, None), linear(like, b, bias))
