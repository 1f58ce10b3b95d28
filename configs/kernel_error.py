"""Pointwise errors of the feature maps: where they work and where they fail.

The experiment of Section 4.1 of "Scalable Neural Network Kernels" (arXiv 2310.13225)
and its limits: relative error against m for every map, projection and activation on
layers of growing kappa = |x| |w|, isotropic and with decaying spectra, beside the
constant and the affine predictors. No data is needed.

    python -m experiments.main --config=configs/kernel_error.py

Expected: ``docs/results.md``, section "Pointwise kernels". About 15 minutes on 2 CPU
cores; it goes on where it was stopped.

``:projections``, ``:activations``, ``:arccos``, ``:exponential`` and ``:polynomial``
run one study, ``:quicktest`` a few seconds of everything.
"""

from ml_collections import ConfigDict

_STUDIES = ("projections", "activations", "arccos", "exponential", "polynomial")


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "kernel_error",
            "name": "kernel_error" + (f"_{arg}" if arg else ""),
            "studies": _STUDIES,
            "regimes": (
                *("iso 0.5", "iso 1", "iso 2", "iso 4", "ffn 8"),
                *("i^-1 4", "i^-1 10", "i^-2 40"),
            ),
            "projections": (
                *("gaussian", "orthogonal", "simplex"),
                *("antithetic", "sobol", "hadamard"),
            ),
            "activations": (
                *("cos", "gelu", "silu", "tanh", "sigmoid", "erf", "softplus"),
                *("relu", "sech", "gaussian"),
            ),
            "num_features": (64, 128, 256, 512, 1024),
            # The activations study: all at this m, the first ones at every m.
            "main_num_features": 512,
            "swept_activations": 2,
            "dim": 64,
            "outputs": 64,
            # Inputs to calibrate on, and others to judge on.
            "calibration": 1024,
            "examples": 256,
            # Draws of every map; fitted readouts vary little.
            "draws": 20,
            "readout_draws": 3,
            # Also predict the errors by diagnostics.predicted_rmse.
            "predict": True,
            "data_seed": 0,
        }
    )
    if arg == "quicktest":
        config.update(
            regimes=("iso 0.5", "i^-1 4"),
            projections=("gaussian", "simplex"),
            activations=("cos", "gelu"),
            num_features=(32, 64),
            dim=8,
            main_num_features=64,
            outputs=4,
            calibration=128,
            examples=64,
            draws=2,
            readout_draws=1,
        )
    elif arg in _STUDIES:
        config.studies = (arg,)
    elif arg:
        raise ValueError(
            f"the config argument must be quicktest or one of {', '.join(_STUDIES)}. "
            f"Got {arg!r}."
        )
    return config
