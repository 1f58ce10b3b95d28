"""The default job, as the README runs it, on one device and on eight."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.metrics import read_jsonl

ROOT = pathlib.Path(__file__).parent.parent.parent


def losses(workdir, devices, *overrides):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.main",
            "--config=configs/vit_adapter.py",
            "--config.methods=snnk_relu",
            "--config.optim.steps=14",
            "--config.optim.warmup_steps=2",
            "--config.log.log_every=1",
            f"--workdir={workdir}",
            *overrides,
        ],
        check=True,
        cwd=ROOT,
        timeout=400,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
    )
    (metrics,) = workdir.glob("snnk_relu-*/metrics.jsonl")
    rows = [row for row in read_jsonl(metrics) if "train/loss" in row]
    return [row["train/loss"] for row in rows]


@pytest.mark.slow
def test_eight_devices_give_the_loss_curve_of_one(tmp_path):
    one = losses(tmp_path / "one", 1)
    eight = losses(tmp_path / "eight", 8)
    assert len(one) == 14
    assert one[-1] < one[0]
    np.testing.assert_allclose(eight, one, rtol=2e-4)
    # Cutting the parameters as well changes nothing but where they are.
    rules = "--config.mesh.rules=((r'.*', ('fsdp', 'data')),)"
    np.testing.assert_allclose(losses(tmp_path / "fsdp", 8, rules), one, rtol=2e-4)
