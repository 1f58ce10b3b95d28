import dataclasses
import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import augment, learning, train
from experiments import data as data_lib
from experiments.checkpoints import Checkpoints
from experiments.metrics import read_jsonl
from experiments.sharding import make_mesh
from snnk_jax.models.vit import ViT, ViTConfig

REPLICATE = ((".*", "replicate"),)
RECIPE = learning.Recipe(
    learning_rate=1e-2,
    steps=6,
    batch_size=16,
    seed=0,
    warmup_steps=1,
    weight_decay=0.01,
    label_smoothing=0.1,
    augment="crop_flip",
    eval_split="val",
    log_every=1,
    eval_every=3,
    checkpoint_every=2,
)


def make_vit(seed=0, **options):
    config = ViTConfig(
        hidden_size=8,
        depth=1,
        num_heads=2,
        mlp_dim=16,
        image_size=8,
        patch_size=4,
        num_classes=10,
        **({"pool": "mean", "patch_dropout": 0.5, "dropout_rate": 0.1} | options),
    )
    return ViT(config, rngs=nnx.Rngs(seed))


@pytest.fixture
def mesh():
    return make_mesh((("data", -1),), jax.devices()[:2])


@pytest.fixture(scope="module")
def dataset():
    return data_lib.load("synthetic", image_size=8)


@pytest.fixture
def fit(dataset, tmp_path, mesh):
    def run(recipe=RECIPE, folder="run", model=None, **options):
        model = make_vit() if model is None else model
        options = {"mesh": mesh, "rules": REPLICATE, "dataset": dataset} | options
        return train.fit(
            model, nnx.Param, recipe=recipe, workdir=tmp_path / folder, **options
        )

    return run


def losses(folder):
    return {
        row["step"]: row["train/loss"]
        for row in read_jsonl(folder / "metrics.jsonl")
        if "train/loss" in row
    }


def assert_same(a, b):
    a, b = nnx.state(a), nnx.state(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


class InterruptedRunError(Exception):
    pass


def interrupted_after(dataset, batches):
    """The data set, whose training part fails after some batches."""

    class Failing:
        count = 0

        def __len__(self):
            return len(dataset.train)

        def __getitems__(self, rows):
            self.count += 1
            if self.count > batches:
                raise InterruptedRunError
            return dataset.train.__getitems__(rows)

    return dataclasses.replace(dataset, train=Failing())


def terminating(split):
    """A split that is told to stop whenever it is read."""

    class Terminating:
        def __len__(self):
            return len(split)

        def __getitems__(self, rows):
            os.kill(os.getpid(), signal.SIGTERM)
            return split.__getitems__(rows)

    return Terminating()


# Augmentations.


def ramps(n=64, size=16):
    """Images whose pixels tell their row and column."""
    row, column = np.mgrid[:size, :size]
    image = np.stack([row, column, row * 0], -1).astype(np.uint8)
    return jnp.asarray(np.repeat(image[None], n, 0))


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_augmentations_keep_shape_and_follow_the_key(name):
    vary = augment.AUGMENTATIONS[name]
    images = ramps()
    got = vary(jax.random.key(0), images)
    assert (got.shape, got.dtype) == (images.shape, images.dtype)
    np.testing.assert_array_equal(got, vary(jax.random.key(0), images))
    np.testing.assert_array_equal(got, jax.jit(vary)(jax.random.key(0), images))
    other = vary(jax.random.key(1), images)
    assert np.array_equal(got, other) == (name == "none")


def test_crop_shifts_each_image_by_at_most_an_eighth():
    got = np.asarray(augment.augment_crop(jax.random.key(0), ramps(400)))
    # An edge-padded ramp, shifted: rows and columns stay whole.
    shifts = got[:, 8, 8, :2].astype(int) - 8
    every = {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    assert {(int(down), int(right)) for down, right in shifts} == every
    for image, (down, right) in zip(got, shifts, strict=True):
        rows = np.clip(np.arange(16) + down, 0, 15)
        columns = np.clip(np.arange(16) + right, 0, 15)
        np.testing.assert_array_equal(image[:, :, 0], rows[:, None] * np.ones(16))
        np.testing.assert_array_equal(image[:, :, 1], columns * np.ones((16, 1)))


def test_crop_flip_mirrors_about_half_of_the_images():
    got = np.asarray(augment.augment_crop_flip(jax.random.key(0), ramps(400)))
    columns = got[:, 8, :, 1].astype(int)
    mirrored = columns[:, 0] > columns[:, -1]
    assert 150 < mirrored.sum() < 250  # 5 standard deviations about 200
    rows = got[:, :, 8, 0].astype(int)
    assert (rows[:, 0] < rows[:, -1]).all()  # never upside down


def test_normalise():
    got = augment.normalise(jnp.asarray([0, 255], jnp.uint8))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [-1.0, 1.0])


# One step.


def test_weight_decay_leaves_biases_and_scales_alone():
    recipe = dataclasses.replace(RECIPE, warmup_steps=0, weight_decay=0.5)
    optimizer = learning.make_optimizer(recipe)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(())}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert np.all(updates["kernel"] < 0)
    np.testing.assert_array_equal(updates["bias"], np.zeros(2))
    np.testing.assert_array_equal(updates["scale"], 0.0)


@pytest.mark.slow
def test_step_metrics(dataset):
    """The metrics of one step, computed again by hand."""
    recipe = dataclasses.replace(RECIPE, augment="none", label_smoothing=0.2)
    model = make_vit()
    model.head.kernel[...] = jax.random.normal(jax.random.key(3), (8, 10))
    graphdef, params, projections, frozen = learning.split_model(model, nnx.Param)
    optimizer = learning.make_optimizer(recipe)
    state = learning.make_init(optimizer, recipe)(params)
    batch = dataset.train.__getitems__(np.arange(16))
    step = jax.jit(learning.make_train_step(graphdef, optimizer, recipe))
    after, metrics = step(state, projections, frozen, batch)

    key = jax.random.fold_in(jax.random.key(recipe.seed), 0)
    _, dropout_key = jax.random.split(key)

    def loss_fn(params):
        model = nnx.merge(graphdef, params)
        images = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1.0
        logits = model(images, rngs=nnx.Rngs(dropout=dropout_key))
        targets = 0.8 * jax.nn.one_hot(batch["label"], 10) + 0.2 / 10
        loss = -jnp.sum(targets * jax.nn.log_softmax(logits), -1).mean()
        return loss, logits

    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, logits), grads = gradient(params)

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))

    close = {"rtol": 1e-4}
    np.testing.assert_allclose(metrics["loss"], loss, **close)
    hits = np.argmax(logits, -1) == batch["label"]
    np.testing.assert_allclose(metrics["accuracy"], hits.mean(), **close)
    np.testing.assert_allclose(metrics["grad_norm"], norm(grads), **close)
    np.testing.assert_allclose(metrics["param_norm"], norm(after["params"]), **close)
    assert int(after["step"]) == 1


# Whole runs.


def test_training_learns_and_leaves_the_model_alone(fit, tmp_path):
    model = make_vit(pool="cls", patch_dropout=0.0, dropout_rate=0.0)
    before = nnx.clone(model)
    # No flips: the corner tells the class.
    recipe = dataclasses.replace(
        RECIPE,
        steps=150,
        learning_rate=2e-2,
        augment="none",
        eval_every=0,
        checkpoint_every=0,
    )
    trained, result = fit(recipe, model=model)
    assert_same(model, before)
    assert result["accuracy"] > 0.6  # guessing: 0.1
    assert result["loss"] < np.log(10)
    assert losses(tmp_path / "run")[1] == pytest.approx(np.log(10), rel=1e-5)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert trained(jnp.zeros((2, 8, 8, 3))).shape == (2, 10)


@pytest.mark.slow
def test_the_evaluation_counts_every_example_once(fit, dataset):
    """A batch that does not divide the split, against one pass over the split."""
    recipe = dataclasses.replace(RECIPE, batch_size=24, steps=2)
    trained, result = fit(recipe)
    batch = dataset.val.__getitems__(np.arange(len(dataset.val)))
    assert len(dataset.val) % 24
    logits = trained(augment.normalise(jnp.asarray(batch["image"])))
    hits = np.argmax(logits, -1) == batch["label"]
    assert result["accuracy"] == pytest.approx(hits.mean())
    log_p = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), batch["label"][:, None], -1
    )
    assert result["loss"] == pytest.approx(-log_p.mean(), rel=1e-5)


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(fit, dataset, tmp_path):
    trained, result = fit()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again, same = fit(dataset=interrupted_after(dataset, 0))
    assert same == result
    assert_same(again, trained)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_resuming_equals_an_uninterrupted_run_bit_for_bit(fit, dataset, tmp_path):
    trained, result = fit(folder="whole", keep_best=True)
    for batches in (1, 3, 2):  # stops before, after and on a checkpoint
        with pytest.raises(InterruptedRunError):
            fit(keep_best=True, dataset=interrupted_after(dataset, batches))
    resumed, same = fit(keep_best=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same(resumed, trained)
    timings = {"seconds", "step_ms"}
    assert {k: v for k, v in same.items() if k not in timings} == {
        k: v for k, v in result.items() if k not in timings
    }


def test_a_run_killed_before_its_result_is_completed(fit, tmp_path):
    trained, result = fit()
    (tmp_path / "run" / "result.json").unlink()
    again, same = fit()
    assert_same(again, trained)
    for key in ("loss", "accuracy", "best", "recipe"):
        assert same[key] == result[key]


def test_sigterm_saves_and_the_run_goes_on(fit, dataset, tmp_path):
    trained, _ = fit(folder="whole")

    handler = signal.getsignal(signal.SIGTERM)
    recipe = dataclasses.replace(RECIPE, checkpoint_every=0)
    with pytest.raises(train.Preempted, match=r"stopped at step \d, state saved"):
        fit(
            recipe,
            dataset=dataclasses.replace(dataset, train=terminating(dataset.train)),
        )
    assert signal.getsignal(signal.SIGTERM) is handler
    assert 1 <= max(losses(tmp_path / "run")) < RECIPE.steps
    resumed, _ = fit(recipe)
    assert_same(resumed, trained)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_run_in_a_worker_thread_needs_no_signal_handler(fit):
    results = []
    thread = threading.Thread(target=lambda: results.append(fit()))
    thread.start()
    thread.join()
    assert results[0][1]["best"]["step"] > 0


def test_no_thread_is_left_behind(fit, dataset):
    fit(folder="warm-up")
    before = set(threading.enumerate())
    with pytest.raises(InterruptedRunError):
        fit(dataset=interrupted_after(dataset, 3))
    left = [t for t in set(threading.enumerate()) - before if "work" in t.name]
    assert left == []


def test_a_non_finite_loss_stops_the_run(fit, tmp_path):
    # Step 1 only warms up; step 2 throws the parameters out of float32's range.
    recipe = dataclasses.replace(RECIPE, learning_rate=1e38, checkpoint_every=1)
    message = r"Got .*inf.* between steps 2 and 2 of train. Step 1 is saved in .*1e\+38"
    with pytest.raises(train.NonFiniteError, match=message):
        fit(recipe)
    assert list(losses(tmp_path / "run")) == [1]
    assert not (tmp_path / "run" / "result.json").exists()
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["1"]


def test_a_non_finite_loss_between_two_logged_steps(fit, tmp_path):
    recipe = dataclasses.replace(
        RECIPE, learning_rate=1e38, log_every=4, eval_every=0, checkpoint_every=0
    )
    message = "between steps 1 and 4 of train. No step is saved"
    with pytest.raises(train.NonFiniteError, match=message):
        fit(recipe)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("rules", [REPLICATE, ((".*", ("fsdp", "data")),)])
def test_eight_devices_follow_one(fit, tmp_path, rules):
    recipe = dataclasses.replace(RECIPE, steps=8, checkpoint_every=0)
    one = make_mesh((("data", -1),), jax.devices()[:1])
    fit(recipe, folder="one", mesh=one)
    eight = make_mesh((("data", -1),))
    trained, _ = fit(recipe, folder="eight", mesh=eight, rules=rules)
    kernel = trained.head.kernel[...]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.is_fully_replicated == (rules == REPLICATE)
    a, b = losses(tmp_path / "one"), losses(tmp_path / "eight")
    assert list(a) == list(b) == list(range(1, 9))
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)
    assert a[8] != a[1]


@pytest.mark.slow
def test_a_sharded_run_resumes_on_one_device(fit, dataset, tmp_path):
    fsdp = ((".*", ("fsdp", "data")),)
    fit(folder="whole", rules=fsdp)
    with pytest.raises(InterruptedRunError):
        fit(rules=fsdp, dataset=interrupted_after(dataset, 4))
    one = make_mesh((("data", -1),), jax.devices()[:1])
    fit(mesh=one)
    a, b = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert list(a) == list(b)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)


@pytest.mark.slow
def test_keep_best_returns_the_best_parameters(fit, dataset, tmp_path):
    # A learning rate that first learns, then destroys: the best is not the last.
    recipe = dataclasses.replace(
        RECIPE, steps=12, eval_every=1, learning_rate=0.3, checkpoint_every=0
    )
    best_model, result = fit(recipe, folder="best", keep_best=True)
    last_model, last = fit(recipe, folder="last")
    assert result["best"] == last["best"]
    assert result["best"]["step"] < 12
    batch = dataset.val.__getitems__(np.arange(len(dataset.val)))

    def accuracy(model):
        logits = model(augment.normalise(jnp.asarray(batch["image"])))
        return np.mean(np.argmax(logits, -1) == batch["label"])

    assert accuracy(best_model) == pytest.approx(result["best"]["score"])
    assert accuracy(last_model) == pytest.approx(last["accuracy"])
    assert accuracy(best_model) > accuracy(last_model)
    again, _ = fit(recipe, folder="best", keep_best=True)
    assert_same(again, best_model)


def test_another_recipe_in_the_same_folder_is_refused(fit):
    fit()
    changed = dataclasses.replace(RECIPE, learning_rate=0.5, log_every=2)
    with pytest.raises(ValueError, match=r"same recipe.*{'learning_rate': \(0.01, 0.5"):
        fit(changed)
    fit(dataclasses.replace(RECIPE, log_every=2))


def test_a_damaged_checkpoint_stops_the_run(fit, tmp_path):
    fit()
    record = tmp_path / "run" / "checkpoints" / "6" / "record" / "metadata"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"digest": "0" * 64}))
    with pytest.raises(ValueError, match="must match the digest"):
        fit()


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [(15, "divisible by the mesh axis 'data'. Got 15 and 2"), (512, "Got 512")],
)
def test_a_batch_that_does_not_fit(fit, tmp_path, batch_size, message):
    with pytest.raises(ValueError, match=message):
        fit(dataclasses.replace(RECIPE, batch_size=batch_size))
    assert not (tmp_path / "run").exists()


def test_checkpoints_are_bounded(fit, tmp_path):
    fit(dataclasses.replace(RECIPE, checkpoint_every=1), keep=3)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.latest_step() == 6
    checkpoints.close()
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["4", "5", "6"]


def test_a_stop_that_comes_with_the_last_step_stops_the_runs_behind(
    fit, dataset, tmp_path
):
    # Scored after the last step only.
    recipe = dataclasses.replace(RECIPE, steps=2, eval_every=0)
    stopped = dataclasses.replace(dataset, val=terminating(dataset.val))
    with pytest.raises(train.Preempted, match="run has finished, result saved"):
        fit(recipe, dataset=stopped, name="run")
    assert (tmp_path / "run" / "result.json").is_file()
    _, result = fit(recipe)
    assert result["recipe"]["steps"] == 2


def test_the_result_of_keep_best_is_that_of_the_model(fit):
    recipe = dataclasses.replace(
        RECIPE, steps=12, eval_every=1, learning_rate=0.3, checkpoint_every=0
    )
    result = fit(recipe, keep_best=True)[1]
    assert result["score"] == result["best"]["score"]
    assert result["best"]["step"] < 12
    # When it is scored decides what it is.
    with pytest.raises(ValueError, match=r"same recipe.*'eval_every': \(1, 3\)"):
        fit(dataclasses.replace(recipe, eval_every=3), keep_best=True)


def test_another_base_model_is_refused(fit, tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=2)
    fit(recipe, base_fingerprint="a" * 64)
    for _ in range(2):  # a finished run, and one that was stopped before its result
        with pytest.raises(ValueError, match="same base model, .* bbb.*Got aa"):
            fit(recipe, base_fingerprint="b" * 64)
        (tmp_path / "run" / "result.json").unlink(missing_ok=True)


def test_memory_and_speed_are_known_after_a_restart(fit, tmp_path):
    _, whole = fit()
    (tmp_path / "run" / "result.json").unlink()
    _, result = fit()
    assert result["memory_bytes"] == whole["memory_bytes"] > 0
    assert result["step_ms"] == whole["step_ms"]
