"""What a frozen encoder makes of the texts of a task, computed once and kept."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save

import snnk_jax as snnk
from experiments import glue, tasks
from experiments.splits import Batch
from snnk_jax._files import write_atomic

# The parameters that a head file holds and a base model's fingerprint leaves out.
TASK_PARAMETERS = "(pooler|head)/.*"


@dataclasses.dataclass(frozen=True)
class States:
    """Pooled encoder states ``[n, d]`` and labels of three splits.

    Attributes:
      x: states by split, ``train``, ``val`` and ``test``.
      y: labels likewise.
      classes: number of classes, 1 for values.
      metric: what the task is judged by.
      fingerprint: of the encoder, for the files of heads.
      pooler: kernel and bias of the pretrained pooler, where there is one.
    """

    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    classes: int
    metric: str
    fingerprint: str
    pooler: tuple[np.ndarray, np.ndarray] | None

    @property
    def dim(self) -> int:
        return self.x["train"].shape[1]

    @functools.cached_property
    def norm(self) -> float:
        """Root mean square norm of the training states."""
        return float(np.sqrt(np.mean(np.sum(self.x["train"] ** 2, axis=1))))


def load_states(task: str, config: Any, workdir: pathlib.Path) -> States:
    """The encoder's states of a task, from ``workdir/states`` or the encoder."""
    file = workdir / "states" / f"{task}.safetensors"
    classes = glue.NUM_CLASSES[task if task in glue.NUM_CLASSES else f"glue:{task}"]
    metric = glue.TASKS[task].metric if task in glue.TASKS else "accuracy"
    if not file.is_file():
        write_atomic(file, save(_encode_task(task, config)))
    arrays = load_file(file)
    pooler = None
    if "pooler.kernel" in arrays:
        pooler = arrays["pooler.kernel"], arrays["pooler.bias"]
    return States(
        x={split: arrays[f"{split}.x"] for split in ("train", "val", "test")},
        y={split: arrays[f"{split}.y"] for split in ("train", "val", "test")},
        classes=classes,
        metric=metric,
        fingerprint=arrays["fingerprint"].tobytes().hex(),
        pooler=pooler,
    )


def _encode_task(task: str, config: Any) -> dict[str, np.ndarray]:
    name = task if task == "synthetic_text" else f"glue:{task}"
    weights = tasks.weights_path(config.model.weights)
    options = {
        "directory": config.data.dir,
        "tokenizer": weights,
        "length": config.data.length,
        "val_fraction": config.data.val_fraction,
    }
    dataset = glue.load(name, **options)
    limit = config.data.max_train_size
    if limit and len(dataset.train) > limit:
        dataset = glue.load(name, train_size=limit, **options)
    encoder = tasks.build_model(config, 1, nnx.Rngs(0))
    found = snnk.adapters.fingerprint(encoder, exclude=TASK_PARAMETERS)
    arrays = {"fingerprint": np.frombuffer(bytes.fromhex(found), np.uint8)}
    if config.model.pool == "pooler":
        arrays["pooler.kernel"] = np.asarray(encoder.pooler.dense.kernel[...])
        arrays["pooler.bias"] = np.asarray(encoder.pooler.dense.bias[...])
    for split in ("train", "val", "test"):
        rows = getattr(dataset, split)
        batch = rows.__getitems__(np.arange(len(rows)))
        arrays[f"{split}.x"] = encode(encoder, batch)
        arrays[f"{split}.y"] = batch["label"]
    return arrays


def encode(encoder: Any, batch: Batch, size: int = 64) -> np.ndarray:
    """Pooled states of texts ``[n, d]``, without the pooler's map.

    Texts of like length go together and are padded to a multiple of 16 tokens.
    """
    graphdef, state = nnx.split(encoder)

    @jax.jit
    def pooled(state: Any, *inputs: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        if model.config.pool == "pooler":
            return model.hidden_states(*inputs)[..., 0, :]
        return model.features(*inputs)

    lengths = batch["mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    out = np.zeros((len(order), encoder.config.hidden_size), np.float32)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = int(lengths[rows].max())
        width = min(-(-longest // 16) * 16, batch["mask"].shape[1])
        # The last batch is filled up, so that it compiles no shape of its own.
        filled = np.resize(rows, size)
        names = ("tokens", "token_types", "mask")
        inputs = (batch[name][filled, :width] for name in names)
        out[rows] = np.asarray(pooled(state, *inputs))[: len(rows)]
    return out
