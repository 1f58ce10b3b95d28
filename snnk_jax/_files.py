"""Files on disk: written atomically, read whole or not at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file so that a reader sees the old content or the new, never half."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode() if isinstance(data, str) else data
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def hash_array(sha: Any, name: str, array: np.ndarray) -> None:
    """Feeds the name, dtype, shape and bytes of an array to a ``hashlib`` hash."""
    sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
    # A view, since a copy of a large model's arrays would take longer than the hash.
    sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike[str], what: str) -> Iterator[Any]:
    """Opens a safetensors file for reading into NumPy arrays.

    Raises:
      FileNotFoundError: if there is no such file; ``what`` names it.
      ValueError: if it is cut short or no safetensors file.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{what} must be an existing file. Got {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{what} must be a whole safetensors file. Got {path}: {error}."
        ) from error
