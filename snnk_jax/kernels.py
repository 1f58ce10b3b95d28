"""Exact kernels between inputs and weights: what feature maps estimate."""

from collections.abc import Callable

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
    check_layer(x, kernel, bias)
    z = jnp.matmul(x, kernel)
    if bias is not None:
        z = z + bias.reshape((1,) * (z.ndim - 1) + bias.shape)
    return activations.get(activation)(z)


def arc_cosine(
    x: Float[Array, "*b d"], kernel: Float[Array, "d o"], order: int = 1
) -> Float[Array, "*b o"]:
    r"""The arc-cosine kernel :math:`K_n(x, w)` between inputs and weight columns.

    .. math::
      K_n(x, w) = 2 E_{g \sim N(0, I)}[\Theta(g^\top x)(g^\top x)^n
        \Theta(g^\top w)(g^\top w)^n]
        = \tfrac{1}{\pi} \lVert x\rVert^n \lVert w\rVert^n J_n(\alpha),

    with :math:`\alpha` the angle between x and w, :math:`J_0 = \pi - \alpha`,
    :math:`J_1 = \sin\alpha + (\pi - \alpha)\cos\alpha` and
    :math:`J_2 = 3\sin\alpha\cos\alpha + (\pi - \alpha)(1 + 2\cos^2\alpha)`
    (Cho and Saul, "Kernel Methods for Deep Learning", NIPS 2009). A zero input or
    weight has :math:`K_n = 0`.

    This is a function of its own, not an approximation of ``relu(x @ kernel)``.

    Args:
      x: inputs.
      kernel: weights, one column per output.
      order: n, one of 0, 1, 2.

    Raises:
      ValueError: if shapes do not fit or the order is another.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> x = jnp.array([3.0, 4.0])
      >>> snnk.kernels.arc_cosine(x, x[:, None], order=1)  # the squared norm
      Array([25.], dtype=float32)
    """
    check_layer(x, kernel, None)
    check_order(order)
    x_norm = _norm(x, axis=-1)[..., None]
    w_norm = _norm(kernel, axis=0)
    w_norm = w_norm.reshape((1,) * (x.ndim - 1) + w_norm.shape)
    scale = x_norm * w_norm
    present = scale > 0
    cos = jnp.matmul(x, kernel) / jnp.where(present, scale, 1)
    cos = jnp.clip(cos, -1, 1)
    # sqrt has no derivative at 0, which parallel vectors reach: mask before, not after.
    square = 1 - cos * cos
    sin = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    rest = jnp.pi - jnp.arctan2(sin, cos)
    if order == 0:
        angular = rest
    elif order == 1:
        angular = sin + rest * cos
    else:
        angular = 3 * sin * cos + rest * (1 + 2 * cos * cos)
    return jnp.where(present, scale**order * angular / jnp.pi, 0)


def check_order(order: int) -> None:
    """Raises ValueError unless the arc-cosine order is 0, 1 or 2."""
    if order not in (0, 1, 2):
        raise ValueError(f"order must be 0, 1 or 2. Got {order}.")


def check_layer(x: Array, kernel: Array, bias: Array | None) -> None:
    """Raises ValueError unless ``x @ kernel + bias`` is a layer."""
    if x.ndim < 1 or kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            "x must be [..., d] and kernel [d, o] with the same d. "
            f"Got {x.shape} and {kernel.shape}."
        )
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(f"bias must have shape {kernel.shape[1:]}. Got {bias.shape}.")


def _norm(x: Array, axis: int) -> Array:
    """Euclidean norm with a zero gradient at zero."""
    square = jnp.sum(x * x, axis=axis)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
