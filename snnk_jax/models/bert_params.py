"""BERT weights from Hugging Face checkpoints.

Names with and without the prefix ``bert.``, LayerNorms as ``weight``/``bias`` or
``gamma``/``beta``, one safetensors file or several under an index.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax.numpy as jnp
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
from snnk_jax.models.bert import Bert, BertConfig
from snnk_jax.typing import Dtype

# What no BERT encoder has a place for: heads of pretraining and buffers.
_IGNORED = r"(cls|pooler|classifier|qa_outputs)\..*|embeddings\.position_ids"
# Fields that weights of any kind allow to change.
_FREE = (
    *("pool", "head", "num_outputs", "activation", "layer_norm_eps"),
    *("dropout_rate", "attention_dropout_rate", "remat"),
)
_RENAMES = {
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"LayerNorm\.beta$": "LayerNorm.bias",
}


def load_bert(
    path: str | os.PathLike[str],
    *,
    config: BertConfig | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    **overrides: Any,
) -> tuple[Bert, LoadReport]:
    """Reads a BERT encoder from a Hugging Face checkpoint.

    Args:
      path: a folder with ``config.json`` and the weights, a ``.safetensors`` file or
        the index of several; ``config.json`` is read beside a file.
      config: the sizes, where there is no ``config.json``.
      dtype: computation dtype of the model.
      param_dtype: storage dtype of its parameters.
      **overrides: fields of :class:`BertConfig` to change: ``pool``, ``head``,
        ``num_outputs``, the dropout rates, ``remat``. The head of a file
        (``classifier``), which reads the pooler, is taken with ``pool="pooler"`` if it
        has ``num_outputs`` rows, as many as it has by default; a new one is zero.

    Returns:
      The model, and a report of what was ignored and what is new.

    Raises:
      FileNotFoundError: if there are no weights.
      ValueError: if the file is damaged, of another architecture or a pickle, or does
        not hold exactly the parameters of the model; every missing, unexpected and
        misshapen name is listed, and no model is returned.

    Example:
      >>> from snnk_jax.models.bert_params import load_bert
      >>> model, report = load_bert(folder, num_outputs=3)  # doctest: +SKIP
      >>> report.ignored  # doctest: +SKIP
      ('bert.embeddings.position_ids', ..., 'cls.predictions.bias')
    """
    path = pathlib.Path(path)
    with open_checkpoint(path) as tensors:
        checkpoint = Checkpoint(
            tensors, str(path), prefixes=("bert.",), renames=_RENAMES
        )
        stored_head = checkpoint.shape("classifier.weight")
        if config is None:
            config = _read_config(path)
            if stored_head and len(stored_head) == 2 and stored_head[0] > 0:
                config = dataclasses.replace(config, num_outputs=stored_head[0])
        check_overrides(overrides, _FREE)
        config = dataclasses.replace(config, **overrides)
        check_depth(config.depth, checkpoint)
        sources = _sources(config)
        fresh: dict[str, tuple[int, ...]] = {}
        if config.head == "linear":
            head = linear_sources(
                "head", "classifier", config.hidden_size, config.num_outputs
            )
            fits = stored_head == head["head.kernel"].shape
            if fits and config.pool == "pooler":
                sources |= head
            else:
                fresh = {name: s.shape[::-1] for name, s in head.items()}
        return fill(
            lambda: Bert(
                config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)
            ),
            sources,
            checkpoint,
            ignore=_IGNORED,
            fresh=fresh,
            param_dtype=param_dtype,
        )


def _sources(config: BertConfig) -> dict[str, Source]:
    """Where each parameter of the encoder stands."""
    d = config.hidden_size
    sources = norm_sources("embeddings.norm", "embeddings.LayerNorm", d)
    for ours, theirs, rows in (
        ("word", "word_embeddings", config.vocab_size),
        ("position", "position_embeddings", config.max_length),
        ("token_type", "token_type_embeddings", config.num_types),
    ):
        stored = Source(f"embeddings.{theirs}.weight", (rows, d))
        sources[f"embeddings.{ours}.embedding"] = stored
    for i in range(config.depth):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            sources |= linear_sources(
                f"{block}.attention.{part}", f"{layer}.attention.self.{part}", d, d
            )
        sources |= linear_sources(
            f"{block}.attention.out", f"{layer}.attention.output.dense", d, d
        )
        sources |= norm_sources(
            f"{block}.norm1", f"{layer}.attention.output.LayerNorm", d
        )
        sources |= linear_sources(
            f"{block}.mlp.fc1", f"{layer}.intermediate.dense", d, config.mlp_dim
        )
        sources |= linear_sources(
            f"{block}.mlp.fc2", f"{layer}.output.dense", config.mlp_dim, d
        )
        sources |= norm_sources(f"{block}.norm2", f"{layer}.output.LayerNorm", d)
    if config.pool == "pooler":
        sources |= linear_sources("pooler.dense", "pooler.dense", d, d)
    return sources


def _read_config(path: pathlib.Path) -> BertConfig:
    """The sizes in the ``config.json`` of a checkpoint."""
    stored = read_config_json(path)
    check_architecture(
        stored,
        {
            "model_type": ("bert",),
            "position_embedding_type": ("absolute",),
            "hidden_act": tuple(HUGGING_FACE_GELUS),
            "is_decoder": (False,),
        },
    )
    fields = read_numbers(
        stored,
        {
            "hidden_size": "hidden_size",
            "depth": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "mlp_dim": "intermediate_size",
            "vocab_size": "vocab_size",
            "max_length": "max_position_embeddings",
            "num_types": "type_vocab_size",
        },
    )
    fields["activation"] = HUGGING_FACE_GELUS[stored.get("hidden_act", "gelu")]
    return BertConfig(**fields)
