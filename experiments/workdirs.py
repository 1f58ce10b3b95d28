"""Folders of runs: which settings they hold, and where their results come from."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
from typing import Any

import jax
from ml_collections import ConfigDict

import snnk_jax as snnk
from experiments.metrics import write_json
from snnk_jax._files import write_new

# Settings that choose which runs are done and how they are reported, not their result.
FREE = (
    *("methods", "seeds", "sweep", "export", "resume", "log", "together"),
    "optim.learning_rates",
)


def open_workdir(
    workdir: pathlib.Path, config: ConfigDict, free: tuple[str, ...] = FREE
) -> dict[str, Any]:
    """Claims a folder and writes ``env.json`` to it; returns what it says."""
    claim(workdir, config, free)
    environment = describe_environment()
    write_json(workdir / "env.json", environment)
    return environment


def claim(
    workdir: pathlib.Path, config: ConfigDict, free: tuple[str, ...] = FREE
) -> None:
    """Writes ``config.json``, or refuses a folder that holds other settings.

    Args:
      workdir: the folder, of several processes that may claim it at once.
      config: the settings.
      free: beginnings of those that may differ.

    Raises:
      ValueError: says which settings differ.
    """
    file = workdir / "config.json"
    settings = json.loads(config.to_json_best_effort())
    chief = jax.process_index() == 0
    if chief and write_new(file, json.dumps(settings, indent=2) + "\n"):
        return
    if file.is_file():
        check_settings(workdir, settings, free, "workdir")
    if chief:
        write_json(file, settings)


def check_settings(
    workdir: pathlib.Path, settings: dict[str, Any], free: tuple[str, ...], what: str
) -> None:
    """Refuses a folder without a config, or with one that differs beyond ``free``."""
    file = workdir / "config.json"
    if not file.is_file():
        raise ValueError(f"{what} must hold a config.json. Got {workdir} without.")
    stored = json.loads(file.read_text())
    found, asked = (
        {key: value for key, value in _flat(s).items() if not key.startswith(free)}
        for s in (stored, settings)
    )
    changed = sorted(key for key in found | asked if found.get(key) != asked.get(key))
    if changed:
        raise ValueError(
            f"{what} must be empty or hold runs of the same settings. Got {workdir}, "
            f"whose config differs in {', '.join(changed)}. Choose another one or "
            "remove it."
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def describe_environment() -> dict[str, Any]:
    """Versions, devices and the commit, as written to ``env.json``."""
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            cwd=pathlib.Path(__file__).parent,
        ).stdout.strip()
    devices = jax.devices()
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "snnk_jax": f"{snnk.__version__} {commit}".strip(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
