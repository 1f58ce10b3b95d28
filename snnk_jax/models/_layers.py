"""Layers that the transformers share."""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from snnk_jax._arguments import is_real
from snnk_jax.typing import Dtype

GELUS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""The Gaussian error linear unit, exact and in its tanh approximation."""


@runtime_checkable
class Sizes(Protocol):
    """What a config tells the layers."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def attention_dropout_rate(self) -> float: ...


class Attention(nnx.Module):
    """Multi-head self-attention with separate query, key, value and out maps.

    Tokens where ``mask`` is False are not attended to. Attention weights are dropped
    out only when ``rngs`` are given.
    """

    def __init__(
        self,
        config: Sizes,
        *,
        kernel_init: Any = nnx.initializers.xavier_uniform(),  # noqa: B008
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(
            nnx.Linear,
            config.hidden_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.num_heads = config.num_heads
        self.dropout_rate = config.attention_dropout_rate
        self.query, self.key, self.value, self.out = (linear() for _ in range(4))

    def __call__(
        self,
        x: Float[Array, "*b t d"],
        mask: Bool[Array, "*b t"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*b t d"]:
        def heads(y: Array) -> Array:
            # dot_product_attention takes one batch axis.
            return y.reshape(
                -1, y.shape[-2], self.num_heads, y.shape[-1] // self.num_heads
            )

        qkv = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        if mask is not None:
            mask = mask.reshape(-1, 1, 1, mask.shape[-1])
        if rngs is None or self.dropout_rate == 0:
            y = jax.nn.dot_product_attention(*qkv, mask=mask)
        else:
            y = nnx.dot_product_attention(
                *qkv,
                mask=mask,
                dropout_rng=rngs.dropout(),
                dropout_rate=self.dropout_rate,
                broadcast_dropout=False,
            )
        return self.out(y.reshape(x.shape))


class Mlp(nnx.Module):
    """The feed-forward block: Linear, GELU, Linear."""

    def __init__(
        self,
        config: Sizes,
        *,
        kernel_init: Any = nnx.initializers.xavier_uniform(),  # noqa: B008
        bias_init: Any = nnx.initializers.normal(1e-6),  # noqa: B008
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.activation = config.activation
        self.fc1 = linear(config.hidden_size, config.mlp_dim)
        self.fc2 = linear(config.mlp_dim, config.hidden_size)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.fc2(GELUS[self.activation](self.fc1(x)))


def check_sizes(config: Any, positive: tuple[str, ...], rates: tuple[str, ...]) -> None:
    """Raises ValueError for sizes that no transformer can have."""
    for name in positive:
        # What a file claims may be anything; True is an int.
        if type(getattr(config, name)) is not int or getattr(config, name) < 1:
            raise ValueError(
                f"{name} must be a whole number of at least 1. "
                f"Got {getattr(config, name)!r}."
            )
    if config.hidden_size % config.num_heads:
        raise ValueError(
            "hidden_size must be divisible by num_heads. "
            f"Got {config.hidden_size} and {config.num_heads}."
        )
    if not isinstance(config.remat, bool):
        raise ValueError(f"remat must be true or false. Got {config.remat!r}.")
    for name in rates:
        rate = getattr(config, name)
        if not is_real(rate) or not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} must be in [0, 1). Got {rate!r}.")
    eps = config.layer_norm_eps
    if not is_real(eps) or not 0.0 <= eps < float("inf"):
        raise ValueError(
            f"layer_norm_eps must be finite and not negative. Got {eps!r}."
        )
    if config.activation not in GELUS:
        raise ValueError(
            f"activation must be one of {', '.join(GELUS)}. Got {config.activation!r}."
        )
