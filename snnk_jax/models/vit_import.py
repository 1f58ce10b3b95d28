"""ViT weights from Hugging Face checkpoints and from the original ``.npz`` files.

The ``.npz`` files are those of Dosovitskiy et al. and of Steiner et al. ("How to train
your ViT?", arXiv 2106.10270) with either numbering of Flax's modules, and big_vision's.
Their models compute GELU by its tanh approximation and LayerNorm with an epsilon of
1e-6, Hugging Face's exactly and with 1e-12; the config says which.
"""

import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax.models._weights import (
    HUGGING_FACE_GELUS,
    Checkpoint,
    LoadReport,
    Source,
    check_architecture,
    check_depth,
    check_overrides,
    fill,
    linear_sources,
    norm_sources,
    open_checkpoint,
    read_config_json,
    read_numbers,
)
from snnk_jax.models.vit import ViT, ViTConfig, resize_position_embedding
from snnk_jax.typing import Dtype

_NPZ_RENAMES = {
    r"^(opt/target/|params/)?(img/)?": "",
    r"^pos_embedding$": "Transformer/posembed_input/pos_embedding",
    # Flax numbered a block's modules together, then each kind by itself.
    r"/LayerNorm_1/": "/LayerNorm_2/",
    r"/MultiHeadDotProductAttention_0/": "/MultiHeadDotProductAttention_1/",
    r"/MlpBlock_0/": "/MlpBlock_3/",
}
# Fields that weights of any kind allow to change.
_FREE = (
    *("image_size", "num_classes", "pool", "activation", "layer_norm_eps"),
    *("dropout_rate", "attention_dropout_rate", "patch_dropout", "remat"),
)


@dataclasses.dataclass(frozen=True)
class _Naming:
    """Where a family of checkpoints keeps what a ViT needs."""

    position: str
    cls: str
    head: str
    ignored: str
    # Tensors that belong to the head: not to be left out while it is kept.
    with_head: str
    sources: Callable[[ViTConfig], dict[str, Source]]


def import_vit(
    path: str | os.PathLike[str],
    *,
    config: ViTConfig | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    **overrides: Any,
) -> tuple[ViT, LoadReport]:
    """Reads a ViT that other software wrote.

    Args:
      path: a Hugging Face folder with ``config.json``, a ``.safetensors`` file or index
        beside it, or an ``.npz`` file, which tells its sizes by its shapes.
      config: the sizes, where there is no ``config.json``; its ``image_size`` is the
        one the weights were trained at.
      dtype: computation dtype of the model.
      param_dtype: storage dtype of its parameters.
      **overrides: fields of :class:`ViTConfig` to change. Another ``image_size``
        resamples the position embedding; another ``num_classes`` than the file's puts
        a zero head in its place.

    Returns:
      The model, and a report of what was ignored and what is new.

    Raises:
      FileNotFoundError: if there are no weights.
      ValueError: if the file is damaged, of another architecture or a pickle, or does
        not hold exactly the parameters of the model; every missing, unexpected and
        misshapen name is listed, and no model is returned.

    Example:
      >>> from snnk_jax.models.vit_import import import_vit
      >>> model, report = import_vit("B_16.npz", num_classes=10)  # doctest: +SKIP
      >>> report.fresh  # doctest: +SKIP
      ('head.bias', 'head.kernel')
    """
    path = pathlib.Path(path)
    npz = path.suffix == ".npz"
    naming = _NPZ if npz else _HUGGING_FACE
    with open_checkpoint(path) as tensors:
        checkpoint = Checkpoint(
            tensors,
            str(path),
            prefixes=() if npz else ("vit.",),
            renames=_NPZ_RENAMES if npz else None,
        )
        fields: dict[str, Any]
        if config is not None:
            fields = dataclasses.asdict(config)
        elif npz:
            fields = _npz_sizes(checkpoint)
        else:
            fields = _read_config(path)
        check_overrides(overrides, _FREE)
        # Behind one position more than there are patches stands a class token, too,
        # which is missing then.
        positions = checkpoint.shape(naming.position) or ()
        plain: dict[str, Any] = fields | {"pool": "mean"}
        patches = ViTConfig(**plain).num_patches
        more = len(positions) == 3 and positions[1] == patches + 1
        pool = "cls" if more or naming.cls in checkpoint else "mean"
        asked = overrides.get("pool", fields.get("pool", pool))
        if asked != pool:
            raise ValueError(
                f"pool must be {pool!r}, as {path} was trained. Got {asked!r}."
            )
        fields["pool"] = pool
        stored_classes = (checkpoint.shape(f"{naming.head}bias") or (None,))[0]
        if config is None and stored_classes:
            fields["num_classes"] = stored_classes
        elif config is None and "num_classes" not in overrides:
            raise ValueError(
                f"num_classes must be given: {path} has no head. Got none."
            )
        fields.setdefault("num_classes", 1)
        stored = ViTConfig(**fields)
        config = dataclasses.replace(stored, **overrides)
        check_depth(stored.depth, checkpoint)
        sources = naming.sources(
            dataclasses.replace(stored, num_classes=config.num_classes)
        )
        ignored, fresh = naming.ignored, {}
        if config.num_classes != stored_classes:
            for name in ("head.kernel", "head.bias"):
                del sources[name]
            shape = (config.hidden_size, config.num_classes)
            fresh = {"head.kernel": shape, "head.bias": shape[1:]}
            ignored = f"{ignored}|{naming.with_head}"
        place = functools.partial(_place_positions, stored=stored, config=config)
        grid_only = (1, stored.num_patches, stored.hidden_size)
        if npz and pool == "cls" and checkpoint.shape(naming.position) == grid_only:
            # The class token was put before the others after these were added.
            sources["position_embedding"] = Source(naming.position, grid_only)
        return fill(
            lambda: ViT(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)),
            sources,
            checkpoint,
            ignore=ignored,
            fresh=fresh,
            param_dtype=param_dtype,
            change={"position_embedding": place},
        )


def _place_positions(
    embedding: np.ndarray, stored: ViTConfig, config: ViTConfig
) -> np.ndarray:
    """Position embeddings ``[1, t, d]`` as ours, on the grid that is asked for."""
    embedding = embedding[0]
    if len(embedding) < stored.num_tokens:
        embedding = np.concatenate([np.zeros_like(embedding[:1]), embedding])
    if config.grid == stored.grid:
        return embedding
    resized = resize_position_embedding(
        jnp.asarray(embedding), stored.grid, config.grid
    )
    return np.asarray(resized)


def _hugging_face_sources(config: ViTConfig) -> dict[str, Source]:
    d, patch, channels = config.hidden_size, config.patch_size, config.channels

    projection = "embeddings.patch_embeddings.projection"
    sources = {
        "patch_embed.kernel": Source(
            f"{projection}.weight", (d, channels, patch, patch), (2, 3, 1, 0)
        ),
        "patch_embed.bias": Source(f"{projection}.bias", (d,)),
        "position_embedding": Source(
            "embeddings.position_embeddings", (1, config.num_tokens, d)
        ),
    }
    if config.pool == "cls":
        sources["cls_token"] = Source("embeddings.cls_token", (1, 1, d))
    for i in range(config.depth):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            theirs = f"{layer}.attention.attention.{part}"
            sources |= linear_sources(f"{block}.attention.{part}", theirs, d, d)
        theirs = f"{layer}.attention.output.dense"
        sources |= linear_sources(f"{block}.attention.out", theirs, d, d)
        sources |= norm_sources(f"{block}.norm1", f"{layer}.layernorm_before", d)
        sources |= norm_sources(f"{block}.norm2", f"{layer}.layernorm_after", d)
        theirs = f"{layer}.intermediate.dense"
        sources |= linear_sources(f"{block}.mlp.fc1", theirs, d, config.mlp_dim)
        theirs = f"{layer}.output.dense"
        sources |= linear_sources(f"{block}.mlp.fc2", theirs, config.mlp_dim, d)
    sources |= norm_sources("norm", "layernorm", d)
    return sources | linear_sources("head", "classifier", d, config.num_classes)


def _npz_sources(config: ViTConfig) -> dict[str, Source]:
    d, heads, patch = config.hidden_size, config.num_heads, config.patch_size
    split = (heads, d // heads)
    sources = {
        "patch_embed.kernel": Source(
            "embedding/kernel", (patch, patch, config.channels, d)
        ),
        "patch_embed.bias": Source("embedding/bias", (d,)),
        "position_embedding": Source(
            "Transformer/posembed_input/pos_embedding", (1, config.num_tokens, d)
        ),
        "head.kernel": Source("head/kernel", (d, config.num_classes)),
        "head.bias": Source("head/bias", (config.num_classes,)),
    }
    if config.pool == "cls":
        sources["cls_token"] = Source("cls", (1, 1, d))
    norms = {"norm": "Transformer/encoder_norm"}
    for i in range(config.depth):
        block, layer = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        norms[f"{block}.norm1"] = f"{layer}/LayerNorm_0"
        norms[f"{block}.norm2"] = f"{layer}/LayerNorm_2"
        attention = f"{layer}/MultiHeadDotProductAttention_1"
        maps = {
            f"attention.{part}": (f"{attention}/{part}", (d, *split), split)
            for part in ("query", "key", "value")
        } | {
            "attention.out": (f"{attention}/out", (*split, d), (d,)),
            "mlp.fc1": (
                *(f"{layer}/MlpBlock_3/Dense_0", (d, config.mlp_dim)),
                (config.mlp_dim,),
            ),
            "mlp.fc2": (f"{layer}/MlpBlock_3/Dense_1", (config.mlp_dim, d), (d,)),
        }
        for part, (theirs, kernel, bias) in maps.items():
            sources[f"{block}.{part}.kernel"] = Source(f"{theirs}/kernel", kernel)
            sources[f"{block}.{part}.bias"] = Source(f"{theirs}/bias", bias)
    for ours, theirs in norms.items():
        sources[f"{ours}.scale"] = Source(f"{theirs}/scale", (d,))
        sources[f"{ours}.bias"] = Source(f"{theirs}/bias", (d,))
    return sources


_HUGGING_FACE = _Naming(
    position="embeddings.position_embeddings",
    cls="embeddings.cls_token",
    head="classifier.",
    ignored=r"pooler\..*|embeddings\.mask_token|decoder\..*",
    with_head=r"classifier\..*",
    sources=_hugging_face_sources,
)
_NPZ = _Naming(
    position="Transformer/posembed_input/pos_embedding",
    cls="cls",
    head="head/",
    ignored=r"opt/.*|extra/.*",
    # A layer between encoder and head that the first checkpoints had.
    with_head=r"(head|pre_logits)/.*",
    sources=_npz_sources,
)


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """The fields of :class:`ViTConfig` in the ``config.json`` of a checkpoint."""
    stored = read_config_json(path)
    accepted = {"model_type": ("vit",), "hidden_act": tuple(HUGGING_FACE_GELUS)}
    check_architecture(stored, accepted | {"qkv_bias": (True,)})
    fields = read_numbers(
        stored,
        {
            "hidden_size": "hidden_size",
            "depth": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "mlp_dim": "intermediate_size",
            "image_size": "image_size",
            "patch_size": "patch_size",
            "channels": "num_channels",
        },
    )
    activation = HUGGING_FACE_GELUS[stored.get("hidden_act", "gelu")]
    return fields | {"activation": activation}


def _compare_npz(checkpoint: Checkpoint, depth: int) -> tuple[list[str], list[str]]:
    """Names that an ``.npz`` file lacks or should not have, whatever the sizes are."""
    positions = checkpoint.shape(_NPZ.position) or ()
    more = len(positions) == 3 and math.isqrt(positions[1]) ** 2 + 1 == positions[1]
    pool: Any = "cls" if more or _NPZ.cls in checkpoint else "mean"
    names = ("hidden_size", "num_heads", "mlp_dim", "image_size", "patch_size")
    ones: dict[str, Any] = dict.fromkeys(names, 1)
    config = ViTConfig(**ones, depth=max(depth, 1), pool=pool)
    needed = {source.name for source in _npz_sources(config).values()}
    known = re.compile(f"{_NPZ.ignored}|{_NPZ.with_head}")
    others = checkpoint.tensors.keys() - needed
    missing = {name for name in needed if name not in checkpoint}
    return (
        sorted(name for name in missing if not name.startswith(_NPZ.head)),
        sorted(name for name in others if not known.fullmatch(name)),
    )


def _npz_sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sizes that the shapes of an ``.npz`` file tell."""
    block = "Transformer/encoderblock_0"
    names = (
        "embedding/kernel",
        f"{block}/MultiHeadDotProductAttention_1/query/kernel",
        f"{block}/MlpBlock_3/Dense_0/kernel",
        "Transformer/posembed_input/pos_embedding",
    )
    layers = {
        match.group(1)
        for name in checkpoint.tensors
        if (match := re.match(r"Transformer/encoderblock_(\d+)/", name))
    }
    if any(name not in checkpoint for name in names):
        missing, unexpected = _compare_npz(checkpoint, len(layers))
        raise ValueError(
            f"weights must hold {', '.join(names)}, which tell the sizes. Got missing "
            f"{missing}, unexpected {unexpected} in {checkpoint.where}."
        )
    shapes: list[Any] = [checkpoint.shape(name) or () for name in names]
    if [len(shape) for shape in shapes] != [4, 3, 2, 3]:
        raise ValueError(
            f"weights must hold {', '.join(names)} with 4, 3, 2 and 3 axes. Got the "
            f"shapes {shapes} in {checkpoint.where}."
        )
    sides = [side for shape in shapes for side in shape]
    if not all(1 <= side < 2**31 for side in sides):
        raise ValueError(f"weights must have sizes of 1 to 2^31. Got {shapes}.")
    embedding, query, dense, position = shapes
    side = math.isqrt(position[1])
    if position[1] - side**2 not in (0, 1):
        raise ValueError(
            "the position embedding must be of a square grid, with a class token or "
            f"without; give config= for others. Got {position[1]} tokens."
        )
    return {
        "hidden_size": embedding[3],
        "depth": len(layers),
        "num_heads": query[1],
        "mlp_dim": dense[1],
        "image_size": side * embedding[0],
        "patch_size": embedding[0],
        "channels": embedding[2],
        "activation": "gelu_tanh",
        "layer_norm_eps": 1e-6,
    }
