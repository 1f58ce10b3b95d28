"""Replaces the feed-forward blocks of a pretrained ViT, and trains what is left.

Up-training as in "Scalable Neural Network Kernels" (arXiv 2310.13225, section 4.4): the
last blocks of the small ViT of ``configs/vit_pretrain.py`` are replaced and all
parameters learn the task, here CIFAR-10 stored as JPEG. The starts are the blocks' own
units with a readout in closed form (``snnk.compress``), the paper's Psi(W), and random
numbers, beside the dense model that is trained alike:

    python -m experiments.main --config=configs/vit_uptrain.py \
        --config.data.dir=FOLDER_OF_CIFAR10_JPEG

The settings are first guesses, and the 1000 steps have not been run. Expected after 200
of 64 images: dense 55 %, units-32 53 %, random units 46 %, Psi(W) 30 %; see
``docs/results.md``.

Arguments behind a colon:

* ``:embedding``  no labels: the small model follows the dense one's embeddings; the
  score is the rank correlation of similarities with the dense model's.
* ``:hidden``  its last hidden states as well.
* ``:blocks``  1, 3 and all 6 last blocks.
* ``:quicktest``  two steps on synthetic images, without files.
"""

from ml_collections import ConfigDict

from experiments.config import base


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = base()
    config.name = "vit_uptrain" + (f"_{arg}" if arg else "")
    config.experiment = "uptrain"
    config.methods = ("dense", "units-32", "units_random-32", "psi-16", "psi_random-16")
    config.uptrain = ConfigDict(
        {
            "top": (0,),
            "objective": "task",
            "similarity": 10.0,
            "trained": "all",
            "learning_rate": 5e-4,
            "new_rate": 3.0,
            "calibration": 1024,
            "probes": 8,
            "texts": (),
            "cache": "",
            "score": "",
        }
    )
    config.model.update(weights="assets/vit_tin32.safetensors", image_size=32)
    config.data.update(name="cifar10_jpeg", augment="crop_flip", val_fraction=0.1)
    config.optim.update(batch_size=128, steps=1000, warmup_steps=50, weight_decay=1e-4)
    config.log.update(log_every=20, eval_every=0, checkpoint_every=100)
    if arg in ("embedding", "hidden"):
        config.methods = ("units-32", "units_random-32", "psi-16")
        config.uptrain.update(objective=arg, trained="blocks")
        # What the teacher said was of the images as they are.
        config.data.augment = "none"
        config.eval_split = "val"
    elif arg == "blocks":
        config.uptrain.top = (1, 3, 0)
    elif arg == "quicktest":
        config.methods = ("dense", "units-4", "psi-4")
        config.uptrain.update(calibration=32, probes=1)
        config.model.update(
            weights="", hidden_size=16, depth=2, num_heads=2, mlp_dim=32
        )
        config.data.update(name="synthetic")
        config.optim.update(batch_size=16, steps=2, warmup_steps=1)
        config.log.update(log_every=1, eval_every=0, checkpoint_every=1)
    elif arg:
        raise ValueError(
            "the config argument must be embedding, hidden, blocks or quicktest. "
            f"Got {arg!r}."
        )
    return config
