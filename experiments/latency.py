"""Compiled calls timed in turns, so that a busy moment hits all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx


def _call(model: Any, *inputs: Any) -> Any:
    return model(*inputs)


def compiled(
    model: Any, *inputs: Any, apply: Callable[..., Any] = _call
) -> tuple[Callable[[], Any], float]:
    """A call of a model, compiled for its inputs, and its temporaries in MB.

    Args:
      model: an NNX model.
      *inputs: what it is called with, and timed on.
      apply: ``apply(model, *inputs)`` makes the call.
    """
    graphdef, state = nnx.split(model)

    def run(state: Any, *inputs: Any) -> Any:
        return apply(nnx.merge(graphdef, state), *inputs)

    program: Any = jax.jit(run).lower(state, *inputs).compile()
    memory = program.memory_analysis()
    size = 0.0 if memory is None else memory.temp_size_in_bytes / 1e6
    return lambda: program(state, *inputs), size


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times
