import contextlib
import gc
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.checkpoints import Checkpoints, digest
from experiments.sharding import make_mesh


@pytest.fixture(autouse=True, scope="module")
def quiet_orbax():
    """A failed read leaves coroutines that complain later, out of any test's reach."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None
    yield
    gc.collect()
    sys.unraisablehook = hook


def make_state(seed=0):
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(seed))
    return {
        "params": nnx.state(model),
        "half": jnp.arange(6, dtype=jnp.bfloat16) + seed,
        "step": jnp.asarray(seed, jnp.int32),
    }


def shapes(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


@contextlib.contextmanager
def opened(directory, **options):
    with contextlib.closing(Checkpoints(directory, **options)) as checkpoints:
        yield checkpoints


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 1 and 2."""
    with opened(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"best": {"accuracy": step / 10}})
    return tmp_path


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_round_trip_is_bit_exact(saved):
    with opened(saved) as checkpoints:
        assert checkpoints.latest_step() == 2
        state, record = checkpoints.restore(shapes(make_state()))
    assert_same(state, make_state(2))
    assert record["best"] == {"accuracy": 0.2}


def test_an_empty_folder_has_no_step(tmp_path):
    with opened(tmp_path / "new") as checkpoints:
        assert checkpoints.latest_step() is None


def test_keep_bounds_what_stays_on_disk(tmp_path):
    with opened(tmp_path, keep=2) as checkpoints:
        for step in range(5):
            checkpoints.save(step, make_state(step), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


def test_restore_onto_another_mesh(tmp_path):
    one = NamedSharding(make_mesh((("data", -1),), jax.devices()[:1]), P())
    eight = NamedSharding(make_mesh((("data", -1),)), P("data"))
    values = jnp.arange(32.0).reshape(16, 2)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": jax.device_put(values, one)}, {})
    with opened(tmp_path) as checkpoints:
        target = {"x": jax.ShapeDtypeStruct((16, 2), jnp.float32, sharding=eight)}
        state, _ = checkpoints.restore(target)
    assert_same(state, {"x": jax.device_put(values, eight)})


def test_a_save_is_not_disturbed_by_donation(tmp_path):
    """The next step may overwrite the buffers while the files are being written."""
    overwrite = jax.jit(lambda x: -x, donate_argnums=0)
    with opened(tmp_path) as checkpoints:
        for step in range(3):
            x = jnp.full((1000, 1000), float(step))
            checkpoints.save(step, {"x": x}, {})
            for _ in range(5):
                x = overwrite(x)
    with opened(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(shapes({"x": jnp.zeros((1000, 1000))}))
    np.testing.assert_array_equal(state["x"], np.full((1000, 1000), 2.0))


def largest_file(folder):
    return max(
        (p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def truncate(folder):
    path = largest_file(folder / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
    path = largest_file(folder / "state" / "d")
    data = bytearray(path.read_bytes())
    for i in range(0, len(data), 3):
        data[i] ^= 0xFF
    path.write_bytes(data)


def drop_state(folder):
    shutil.rmtree(folder / "state")


def drop_record(folder):
    shutil.rmtree(folder / "record")


def cut_record(folder):
    path = folder / "record" / "metadata"
    path.write_text(path.read_text()[:-5])


@pytest.mark.parametrize(
    "damage", [truncate, flip, drop_state, drop_record, cut_record]
)
def test_a_damaged_checkpoint_is_named_and_left_alone(saved, damage):
    damage(saved / "2")
    before = files(saved)
    with (
        opened(saved) as checkpoints,
        pytest.raises(ValueError, match=rf"checkpoint {saved}/2 must be readable"),
    ):
        checkpoints.restore(shapes(make_state()))
    assert files(saved) == before


def test_removing_the_damaged_checkpoint_goes_on_from_the_one_before(saved):
    truncate(saved / "2")
    shutil.rmtree(saved / "2")
    with opened(saved) as checkpoints:
        state, _ = checkpoints.restore(shapes(make_state()))
    assert_same(state, make_state(1))


def edit_record(folder, **changes):
    path = folder / "record" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_digest_that_does_not_match(saved):
    edit_record(saved / "2", digest="0" * 64)
    before = files(saved)
    with (
        opened(saved) as checkpoints,
        pytest.raises(
            ValueError, match=rf"checkpoint {saved}/2 must match the digest 0+"
        ),
    ):
        checkpoints.restore(shapes(make_state()))
    assert files(saved) == before


def test_a_checkpoint_of_several_processes_has_no_digest_to_compare(saved):
    edit_record(saved / "2", digest=None)
    with opened(saved) as checkpoints:
        state, _ = checkpoints.restore(shapes(make_state()))
    assert_same(state, make_state(2))


def test_a_state_of_another_shape(saved):
    target = shapes(make_state())
    target["half"] = jax.ShapeDtypeStruct(
        (7,), jnp.bfloat16, sharding=target["half"].sharding
    )
    with opened(saved) as checkpoints, pytest.raises(ValueError, match="fit this run"):
        checkpoints.restore(target)


def test_a_state_with_another_name(saved):
    target = shapes(make_state())
    target["other"] = target.pop("half")
    with opened(saved) as checkpoints, pytest.raises(ValueError, match="fit this run"):
        checkpoints.restore(target)


def test_half_a_checkpoint_is_not_seen(saved):
    """Orbax renames a folder when it is whole; a kill leaves the temporary name."""
    shutil.copytree(saved / "2", saved / "3.orbax-checkpoint-tmp-0")
    with opened(saved) as checkpoints:
        assert checkpoints.latest_step() == 2


@pytest.mark.parametrize(
    "other",
    [
        {"a": jnp.zeros(2), "b": jnp.ones(3)},
        {"a": jnp.zeros(2), "c": jnp.zeros(3)},
        {"a": jnp.zeros((2, 1)), "b": jnp.zeros(3)},
        {"a": jnp.zeros(2, jnp.int32), "b": jnp.zeros(3)},
    ],
)
def test_digest_depends_on_names_shapes_dtypes_and_values(other):
    tree = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    assert digest(tree) == digest({"b": jnp.zeros(3), "a": jnp.zeros(2)})
    assert digest(tree) != digest(other)
