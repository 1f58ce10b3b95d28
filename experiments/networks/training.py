"""Training of a small network: many steps a call, evaluated between the calls."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a network is trained for.

    Attributes:
      name: of its own within an experiment.
      inputs: width of the network's inputs.
      outputs: width of its outputs.
      data: arrays that the functions below take.
      example: inputs of the network, for its initialisation.
      loss: ``(model, data, key)`` to the loss of a step; the key draws the batch.
      evaluate: ``(model, data)`` to named scalars.
      choose_by: the scalar that is least at the best learning rate.
      reported: columns of the report, from scalars to titles.
      curve: the scalar that is drawn against the step.
      truth: what :attr:`predict` should give, ``[h, w]``; None for no picture.
      predict: ``(model, data)`` to an array like ``truth``.
      colors: Matplotlib's name of the colours it is drawn in.
    """

    name: str
    inputs: int
    outputs: int
    data: Any
    example: jax.Array
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    evaluate: Callable[[Any, Any], dict[str, jax.Array]]
    choose_by: str
    reported: Mapping[str, str]
    curve: str
    truth: np.ndarray | None = None
    predict: Callable[[Any, Any], jax.Array] | None = None
    colors: str = "viridis"


def fit(
    model: Any,
    problem: Problem,
    *,
    learning_rate: float,
    steps: int,
    evaluations: int,
    seed: int,
) -> tuple[Any, list[dict[str, float]]]:
    """Trains with Adam and a cosine schedule that ends at zero.

    Args:
      model: a module; variables other than ``nnx.Param`` stay as they are.
      problem: data, loss and scalars.
      learning_rate: at the start.
      steps: a multiple of ``evaluations``.
      evaluations: how often the scalars are taken, the last step included.
      seed: of the batches.

    Returns:
      The trained model, and the step and the scalars of every evaluation.
    """
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    state = _optimizer(learning_rate, steps).init(params)
    share = steps // evaluations
    keys = jax.random.split(jax.random.key(seed), (evaluations, share))
    curve = []
    for index in range(evaluations):
        params, state = _advance(
            params,
            state,
            frozen,
            problem.data,
            keys[index],
            learning_rate,
            graphdef=graphdef,
            loss=problem.loss,
            steps=steps,
        )
        scalars = _evaluate(
            params, frozen, problem.data, graphdef=graphdef, evaluate=problem.evaluate
        )
        scalars = {name: float(value) for name, value in scalars.items()}
        curve.append({"step": (index + 1) * share, **scalars})
    return nnx.merge(graphdef, params, frozen), curve


def step_times(
    models: Sequence[Any], problem: Problem, *, steps: int, rounds: int
) -> list[float]:
    """Milliseconds of a training step of each model, medians over rounds.

    The models take turns, so that whatever else the machine does meets all of them.

    Args:
      models: modules.
      problem: data and loss.
      steps: of each model in a round.
      rounds: after a first one for compilation.
    """
    times: list[list[float]] = [[] for _ in models]
    keys = jax.random.split(jax.random.key(0), steps)
    starts = []
    for model in models:
        graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
        state = _optimizer(1e-3, steps).init(params)
        starts.append((graphdef, params, state, frozen))
    for turn in range(rounds + 1):
        for mine, (graphdef, params, state, frozen) in zip(times, starts, strict=True):
            began = time.perf_counter()
            result = _advance(
                params,
                state,
                frozen,
                problem.data,
                keys,
                1e-3,
                graphdef=graphdef,
                loss=problem.loss,
                steps=steps,
            )
            jax.block_until_ready(result)
            if turn:
                mine.append(1000 * (time.perf_counter() - began) / steps)
    return [statistics.median(mine) for mine in times]


def _optimizer(learning_rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


# Rates and seeds share a compilation: all that differs between them is an argument.
@functools.partial(jax.jit, static_argnames=("graphdef", "loss", "steps"))
def _advance(
    params: Any,
    state: Any,
    frozen: Any,
    data: Any,
    keys: jax.Array,
    learning_rate: Any,
    *,
    graphdef: Any,
    loss: Any,
    steps: int,
) -> tuple[Any, Any]:
    """Takes a step for each key."""
    optimizer = _optimizer(learning_rate, steps)

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        grads = jax.grad(lambda p: loss(nnx.merge(graphdef, p, frozen), data, key))(
            params
        )
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), keys)[0]


@functools.partial(jax.jit, static_argnames=("graphdef", "evaluate"))
def _evaluate(
    params: Any, frozen: Any, data: Any, *, graphdef: Any, evaluate: Any
) -> dict[str, jax.Array]:
    return evaluate(nnx.merge(graphdef, params, frozen), data)
