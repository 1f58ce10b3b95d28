"""Error against depth: replaced layers, bundled networks, and the bound on them.

Networks of 1 to 8 layers of 32 units with cos, GELU and the arc-cosine kernel; Appendix
B of "Scalable Neural Network Kernels" (arXiv 2310.13225) bounds what errors of layers
add up to, here with the number of features the right way up. No data is needed.

    python -m experiments.main --config=configs/depth_error.py

Expected: ``docs/depth_error.md``. About 6 minutes of CPU time; it goes on where it was
stopped. ``:quicktest`` takes seconds.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "depth_error",
            "name": "depth_error" + (f"_{arg}" if arg else ""),
            # cos and gelu with biases; arccos is the kernel itself, without.
            "activations": ("cos", "gelu", "arccos"),
            # Of the weight columns; inputs have norm 1.
            "norms": (0.1, 0.5, 1.0),
            "num_features": (128, 512),
            "depth": 8,
            "dim": 32,
            "bias_std": 0.5,
            # Inputs to solve readouts on, and others to judge on.
            "calibration": 768,
            "examples": 256,
            # Each a network and a draw of the features.
            "seeds": (0, 1, 2),
            # To which bundled features are rescaled where a readout is solved for: a
            # wave has the best ratio of signal to noise there.
            "max_kappa": 1.0,
            # Probability with which Hoeffding's bound may fail.
            "failure": 0.05,
        }
    )
    if arg == "quicktest":
        config.update(
            norms=(0.5,),
            num_features=(32,),
            depth=3,
            dim=8,
            calibration=64,
            examples=32,
            seeds=(0, 1),
        )
    elif arg:
        raise ValueError(f"the config argument must be quicktest. Got {arg!r}.")
    return config
