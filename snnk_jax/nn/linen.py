"""The layers for Flax Linen users, through ``nnx.bridge``.

Each function returns a Linen module with the collections ``params`` (or
``adapter_param``) and ``random_projection``. Differentiate the former only.
"""

import jax.numpy as jnp
from flax import linen, nnx

from snnk_jax.features import FeatureMap
from snnk_jax.nn._adapter import SNNKAdapter as _SNNKAdapter
from snnk_jax.nn._dense import SNNKDense as _SNNKDense
from snnk_jax.typing import Dtype


def SNNKDense(  # noqa: N802  a constructor, named like the class it stands for
    in_features: int,
    out_features: int,
    *,
    features: FeatureMap,
    use_bias: bool = True,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    name: str | None = None,
) -> linen.Module:
    """:class:`snnk_jax.nn.SNNKDense` as a Linen module.

    Linen infers no shapes here: ``in_features`` must be given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from snnk_jax.nn import linen
      >>> fm = snnk.features.ArcCosine(num_features=16)
      >>> layer = linen.SNNKDense(8, 4, features=fm)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 8)))
      >>> sorted(variables)
      ['params', 'random_projection']
    """
    return nnx.bridge.to_linen(
        _SNNKDense,
        in_features,
        out_features,
        features=features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


def SNNKAdapter(  # noqa: N802
    dim: int,
    *,
    features: FeatureMap,
    normalize: bool = True,
    rank: int | None = None,
    modulate: bool = True,
    train_projection: bool = False,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    name: str | None = None,
) -> linen.Module:
    """:class:`snnk_jax.nn.SNNKAdapter` as a Linen module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from snnk_jax.nn import linen
      >>> fm = snnk.features.ArcCosine(num_features=16)
      >>> adapter = linen.SNNKAdapter(8, features=fm)
      >>> sorted(adapter.init(jax.random.key(0), jnp.ones((2, 8))))
      ['adapter_param', 'random_projection']
    """
    return nnx.bridge.to_linen(
        _SNNKAdapter,
        dim,
        features=features,
        normalize=normalize,
        rank=rank,
        modulate=modulate,
        train_projection=train_projection,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )
