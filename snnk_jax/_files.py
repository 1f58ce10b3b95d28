"""Files on disk: written atomically, read whole or not at all."""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save


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


def write_new(path: str | os.PathLike[str], data: str) -> bool:
    """Writes a whole file unless there is one; of several writers one wins.

    Returns:
      Whether this one did.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}."
    ) as temporary:
        temporary.write(data)
        temporary.flush()
        os.chmod(temporary.name, 0o644)
        try:
            os.link(temporary.name, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links, of a mounted drive say
            return _write_exclusively(path, data)
    return True


def _write_exclusively(path: pathlib.Path, data: str) -> bool:
    try:
        with path.open("x") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


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


def check_metadata(metadata: Any) -> None:
    """Raises ValueError for anything but strings by strings, or None."""
    strings = isinstance(metadata, dict) and all(
        isinstance(part, str) for item in metadata.items() for part in item
    )
    if metadata is not None and not strings:
        raise ValueError(
            f"metadata must be a dict of strings by strings. Got {metadata!r}."
        )


def write_record(
    path: str | os.PathLike[str], record: dict[str, Any], arrays: dict[str, np.ndarray]
) -> int:
    """Writes arrays, a JSON record and a SHA-256 over both, atomically; returns bytes.

    ``record`` holds the ``format`` by which :func:`read_record` knows the file.
    """
    header = {
        "record": json.dumps(record, sort_keys=True),
        "sha256": _checksum(record, arrays),
    }
    # np.ascontiguousarray would make scalars vectors.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    data = save(arrays, header)
    write_atomic(path, data)
    return len(data)


def read_record(
    path: str | os.PathLike[str], what: str, writer: str, kind: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a file of :func:`write_record` whole, or raises.

    Args:
      path: the file.
      what: what it should hold, for messages.
      writer: the public function that writes such files, for messages.
      kind: the ``format`` that its record must name.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, of another format, or was changed.
    """
    with open_safetensors(path, what) as file:
        header = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        record = json.loads(header["record"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{what} must be a file of {writer}. Got {path}: "
            f"{type(error).__name__} {error}."
        ) from error
    if not isinstance(record, dict) or record.get("format") != kind:
        found = record.get("format") if isinstance(record, dict) else record
        raise ValueError(f"{what} must have format {kind}. Got {found!r}.")
    checksum = _checksum(record, arrays)
    if header.get("sha256") != checksum:
        raise ValueError(
            f"{what} must match its checksum {header.get('sha256')}. Got {checksum}: "
            f"{path} was changed or damaged."
        )
    return record, arrays


def _checksum(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(arrays):
        hash_array(sha, name, arrays[name])
    return sha.hexdigest()
