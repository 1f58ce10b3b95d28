"""A multilayer perceptron that reads handwritten digits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import data as data_lib
from experiments.networks.training import Problem

DATA = ("digits", "mnist")


def problems(config: ConfigDict) -> list[Problem]:
    """Cross entropy; the rate is chosen on held-out images, reported is the test."""
    train, val, test = load_splits(config)
    mean, deviation = float(train[0].mean()), float(train[0].std())
    data = jax.tree.map(jnp.asarray, {"train": train, "val": val, "test": test})

    def normal(pixels: jax.Array) -> jax.Array:
        return (pixels.astype(jnp.float32) - mean) / deviation

    def loss(model: Any, data: Any, key: jax.Array) -> jax.Array:
        x, labels = data["train"]
        rows = jax.random.randint(key, (config.optim.batch_size,), 0, len(labels))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            model(normal(x[rows])), labels[rows]
        )
        return jnp.mean(losses)

    def evaluate(model: Any, data: Any) -> dict[str, jax.Array]:
        accuracies = {}
        for split in ("val", "test"):
            x, labels = data[split]
            right = jnp.argmax(model(normal(x)), axis=-1) == labels
            accuracies[split] = 100 * jnp.mean(right.astype(jnp.float32))
        return {
            "val_error": 100 - accuracies["val"],
            "test_accuracy": accuracies["test"],
        }

    return [
        Problem(
            name=config.data.name,
            inputs=train[0].shape[1],
            outputs=10,
            data=data,
            example=normal(data["train"][0][:1024]),
            loss=loss,
            evaluate=evaluate,
            choose_by="val_error",
            reported={"test_accuracy": "test accuracy, %"},
            curve="test_accuracy",
        )
    ]


def load_splits(config: ConfigDict) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training, validation and test pixels ``uint8[n, d]`` with their labels."""
    if config.data.name == "mnist":
        x, y, x_test, y_test = data_lib.mnist_arrays(config.data.dir)
        order = np.random.default_rng(0).permutation(len(x))
        held_out, kept = np.split(order, [len(x) // 12])
        pairs = [(x[kept], y[kept]), (x[held_out], y[held_out]), (x_test, y_test)]
    else:
        dataset = data_lib.load("digits", image_size=8)
        pairs = []
        for split in (dataset.train, dataset.val, dataset.test):
            batch = split.__getitems__(np.arange(len(split)))
            # Three equal channels.
            pairs.append((batch["image"][..., 0], batch["label"]))
    return [(images.reshape(len(images), -1), labels) for images, labels in pairs]


def check(config: ConfigDict) -> None:
    """Raises ValueError for data that are not there."""
    if config.data.name not in DATA:
        raise ValueError(
            f"config.data.name must be one of {', '.join(DATA)}. "
            f"Got {config.data.name!r}."
        )
