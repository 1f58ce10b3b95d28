"""The SNNK layer: a feature map and a trained readout."""

import jax.numpy as jnp
from flax import nnx

from snnk_jax._arguments import check_size
from snnk_jax.features import FeatureMap
from snnk_jax.nn._arguments import check_features, float_dtype
from snnk_jax.nn._linear import check_plain, sample_rows
from snnk_jax.nn._projection import Projection, projection_key
from snnk_jax.ops import contract
from snnk_jax.typing import Array, Dtype, Float

_READOUT_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class SNNKDense(nnx.Module):
    r"""Drop-in for Linear and activation: :math:`y = \Phi(x)\Psi + b`.

    Only the readout :math:`\Psi \in R^{m \times o}` and the bias are trained; the
    projection inside :math:`\Phi` is frozen. It costs ``2 m (d + o)`` operations an
    example instead of ``2 d o``.

    Args:
      in_features: d.
      out_features: o.
      features: the feature map.
      use_bias: add a trained bias (a further one: from_linear puts the bias of the
        Linear into the readout).
      dtype: computation dtype; None takes that of the inputs.
      param_dtype: storage dtype.
      readout_init: initialiser of the readout.
      bias_init: initialiser of the bias.
      rngs: random streams ``params`` and ``projection``.

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
      >>> fm = snnk.features.ArcCosine(num_features=64)
      >>> layer = snnk.nn.SNNKDense(768, 3072, features=fm, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 5, 768))).shape
      (2, 5, 3072)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        features: FeatureMap,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        readout_init: nnx.Initializer = _READOUT_INIT,
        bias_init: nnx.Initializer = _BIAS_INIT,
        rngs: nnx.Rngs,
    ):
        check_features(features, rngs)
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        param_dtype = float_dtype("param_dtype", param_dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = float_dtype("dtype", dtype)
        self.projection = Projection(
            features, in_features, key=projection_key(rngs), param_dtype=param_dtype
        )
        shape = (features.num_features, out_features)
        self.readout = nnx.Param(readout_init(rngs.params(), shape, param_dtype))
        bias = bias_init(rngs.params(), (out_features,), param_dtype)
        self.bias = nnx.Param(bias) if use_bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        *,
        features: FeatureMap,
        x: Float[Array, "*b d"] | None = None,
        rngs: nnx.Rngs,
    ) -> "SNNKDense":
        r"""Builds the layer that estimates ``f(linear(x))``.

        The readout is :math:`\Psi(W, b)` of the given weights, the extra bias is left
        out. The random directions are drawn from ``rngs.projection``.

        Args:
          linear: the pretrained layer.
          features: a map with :math:`E[\Phi\Psi] = f(xW + b)`.
          x: sample inputs of the layer, to which the map is balanced
            (:func:`snnk_jax.calibration.balance`); None leaves it as drawn.
          rngs: random stream ``projection``.

        Raises:
          ValueError: if ``linear`` is a subclass with a call of its own, has a bias
            that the feature map cannot carry, or ``x`` is given for a map that cannot
            be balanced, or has another width; for a Chain, which is no layer of x.

        Example:
          >>> import snnk_jax as snnk
          >>> from flax import nnx
          >>> linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
          >>> fm = snnk.features.URF(activation="cos", num_features=32)
          >>> snnk.nn.SNNKDense.from_linear(
          ...     linear, features=fm, rngs=nnx.Rngs(1)
          ... ).readout.shape
          (32, 4)
        """
        check_plain("linear", linear)
        rows = None if x is None else sample_rows(x, linear)
        layer = cls(
            linear.in_features,
            linear.out_features,
            features=features,
            use_bias=False,
            dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            readout_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )
        if rows is not None:
            layer.projection.balance(linear, rows)
        layer.readout[...] = layer.projection.psi(linear)
        return layer

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        if self.dtype is not None:
            x = x.astype(self.dtype)
        y = contract(
            self.projection(x),
            self.readout[...],
            precision=self.projection.features.precision,
        )
        if self.bias is None:
            return y
        bias = self.bias[...].astype(y.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
