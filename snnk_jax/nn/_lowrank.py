r"""Adapters of one Linear that can be merged into it: DoRA, VeRA and scaling (IA3).

LoRA itself is ``flax.nnx.LoRA``. All stand in the place of the ``nnx.Linear`` that they
keep as ``base_module``, are the identity at the start, and have a ``merged`` kernel.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax import projections
from snnk_jax.features._base import accumulation_dtype
from snnk_jax.nn._linear import check_plain
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
      ValueError: if ``rank`` is below 1, or ``base_module`` no plain ``nnx.Linear``.

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
        if rank < 1:
            raise ValueError(f"rank must be at least 1. Got {rank}.")
        check_plain("base_module", base_module)
        self.base_module = base_module
        self.rank = rank
        self.param_dtype = param_dtype
        kernel = base_module.kernel[...]
        init = nnx.initializers.he_uniform()
        down = init(rngs.params(), (kernel.shape[0], rank), param_dtype)
        self.down = AdapterParam(down)
        self.up = AdapterParam(jnp.zeros((rank, kernel.shape[1]), param_dtype))
        self.norms = AdapterParam(_column_norms(kernel, param_dtype))

    def _direction(self) -> tuple[Float[Array, "d o"], Float[Array, " o"]]:
        """``W + A B`` and what its columns are multiplied by."""
        kernel = self.base_module.kernel[...]
        change = jnp.matmul(self.down[...], self.up[...])
        # NumPy's, which the switch for strict promotion leaves alone.
        wide = np.promote_types(kernel.dtype, change.dtype)
        changed = kernel.astype(wide) + change.astype(wide)
        # Rounded like those they are compared with: equal at the start.
        norms = jax.lax.stop_gradient(_column_norms(changed, self.param_dtype))
        norms = jnp.where(norms > 0, norms, jnp.ones_like(norms))
        accurate = accumulation_dtype(wide)
        return changed, self.norms[...].astype(accurate) / norms.astype(accurate)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        changed, scale = self._direction()
        kernel = self.base_module.kernel
        dtype = self.base_module.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        y = jnp.matmul(x.astype(dtype), changed.astype(dtype))
        y = y * _row(scale.astype(dtype), y)
        if self.base_module.bias is not None:
            y = y + _row(self.base_module.bias[...].astype(dtype), y)
        return y

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
      ValueError: if ``rank`` is below 1, or ``base_module`` no plain ``nnx.Linear``.

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
        if rank < 1:
            raise ValueError(f"rank must be at least 1. Got {rank}.")
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
        y = self.base_module(x)
        values = {k: v.astype(y.dtype) for k, v in self.basis.params.items()}
        z = jnp.matmul(x.astype(y.dtype), values["down"])
        z = jnp.matmul(z * _row(self.inner[...].astype(y.dtype), z), values["up"])
        return y + z * _row(self.outer[...].astype(y.dtype), z)

    def merged(self) -> tuple[Float[Array, "d o"], Float[Array, " o"] | None]:
        """Kernel and bias of the Linear that computes the same."""
        values = self.basis.params
        change = jnp.matmul(values["down"] * self.inner[...][None], values["up"])
        change = change * self.outer[...][None]
        kernel = self.base_module.kernel[...]
        return kernel + change.astype(kernel.dtype), _bias(self.base_module)


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
      ValueError: for another ``where``, or if ``base_module`` is no plain
        ``nnx.Linear``.

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
        self.base_module = base_module
        self.where = where
        self.param_dtype = param_dtype
        dim = base_module.kernel.shape[where == "output"]
        self.scale = AdapterParam(jnp.ones((dim,), param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        if self.where == "input":
            return self.base_module(x * _row(self.scale[...].astype(x.dtype), x))
        y = self.base_module(x)
        return y * _row(self.scale[...].astype(y.dtype), y)

    def merged(self) -> tuple[Float[Array, "d o"], Float[Array, " o"] | None]:
        """Kernel and bias of the Linear that computes the same."""
        kernel, bias = self.base_module.kernel[...], _bias(self.base_module)
        scale = self.scale[...].astype(kernel.dtype)
        if self.where == "input":
            return kernel * scale[:, None], bias
        return kernel * scale[None], None if bias is None else bias * scale


def _column_norms(kernel: Float[Array, "d o"], dtype: Dtype) -> Float[Array, " o"]:
    accurate = kernel.astype(accumulation_dtype(kernel.dtype))
    return jnp.sqrt(jnp.sum(accurate * accurate, axis=0)).astype(dtype)


def _bias(linear: nnx.Linear) -> Float[Array, " o"] | None:
    return None if linear.bias is None else linear.bias[...]


def _row(vector: Float[Array, " n"], like: Float[Array, "*b n"]) -> Array:
    """A vector with as many axes as an array: ranks are not promoted silently."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
