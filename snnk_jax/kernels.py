"""Exact kernels between inputs and weights: what feature maps estimate.

Computed in float32 or wider, at the highest precision of matrix products, and rounded
once, to the dtype of the inputs.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from snnk_jax import activations
from snnk_jax.typing import Array, Float


def ffl(
    activation: str | activations.Activation | Callable[[Array], Array],
    x: Float[Array, "*b d"],
    kernel: Float[Array, "d o"],
    bias: Float[Array, " o"] | None = None,
) -> Float[Array, "*b o"]:
    r"""The feed-forward layer :math:`f(xW + b)`, read as a kernel.

    Args:
      activation: f, by name, row or function.
      x: inputs.
      kernel: weights W in Flax layout.
      bias: b, or None for zero.

    Raises:
      ValueError: if shapes do not fit or the activation is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> snnk.kernels.ffl("relu", jnp.array([1.0, -2.0]), jnp.eye(2))
      Array([1., 0.], dtype=float32)
    """
    z = _affine(x, kernel, bias)
    return _rounded(activations.get(activation)(z), x)


def exponential(
    x: Float[Array, "*b d"],
    kernel: Float[Array, "d o"],
    bias: Float[Array, " o"] | None = None,
) -> Float[Array, "*b o"]:
    r"""The exponential (softmax) kernel :math:`\exp(xW + b)`.

    Args:
      x: inputs.
      kernel: weights, one column per output.
      bias: b, or None for zero.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> snnk.kernels.exponential(jnp.zeros(2), jnp.eye(2))
      Array([1., 1.], dtype=float32)
    """
    return _rounded(jnp.exp(_affine(x, kernel, bias)), x)


def polynomial(
    coefficients: Sequence[float],
    x: Float[Array, "*b d"],
    kernel: Float[Array, "d o"],
    bias: Float[Array, " o"] | None = None,
) -> Float[Array, "*b o"]:
    r"""The polynomial :math:`\sum_j c_j (xW + b)^j`, by Horner's scheme.

    Args:
      coefficients: :math:`c_0, c_1, \dots`, lowest degree first.
      x: inputs.
      kernel: weights, one column per output.
      bias: b, or None for zero.

    Raises:
      ValueError: if shapes do not fit or there are no coefficients.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> snnk.kernels.polynomial((1.0, 0.0, 2.0), jnp.array([3.0]), jnp.eye(1))
      Array([19.], dtype=float32)
    """
    if not len(coefficients):
        raise ValueError("coefficients must be at least one number. Got none.")
    z = _affine(x, kernel, bias)
    return _rounded(activations.horner(z, *coefficients), x)


def arc_cosine(
    x: Float[Array, "*b d"],
    kernel: Float[Array, "d o"],
    order: int = 1,
    negative_slope: float = 0.0,
) -> Float[Array, "*b o"]:
    r"""The arc-cosine kernel :math:`K_n(x, w)` between inputs and weight columns.

    .. math::
      K_n(x, w) = 2 E_{g \sim N(0, I)}[\Theta(g^\top x)(g^\top x)^n
        \Theta(g^\top w)(g^\top w)^n]
        = \tfrac{1}{\pi} \lVert x\rVert^n \lVert w\rVert^n J_n(\alpha),

    with :math:`\alpha` the angle between x and w, :math:`J_0 = \pi - \alpha`,
    :math:`J_1 = \sin\alpha + (\pi - \alpha)\cos\alpha`,
    :math:`J_2 = 3\sin\alpha\cos\alpha + (\pi - \alpha)(1 + 2\cos^2\alpha)` and
    :math:`J_3 = 4\sin^3\alpha + 15\sin\alpha\cos^2\alpha +
    (\pi - \alpha)(9\cos\alpha + 6\cos^3\alpha)`
    (Cho and Saul, "Kernel Methods for Deep Learning", NIPS 2009). A zero input or
    weight has :math:`K_n = 0`.

    With a negative slope a the kernel of order 1 is that of the leaky ReLU
    :math:`\sigma(z) = (1 - a)\,\mathrm{relu}(z) + a z`,

    .. math::
      2 E_g[\sigma(g^\top x)\, \sigma(g^\top w)]
        = (1 - a)^2 K_1(x, w) + 2 a\, x^\top w.

    The angle comes from its cosine: where x and w are nearly parallel, order 0 keeps
    only half of the digits. The other orders are flat in the angle there.

    This is a function of its own, not an approximation of ``relu(x @ kernel)``.

    Args:
      x: inputs.
      kernel: weights, one column per output.
      order: n, one of 0, 1, 2, 3.
      negative_slope: a; other than zero for order 1 only.

    Raises:
      ValueError: if shapes do not fit, the order is another, or the slope is not
        finite or not zero for an order other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> x = jnp.array([3.0, 4.0])
      >>> snnk.kernels.arc_cosine(x, x[:, None], order=1)  # the squared norm
      Array([25.], dtype=float32)
    """
    check_layer(x, kernel, None)
    check_order(order, negative_slope)
    narrow, x, kernel = x, _widened(x), _widened(kernel)
    x_norm = _norm(x, axis=-1)[..., None]
    w_norm = _norm(kernel, axis=0)
    w_norm = w_norm.reshape((1,) * (x.ndim - 1) + w_norm.shape)
    scale = x_norm * w_norm
    present = scale > 0
    dot = jnp.matmul(x, kernel, precision="highest")
    cos = jnp.clip(dot / jnp.where(present, scale, 1), -1, 1)
    # sqrt has no derivative at 0, which parallel vectors reach: mask before, not after.
    square = 1 - cos * cos
    sin = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    rest = jnp.pi - jnp.arctan2(sin, cos)
    if order == 0:
        angular = rest
    elif order == 1:
        angular = sin + rest * cos
    elif order == 2:
        angular = 3 * sin * cos + rest * (1 + 2 * cos * cos)
    else:
        angular = sin * (4 + 11 * cos * cos) + rest * cos * (9 + 6 * cos * cos)
    value = jnp.where(present, scale**order * angular / jnp.pi, 0)
    if negative_slope:
        value = (1 - negative_slope) ** 2 * value + 2 * negative_slope * dot
    return _rounded(value, narrow)


def check_order(order: int, negative_slope: float = 0.0) -> None:
    """Raises ValueError unless there is an arc-cosine kernel of order and slope."""
    if order not in (0, 1, 2, 3):
        raise ValueError(f"order must be 0, 1, 2 or 3. Got {order}.")
    if not math.isfinite(negative_slope):
        raise ValueError(f"negative_slope must be finite. Got {negative_slope}.")
    if negative_slope and order != 1:
        raise ValueError(
            f"negative_slope must be 0 for order {order}. Got {negative_slope}."
        )


def check_layer(x: Array, kernel: Array, bias: Array | None) -> None:
    """Raises ValueError unless ``x @ kernel + bias`` is a layer."""
    if x.ndim < 1 or kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            "x must be [..., d] and kernel [d, o] with the same d. "
            f"Got {x.shape} and {kernel.shape}."
        )
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(f"bias must have shape {kernel.shape[1:]}. Got {bias.shape}.")


def _affine(x: Array, kernel: Array, bias: Array | None) -> Array:
    check_layer(x, kernel, bias)
    z = jnp.matmul(_widened(x), _widened(kernel), precision="highest")
    if bias is None:
        return z
    return z + _widened(bias).reshape((1,) * (z.ndim - 1) + bias.shape)


def _widened(values: Array) -> Array:
    """In float32 or wider, where exact kernels are computed: they round once."""
    real = jnp.issubdtype(values.dtype, jnp.floating)
    wide = real and jnp.finfo(values.dtype).bits >= 32
    return values if wide else values.astype(jnp.float32)


def _rounded(values: Array, like: Array) -> Array:
    """In the dtype of the inputs, unless they are whole numbers."""
    real = jnp.issubdtype(like.dtype, jnp.floating)
    return values.astype(jax.dtypes.canonicalize_dtype(like.dtype)) if real else values


def _norm(x: Array, axis: int) -> Array:
    """Euclidean norm with a zero gradient at zero."""
    square = jnp.sum(x * x, axis=axis)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
