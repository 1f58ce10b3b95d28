"""Fine-tunes a pretrained ViT with SNNK adapters, beside what they compete with.

By default the small ViT of ``configs/vit_pretrain.py`` (``assets/vit_tin32``) learns
scikit-learn's handwritten digits, which need no download:

    python -m experiments.main --config=configs/vit_adapter.py

Expected on the test writers, 3 seeds: linear probe 80.2 % (80.0 to 80.2), Houlsby 93.3
(92.0 to 95.1), SNNK 89.5 to 89.7 (88.4 to 90.7). Two and a half minutes on 2 CPU
cores; the sweep takes about 40 minutes.

Arguments behind a colon:

* ``:sweep``  all methods, each with its learning rate chosen on a validation split
  from one grid, then 3 seeds. Its result is committed, ``docs/results.md``.
* ``:maps``  the SNNK adapters of all feature maps, chosen and run like the sweep.
* ``:cifar10_jpeg``  CIFAR-10 stored as JPEG, ``--config.data.dir=FOLDER``.
* ``:cifar10``, ``:cifar100``  through TFDS, prepared beforehand.
* ``:flowers``  photographs of five kinds of flowers, ``--config.data.dir=FOLDER``, each
  method with its learning rate chosen on a validation split, then 3 seeds. The model's
  size is 32 pixels; ``--config.model.image_size=16`` takes a quarter of the time.
* ``:quicktest``  two steps on synthetic images.

``--config.methods=snnk_relu,lora`` picks methods, see ``experiments/tasks.py``.
"""

from ml_collections import ConfigDict

from experiments.config import base

_METHODS = ("linear_probe", "houlsby", "snnk_relu", "snnk_cos", "snnk_factored")
_ALL_METHODS = (
    *_METHODS,
    "houlsby_slim",
    "pfeiffer",
    "lora",
    "bitfit",
    "full",
)
_FLOWERS = (
    *("linear_probe", "houlsby", "houlsby_slim", "snnk_relu", "snnk_factored"),
    *("lora", "bitfit", "full"),
)
_MAPS = (
    *("snnk_relu", "snnk_leaky", "snnk_cos"),
    *("snnk_gaussian", "snnk_exp", "snnk_square"),
)


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = base()
    config.name = "vit_adapter" + (f"_{arg}" if arg else "")
    config.methods = _METHODS
    config.model.update(weights="assets/vit_tin32.safetensors", image_size=16)
    config.adapter.update(num_features=16, bottleneck=48, lora_rank=8)
    config.data.update(name="digits", augment="crop", val_fraction=0.2)
    config.optim.update(
        # Chosen by `:sweep`, see docs/results.md.
        learning_rates={
            "linear_probe": 0.1,
            "houlsby": 0.005,
            "snnk_relu": 0.02,
            "snnk_cos": 0.02,
            "snnk_factored": 0.02,
            "houlsby_slim": 0.005,
            "pfeiffer": 0.02,
            "lora": 0.005,
            "bitfit": 0.02,
            "full": 0.001,
            "snnk_leaky": 0.02,
            "snnk_gaussian": 0.02,
            "snnk_exp": 0.02,
            "snnk_square": 0.1,
        },
        batch_size=64,
        steps=300,
        warmup_steps=20,
        weight_decay=1e-4,
    )
    config.log.update(log_every=10, eval_every=100, checkpoint_every=100)
    if arg == "sweep":
        config.methods = _ALL_METHODS
        config.seeds = (0, 1, 2)
        config.sweep.learning_rates = (1e-3, 5e-3, 2e-2, 1e-1, 5e-1)
    elif arg == "maps":
        config.methods = _MAPS
        config.seeds = (0, 1, 2)
        config.sweep.learning_rates = (5e-3, 2e-2, 1e-1)
    elif arg in ("cifar10", "cifar100", "cifar10_jpeg"):
        config.data.name = arg if arg == "cifar10_jpeg" else f"tfds:{arg}"
        config.model.image_size = 32
        config.data.augment = "crop_flip"
        config.optim.update(steps=2000, warmup_steps=100, batch_size=128)
        config.log.update(log_every=20, eval_every=500, checkpoint_every=250)
    elif arg == "flowers":
        config.methods = _FLOWERS
        config.seeds = (0, 1, 2)
        config.sweep.learning_rates = (1e-3, 5e-3, 2e-2)
        config.data.update(name="flowers5", augment="crop_flip")
        config.model.image_size = 32
        config.log.eval_every = 0
    elif arg == "quicktest":
        config.model.update(
            weights="", image_size=32, hidden_size=16, depth=1, num_heads=2, mlp_dim=32
        )
        config.data.update(name="synthetic")
        config.optim.update(batch_size=16, steps=2, warmup_steps=1)
        config.log.update(log_every=1, eval_every=0, checkpoint_every=1)
    elif arg:
        raise ValueError(
            "the config argument must be sweep, maps, cifar10, cifar100, "
            f"cifar10_jpeg, flowers or quicktest. Got {arg!r}."
        )
    return config
