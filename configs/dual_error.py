"""Error of truncated Hermite series of dual kernels, by degree and input norm.

Figure 1 of "Fast Neural Kernel Embeddings for General Activations" (Han et al., arXiv
2209.04121) at norms from 0.25 to 4, for every activation: coefficients at the norm of
each input with the bound on their error, the published recipe (coefficients at norm
one, the dual of the polynomial they make) as released and with its last term, and Monte
Carlo.

    python -m experiments.main --config=configs/dual_error.py

Expected with coefficients at each norm: GELU of degree 8 has errors of 3e-5 at norm 1
and 9e-4 at norm 4; erf needs degree 9 for 1e-3 at norm 1 and 19 for 2e-2 at norm 4,
tanh 7 and 15, the Gaussian 4 and 20. The published recipe is of no use from norm 2 on.
About 4 minutes of one CPU core.

``:quicktest``: three activations at two norms, seconds.
"""

from ml_collections import ConfigDict

import snnk_jax as snnk


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    aliases = ("swish",)
    names = tuple(n for n in snnk.activations.names() if n not in aliases)
    config = ConfigDict(
        {
            "experiment": "dual_error",
            "name": "dual_error" + (f"_{arg}" if arg else ""),
            "activations": names,
            "norms": (0.25, 0.5, 1.0, 2.0, 4.0),
            "examples": 300,
            "dim": 256,
            # Of the published recipe, whose powers overflow beyond.
            "degrees": 20,
            # Of coefficients at each norm.
            "own_degrees": 60,
            # Directions of Monte Carlo.
            "samples": (8192,),
            # The least degree is asked for errors up to norm 1, and at all norms.
            "near_target": 1e-3,
            "far_target": 2e-2,
            "table_degree": 8,
            "plotted": ("relu", "gelu", "erf", "tanh", "gaussian", "sin"),
            "plotted_norms": (0.25, 1.0, 4.0),
            "seed": 0,
        }
    )
    if arg == "quicktest":
        config.update(activations=("relu", "erf", "polynomial"), norms=(1.0, 4.0))
        config.update(examples=40, dim=8, degrees=9, own_degrees=10, samples=(64,))
        config.plotted = ("relu", "erf")
    elif arg:
        raise ValueError(f"the config argument must be quicktest. Got {arg!r}.")
    return config
