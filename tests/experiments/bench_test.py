import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench


def test_every_row_is_a_layer_of_the_same_shape():
    x, fns = bench.layers(jax.random.key(0), 16, 12, 24, 8, jnp.float32)
    assert x.shape == (16, 12)
    assert {fn(x).shape for fn in fns.values()} == {(16, 24)}
    rows = bench.time_rows(fns, x, rounds=4)
    assert [row.name for row in rows] == list(fns)
    assert all(0 < row.low_ms <= row.median_ms <= row.high_ms for row in rows)


@pytest.mark.slow
def test_every_kernel_of_the_table_is_one():
    x, fns = bench.ntks(jax.random.key(0), 6, 4, jnp.float32)
    rows = bench.time_rows(fns, x, rounds=2)
    assert [row.name for row in rows] == list(fns)
    shapes = {k.shape for fn in fns.values() for k in jax.tree.leaves(fn(x))}
    assert shapes == {(6, 6)}
    row = [bench.Row("relu, both", 40.0, 40.0, 40.0)]
    assert "38.1 ns an entry. 40 ms, goal 51 ms: reached" in bench.ntk_verdict(
        row, 1024
    )
    assert bench.ntk_verdict(row, 2000) == "relu, both: 10.0 ns an entry."
    slow = [bench.Row("relu, both", 60.0, 60.0, 60.0)]
    assert "MISSED" in bench.ntk_verdict(slow, 1024)


def test_the_verdict_names_what_binds():
    def rows(dense, snnk, write):
        times = {"dense + GELU": dense, "s": snnk, "write the output only": write}
        return [bench.Row(name, ms, ms, ms) for name, ms in times.items()]

    assert "the goal binds at 8.0: reached" in bench.verdict(rows(16, 2, 0.5), "s")
    assert "the goal binds at 8.0: MISSED" in bench.verdict(rows(15, 2, 0.5), "s")
    bound = bench.verdict(rows(8, 2, 2), "s")
    assert "writing the output binds at 3.4: reached" in bound
    assert "writing the output binds at 3.4: MISSED" in bench.verdict(
        rows(6.7, 2, 1.675), "s"
    )
    np.testing.assert_equal(bench.WRITE_SHARE, 0.85)
