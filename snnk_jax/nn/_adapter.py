"""Adapters: small trained modules behind a frozen one."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax import activations
from snnk_jax._arguments import check_number, check_size
from snnk_jax.features import FeatureMap
from snnk_jax.features._base import accumulation_dtype
from snnk_jax.nn._arguments import (
    check_features,
    check_inputs,
    check_rngs,
    float_dtype,
)
from snnk_jax.nn._projection import Projection, projection_key
from snnk_jax.nn._variables import AdapterParam, InputStatistic
from snnk_jax.ops import contract
from snnk_jax.typing import Array, Dtype, Float


class Adapted(nnx.Module):
    r"""Calls a module and an adapter behind it or beside it.

    Behind, :math:`y = a(f(x))`: the placement of Houlsby (after attention and
    feed-forward block) and of Pfeiffer (after the latter), or after a whole block.
    Beside, :math:`y = f(x) + \delta(x)` with the adapter's own :math:`\delta`, what it
    adds to its input.

    Args:
      base_module: any module.
      adapter: applied to what the module returns, or to its first argument.
      parallel: put it beside the module; it must have a method ``delta``.

    Raises:
      ValueError: if the module or the adapter cannot be called; if the adapter cannot
        stand beside a module, when it is made or, for want of width, when it is called.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> linear = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
      >>> adapter = snnk.nn.BottleneckAdapter(8, 2, rngs=nnx.Rngs(1))
      >>> snnk.nn.Adapted(linear, adapter)(jnp.ones((3, 4))).shape
      (3, 8)
    """

    def __init__(
        self, base_module: nnx.Module, adapter: nnx.Module, *, parallel: bool = False
    ):
        for name, part in (("base_module", base_module), ("adapter", adapter)):
            if not callable(part):
                raise ValueError(f"{name} must be a module to call. Got {part!r}.")
        if parallel and not hasattr(adapter, "delta"):
            raise ValueError(
                "a parallel adapter must have a method delta. "
                f"Got {type(adapter).__name__}."
            )
        self.base_module = base_module
        self.adapter = adapter
        self.parallel = parallel

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        # The only place that passes arguments through: it stands in for any module.
        y: Any = self.base_module(x, *args, **kwargs)
        if not self.parallel:
            return self.adapter(y)
        adapter: Any = self.adapter
        delta = adapter.delta(x)
        shape = getattr(y, "shape", f"a {type(y).__name__}")
        if delta.shape != shape:
            raise ValueError(
                "a parallel adapter must have the shape of what it is added to, "
                f"{shape}. Got {delta.shape}."
            )
        return y + delta.astype(y.dtype)


class SNNKAdapter(nnx.Module):
    r"""Adapter with a frozen feature map and one trained matrix.

    .. math::
      y = x + v \odot \Phi(\hat x)\Psi, \qquad \hat x = x / \lVert x\rVert

    :math:`\Psi \in R^{m \times d}` starts at zero and the modulating vector v at one:
    the adapter is the identity at the start and :math:`\Psi` gets a gradient in the
    first step. (The paper's code starts the other way round, v at zero, and
    :math:`\Psi` stands still in the first step.) It trains ``(m + 1) d`` parameters.

    With ``rank`` k the readout is the product of two matrices, ``[m, k]`` and
    ``[k, d]``, the latter zero at the start: ``k (m + d)`` parameters (and d for v)
    pay for many more features, so that a learned bottleneck of k units reads all of
    the input instead of m random directions of it.

    Args:
      dim: d, width of the inputs and outputs.
      features: the feature map.
      normalize: map :math:`\hat x` instead of x. Hidden states have norms around
        :math:`\sqrt d`, at which exponential features overflow and the step size of
        every layer would differ.
      standardize: map :math:`(x - \mu) / \sigma` instead of x, both of each coordinate
        and measured by :func:`standardize`; 0 and 1 until then. A coordinate that is
        far larger than the others, as the last blocks of encoders have some, would
        otherwise decide every feature.
      rank: k; None trains a full readout.
      modulate: train v; without it v is one.
      train_projection: train the parameters of the feature map as well.
      dtype: computation dtype of the features; None takes that of the inputs.
      param_dtype: storage dtype; of :math:`\mu` and :math:`\sigma` float32 or wider.
      rngs: random streams ``projection``, and ``params`` where ``rank`` is given.

    Raises:
      ValueError: if sizes are no whole numbers of at least 1, ``features`` is no
        feature map, a dtype not floating, ``rngs`` no random streams; and for inputs of
        another width when it is called.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> fm = snnk.features.ArcCosine(num_features=16)
      >>> adapter = snnk.nn.SNNKAdapter(768, features=fm, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 768))
      >>> bool((adapter(x) == x).all())
      True
    """

    def __init__(
        self,
        dim: int,
        *,
        features: FeatureMap,
        normalize: bool = True,
        standardize: bool = False,
        rank: int | None = None,
        modulate: bool = True,
        train_projection: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_features(features, rngs)
        dim = check_size("dim", dim)
        rank = None if rank is None else check_size("rank", rank)
        dtype = float_dtype("dtype", dtype)
        param_dtype = float_dtype("param_dtype", param_dtype)
        self.dim = dim
        self.rank = rank
        self.normalize = normalize
        self.standardize = standardize
        self.modulate = modulate
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.projection = Projection(
            features,
            dim,
            key=projection_key(rngs),
            param_dtype=param_dtype,
            trainable=train_projection,
        )
        num_features = features.num_features
        if rank is None:
            readout = jnp.zeros((num_features, dim), param_dtype)
        else:
            init = nnx.initializers.lecun_normal()
            readout = init(rngs.params(), (num_features, rank), param_dtype)
        self.readout = AdapterParam(readout)
        up = None if rank is None else AdapterParam(jnp.zeros((rank, dim), param_dtype))
        self.up = up
        modulation = jnp.ones((dim,), param_dtype)
        self.modulation = AdapterParam(modulation) if modulate else None
        statistics = (jnp.zeros, jnp.ones) if standardize else ()
        # Inputs far from zero lose all that tells them apart when they are rounded.
        wide = accumulation_dtype(param_dtype)
        self.statistics = nnx.List(
            [InputStatistic(make((dim,), wide)) for make in statistics]
        )

    def phi(self, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """The features of its inputs, scaled as the adapter scales them."""
        check_inputs(x, self.dim)
        z = x
        if self.standardize:
            shape = (1,) * (x.ndim - 1) + (self.dim,)
            mean, deviation = (v[...].reshape(shape) for v in self.statistics)
            # NumPy's, which the switch for strict promotion leaves alone.
            wide = np.promote_types(x.dtype, mean.dtype)
            z = (x.astype(wide) - mean.astype(wide)) / deviation.astype(wide)
        z = z.astype(x.dtype if self.dtype is None else self.dtype)
        if self.normalize:
            z = _unit(z)
        return self.projection(z)

    def delta(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """What the adapter adds."""
        precision = self.projection.features.precision
        y = contract(self.phi(x), self.readout[...], precision=precision)
        if self.up is not None:
            y = contract(y, self.up[...], precision=precision)
        if self.modulation is not None:
            v = self.modulation[...].astype(y.dtype)
            y = y * v.reshape((1,) * (y.ndim - 1) + v.shape)
        return y.astype(x.dtype)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return x + self.delta(x)


class BottleneckAdapter(nnx.Module):
    r"""The adapter of Houlsby et al.: :math:`y = x + s (f(xA + a)B + b)`.

    A is ``[d, r]``, B is ``[r, d]`` and starts at zero with b, so the adapter is the
    identity at the start. It trains ``2 d r + r + d`` parameters. Houlsby and Pfeiffer
    adapters are this module in different places: after attention and feed-forward
    block, or after the feed-forward block alone. AdaptFormer is this module with ReLU
    and s = 0.1, in parallel to the feed-forward block.

    Args:
      dim: d.
      bottleneck: r.
      activation: f, see :func:`snnk_jax.activations.get`.
      scale: s, fixed.
      dtype: computation dtype; None takes that of the inputs.
      param_dtype: storage dtype.
      rngs: random stream ``params``.

    Raises:
      ValueError: if sizes are no whole numbers of at least 1, ``scale`` is not finite,
        a dtype not floating, ``rngs`` no random streams; and for inputs of another
        width when it is called.

    References:
      Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv
      1902.00751; Pfeiffer et al., "AdapterFusion", arXiv 2005.00247; Chen et al.,
      "AdaptFormer", arXiv 2205.13535.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> adapter = snnk.nn.BottleneckAdapter(768, 48, rngs=nnx.Rngs(0))
      >>> adapter(jnp.ones((2, 768))).shape
      (2, 768)
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        *,
        activation: str | activations.Activation | Callable[[Array], Array] = "gelu",
        scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rngs(rngs)
        dim = check_size("dim", dim)
        bottleneck = check_size("bottleneck", bottleneck)
        scale = check_number("scale", scale)
        dtype = float_dtype("dtype", dtype)
        param_dtype = float_dtype("param_dtype", param_dtype)
        self.dim = dim
        self.bottleneck = bottleneck
        self.activation = activations.get(activation)
        self.scale = scale
        self.dtype = dtype
        self.param_dtype = param_dtype
        key = rngs.params()
        down = nnx.initializers.lecun_normal()(key, (dim, bottleneck), param_dtype)
        self.down_kernel = AdapterParam(down)
        self.down_bias = AdapterParam(jnp.zeros((bottleneck,), param_dtype))
        self.up_kernel = AdapterParam(jnp.zeros((bottleneck, dim), param_dtype))
        self.up_bias = AdapterParam(jnp.zeros((dim,), param_dtype))

    def delta(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """What the adapter adds."""
        check_inputs(x, self.dim)
        dtype = x.dtype if self.dtype is None else self.dtype

        def linear(z: Array, kernel: AdapterParam, bias: AdapterParam) -> Array:
            z = jnp.matmul(z, kernel[...].astype(dtype))
            return z + bias[...].astype(dtype).reshape((1,) * (z.ndim - 1) + (-1,))

        hidden = linear(x.astype(dtype), self.down_kernel, self.down_bias)
        y = linear(self.activation(hidden), self.up_kernel, self.up_bias)
        return (self.scale * y).astype(x.dtype)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return x + self.delta(x)


def _unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Scales to norm one; zero stays zero, with a finite gradient."""
    accurate = x.astype(accumulation_dtype(x.dtype))
    square = jnp.sum(accurate * accurate, axis=-1, keepdims=True)
    return (accurate / jnp.sqrt(jnp.where(square > 0, square, 1))).astype(x.dtype)
