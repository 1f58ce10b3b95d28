import threading

import numpy as np
import pytest

from experiments.loading import TrainLoader, eval_batches, prefetch
from experiments.splits import ArraySplit


def make_split(n):
    """Examples whose label is their row."""
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 2, 2, 3), np.uint8
    )
    return ArraySplit(images, np.arange(n, dtype=np.int32))


def labels(loader, steps):
    return np.concatenate([loader.batch(step)["label"] for step in steps])


def test_every_epoch_is_another_permutation():
    # 4 does not divide 10: epochs end inside batches.
    seen = labels(TrainLoader(make_split(10), 4, seed=0), range(5))
    epochs = seen.reshape(2, 10)
    np.testing.assert_array_equal(np.sort(epochs), [np.arange(10)] * 2)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.arange(10))


def test_batches_hold_the_images_of_their_labels():
    batch = TrainLoader(make_split(10), 4, seed=0).batch(3)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


def test_a_batch_depends_on_the_step_and_the_seed_alone():
    loader = TrainLoader(make_split(10), 4, seed=0)
    forwards = [loader.batch(step)["label"] for step in range(6)]
    again = TrainLoader(make_split(10), 4, seed=0)
    backwards = [again.batch(step)["label"] for step in reversed(range(6))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    other = TrainLoader(make_split(10), 4, seed=1)
    assert not np.array_equal(forwards, [other.batch(s)["label"] for s in range(6)])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_make_up_the_same_global_batch(count):
    split = make_split(10)
    expected = TrainLoader(split, 8, seed=3)
    shards = [TrainLoader(split, 8, 3, index, count) for index in range(count)]
    for step in range(4):
        parts = [shard.batch(step) for shard in shards]
        assert {len(part["label"]) for part in parts} == {8 // count}
        for key, value in expected.batch(step).items():
            got = np.concatenate([part[key] for part in parts])
            np.testing.assert_array_equal(got, value)


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_a_batch_must_fit_the_examples(batch_size):
    message = rf"batch_size must be in \[1, 10\].*Got {batch_size}\."
    with pytest.raises(ValueError, match=message):
        TrainLoader(make_split(10), batch_size, seed=0)


def test_a_batch_must_divide_over_the_processes():
    with pytest.raises(ValueError, match=r"divisible .* processes. Got 9 and 2"):
        TrainLoader(make_split(10), 9, 0, process_index=0, process_count=2)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("n", [1, 4, 8, 9])
def test_evaluation_sees_every_example_once(n, count):
    seen = []
    for index in range(count):
        batches = list(eval_batches(make_split(n), 4, index, count))
        assert len(batches) == -(-n // 4)  # the same on every process
        for batch in batches:
            assert batch["image"].shape[0] == len(batch["weight"]) == 4 // count
            seen.extend(batch["label"][batch["weight"] == 1.0])
    assert sorted(seen) == list(range(n))


def test_prefetch_keeps_the_order():
    assert list(prefetch(lambda step: step**2, 3, 8)) == [9, 16, 25, 36, 49]
    assert list(prefetch(lambda step: step, 3, 3)) == []


def test_prefetch_works_ahead_and_no_further_than_asked():
    started = threading.Semaphore(0)
    calls = []

    def load_step(step):
        calls.append(step)
        started.release()
        return step

    items = prefetch(load_step, 0, 100, size=2)
    assert next(items) == 0
    for _ in range(4):  # one taken, two in the queue, one waiting for a place
        assert started.acquire(timeout=10)
    assert not started.acquire(timeout=0.3)
    assert calls == [0, 1, 2, 3]
    items.close()


def test_prefetch_hands_over_exceptions():
    def load_step(step):
        if step == 2:
            raise OSError("disk gone")
        return step

    items = prefetch(load_step, 0, 5)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_closing_prefetch_ends_its_thread():
    before = threading.active_count()
    items = prefetch(lambda step: step, 0, 1000)
    assert next(items) == 0
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before
