"""Pixels for a model: scaled, and varied from step to step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def normalise(images: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def augment_none(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the images as they are."""
    return images


def augment_crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts each image by up to an eighth of its side, edges repeated."""
    pad = max(images.shape[1] // 8, 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        start = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def augment_crop_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Random shift, and a horizontal flip of half of the images."""
    crop_key, flip_key = jax.random.split(key)
    images = augment_crop(crop_key, images)
    flip = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": augment_none,
    "crop": augment_crop,
    "crop_flip": augment_crop_flip,
}
