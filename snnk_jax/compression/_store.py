r"""Files of compressed models: small, hashed, refusing the wrong architecture.

One safetensors file holds all arrays of the model under their paths, and in its header
a JSON record: what stands in for which module, the structure of the dense model that
it was made from, frozen draws by their key, and a SHA-256 over all of it. Nothing in
it is executed.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax import projections
from snnk_jax._files import check_metadata, read_record, write_record
from snnk_jax.adapters._kinds import build_features, describe_features
from snnk_jax.compression._modules import Beside, Int8Linear
from snnk_jax.compression._taps import place
from snnk_jax.nn import Projection, SNNKMlp
from snnk_jax.surgery import find_modules, path_name

_FORMAT = "snnk_jax.compressed.1"


def structure(model: nnx.Module) -> str:
    """SHA-256 over the paths, shapes and dtypes of a model's variables, not values.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> a, b = (nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
      >>> snnk.compression.structure(a) == snnk.compression.structure(b)
      True
    """
    rows = [f"{name} {v.shape} {v.dtype}" for name, (_, v) in _flat(model).items()]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def save(
    path: str | os.PathLike[str],
    model: nnx.Module,
    dense: nnx.Module,
    *,
    metadata: dict[str, str] | None = None,
) -> int:
    """Writes a compressed model to one file, atomically.

    Args:
      path: the file.
      model: what :func:`compress` returned, trained further or not. Its random streams
        are not kept.
      dense: the model it was made from, of which only the structure counts.
      metadata: strings of your own, returned by :func:`read_metadata`.

    Returns:
      The size of the file in bytes.

    Raises:
      ValueError: if an array is not finite, ``metadata`` no strings, or a module is not
        that of ``dense`` and of no kind that a file can describe.

    Example:
      >>> import pathlib, tempfile
      >>> import jax, snnk_jax as snnk
      >>> from flax import nnx
      >>> class Mlp(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.fc1 = nnx.Linear(4, 32, rngs=rngs)
      ...         self.fc2 = nnx.Linear(32, 4, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.fc2(nnx.gelu(self.fc1(x)))
      >>> dense = nnx.Sequential(Mlp(nnx.Rngs(0)))
      >>> x = jax.random.normal(jax.random.key(0), (256, 4))
      >>> rules = [snnk.CompressRule(path="layers/0")]
      >>> small, _ = snnk.compress(dense, [x], rules, budget=0.5, metric="plain")
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "small.safetensors"
      >>> size = snnk.compression.save(file, small, dense)
      >>> again = snnk.compression.load(file, nnx.Sequential(Mlp(nnx.Rngs(1))))
      >>> bool((again(x) == small(x)).all())
      True
    """
    check_metadata(metadata)
    draws = {
        name: module
        for name, module in find_modules(model).items()
        if isinstance(module, Projection) and _redrawn(module)
    }
    arrays = {}
    for name, (_, variable) in _stored(model).items():
        if any(name.startswith(f"{draw}/values/") for draw in draws):
            continue
        array = np.asarray(variable[...], order="C")
        if not np.all(np.isfinite(np.asarray(array, np.float64))):
            raise ValueError(f"{name} must be finite to be saved.")
        arrays[name] = array
    record = {
        "format": _FORMAT,
        "structure": structure(dense),
        "modules": _replacements(model, dense),
        "drawn": sorted(draws),
        "generator": projections.GENERATOR,
        "metadata": metadata or {},
    }
    return write_record(path, record, arrays)


def load(path: str | os.PathLike[str], dense: nnx.Module) -> Any:
    """Returns the compressed model of a file.

    Args:
      path: a file of :func:`save`.
      dense: a model of the dense architecture; of its values only random streams
        count, and it may be abstract (``nnx.eval_shape``). It is left as it is.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged or was changed, or ``dense`` is of another
        architecture than the one that was compressed.

    Example:
      See :func:`save`.
    """
    record, arrays = _read(path)
    if record["structure"] != structure(dense):
        raise ValueError(
            "dense must have the architecture that was compressed, of structure "
            f"{record['structure']}. Got {structure(dense)}."
        )
    if record["drawn"] and record["generator"] != projections.GENERATOR:
        raise ValueError(
            f"the file must name the generator {projections.GENERATOR}. "
            f"Got {record['generator']}."
        )
    modules = {name: _build(spec) for name, spec in record["modules"].items()}
    model = place(dense, modules)
    for name, module in find_modules(model).items():
        if isinstance(module, Projection):
            key = jnp.asarray(arrays[f"{name}/key"], jnp.uint32)
            if name in record["drawn"]:
                module.redraw(jax.random.wrap_key_data(key, impl="threefry2x32"))
                drawn = {k: np.asarray(v[...]) for k, v in module.values.items()}
                arrays |= {f"{name}/values/{k}": v for k, v in drawn.items()}
    flat, stored = _flat(model), _stored(model)
    if stored.keys() != arrays.keys():
        raise ValueError(
            "the file must hold the arrays of its model. Got missing "
            f"{sorted(stored.keys() - arrays.keys())}, unexpected "
            f"{sorted(arrays.keys() - stored.keys())}."
        )
    graphdef, _ = nnx.split(model)
    filled = []
    for name, (parts, variable) in flat.items():
        if name not in stored:
            filled.append((parts, variable))
            continue
        if variable.shape != arrays[name].shape:
            raise ValueError(
                f"{name} must have shape {variable.shape}. Got {arrays[name].shape}."
            )
        filled.append((parts, variable.replace(jnp.asarray(arrays[name]))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the strings given to :func:`save`, after checking the file."""
    return _read(path)[0]["metadata"]


def _flat(model: nnx.Module) -> dict[str, tuple[Any, Any]]:
    return {path_name(p): (p, v) for p, v in nnx.to_flat_state(nnx.state(model))}


def _stored(model: nnx.Module) -> dict[str, tuple[Any, Any]]:
    """The variables that a file holds: all but random streams."""
    flat = _flat(model).items()
    return {name: e for name, e in flat if not isinstance(e[1], nnx.RngState)}


def _read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return read_record(path, "compressed model", "compression.save", _FORMAT)


def _redrawn(projection: Projection) -> bool:
    """Whether the key draws the values that the projection has."""
    key = jax.random.wrap_key_data(projection.key[...], impl="threefry2x32")
    drawn = projection.draw(key)
    values = {name: variable[...] for name, variable in projection.values.items()}
    return drawn.keys() == values.keys() and all(
        np.array_equal(drawn[name], values[name]) for name in values
    )


def _replacements(model: nnx.Module, dense: nnx.Module) -> dict[str, Any]:
    """The outermost modules that are not those of the dense model."""
    old, found = find_modules(dense), {}
    for name, module in find_modules(model).items():
        if any(name.startswith(f"{outer}/") for outer in found) or not name:
            continue
        if name not in old:
            raise ValueError(f"dense must have a module at {name}. Got none.")
        spec = _describe(module)
        if spec is not None and spec != _describe(old[name]):
            found[name] = spec
        elif type(module) is not type(old[name]):
            raise ValueError(
                f"{name} must be a Linear, low-rank, 8-bit or SNNK module to be saved. "
                f"Got {type(module).__name__}."
            )
    return found


def _dtypes(module: Any) -> dict[str, str | None]:
    dtype = None if module.dtype is None else jnp.dtype(module.dtype).name
    return {"dtype": dtype, "param_dtype": jnp.dtype(module.param_dtype).name}


def _precision(precision: Any) -> Any:
    """As names, of which JAX takes a tuple or one."""
    if isinstance(precision, tuple | list):
        return [_precision(part) for part in precision]
    if precision is None or isinstance(precision, str):
        return precision
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return {"preset": precision.name}
    if not isinstance(precision, jax.lax.Precision):
        raise ValueError(
            "precision must be a name, jax.lax.Precision or a DotAlgorithmPreset to be "
            f"saved. Got {precision!r}."
        )
    return precision.name.lower()


def _describe(module: Any) -> dict[str, Any] | None:
    if isinstance(module, nnx.Linear | Int8Linear):
        return {
            "kind": type(module).__name__,
            "sizes": [module.in_features, module.out_features],
            "use_bias": module.bias is not None,
            "precision": _precision(module.precision),
            **_dtypes(module),
        }
    if isinstance(module, SNNKMlp):
        return {
            "kind": "SNNKMlp",
            "sizes": [module.in_features, module.out_features],
            "use_bias": module.bias is not None,
            "features": describe_features(module.projection.features),
            "values": {
                name: [list(v.shape), jnp.dtype(v.dtype).name]
                for name, v in module.projection.values.items()
            },
            "dtype": None if module.dtype is None else jnp.dtype(module.dtype).name,
            "param_dtype": jnp.dtype(module.readout.dtype).name,
        }
    if isinstance(module, Beside):
        parts = [_describe(part) for part in (module.first, module.second)]
        return None if None in parts else {"kind": "Beside", "parts": parts}
    if isinstance(module, nnx.Sequential):
        parts = [_describe(part) for part in module.layers]
        return None if None in parts else {"kind": "Sequential", "parts": parts}
    return None


def _build(spec: dict[str, Any]) -> nnx.Module:
    kinds: dict[str, Callable[..., nnx.Module]] = {
        "Linear": lambda *sizes, **kw: nnx.Linear(*sizes, **kw, rngs=nnx.Rngs(0)),
        "Int8Linear": Int8Linear,
        "Beside": Beside,
        "Sequential": nnx.Sequential,
        "SNNKMlp": _build_snnk,
    }
    if spec["kind"] not in kinds:
        raise ValueError(f"kinds must be among {list(kinds)}. Got {spec['kind']!r}.")
    parts = [_build(part) for part in spec.get("parts", ())]
    options = {k: v for k, v in spec.items() if k not in ("kind", "sizes", "parts")}
    precision = options.get("precision")
    if isinstance(precision, list):
        options["precision"] = tuple(precision)
    if isinstance(precision, dict):
        presets = jax.lax.DotAlgorithmPreset.__members__
        if precision["preset"] not in presets:
            raise ValueError(
                "the file must name a DotAlgorithmPreset of this JAX, one of "
                f"{', '.join(presets)}. Got {precision['preset']!r}."
            )
        options["precision"] = presets[precision["preset"]]
    return kinds[spec["kind"]](*spec.get("sizes", ()), *parts, **options)


def _build_snnk(
    d: int, o: int, *, features: Any, values: Any, **options: Any
) -> SNNKMlp:
    fm = build_features(features)
    block = SNNKMlp(d, o, features=fm, rngs=nnx.Rngs(0), **options)
    if values.keys() != block.projection.values.keys():
        zeros = {name: jnp.zeros(shape, kind) for name, (shape, kind) in values.items()}
        block.projection.calibrate(zeros)
    return block
