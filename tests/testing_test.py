import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from snnk_jax.testing import count_traces, tolerance


def affine(x, slope=2.0):
    return slope * x + 1


@pytest.mark.parametrize(
    "dtype", ["float64", jnp.float32, np.dtype("float32"), ml_dtypes.bfloat16]
)
def test_tolerance_covers_one_rounding(dtype):
    limits = tolerance(dtype)
    eps = float(jnp.finfo(dtype).eps)
    assert set(limits) == {"rtol", "atol"}
    assert 2 * eps < limits["rtol"] < max(0.1, 1e6 * eps)


def test_tolerance_is_a_copy():
    tolerance("float32")["rtol"] = 1.0
    assert tolerance("float32")["rtol"] < 1e-3


@pytest.mark.usefixtures("unchecked")
def test_tolerance_of_integers_is_refused():
    with pytest.raises(ValueError, match="dtype must be one of float64.* Got int32"):
        tolerance("int32")


def test_count_traces():
    counted = count_traces(affine)
    compiled = jax.jit(counted, static_argnames="slope")
    assert counted.traces == 0
    assert float(compiled(jnp.array(3.0), slope=2.0)) == 7
    assert float(compiled(jnp.array(4.0), slope=2.0)) == 9
    assert counted.traces == 1
    compiled(jnp.array(3.0), slope=3.0)
    assert counted.traces == 2
    assert counted.__name__ == "affine"
    assert inspect.signature(counted) == inspect.signature(affine)
