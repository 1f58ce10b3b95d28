"""CIFAR-10 with convolutional neural tangent kernels: features and exact kernels.

Myrtle-5 and Myrtle-7 with ReLU and global average pooling (Shankar et al., "Neural
Kernels Without Tangents", arXiv 2003.02237), whose exact kernels cost hundreds of GPU
hours on CIFAR-10 (stored here as quality-75 JPEG), against their features: seconds of
the exact kernel measured on blocks and extrapolated, seconds of the features at three
numbers of images, the error of the kernel on a block, and the accuracy of ridge
regression against images and features. Images are standardised one by one and whitened
(ZCA, fitted on the training images); the penalty is chosen on held-out training images.

    python -m experiments.main --config=configs/cntk_cifar10.py \
        --config.data.dir=FOLDER_OF_THE_NPZ

takes 18 minutes of one CPU core. Expected with 2048 features: an error of 1.6 % of the
kernel, and 1000 images in 1/480 of the extrapolated time of their exact kernel, for
Myrtle-5; 1.7 % and 1/430 for Myrtle-7; with 1024 features and 2000 images accuracies
of 46.6 % and 47.6 %.

``:full`` takes all 60000 images through 1024 features of Myrtle-5, half an hour of one
CPU core, to 60.2 %. On a GPU there is time for 8192 of them, again in one pass and one
solution:

    python -m experiments.main --config=configs/cntk_cifar10.py:gpu \
        --config.data.dir=FOLDER_OF_THE_NPZ --workdir=DIR

It needs 83 GFLOP an image, 5 PFLOP in all: about 30 seconds at the TF32 rate of an
H100, in less than 16 GB, and half a minute more for decoding, whitening, compilation
and the Cholesky factors on the host. ``:quicktest``: seconds, on synthetic images.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; see the module for ``arg``."""
    config = ConfigDict(
        {
            "experiment": "cntk",
            "name": "cntk_cifar10" + (f"_{arg}" if arg else ""),
            "data": {"name": "cifar10_jpeg", "dir": "", "image_size": 32},
            "nets": ("myrtle5", "myrtle7"),
            # Share of the mean eigenvalue that whitening adds to all of them; 0: no
            # whitening.
            "zca": 0.1,
            "seed": 0,
            # Images of the blocks of the exact kernel: of its error, of its time.
            "exact": {"error_images": 16, "block": 4, "blocks": 3},
            # Numbers of images whose features are timed, and the number that the
            # speed-up is told for.
            "cost": {"images": (64, 128, 256), "extrapolate": 1000},
            # Numbers of features of errors and costs, and seeds of the errors.
            "error": {"num_features": (1024, 2048), "seeds": (0, 1, 2)},
            # Features below the last activation; () follows from num_features.
            "width": (),
            # Images at a time inside of the features; 0: by memory.
            "batch_size": 0,
            "accuracy": {
                "num_features": (1024,),
                # Training images, of those that are not held out; 0: all.
                "images": (500, 1000, 2000),
                "held_out": 1000,
                "test_images": 2000,
                # Penalties per image, as shares of the mean square of a feature vector.
                "l2s": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
            },
            # Images whose features are held at a time; fewer are filled up, so that one
            # program does for all.
            "slice_size": 64,
        }
    )
    if arg == "full":
        config.nets = ("myrtle5",)
        config.error.update(num_features=(1024,), seeds=(0,))
        config.accuracy.update(
            images=(2000, 5000, 10000, 20000, 0), held_out=5000, test_images=0
        )
    elif arg == "gpu":
        config.nets = ("myrtle5",)
        config.width = (256, 512, 1024)
        config.batch_size = 128
        config.exact.update(error_images=24, block=8)
        config.cost.images = (5120, 10240, 20480)
        config.error.update(num_features=(8192,), seeds=(0,))
        config.accuracy.update(
            num_features=(8192,), images=(5000, 0), held_out=5000, test_images=0
        )
        config.slice_size = 5120
    elif arg == "quicktest":
        config.data.update(name="synthetic", image_size=8)
        config.nets = ("myrtle5",)
        config.exact.update(error_images=6, block=3, blocks=1)
        config.cost.images = (16, 32, 48)
        config.error.update(num_features=(128, 256), seeds=(0,))
        config.accuracy.update(
            num_features=(256,), images=(100, 0), held_out=50, test_images=0
        )
        config.slice_size = 64
    elif arg:
        raise ValueError(
            f"the config argument must be full, gpu or quicktest. Got {arg!r}."
        )
    return config
