import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.sharding import (
    batch_sharding,
    make_mesh,
    mesh_shape,
    path_name,
    place,
    replicated,
    shardings,
)


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ((("data", -1),), (8,)),
        ((("data", 8),), (8,)),
        ((("data", -1), ("model", 2)), (4, 2)),
        ((("data", 2), ("model", 4)), (2, 4)),
        ((("data", 8), ("model", -1)), (8, 1)),
    ],
)
def test_mesh_shape(axes, sizes):
    assert mesh_shape(axes, 8) == (sizes, tuple(name for name, _ in axes))
    mesh = make_mesh(axes)
    assert dict(mesh.shape) == {
        name: size for (name, _), size in zip(axes, sizes, strict=True)
    }


@pytest.mark.parametrize(
    "axes",
    [
        (("data", 4),),
        (("data", -1), ("model", 3)),
        (("data", -1), ("model", 16)),
        (("data", -1), ("model", -1)),
    ],
)
def test_mesh_must_use_all_devices(axes):
    with pytest.raises(ValueError, match=r"mesh\.axes must multiply to the 8 devices"):
        mesh_shape(axes, 8)


@pytest.mark.parametrize(
    "axes", [(("data", -2), ("model", -4)), (("data", 0), ("model", -1))]
)
def test_mesh_sizes_must_be_positive(axes):
    with pytest.raises(ValueError, match=r"mesh\.axes must be positive or -1"):
        mesh_shape(axes, 8)


def test_mesh_of_some_devices():
    mesh = make_mesh((("data", -1),), jax.devices()[:2])
    assert mesh.devices.tolist() == jax.devices()[:2]


def test_path_names_of_modules_and_containers():
    model = nnx.Dict(layers=nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))]))
    tree = {"params": nnx.state(model), "more": [jnp.zeros(1), (jnp.zeros(1),)]}
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    assert {"more/0", "more/1/0"} < names
    kernels = {name for name in names if name.startswith("params/layers/0/kernel")}
    assert len(kernels) == 1


@pytest.fixture
def mesh():
    return make_mesh((("data", 4), ("model", 2)))


TREE = {
    "kernel": jnp.zeros((6, 8)),
    "bias": jnp.zeros((3,)),
    "step": jnp.zeros(()),
}


def specs(rules, mesh, tree=TREE):
    return {name: s.spec for name, s in shardings(tree, rules, mesh).items()}


@pytest.mark.parametrize(
    ("tactic", "spec"),
    [
        ("replicate", P()),
        (("fsdp", "data"), P(None, "data")),  # 4 divides 8 alone
        (("fsdp", "model"), P(None, "model")),  # 2 divides both, 8 is larger
        (["fsdp", "data"], P(None, "data")),
        (("shard", "model", 0), P("model", None)),
        (("shard", "data", 1), P(None, "data")),
        (("shard", "data", -1), P(None, "data")),
    ],
)
def test_tactics(mesh, tactic, spec):
    rules = (("kernel", tactic), (".*", "replicate"))
    assert specs(rules, mesh) == {"kernel": spec, "bias": P(), "step": P()}


def test_fsdp_replicates_what_cannot_be_cut(mesh):
    got = specs(((".*", ("fsdp", "data")),), mesh)
    assert got == {"kernel": P(None, "data"), "bias": P(), "step": P()}


def test_the_first_rule_that_matches_the_whole_path_wins(mesh):
    rules = (
        ("kern", ("fsdp", "data")),
        ("kernel", ("shard", "model", 0)),
        (".*", "replicate"),
        ("kernel", ("fsdp", "data")),
    )
    assert specs(rules, mesh)["kernel"] == P("model", None)


def test_every_array_needs_a_rule(mesh):
    with pytest.raises(ValueError, match=r"must cover every array.*Got 'bias'"):
        shardings(TREE, (("kernel|step", "replicate"),), mesh)


@pytest.mark.parametrize(
    "tactic",
    [
        "fsdp",
        "copy",
        ("fsdp",),
        ("fsdp", "rows"),
        ("fsdp", "data", 0),
        ("shard", "data"),
        ("shard", "data", 2),
        ("shard", "data", -3),
        ("shard", "rows", 0),
        (),
    ],
)
def test_unknown_tactics(mesh, tactic):
    with pytest.raises(ValueError, match=r"a tactic must be .* for kernel of shape"):
        shardings(TREE, (("kernel", tactic), (".*", "replicate")), mesh)


def test_shard_needs_a_divisible_dimension(mesh):
    rules = (("kernel", ("shard", "data", 0)), (".*", "replicate"))
    with pytest.raises(ValueError, match=r"divisible by 4 along dimension 0"):
        shardings(TREE, rules, mesh)


def test_place_puts_the_batch_on_the_data_axis(mesh):
    batch = {"image": np.arange(16).reshape(8, 2), "label": np.arange(8)}
    placed = place(batch, batch_sharding(mesh))
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert {s.data.shape[0] for s in array.addressable_shards} == {2}
    copied = place(batch, replicated(mesh))
    assert {s.data.shape for s in copied["label"].addressable_shards} == {(8,)}
