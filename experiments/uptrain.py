"""Up-training: feed-forward blocks are replaced by smaller ones, then trained.

The blocks start from their own units with a readout in closed form
(:func:`snnk_jax.compress`), from the paper's Psi(W) (Sehanobish et al., arXiv
2310.13225, section 4.4), or from random numbers; they learn a task, or to follow the
dense model on examples without labels.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

import snnk_jax as snnk
from experiments import (
    distil,
    learning,
    plots,
    runner,
    runs,
    sentences,
    starts,
    summary,
    tasks,
    train,
    workdirs,
)
from experiments import sharding as sharding_lib
from experiments.config import check_base, methods_of
from experiments.jobs import run_jobs
from experiments.loading import TrainLoader, eval_batches
from experiments.metrics import read_jsonl
from experiments.report import document, markdown
from experiments.splits import Batch, Dataset, Subset
from snnk_jax.surgery import path_name

TRAINED = ("all", "blocks", "light", "new")
OBJECTIVES = ("task", "embedding", "hidden")


def check(config: Any) -> None:
    """Raises ValueError for a value that no run could use."""
    check_base(config)
    options = config.uptrain
    for name, choices in (("trained", TRAINED), ("objective", OBJECTIVES)):
        if options[name] not in choices:
            raise ValueError(
                f"config.uptrain.{name} must be one of {', '.join(choices)}. "
                f"Got {options[name]!r}."
            )
    for name in ("learning_rate", "new_rate", "calibration"):
        if not options[name] > 0:
            raise ValueError(
                f"config.uptrain.{name} must be positive. Got {options[name]}."
            )
    if not options.similarity >= 0:
        raise ValueError(
            f"config.uptrain.similarity must not be negative. Got {options.similarity}."
        )
    if not options.top or any(top < 0 for top in options.top):
        raise ValueError(
            "config.uptrain.top must hold numbers of blocks, 0 for all. "
            f"Got {options.top}."
        )
    for method in methods_of(config):
        starts.Variant.parse(method, 0)
    if options.score not in ("", "stsb"):
        raise ValueError(
            f"config.uptrain.score must be stsb or empty. Got {options.score!r}."
        )
    if options.score and config.model.family == "vit":
        raise ValueError("config.uptrain.score must be empty for images. Got 'stsb'.")


def run(
    config: Any, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Trains every method, number of blocks and seed; finished runs are not repeated.

    Args:
      config: a config of ``configs/bert_uptrain.py`` or ``configs/vit_uptrain.py``.
      workdir: folder of everything the runs write, ``report.md`` among it.
      command: shown in the report.

    Returns:
      The rows of the report.

    Raises:
      ValueError: for settings that no run could use.
      FileNotFoundError: without the data; says what to pass.
    """
    check(config)
    workdir = pathlib.Path(workdir)
    environment = workdirs.open_workdir(workdir, config)
    study = _Study.open(config, workdir)
    depth = len(study.base.blocks)
    variants = {
        variant.name: variant
        for top in config.uptrain.top
        for variant in (
            starts.Variant.parse(method, min(top, depth) or depth)
            for method in methods_of(config)
        )
    }
    jobs = [
        (f"{name}-seed{seed}", functools.partial(study.measure, variant, seed))
        for name, variant in variants.items()
        for seed in config.seeds
    ]
    rows = run_jobs(workdir, jobs, config.name)
    parts = _report(workdir, rows, config)
    document(workdir, config.name, command, parts, environment)
    print(f"\n{parts[1]}\n\nReport and plots: {workdir / 'report.md'}", flush=True)
    return rows


@dataclasses.dataclass(frozen=True)
class _Study:
    """What the runs of a config share."""

    config: Any
    workdir: pathlib.Path
    base: Any
    dataset: Dataset
    objective: learning.Objective
    loader: Any
    mesh: jax.sharding.Mesh

    @classmethod
    def open(cls, config: Any, workdir: pathlib.Path) -> "_Study":
        mesh = sharding_lib.make_mesh(config.mesh.axes)
        seed = nnx.Rngs(params=0)
        if config.uptrain.objective == "task":
            dataset = runner.load_data(config)
            base = tasks.build_model(config, dataset.num_classes, seed)
            parts = (base, dataset, learning.TASK, TrainLoader)
            return cls(config, workdir, *parts, mesh)
        base = tasks.build_model(config, 1, seed)
        cache = pathlib.Path(config.uptrain.cache or workdir / "teacher")
        dataset, loader = _taught(config, base, cache)
        hidden = 1.0 if config.uptrain.objective == "hidden" else 0.0
        objective = distil.Distil(1.0, config.uptrain.similarity, hidden)
        return cls(config, workdir, base, dataset, objective, loader, mesh)

    def measure(self, variant: starts.Variant, seed: int) -> dict[str, Any]:
        """Builds, trains and scores one variant."""
        config, folder = self.config, self.workdir / f"{variant.name}-seed{seed}"
        start = self.start(variant, seed)
        recipe = dataclasses.replace(
            runs.recipe_for(config, config.uptrain.learning_rate, seed, "val"),
            rates=self.rates(variant),
            eval_split=config.eval_split,
        )
        trainable = self.trainable(variant)
        before = self.scores(start)
        print(
            f"\n{folder.name}\n{summary.parameter_table(start, trainable)}", flush=True
        )
        model, result = train.fit(
            *(start, trainable, self.dataset, recipe, folder),
            mesh=self.mesh,
            rules=config.mesh.rules,
            name=folder.name,
            keep=config.log.keep,
            keep_best=config.keep_best,
            objective=self.objective,
            loader=self.loader,
            base_fingerprint=snnk.adapters.fingerprint(start),
        )
        after = {self.dataset.metric: result["score"]} | self.scores(model)
        size = snnk.compression.save(folder / "model.safetensors", model, self.base)
        counts = dataclasses.asdict(summary.count(start, trainable))
        return {
            **dataclasses.asdict(variant),
            "seed": seed,
            "share": starts.stored(model) / starts.stored(self.base),
            "before": before,
            "after": after,
            "counts": counts,
            "bytes": size,
            "steps": recipe.steps,
            "step_ms": result["step_ms"],
            "seconds": result["seconds"],
        }

    def start(self, variant: starts.Variant, seed: int) -> Any:
        """The model before training; kept in a file, since fitting it takes time."""
        name = variant.name if variant.kind == "units" else f"{variant.name}-seed{seed}"
        file = self.workdir / "starts" / f"{name}.safetensors"
        if not file.is_file():
            bert = self.config.model.family == "bert"
            model = starts.build(
                *(self.base, variant, seed),
                list(self.calibration(self.config.uptrain.calibration)),
                norm="norm2" if bert else None,
                probes=self.config.uptrain.probes,
            )
            snnk.compression.save(file, model, self.base)
        return snnk.compression.load(file, self.base)

    def calibration(self, count: int) -> Iterator[Batch]:
        """Batches of inputs without labels, of training examples drawn once."""
        split = self.dataset.train
        split = split.split if isinstance(split, distil.Taught) else split
        batch = self.config.optim.batch_size
        rows = np.random.default_rng(0).permutation(len(split))[:count]
        rows = rows[: max(len(rows) // batch, 1) * batch]
        if isinstance(split, sentences.Sentences):
            rows = rows[np.argsort(split.lengths[rows], kind="stable")]
            # Two shapes: compress compiles a good deal for each and every block.
            split = dataclasses.replace(split, step=-(-split.tokens.shape[1] // 2))
        for start in range(0, len(rows), batch):
            examples = split.__getitems__(rows[start : start + batch])
            yield {k: v for k, v in examples.items() if k not in ("label", "hidden")}

    def replaced(self, variant: starts.Variant) -> str:
        """Regular expression for the parameters of the replaced blocks."""
        depth = len(self.base.blocks)
        last = "|".join(str(i) for i in range(depth - variant.top, depth))
        return rf"blocks/({last})/mlp/.*"

    def rates(self, variant: starts.Variant) -> tuple[tuple[str, float], ...]:
        """Learning rates of the recipe: more for what is new."""
        if variant.kind == "dense":
            return ()
        return ((self.replaced(variant), self.config.uptrain.new_rate),)

    def trainable(self, variant: starts.Variant) -> Any:
        """NNX filter of what learns; a head does where there is a task."""
        task = self.config.uptrain.objective == "task"
        return Trainable(self.config.uptrain.trained, self.replaced(variant), task)

    def scores(self, model: Any) -> dict[str, float]:
        """Agreement with the teacher, and the score of the task where one is asked."""
        options, config, found = self.config.uptrain, self.config, {}
        size = config.optim.batch_size
        held = self.dataset.val
        if isinstance(held, distil.Taught):
            outputs = embeddings(model, held, size)
            found = self.objective.scores(outputs, held.labels())
        if options.score:
            weights = tasks.weights_path(config.model.weights)
            pairs, labels = sentences.pairs(
                *(options.score, config.data.dir, "dev"),
                tokenizer=config.data.tokenizer or weights,
                length=128,
            )
            similar = distil.pair_similarities(embeddings(model, pairs, size))
            found["spearman"] = distil.rank_correlation(similar, labels)
        return found


@dataclasses.dataclass(frozen=True)
class Trainable:
    """Filter of ``trained``; hashable by value, as all that a step is compiled for."""

    trained: str
    replaced: str
    head: bool

    def __call__(self, path: tuple[Any, ...], value: Any) -> bool:
        name = path_name(path)
        if not issubclass(getattr(value, "type", type(value)), nnx.Param):
            return False
        if name.startswith("head/"):
            return self.head
        if self.trained == "all":
            return True
        if self.trained == "blocks":
            return name.startswith("blocks/")
        new = re.fullmatch(self.replaced, name) is not None
        if self.trained == "new":
            return new
        norm = any(str(part).startswith("norm") for part in path)
        return new or norm or name.endswith("/bias")


def embeddings(model: Any, split: Any, batch_size: int) -> np.ndarray:
    """Unit embeddings of all examples, ``[n, d]`` float32."""
    graphdef, state = nnx.split(model)
    lengths = getattr(split, "lengths", np.zeros(len(split)))
    order = np.argsort(lengths, kind="stable")
    found = []
    for batch in eval_batches(Subset(split, order), batch_size):
        inputs = {k: v for k, v in batch.items() if k in learning.INPUTS}
        real = batch["weight"] > 0
        found.append(np.asarray(_embed(graphdef, state, inputs))[real])
    return np.concatenate(found)[np.argsort(order)]


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: Any, state: Any, batch: Any) -> jax.Array:
    return distil.embed(nnx.merge(graphdef, state), batch)


def _taught(
    config: Any, base: Any, cache: pathlib.Path
) -> tuple[Dataset, Callable[..., TrainLoader]]:
    """The unlabelled examples, with what the dense model makes of them."""
    options = config.data
    loader = TrainLoader
    if config.model.family == "vit":
        images = runner.load_data(config)
        name, parts = images.name, {"train": images.train, "val": images.val}
        tokens = base.config.num_tokens
        lengths = {k: np.full(len(v), tokens) for k, v in parts.items()}
    else:
        if config.uptrain.texts:
            weights = tasks.weights_path(config.model.weights)
            texts = sentences.load(
                config.uptrain.texts,
                directory=options.dir,
                tokenizer=options.tokenizer or weights,
                length=options.length,
                train_size=options.train_size,
                val_fraction=options.val_fraction,
            )
        else:
            texts = sentences.synthetic(options.length)
        name, parts = "sentences", {"train": texts.train, "val": texts.val}
        lengths = {k: v.lengths for k, v in parts.items()}
        loader = sentences.SimilarLengths
    taught = {
        split: distil.teach(
            *(examples, lengths[split], base, cache / split),
            batch_size=config.optim.batch_size,
            hidden=config.uptrain.objective == "hidden",
        )
        for split, examples in parts.items()
    }
    splits = (taught["train"], taught["val"], taught["val"])
    return Dataset(name, *splits, num_classes=1, metric="agreement"), loader


def _report(
    workdir: pathlib.Path, rows: list[dict[str, Any]], config: Any
) -> list[str]:
    """The table, plots and what was done, as parts of ``report.md``."""
    scores = list(dict.fromkeys(name for row in rows for name in row["after"]))
    header = ["blocks start as", "size", "last blocks", "seed", "FFN share"]
    header += [f"{name} {when}" for name in scores for when in ("before", "after")]
    lines = [[*header, "trained", "steps", "step, ms", "file, MB"]]
    for row in rows:
        cells = [
            starts.KINDS[row["kind"]],
            *(str(row[k]) for k in ("size", "top", "seed")),
        ]
        cells.append(f"{row['share']:.4f}")
        for name in scores:
            for when in ("before", "after"):
                value = row[when].get(name)
                cells.append("" if value is None else f"{value:.4f}")
        counts = row["counts"]
        cells += [f"{counts['trained'] + counts['head']:,}", str(row["steps"])]
        lines.append([*cells, f"{row['step_ms']:.0f}", f"{row['bytes'] / 1e6:.1f}"])
    panels: dict[str, dict[str, Any]] = {"training loss": {}}
    for row in rows:
        logged = read_jsonl(workdir / row["name"] / "metrics.jsonl")
        points = [(x["step"], x["train/loss"]) for x in logged if "train/loss" in x]
        if points:
            panels["training loss"][row["name"]] = points
    plots.curves(workdir / "curves.png", panels)
    main = scores[-1]
    shares: dict[str, Any] = {}
    for row in rows:
        point = (row["share"], row["after"][main])
        shares.setdefault(starts.KINDS[row["kind"]], []).append(point)
    curves = {name: sorted(points) for name, points in shares.items()}
    label = "stored FFN parameters, share of the dense ones"
    plots.curves(workdir / "score.png", {main: curves}, xlabel=label)
    options = config.uptrain
    said = (
        f"{config.optim.steps} steps of {config.optim.batch_size} examples; objective "
        f"{options.objective}, trained: {options.trained}, learning rate "
        f"{options.learning_rate:g} and {options.new_rate:g} times that in the "
        "replaced blocks. The share is that of the numbers stored in all feed-forward "
        "blocks; frozen directions are drawn from a stored key."
    )
    pictures = ["![training loss](curves.png)", f"![{main}](score.png)"]
    return [said, markdown(lines, left=1), *pictures]
