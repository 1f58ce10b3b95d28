"""Up-training end to end, on made-up text and images."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import snnk_jax as snnk
from experiments import distil, learning, load_config, starts, uptrain
from experiments.metrics import read_jsonl

BERT, VIT = "configs/bert_uptrain.py:quicktest", "configs/vit_uptrain.py:quicktest"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one method, and its folder."""
    workdir = tmp_path_factory.mktemp("uptrain")
    config = load_config(BERT, {"methods": ("units-4",)})
    return uptrain.run(config, workdir), workdir


@pytest.mark.slow
def test_a_run_writes_its_rows_models_and_report(finished):
    rows, workdir = finished
    assert [row["kind"] for row in rows] == ["units"]
    dense = 2 * (2 * 16 * 32 + 32 + 16)
    assert rows[0]["share"] * dense == pytest.approx(2 * (2 * 16 * 4 + 4 + 16))
    for row in rows:
        assert set(row["before"]) == set(row["after"]) == {"cosine", "agreement"}
        assert row["steps"] == 2
        folder = workdir / row["name"]
        losses = [x["train/loss"] for x in read_jsonl(folder / "metrics.jsonl")[:2]]
        assert np.isfinite(losses).all()
        assert (folder / "model.safetensors").stat().st_size == row["bytes"]
    report = (workdir / "report.md").read_text()
    assert "own units, readout fitted" in report
    assert "agreement after" in report
    assert (workdir / "curves.png").is_file()
    assert (workdir / "score.png").is_file()


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(finished):
    rows, workdir = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*.safetensors")}
    config = load_config(BERT, {"methods": ("units-4",)})
    assert uptrain.run(config, workdir) == rows
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_a_run_killed_on_the_way_ends_like_a_whole_one(finished, tmp_path):
    """As after a kill behind the first step: one checkpoint, no row, no result."""
    rows, whole = finished
    workdir, name = tmp_path / "run", rows[0]["name"]
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / name / "checkpoints" / "2")
    for file in ("result.json", "model.safetensors"):
        (workdir / name / file).unlink()
    (workdir / "rows.jsonl").write_text("")
    (row,) = uptrain.run(load_config(BERT, {"methods": ("units-4",)}), workdir)
    for key in ("before", "after", "share", "counts", "bytes"):
        assert row[key] == rows[0][key]
    arrays, again = (
        load_file(w / name / "model.safetensors") for w in (whole, workdir)
    )
    assert arrays.keys() == again.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(again[path], array, err_msg=path)


@pytest.mark.slow
def test_every_start_trains(tmp_path):
    rows = uptrain.run(load_config(BERT), tmp_path)
    assert [row["kind"] for row in rows] == list(starts.KINDS)
    assert rows[-1]["share"] == 1
    dense = 2 * (2 * 16 * 32 + 32 + 16)
    shares = {row["kind"]: row["share"] for row in rows}
    assert shares["psi"] * dense == pytest.approx(2 * (4 * 16 + 16))  # Ω is a seed


@pytest.mark.slow
def test_images_with_labels(tmp_path):
    (row,) = uptrain.run(load_config(VIT, {"methods": ("units-4",)}), tmp_path)
    assert set(row["after"]) == {"accuracy"}
    assert row["counts"]["head"] == 17 * 10
    assert row["before"] == {}


@pytest.mark.slow
def test_images_without_labels(tmp_path):
    changes = {"methods": ("psi-4",), "uptrain.objective": "hidden"}
    (row,) = uptrain.run(load_config(VIT, changes), tmp_path)
    assert set(row["after"]) == {"agreement", "cosine"}
    assert row["counts"]["head"] == 0


@pytest.mark.slow
def test_text_follows_the_dense_model(tmp_path):
    """What training is for: closer to the dense model than the start was."""
    changes = {
        "methods": ("psi_random-4",),
        "optim.steps": 150,
        "uptrain.learning_rate": 3e-3,
        "uptrain.trained": "new",
    }
    config = load_config(BERT, changes)
    (row,) = uptrain.run(config, tmp_path)
    losses = [
        x["train/loss"]
        for x in read_jsonl(tmp_path / row["name"] / "metrics.jsonl")
        if "train/loss" in x
    ]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert row["after"]["cosine"] > row["before"]["cosine"]


@pytest.mark.parametrize(
    ("method", "top", "expected"),
    [
        ("units-96", 3, ("units", 96, 3, "units-96-top3")),
        ("psi_random-8", 1, ("psi_random", 8, 1, "psi_random-8-top1")),
        ("dense", 6, ("dense", 0, 6, "dense")),
    ],
)
def test_methods_by_name(method, top, expected):
    variant = starts.Variant.parse(method, top)
    assert (*dataclasses.astuple(variant), variant.name) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("units",)}, "methods must be dense or KIND-SIZE.*Got 'units'"),
        ({"methods": ("units-0",)}, "methods must be dense or KIND-SIZE"),
        ({"methods": ("dense-4",)}, "methods must be dense or KIND-SIZE"),
        ({"methods": ("svd-4",)}, "methods must be dense or KIND-SIZE"),
        ({"uptrain.trained": "none"}, "uptrain.trained must be one of all, blocks"),
        ({"uptrain.objective": "x"}, "uptrain.objective must be one of task"),
        ({"uptrain.new_rate": 0.0}, "uptrain.new_rate must be positive"),
        ({"uptrain.similarity": -1.0}, "uptrain.similarity must not be negative"),
        ({"uptrain.top": (-1,)}, "uptrain.top must hold numbers of blocks"),
        ({"uptrain.score": "sst2"}, "uptrain.score must be stsb or empty"),
        ({"optim.steps": 0}, "optim.steps must be positive"),
    ],
)
def test_bad_settings_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        uptrain.run(load_config(BERT, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_have_no_pairs():
    changes = {"uptrain.objective": "embedding", "uptrain.score": "stsb"}
    with pytest.raises(ValueError, match="score must be empty for images"):
        load_config(VIT, changes)


@pytest.mark.parametrize("trained", uptrain.TRAINED)
def test_what_is_trained(trained):
    config = load_config(BERT, {"uptrain.trained": trained})
    base = make_base(config)
    model = starts.build(
        *(base, starts.Variant("psi", 4, 1), 0, []), norm="norm2", probes=1
    )
    chosen = uptrain.Trainable(trained, r"blocks/(1)/mlp/.*", head=False)
    found = {
        "/".join(map(str, path))
        for path, _ in nnx.to_flat_state(nnx.state(model, chosen))
    }
    new = {"blocks/1/mlp/readout", "blocks/1/mlp/bias"}
    assert new <= found
    assert not any("projection" in name or "head" in name for name in found)
    assert ("blocks/0/attention/query/kernel" in found) == (
        trained in ("all", "blocks")
    )
    assert ("blocks/0/attention/query/bias" in found) == (trained != "new")
    assert ("blocks/0/norm1/scale" in found) == (trained != "new")
    assert ("embeddings/word/embedding" in found) == (trained == "all")
    assert trained != "new" or found == new


def make_base(config):
    from experiments import tasks

    return tasks.build_model(config, 1, nnx.Rngs(params=0))


def test_starts_leave_the_first_blocks_alone():
    base = make_base(load_config(BERT))
    for kind in ("units_random", "psi", "psi_random"):
        model = starts.build(
            *(base, starts.Variant(kind, 4, 1), 0, []), norm="norm2", probes=1
        )
        first, last = (block.mlp for block in model.blocks)
        assert first.fc1.out_features == 32
        if kind == "units_random":
            assert (last.fc1.out_features, last.fc2.in_features) == (4, 4)
        else:
            assert isinstance(last, snnk.nn.SNNKMlp)
    psi = starts.build(*(base, starts.Variant("psi", 4, 1), 0, []), norm=None, probes=1)
    x = jax.random.normal(jax.random.key(0), (3, 16))
    mlp, block = base.blocks[1].mlp, psi.blocks[1].mlp
    fm, params = block.projection.features, block.projection.params
    weights = fm.psi(params, mlp.fc1.kernel[...], mlp.fc1.bias[...])
    expected = fm.phi(params, x) @ weights @ mlp.fc2.kernel[...]
    np.testing.assert_allclose(block(x), expected + mlp.fc2.bias[...][None], atol=1e-5)


def test_new_parameters_learn_at_their_own_rate():
    recipe = learning.Recipe(
        learning_rate=1.0,
        steps=10,
        batch_size=1,
        seed=0,
        rates=((r"b/.*", 3.0), (r".*", 1.0)),
    )
    model = nnx.Dict(a=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    model["b"] = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    ones = jax.tree.map(jax.numpy.ones_like, params)
    updates = []
    for rates in ((), recipe.rates):
        optimizer = learning.make_optimizer(dataclasses.replace(recipe, rates=rates))
        updates.append(optimizer.update(ones, optimizer.init(params), params)[0])
    for name, rate in (("a", 1.0), ("b", 3.0)):
        for leaf in ("kernel", "bias"):
            plain, scaled = (u[name][leaf][...] for u in updates)
            np.testing.assert_allclose(scaled, rate * plain, rtol=1e-6)


@pytest.mark.slow
def test_embeddings_come_in_order():
    from experiments import sentences

    split = sentences.synthetic(12).val
    base = make_base(load_config(BERT))
    got = uptrain.embeddings(base, split, 8)
    batch = split.__getitems__(np.arange(len(split)))
    expected = distil.embed(base, jax.tree.map(jax.numpy.asarray, batch))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_the_recipe_is_written_down(finished):
    rows, workdir = finished
    recipe = json.loads((workdir / rows[0]["name"] / "result.json").read_text())[
        "recipe"
    ]
    assert recipe["rates"] == [["blocks/(0|1)/mlp/.*", 4.0]]
