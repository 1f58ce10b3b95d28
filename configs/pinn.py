"""Physics-informed networks, one of their layers replaced by an SNNK.

After the physics experiment of "Scalable Neural Network Kernels" (arXiv 2310.13225): an
SNNK with 32 features in a network that solves a quantum two-body problem, here two
particles in a harmonic trap that attract one another; and the Burgers equation. Both
have exact solutions to compare with; no data are needed.

    python -m experiments.main --config=configs/pinn.py

Expected relative L2 errors: 0.003 to 0.005 for the original and 0.0015 to 0.002 for the
sine SNNK on two bodies, 0.009 to 0.022 and 0.013 to 0.088 on Burgers
(``docs/networks.md``). About 5 minutes of a CPU core; it goes on where it was stopped.

``:two_body`` and ``:burgers`` run one of them, ``:quicktest`` a few seconds of both.
"""

from ml_collections import ConfigDict

_PROBLEMS = ("two_body", "burgers")


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "networks",
            "network": "pinn",
            "name": "pinn" + (f"_{arg}" if arg else ""),
            "problems": _PROBLEMS,
            # The ground state has the energy (1 + sqrt(1 + 2 coupling)) / 2.
            "two_body": {"coupling": 4.0},
            # Pi times the usual viscosity: a wider shock, for a CPU's patience.
            "burgers": {"viscosity": 0.01},
            "model": {
                "width": 48,
                "hidden_layers": 3,
                "activation": "tanh",
                # No factor before the activation.
                "frequency": 0.0,
                # Hidden layers that are replaced, in turn, counted from 0.
                "replaced": (1,),
            },
            # The SNNKs: their maps, their m, and the scales c of the sine's projection.
            "features": ("relu", "sin"),
            "num_features": (32,),
            "scales": (0.35,),
            "optim": {
                "steps": 1500,
                "batch_size": 1024,
                "learning_rates": (3e-3, 1e-2, 3e-2),
                "evaluations": 15,
            },
            "timing": {"steps": 10, "rounds": 9},
            "seeds": (0, 1, 2),
        }
    )
    if arg == "quicktest":
        config.update(
            num_features=(4,),
            optim={"steps": 4, "evaluations": 2, "batch_size": 64},
            timing={"steps": 2, "rounds": 2},
            seeds=(0, 1),
        )
        config.optim.learning_rates = (3e-3,)
        config.model.width = 8
    elif arg in _PROBLEMS:
        config.problems = (arg,)
    elif arg:
        raise ValueError(
            f"the config argument must be quicktest or one of {', '.join(_PROBLEMS)}. "
            f"Got {arg!r}."
        )
    return config
