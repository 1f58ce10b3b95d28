"""Fully bundled networks on the UCI classification sets of the NTK papers.

The protocol of "Harnessing the Power of Infinitely Wide Deep Nets on Small-data Tasks"
(Arora et al., arXiv 1910.01663): hyper-parameters on a split of their own, accuracy on
four others or on the set's test file; mean accuracy, mean rank, P90, P95 and PMA. All
methods have as many trials. Like the paper, the sets of at most 5000 rows;
``--config.max_rows=0`` takes all 116 that the file holds.

    python -m experiments.main --config=configs/uci121.py \
        --config.data.dir=FOLDER_OF_UCI121

Expected over 103 sets: mean accuracy 78.1 % for bundled cosine features, 77.5 to
77.8 % for bundled ReLU networks, 77.9 % for an MLP of the same width, 74.3 % for linear
ridge (``docs/closed_form.md`` has all). About 25 minutes of one CPU core; it goes on
where it was stopped.

``:quicktest``: three small sets, seconds; it needs the data too.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "fit_ridge",
            "study": "classification",
            "name": "uci121" + (f"_{arg}" if arg else ""),
            "data": {"dir": ""},
            # Names of sets; () takes all, up to max_rows rows; 0: any.
            "sets": (),
            "max_rows": 5000,
            "methods": (
                *("linear", "relu_1", "relu_2", "relu_3", "cosine"),
                *("rbf_features", "rbf_kernel", "mlp_width"),
            ),
            "num_features": 512,
            # Rows that hyper-parameters are fitted and judged on, at most.
            "tune_rows": 600,
            # Above this the exact kernel is left out.
            "kernel_rows": 1500,
            "mlp": {
                "rates": (1e-3, 3e-3, 1e-2, 3e-2),
                "decays": (0.0, 0.3),
                "steps": 320,
                # More steps for large sets: at least this many epochs.
                "epochs": 10,
                "batch": 64,
                # Times at which training may be stopped.
                "checkpoints": 5,
            },
            "seed": 0,
        }
    )
    if arg == "quicktest":
        config.update(sets=("iris", "wine", "monks-1"), num_features=32)
        config.mlp.update(rates=(1e-2,), decays=(0.0,), steps=20, epochs=1)
    elif arg:
        raise ValueError(f"the config argument must be quicktest. Got {arg!r}.")
    return config
