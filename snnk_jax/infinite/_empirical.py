"""Kernels of a finite network at given parameters, by Jacobian products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from snnk_jax.infinite import _layers
from snnk_jax.infinite._kernel import Kernels
from snnk_jax.typing import Array, Float, Params

Apply = Callable[[Params, Array], Array]


def empirical(
    apply: Apply,
    params: Params,
    x1: Float[Array, "n1 ..."],
    x2: Float[Array, "n2 ..."] | None = None,
    get: str | Sequence[str] = _layers.GET,
    *,
    full: bool = False,
    batch_size: int = 64,
) -> Any:
    r"""Computes the kernels of a finite network at its current parameters.

    With outputs f of o components and parameters :math:`\theta`,

    .. math:: \hat K = \frac{1}{o} \sum_k f_k(x) f_k(x'), \qquad
      \hat\Theta = \frac{1}{o} \sum_k \nabla_\theta f_k(x) \cdot
      \nabla_\theta f_k(x').

    The Jacobians are never stored: a row of one (a product of a vector with a
    Jacobian) goes straight into the other (a Jacobian with a vector). The memory is
    that of ``batch_size`` copies of the parameters.

    Args:
      apply: the pure function ``apply(params, x)`` to outputs [n, o]. It must treat
        examples apart, and be the same object at each call, or it compiles again.
      params: a tree of floating-point arrays, those the tangent kernel is over.
      x1: inputs.
      x2: other inputs; None for ``x1``.
      get: ``"nngp"``, ``"ntk"`` or a sequence of them.
      full: whether to keep the outputs apart, for kernels [n1, n2, o, o].
      batch_size: examples of x1, and rows of the Jacobian of x2, at a time.

    Returns:
      The matrix for a single name, otherwise :class:`Kernels`.

    Raises:
      ValueError: for no inputs, outputs that are not [n, o], parameters that are not
        floating-point, an unknown kernel or a batch size below 1.

    Example:
      A Flax model is split into its parameters and a pure function first.

      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import snnk_jax as snnk
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> graph, params, rest = nnx.split(model, nnx.Param, ...)
      >>> def apply(params, x):
      ...     return nnx.merge(graph, params, rest)(x)
      >>> x = jnp.ones((4, 3))
      >>> snnk.infinite.empirical(apply, params, x, get="ntk")[0, 1]  # 3 and the bias
      Array(4., dtype=float32)

    References:
      Novak, Sohl-Dickstein and Schoenholz, "Fast finite width neural tangent kernel",
      arXiv 2206.08720, section 3.2.
    """
    names = (get,) if isinstance(get, str) else tuple(get)
    if not names or any(name not in _layers.GET for name in names):
        raise ValueError(f"get must name nngp, ntk or both. Got {get!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1. Got {batch_size}.")
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"params must be floating-point. Got {leaf!r}.")
    other = x1 if x2 is None else x2
    for name, x in (("x1", x1), ("x2", other)):
        if not len(x):
            raise ValueError(f"{name} must hold inputs. Got shape {x.shape}.")
    shape = jax.eval_shape(apply, params, x1).shape
    if len(shape) != 2 or shape[0] != len(x1):
        raise ValueError(f"outputs must be [n, o]. Got {shape} for {len(x1)} inputs.")
    compute = {"nngp": _nngp, "ntk": _ntk}
    values = []
    for name in names:
        rows = [
            compute[name](
                apply, full, batch_size, params, x1[i : i + batch_size], other
            )
            for i in range(0, len(x1), batch_size)
        ]
        values.append(jnp.concatenate(rows))
    if isinstance(get, str):
        return values[0]
    return Kernels(**dict(zip(names, values, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _nngp(
    apply: Apply, full: bool, batch_size: int, params: Params, x1: Array, x2: Array
) -> Array:
    left = apply(params, x1)
    right = jax.lax.map(lambda x: apply(params, x[None])[0], x2, batch_size=batch_size)
    if full:
        return jnp.einsum("ik,jl->ijkl", left, right)
    return left @ right.T / left.shape[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _ntk(
    apply: Apply, full: bool, batch_size: int, params: Params, x1: Array, x2: Array
) -> Array:
    outputs, push = jax.linearize(lambda p: apply(p, x1), params)
    num = outputs.shape[1]

    def column(x: Array, k: Array) -> Array:
        """Of the row k of the Jacobian of x with all of x1: [n1, o], or its k."""
        _, pull = jax.vjp(lambda p: apply(p, x[None])[0], params)
        (row,) = pull(jax.nn.one_hot(k, num, dtype=outputs.dtype))
        return push(row) if full else push(row)[:, k]

    index = jnp.arange(len(x2) * num)
    columns = jax.lax.map(
        lambda i: column(x2[i // num], i % num), index, batch_size=batch_size
    )
    if full:  # [n2, o2, n1, o1]
        columns = columns.reshape((len(x2), num, len(x1), num))
        return jnp.transpose(columns, (2, 0, 3, 1))
    return jnp.mean(columns.reshape((len(x2), num, len(x1))), axis=1).T
