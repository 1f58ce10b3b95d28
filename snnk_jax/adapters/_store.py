r"""Adapter files: small, hashed, refusing the wrong base.

A file is one safetensors file. It holds the trained arrays under their paths, and in
its header a JSON record: the adapter modules and where they stand, modules that stand
in place of one of the base (an SNNK pooler, a merged head), the random projections
(the key and the name of the pinned generator, or the values where they are not what
the key draws), the fingerprint of the base model, and a SHA-256 over all of it.
Nothing in it is executed.
"""

import hashlib
import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax import projections
from snnk_jax._files import hash_array, read_record, write_record
from snnk_jax.adapters._kinds import KINDS, describe
from snnk_jax.nn import AdapterParam, Drawn, InputStatistic, RandomProjection
from snnk_jax.surgery import find_modules, path_name

_FORMAT = "snnk_jax.adapter.1"
_WRAPPERS = ("base_module",)
_PROBES = 8


def fingerprint(model: nnx.Module, *, exclude: str = "head/.*") -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's own parameters.

    Adapter parameters, random projections and what ``exclude`` matches are left out,
    and a wrapper's ``base_module`` does not show in the names: a base model and its
    adapted clone have the same fingerprint as long as only adapters and head train.

    Args:
      model: any NNX model.
      exclude: regular expression for whole parameter paths, ``/``-joined. The default
        leaves out the head, which belongs to the task.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> len(snnk.adapters.fingerprint(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
      64
    """
    sha = hashlib.sha256()
    rows = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = _base_name(path_name(path))
        if not isinstance(variable, AdapterParam) and not re.fullmatch(exclude, name):
            rows[name] = np.asarray(variable[...])
    for name in sorted(rows):
        hash_array(sha, name, rows[name])
    return sha.hexdigest()


def save_adapter(
    path: str | os.PathLike[str],
    model: nnx.Module,
    *,
    base_fingerprint: str,
    trained: str = "head/.*",
    exclude: str = "head/.*",
    metadata: dict[str, str] | None = None,
) -> int:
    """Writes adapters, head and projections of a model to one file, atomically.

    Args:
      path: the file.
      model: a model with adapters.
      base_fingerprint: :func:`fingerprint` of the base model, taken before training.
      trained: regular expression for the paths of parameters besides
        :class:`~snnk_jax.nn.AdapterParam` that were trained and belong to the file:
        the head, or the biases for BitFit. Those of an
        :class:`~snnk_jax.nn.SNNKPooler` or another :class:`~snnk_jax.nn.SNNKDense` in
        place of a module of the base always do.
      exclude: what ``base_fingerprint`` leaves out: with a replaced pooler
        ``"(pooler|head)/.*"``.
      metadata: strings of your own, returned by :func:`read_metadata`.

    Returns:
      The size of the file in bytes.

    Raises:
      ValueError: if nothing is to be saved, an array is not finite, or an adapter is
        of a kind this module cannot rebuild and describe.

    Example:
      >>> import pathlib, tempfile
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> base = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      >>> fm = snnk.features.ArcCosine(num_features=16)
      >>> def adapt(linear, rngs):
      ...     adapter = snnk.nn.SNNKAdapter(8, features=fm, rngs=rngs)
      ...     return snnk.nn.Adapted(linear, adapter)
      >>> rules = [snnk.SwapRule(path="layers/0", build=adapt)]
      >>> model, _ = snnk.swap_modules(base, rules, rngs=nnx.Rngs(1))
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "adapter.safetensors"
      >>> size = snnk.adapters.save_adapter(
      ...     file, model, base_fingerprint=snnk.adapters.fingerprint(base)
      ... )
      >>> loaded = snnk.adapters.load_adapter(file, base)
    """
    arrays = {}
    modules = _describe_modules(model)
    replaced = tuple(f"{m['at']}/" for m in modules if KINDS[m["kind"]].replaces)
    for parts, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = path_name(parts)
        own = isinstance(variable, AdapterParam) or _base_name(name).startswith(
            replaced
        )
        if own or re.fullmatch(trained, name):
            arrays[name] = np.asarray(variable[...])
    if not arrays:
        raise ValueError(
            f"model must have AdapterParam or parameters matching {trained!r}. "
            "Got none."
        )
    for parts, variable in nnx.to_flat_state(nnx.state(model, InputStatistic)):
        arrays[path_name(parts)] = np.asarray(variable[...])
    drawn = {}
    for name, projection in find_modules(model).items():
        if isinstance(projection, Drawn):
            values = {k: np.asarray(v[...]) for k, v in projection.values.items()}
            record = _describe_draw(projection, values)
            if record is None:
                # Trained values are among the arrays already.
                arrays |= {f"{name}/values/{k}": v for k, v in values.items()}
                arrays[f"{name}/key"] = np.asarray(projection.key[...])
            else:
                drawn[name] = record
    for name, array in arrays.items():
        if not np.all(np.isfinite(np.asarray(array, np.float64))):
            raise ValueError(f"{name} must be finite to be saved.")
    record = {
        "format": _FORMAT,
        "modules": modules,
        "projections": drawn,
        "generator": projections.GENERATOR,
        "base": {"fingerprint": base_fingerprint, "exclude": exclude},
        "metadata": metadata or {},
    }
    return write_record(path, record, arrays)


def load_adapter(path: str | os.PathLike[str], base_model: nnx.Module) -> Any:
    """Returns a clone of the base model with the adapters of a file.

    Args:
      path: a file of :func:`save_adapter`.
      base_model: the plain base model, into which the adapters are put; or a model
        that has adapters of the same structure already (after
        :func:`snnk_jax.swap_modules` with the same rules), whose values are replaced.
        Its head may have another number of outputs; the model has that of the file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged or was changed, the base model is another
        one, or names and shapes do not fit; it says what differs. The given model is
        never changed.

    Example:
      See :func:`save_adapter`.
    """
    record, arrays = _read(path)
    base = record["base"]
    found = fingerprint(base_model, exclude=base["exclude"])
    if found != base["fingerprint"]:
        raise ValueError(
            f"base_model must be the one the adapter was trained on, fingerprint "
            f"{base['fingerprint']}. Got {found}."
        )
    model = nnx.clone(base_model)
    if not jax.tree.leaves(nnx.state(model, AdapterParam)):
        model = _rebuild_modules(model, record["modules"])
    model = _make_room(model, arrays, base["exclude"])
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    names = {path_name(parts): parts for parts in flat}
    misshapen = [
        f"{name} {arrays[name].shape} instead of {flat[names[name]].shape}"
        for name in sorted(arrays.keys() & names.keys())
        if arrays[name].shape != flat[names[name]].shape
    ]
    # Not before the sizes are known to be those of the stored arrays.
    arrays = arrays | ({} if misshapen else _draw(model, record))
    needed = {
        name
        for name, parts in names.items()
        if isinstance(flat[parts], AdapterParam | RandomProjection | InputStatistic)
        or isinstance(flat[parts].get_value(), jax.ShapeDtypeStruct)
    }
    drawn = {
        f"{place}/{leaf}"
        for place, draw in record["projections"].items()
        for leaf in ("key", *(f"values/{name}" for name in draw["probes"]))
    }
    missing = sorted(needed - arrays.keys() - drawn)
    unexpected = sorted(arrays.keys() - names.keys())
    if missing or unexpected or misshapen:
        raise ValueError(
            "base_model must have the places and shapes of the adapter file. Got "
            f"missing {missing}, unexpected {unexpected}, misshapen {misshapen}."
        )
    for name, array in arrays.items():
        variable = flat[names[name]]
        flat[names[name]] = variable.replace(jnp.asarray(array, variable.dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(flat.items()))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the strings given to :func:`save_adapter`, after checking the file."""
    return _read(path)[0]["metadata"]


def _read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return read_record(path, "adapter", "save_adapter", _FORMAT)


def _probe(array: np.ndarray) -> list[float]:
    """A few numbers that tell one draw from another, compared up to rounding."""
    flat = np.asarray(array, np.float64).ravel()
    picks = flat[:: max(1, flat.size // _PROBES)][:_PROBES]
    return [float(np.mean(flat)), float(np.mean(flat**2)), *map(float, picks)]


def _describe_draw(
    projection: Drawn, values: dict[str, np.ndarray]
) -> dict[str, Any] | None:
    """The key of a draw and probes of its values; None if the key draws others."""
    if projection.trainable:
        return None
    words = projection.key[...]
    drawn = _draw_values(projection, words)
    same = drawn.keys() == values.keys()
    if not same or any(not np.array_equal(drawn[k], values[k]) for k in values):
        return None
    return {
        "key": [int(word) for word in words],
        "probes": {name: _probe(value) for name, value in values.items()},
    }


def _draw_values(projection: Drawn, words: Any) -> dict[str, np.ndarray]:
    key = jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl="threefry2x32")
    values = projection.draw(key)
    return {name: np.asarray(value) for name, value in values.items()}


def _make_room(model: Any, arrays: dict[str, np.ndarray], exclude: str) -> Any:
    """Gives modules of a clone the leaves and the sizes of the file.

    Calibrated projections have other leaves than the map draws, and a head, which
    belongs to the task, as many outputs as the task.
    """

    def visit(parts: tuple[Any, ...], node: Any) -> Any:
        if isinstance(node, nnx.Linear):
            name = f"{path_name(parts)}/kernel"
            kernel = arrays.get(name, np.zeros(0))
            fits = kernel.ndim == 2 and len(kernel) == node.in_features
            if fits and re.fullmatch(exclude, name):
                node.out_features = kernel.shape[1]
                own_leaves: Any = (
                    (node.kernel, kernel.shape),
                    (node.bias, kernel.shape[1:]),
                )
                for own, shape in own_leaves:
                    if own is not None:
                        own.set_value(jax.ShapeDtypeStruct(shape, own.dtype))
        if isinstance(node, Drawn):
            prefix = f"{path_name(parts)}/values/"
            stored = {
                name.removeprefix(prefix): jnp.asarray(value)
                for name, value in arrays.items()
                if name.startswith(prefix)
            }
            if stored and set(stored) != set(node.values):
                node.calibrate(stored)
        return node

    return nnx.recursive_map(visit, model)


def _draw(model: nnx.Module, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draws the projections that a file names by key, and checks them."""
    arrays: dict[str, np.ndarray] = {}
    if record["projections"] and record["generator"] != projections.GENERATOR:
        raise ValueError(
            f"adapter must name the generator {projections.GENERATOR}. "
            f"Got {record['generator']}."
        )
    places = {k: m for k, m in find_modules(model).items() if isinstance(m, Drawn)}
    for name, draw in record["projections"].items():
        if name not in places:
            raise ValueError(
                f"base_model must have a projection at {name}. Got {list(places)}."
            )
        values = _draw_values(places[name], draw["key"])
        for leaf, value in values.items():
            if not np.allclose(_probe(value), draw["probes"][leaf], 1e-3, 1e-4):
                raise ValueError(
                    f"the projection {name}/{leaf} must be drawn as it was when the "
                    "adapter was saved: same feature map and width. Got another draw."
                )
            arrays[f"{name}/values/{leaf}"] = value
        arrays[f"{name}/key"] = np.asarray(draw["key"], np.uint32)
    return arrays


def _base_name(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in _WRAPPERS)


def _refuse(value: Any) -> None:
    raise ValueError(
        "an adapter's settings must be names and numbers to be saved; give activations "
        f"by name. Got {value!r}."
    )


def _describe_modules(model: nnx.Module) -> list[dict[str, Any]]:
    """The adapters around a base module and the replacements of one, outer ones first.

    ``at`` is the place in the base model. An adapter of a kind that is not listed is
    left out: such a file loads into a model that has the adapter already.
    """
    described = []
    for name, module in find_modules(model).items():
        spec = describe(module) if name else None
        if spec is not None:
            json.dumps(spec, default=_refuse)
            described.append({"at": _base_name(name)} | spec)
    return described


def _rebuild_modules(model: nnx.Module, specs: list[dict[str, Any]]) -> Any:
    present = find_modules(model)
    absent = sorted({spec["at"] for spec in specs} - present.keys())
    if absent:
        raise ValueError(
            f"base_model must have the modules {absent}. Got {list(present)[1:]}."
        )
    unknown = sorted({spec["kind"] for spec in specs} - KINDS.keys())
    if unknown:
        raise ValueError(
            f"adapter kinds must be among {', '.join(KINDS)}. Got {unknown}."
        )

    inner_first: dict[str, list[dict[str, Any]]] = {}
    for spec in reversed(specs):
        inner_first.setdefault(spec["at"], []).append(spec)

    def build(parts: tuple[Any, ...], node: Any) -> Any:
        if isinstance(node, nnx.Module):
            for spec in inner_first.get(path_name(parts), ()):
                try:
                    node = KINDS[spec["kind"]].build(node, spec)
                except (KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"the adapter at {spec['at']} must have the settings of its "
                        f"kind. Got {spec}: {type(error).__name__} {error}."
                    ) from error
        return node

    return nnx.recursive_map(build, model)
