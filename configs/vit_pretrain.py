"""Pretrains the small ViT that ships with the repository.

Data: Tiny-ImageNet-200 at 32x32 (100 000 training images, 200 classes), read from the
folder that holds ``tinyimagenet32_q75jpeg.npz``. Random shift and flip, half of the
patch tokens dropped while training (arXiv 2208.07220), the best validation checkpoint
kept. Expected: 22 % top-1 on 200 classes (one seed, 22.14), 72 minutes on 2 busy CPU
cores; see ``assets/README.md``.

    python -m experiments.main --config=configs/vit_pretrain.py \
        --config.data.dir=FOLDER --config.export=assets/vit_tin32.safetensors

``:quicktest`` runs two steps on synthetic images.
"""

from ml_collections import ConfigDict

from experiments.config import base


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; ``arg`` is empty or ``quicktest``."""
    config = base()
    config.name = "vit_pretrain"
    config.methods = ("scratch",)
    config.keep_best = True
    config.model.update(
        image_size=32,
        patch_size=4,
        hidden_size=128,
        depth=6,
        num_heads=4,
        mlp_dim=512,
        pool="mean",
        patch_dropout=0.5,
    )
    config.data.update(name="tinyimagenet32", augment="crop_flip")
    config.optim.update(
        learning_rates={"scratch": 1.5e-3},
        batch_size=256,
        steps=3910,  # 10 epochs
        warmup_steps=200,
        weight_decay=0.05,
        label_smoothing=0.1,
    )
    config.log.update(log_every=20, eval_every=391, checkpoint_every=100)
    config.eval_split = "val"
    if arg == "quicktest":
        config.data.name = "synthetic"
        config.model.update(hidden_size=16, depth=1, num_heads=2, mlp_dim=32)
        config.optim.update(batch_size=16, steps=2, warmup_steps=1)
        config.log.update(log_every=1, eval_every=0, checkpoint_every=1)
    elif arg:
        raise ValueError(f"the config argument must be 'quicktest'. Got {arg!r}.")
    return config
