"""MNIST by closed form: no gradient, one pass over the images, one linear solve.

The closed form of fully bundled networks of "Scalable Neural Network Kernels" (arXiv
2310.13225) on plain pixels: dense ReLU features, two layers of them, and pooled ReLU
features of patches; accuracy against m, and seconds from raw images to the last
prediction.

    python -m experiments.main --config=configs/mnist_ridge.py \
        --config.data.dir=FOLDER_OF_IDX_FILES

Expected with pooled patches: 98.2 % at 1024 features, 98.9 % at 4096, 99.1 % at 8192
(82 seconds on 2 CPU cores); with dense ReLU features 96.7 % at 4096
(``docs/closed_form.md``). ``:large`` adds 16384 features: 99.1 %, 4 minutes, 11 GB.

``:digits`` needs no files: scikit-learn's digits at numbers of features around the
number of images, with a penalty selected by GCV and with one that is next to nothing,
whose accuracy falls where m meets n. About a minute. ``:quicktest``: seconds of that.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "fit_ridge",
            "study": "images",
            "name": "mnist_ridge" + (f"_{arg}" if arg else ""),
            "data": {"name": "mnist", "dir": ""},
            # Numbers of features of each map.
            "maps": {
                "relu": (256, 1024, 4096, 8192),
                "relu_relu": (1024, 4096),
                "patches": (256, 1024, 4096, 8192),
            },
            "patches": {"size": 7, "cells": 4, "bias": 1.0},
            "seeds": (0,),
            # How l2 is chosen: "gcv", or "validation" on a share of the training
            # images; the fit is then repeated on all of them.
            "criterion": "validation",
            "val_fraction": 0.1,
            # Wider maps take the l2 that is best for this many features.
            "select_features": 1024,
            # Also fit with this penalty; 0: do not.
            "fixed_l2": 0.0,
            "chunk_size": 4096,
        }
    )
    if arg == "large":
        config.maps.relu = (*config.maps.relu, 16384)
        config.maps.patches = (*config.maps.patches, 16384)
    elif arg in ("digits", "quicktest"):
        config.data.name = "digits"
        sizes = (84, 168, 337, 674, 1010, 1347, 1684, 2694)
        config.maps.relu = sizes
        config.maps.relu_relu = config.maps.patches = ()
        config.patches.update(size=3, cells=2)
        config.seeds = (0, 1, 2, 3, 4)
        config.criterion = "gcv"
        config.fixed_l2 = 1e-9
        if arg == "quicktest":
            config.maps.update(relu=(64, 128), relu_relu=(64,), patches=(64,))
            config.seeds = (0,)
    elif arg:
        raise ValueError(
            f"the config argument must be large, digits or quicktest. Got {arg!r}."
        )
    return config
