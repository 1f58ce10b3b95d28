"""Latency of a compressed encoder beside the dense one, and of one block.

    python -m experiments.bench_compress
    python -m experiments.bench_compress --rounds=20 --json=bench.json

First the feed-forward block: Linear, GELU, Linear of width 4 d beside the bundled block
of m = d / 2 features (one random map and one matrix) and the narrow block of d / 2 of
its own units; the goal is 85 % of the ratio of their FLOPs. Then the sentence encoder
of all-MiniLM-L6-v2's sizes, dense and with the last 3 and all 6 blocks cut to 95 of
1536 units (6.25 % of their parameters), random weights, sequences of 128 tokens; the
goal is 1.7 times the dense throughput at the largest batch. All rows of a table are
timed in turns, so that a busy moment hits all of them.

    python -m experiments.bench_compress --tokens=1000000

times a calibration instead: so many random tokens streamed through ``snnk.compress``
into a block of d = 768 and 1536 units, and the memory that it took beyond the model's
(on Linux; the goal is 2 GiB for 1,000,000 tokens). With ``--state_dir`` it goes on
where it was killed.
"""

import dataclasses
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

import snnk_jax as snnk
from experiments.latency import compiled, time_in_turns
from experiments.metrics import write_json
from experiments.workdirs import describe_environment
from snnk_jax.models.bert import Bert, BertConfig, Mlp

BLOCK_SHARE = 0.85
"""What a block should reach of the ratio of FLOPs."""

ENCODER_GAIN = 1.7
"""What the encoder should gain at the largest batch with all blocks compressed."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Timings in milliseconds of one call, and the memory of its temporaries."""

    table: str
    name: str
    batch: int
    p50_ms: float
    p95_ms: float
    gain: float
    flop_ratio: float
    temporary_mb: float


def narrowed(model: Any, path: str, units: int, where: slice) -> Any:
    """The model with the first units of its blocks, as compress would leave it."""

    def cut(side: int) -> Callable[[Any, nnx.Rngs], nnx.Linear]:
        def build(linear: Any, rngs: nnx.Rngs) -> nnx.Linear:
            sizes = [linear.in_features, linear.out_features]
            sizes[side] = units
            return nnx.Linear(
                *sizes, dtype=linear.dtype, param_dtype=linear.param_dtype, rngs=rngs
            )

        return build

    rules = [
        snnk.SwapRule(path=f"{path}fc1", build=cut(1), where=where),
        snnk.SwapRule(path=f"{path}fc2", build=cut(0), where=where),
    ]
    return snnk.swap_modules(model, rules, rngs=nnx.Rngs(0))[0]


def time_rows(
    table: str,
    batch: int,
    models: dict[str, tuple[Any, float]],
    inputs: tuple[Any, ...],
    rounds: int,
) -> list[Row]:
    """Times models in turns; the first one is what the others gain against.

    ``models`` holds each with its FLOPs, in any unit.
    """
    calls = {name: compiled(model, *inputs) for name, (model, _) in models.items()}
    times = time_in_turns({name: call for name, (call, _) in calls.items()}, rounds)
    first = next(iter(models))
    middle = {name: float(np.median(values)) for name, values in times.items()}
    return [
        Row(
            table,
            name,
            batch,
            middle[name],
            float(np.quantile(times[name], 0.95)),
            middle[first] / middle[name],
            models[first][1] / flops,
            calls[name][1],
        )
        for name, (_, flops) in models.items()
    ]


def block_rows(
    d: int, batch: int, length: int, dtype: Any, rounds: int, rngs: nnx.Rngs
) -> list[Row]:
    """The dense block, the bundled one, and the narrow one."""
    m, width = d // 2, 4 * d
    config = BertConfig(hidden_size=d, depth=1, num_heads=1, mlp_dim=width)
    dense = Mlp(config, dtype=dtype, param_dtype=dtype, rngs=rngs)
    bundled = snnk.nn.SNNKMlp(
        d,
        d,
        features=snnk.features.ArcCosine(num_features=m),
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
    )
    narrow = narrowed(dense, "", m, slice(None))
    x = jax.random.normal(jax.random.key(0), (batch, length, d), dtype)
    models = {
        f"dense, width {width}": (dense, float(width)),
        f"bundled, m={m}": (bundled, float(m)),
        f"own units, m={m}": (narrow, float(m)),
    }
    return time_rows(f"block d={d}", batch, models, (x,), rounds)


def encoder_flops(config: BertConfig, length: int, widths: list[int]) -> float:
    """Multiplications of a sequence in all products of the blocks."""
    d = config.hidden_size
    attention = 4 * length * d * d + 2 * length * length * d
    return float(sum(attention + 2 * length * d * width for width in widths))


def encoder_rows(
    batch: int, length: int, units: int, dtype: Any, rounds: int, rngs: nnx.Rngs
) -> list[Row]:
    """The encoder dense, and with the last half and all of its blocks compressed."""
    config = BertConfig.preset("minilm-l6", pool="mean", head="embedding")
    dense = Bert(config, dtype=dtype, param_dtype=dtype, rngs=rngs)
    models = {}
    for last in (0, config.depth // 2, config.depth):
        widths = [config.mlp_dim] * (config.depth - last) + [units] * last
        model = dense
        if last:
            where = slice(config.depth - last, None)
            model = narrowed(dense, r"blocks/[0-9]+/mlp/", units, where)
        name = f"last {last} blocks at {units} units" if last else "dense"
        models[name] = (model, encoder_flops(config, length, widths))
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, 30000)
    return time_rows("encoder", batch, models, (tokens,), rounds)


def verdict(rows: list[Row]) -> list[str]:
    """A line for each goal."""
    lines = []
    for row in rows:
        if row.name.startswith("bundled"):
            share = row.gain / row.flop_ratio
            outcome = "reached" if share >= BLOCK_SHARE else "MISSED"
            lines.append(
                f"{row.table}, {row.name}: {row.gain:.2f} times faster, {share:.0%} of "
                f"the FLOP ratio {row.flop_ratio:.1f}; goal {BLOCK_SHARE:.0%}: "
                f"{outcome}."
            )
    encoder = [row for row in rows if row.table == "encoder"]
    if encoder:
        largest = max(row.batch for row in encoder)
        row = [row for row in encoder if row.batch == largest][-1]
        outcome = "reached" if row.gain >= ENCODER_GAIN else "MISSED"
        lines.append(
            f"encoder, {row.name}, batch {largest}: {row.gain:.2f} times faster; goal "
            f"{ENCODER_GAIN}: {outcome}."
        )
    return lines


def stream(tokens: int, state_dir: str | None, batch: int = 8192) -> dict[str, float]:
    """Seconds and peak memory of a calibration on random tokens."""
    config = BertConfig(hidden_size=768, depth=1, num_heads=1, mlp_dim=1536)
    model = nnx.Sequential(Mlp(config, rngs=nnx.Rngs(0)))

    def batches() -> Iterator[Any]:
        for index in range(-(-tokens // batch)):
            key = jax.random.fold_in(jax.random.key(0), index)
            yield jax.random.normal(key, (batch, 768))

    jax.block_until_ready(model(next(batches())))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    _, report = snnk.compress(
        model,
        batches,
        [snnk.CompressRule(path="layers/0")],
        budget=1 / 16,
        state_dir=state_dir,
        probes=1,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens": float(-(-tokens // batch) * batch),
        "seconds": time.perf_counter() - start,
        "mib_beyond_the_model": (peak - before) / 1024,
        "r2": report.blocks[0].r2,
    }


def define_flags() -> None:
    """Defines the flags; not on import, where another benchmark has its own."""
    flags.DEFINE_integer("rounds", 30, "Timings of each row.")
    flags.DEFINE_enum(
        "dtype",
        "",
        ["", "float32", "bfloat16"],
        "float32, or bfloat16 on an accelerator.",
    )
    flags.DEFINE_list("batches", ["1", "8", "64"], "Sequences at a time.")
    flags.DEFINE_integer("length", 128, "Tokens of a sequence.")
    flags.DEFINE_integer("units", 95, "Units of a compressed block.")
    flags.DEFINE_list("widths", ["384", "768"], "d of the blocks that are timed.")
    flags.DEFINE_integer("tokens", 0, "Stream so many tokens instead of the tables.")
    flags.DEFINE_string("state_dir", None, "Folder that keeps the sums of the stream.")
    flags.DEFINE_string("json", "", "Also write the figures to this file.")


def main(argv: list[str]) -> None:
    """Times what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    given = flags.FLAGS
    accelerated = jax.default_backend() != "cpu"
    dtype = jnp.dtype(given.dtype or ("bfloat16" if accelerated else "float32"))
    batches = [int(batch) for batch in given.batches]
    length, rounds, rngs = given.length, given.rounds, nnx.Rngs(0)
    environment = describe_environment()
    if given.tokens:
        figures = stream(given.tokens, given.state_dir)
        print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if given.json:
            write_json(given.json, {"environment": environment, "stream": figures})
        return
    print(f"{dtype.name}, {length} tokens a sequence, {rounds} rounds in turns")
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    print(
        f"{'table':13}{'row':29}{'batch':>6}{'p50 ms':>10}{'p95 ms':>10}"
        f"{'seq/s':>10}{'gain':>7}{'FLOP ratio':>11}{'temp MB':>9}"
    )
    rows: list[Row] = []
    for d in map(int, given.widths):
        rows += block_rows(d, max(batches), length, dtype, rounds, rngs)
    for batch in batches:
        rows += encoder_rows(batch, length, given.units, dtype, rounds, rngs)
    for row in rows:
        rate = 1e3 * row.batch / row.p50_ms
        print(
            f"{row.table:13}{row.name:29}{row.batch:6}{row.p50_ms:10.3f}"
            f"{row.p95_ms:10.3f}{rate:10.0f}{row.gain:6.2f}x{row.flop_ratio:10.2f}x"
            f"{row.temporary_mb:9.1f}"
        )
    print("\n".join(verdict(rows)))
    if given.json:
        table = [dataclasses.asdict(row) for row in rows]
        write_json(given.json, {"environment": environment, "rows": table})


if __name__ == "__main__":
    define_flags()
    app.run(main)
