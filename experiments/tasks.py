"""Builds what a run trains: the model of a config and the methods that adapt it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from snnk_jax.models.vit import ViT, ViTConfig
from snnk_jax.models.vit_params import load_vit


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train: surgery on the model, and the variables that learn."""

    title: str
    adapt: Callable[[nnx.Module, ConfigDict, nnx.Rngs], nnx.Module]
    trainable: Any


def _as_it_is(model: nnx.Module, config: ConfigDict, rngs: nnx.Rngs) -> nnx.Module:
    return model


METHODS: dict[str, Method] = {
    "scratch": Method("From scratch", _as_it_is, nnx.Param),
}


def build_model(config: ConfigDict, num_classes: int, rngs: nnx.Rngs) -> ViT:
    """The model of ``config.model``, with a zero head of ``num_classes``."""
    options = config.model
    dtype = None if options.dtype == "float32" else options.dtype
    changes = {
        "image_size": options.image_size,
        "num_classes": num_classes,
        "dropout_rate": options.dropout_rate,
        "patch_dropout": options.patch_dropout,
        "remat": options.remat,
    }
    if options.weights:
        return load_vit(options.weights, dtype=dtype, **changes)
    if options.preset:
        return ViT(ViTConfig.preset(options.preset, **changes), dtype=dtype, rngs=rngs)
    sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_dim", "pool")
    config_ = ViTConfig(**{name: options[name] for name in sizes}, **changes)
    return ViT(config_, dtype=dtype, rngs=rngs)
