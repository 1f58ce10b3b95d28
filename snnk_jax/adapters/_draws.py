"""Random projections in adapter files: by the key that draws them, and checked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax import projections
from snnk_jax.nn import Drawn
from snnk_jax.surgery import find_modules

_PROBES = 8


def _probe(array: np.ndarray) -> list[float]:
    """A few numbers that tell one draw from another, compared up to rounding."""
    flat = np.asarray(array, np.float64).ravel()
    picks = flat[:: max(1, flat.size // _PROBES)][:_PROBES]
    return [float(np.mean(flat)), float(np.mean(flat**2)), *map(float, picks)]


def describe_draw(
    projection: Drawn, values: dict[str, np.ndarray]
) -> dict[str, Any] | None:
    """The key of a draw and probes of its values; None if the key draws others."""
    words = projection.key[...]
    # One key for each layer of a scan: the values are kept.
    if projection.trainable or words.ndim != 1:
        return None
    drawn = _draw_values(projection, words)
    same = drawn.keys() == values.keys()
    if not same or any(not np.array_equal(drawn[k], values[k]) for k in values):
        return None
    return {
        "key": [int(word) for word in words],
        "probes": {name: _probe(value) for name, value in values.items()},
    }


def _draw_values(projection: Drawn, words: Any) -> dict[str, np.ndarray]:
    key = jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl="threefry2x32")
    values = projection.draw(key)
    return {name: np.asarray(value) for name, value in values.items()}


def drawn_arrays(model: nnx.Module, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draws the projections that a file names by key, and checks them."""
    arrays: dict[str, np.ndarray] = {}
    if record["projections"] and record["generator"] != projections.GENERATOR:
        raise ValueError(
            f"adapter must name the generator {projections.GENERATOR}. "
            f"Got {record['generator']}."
        )
    places = {k: m for k, m in find_modules(model).items() if isinstance(m, Drawn)}
    for name, draw in record["projections"].items():
        if name not in places:
            raise ValueError(
                f"base_model must have a projection at {name}. Got {list(places)}."
            )
        values = _draw_values(places[name], draw["key"])
        for leaf, value in values.items():
            if not np.allclose(_probe(value), draw["probes"][leaf], 1e-3, 1e-4):
                raise ValueError(
                    f"the projection {name}/{leaf} must be drawn as it was when the "
                    "adapter was saved: same feature map and width. Got another draw."
                )
            arrays[f"{name}/values/{leaf}"] = value
        arrays[f"{name}/key"] = np.asarray(draw["key"], np.uint32)
    return arrays
