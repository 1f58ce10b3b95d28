"""ViT weights from and to safetensors files.

A file holds the parameters under their paths in :class:`~snnk_jax.models.vit.ViT`
(``blocks.0.mlp.fc1.kernel``) and the :class:`ViTConfig` as JSON in its metadata, so
it can be opened without knowing the sizes.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from snnk_jax._files import check_metadata, open_safetensors, write_atomic
from snnk_jax.models._weights import (
    Checkpoint,
    Source,
    check_depth,
    check_overrides,
    fill,
    safetensors_of,
)
from snnk_jax.models.vit import ViT, ViTConfig, resize_position_embedding
from snnk_jax.typing import Dtype

_FORMAT = "snnk_jax.vit.1"
# What JSON of another kind makes of a config.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
# Fields that weights of any kind allow to change.
_FREE = (
    *("image_size", "num_classes", "activation", "layer_norm_eps"),
    *("dropout_rate", "attention_dropout_rate", "patch_dropout", "remat"),
)


def save_vit(
    path: str | os.PathLike[str],
    model: ViT,
    *,
    dtype: Dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes the parameters of a ViT to one safetensors file, atomically.

    Args:
      path: the file.
      model: a ViT without adapters. Its head may have another number of outputs than
        its config says, as after the load of a task's adapter: the file has that of the
        head.
      dtype: storage dtype, for example ``"float16"``; None keeps each parameter's.
      metadata: more strings for the file's header (a model card).

    Raises:
      ValueError: if a parameter is not finite in the storage dtype, or the parameters
        are not those of a ViT (adapters and replacements have others).
    """
    config = model.config
    if isinstance(model.head, nnx.Linear):
        config = dataclasses.replace(config, num_classes=model.head.out_features)
    plain = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    needed, own = (
        {name: variable.shape for name, variable in _named_params(m).items()}
        for m in (plain, model)
    )
    other = sorted(n for n in needed | own if needed.get(n) != own.get(n))
    if other:
        raise ValueError(
            "model must have the parameters of a plain ViT: merge or remove adapters "
            f"first. Got others at {other}."
        )
    check_metadata(metadata)
    arrays = {}
    for name, variable in _named_params(model).items():
        array = np.asarray(variable[...])
        with np.errstate(over="ignore"):  # an overflow is refused below
            stored = array if dtype is None else array.astype(np.dtype(dtype))
        if not np.all(np.isfinite(stored)):
            raise ValueError(
                f"{name} must be finite in {stored.dtype}. "
                f"Got {int((~np.isfinite(stored)).sum())} non-finite values."
            )
        arrays[name] = np.ascontiguousarray(stored)
    sizes = json.dumps(dataclasses.asdict(config))
    header = (metadata or {}) | {"format": _FORMAT, "config": sizes}
    write_atomic(path, save(arrays, header))


def load_vit(
    path: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    **overrides: Any,
) -> ViT:
    """Reads a file written by :func:`save_vit`.

    Args:
      path: the file.
      dtype: computation dtype of the model.
      param_dtype: storage dtype of the model's parameters.
      **overrides: fields of :class:`ViTConfig` to change, none that the weights fix.
        Another ``image_size`` resamples the position embedding; another
        ``num_classes`` puts a fresh zero head in place of the stored one.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged or does not hold exactly the parameters of
        the model, every missing, unexpected and misshapen name is listed; or if
        ``overrides`` name what the weights fix.
    """
    check_overrides(overrides, _FREE)
    with open_safetensors(path, "weights") as file:
        stored = _stored_config(file, path)
        config = dataclasses.replace(stored, **overrides)
        checkpoint = Checkpoint(safetensors_of(file), str(path))
        check_depth(config.depth, checkpoint)

        def build(config: ViTConfig) -> ViT:
            rngs = nnx.Rngs(0)
            return ViT(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        # Shapes only: the random initial weights are never computed.
        params = _named_params(nnx.eval_shape(lambda: build(stored)))
        sources = {name: Source(name, v.shape) for name, v in params.items()}
        fresh, ignore = {}, ""
        if config.num_classes != stored.num_classes:
            ignore = r"head\.(kernel|bias)"
            shape = (config.hidden_size, config.num_classes)
            fresh = {"head.kernel": shape, "head.bias": shape[1:]}
        place = functools.partial(_resized, stored=stored, config=config)
        return fill(
            lambda: build(config),
            {name: s for name, s in sources.items() if name not in fresh},
            checkpoint,
            ignore=ignore,
            fresh=fresh,
            param_dtype=param_dtype,
            change={"position_embedding": place},
        )[0]


def _resized(embedding: np.ndarray, stored: ViTConfig, config: ViTConfig) -> np.ndarray:
    if config.grid == stored.grid:
        return embedding
    return np.asarray(
        resize_position_embedding(jnp.asarray(embedding), stored.grid, config.grid)
    )


def read_config(path: str | os.PathLike[str]) -> ViTConfig:
    """Reads the sizes in a file written by :func:`save_vit`, not its weights.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged or of another format.
    """
    with open_safetensors(path, "weights") as file:
        return _stored_config(file, path)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that :func:`save_vit` wrote it."""
    if pathlib.Path(path).suffix != ".safetensors":
        return False
    with open_safetensors(path, "weights") as file:
        return (file.metadata() or {}).get("format") == _FORMAT


def _stored_config(file: Any, path: str | os.PathLike[str]) -> ViTConfig:
    header = file.metadata() or {}
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"weights must have format {_FORMAT}. "
            f"Got {header.get('format')!r} in {path}."
        )
    try:
        return ViTConfig(**_tuples(json.loads(header["config"])))
    except _MALFORMED as error:
        raise ValueError(
            "weights' header must hold the sizes of a ViT as JSON. "
            f"Got {path}: {type(error).__name__}: {error}"
        ) from error


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in path)


def _named_params(model: ViT) -> dict[str, Any]:
    return {
        _name(path): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
