"""Turns a config into runs, and their results into a report."""

import json
import pathlib
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from experiments import data as data_lib
from experiments import sharding as sharding_lib
from experiments import tasks, train
from experiments.config import check
from experiments.metrics import write_json
from snnk_jax.models.vit_params import save_vit


def recipe_for(
    config: ConfigDict, learning_rate: float, seed: int, eval_split: str
) -> train.Recipe:
    """The training recipe of one run of a config."""
    return train.Recipe(
        learning_rate=learning_rate,
        steps=config.optim.steps,
        batch_size=config.optim.batch_size,
        seed=seed,
        warmup_steps=config.optim.warmup_steps,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
        label_smoothing=config.optim.label_smoothing,
        augment=config.data.augment,
        eval_split=eval_split,
        log_every=config.log.log_every,
        eval_every=config.log.eval_every,
        checkpoint_every=config.log.checkpoint_every,
    )


def run(config: ConfigDict, workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """Runs every method and seed of a config; finished runs are not repeated."""
    check(config)
    workdir = pathlib.Path(workdir)
    write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))
    dataset = data_lib.load(
        config.data.name,
        image_size=config.model.image_size,
        directory=config.data.dir,
        train_size=config.data.train_size,
        val_fraction=config.data.val_fraction,
        test_size=config.data.test_size,
    )
    mesh = sharding_lib.make_mesh(config.mesh.axes)
    results = []
    for method in config.methods:
        for seed in config.seeds:
            rngs = nnx.Rngs(params=seed, projection=seed + 1)
            model = tasks.build_model(config, dataset.num_classes, rngs)
            model = tasks.METHODS[method].adapt(model, config, rngs)
            recipe = recipe_for(
                config, config.optim.learning_rates[method], seed, config.eval_split
            )
            model, result = train.fit(
                model,
                tasks.METHODS[method].trainable,
                dataset,
                recipe,
                workdir / f"{method}-seed{seed}",
                mesh=mesh,
                rules=config.mesh.rules,
                name=method,
                keep=config.log.keep,
                keep_best=config.keep_best,
            )
            results.append(result)
            print(method, result["accuracy"], flush=True)
    if config.export:
        save_vit(config.export, model, dtype="float16")
    return results
