"""Speed of the streamed ridge regression beside the machine's own products.

    python -m experiments.bench_ridge
    python -m experiments.bench_ridge --examples=1000000 --dim=1024 \
        --features=10000                                  # on a GPU
    python -m experiments.bench_ridge --examples=5000000 --dim=1280 \
        --features=65536 --generate --method=cg           # on a GPU

Cosine features of random inputs, computed chunk by chunk on the way into the Gram
matrix. The useful operations are ``2 n d`` for every direction and ``n m (m + 1)`` for
a symmetric product; their rate is compared with that of the largest square product
the machine was seen to do. ``--sklearn`` times scikit-learn's Ridge on ready-made
features, which it needs in memory, and ours on the same. A smaller problem is checked
against float64.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import snnk_jax as snnk
from experiments.metrics import write_json
from experiments.workdirs import describe_environment
from snnk_jax import ridge

_EXAMPLES = flags.DEFINE_integer("examples", 200_000, "Rows n.")
_IN = flags.DEFINE_integer("dim", 128, "Input width d.")
_FEATURES = flags.DEFINE_integer("features", 4096, "Features m, even.")
_TARGETS = flags.DEFINE_integer("targets", 10, "Targets o.")
_CHUNK = flags.DEFINE_integer("chunk_size", 8192, "Rows at a time.")
_GENERATE = flags.DEFINE_bool(
    "generate", False, "Draw the inputs of each chunk on the device."
)
_METHOD = flags.DEFINE_enum("method", "cholesky", ["cholesky", "cg", "none"], "Solver.")
_SKLEARN = flags.DEFINE_bool("sklearn", False, "Time scikit-learn's Ridge as well.")
_ROUNDS = flags.DEFINE_integer("repeats", 3, "Timings; the best and all are printed.")
_L2 = flags.DEFINE_float("l2", 1e-4, "Penalty per example.")
_JSON = flags.DEFINE_string("figures", "", "Also write the figures to this file.")


def timed(fn: Any, *args: Any) -> tuple[float, Any]:
    """Seconds of a call, and its result once it is there."""
    start = time.perf_counter()
    result = jax.block_until_ready(fn(*args))
    return time.perf_counter() - start, result


def matmul_rate(size: int, rounds: int) -> float:
    """The best float32 rate of a square product, jax's or numpy's, operations/s."""
    x = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(
        functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    )
    fns = [lambda: product(x, x)]
    if jax.default_backend() == "cpu":
        host = np.asarray(x)
        fns.append(lambda: host @ host)
    best = min(timed(fn)[0] for fn in fns for _ in range(rounds + 1))
    return 2 * size**3 / best


def problem(
    key: jax.Array, n: int, d: int, m: int, o: int
) -> tuple[Any, jax.Array, jax.Array]:
    """A cosine map with its parameters bound, inputs, and noisy targets."""
    keys = jax.random.split(key, 4)
    fm = snnk.features.URF(
        activation="cos", num_features=m, projection="gaussian", precision="highest"
    )
    phi = functools.partial(fm.phi, fm.init(keys[0], d))
    x = jax.random.normal(keys[1], (n, d)) * d**-0.5
    kernel = jax.random.normal(keys[2], (d, o))
    return phi, x, jnp.sin(x @ kernel) + 0.1 * jax.random.normal(keys[3], (n, o))


def generated(
    stats: ridge.RidgeStats, key: jax.Array, phi: Any, n: int, d: int, chunk: int
) -> ridge.RidgeStats:
    """Statistics of inputs that exist one chunk at a time."""
    o = stats.num_targets
    key, kernel_key = jax.random.split(key)
    kernel = jax.random.normal(kernel_key, (d, o))

    def body(i: jax.Array, stats: ridge.RidgeStats) -> ridge.RidgeStats:
        x = jax.random.normal(jax.random.fold_in(key, i), (chunk, d)) * d**-0.5
        return ridge.update(stats, phi(x), jnp.sin(x @ kernel))

    return jax.lax.fori_loop(0, n // chunk, body, stats)


def precision_gate(d: int) -> float:
    """Relative error of coefficients against float64 rows, on a smaller problem."""
    phi, x, y = problem(jax.random.key(1), 20_000, d, 512, 2)
    stats = ridge.update_chunks(ridge.init(512, 2), x, y, phi=phi)
    found = np.asarray(ridge.solve(stats, _L2.value).kernel, np.float64)
    exact = np.asarray(ridge.fit(phi(x), y, _L2.value).kernel, np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def measure() -> dict[str, Any]:
    """All figures of the command line's problem."""
    n, d, m = _EXAMPLES.value, _IN.value, _FEATURES.value
    o, chunk = _TARGETS.value, _CHUNK.value
    rounds = _ROUNDS.value
    rate = matmul_rate(min(4096, m), rounds)
    phi, x, y = problem(jax.random.key(0), 1 if _GENERATE.value else n, d, m, o)

    if _GENERATE.value:
        n -= n % chunk
        stream = jax.jit(
            functools.partial(generated, phi=phi, n=n, d=d, chunk=chunk),
            donate_argnums=0,
        )

        def gather() -> ridge.RidgeStats:
            return stream(ridge.init(m, o), jax.random.key(2))
    else:

        def gather() -> ridge.RidgeStats:
            stats = ridge.init(m, o)
            return ridge.update_chunks(stats, x, y, phi=phi, chunk_size=chunk)

    warm_up, stats = timed(gather)
    seconds = []
    for _ in range(rounds):
        del stats
        again, stats = timed(gather)
        seconds.append(again)
    useful = n * d * m + n * m * (m + 1) + 2 * n * m * o
    figures = {
        "examples": n,
        "in_features": d,
        "num_features": m,
        "num_targets": o,
        "chunk_size": chunk,
        "matmul_gflops": rate / 1e9,
        "first_call_s": warm_up,
        "gather_s": seconds,
        "useful_share": useful / min(seconds) / rate,
        "whole_product_share": 2 * n * m * (d + m) / min(seconds) / rate,
        "precision_gate": precision_gate(d),
    }
    if _METHOD.value == "cholesky":
        figures["solve_s"], _ = timed(lambda: ridge.solve(stats, _L2.value).kernel)
    elif _METHOD.value == "cg":
        key = jax.random.key(3)
        figures["solve_s"], (_, report) = timed(
            lambda: ridge.solve_cg(key, stats, _L2.value)
        )
        figures["cg"] = report._asdict()
    if _SKLEARN.value:
        del stats
        figures |= against_sklearn(phi, x, y, m, rounds)
    return figures


def against_sklearn(
    phi: Any, x: jax.Array, y: jax.Array, m: int, rounds: int
) -> dict[str, Any]:
    """Seconds of ours on ready-made features and of scikit-learn, in turn."""
    from sklearn.linear_model import Ridge

    n = len(y)
    columns = np.empty((n, m), np.float32)
    for start in range(0, n, 8192):
        columns[start : start + 8192] = phi(x[start : start + 8192])
    make = functools.partial(Ridge, alpha=_L2.value * n, solver="cholesky")
    targets = np.asarray(y)

    def ours() -> Any:
        stats = ridge.init(m, y.shape[1])
        stats = ridge.update_chunks(stats, columns, y, chunk_size=_CHUNK.value)
        return np.asarray(ridge.solve(stats, _L2.value).kernel).T

    timed(ours)
    rivals = {
        "ready_made_s": ours,
        "sklearn_s": lambda: make().fit(columns, targets).coef_,
        # Centres the caller's features, which spares it a copy; the last of a round.
        "sklearn_in_place_s": lambda: make(copy_X=False).fit(columns, targets).coef_,
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    found: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name, fit in rivals.items():
            taken, found[name] = timed(fit)
            seconds[name].append(taken)
    theirs = found["sklearn_in_place_s"]
    apart = np.linalg.norm(found["ready_made_s"] - theirs) / np.linalg.norm(theirs)
    return seconds | {"apart": float(apart)}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    if _FEATURES.value % 2:
        raise app.UsageError(f"num_features must be even. Got {_FEATURES.value}.")
    environment = describe_environment()
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    figures = measure()
    for name, value in figures.items():
        shown = value if isinstance(value, list | dict) else f"{value:.6g}"
        print(f"{name:22} {shown}")
    if _JSON.value:
        write_json(_JSON.value, {"environment": environment, "figures": figures})


if __name__ == "__main__":
    app.run(main)
