"""Kills real training processes and runs them again."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.metrics import read_jsonl

pytestmark = pytest.mark.slow

STEPS = 40
TIMEOUT = 300


def start(root, workdir):
    command = [
        sys.executable,
        "-m",
        "experiments.main",
        "--config=configs/vit_pretrain.py:quicktest",
        f"--config.optim.steps={STEPS}",
        "--config.log.checkpoint_every=3",
        "--config.log.eval_every=10",
        f"--workdir={workdir}",
    ]
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        return subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def run_folder(workdir):
    (folder,) = workdir.glob("scratch-*")
    return folder


def losses(workdir):
    return {
        row["step"]: row["train/loss"]
        for path in workdir.glob("scratch-*/metrics.jsonl")
        for row in read_jsonl(path)
        if "train/loss" in row
    }


def finish(root, workdir):
    code = start(root, workdir).wait(TIMEOUT)
    assert code == 0, (workdir.parent / f"{workdir.name}.log").read_text()[-3000:]


def interrupt(root, workdir, step, signum):
    """Sends a signal once the step has been reached; returns the exit code."""
    process = start(root, workdir)
    end = time.monotonic() + TIMEOUT
    try:
        while max(losses(workdir), default=0) < step and time.monotonic() < end:
            assert process.poll() is None, "the run ended before its signal"
            time.sleep(0.001)
        process.send_signal(signum)
        return process.wait(TIMEOUT)
    finally:
        process.kill()
        process.wait()


def last_state(workdir):
    """The arrays of the last checkpoint, by path."""
    steps = [int(p.name) for p in (run_folder(workdir) / "checkpoints").iterdir()]
    assert max(steps) == STEPS
    path = run_folder(workdir) / "checkpoints" / str(STEPS) / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path)
    return dict(ocp.tree.to_flat_dict(tree, sep="/"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    from tests.conftest import ROOT

    workdir = tmp_path_factory.mktemp("whole") / "run"
    workdir.mkdir()
    finish(ROOT, workdir)
    return workdir


def assert_same_run(workdir, whole):
    assert losses(workdir) == losses(whole)
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    got, expected = last_state(workdir), last_state(whole)
    assert got.keys() == expected.keys()
    assert any("kernel" in name for name in got)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_and_again_equals_an_uninterrupted_run(root, tmp_path, whole, seed):
    workdir = tmp_path / "run"
    workdir.mkdir()
    step = random.Random(seed).randrange(4, STEPS - 5)
    assert interrupt(root, workdir, step, signal.SIGKILL) == -signal.SIGKILL
    assert step <= max(losses(workdir)) < STEPS
    finish(root, workdir)
    assert_same_run(workdir, whole)


def test_sigterm_exits_with_75_and_goes_on(root, tmp_path, whole):
    workdir = tmp_path / "run"
    workdir.mkdir()
    step = random.Random(2).randrange(4, STEPS - 5)
    assert interrupt(root, workdir, step, signal.SIGTERM) == 75
    stopped = max(losses(workdir))
    assert step <= stopped < STEPS
    saved = [int(p.name) for p in (run_folder(workdir) / "checkpoints").iterdir()]
    assert max(saved) == stopped
    finish(root, workdir)
    assert_same_run(workdir, whole)
