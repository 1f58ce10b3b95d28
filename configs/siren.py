"""A SIREN fitted to an image, one of its layers replaced by an SNNK.

After the image experiment of "Scalable Neural Network Kernels" (arXiv 2310.13225): a
sine or ReLU SNNK with 64 features in place of a hidden layer of a SIREN (arXiv
2006.09661), beside the original and a SIREN of as many trained parameters. The image is
a photograph that comes with scikit-learn; no data are needed.

    python -m experiments.main --config=configs/siren.py

Expected: PSNR 43 dB for the original, 40 for the dense network, 31 and 29 for the sine
and the ReLU SNNK, within 0.5 dB over seeds (``docs/networks.md``). About 2 minutes of a
CPU core; it goes on where it was stopped.

``:scales`` runs sine SNNKs of several scales of the frozen projection, ``:quicktest``
a few seconds of everything.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "networks",
            "network": "siren",
            "name": "siren" + (f"_{arg}" if arg else ""),
            "data": {"image": "china", "size": 128},
            "model": {
                "width": 128,
                "hidden_layers": 3,
                "activation": "sin",
                # The omega_0 of SIREN.
                "frequency": 30.0,
                # Hidden layers that are replaced, in turn, counted from 0.
                "replaced": (1,),
            },
            # The SNNKs: their maps, their m, and the scales c of the sine's projection.
            "features": ("relu", "sin"),
            "num_features": (64,),
            "scales": (0.3,),
            "optim": {
                "steps": 600,
                "batch_size": 2048,
                "learning_rates": (1e-3, 3e-3, 1e-2),
                "evaluations": 12,
            },
            "timing": {"steps": 10, "rounds": 9},
            "seeds": (0, 1, 2),
        }
    )
    if arg == "scales":
        config.update(
            features=("sin",),
            num_features=(64,),
            scales=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
            seeds=(0,),
        )
    elif arg == "quicktest":
        config.update(
            num_features=(8,),
            optim={"steps": 4, "evaluations": 2, "learning_rates": (1e-3, 3e-3)},
            timing={"steps": 2, "rounds": 2},
            seeds=(0, 1),
        )
        config.data.size = config.model.width = 16
    elif arg:
        raise ValueError(
            f"the config argument must be scales or quicktest. Got {arg!r}."
        )
    return config
