"""The feed-forward block as a feature map and one matrix."""

from flax import nnx

from snnk_jax.bundling import merge_readout
from snnk_jax.features import FeatureMap
from snnk_jax.nn._dense import SNNKDense
from snnk_jax.nn._linear import is_plain, sample_rows
from snnk_jax.typing import Array, Float


class SNNKMlp(SNNKDense):
    r"""Stands for Linear, activation, Linear: :math:`y = \Phi(x) M + b`.

    It is an :class:`SNNKDense` whose readout is that of the first Linear merged with
    the second, :math:`M = \Psi(W_1, b_1) W_2`: a block of width m whose first layer is
    random and frozen. The hidden width is gone: ``m d_out`` trained numbers and
    ``2 m (d + d_out)`` operations an example in place of ``2 l (d + d_out)``, fewer
    where m is below l.

    See :class:`SNNKDense` for the arguments, :meth:`from_mlp` for the block of a
    pretrained model.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225
      (bundling).

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> fm = snnk.features.ArcCosine(num_features=64)
      >>> block = snnk.nn.SNNKMlp(768, 768, features=fm, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 768))).shape
      (2, 768)
    """

    @classmethod
    def from_mlp(
        cls,
        mlp: nnx.Module,
        *,
        features: FeatureMap,
        first: str = "fc1",
        second: str = "fc2",
        x: Float[Array, "*b d"] | None = None,
        rngs: nnx.Rngs,
    ) -> "SNNKMlp":
        r"""Builds the block that estimates ``second(f(first(x)))``.

        The second layer is linear: what is unbiased for ``f(first(x))`` stays so.

        Args:
          mlp: the pretrained block.
          features: a map with :math:`E[\Phi\Psi] = f(xW + b)`.
          first: attribute of ``mlp`` that holds the first ``nnx.Linear``.
          second: attribute that holds the one behind the activation.
          x: sample inputs of the block, to which the map is balanced
            (:func:`snnk_jax.calibration.balance`); None leaves it as drawn.
          rngs: random stream ``projection``.

        Raises:
          ValueError: if the attributes are not two Linears one of which reads what the
            other writes, the feature map cannot carry the first one's bias, or ``x`` is
            given for a map that cannot be balanced, or has another width.

        Example:
          >>> import snnk_jax as snnk
          >>> from flax import nnx
          >>> config = snnk.models.vit.ViTConfig(
          ...     image_size=8, patch_size=4, num_classes=10,
          ...     hidden_size=32, depth=2, num_heads=2, mlp_dim=64,
          ... )
          >>> mlp = snnk.models.vit.Mlp(config, rngs=nnx.Rngs(0))
          >>> fm = snnk.features.URF(activation="gelu", num_features=80)
          >>> block = snnk.nn.SNNKMlp.from_mlp(mlp, features=fm, rngs=nnx.Rngs(1))
          >>> block.readout.shape
          (80, 32)
        """
        up, down = (getattr(mlp, name, None) for name in (first, second))
        if not (is_plain(up) and is_plain(down)):
            raise ValueError(
                f"mlp must hold nnx.Linear layers in {first!r} and {second!r}. Got "
                f"{type(up).__name__} and {type(down).__name__} in "
                f"{type(mlp).__name__}."
            )
        if up.out_features != down.in_features:
            raise ValueError(
                f"{second!r} must read what {first!r} writes. Got widths "
                f"{down.in_features} and {up.out_features}."
            )
        rows = None if x is None else sample_rows(x, up)
        block = cls(
            up.in_features,
            down.out_features,
            features=features,
            use_bias=down.bias is not None,
            dtype=up.dtype,
            param_dtype=up.param_dtype,
            readout_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )
        if rows is not None:
            block.projection.balance(up, rows)
        psi = block.projection.psi(up)
        block.readout[...] = merge_readout(psi, down.kernel[...])
        if block.bias is not None and down.bias is not None:
            block.bias[...] = down.bias[...]
        return block
