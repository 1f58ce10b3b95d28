r"""Adapters of one Linear that can be merged into it: DoRA, VeRA and scaling (IA3).

LoRA itself is ``flax.nnx.LoRA``. All stand in the place of the ``nnx.Linear`` that they
keep as ``base_module``, are the identity at the start, and have a ``merged`` kernel.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from snnk_jax import projections
from snnk_jax._arguments import check_size
from snnk_jax.features._base import accumulation_dtype
from snnk_jax.nn._arguments import check_rngs, check_width, float_dtype
from snnk_jax.nn._linear import check_plain, wider
from snnk_jax.nn._projection import Drawn, projection_key
from snnk_jax.nn._variables import AdapterParam
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray


class DoRA(nnx.Module):
    r"""Weight-decomposed low-rank adaptation.

    .. math::
      y = \bigl(x (W + A B)\bigr) \odot \frac{g}{\lVert W + A B\rVert_c} + b

    with the norm of each column, through which no gradient flows (section 4.3 of the
    paper). A is ``[d, r]``, B ``[r, o]`` and zero at the start, g the norms of the
    columns of W: ``r (d + o) + o`` trained parameters. The matrix is made and measured
    in the wider of the dtypes of W and of the parameters. A column of zeros has no
    direction to keep, and stays zero.

    Args:
      base_module: the Linear.
      rank: r.
      param_dtype: storage dtype.
      rngs: random stream ``params``.

    Raises:
      ValueError: if ``rank`` is no whole number of at least 1, ``base_module`` no plain
        ``nnx.Linear``, ``rngs`` no random streams, or the dtype not floating; and for
        inputs of another width when it is called.

    References:
      Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> linear = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
      >>> snnk.nn.DoRA(linear, 2, rngs=nnx.Rngs(1))(jnp.ones((3, 4))).shape
      (3, 8)
    """

    def __init__(
        self,
        base_module: nnx.Linear,
        rank: int,
        *,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rngs(rngs)
        rank = check_size("rank", rank)
        param_dtype = float_dtype("param_dtype", param_dtype)
        check_plain("base_module", base_module)
        self.base_module = base_module
        self.rank = rank
        self.param_dtype = param_dtype
        dim, outputs = base_module.kernel.shape
        init = nnx.initializers.he_uniform()
        self.down = AdapterParam(init(rngs.params(), (dim, rank), param_dtype))
        self.up = AdapterParam(jnp.zeros((rank, outputs), param_dtype))
        kernel = base_module.kernel.get_value()
        # Of a model that is counted before it is loaded there are shapes alone.
        shape = jax.ShapeDtypeStruct((outputs,), param_dtype)
        known = not isinstance(kernel, jax.ShapeDtypeStruct)
        norms = _column_norms(kernel, param_dtype) if known else shape
        self.norms = AdapterParam(norms)

    def _direction(self) -> tuple[Float[Array, "d o"], Float[Array, " o"]]:
        """``W + A B`` and what its columns are multiplied by."""
        kernel = self.base_module.kernel[...]
        change = jnp.matmul(self.down[...], self.up[...])
        wide = wider(kernel.dtype, change.dtype)
        changed = kernel.astype(wide) + change.astype(wide)
        # Rounded like those they are compared with: equal at the start.
        norms = jax.lax.stop_gradient(_column_norms(changed, self.param_dtype))
        norms = jnp.where(norms > 0, norms, jnp.ones_like(norms))
        accurate = accumulation_dtype(wide)
        return changed, self.norms[...].astype(accurate) / norms.astype(accurate)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        base = self.base_module
        check_width(x, base.in_features)
        changed, scale = self._direction()
        dtype = base.dtype or jnp.promote_types(x.dtype, base.kernel.dtype)
        wanted = base.preferred_element_type
        y = base.dot_general(
            *(x.astype(dtype), changed.astype(dtype)),
            (((x.ndim - 1,), (0,)), ((), ())),
            precision=base.precision,
            **({} if wanted is None else {"preferred_element_type": wanted}),
        )
        y = y * _row(scale.astype(y.dtype), y)
        return y if base.bias is None else y + _row(base.bias[...].astype(y.dtype), y)

    def merged(self) -> tuple[Float[Array, "d o"], Float[Array, " o"] | None]:
        """Kernel and bias of the Linear that computes the same."""
        changed, scale = self._direction()
        kernel = changed.astype(scale.dtype) * scale[None]
        return kernel.astype(self.base_module.kernel.dtype), _bias(self.base_module)


class VectorBasis(Drawn):
    """The two frozen matrices of :class:`VeRA`.

    Entries of ``down`` ``[d, r]`` and ``up`` ``[r, o]`` are normal with variances
    ``1 / d`` and ``1 / r``. Equal keys and sizes draw equal matrices, so that all
    layers may have the same ones without sharing a variable.

    Args:
      dim: d.
      outputs: o.
      rank: r.
      key: key of the draw.
      param_dtype: storage dtype.
    """

    def __init__(
        self,
        dim: int,
        outputs: int,
        rank: int,
        *,
        key: PRNGKeyArray,
        param_dtype: Dtype = jnp.float32,
    ):
        self.dim = dim
        self.outputs = outputs
        self.rank = rank
        super().__init__(key, param_dtype)

    def draw(self, key: PRNGKeyArray) -> Params:
        """The matrices that a key stands for."""
        words = projections.streams(projections.key_words(key), 2)
        down = projections.normals(words[0], (self.dim, self.rank), self.param_dtype)
        up = projections.normals(words[1], (self.rank, self.outputs), self.param_dtype)
        return {"down": down / self.dim**0.5, "up": up / self.rank**0.5}


class VeRA(nnx.Module):
    r"""Vector-based random matrix adaptation.

    .. math::
      y = x W + b + \bigl((x A \odot c)\, B\bigr) \odot s

    with frozen random A ``[d, r]`` and B ``[r, o]``. Trained are c, 0.1 at the start,
    and s, zero: ``r + o`` parameters. It is a frozen linear feature map with a diagonal
    readout.

    Args:
      base_module: the Linear.
      rank: r, several hundred as a rule.
      param_dtype: storage dtype.
      rngs: random stream ``projection``.

    Raises:
      ValueError: if ``rank`` is no whole number of at least 1, ``base_module`` no plain
        ``nnx.Linear``, ``rngs`` no random streams, or the dtype not floating; and for
        inputs of another width when it is called.

    References:
      Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> linear = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
      >>> snnk.nn.VeRA(linear, 16, rngs=nnx.Rngs(1))(jnp.ones((3, 4))).shape
      (3, 8)
    """

    def __init__(
        self,
        base_module: nnx.Linear,
        rank: int,
        *,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rngs(rngs)
        rank = check_size("rank", rank)
        param_dtype = float_dtype("param_dtype", param_dtype)
        check_plain("base_module", base_module)
        self.base_module = base_module
        self.rank = rank
        self.param_dtype = param_dtype
        dim, outputs = base_module.kernel.shape
        self.basis = VectorBasis(
            dim, outputs, rank, key=projection_key(rngs), param_dtype=param_dtype
        )
        self.inner = AdapterParam(jnp.full((rank,), 0.1, param_dtype))
        self.outer = AdapterParam(jnp.zeros((outputs,), param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        check_width(x, self.base_module.in_features)
        y = self.base_module(x)
        values = {k: v.astype(y.dtype) for k, v in self.basis.params.items()}
        z = jnp.matmul(x.astype(y.dtype), values["down"])
        z = jnp.matmul(z * _row(self.inner[...].astype(y.dtype), z), values["up"])
        return y + z * _row(self.outer[...].astype(y.dtype), z)

    def merged(self) -> tuple[Float[Array, "d o"], Float[Array, " o"] | None]:
        """Kernel and bias of the Linear that computes the same."""
        down, up = (self.basis.params[name] for name in ("down", "up"))
        change = jnp.matmul(down * self.inner[...][None], up, precision="highest")
        change = change * self.outer[...][None]
        return add_change(self.base_module.kernel[...], change), _bias(self.base_module)


class Scaled(nnx.Module):
    r"""A Linear with one trained factor per input or output, as IA3 has them.

    .. math::
      y = (x W + b) \odot s \quad\text{or}\quad y = (x \odot s) W + b

    IA3 scales the outputs of keys and values, and what the second layer of a
    feed-forward block reads. s is one at the start: ``o`` or ``d`` parameters.

    Args:
      base_module: the Linear.
      where: ``"output"`` or ``"input"``.
      param_dtype: storage dtype.

    Raises:
      ValueError: for another ``where``, if ``base_module`` is no plain ``nnx.Linear``,
        or the dtype not floating; and for inputs of another width when it is called.

    References:
      Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
      In-Context Learning", arXiv 2205.05638.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> linear = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
      >>> snnk.nn.Scaled(linear, "output")(jnp.ones((3, 4))).shape
      (3, 8)
    """

    def __init__(
        self,
        base_module: nnx.Linear,
        where: Literal["output", "input"],
        *,
        param_dtype: Dtype = jnp.float32,
    ):
        if where not in ("output", "input"):
            raise ValueError(f"where must be 'output' or 'input'. Got {where!r}.")
        check_plain("base_module", base_module)
        param_dtype = float_dtype("param_dtype", param_dtype)
        self.base_module = base_module
        self.where = where
        self.param_dtype = param_dtype
        dim = base_module.kernel.shape[where == "output"]
        self.scale = AdapterParam(jnp.ones((dim,), param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        check_width(x, self.base_module.in_features)
        if self.where == "input":
            # Whole numbers, of one-hot inputs say, take the dtype of the factors.
            real = jnp.issubdtype(x.dtype, jnp.inexact)
            x = x if real else x.astype(self.scale.dtype)
            return self.base_module(x * _row(self.scale[...].astype(x.dtype), x))
        y = self.base_module(x)
        return y * _row(self.scale[...].astype(y.dtype), y)

    def merged(self) -> tuple[Float[Array, "d o"], Float[Array, " o"] | None]:
        """Kernel and bias of the Linear that computes the same."""
        kernel, bias = self.base_module.kernel[...], _bias(self.base_module)
        scale = self.scale[...]

        def product(a: Array, b: Array) -> Array:
            """Rounded once, to the dtype of the base."""
            wide = wider(a.dtype, b.dtype)
            return (a.astype(wide) * b.astype(wide)).astype(a.dtype)

        if self.where == "input":
            return product(kernel, scale[:, None]), bias
        scaled_bias = None if bias is None else product(bias, scale)
        return product(kernel, scale[None]), scaled_bias


def _column_norms(kernel: Float[Array, "d o"], dtype: Dtype) -> Float[Array, " o"]:
    accurate = kernel.astype(accumulation_dtype(kernel.dtype))
    return jnp.sqrt(jnp.sum(accurate * accurate, axis=0)).astype(dtype)


def add_change(
    kernel: Float[Array, "d o"], change: Float[Array, "d o"]
) -> Float[Array, "d o"]:
    """A kernel with its change, rounded once, to the dtype of the kernel."""
    wide = wider(kernel.dtype, change.dtype)
    return (kernel.astype(wide) + change.astype(wide)).astype(kernel.dtype)


def _bias(linear: nnx.Linear) -> Float[Array, " o"] | None:
    return None if linear.bias is None else linear.bias[...]


def _row(vector: Float[Array, " n"], like: Float[Array, "*b n"]) -> Array:
    """A vector with as many axes as an array: ranks are not promoted silently."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
