"""Training of a head on states that are kept: one program for all steps."""

import dataclasses
import functools
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file, save

from experiments import learning, scores, train
from experiments.loading import TrainLoader
from experiments.pooler_heads import METHODS, Head, dense_head
from experiments.pooler_states import States
from experiments.splits import Batch
from snnk_jax._files import write_atomic

_CHUNK = 512


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(
    graphdef: Any,
    recipe: learning.Recipe,
    params: Any,
    rest: Any,
    rate: Any,
    x: Any,
    y: Any,
) -> tuple[Any, jax.Array]:
    """Trains on batches ``[steps, batch, d]``; returns parameters and losses."""
    optimizer = learning.make_optimizer(recipe)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        outputs = nnx.merge(graphdef, params, rest)(x)
        return jnp.mean(learning.example_losses(outputs, y))

    def step(carry: Any, batch: Any) -> Any:
        params, memory = carry
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, memory = optimizer.update(gradient, memory, params)
        updates = optax.tree.scale(rate, updates)
        return (optax.apply_updates(params, updates), memory), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), (x, y))
    return params, losses


@functools.partial(jax.jit, static_argnums=0)
def _outputs(graphdef: Any, state: Any, x: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(x)


def predict(model: nnx.Module, x: np.ndarray) -> np.ndarray:
    """Outputs of a head, in chunks of one shape."""
    graphdef, state = nnx.split(model)
    parts = []
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        filled = np.pad(part, ((0, _CHUNK - len(part)), (0, 0)))
        parts.append(np.asarray(_outputs(graphdef, state, filled))[: len(part)])
    return np.concatenate(parts)


def score(model: nnx.Module, states: States, split: str) -> float:
    """What the task judges a head by, on a split."""
    outputs = predict(model, states.x[split])
    return scores.scores(outputs, states.y[split])[states.metric]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained head, its mean loss over the last 20 steps, and how long it took."""

    model: Any
    loss: float
    seconds: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


def build(
    name: str, states: States, config: Any, seed: int, heads: pathlib.Path
) -> Any:
    """A head before its training; ``heads`` holds what :func:`keep_dense` kept."""
    method = METHODS[name]
    dense = dense_head(states.dim, states.dim, states.classes, nnx.Rngs(params=seed))
    if states.pooler is not None:
        pooler: Any = dense.pooler
        for variable, value in zip(
            (pooler.dense.kernel, pooler.dense.bias), states.pooler, strict=True
        ):
            variable[...] = jnp.asarray(value)
    if method.source == "head" or (method.source == "pooler" and states.pooler is None):
        dense = _restored(dense, heads, seed)
    assert method.build is not None
    rngs = nnx.Rngs(params=seed, projection=seed)
    return method.build(config, states, dense, rngs)


def fit(model: Any, states: States, config: Any, rate: float, seed: int) -> Trained:
    """Trains a head, which is not changed, by the recipe of a config."""
    optim = config.optim
    recipe = learning.Recipe(
        learning_rate=1.0,  # `rate` is an argument, so that all compile once
        seed=0,
        steps=optim.steps,
        batch_size=optim.batch_size,
        warmup_steps=optim.warmup_steps,
        weight_decay=optim.weight_decay,
    )
    loader = TrainLoader(_Rows(states), optim.batch_size, seed)
    rows = np.stack([loader.indices(step) for step in range(optim.steps)])
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    x, y = states.x["train"][rows], states.y["train"][rows]
    begun = time.perf_counter()
    params, losses = _fit(graphdef, recipe, params, rest, jnp.float32(rate), x, y)
    loss = float(jnp.mean(losses[-20:]))
    seconds = time.perf_counter() - begun
    return Trained(nnx.merge(graphdef, params, rest), loss, seconds)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The training states as a split."""

    states: States

    def __len__(self) -> int:
        return len(self.states.y["train"])

    def __getitems__(self, indices: np.ndarray) -> Batch:
        x, y = self.states.x["train"], self.states.y["train"]
        return {"x": x[indices], "label": y[indices]}


def keep_dense(dense: nnx.Module, heads: pathlib.Path, seed: int) -> None:
    """Writes a trained dense head, from which others start."""
    flat = nnx.to_flat_state(nnx.state(dense))
    arrays = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in flat}
    write_atomic(heads / f"dense-seed{seed}.safetensors", save(arrays))


def _restored(dense: Head, heads: pathlib.Path, seed: int) -> Head:
    """The dense head that was trained with a seed."""
    arrays = load_file(heads / f"dense-seed{seed}.safetensors")
    graphdef, state = nnx.split(dense)
    flat = [
        (path, variable.replace(jnp.asarray(arrays["/".join(map(str, path))])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def choose_rate(name: str, start: Any, states: States, config: Any) -> float:
    """The learning rate that is best on the validation split, by one seed."""
    tried = []
    for rate in config.sweep.learning_rates:
        run = fit(start, states, config, rate, config.sweep.seed)
        if run.finite:
            found = score(run.model, states, "val")
            # The lower loss decides between equal scores.
            tried.append((found, -run.loss, rate))
    if not tried:
        raise train.NonFiniteError(
            f"sweep.learning_rates must hold one at which {name} trains. "
            f"Got {tuple(config.sweep.learning_rates)}."
        )
    return max(tried)[-1]
