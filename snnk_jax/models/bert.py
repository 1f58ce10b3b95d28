"""BERT in plain Flax NNX.

The post-norm encoder of Devlin et al., "BERT: Pre-training of Deep Bidirectional
Transformers" (arXiv 1810.04805). The module knows nothing of feature maps or adapters:
those are put in by :func:`snnk_jax.swap_modules`.
"""

import dataclasses
import functools
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from snnk_jax.models._layers import Attention, Mlp, check_sizes
from snnk_jax.typing import Dtype

Mask = Bool[Array, "*b t"] | Int[Array, "*b t"]
"""Which tokens count: True, or not 0 as Hugging Face's ``attention_mask``."""

__all__ = ["Attention", "Bert", "BertConfig", "Block", "Embeddings", "Mlp", "Pooler"]

# Turc et al., arXiv 1908.08962; MiniLM: Wang et al., arXiv 2002.10957.
_PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "depth": 2, "num_heads": 2, "mlp_dim": 512},
    "mini": {"hidden_size": 256, "depth": 4, "num_heads": 4, "mlp_dim": 1024},
    "small": {"hidden_size": 512, "depth": 4, "num_heads": 8, "mlp_dim": 2048},
    "medium": {"hidden_size": 512, "depth": 8, "num_heads": 8, "mlp_dim": 2048},
    "base": {"hidden_size": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "large": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
    "minilm-l6": {"hidden_size": 384, "depth": 6, "num_heads": 12, "mlp_dim": 1536},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT encoder and the kind of its head.

    Args:
      hidden_size: width of the residual stream, divisible by ``num_heads``.
      depth: number of encoder blocks.
      num_heads: attention heads per block.
      mlp_dim: width of the hidden layer of each feed-forward block.
      vocab_size: number of token ids.
      max_length: positions that have an embedding: the longest sequence, in tokens.
      num_types: token types (segments).
      pool: what the head reads. ``"pooler"``: ``tanh`` of a linear map of the first
        token; ``"cls"``: the first token; ``"mean"``: the mean of the tokens that
        ``mask`` keeps.
      head: ``"linear"`` returns logits or regression values ``[*batch, num_outputs]``;
        ``"embedding"`` the pooled vector scaled to norm one, a sentence embedding;
        ``"none"`` the pooled vector.
      num_outputs: classes, or values of a regression.
      activation: ``"gelu"`` (exact) or ``"gelu_tanh"``.
      layer_norm_eps: epsilon of every LayerNorm.
      dropout_rate: dropout of the embeddings, of each residual branch and before a
        linear head; active only when ``rngs`` are passed at call time.
      attention_dropout_rate: dropout of the attention weights, likewise.
      remat: recompute block activations in the backward pass to save memory.

    Raises:
      ValueError: if the sizes do not fit together.

    Example:
      >>> from snnk_jax.models.bert import BertConfig
      >>> BertConfig.preset("base").mlp_dim
      3072
    """

    hidden_size: int
    depth: int
    num_heads: int
    mlp_dim: int
    vocab_size: int = 30522
    max_length: int = 512
    num_types: int = 2
    pool: Literal["pooler", "cls", "mean"] = "pooler"
    head: Literal["linear", "embedding", "none"] = "linear"
    num_outputs: int = 2
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    layer_norm_eps: float = 1e-12
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    remat: bool = False

    def __post_init__(self):
        sizes = ("hidden_size", "depth", "num_heads", "mlp_dim", "vocab_size")
        check_sizes(
            self,
            (*sizes, "max_length", "num_types", "num_outputs"),
            ("dropout_rate", "attention_dropout_rate"),
        )
        for name, choices in {
            "pool": ("pooler", "cls", "mean"),
            "head": ("linear", "embedding", "none"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}. "
                    f"Got {getattr(self, name)!r}."
                )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "BertConfig":
        """Returns the sizes of ``"tiny"`` ... ``"large"`` or ``"minilm-l6"``."""
        if name not in _PRESETS:
            raise ValueError(
                f"preset must be one of {', '.join(_PRESETS)}. Got {name!r}."
            )
        fields: dict[str, Any] = _PRESETS[name] | overrides
        return cls(**fields)


class Embeddings(nnx.Module):
    """Sum of the word, position and type embeddings, normalised."""

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        embed = functools.partial(
            nnx.Embed,
            features=config.hidden_size,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_length)
        self.token_type = embed(config.num_types)
        self.norm = _norm(config, dtype, param_dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout_rate)

    def __call__(
        self,
        tokens: Int[Array, "*b t"],
        token_types: Int[Array, "*b t"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*b t d"]:
        word = self.word(tokens)
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        # All sequences share their positions.
        position = self.position(jnp.arange(tokens.shape[-1]))
        position = position.reshape((1,) * (word.ndim - 2) + position.shape)
        x = self.norm(word + position + self.token_type(types))
        return self.dropout(x, deterministic=rngs is None, rngs=rngs)


class Block(nnx.Module):
    """Post-norm encoder block: attention and feed-forward, each with a residual."""

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(0.02)
        self.attention = Attention(
            config, kernel_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.norm1 = _norm(config, dtype, param_dtype, rngs)
        self.mlp = Mlp(
            config,
            kernel_init=init,
            bias_init=nnx.initializers.zeros_init(),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm2 = _norm(config, dtype, param_dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "*b t d"],
        mask: Bool[Array, "*b t"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*b t d"]:
        drop = functools.partial(self.dropout, deterministic=rngs is None, rngs=rngs)
        x = self.norm1(x + drop(self.attention(x, mask, rngs=rngs)))
        return self.norm2(x + drop(self.mlp(x)))


class Pooler(nnx.Module):
    """``tanh`` of a linear map, of the first token."""

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dense = nnx.Linear(
            config.hidden_size,
            config.hidden_size,
            kernel_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return jnp.tanh(self.dense(x))


class Bert(nnx.Module):
    """BERT encoder with a head.

    Args:
      config: the sizes.
      dtype: computation dtype; None computes in that of the parameters.
      param_dtype: storage dtype of the parameters.
      rngs: random streams for the initial weights.

    Shapes: token ids ``[*batch, tokens]`` to ``[*batch, num_outputs]``, or to
    ``[*batch, hidden_size]`` without a linear head. ``mask`` is True, or not 0, at the
    tokens that count. Ids beyond the tables of the config give NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from snnk_jax.models.bert import Bert, BertConfig
      >>> model = Bert(BertConfig.preset("tiny", vocab_size=99), rngs=nnx.Rngs(0))
      >>> tokens = jnp.array([[2, 45, 7, 3], [2, 8, 3, 0]])
      >>> model(tokens, mask=tokens > 0).shape
      (2, 2)
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        part = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.embeddings = Embeddings(config, **part)
        self.blocks = nnx.List(Block(config, **part) for _ in range(config.depth))
        self.pooler = Pooler(config, **part) if config.pool == "pooler" else None
        self.dropout = nnx.Dropout(config.dropout_rate)
        linear = functools.partial(
            nnx.Linear,
            config.hidden_size,
            config.num_outputs,
            # A zero head makes the first loss exactly log(num_outputs).
            kernel_init=nnx.initializers.zeros_init(),
            **part,
        )
        self.head = linear() if config.head == "linear" else None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: BertConfig | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        **overrides: Any,
    ) -> "Bert":
        """Reads a Hugging Face checkpoint; see :func:`.bert_params.load_bert`.

        Example:
          >>> from snnk_jax.models.bert import Bert
          >>> encoder = Bert.from_pretrained(
          ...     folder, pool="mean", head="embedding"
          ... )  # doctest: +SKIP
        """
        from snnk_jax.models.bert_params import load_bert

        return load_bert(
            path, config=config, dtype=dtype, param_dtype=param_dtype, **overrides
        )[0]

    def hidden_states(
        self,
        tokens: Int[Array, "*b t"],
        token_types: Int[Array, "*b t"] | None = None,
        mask: Mask | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*b t d"]:
        """Returns what the last block makes of every token."""
        if tokens.ndim < 1 or not 1 <= tokens.shape[-1] <= self.config.max_length:
            raise ValueError(
                f"tokens must hold 1 to {self.config.max_length} ids an example. "
                f"Got shape {tokens.shape}."
            )
        for name, other in {"token_types": token_types, "mask": mask}.items():
            if other is not None and other.shape != tokens.shape:
                raise ValueError(
                    f"{name} must have the shape of tokens, {tokens.shape}. "
                    f"Got {other.shape}."
                )
        mask = None if mask is None else mask.astype(bool)
        x = self.embeddings(tokens, token_types, rngs=rngs)
        # nnx.remat, unlike jax.checkpoint, carries the count of rngs between blocks.
        apply = nnx.remat(_apply_block) if self.config.remat else _apply_block
        for block in self.blocks:
            x = apply(block, x, mask, rngs)
        return x

    def features(
        self,
        tokens: Int[Array, "*b t"],
        token_types: Int[Array, "*b t"] | None = None,
        mask: Mask | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*b d"]:
        """Returns the pooled representation that the head reads."""
        x = self.hidden_states(tokens, token_types, mask, rngs=rngs)
        if self.config.pool == "mean":
            if mask is None:
                return jnp.mean(x, axis=-2)
            kept = mask.astype(bool)[..., None].astype(x.dtype)
            count = jnp.sum(kept, axis=-2)
            return jnp.sum(x * kept, axis=-2) / jnp.maximum(count, 1)
        first = x[..., 0, :]
        return first if self.pooler is None else self.pooler(first)

    def __call__(
        self,
        tokens: Int[Array, "*b t"],
        token_types: Int[Array, "*b t"] | None = None,
        mask: Mask | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*b n"]:
        x = self.features(tokens, token_types, mask, rngs=rngs)
        if self.head is not None:
            return self.head(self.dropout(x, deterministic=rngs is None, rngs=rngs))
        if self.config.head == "embedding":
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            square = jnp.sum(wide * wide, axis=-1, keepdims=True)
            return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)
        return x


def _apply_block(
    block: nnx.Module, x: Array, mask: Array | None, rngs: nnx.Rngs | None
) -> Array:
    return block(x, mask, rngs=rngs)


def _norm(
    config: BertConfig, dtype: Dtype | None, param_dtype: Dtype, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        # E x^2 - (E x)^2 would lose its digits where means are large: eps is tiny here.
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )
