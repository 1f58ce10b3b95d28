"""Foreign checkpoints: opened safely, checked by name and shape, read one by one.

A model's loader states a :class:`Source` for every one of its parameters. Everything
that does not fit is reported at once, before a value is read, so that neither a wrong
file nor a hostile one fills half a model or the memory.
"""

import ast
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax._files import open_safetensors
from snnk_jax.typing import Dtype

HUGGING_FACE_GELUS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Values of ``hidden_act`` and our names for them."""

# What Python makes of JSON takes some twenty times its bytes.
_LARGEST_JSON = 2**20
_LARGEST_INDEX = 2**24
_LARGEST_NPY_HEADER = 2**16
_FLOATS = ("F64", "F32", "F16", "BF16")
# Kernels and biases of six Linears and two LayerNorms, in BERT as in ViT.
_PER_BLOCK = 16
# What NumPy writes. The others unpack a thousandfold more than is asked for.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Bytes that may come of one byte, beyond some that may come of none.
_LARGEST_RATIO, _FREELY_UNPACKED = 20, 2**26


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter stands in a checkpoint.

    Attributes:
      name: of the stored tensor, after :class:`Checkpoint` has cleaned it.
      shape: of the stored tensor.
      axes: order of its axes in the parameter; () keeps them. The result is reshaped
        to the parameter.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()


def linear_sources(
    ours: str, theirs: str, rows: int, columns: int
) -> dict[str, Source]:
    """A linear map of a Hugging Face checkpoint, stored as ``[out, in]``."""
    return {
        f"{ours}.kernel": Source(f"{theirs}.weight", (columns, rows), (1, 0)),
        f"{ours}.bias": Source(f"{theirs}.bias", (columns,)),
    }


def norm_sources(ours: str, theirs: str, dim: int) -> dict[str, Source]:
    """A LayerNorm of a Hugging Face checkpoint."""
    return {
        f"{ours}.scale": Source(f"{theirs}.weight", (dim,)),
        f"{ours}.bias": Source(f"{theirs}.bias", (dim,)),
    }


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave.

    Attributes:
      loaded: number of parameters that were read.
      ignored: stored tensors, by their names in the file, that the model has no place
        for and known to be without meaning for it: other heads, buffers.
      fresh: parameters that keep their initial values: a new head.
    """

    loaded: int
    ignored: tuple[str, ...]
    fresh: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A stored tensor that has not been read yet."""

    shape: tuple[int, ...]
    floating: bool
    dtype: str
    read: Callable[[], np.ndarray]


class Checkpoint:
    """The tensors of one or several files, by cleaned names.

    ``stored`` holds the names in the file, for messages and reports.

    Args:
      tensors: stored tensors by the names in the file.
      where: what errors call it.
      prefixes: prefixes that may stand before all names of the encoder and are cut.
      renames: regular expressions and what to put in their place.

    Raises:
      ValueError: if two names are the same once cleaned.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        where: str,
        *,
        prefixes: Sequence[str] = (),
        renames: Mapping[str, str] | None = None,
    ):
        self.where = where
        self.tensors: dict[str, Tensor] = {}
        self.stored: dict[str, str] = {}
        for stored, tensor in tensors.items():
            name = stored
            for prefix in prefixes:
                name = name.removeprefix(prefix)
            for pattern, replacement in (renames or {}).items():
                name = re.sub(pattern, replacement, name)
            if name in self.tensors:
                raise ValueError(
                    f"weights must name each tensor once. Got {stored!r} and "
                    f"{self.stored[name]!r} for {name!r} in {where}."
                )
            self.tensors[name] = tensor
            self.stored[name] = stored

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, None if there is no such tensor."""
        return self.tensors[name].shape if name in self.tensors else None


def fill(
    build: Callable[[], Any],
    sources: Mapping[str, Source],
    checkpoint: Checkpoint,
    *,
    ignore: str,
    fresh: Mapping[str, tuple[int, ...]],
    param_dtype: Dtype,
    change: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
) -> tuple[Any, LoadReport]:
    """Puts a checkpoint's values in the place of a model's shapes.

    Args:
      build: returns the model; called once, for its shapes alone, after everything in
        the file has its place.
      sources: a source for every parameter path (joined by ``.``) but fresh ones.
      checkpoint: the file.
      ignore: regular expression of stored names that may be left unread.
      fresh: shapes of the parameters that the file does not have; they are zero.
      param_dtype: storage dtype.
      change: what to do with a value that was read, before it takes its place.

    Raises:
      ValueError: with every missing, unexpected, misshapen and non-float tensor; or
        with those that hold values that are not finite in ``param_dtype``.
    """
    tensors, stored = checkpoint.tensors, checkpoint.stored
    used = {source.name for source in sources.values()}
    missing = sorted(used - tensors.keys())
    left = sorted(tensors.keys() - used)
    unexpected = [stored[name] for name in left if not re.fullmatch(ignore, name)]
    found = [source for source in sources.values() if source.name in tensors]
    misshapen = [
        f"{stored[source.name]} {tensors[source.name].shape} instead of {source.shape}"
        for source in found
        if tensors[source.name].shape != source.shape
    ]
    integers = [
        f"{stored[source.name]} {tensors[source.name].dtype}"
        for source in found
        if not tensors[source.name].floating
    ]
    if missing or unexpected or misshapen or integers:
        raise ValueError(
            "weights must hold exactly the parameters of the model, as floats. Got "
            f"{checkpoint.where} with missing {missing}, unexpected {unexpected}, "
            f"misshapen {misshapen}, no floats {integers}."
        )
    # Shapes only: the random initial weights are never computed.
    graphdef, state = nnx.split(nnx.eval_shape(build))
    places = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
    flat = dict(nnx.to_flat_state(state))
    unknown = places.keys() ^ (sources.keys() | fresh.keys())
    assert not unknown, f"parameters without a source, or the reverse: {unknown}"
    broken = []
    for name, source in sources.items():
        value = tensors[source.name].read()
        if change and name in change:
            value = change[name](np.asarray(value, np.float32))
        value = value.transpose(source.axes) if source.axes else value
        variable = flat[places[name]]
        with np.errstate(over="ignore"):  # an overflow is refused below
            value = np.reshape(value, variable.shape).astype(np.dtype(param_dtype))
        if not np.all(np.isfinite(value)):
            broken.append(stored[source.name])
        flat[places[name]] = variable.replace(jnp.asarray(value))
    if broken:
        raise ValueError(
            f"weights must be finite in {np.dtype(param_dtype)}. Got NaN or infinity "
            f"in {broken} of {checkpoint.where}."
        )
    for name, shape in fresh.items():
        flat[places[name]] = flat[places[name]].replace(jnp.zeros(shape, param_dtype))
    ignored = tuple(sorted(stored[name] for name in left))  # none is unexpected
    report = LoadReport(len(sources), ignored, tuple(sorted(fresh)))
    return nnx.merge(graphdef, nnx.from_flat_state(flat.items())), report


@contextlib.contextmanager
def open_checkpoint(
    path: str | os.PathLike[str],
) -> Iterator[dict[str, Tensor]]:
    """Opens a ``.safetensors`` or ``.npz`` file, or a Hugging Face folder.

    A folder holds ``model.safetensors``, or ``model.safetensors.index.json`` and the
    files that it names.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if a file is damaged or of another kind, or an index names files
        elsewhere or tensors that are not where it says.
    """
    path = pathlib.Path(path)
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            yield _open_folder(path, stack)
        elif path.name.endswith(".safetensors.index.json"):
            yield _open_index(path, stack)
        elif path.suffix == ".npz":
            yield _open_npz(path, stack)
        elif path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack"):
            raise ValueError(
                "weights must be a .safetensors or .npz file: pickles run code. Got "
                f"{path}; convert it with safetensors.torch.save_file."
            )
        else:
            yield safetensors_of(stack.enter_context(open_safetensors(path, "weights")))


def read_config_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads the ``config.json`` in a folder, or beside a file."""
    folder = path if path.is_dir() else path.parent
    what = "config.json beside the weights, or the argument config,"
    return read_json(folder / "config.json", what)


def read_json(
    path: pathlib.Path, what: str, largest: int = _LARGEST_JSON
) -> dict[str, Any]:
    """Reads a JSON object of bounded size.

    Raises:
      FileNotFoundError: if there is no such file; ``what`` names it.
      ValueError: if it is too large or no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{what} must be an existing file. Got {path}.")
    if path.stat().st_size > largest:
        raise ValueError(
            f"{what} must be at most {largest} bytes. Got {path.stat().st_size} in "
            f"{path}."
        )
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON. Got {path}: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{what} must be a JSON object. Got {type(found).__name__} in {path}."
        )
    return found


def check_architecture(
    stored: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raises ValueError for a ``config.json`` of a model that is not ours.

    An absent key means the first accepted value.
    """
    for key, values in accepted.items():
        if stored.get(key, values[0]) not in values:
            raise ValueError(
                f"config.json must have {key} among {values}. Got {stored[key]!r}."
            )


def read_numbers(stored: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Takes our fields from the names of a Hugging Face ``config.json``.

    Sizes are whole numbers and must be there. Dropout rates are zero where they are
    not, and the epsilon of LayerNorm is 1e-12, as for Hugging Face.

    Raises:
      ValueError: with every value that is absent or of another kind.
    """
    rates = {
        "dropout_rate": "hidden_dropout_prob",
        "attention_dropout_rate": "attention_probs_dropout_prob",
    }
    found = {ours: stored.get(theirs) for ours, theirs in names.items()}
    found |= {ours: stored.get(theirs, 0.0) for ours, theirs in rates.items()}
    found["layer_norm_eps"] = stored.get("layer_norm_eps", 1e-12)
    wrong = [
        f"{ {**rates, **names}.get(ours, ours) }={value!r}"
        for ours, value in found.items()
        if isinstance(value, bool)
        or not isinstance(value, int if ours in names else int | float)
    ]
    if wrong:
        raise ValueError(
            "config.json must have whole numbers as sizes, and numbers as rates and "
            f"epsilon. Got {', '.join(wrong)}."
        )
    return found


def check_overrides(overrides: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Raises ValueError for a field that the weights fix."""
    wrong = sorted(overrides.keys() - set(allowed))
    if wrong:
        raise ValueError(
            f"overrides must be among {', '.join(allowed)}: the weights fix all other "
            f"sizes. Got {wrong}."
        )


def check_depth(depth: int, checkpoint: Checkpoint) -> None:
    """Raises ValueError for more blocks than a file can hold, before any is built."""
    # A few more are listed by name, as missing.
    most = len(checkpoint.tensors) // _PER_BLOCK + 4
    if depth > most:
        raise ValueError(
            f"the config must have at most {most} layers: a file of "
            f"{len(checkpoint.tensors)} tensors holds no more. Got {depth} for "
            f"{checkpoint.where}."
        )


def _open_folder(
    folder: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, Tensor]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return safetensors_of(stack.enter_context(open_safetensors(whole, "weights")))
    if index.is_file():
        return _open_index(index, stack)
    held = sorted(p.name for p in folder.iterdir())
    raise FileNotFoundError(
        f"weights must be model.safetensors or its index. Got {held} in {folder}."
    )


def _open_index(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    index = read_json(path, "the index of the weights", _LARGEST_INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(
            f"the index of the weights must hold a weight_map. Got {path} without."
        )
    for name, file in places.items():
        # A plain name: nothing outside of the folder is opened.
        plain = isinstance(file, str) and re.fullmatch(
            r"[\w.\-]{1,200}\.safetensors", file
        )
        if not plain:
            raise ValueError(
                "the index of the weights must name .safetensors files of its own "
                f"folder. Got {file!r} for {name!r}."
            )
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        opened = open_safetensors(path.parent / file, "weights")
        held = safetensors_of(stack.enter_context(opened))
        listed = {name for name, place in places.items() if place == file}
        if held.keys() != listed:
            raise ValueError(
                f"{file} must hold the tensors that the index lists. Got missing "
                f"{sorted(listed - held.keys())}, unlisted "
                f"{sorted(held.keys() - listed)}."
            )
        tensors |= held
    return tensors


def safetensors_of(file: Any) -> dict[str, Tensor]:
    """The tensors of an open safetensors file."""

    def tensor(name: str) -> Tensor:
        part = file.get_slice(name)
        dtype = str(part.get_dtype())
        return Tensor(
            tuple(part.get_shape()),
            dtype in _FLOATS,
            dtype,
            lambda: file.get_tensor(name),
        )

    return {name: tensor(name) for name in file.keys()}  # noqa: SIM118


def _open_npz(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights must be an existing file. Got {path}.")
    # Whatever a damaged archive makes of zipfile and its decompressors.
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
        members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
        _check_total(members)
        tensors = {m.filename.removesuffix(".npy"): _npy(archive, m) for m in members}
    except Exception as error:
        raise ValueError(
            "weights must be a whole .npz file of arrays. "
            f"Got {path}: {type(error).__name__}: {error}."
        ) from error
    if len(tensors) != len(members):
        raise ValueError(f"weights must name each tensor once. Got {path}.")
    return tensors


def _check_total(members: Sequence[zipfile.ZipInfo]) -> None:
    """Bounds what a small file can unpack to; weights hardly shrink, but zeros do."""
    packed, whole = (
        sum(getattr(member, size) for member in members)
        for size in ("compress_size", "file_size")
    )
    if whole > _LARGEST_RATIO * packed + _FREELY_UNPACKED:
        raise ValueError(f"{packed} bytes must not unpack to {whole}")


def _npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    """Reads the header alone: the shape is known before anything is unpacked.

    NumPy's own reader would allocate what a header claims.
    """
    if member.compress_type not in _COMPRESSIONS:
        raise ValueError(
            f"{member.filename} must be stored or deflated. Got compression "
            f"{member.compress_type}"
        )
    with archive.open(member) as file:
        start, shape, fortran, dtype = _npy_header(file, member.filename)
    size = math.prod(shape) * dtype.itemsize
    # Objects are pickles, of any size; no parameter is of them.
    if member.file_size != start + size and not dtype.hasobject:
        raise ValueError(
            f"{member.filename} must hold {shape} of {dtype}. "
            f"Got {member.file_size} bytes"
        )

    def values() -> np.ndarray:
        try:
            with archive.open(member) as file:
                data = file.read(start + size)
        except Exception as error:
            raise ValueError(
                f"weights must be whole. Got {member.filename} damaged: {error}."
            ) from error
        if len(data) != start + size:
            raise ValueError(
                f"weights must be whole. Got {len(data)} of {start + size} bytes of "
                f"{member.filename}."
            )
        order = "F" if fortran else "C"
        return np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)

    return Tensor(shape, dtype.kind == "f", str(dtype), values)


def _npy_header(file: Any, name: str) -> tuple[int, tuple[int, ...], bool, np.dtype]:
    """Where the data starts, its shape, whether columns come first, and its dtype."""
    magic = file.read(8)
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(magic)
    if width is None:
        raise ValueError(f"{name} is of the unknown version {magic!r}")
    length = int.from_bytes(file.read(width), "little")
    if length > _LARGEST_NPY_HEADER:
        raise ValueError(f"{name} has a header of {length} bytes")
    header = ast.literal_eval(file.read(length).decode("latin1").strip())
    shape, fortran, descr = (header[key] for key in ("shape", "fortran_order", "descr"))
    plain = isinstance(shape, tuple) and isinstance(fortran, bool)
    if not plain or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"{name} has the header {header}")
    return 8 + width + length, shape, fortran, np.dtype(descr)
