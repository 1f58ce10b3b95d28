"""A multilayer perceptron on MNIST, one of its layers replaced by a ReLU SNNK.

After the MNIST experiment of "Scalable Neural Network Kernels" (arXiv 2310.13225): a
ReLU SNNK with 32 features and with 128, in place of the first or of the second hidden
layer, beside the original and dense networks of as many trained parameters.

    python -m experiments.main --config=configs/mnist_mlp.py:mnist --config.data.dir=DIR

DIR holds the four files ``train-images-idx3-ubyte.gz`` and so on. Expected: 98.2 %
for the original; for the SNNK in the first and in the second layer 85.1 to 86.9 % and
97.3 to 97.6 % with 32 features, 95.9 to 96.3 % and 97.6 to 97.7 % with 128
(``docs/networks.md``). About 8 minutes of a CPU core; it goes on where it was stopped.

Without ``:mnist`` it reads scikit-learn's 8x8 digits, which need no files, and
``:quicktest`` does a few seconds of that.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "networks",
            "network": "mnist_mlp",
            "name": "mnist_mlp" + (f"_{arg}" if arg else ""),
            "data": {"name": "digits", "dir": ""},
            "model": {
                "width": 256,
                "hidden_layers": 2,
                "activation": "relu",
                # No factor before the activation.
                "frequency": 0.0,
                # Hidden layers that are replaced, in turn, counted from 0.
                "replaced": (0, 1),
            },
            # The SNNKs: their maps, their m, and the scales c of a sine's projection.
            "features": ("relu",),
            "num_features": (32, 128),
            "scales": (0.1,),
            "optim": {
                "steps": 600,
                "batch_size": 128,
                "learning_rates": (1e-3, 3e-3, 1e-2),
                "evaluations": 10,
            },
            "timing": {"steps": 20, "rounds": 9},
            "seeds": (0, 1, 2),
        }
    )
    if arg == "mnist":
        config.data.name = "mnist"
        config.optim.steps = 1500
    elif arg == "quicktest":
        config.update(
            num_features=(4,),
            optim={"steps": 4, "evaluations": 2, "learning_rates": (1e-3, 3e-3)},
            timing={"steps": 2, "rounds": 2},
            seeds=(0, 1),
        )
        config.model.width = 16
    elif arg:
        raise ValueError(
            f"the config argument must be mnist or quicktest. Got {arg!r}."
        )
    return config
