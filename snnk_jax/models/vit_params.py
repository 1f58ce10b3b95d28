"""ViT weights from and to safetensors files.

A file holds the parameters under their paths in :class:`~snnk_jax.models.vit.ViT`
(``blocks.0.mlp.fc1.kernel``) and the :class:`ViTConfig` as JSON in its metadata, so
it can be opened without knowing the sizes.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from snnk_jax._files import open_safetensors, write_atomic
from snnk_jax.models.vit import ViT, ViTConfig, resize_position_embedding
from snnk_jax.typing import Dtype

_FORMAT = "snnk_jax.vit.1"


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
      model: a ViT without adapters.
      dtype: storage dtype, for example ``"float16"``; None keeps each parameter's.
      metadata: more strings for the file's header (a model card).

    Raises:
      ValueError: if a parameter is not finite in the storage dtype.
    """
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
    config = json.dumps(dataclasses.asdict(model.config))
    header = (metadata or {}) | {"format": _FORMAT, "config": config}
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
      **overrides: fields of :class:`ViTConfig` to change. Another ``image_size``
        resamples the position embedding; another ``num_classes`` puts a fresh zero
        head in place of the stored one.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged or does not hold exactly the parameters of
        the model; every missing, unexpected and misshapen name is listed.
    """
    with open_safetensors(path, "weights") as file:
        stored = _stored_config(file, path)
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = dataclasses.replace(stored, **overrides)
    if config.num_classes != stored.num_classes:
        arrays["head.kernel"] = np.zeros(
            (config.hidden_size, config.num_classes), np.float32
        )
        arrays["head.bias"] = np.zeros((config.num_classes,), np.float32)
    if config.grid != stored.grid and "position_embedding" in arrays:
        arrays["position_embedding"] = np.asarray(
            resize_position_embedding(
                jnp.asarray(arrays["position_embedding"], jnp.float32),
                stored.grid,
                config.grid,
            )
        )
    # Shapes only: the random initial weights are never computed.
    model = nnx.eval_shape(
        lambda: ViT(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )
    params = _named_params(model)
    _check_names({k: v.shape for k, v in params.items()}, arrays, str(path))
    graphdef, state = nnx.split(model)
    flat = {
        key: variable.replace(jnp.asarray(arrays[_name(key)], param_dtype))
        for key, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "weights' header must hold the sizes of a ViT as JSON. "
            f"Got {path}: {type(error).__name__}: {error}"
        ) from error


def _check_names(
    shapes: dict[str, tuple[int, ...]], arrays: dict[str, np.ndarray], where: str
) -> None:
    missing = sorted(shapes.keys() - arrays.keys())
    unexpected = sorted(arrays.keys() - shapes.keys())
    misshapen = [
        f"{name} {arrays[name].shape} instead of {shapes[name]}"
        for name in sorted(shapes.keys() & arrays.keys())
        if arrays[name].shape != shapes[name]
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            "weights must hold exactly the parameters of the model. "
            f"Got {where} with missing {missing}, unexpected {unexpected}, "
            f"misshapen {misshapen}."
        )


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in path)


def _named_params(model: ViT) -> dict[str, Any]:
    return {
        _name(path): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
