"""Vision Transformer in plain Flax NNX.

The pre-norm encoder of Dosovitskiy et al., "An Image is Worth 16x16 Words"
(arXiv 2010.11929). The module knows nothing of feature maps or adapters: those are
put in by :func:`snnk_jax.swap_modules`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from snnk_jax.models._layers import Attention, Mlp, check_sizes
from snnk_jax.typing import Dtype, PRNGKeyArray

__all__ = [
    "Attention",
    "Block",
    "Mlp",
    "ViT",
    "ViTConfig",
    "patchify",
    "resize_position_embedding",
]

_PRESETS: dict[str, dict[str, int]] = {
    "Ti": {"hidden_size": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a Vision Transformer.

    Args:
      hidden_size: width of the residual stream, divisible by ``num_heads``.
      depth: number of encoder blocks.
      num_heads: attention heads per block.
      mlp_dim: width of the hidden layer of each feed-forward block.
      image_size: height and width of the images, in pixels; an int means square.
      patch_size: side of a square patch, in pixels; divides both image sides.
      channels: colour channels of the images.
      num_classes: outputs of the classification head.
      pool: ``"cls"`` reads a learned class token, ``"mean"`` averages the tokens.
      activation: ``"gelu"`` (exact) or ``"gelu_tanh"``.
      layer_norm_eps: epsilon of every LayerNorm.
      dropout_rate: dropout after each residual branch, active only when ``rngs`` are
        passed at call time.
      attention_dropout_rate: dropout of the attention weights, likewise.
      patch_dropout: share of the patch tokens left out at random, active only when
        ``rngs`` are passed: makes pretraining cheaper (arXiv 2208.07220).
      remat: recompute block activations in the backward pass to save memory.

    Raises:
      ValueError: if the sizes do not fit together.

    Example:
      >>> from snnk_jax.models.vit import ViTConfig
      >>> ViTConfig.preset("B/16", num_classes=10).num_patches
      196
    """

    hidden_size: int
    depth: int
    num_heads: int
    mlp_dim: int
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    pool: Literal["cls", "mean"] = "cls"
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    layer_norm_eps: float = 1e-6
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    patch_dropout: float = 0.0
    remat: bool = False

    def __post_init__(self):
        sizes = ("hidden_size", "depth", "num_heads", "mlp_dim", "patch_size")
        check_sizes(
            self,
            (*sizes, "channels", "num_classes"),
            ("dropout_rate", "attention_dropout_rate", "patch_dropout"),
        )
        whole = all(type(side) is int for side in self.image_shape)
        if len(self.image_shape) != 2 or not whole or min(self.image_shape) < 1:
            raise ValueError(
                "image_size must be one or two whole numbers of at least 1. "
                f"Got {self.image_size!r}."
            )
        height, width = self.image_shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                "image_size must be divisible by patch_size. "
                f"Got {self.image_size} and {self.patch_size}."
            )
        if self.pool not in ("cls", "mean"):
            raise ValueError(f"pool must be 'cls' or 'mean'. Got {self.pool!r}.")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ViTConfig":
        """Returns the sizes of ``"Ti/16"``, ``"S/16"``, ``"B/32"``, ``"L/16"``, ..."""
        size, _, patch = name.partition("/")
        if size not in _PRESETS or not patch.isdigit():
            raise ValueError(
                "preset must be SIZE/PATCH with SIZE one of "
                f"{', '.join(_PRESETS)}. Got {name!r}."
            )
        fields: dict[str, Any] = {**_PRESETS[size], "patch_size": int(patch)}
        return cls(**(fields | overrides))

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the height and the width."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number of patch tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """Patch tokens plus the class token, if there is one."""
        return self.num_patches + (self.pool == "cls")


class Block(nnx.Module):
    """Pre-norm encoder block: attention and feed-forward, each with a residual."""

    def __init__(
        self,
        config: ViTConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        norm = functools.partial(
            nnx.LayerNorm,
            config.hidden_size,
            epsilon=config.layer_norm_eps,
            # Like BERT's: E x^2 - (E x)^2 loses its digits where means are large.
            use_fast_variance=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm1 = norm()
        self.attention = Attention(
            config, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.norm2 = norm()
        self.mlp = Mlp(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout_rate)

    def __call__(
        self, x: Float[Array, "*b t d"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*b t d"]:
        drop = functools.partial(self.dropout, deterministic=rngs is None, rngs=rngs)
        x = x + drop(self.attention(self.norm1(x), rngs=rngs))
        return x + drop(self.mlp(self.norm2(x)))


class ViT(nnx.Module):
    """Vision Transformer classifier.

    Args:
      config: the sizes.
      dtype: computation dtype; None computes in the promoted dtype of the inputs
        and the parameters.
      param_dtype: storage dtype of the parameters.
      rngs: random streams for the initial weights.

    Shapes: images ``[*batch, height, width, channels]`` to logits
    ``[*batch, num_classes]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from snnk_jax.models.vit import ViT, ViTConfig
      >>> config = ViTConfig(
      ...     hidden_size=32, depth=2, num_heads=2, mlp_dim=64,
      ...     image_size=8, patch_size=4, num_classes=5,
      ... )
      >>> model = ViT(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((3, 8, 8, 3))).shape
      (3, 5)
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        block = functools.partial(
            Block, config, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.config = config
        self.dtype = dtype
        self.patch_embed = nnx.Linear(
            config.patch_size**2 * config.channels,
            config.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        token = jnp.zeros((config.hidden_size,), param_dtype)
        self.cls_token = nnx.Param(token) if config.pool == "cls" else None
        self.position_embedding = nnx.Param(
            nnx.initializers.normal(0.02)(
                rngs.params(), (config.num_tokens, config.hidden_size), param_dtype
            )
        )
        self.blocks = nnx.List(block() for _ in range(config.depth))
        self.norm = nnx.LayerNorm(
            config.hidden_size,
            epsilon=config.layer_norm_eps,
            use_fast_variance=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        # A zero head makes the first loss exactly log(num_classes).
        self.head = nnx.Linear(
            config.hidden_size,
            config.num_classes,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        **overrides: Any,
    ) -> "ViT":
        """Reads a file of ours, a Hugging Face checkpoint or an original ``.npz``.

        See :func:`.vit_params.load_vit` for the first and
        :func:`.vit_import.import_vit`, which also reports what it ignored.

        Example:
          >>> from snnk_jax.models.vit import ViT
          >>> ViT.from_pretrained(
          ...     "assets/vit_tin32.safetensors", num_classes=10
          ... ).config.num_classes
          10
        """
        from snnk_jax.models.vit_import import import_vit
        from snnk_jax.models.vit_params import is_ours, load_vit

        options = {"dtype": dtype, "param_dtype": param_dtype, **overrides}
        if is_ours(path):
            return load_vit(path, **options)
        return import_vit(path, **options)[0]

    def hidden_states(
        self, images: Float[Array, "*b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*b t d"]:
        """Returns what the last LayerNorm makes of every token."""
        config = self.config
        expected = (*config.image_shape, config.channels)
        if images.shape[-3:] != expected:
            raise ValueError(
                f"images must have trailing shape {expected}. Got {images.shape}."
            )
        x = self.patch_embed(patchify(images, config.patch_size))
        position = self.position_embedding[...].astype(x.dtype)
        patch_position = position[-config.num_patches :]
        x = x + patch_position.reshape((1,) * (x.ndim - 2) + patch_position.shape)
        if rngs is not None and config.patch_dropout:
            x = _drop_tokens(rngs.dropout(), x, config.patch_dropout)
        if self.cls_token is not None:
            token = self.cls_token[...].astype(x.dtype) + position[0]
            token = jnp.broadcast_to(token, (*x.shape[:-2], 1, x.shape[-1]))
            x = jnp.concatenate([token, x], axis=-2)
        # nnx.remat, unlike jax.checkpoint, carries the count of rngs between blocks.
        apply = nnx.remat(_apply_block) if config.remat else _apply_block
        for block in self.blocks:
            x = apply(block, x, rngs)
        return self.norm(x)

    def features(
        self, images: Float[Array, "*b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*b d"]:
        """Returns the pooled representation that the head reads."""
        x = self.hidden_states(images, rngs=rngs)
        return x[..., 0, :] if self.config.pool == "cls" else jnp.mean(x, axis=-2)

    def __call__(
        self, images: Float[Array, "*b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*b n"]:
        return self.head(self.features(images, rngs=rngs))


def _apply_block(block: Callable[..., Array], x: Array, rngs: nnx.Rngs | None) -> Array:
    return block(x, rngs=rngs)


def _drop_tokens(key: PRNGKeyArray, x: Array, rate: float) -> Array:
    """Keeps a random share ``1 - rate`` of each example's tokens, at least one."""
    kept = max(1, round(x.shape[-2] * (1.0 - rate)))
    order = jnp.argsort(jax.random.uniform(key, x.shape[:-1]), axis=-1)
    return jnp.take_along_axis(x, order[..., :kept, None], axis=-2)


def patchify(
    images: Float[Array, "*b h w c"], patch_size: int
) -> Float[Array, "*b n p"]:
    """Cuts images into flattened patches, row by row.

    A Linear on the result equals a convolution with stride ``patch_size`` whose
    kernel ``[patch, patch, channels, hidden]`` is reshaped to two axes.
    """
    *batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(*batch, rows, patch_size, columns, patch_size, channels)
    x = jnp.moveaxis(x, -3, -4)
    return x.reshape(*batch, rows * columns, patch_size**2 * channels)


def resize_position_embedding(
    embedding: Float[Array, "t d"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
) -> Float[Array, "u d"]:
    """Resamples position embeddings to another patch grid, bilinearly.

    Tokens before the grid (the class token) are kept as they are.

    Raises:
      ValueError: if the embedding has fewer rows than ``old_grid`` has patches.
    """
    prefix = embedding.shape[0] - old_grid[0] * old_grid[1]
    if prefix < 0:
        raise ValueError(
            f"embedding must have at least {old_grid[0] * old_grid[1]} rows for the "
            f"grid {old_grid}. Got {embedding.shape[0]}."
        )
    dim = embedding.shape[1]
    grid = embedding[prefix:].reshape(*old_grid, dim)
    grid = jax.image.resize(grid, (*new_grid, dim), method="bilinear")
    return jnp.concatenate([embedding[:prefix], grid.reshape(-1, dim)])
