"""Fully bundled networks on the nine UCI regression sets of the MC-dropout papers.

Test RMSE on the 20 splits of Gal and Ghahramani (arXiv 1506.02142; protein has 5):
frozen ReLU features with a closed-form readout ("Scalable Neural Network Kernels",
arXiv 2310.13225) beside linear ridge, RBF random features, exact kernel ridge where n
allows, and MLPs tuned by as many trials, at the same number of trained parameters, the
same width and the same FLOPs.

    python -m experiments.main --config=configs/uci_ridge.py \
        --config.data.dir=FOLDER_OF_UCI_REG_GAL

Expected over the nine sets: mean rank 3.0 for one bundled layer, 3.8 for deeper ones,
3.1 for an MLP of the same width, 7 for linear ridge; boston 3.1, concrete 5.5, energy
0.57, kin8nm 0.109 (``docs/closed_form.md`` has all with their errors). About 25 minutes
of one CPU core; it goes on where it was stopped. Sets above 5000 rows take their first
5 splits.

Without ``data.dir`` it runs on scikit-learn's diabetes set. ``:quicktest``: seconds of
that.
"""

from ml_collections import ConfigDict

from experiments.tabular import REGRESSION


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "fit_ridge",
            "study": "regression",
            "name": "uci_ridge" + (f"_{arg}" if arg else ""),
            "data": {"dir": ""},
            "sets": REGRESSION,
            # First splits that are taken, of sets above large_rows; 0: all.
            "max_splits": 0,
            "large_rows": 5000,
            "large_splits": 5,
            # Larger sets are left out; 0: none.
            "max_rows": 0,
            "methods": (
                *("linear", "relu_1", "relu_deep", "rbf_features", "rbf_kernel"),
                *("mlp_trained", "mlp_width", "mlp_flops"),
            ),
            "num_features": 512,
            # Training rows that hyper-parameters are fitted on, at most.
            "tune_rows": 1000,
            # Above this the exact kernel is left out.
            "kernel_rows": 2000,
            "mlp": {
                "rates": (1e-3, 3e-3, 1e-2, 3e-2),
                "decays": (0.0, 0.3),
                "steps": 640,
                # More steps for large sets: at least this many epochs.
                "epochs": 20,
                "batch": 64,
                # Times at which training may be stopped.
                "checkpoints": 5,
            },
            "seed": 0,
        }
    )
    if arg == "quicktest":
        config.update(max_splits=2, num_features=32, tune_rows=100)
        config.mlp.update(rates=(1e-2,), decays=(0.0,), steps=20, epochs=1)
    elif arg:
        raise ValueError(f"the config argument must be quicktest. Got {arg!r}.")
    return config
