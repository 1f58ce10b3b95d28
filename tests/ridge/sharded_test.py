"""Rows over devices, Gram matrices over devices, rows over processes."""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import snnk_jax as snnk
from snnk_jax import ridge
from snnk_jax.ridge._solve import moments

ROOT = pathlib.Path(__file__).parent.parent.parent


def make_mesh(*sizes, names=("data", "model")):
    sizes = dict(zip(names, sizes, strict=False))
    axes = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axes)


def assert_same(a, b):
    ours, theirs = moments(a), moments(b)
    assert ours.rows == theirs.rows
    for name in ("gram", "cross", "y_square", "phi_mean", "y_mean"):
        x, y = np.triu(getattr(ours, name)), np.triu(getattr(theirs, name))
        np.testing.assert_allclose(x, y, atol=1e-6 * np.abs(y).max(), err_msg=name)


@pytest.mark.parametrize(
    "devices", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8))]
)
@pytest.mark.parametrize("chunk_size", [16, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_shards_do_not_matter(make_problem, devices, chunk_size, weighted):
    problem = make_problem(n=403, mean=20.0)  # 403 is divisible by none of them
    phi, y = jnp.asarray(problem.phi), jnp.asarray(problem.y)
    weights = jnp.asarray(problem.weights) if weighted else None
    mesh = make_mesh(devices)
    stats = ridge.init(20, 3)
    expected = ridge.update(stats, phi, y, weights)
    found = ridge.update_sharded(
        stats, phi, y, weights, mesh=mesh, chunk_size=chunk_size
    )
    assert_same(found, expected)
    again = ridge.update_sharded(found, phi, y, mesh=mesh, chunk_size=chunk_size)
    assert_same(again, ridge.update(expected, phi, y))


@pytest.mark.parametrize(
    "sizes",
    [(2, 4), *(pytest.param(s, marks=pytest.mark.slow) for s in [(1, 8), (8, 1)])],
)
@pytest.mark.parametrize("shift", [False, True])
def test_gram_matrices_over_devices(make_problem, sizes, shift):
    problem = make_problem(n=400, m=6)
    fm = snnk.features.ArcCosine(num_features=64)
    phi = functools.partial(fm.phi, fm.init(jax.random.key(0), 6))
    x, y = jnp.asarray(problem.phi), jnp.asarray(problem.y)
    stats = ridge.init(64, 3, shift=shift)
    options = {"mesh": make_mesh(*sizes), "features": "model", "phi": phi}
    found = ridge.update_sharded(stats, x, y, chunk_size=64, **options)
    found = ridge.update_sharded(found, x[:7], y[:7], **options)
    expected = ridge.update_chunks(stats, x, y, phi=phi)
    expected = ridge.update_chunks(expected, x[:7], y[:7], phi=phi)
    assert_same(found, expected)
    shard = found.gram.high.addressable_shards[0].data
    assert shard.shape == (64 // sizes[1], 64)
    np.testing.assert_allclose(
        ridge.solve(found, 0.1).kernel, ridge.solve(expected, 0.1).kernel, atol=2e-5
    )


def test_one_reduction_and_no_gather(make_problem):
    mesh = make_mesh(8)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((800, 20), jnp.float32, sharding=rows)
    y = jax.ShapeDtypeStruct((800, 3), jnp.float32, sharding=rows)

    def update(stats, x, y):
        return ridge.update_sharded(stats, x, y, mesh=mesh, chunk_size=25)

    lowered = jax.jit(update).lower(ridge.init(20, 3, shift=False), x, y)
    text = lowered.compile().as_text()
    assert "all-gather" not in text
    loops = [part for part in text.split("\n\n") if "while" in part.split("\n")[0]]
    assert not any("all-reduce" in loop for loop in loops)
    assert text.count(" all-reduce(") <= 2, "combined: floats, and the rows"


def test_a_map_may_use_the_axes_of_the_mesh():
    x, y = jnp.ones((8, 3)), jnp.ones((8, 1))
    phi = lambda z: z * (1.0 + jax.lax.axis_index("data").astype(z.dtype))  # noqa: E731
    stats = ridge.update_sharded(
        ridge.init(3, 1, shift=False), x, y, mesh=make_mesh(2, 4), phi=phi
    )
    np.testing.assert_allclose(stats.phi_sum.high, 4 * 1 + 4 * 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "rows"}, "mesh must have an axis 'rows'. Got"),
        ({"features": "columns"}, "mesh must have an axis 'columns'"),
        ({"features": "model"}, "divisible by the 4 devices of the axis 'model'. Got"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"phi": jnp.transpose}, r"phi must map 4 rows to \[4, 3\]. Got \(3, 4\)"),
    ],
    ids=["rows", "columns", "model", "chunk", "phi"],
)
def test_mistakes_are_told(options, words):
    with pytest.raises(ValueError, match=words):
        ridge.update_sharded(
            ridge.init(3, 1),
            jnp.ones((8, 3)),
            jnp.ones((8, 1)),
            mesh=make_mesh(2, 4),
            **options,
        )


WORKER = """
import functools, sys, jax, numpy as np
port, index, folder = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from snnk_jax import ridge
data = np.load(f"{folder}/rows.npz")
for features, sizes in ((None, (8, 1)), ("model", (2, 4))):
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    half = slice(int(index) * 200, int(index) * 200 + 200)
    phi, y = (
        jax.make_array_from_process_local_data(rows, data[name][half])
        for name in ("phi", "y")
    )
    stats = ridge.update_sharded(
        ridge.init(20, 3), phi, y, mesh=mesh, features=features, chunk_size=30
    )
    solution = ridge.solve(stats, 1e-2)
    np.savez(f"{folder}/found-{features}-{index}.npz",
             kernel=solution.kernel, bias=solution.bias, rows=int(stats.rows))
"""


@pytest.mark.slow
def test_two_processes(make_problem, tmp_path):
    problem = make_problem(n=400, mean=5.0)
    np.savez(tmp_path / "rows.npz", phi=problem.phi, y=problem.y)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(index), str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    kernel, bias, _ = problem.coefficients(1e-2)
    for features in ("None", "model"):
        for index in range(2):
            found = np.load(tmp_path / f"found-{features}-{index}.npz")
            assert found["rows"] == 400
            np.testing.assert_allclose(found["kernel"], kernel, atol=1e-5)
            np.testing.assert_allclose(found["bias"], bias, atol=1e-4)
