"""Configs: the common base, loading from a file, and checks before device work."""

import difflib
import importlib
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from experiments.augment import AUGMENTATIONS
from snnk_jax._arguments import is_real
from snnk_jax.projections import gaussian_names


def base() -> ConfigDict:
    """The fields every config has; a recipe changes values, never adds keys."""
    config = ConfigDict(
        {
            # Names the default workdir, runs/NAME.
            "name": "",
            # Keys of experiments.tasks.METHODS, each trained in turn.
            "methods": ("linear_probe",),
            "seeds": (0,),
            # Runs of a method that one program trains side by side; above 1 for small
            # models on a GPU, without checkpoints on the way.
            "together": 1,
            # Which split scores a run: "val" or "test".
            "eval_split": "test",
            # Return the best evaluation's parameters instead of the last step's.
            "keep_best": False,
            # Another workdir of the same settings: a run without a checkpoint of its
            # own goes on from the one there.
            "resume": "",
            # Write the trained model to this safetensors file, in half precision.
            "export": "",
            # Learning rates tried on the validation split before the seeds; () uses
            # optim.learning_rates.
            "sweep": {"learning_rates": (), "seed": 0},
            "model": {
                # "vit" for images, "bert" for text.
                "family": "vit",
                # A file of models.vit_params, a Hugging Face folder, an original .npz,
                # or package:NAME/FOLDER in an installed package; "" builds the model
                # below from scratch. With weights only the named sizes may change.
                "weights": "",
                "preset": "",
                "image_size": 32,
                "patch_size": 4,
                "hidden_size": 128,
                "depth": 6,
                "num_heads": 4,
                "mlp_dim": 512,
                # "cls", "mean", or "pooler" of a BERT.
                "pool": "mean",
                "vocab_size": 30522,
                "dropout_rate": 0.0,
                "patch_dropout": 0.0,
                "remat": False,
                # Computation dtype; parameters stay float32.
                "dtype": "float32",
            },
            "adapter": {
                "num_features": 16,
                # With a trained projection: as many parameters as 16 without.
                "trained_features": 8,
                # And about as many as BitFit.
                "small_trained_features": 2,
                # The SNNK adapter whose readout is a product of two matrices.
                "factored_features": 128,
                "factored_rank": 8,
                # A wide and a small one of that kind, on standardised inputs.
                "wide_features": 512,
                "small_rank": 4,
                "projection": "orthogonal",
                "bottleneck": 48,
                "lora_rank": 8,
                "vera_rank": 256,
            },
            "data": {
                "name": "synthetic",
                "dir": "",
                "train_size": 0,
                "test_size": 0,
                "val_fraction": 0.1,
                "augment": "none",
                # Of text: ids of an example, and the tokenizer's file or folder; ""
                # takes the folder of the weights.
                "length": 48,
                "tokenizer": "",
            },
            "optim": {
                "learning_rates": ConfigDict(),
                "batch_size": 64,
                "steps": 100,
                "warmup_steps": 0,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "label_smoothing": 0.0,
            },
            "mesh": {
                "axes": (("data", -1),),
                "rules": ((".*", "replicate"),),
            },
            "log": {
                "log_every": 10,
                "eval_every": 0,
                "checkpoint_every": 0,
                "keep": 2,
            },
        }
    )
    return config


def load_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Loads ``"configs/NAME.py[:ARG]"`` for notebooks and tests.

    Args:
      spec: the file, and what its ``get_config`` takes behind a colon.
      overrides: dotted keys to new values, ``{"optim.steps": 10}``.

    Returns:
      The checked, locked config.

    Raises:
      ValueError: for a missing file, an unknown key (with a suggestion), a value of
        another type, or one that :func:`check` refuses.

    Example:
      >>> from experiments import load_config
      >>> config = load_config("configs/vit_pretrain.py:quicktest")
      >>> config.optim.steps
      2
    """
    filename, _, arg = spec.partition(":")
    path = pathlib.Path(filename)
    if not path.is_file():
        root = pathlib.Path(__file__).parent.parent
        path = root / filename
    if not path.is_file():
        raise ValueError(f"a config must be an existing file. Got {filename!r}.")
    config = runpy.run_path(str(path))["get_config"](arg)
    config.lock()
    for key, value in (overrides or {}).items():
        _override(config, key, value)
    check(config)
    return config


def _override(config: ConfigDict, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = config
    parent = config
    for name in (*parents, last):
        if not isinstance(node, ConfigDict) or name not in node:
            keys = list(node) if isinstance(node, ConfigDict) else []
            close = difflib.get_close_matches(name, keys, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Keys: {keys}."
            raise ValueError(f"config keys must exist. Got {dotted!r}.{hint}")
        parent, node = node, node[name]
    try:
        parent[last] = value
    except TypeError as error:
        raise ValueError(
            f"config.{dotted} must be a {type(node).__name__}. Got {value!r}."
        ) from error


_POSITIVE = (
    "together",
    "model.image_size",
    "model.patch_size",
    "model.hidden_size",
    "model.depth",
    "model.num_heads",
    "model.mlp_dim",
    "adapter.num_features",
    "adapter.trained_features",
    "adapter.small_trained_features",
    "adapter.factored_features",
    "adapter.factored_rank",
    "adapter.wide_features",
    "adapter.small_rank",
    "adapter.bottleneck",
    "adapter.lora_rank",
    "adapter.vera_rank",
    "model.vocab_size",
    "data.length",
    "optim.batch_size",
    "optim.steps",
    "optim.clip_norm",
    "log.log_every",
    "log.keep",
)
_NON_NEGATIVE = (
    "data.train_size",
    "data.test_size",
    "optim.warmup_steps",
    "optim.weight_decay",
    "log.eval_every",
    "log.checkpoint_every",
)
_FRACTIONS = (
    "data.val_fraction",
    "optim.label_smoothing",
    "model.dropout_rate",
    "model.patch_dropout",
)
_CHOICES = {
    "eval_split": ("val", "test"),
    "model.family": ("vit", "bert"),
    "model.pool": ("cls", "mean", "pooler"),
    "model.dtype": ("float32", "bfloat16"),
    "adapter.projection": gaussian_names(),
    "data.augment": tuple(AUGMENTATIONS),
}


def methods_of(config: ConfigDict) -> tuple[str, ...]:
    """``config.methods``, also where the command line gave one string with commas."""
    return tuple(name for item in config.methods for name in item.split(","))


EXPERIMENTS = {
    "train": "runner",
    "suite": "suite",
    "kernel_error": "kernel_error",
    "fit_ridge": "fit_ridge",
    "depth_error": "depth_error",
    "networks": "networks",
    "bert_pooler": "bert_pooler",
    "cntk": "cntk",
    "ntk_tables": "ntk_tables",
    "dual_error": "dual_error",
    "ntk_images": "ntk_images",
    "uptrain": "uptrain",
    "compress": "compress",
}
"""Values of ``config.experiment`` and the modules of ``experiments`` behind them."""


def experiment_of(config: ConfigDict) -> ModuleType:
    """The module whose ``run`` and ``check`` a config is for."""
    name = config.get("experiment", "train")
    if name not in EXPERIMENTS:
        raise ValueError(
            f"config.experiment must be one of {', '.join(EXPERIMENTS)}. Got {name!r}."
        )
    return importlib.import_module(f"experiments.{EXPERIMENTS[name]}")


def check(config: ConfigDict) -> None:
    """Raises ValueError for a value that no run could use; touches no device."""
    experiment_of(config).check(config)


def check_base(config: ConfigDict) -> None:
    """Checks a config of :func:`base`, but for its methods."""

    def value(key: str) -> Any:
        node: Any = config
        for name in key.split("."):
            node = node[name]
        return node

    for key in _POSITIVE:
        if not value(key) > 0:
            raise ValueError(f"config.{key} must be positive. Got {value(key)}.")
    for key in _NON_NEGATIVE:
        if not value(key) >= 0:
            raise ValueError(f"config.{key} must not be negative. Got {value(key)}.")
    for key in _FRACTIONS:
        if not 0 <= value(key) < 1:
            raise ValueError(f"config.{key} must be in [0, 1). Got {value(key)}.")
    for key, choices in _CHOICES.items():
        if value(key) not in choices:
            raise ValueError(
                f"config.{key} must be one of {', '.join(choices)}. Got {value(key)!r}."
            )
    if config.model.family == "vit" and config.model.pool == "pooler":
        raise ValueError("config.model.pool must be cls or mean of a vit. Got pooler.")
    if config.model.family != "vit" and config.export:
        raise ValueError(
            f"config.export must be empty but for a vit. Got {config.export!r}."
        )
    if "data" not in dict(config.mesh.axes):
        raise ValueError(
            f"config.mesh.axes must name an axis 'data'. Got {config.mesh.axes}."
        )
    if config.optim.warmup_steps >= config.optim.steps:
        raise ValueError(
            "config.optim.warmup_steps must be less than optim.steps. "
            f"Got {config.optim.warmup_steps} and {config.optim.steps}."
        )
    if not config.methods or not config.seeds:
        raise ValueError(
            "config.methods and config.seeds must not be empty. "
            f"Got {config.methods} and {config.seeds}."
        )
    for key, seeds in (("seeds", config.seeds), ("sweep.seed", (config.sweep.seed,))):
        if not all(_is_seed(seed) for seed in seeds):
            raise ValueError(
                f"config.{key} must be whole numbers of 0 to 2^32 - 1. Got {seeds}."
            )
    check_once("seeds", config.seeds)
    if config.keep_best and config.eval_split != "val":
        raise ValueError(
            "config.eval_split must be 'val' with keep_best: a test split must not "
            f"choose the model. Got {config.eval_split!r}."
        )


def check_once(key: str, values: Sequence[Any]) -> None:
    """Refuses what is named twice: it would count for another independent run."""
    if len(set(values)) < len(values):
        raise ValueError(f"config.{key} must name each one once. Got {tuple(values)}.")


def _is_seed(value: Any) -> bool:
    return is_real(value) and 0 <= value < 2**32 and value == int(value)


def _is_rate(value: Any) -> bool:
    return is_real(value) and 0 < value < float("inf")


def check_training(config: ConfigDict) -> None:
    """Checks a config of :func:`base` and its methods."""
    from experiments.tasks import METHODS

    check_base(config)
    _check_data(config)
    check_once("methods", methods_of(config))
    for method in methods_of(config):
        if method not in METHODS:
            close = difflib.get_close_matches(method, METHODS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"config.methods must be among {', '.join(METHODS)}. "
                f"Got {method!r}.{hint}"
            )
        if not config.sweep.learning_rates:
            rate = config.optim.learning_rates.get(method)
            if not _is_rate(rate):
                raise ValueError(
                    f"config.optim.learning_rates.{method} must be positive. "
                    f"Got {rate!r}."
                )
        if METHODS[method].fresh and config.model.weights:
            raise ValueError(
                f"config.model.weights must be empty for the method {method!r}, which "
                f"starts from new ones. Got {config.model.weights!r}."
            )
    last = methods_of(config)[-1]
    if config.export and not METHODS[last].plain:
        raise ValueError(
            "config.export must be empty unless the last of config.methods leaves the "
            f"modules of the model as they are. Got {config.export!r} and {last!r}."
        )
    if config.together > 1 and (
        config.keep_best or config.resume or config.export or config.log.eval_every
    ):
        raise ValueError(
            "config.together must be 1 for runs with keep_best, resume, export or "
            f"log.eval_every. Got {config.together}."
        )
    if not all(_is_rate(rate) for rate in config.sweep.learning_rates):
        raise ValueError(
            "config.sweep.learning_rates must be positive. "
            f"Got {config.sweep.learning_rates}."
        )
    check_once("sweep.learning_rates", config.sweep.learning_rates)


def _check_data(config: ConfigDict) -> None:
    """Refuses a data set that the model does not read, and what has no effect on it."""
    from experiments import data, glue

    name, text = config.data.name, config.model.family == "bert"
    known = tuple(glue.NUM_CLASSES if text else data.NUM_CLASSES)
    if name not in known and (text or not name.startswith("tfds:")):
        others = () if text else ("tfds:NAME",)
        raise ValueError(
            f"config.data.name must be one of {', '.join(known + others)} for a "
            f"{config.model.family}. Got {name!r}."
        )
    if text and (config.data.augment != "none" or config.model.patch_dropout):
        raise ValueError(
            "config.data.augment must be 'none' and config.model.patch_dropout 0 for "
            f"text. Got {config.data.augment!r} and {config.model.patch_dropout}."
        )
    if text and glue.NUM_CLASSES[name] == 1 and config.optim.label_smoothing:
        raise ValueError(
            "config.optim.label_smoothing must be 0 for a regression. "
            f"Got {config.optim.label_smoothing}."
        )
