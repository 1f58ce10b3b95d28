"""Files on disk: written atomically, read whole or not at all."""

import os
import pathlib
import tempfile

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


def read_safetensors(
    path: str | os.PathLike[str], what: str
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Reads the header strings and the arrays of a safetensors file.

    Raises:
      FileNotFoundError: if there is no such file; ``what`` names it.
      ValueError: if it is cut short or no safetensors file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} must be an existing file. Got {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{what} must be a whole safetensors file. Got {path}: {error}."
        ) from error
