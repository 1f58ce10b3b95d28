"""Helpers for tests of code that uses the library: tolerances and trace counts."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from snnk_jax.typing import Dtype

_TOLERANCES = {
    "float64": {"rtol": 1e-10, "atol": 1e-12},
    "float32": {"rtol": 2e-5, "atol": 2e-6},
    "bfloat16": {"rtol": 2e-2, "atol": 1e-2},
}


def tolerance(dtype: Dtype) -> dict[str, float]:
    """Tolerances of results of order one, computed in ``dtype`` by a few operations.

    Args:
      dtype: float64, float32 or bfloat16.

    Returns:
      ``rtol`` and ``atol``, as ``numpy.testing.assert_allclose`` takes them.

    Raises:
      ValueError: for another dtype.

    Example:
      >>> import numpy as np
      >>> from snnk_jax import testing
      >>> third = np.float32(1) / np.float32(3)
      >>> np.testing.assert_allclose(third, 1 / 3, **testing.tolerance("float32"))
    """
    name = np.dtype(dtype).name
    if name not in _TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(_TOLERANCES)}. Got {name}.")
    return dict(_TOLERANCES[name])


class TraceCounter:
    """A function that counts its calls; under ``jax.jit`` these are its traces.

    Attributes:
      traces: calls so far.
    """

    def __init__(self, fn: Callable[..., Any]):
        functools.update_wrapper(self, fn)
        self._fn = fn
        self.traces = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.traces += 1
        return self._fn(*args, **kwargs)


def count_traces(fn: Callable[..., Any]) -> TraceCounter:
    """Wraps a function so that it counts how often JAX traces it.

    Args:
      fn: the function, before ``jax.jit``.

    Returns:
      A callable with the signature of ``fn`` and an attribute ``traces``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from snnk_jax import testing
      >>> counted = testing.count_traces(jnp.sin)
      >>> compiled = jax.jit(counted)
      >>> _ = compiled(jnp.ones(3)), compiled(jnp.zeros(3)), compiled(jnp.ones(4))
      >>> counted.traces
      2
    """
    return TraceCounter(fn)


@jax.jit
def call(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls an NNX module compiled as a whole: one compilation, not one an operation.

    Args:
      module: the module, of the kind that ``jax.jit`` takes as an argument.
      *args: arrays for it.
      **kwargs: more of them, ``rngs`` as well.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from snnk_jax import testing
      >>> testing.call(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((4, 2))).shape
      (4, 3)
    """
    return module(*args, **kwargs)
