"""Speed of the SNNK layer beside the dense layer it stands for.

    python -m experiments.bench
    python -m experiments.bench --table=maps
    python -m experiments.bench --table=ntk --batch=1024

All rows are timed in one run, in turns, so that a busy moment hits all of them. The
last row only writes an output of the same size: no layer can be faster. A layer of
one matrix can gain at most dense / write, so the goal is 8 times or 85 % of that,
whichever is less.

The second command times the maps alone: ``phi`` beside the bare product ``x @ omega``
of the same number of columns, which it should reach to 80 %, and the fast Hadamard
projection beside the dense one.

The third times exact NNGP and NTK kernels of dense networks of depth 3: of --batch
inputs of width 64 with themselves. neural-tangents 0.6.5 takes 51 ms for ReLU and 1024
inputs on two quiet cores, which is the goal.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import snnk_jax as snnk
from experiments.latency import time_in_turns
from experiments.metrics import write_json
from experiments.workdirs import describe_environment

_TABLE = flags.DEFINE_enum(
    "table", "layers", ["layers", "maps", "ntk"], "What to time."
)
_BATCH = flags.DEFINE_integer("batch", 0, "Rows; 1024, or 8192 on an accelerator.")
_IN = flags.DEFINE_integer("in_features", 768, "Input width.")
_OUT = flags.DEFINE_integer("out_features", 3072, "Output width.")
_FEATURES = flags.DEFINE_integer(
    "num_features", 0, "Features of the judged layer (64), or of the maps (1024)."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "float32", "bfloat16"], "float32, or bfloat16 on an accelerator."
)
_ROUNDS = flags.DEFINE_integer("rounds", 40, "Timings per row.")
_JSON = flags.DEFINE_string("json", "", "Also write the table to this file.")

GOAL = 8.0
WRITE_SHARE = 0.85


@dataclasses.dataclass(frozen=True)
class Row:
    """Timings of one layer, in milliseconds."""

    name: str
    median_ms: float
    low_ms: float
    high_ms: float


def layers(
    key: jax.Array, batch: int, d: int, o: int, m: int, dtype: Any
) -> tuple[jax.Array, dict[str, Callable[[jax.Array], jax.Array]]]:
    """An input and the jitted layers to compare on it, weights as arguments."""
    keys = iter(jax.random.split(key, 16))
    x = jax.random.normal(next(keys), (batch, d), dtype)
    kernel = jax.random.normal(next(keys), (d, o), dtype) * d**-0.5
    bias = jnp.zeros((1, o), dtype)

    def dense_gelu(kernel, x):
        return jax.nn.gelu(jnp.matmul(x, kernel) + bias, approximate=False)

    def dense_relu(kernel, x):
        return jax.nn.relu(jnp.matmul(x, kernel) + bias)

    def low_rank(factors, x):
        down, up = factors
        z = jnp.matmul(jnp.matmul(x, down), up) + bias
        return jax.nn.gelu(z, approximate=False)

    def write_only(row, x):
        return row + x[:, :1]

    def snnk_layer(fm):
        params = fm.init(next(keys), d)
        psi = fm.psi(params, kernel)

        def layer(weights, x):
            params, psi = weights
            return snnk.contract(fm.phi(params, x), psi)

        return layer, (params, psi)

    down = jax.random.normal(next(keys), (d, m), dtype) * d**-0.5
    up = jax.random.normal(next(keys), (m, o), dtype) * m**-0.5
    arc, urf = snnk.features.ArcCosine, snnk.features.URF
    rows: dict[str, tuple[Callable[[Any, jax.Array], jax.Array], Any]] = {
        "dense + GELU": (dense_gelu, kernel),
        "dense + ReLU": (dense_relu, kernel),
        f"low rank {m} + GELU": (low_rank, (down, up)),
    }
    for features in sorted({8, m, 4 * m}):
        rows[f"SNNK ReLU, m={features}"] = snnk_layer(arc(num_features=features))
    rows[f"SNNK cosine, m={m}"] = snnk_layer(urf(activation="cos", num_features=m))
    rows["write the output only"] = (write_only, bias)

    def bound(fn: Callable[[Any, jax.Array], jax.Array], weights: Any) -> Any:
        jitted = jax.jit(fn)
        return lambda x: jitted(weights, x)

    return x, {name: bound(*row) for name, row in rows.items()}


MAP_SHARE = 0.8
"""What phi should reach of the speed of the bare matrix product."""


def maps(
    key: jax.Array, batch: int, d: int, m: int, dtype: Any
) -> tuple[jax.Array, dict[str, Callable[[jax.Array], jax.Array]]]:
    """An input and phi of the maps, each beside nothing but its matrix product."""
    x_key, *keys = jax.random.split(key, 8)
    x = jax.random.normal(x_key, (batch, d), dtype) * d**-0.5

    def product(num: int) -> Callable[[jax.Array], jax.Array]:
        omega = snnk.projections.gaussian(keys[0], num, d, jnp.dtype(dtype))
        jitted = jax.jit(lambda omega, x: jnp.matmul(x, omega.T))
        return lambda x: jitted(omega, x)

    def phi(fm: snnk.features.FeatureMap) -> Callable[[jax.Array], jax.Array]:
        params = fm.init(keys[1], d, jnp.dtype(dtype))
        jitted = jax.jit(fm.phi)
        return lambda x: jitted(params, x)

    arc, urf = snnk.features.ArcCosine, snnk.features.URF
    return x, {
        f"x @ omega, {m} columns": product(m),
        f"x @ omega, {m // 2} columns": product(m // 2),
        "phi, arc-cosine": phi(arc(num_features=m)),
        "phi, cosine": phi(urf(activation="cos", num_features=m)),
        "phi, Hadamard arc-cosine": phi(arc(num_features=m, projection="hadamard")),
    }


def map_verdict(rows: list[Row], m: int) -> str:
    """One line a map: the share of the bare product's speed."""
    times = {row.name: row.median_ms for row in rows}
    bare = times[f"x @ omega, {m} columns"]
    lines = []
    for name in ("phi, arc-cosine", "phi, cosine"):
        share = bare / times[name]
        outcome = "reached" if share >= MAP_SHARE else "MISSED"
        lines.append(
            f"{name}: {share:.0%} of the speed of x @ omega, "
            f"goal {MAP_SHARE:.0%}: {outcome}."
        )
    gain = times["phi, arc-cosine"] / times["phi, Hadamard arc-cosine"]
    lines.append(f"Hadamard: {gain:.1f} times the speed of the dense projection.")
    return "\n".join(lines)


NTK_MS = 51.0
"""What neural-tangents 0.6.5 takes for 1024 inputs, depth 3 and ReLU on two cores."""


def ntks(
    key: jax.Array, batch: int, d: int, dtype: Any
) -> tuple[jax.Array, dict[str, Callable[[jax.Array], Any]]]:
    """An input and exact kernels of networks of depth 3, with their own matrix last."""
    x = jax.random.normal(key, (batch, d), dtype)

    def kernel(name: str, get: Any) -> Callable[[jax.Array], Any]:
        dense, act = snnk.infinite.Dense(1.4, 0.1), snnk.infinite.Activation(name)
        net = snnk.infinite.serial(*[dense, act] * 3, dense)
        return lambda x: net.kernel(x, get=get)

    both = ("nngp", "ntk")
    rows = {f"{name}, both": kernel(name, both) for name in ("relu", "gelu", "erf")}
    rows["relu, NNGP alone"] = kernel("relu", "nngp")
    rows["tanh, both"] = kernel("tanh", both)
    gram = jax.jit(lambda x: jnp.matmul(x, x.T))
    return x, {**rows, "x @ x.T": gram}


def ntk_verdict(rows: list[Row], batch: int) -> str:
    """One line: the time per entry, and beside the goal where that was measured."""
    milliseconds = rows[0].median_ms
    line = f"relu, both: {1e6 * milliseconds / batch**2:.1f} ns an entry."
    if batch == 1024:
        outcome = "reached" if milliseconds <= NTK_MS else "MISSED"
        line += f" {milliseconds:.0f} ms, goal {NTK_MS:.0f} ms: {outcome}."
    return line


def time_rows(
    fns: dict[str, Callable[[jax.Array], jax.Array]], x: jax.Array, rounds: int
) -> list[Row]:
    """Times each function once a round and takes medians and quartiles."""
    calls = {name: functools.partial(fn, x) for name, fn in fns.items()}
    rows = []
    for name, values in time_in_turns(calls, rounds).items():
        low, median, high = statistics.quantiles(values, n=4)
        rows.append(Row(name, median, low, high))
    return rows


def verdict(rows: list[Row], judged: str) -> str:
    """One line: the gain of the judged row, both bounds, and which one binds."""
    times = {row.name: row.median_ms for row in rows}
    dense, write = times["dense + GELU"], times["write the output only"]
    gain, limit = dense / times[judged], WRITE_SHARE * dense / write
    target = min(GOAL, limit)
    binding = "the goal" if limit >= GOAL else "writing the output"
    outcome = "reached" if gain >= target else "MISSED"
    return (
        f"{judged}: {gain:.1f} times faster than dense + GELU. Goal {GOAL:.0f} times; "
        f"{WRITE_SHARE:.0%} of what writing the output allows is {limit:.1f} times. "
        f"{binding} binds at {target:.1f}: {outcome}."
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    accelerated = jax.default_backend() != "cpu"
    of_maps, of_ntks = _TABLE.value == "maps", _TABLE.value == "ntk"
    batch = _BATCH.value or (8192 if accelerated or of_maps else 1024)
    dtype = jnp.dtype(_DTYPE.value or ("bfloat16" if accelerated else "float32"))
    d, o = _IN.value, _OUT.value
    m = _FEATURES.value or (1024 if of_maps else 64)
    if of_maps:
        x, fns = maps(jax.random.key(0), batch, d, m, dtype)
        head = f"{d} -> {m} features"
    elif of_ntks:
        dtype = jnp.dtype(_DTYPE.value or "float32")
        x, fns = ntks(jax.random.key(0), batch, 64, dtype)
        head = "64 -> kernel"
    else:
        x, fns = layers(jax.random.key(0), batch, d, o, m, dtype)
        head = f"{d} -> {o}"
    rows = time_rows(fns, x, _ROUNDS.value)
    dense = rows[0].median_ms
    environment = describe_environment()
    print(f"{head}, batch {batch}, {dtype.name}, {_ROUNDS.value} rounds")
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    print(f"{'layer':26}{'median ms':>10}{'quartiles ms':>18}{'gain':>8}")
    for row in rows:
        quartiles = f"{row.low_ms:.2f} to {row.high_ms:.2f}"
        gain = f"{dense / row.median_ms:.1f}x"
        print(f"{row.name:26}{row.median_ms:10.2f}{quartiles:>18}{gain:>8}")
    if of_maps:
        print(map_verdict(rows, m))
    elif of_ntks:
        print(ntk_verdict(rows, batch))
    else:
        print(verdict(rows, f"SNNK ReLU, m={m}"))
    if _JSON.value:
        table = [dataclasses.asdict(row) for row in rows]
        write_json(_JSON.value, {"environment": environment, "rows": table})


if __name__ == "__main__":
    app.run(main)
