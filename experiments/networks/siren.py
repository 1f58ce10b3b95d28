"""A SIREN fitted to an image: coordinates of a pixel in, its brightness out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from experiments.networks.training import Problem

IMAGES = ("china", "flower")


def problems(config: ConfigDict) -> list[Problem]:
    """The squared error on random pixels; reported is the PSNR of the whole image."""
    image = load_image(config.data.image, config.data.size)
    side = np.linspace(-1, 1, config.data.size, dtype=np.float32)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
    data = {"x": jnp.asarray(grid), "y": jnp.asarray(2 * image.reshape(-1, 1) - 1)}

    def loss(model: Any, data: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (config.optim.batch_size,), 0, len(grid))
        return jnp.mean((model(data["x"][rows]) - data["y"][rows]) ** 2)

    def evaluate(model: Any, data: Any) -> dict[str, jax.Array]:
        error = jnp.mean((model(data["x"]) - data["y"]) ** 2)
        # From -1 to 1: a range of 2.
        return {"error": error, "psnr": 10 * jnp.log10(4 / error)}

    def predict(model: Any, data: Any) -> jax.Array:
        return (model(data["x"]).reshape(image.shape) + 1) / 2

    return [
        Problem(
            name="image",
            inputs=2,
            outputs=1,
            data=data,
            example=data["x"],
            loss=loss,
            evaluate=evaluate,
            choose_by="error",
            reported={"psnr": "PSNR, dB"},
            curve="psnr",
            truth=image,
            predict=predict,
            colors="gray",
        )
    ]


def load_image(name: str, size: int) -> np.ndarray:
    """The middle square of a photograph of scikit-learn, grey, ``[size, size]``.

    Args:
      name: one of :data:`IMAGES`.
      size: side in pixels.

    Returns:
      ``float32`` from 0 to 1.
    """
    from sklearn.datasets import load_sample_image

    pixels: Any = load_sample_image(f"{name}.jpg")
    photo = Image.fromarray(pixels).convert("L")
    side = min(photo.size)
    left, top = ((length - side) // 2 for length in photo.size)
    square = photo.crop((left, top, left + side, top + side))
    small = square.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def check(config: ConfigDict) -> None:
    """Raises ValueError for an image that is not there."""
    if config.data.image not in IMAGES:
        raise ValueError(
            f"config.data.image must be one of {', '.join(IMAGES)}. "
            f"Got {config.data.image!r}."
        )
    if not 8 <= config.data.size <= 427:
        raise ValueError(
            "config.data.size must be from 8 to 427, the height of the photographs. "
            f"Got {config.data.size}."
        )
