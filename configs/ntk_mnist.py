"""MNIST with features of the neural tangent kernel of two ReLU layers.

Plain pixels, images of norm one; random features, and the kernel's columns at the
centres of k-means ("landmarks"), of all 60,000 training images by streamed ridge
regression, the penalty from held-out training images, accuracy against the number of
features (Zandieh et al., "Scaling Neural Tangent Kernels via Sketching and Random
Features", arXiv 2106.07880, have the figure); beside them the exact kernel of up to
5,000 training images.

    python -m experiments.main --config=configs/ntk_mnist.py \
        --config.data.dir=FOLDER_OF_IDX_FILES

Expected: 93.7 % with 1024 random features, 97.0 % with 8192; 96.8 % with 1024
landmarks, 98.0 % with 4096, 98.3 % with 8192, the widest in four and six minutes of one
CPU core; the exact kernel of 5000 images 96.6 %. ``:large`` adds 16384 of both, of
which the landmarks have 98.6 % after 20 minutes in 11 GB. ``:quicktest``: seconds,
on scikit-learn's digits, no files needed.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "ntk_images",
            "name": "ntk_mnist" + (f"_{arg}" if arg else ""),
            "data": {"name": "mnist", "dir": ""},
            # "unit": each image of norm one; "centred": less the mean image.
            "pixels": "unit",
            # ReLU layers.
            "depth": 2,
            "num_features": (1024, 2048, 4096, 8192),
            # Numbers of landmarks, centres of k-means; () for none.
            "landmarks": (1024, 4096, 8192),
            # Features of the first layer, at most.
            "width": 4096,
            "exact_rows": (1000, 2000, 5000),
            "seeds": (0,),
            "criterion": "validation",
            "val_fraction": 0.1,
            # Wider maps take the penalty that is best for this many features.
            "select_features": 1024,
            "chunk_size": 4096,
        }
    )
    if arg == "large":
        config.num_features = (*config.num_features, 16384)
        config.landmarks = (*config.landmarks, 16384)
    elif arg == "quicktest":
        config.data.name = "digits"
        config.update(num_features=(64, 128), landmarks=(64, 128))
        config.update(exact_rows=(100,), select_features=64)
    elif arg:
        raise ValueError(
            f"the config argument must be large or quicktest. Got {arg!r}."
        )
    return config
