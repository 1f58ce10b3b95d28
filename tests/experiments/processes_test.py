"""Two processes with four devices each do what one process does with eight."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.metrics import read_jsonl

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent.parent
TIMEOUT = 300

WORKER = """
import sys, jax
port, count, index, workdir, steps = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
from experiments import load_config
from experiments.runner import run
from experiments.train import PREEMPTED_EXIT_CODE, Preempted
config = load_config("configs/vit_adapter.py:quicktest", {
    "methods": ("snnk_relu",), "optim.steps": int(steps),
    "log.checkpoint_every": 0, "mesh.axes": (("data", 8),),
})
try:
    run(config, workdir)
except Preempted:
    sys.exit(PREEMPTED_EXIT_CODE)
"""


def start(workdir, count, steps):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(8 // count),
        "PYTHONPATH": str(ROOT),
    }
    processes = []
    for index in range(count):
        arguments = [str(value) for value in (port, count, index, workdir, steps)]
        with (workdir.parent / f"{workdir.name}-{index}.log").open("a") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER, *arguments],
                    cwd=ROOT,
                    env=env,
                    stdout=log,
                    stderr=log,
                )
            )
    return processes


def finish(processes, workdir, code):
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [p.read_text()[-2000:] for p in workdir.parent.glob(f"{workdir.name}-*.log")]
    assert codes == [code] * len(processes), "\n".join(logs)


def losses(workdir):
    rows = [
        row
        for path in workdir.glob("snnk_relu-*/metrics.jsonl")
        for row in read_jsonl(path)
    ]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_the_loss_curve_and_a_stop_that_both_processes_agree_on(tmp_path):
    steps = 60
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(one, 1, steps), one, 0)

    processes = start(two, 2, steps)
    end = time.monotonic() + TIMEOUT
    while len(losses(two)) < 5 and time.monotonic() < end:
        assert processes[0].poll() is None, (tmp_path / "two-0.log").read_text()
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, two, 75)
    assert 5 <= len(losses(two)) < steps

    finish(start(two, 2, steps), two, 0)
    assert len(losses(two)) == steps
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
