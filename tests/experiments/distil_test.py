"""The loss that follows a teacher, and what the teacher said on disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from experiments import distil, sentences
from snnk_jax.models.bert import Bert, BertConfig
from snnk_jax.models.vit import ViT, ViTConfig


def make_bert(seed=0, depth=1):
    config = BertConfig(
        hidden_size=16,
        depth=depth,
        num_heads=2,
        mlp_dim=16,
        vocab_size=64,
        max_length=12,
        pool="mean",
    )
    return Bert(config, rngs=nnx.Rngs(seed))


def take(split, rows):
    return jax.tree.map(jnp.asarray, split.__getitems__(np.asarray(rows)))


@pytest.fixture(scope="module")
def texts():
    return sentences.synthetic(12, 37).train


def test_the_loss_is_its_formula(texts):
    model, n = make_bert(), 5
    batch = take(texts, range(n))
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(n, 16))
    teacher /= np.linalg.norm(teacher, axis=1, keepdims=True)
    hidden = rng.normal(size=(*batch["tokens"].shape, 16))
    batch["label"] = jnp.asarray(teacher, jnp.float32)
    batch["hidden"] = jnp.asarray(hidden, jnp.float16)
    objective = distil.Distil(embedding=0.5, similarity=3.0, hidden=2.0)
    losses, outputs = objective.losses(model, batch)

    inputs = (batch["tokens"], batch["token_types"], batch["mask"])
    ours = np.asarray(model.features(*inputs), np.float64)
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    states = np.asarray(model.hidden_states(*inputs), np.float64)
    np.testing.assert_allclose(outputs, ours, atol=1e-5)
    for i in range(n):
        kept = batch["mask"][i]
        others = [(ours[i] @ ours[j] - teacher[i] @ teacher[j]) ** 2 for j in range(n)]
        expected = (
            0.5 * (1 - ours[i] @ teacher[i])
            + 3.0 * np.mean([other for j, other in enumerate(others) if j != i])
            + 2.0 * np.mean((states[i, kept] - hidden[i, kept]) ** 2)
        )
        np.testing.assert_allclose(losses[i], expected, rtol=2e-3)


@pytest.mark.slow
def test_examples_without_weight_are_no_neighbours(texts):
    model, objective = make_bert(), distil.Distil(similarity=1.0)
    rng = np.random.default_rng(1)
    teacher = rng.normal(size=(4, 16)).astype(np.float32)
    rows = np.array([0, 1, 2, 2])
    batch = take(texts, rows) | {"label": jnp.asarray(teacher[rows])}
    filled = batch | {"weight": jnp.array([1.0, 1.0, 1.0, 0.0])}
    alone = {name: value[:3] for name, value in batch.items()}
    got, expected = (objective.losses(model, b)[0] for b in (filled, alone))
    np.testing.assert_allclose(got[:3], expected, rtol=1e-5)


def test_the_loss_of_the_teacher_itself_is_zero(texts):
    model = make_bert()
    batch = take(texts, range(8))
    batch |= {
        "label": distil.embed(model, batch),
        "hidden": model.hidden_states(
            batch["tokens"], batch["token_types"], batch["mask"]
        ),
    }
    objective = distil.Distil(similarity=10.0, hidden=1.0)
    losses, _ = objective.losses(model, batch)
    np.testing.assert_allclose(losses, np.zeros(8), atol=1e-5)


def test_scores_are_cosines_and_ranks_of_pairs():
    rng = np.random.default_rng(2)
    ours, theirs = (
        np.asarray(distil.unit(jnp.asarray(rng.normal(size=(9, 5))))) for _ in range(2)
    )
    found = distil.Distil().scores(ours, theirs)
    assert found["cosine"] == pytest.approx(np.mean(np.sum(ours * theirs, 1)), abs=1e-6)
    pairs = [[x[2 * i] @ x[2 * i + 1] for i in range(4)] for x in (ours, theirs)]
    assert found["agreement"] == pytest.approx(stats.spearmanr(*pairs).statistic)
    assert distil.Distil().scores(ours, ours)["agreement"] == pytest.approx(1)
    assert distil.rank_correlation(np.ones(3), np.arange(3.0)) == 0.0


@pytest.mark.parametrize(
    "weights", [(0.0, 0.0, 0.0), (-1.0, 0.0, 0.0), (1.0, float("nan"), 0.0)]
)
def test_weights_that_no_loss_has(weights):
    with pytest.raises(ValueError, match="weights must be finite"):
        distil.Distil(*weights)


def test_a_teacher_is_asked_once(texts, tmp_path):
    model = make_bert()
    taught = distil.teach(
        *(texts, texts.lengths, model, tmp_path), batch_size=8, hidden=True
    )
    rows = np.array([5, 0, 36])
    batch = taught.__getitems__(rows)
    plain = take(texts, rows)
    assert batch["label"].dtype == np.float32
    np.testing.assert_allclose(
        batch["label"], np.asarray(distil.embed(model, plain)), atol=2e-3
    )
    inputs = (plain["tokens"], plain["token_types"], plain["mask"])
    states = np.where(plain["mask"][..., None], model.hidden_states(*inputs), 0)
    np.testing.assert_allclose(batch["hidden"], states, atol=4e-3)

    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = distil.teach(
        *(texts, texts.lengths, model, tmp_path), batch_size=8, hidden=True
    )
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    np.testing.assert_array_equal(again.embedding, taught.embedding)


def test_a_cache_that_was_cut_short_is_filled_up(texts, tmp_path, monkeypatch):
    model = make_bert()
    monkeypatch.setattr(distil, "_MARK", 1)
    arguments = (texts, texts.lengths, model)
    whole = distil.teach(*arguments, tmp_path / "whole", batch_size=8)

    class KilledError(Exception):
        pass

    write, calls = distil.write_json, []

    def kill(path, value):
        write(path, value)
        calls.append(value["done"])
        if len(calls) == 2:
            raise KilledError

    monkeypatch.setattr(distil, "write_json", kill)
    with pytest.raises(KilledError):
        distil.teach(*arguments, tmp_path / "cut", batch_size=8)
    assert calls == [8, 16]
    got = distil.teach(*arguments, tmp_path / "cut", batch_size=8)
    assert calls == [8, 16, 24, 32, 37]
    np.testing.assert_array_equal(got.embedding, whole.embedding)


def test_a_cache_of_another_teacher_is_refused(texts, tmp_path):
    distil.teach(texts, texts.lengths, make_bert(), tmp_path, batch_size=37)
    with pytest.raises(ValueError, match="remove it or choose another"):
        distil.teach(texts, texts.lengths, make_bert(1), tmp_path, batch_size=37)
    assert json.loads((tmp_path / "record.json").read_text())["done"] == 37


@pytest.mark.slow
def test_images_have_a_teacher_too(tmp_path):
    from experiments import data

    split = data.load("synthetic", image_size=8).val
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=8,
        depth=1,
        num_heads=2,
        mlp_dim=8,
        num_classes=3,
    )
    model = ViT(config, rngs=nnx.Rngs(0))
    lengths = np.full(len(split), config.num_tokens)
    taught = distil.teach(split, lengths, model, tmp_path, batch_size=32, hidden=True)
    batch = take(taught, range(6))
    losses, outputs = distil.Distil(hidden=1.0).losses(model, batch)
    assert outputs.shape == (6, 8)
    assert batch["hidden"].shape == (6, 5, 8)
    np.testing.assert_allclose(losses, np.zeros(6), atol=1e-5)
    images = batch["image"].astype(jnp.float32) / 127.5 - 1
    states = model.hidden_states(images)
    np.testing.assert_allclose(states[:, 0], model.features(images), rtol=1e-5)
