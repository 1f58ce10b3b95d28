"""Checkpoints through Orbax: the whole training state, checked when read back."""

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.sharding import path_name
from snnk_jax._files import hash_array


class Checkpoints:
    """Numbered checkpoints of one run in one folder.

    A checkpoint holds the training state (a tree of arrays) and a small JSON record:
    data position, best metric, and a digest of the state. Orbax writes to a temporary
    name and renames, so a kill never leaves half a checkpoint under a step number.

    Args:
      directory: the folder, made if needed.
      keep: how many of the newest checkpoints stay on disk.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 2):
        self.directory = pathlib.Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_names=("state", "record"),
        )

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes agreed to stop after this step, on a SIGTERM to any."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts saving; returns before the files are written."""
        record = record | {"digest": digest(state)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
            ),
        )

    def restore(self, target: Any) -> tuple[Any, dict[str, Any]]:
        """Reads the newest checkpoint into the structure and shardings of ``target``.

        Args:
          target: tree of ``jax.ShapeDtypeStruct`` with shardings.

        Raises:
          ValueError: if the newest checkpoint is damaged or does not fit; nothing on
            disk is touched.
        """
        step = self.latest_step()
        where = f"checkpoint {self.directory / str(step)}"
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target),
                    record=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            raise ValueError(
                f"{where} must be readable and fit this run's config. Remove that "
                "folder to go on from the one before it, or choose another workdir. "
                f"Got {type(error).__name__}: {error}"
            ) from error
        state, record = restored["state"], restored["record"]
        found = digest(state)
        # A digest is None where one process could not see the whole state.
        if None not in (record["digest"], found) and record["digest"] != found:
            raise ValueError(
                f"{where} must match the digest {record['digest']} written with it. "
                f"Got {found}: its files were changed or damaged. Remove that folder "
                "to go on from the one before it."
            )
        return state, record

    def wait(self) -> None:
        """Waits for running saves."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for running saves, and ends."""
        self.wait()
        self._manager.close()


def digest(tree: Any) -> str | None:
    """SHA-256 over paths, dtypes, shapes and bytes of a tree of arrays.

    None where some array is spread over processes and no one process can see it all.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not all(getattr(x, "is_fully_addressable", True) for _, x in leaves):
        return None
    sha = hashlib.sha256()
    for path, leaf in leaves:
        hash_array(sha, path_name(path), np.asarray(leaf))
    return sha.hexdigest()
