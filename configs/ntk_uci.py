"""Infinite-width networks on the 90 UCI sets of the NTK paper.

The protocol of "Harnessing the Power of Infinitely Wide Deep Nets on Small-data Tasks"
(Arora et al., arXiv 1910.01663) and of its code: the sets of at most 5000 rows without
a test file, all 90 of them here; ReLU networks of 0 to 4 activations, the first layers
trained or fixed; C of a support vector machine from 0.01 to 10,000. Beside it the NTK
and the NNGP with ridge regression, NTK features, and three usual classifiers.

    python -m experiments.main --config=configs/ntk_uci.py \
        --config.data.dir=FOLDER_OF_UCI121

Expected over all 90 sets: NTK 81.9 % (the paper: 81.95 %), its 2048 features 81.4 %,
RBF 81.5 %, in an hour of one CPU core. ``:quicktest``: three small sets, a minute; it
needs the data too.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "ntk_tables",
            "name": "ntk_uci" + (f"_{arg}" if arg else ""),
            "data": {"dir": ""},
            # Names of sets; () takes all without a test file, up to max_rows rows.
            "sets": (),
            "max_rows": 5000,
            "methods": (
                *("ntk_svc", "ntk_ridge", "nngp_svc", "nngp_ridge"),
                *("features_ridge", "rbf_svc", "linear_ridge", "forest"),
            ),
            # Networks of 0 to depths - 1 activations.
            "depths": 5,
            "num_features": 2048,
            "trees": 100,
            # Steps after which a support vector machine stops; the linear one of some
            # sets would take millions.
            "svc_steps": 30_000,
            "seed": 0,
        }
    )
    if arg == "quicktest":
        config.update(sets=("fertility", "iris", "wine"), num_features=64)
        config.update(depths=2, trees=10)
    elif arg:
        raise ValueError(f"the config argument must be quicktest. Got {arg!r}.")
    return config
