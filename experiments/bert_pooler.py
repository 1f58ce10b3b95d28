"""What stands behind a frozen BERT: pooler and classifier, dense and as an SNNK.

The encoder is run over every text once and its states are kept, so that a head is
trained in seconds on a CPU. All heads are trained by one recipe.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file, save

import snnk_jax as snnk
from experiments import glue, learning, plots, scores, tasks, train
from experiments.jobs import Job, run_jobs
from experiments.loading import TrainLoader
from experiments.pooler_heads import METHODS, Head, States, dense_head, merged_map
from experiments.report import document, markdown
from experiments.runner import open_workdir
from experiments.splits import Batch
from snnk_jax._files import write_atomic

# The parameters that a head file holds and a base model's fingerprint leaves out.
TASK_PARAMETERS = "(pooler|head)/.*"
_CHUNK = 512


def run(
    config: Any, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Trains every head on every task and writes the report; nothing is done twice.

    Args:
      config: a config of ``configs/bert_pooler.py``.
      workdir: folder of ``rows.jsonl``, ``report.md`` and its plot, ``states``, what
        the encoder made of the texts, and ``heads``, a file of each head.
      command: shown in the report.

    Returns:
      The rows of the report, one a task and head.

    Raises:
      FileNotFoundError: without the data or the weights; says what to pass.
    """
    check(config)
    workdir = pathlib.Path(workdir)
    # A row holds all seeds, and says nothing of the rates it chose from.
    environment = open_workdir(workdir, config, ("methods",))
    start = time.perf_counter()
    jobs = list(_jobs(config, workdir))
    encoding = time.perf_counter() - start
    rows = run_jobs(workdir, jobs, config.name)
    parts = report(workdir, rows, config)
    document(workdir, config.name, command, parts, environment)
    total = time.perf_counter() - start
    print(f"{total:.0f} s, {encoding:.0f} s of them for the encoder.", flush=True)
    print(f"Report: {workdir / 'report.md'}", flush=True)
    return rows


def check(config: Any) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    for key, values, known in (
        ("methods", config.methods, METHODS),
        ("tasks", config.tasks, (*glue.TASKS, "synthetic_text")),
    ):
        wrong = [value for value in values if value not in known]
        if wrong or not values or len(set(values)) < len(values):
            raise ValueError(
                f"config.{key} must be some of {', '.join(known)}. Got {values}."
            )
    if config.model.pool not in ("cls", "mean", "pooler"):
        raise ValueError(
            f"config.model.pool must be cls, mean or pooler. Got {config.model.pool!r}."
        )
    needed = [name for name in config.methods if METHODS[name].source != "none"]
    if needed and config.methods[0] != "dense":
        raise ValueError(
            f"config.methods must begin with dense, which {', '.join(needed)} start "
            f"from. Got {config.methods}."
        )
    if (
        not config.seeds
        or min(config.seeds) < 0
        or config.sweep.seed not in config.seeds
    ):
        raise ValueError(
            "config.seeds must not be negative, and hold config.sweep.seed. "
            f"Got {config.seeds} and {config.sweep.seed}."
        )
    rates = config.sweep.learning_rates
    if not rates or any(not 0 < rate < math.inf for rate in rates):
        raise ValueError(f"config.sweep.learning_rates must be positive. Got {rates}.")
    for key, value in {
        "pooler.num_features": config.pooler.num_features,
        "pooler.merged_features": config.pooler.merged_features,
        "pooler.scale": config.pooler.scale,
        "optim.batch_size": config.optim.batch_size,
        "data.length": config.data.length,
    }.items():
        if not value > 0:
            raise ValueError(f"config.{key} must be positive. Got {value}.")
    if not 0 <= config.optim.warmup_steps < config.optim.steps:
        raise ValueError(
            "config.optim.warmup_steps must be from 0 to below optim.steps. "
            f"Got {config.optim.warmup_steps} and {config.optim.steps}."
        )


def _jobs(config: Any, workdir: pathlib.Path) -> Iterable[Job]:
    for task in config.tasks:
        states = load_states(task, config, workdir)
        for name in config.methods:
            measure = functools.partial(_measure, task, name, states, config, workdir)
            yield f"{task} | {name}", measure


def load_states(task: str, config: Any, workdir: pathlib.Path) -> States:
    """The encoder's states of a task, from ``workdir/states`` or the encoder."""
    file = workdir / "states" / f"{task}.safetensors"
    classes = glue.NUM_CLASSES[task if task in glue.NUM_CLASSES else f"glue:{task}"]
    metric = glue.TASKS[task].metric if task in glue.TASKS else "accuracy"
    if not file.is_file():
        write_atomic(file, save(_encode_task(task, config)))
    arrays = load_file(file)
    pooler = None
    if "pooler.kernel" in arrays:
        pooler = arrays["pooler.kernel"], arrays["pooler.bias"]
    return States(
        x={split: arrays[f"{split}.x"] for split in ("train", "val", "test")},
        y={split: arrays[f"{split}.y"] for split in ("train", "val", "test")},
        classes=classes,
        metric=metric,
        fingerprint=arrays["fingerprint"].tobytes().hex(),
        pooler=pooler,
    )


def _encode_task(task: str, config: Any) -> dict[str, np.ndarray]:
    name = task if task == "synthetic_text" else f"glue:{task}"
    weights = tasks.weights_path(config.model.weights)
    options = {
        "directory": config.data.dir,
        "tokenizer": weights,
        "length": config.data.length,
        "val_fraction": config.data.val_fraction,
    }
    dataset = glue.load(name, **options)
    limit = config.data.max_train_size
    if limit and len(dataset.train) > limit:
        dataset = glue.load(name, train_size=limit, **options)
    encoder = tasks.build_model(config, 1, nnx.Rngs(0))
    found = snnk.adapters.fingerprint(encoder, exclude=TASK_PARAMETERS)
    arrays = {"fingerprint": np.frombuffer(bytes.fromhex(found), np.uint8)}
    if config.model.pool == "pooler":
        arrays["pooler.kernel"] = np.asarray(encoder.pooler.dense.kernel[...])
        arrays["pooler.bias"] = np.asarray(encoder.pooler.dense.bias[...])
    for split in ("train", "val", "test"):
        rows = getattr(dataset, split)
        batch = rows.__getitems__(np.arange(len(rows)))
        arrays[f"{split}.x"] = encode(encoder, batch)
        arrays[f"{split}.y"] = batch["label"]
    return arrays


def encode(encoder: Any, batch: Batch, size: int = 64) -> np.ndarray:
    """Pooled states of texts ``[n, d]``, without the pooler's map.

    Texts of like length go together and are padded to a multiple of 16 tokens.
    """
    graphdef, state = nnx.split(encoder)

    @jax.jit
    def pooled(state: Any, *inputs: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        if model.config.pool == "pooler":
            return model.hidden_states(*inputs)[..., 0, :]
        return model.features(*inputs)

    lengths = batch["mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    out = np.zeros((len(order), encoder.config.hidden_size), np.float32)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = int(lengths[rows].max())
        width = min(-(-longest // 16) * 16, batch["mask"].shape[1])
        # The last batch is filled up, so that it compiles no shape of its own.
        filled = np.resize(rows, size)
        names = ("tokens", "token_types", "mask")
        inputs = (batch[name][filled, :width] for name in names)
        out[rows] = np.asarray(pooled(state, *inputs))[: len(rows)]
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(
    graphdef: Any,
    recipe: learning.Recipe,
    params: Any,
    rest: Any,
    rate: Any,
    x: Any,
    y: Any,
) -> tuple[Any, jax.Array]:
    """Trains on batches ``[steps, batch, d]``; returns parameters and losses."""
    optimizer = learning.make_optimizer(recipe)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        outputs = nnx.merge(graphdef, params, rest)(x)
        return jnp.mean(learning.example_losses(outputs, y))

    def step(carry: Any, batch: Any) -> Any:
        params, memory = carry
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, memory = optimizer.update(gradient, memory, params)
        updates = optax.tree.scale(rate, updates)
        return (optax.apply_updates(params, updates), memory), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), (x, y))
    return params, losses


@functools.partial(jax.jit, static_argnums=0)
def _outputs(graphdef: Any, state: Any, x: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(x)


def predict(model: nnx.Module, x: np.ndarray) -> np.ndarray:
    """Outputs of a head, in chunks of one shape."""
    graphdef, state = nnx.split(model)
    parts = []
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        filled = np.pad(part, ((0, _CHUNK - len(part)), (0, 0)))
        parts.append(np.asarray(_outputs(graphdef, state, filled))[: len(part)])
    return np.concatenate(parts)


def _score(model: nnx.Module, states: States, split: str) -> float:
    outputs = predict(model, states.x[split])
    return scores.scores(outputs, states.y[split])[states.metric]


@dataclasses.dataclass(frozen=True)
class _Trained:
    model: Any
    loss: float
    seconds: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


def _build(
    name: str, states: States, config: Any, seed: int, heads: pathlib.Path
) -> Any:
    """A head before its training."""
    method = METHODS[name]
    dense = dense_head(states.dim, states.dim, states.classes, nnx.Rngs(params=seed))
    if states.pooler is not None:
        pooler: Any = dense.pooler
        for variable, value in zip(
            (pooler.dense.kernel, pooler.dense.bias), states.pooler, strict=True
        ):
            variable[...] = jnp.asarray(value)
    if method.source == "head" or (method.source == "pooler" and states.pooler is None):
        dense = _restored(dense, heads, seed)
    assert method.build is not None
    rngs = nnx.Rngs(params=seed, projection=seed)
    return method.build(config, states, dense, rngs)


def _train(model: Any, states: States, config: Any, rate: float, seed: int) -> _Trained:
    optim = config.optim
    recipe = learning.Recipe(
        learning_rate=1.0,  # `rate` is an argument, so that all compile once
        seed=0,
        steps=optim.steps,
        batch_size=optim.batch_size,
        warmup_steps=optim.warmup_steps,
        weight_decay=optim.weight_decay,
    )
    loader = TrainLoader(_Rows(states), optim.batch_size, seed)
    rows = np.stack([loader.indices(step) for step in range(optim.steps)])
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    x, y = states.x["train"][rows], states.y["train"][rows]
    begun = time.perf_counter()
    params, losses = _fit(graphdef, recipe, params, rest, jnp.float32(rate), x, y)
    loss = float(jnp.mean(losses[-20:]))
    seconds = time.perf_counter() - begun
    return _Trained(nnx.merge(graphdef, params, rest), loss, seconds)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The training states as a split."""

    states: States

    def __len__(self) -> int:
        return len(self.states.y["train"])

    def __getitems__(self, indices: np.ndarray) -> Batch:
        x, y = self.states.x["train"], self.states.y["train"]
        return {"x": x[indices], "label": y[indices]}


def _restored(dense: Head, heads: pathlib.Path, seed: int) -> Head:
    """The dense head that was trained with a seed."""
    arrays = load_file(heads / f"dense-seed{seed}.safetensors")
    graphdef, state = nnx.split(dense)
    flat = [
        (path, variable.replace(jnp.asarray(arrays["/".join(map(str, path))])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _measure(
    task: str, name: str, states: States, config: Any, workdir: pathlib.Path
) -> dict[str, Any]:
    heads = workdir / "heads" / task
    method = METHODS[name]
    row: dict[str, Any] = {"task": task, "method": name, "title": method.title}
    begun = time.perf_counter()
    if method.ridge is not None:
        row |= _ridge(method.ridge, states, config)
    else:
        starts = {s: _build(name, states, config, s, heads) for s in config.seeds}
        rate = _choose_rate(name, starts[config.sweep.seed], states, config)
        runs = {s: _train(starts[s], states, config, rate, s) for s in config.seeds}
        broken = [seed for seed, run in runs.items() if not run.finite]
        if broken:
            raise train.NonFiniteError(
                f"{name} at learning rate {rate:g} must train. Got a loss that is not "
                f"finite with seeds {broken}."
            )
        if name == "dense":
            for seed, run in runs.items():
                flat = nnx.to_flat_state(nnx.state(run.model))
                arrays = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in flat}
                write_atomic(heads / f"dense-seed{seed}.safetensors", save(arrays))
        first = runs[config.seeds[0]].model
        counts = snnk.nn.count_parameters(first, nnx.Param)
        row |= {
            "rate": rate,
            "scores": [_score(run.model, states, "test") for run in runs.values()],
            "start": [_score(start, states, "test") for start in starts.values()],
            "trained": counts.trained + counts.head,
            "frozen": counts.projections,
            "bytes": snnk.adapters.save_adapter(
                heads / f"{name}.safetensors",
                first,
                base_fingerprint=states.fingerprint,
                trained=TASK_PARAMETERS,
                exclude=TASK_PARAMETERS,
            ),
            # Without the seconds of the compiler, which all seeds share.
            "fit_seconds": float(np.median([run.seconds for run in runs.values()])),
        }
    return row | {
        "metric": states.metric,
        "train_size": len(states.y["train"]),
        "seconds": time.perf_counter() - begun,
    }


def _choose_rate(name: str, start: Any, states: States, config: Any) -> float:
    """The learning rate that is best on the validation split, by one seed."""
    tried = []
    for rate in config.sweep.learning_rates:
        run = _train(start, states, config, rate, config.sweep.seed)
        if run.finite:
            score = _score(run.model, states, "val")
            # The lower loss decides between equal scores.
            tried.append((score, -run.loss, rate))
    if not tried:
        raise train.NonFiniteError(
            f"sweep.learning_rates must hold one at which {name} trains. "
            f"Got {tuple(config.sweep.learning_rates)}."
        )
    return max(tried)[-1]


def _ridge(kind: str, states: States, config: Any) -> dict[str, Any]:
    """A head in closed form; the penalty by generalised cross-validation."""
    y = states.y["train"][:, None]
    if states.classes > 1:
        y = np.where(y == np.arange(states.classes)[None], 1, -1)
    y = jnp.asarray(y, jnp.float32)
    if kind == "constant":
        level = np.tile(np.mean(y, axis=0), (len(states.y["test"]), 1))
        score = scores.scores(level, states.y["test"])[states.metric]
        sizes = dict.fromkeys(("trained", "frozen", "bytes", "fit_seconds"), 0)
        return {"scores": [score], **sizes}
    found, seconds, frozen = [], [], 0
    arrays: dict[str, np.ndarray] = {}
    for seed in config.seeds if kind != "linear" else config.seeds[:1]:
        phi: Callable[[Any], Any] = jnp.asarray
        if kind != "linear":
            features = merged_map(kind, config, states)
            params = features.init(jax.random.key(seed), states.dim)
            frozen = sum(leaf.size for leaf in jax.tree.leaves(params))
            phi = functools.partial(features.phi, params)
        begun = time.perf_counter()
        rows = phi(jnp.asarray(states.x["train"]))
        solution = snnk.ridge.fit(rows, y, criterion="gcv")
        seconds.append(time.perf_counter() - begun)
        outputs = np.asarray(solution(phi(jnp.asarray(states.x["test"]))))
        found.append(scores.scores(outputs, states.y["test"])[states.metric])
        arrays = {
            "kernel": np.asarray(solution.kernel),
            "bias": np.asarray(solution.bias),
        }
    return {
        "scores": found,
        "trained": sum(array.size for array in arrays.values()),
        "frozen": frozen,
        "bytes": len(save(arrays)),
        "fit_seconds": float(np.median(seconds)),
    }


def report(workdir: pathlib.Path, rows: list[dict[str, Any]], config: Any) -> list[str]:
    """The parts of the report; the plot is written on the way."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    header = ["head", "average", "range", "at the start", "trained", "frozen Ω"]
    lines = [[*header, "file, kB", "fit, s"]]
    tasks_header = [f"{task} ({r['metric']})" for task, r in _first_rows(rows).items()]
    details = [["head", *tasks_header]]
    points = []
    for found in by_method.values():
        # The average over the tasks of each seed.
        average = 100 * np.mean([row["scores"] for row in found], axis=0)
        start = [np.mean(row["start"]) for row in found if "start" in row]
        converted = METHODS[found[0]["method"]].source != "none"
        first = found[0]
        lines.append(
            [
                first["title"],
                f"{average.mean():.2f}",
                _spread(average),
                f"{100 * np.mean(start):.2f}" if converted else "",
                f"{first['trained']:,}",
                f"{first['frozen']:,}",
                f"{first['bytes'] / 1e3:.1f}",
                f"{np.median([row['fit_seconds'] for row in found]):.2f}",
            ]
        )
        percent = [100 * np.array(row["scores"]) for row in found]
        cells = [f"{values.mean():.1f} ({_spread(values)})" for values in percent]
        details.append([first["title"], *cells])
        points.append(
            {
                "title": first["title"],
                "trained": first["trained"],
                **{"mean": average.mean() / 100, "low": average.min() / 100},
                "high": average.max() / 100,
            }
        )
    # The constant is far below all others.
    shown = [p for p in points if p["title"] != METHODS["constant"].title]
    plots.ranges(workdir / "score.png", shown, "average score, %")
    sizes = ", ".join(
        f"{task} {row['train_size']:,}" for task, row in _first_rows(rows).items()
    )
    rates = ", ".join(f"{rate:g}" for rate in config.sweep.learning_rates)
    notes = (
        f"Frozen encoder, {config.model.pool} states, {config.optim.steps} steps of "
        f"{config.optim.batch_size} examples, {len(config.seeds)} seed(s); learning "
        f"rates chosen from {rates} on a validation split. Training examples: {sizes}. "
        "Trained parameters are with the classifier; files name the projection by its "
        "key unless it was balanced to samples."
    )
    picture = "![average score of each head, and its trained parameters](score.png)"
    return [notes, markdown(lines, left=1), markdown(details, left=1), picture]


def _spread(values: np.ndarray) -> str:
    if len(values) < 2:
        return "1 fit"
    return f"{values.min():.1f} to {values.max():.1f}"


def _first_rows(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A row of each task, in the order of the tasks, which is that of a method's."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["task"], row)
    return first
