"""Runs that differ in seed and learning rate alone, trained side by side.

A small model leaves a GPU idle: the kernels of one run of batch 32 are over before the
next one is launched. Here one program trains R runs, the training step under
``jax.vmap`` over their states, and a stretch of steps at a time under ``jax.lax.scan``,
so that the host is asked once a stretch. The frozen base model is there once. Every run
sees the batches and the dropout that it would see alone; results agree up to rounding.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import learning, train
from experiments import sharding as sharding_lib
from experiments.loading import TrainLoader, eval_batches, prefetch
from experiments.metrics import Progress
from experiments.scores import scores
from experiments.splits import Dataset, Split

_STRETCH = 50


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
      model: with the parameters of the last step.
      result: as of :func:`experiments.train.fit`; None if the run diverged.
      history: rows of ``metrics.jsonl``.
    """

    model: Any
    result: dict[str, Any] | None
    history: list[dict[str, float]]


def fit(
    models: Sequence[nnx.Module],
    trainable: Any,
    dataset: Dataset,
    recipes: Sequence[learning.Recipe],
    *,
    mesh: jax.sharding.Mesh,
    name: str = "train",
    base_fingerprint: str = "",
) -> list[Outcome]:
    """Trains one model for each recipe, all at once.

    Nothing is saved on the way: a stretch of runs that a stop interrupts starts anew.

    Args:
      models: one a run, adapted alike on one base; not modified.
      trainable: NNX filter of the variables to train.
      dataset: the splits.
      recipes: one a run, equal but for seed and learning rate.
      mesh: devices; the batch is cut over its axis ``data``.
      name: shown beside the progress.
      base_fingerprint: of the model without what the runs add to it.

    Raises:
      ValueError: if the recipes differ in anything else, the models in frozen arrays,
        a batch does not fit the data or the mesh, or there are several processes.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "runs must be trained together by one process: config.together must be 1 "
            f"for several. Got {jax.process_count()} processes."
        )
    recipe = recipes[0]
    alike = [dataclasses.replace(r, seed=0, learning_rate=1.0) for r in recipes]
    if len(models) != len(recipes) or any(other != alike[0] for other in alike):
        raise ValueError(
            "recipes must be one a model and differ in seed and learning rate alone. "
            f"Got {len(models)} models and {list(recipes)}."
        )
    if recipe.batch_size % mesh.shape["data"]:
        raise ValueError(
            "batch_size must be divisible by the mesh axis 'data'. "
            f"Got {recipe.batch_size} and {mesh.shape['data']}."
        )
    optimizer = learning.make_optimizer(recipe)
    split = [learning.split_model(model, trainable) for model in models]
    graphdef, frozen = split[0][0], split[0][3]
    if not all(_equal(frozen, other[3]) for other in split[1:]):
        raise ValueError("models must have the same frozen arrays. Got others.")
    replicated = sharding_lib.replicated(mesh)
    projections = jax.device_put(_stack([parts[2] for parts in split]), replicated)
    frozen = jax.device_put(frozen, replicated)
    states = [
        learning.make_init(optimizer, r)(parts[1])
        for r, parts in zip(recipes, split, strict=True)
    ]
    states = jax.device_put(_stack(states), replicated)

    step = jax.vmap(
        learning.make_train_step(graphdef, optimizer, recipe), in_axes=(0, 0, None, 0)
    )

    def stretch(states, projections, frozen, batches):
        def body(states, batch):
            return step(states, projections, frozen, batch)

        return jax.lax.scan(body, states, batches)

    loaders = [TrainLoader(dataset.train, r.batch_size, r.seed) for r in recipes]
    size = math.gcd(_STRETCH, recipe.steps)
    cut = jax.sharding.PartitionSpec(None, None, "data")
    batch_sharding = jax.sharding.NamedSharding(mesh, cut)

    def load(index: int) -> Any:
        steps = range(index * size, (index + 1) * size)
        rows = [[loader.batch(s) for loader in loaders] for s in steps]
        batches = {
            key: np.stack([[batch[key] for batch in row] for row in rows])
            for key in rows[0][0]
        }
        return sharding_lib.place(batches, batch_sharding)

    progress = Progress(name, 0, recipe.steps)
    parts: list[dict[str, np.ndarray]] = []
    seconds: list[float] = []
    compiled: Any = None
    memory = 0
    clock = time.monotonic()
    for index, batches in enumerate(prefetch(load, 0, recipe.steps // size)):
        if compiled is None:
            program = jax.jit(stretch, donate_argnums=0)
            compiled = program.lower(states, projections, frozen, batches).compile()
            memory = learning.peak_bytes(compiled)
            clock = time.monotonic()
        states, metrics = compiled(states, projections, frozen, batches)
        parts.append(jax.device_get(metrics))
        now = time.monotonic()
        seconds.append(now - clock)
        clock = now
        progress.note(f"loss {np.mean(parts[-1]['loss'][-1]):.4f}")
        progress.update((index + 1) * size)
    progress.close()
    logged = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    outputs = _evaluate(
        graphdef,
        states["params"],
        projections,
        frozen,
        getattr(dataset, recipe.eval_split),
        recipe.batch_size,
        mesh,
    )
    outcomes = []
    for i, (r, (own_graphdef, *_)) in enumerate(zip(recipes, split, strict=True)):
        own = {key: values[:, i] for key, values in logged.items()}
        measured = (*own.values(), outputs["outputs"][i])
        finite = all(np.all(np.isfinite(values)) for values in measured)
        result = None
        evaluation: dict[str, float] = {}
        if finite:
            evaluation = {"loss": float(np.mean(outputs["loss"][i], dtype=np.float64))}
            evaluation |= scores(outputs["outputs"][i], outputs["label"])
            result = train.result_of(
                r,
                dataset.metric,
                evaluation,
                best={"score": evaluation[dataset.metric], "step": r.steps},
                seconds=sum(seconds) / len(recipes),
                step_seconds=float(np.median(seconds)) / size / len(recipes),
                memory=memory,
                together=len(recipes),
                base_fingerprint=base_fingerprint,
            )
        state, projection = jax.tree.map(
            lambda x, i=i: x[i], (states["params"], projections)
        )
        outcomes.append(
            Outcome(
                nnx.merge(own_graphdef, state, projection, frozen),
                result,
                _history(own, r, evaluation),
            )
        )
    return outcomes


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a is b or np.array_equal(a, b) for a, b in pairs)


def _evaluate(
    graphdef: Any,
    params: Any,
    projections: Any,
    frozen: Any,
    split: Split,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:
    """Outputs and losses ``[R, n, ...]`` and labels ``[n]`` of a whole split."""
    step = jax.jit(
        jax.vmap(learning.make_eval_step(graphdef), in_axes=(0, 0, None, None))
    )
    parts = []
    for batch in eval_batches(split, batch_size):
        placed = sharding_lib.place(batch, sharding_lib.batch_sharding(mesh))
        found = jax.device_get(step(params, projections, frozen, placed))
        real = batch["weight"] > 0
        parts.append(
            {
                "outputs": found["outputs"][:, real],
                "loss": found["loss"][:, real],
                "label": batch["label"][real][None],
            }
        )
    whole = {key: np.concatenate([p[key] for p in parts], axis=1) for key in parts[0]}
    return whole | {"label": whole["label"][0]}


def _history(
    logged: dict[str, np.ndarray], recipe: learning.Recipe, evaluation: dict[str, float]
) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(1, recipe.steps + 1):
        if step == recipe.steps or step % recipe.log_every == 0:
            values = {f"train/{k}": float(v[step - 1]) for k, v in logged.items()}
            rows.append({"step": step, **values})
    named = {f"{recipe.eval_split}/{k}": v for k, v in evaluation.items()}
    return [*rows, {"step": recipe.steps, **named}]
