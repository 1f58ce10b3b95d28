r"""Adapter files: small, hashed, refusing the wrong base.

A file is one safetensors file. It holds the trained arrays under their paths, and in
its header a JSON record: the adapter modules and where they stand, modules that stand
in place of one of the base (an SNNK pooler, a merged head), the random projections
(the key and the name of the pinned generator, or the values where they are not what
the key draws), the fingerprint of the base model, and a SHA-256 over all of it.
Nothing in it is executed.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax import projections
from snnk_jax._arguments import check_pattern
from snnk_jax._files import check_metadata, read_record, write_record
from snnk_jax.adapters._draws import describe_draw, drawn_arrays
from snnk_jax.adapters._fingerprint import FOREIGN, base_name, fingerprint, held
from snnk_jax.adapters._kinds import KINDS, describe
from snnk_jax.nn import AdapterParam, Drawn, InputStatistic, RandomProjection
from snnk_jax.surgery import find_modules, path_name

_FORMAT = "snnk_jax.adapter.1"


def save_adapter(
    path: str | os.PathLike[str],
    model: nnx.Module,
    *,
    base_fingerprint: str,
    trained: str | None = None,
    exclude: str = "head/.*",
    metadata: dict[str, str] | None = None,
) -> int:
    """Writes adapters, head and projections of a model to one file, atomically.

    All that the base model has too must be left as it was, or be named: what differs
    and would not be in the file is refused.

    Args:
      path: the file.
      model: a model with adapters.
      base_fingerprint: :func:`fingerprint` of the base model, taken before training.
      trained: regular expression for the paths, in the base model, of parameters
        besides :class:`~snnk_jax.nn.AdapterParam` that were trained and belong to the
        file: the head, or the biases for BitFit. None takes ``exclude``. Those of an
        :class:`~snnk_jax.nn.SNNKPooler` or another :class:`~snnk_jax.nn.SNNKDense` in
        place of a module of the base always do.
      exclude: what ``base_fingerprint`` leaves out, at least all that ``trained`` names
        and all that was replaced: with a replaced pooler ``"(pooler|head)/.*"``. The
        rest is checked against ``base_fingerprint``, unless there is none: a head that
        was trained alone may be saved alone.
      metadata: strings of your own, returned by :func:`read_metadata`.

    Returns:
      The size of the file in bytes.

    Raises:
      ValueError: if nothing is to be saved; ``trained`` matches nothing, or leaves out
        what ``exclude`` matches; ``exclude`` does not match all that is trained and
        replaced; the rest is not that of the base; an array is not finite; settings of
        an adapter are no names and numbers, or ``metadata`` no strings. Adapters of
        classes that are not of this package are saved, but must be in the model
        already when the file is loaded.

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
    for what, pattern in (("exclude", exclude), ("trained", trained)):
        if pattern is not None:
            check_pattern(what, pattern)
    mark: Any = base_fingerprint
    if not isinstance(mark, str) or not re.fullmatch("[0-9a-f]{64}", mark):
        raise ValueError(
            "base_fingerprint must be what snnk_jax.adapters.fingerprint returns. "
            f"Got {base_fingerprint!r}."
        )
    check_metadata(metadata)
    modules = describe_modules(model)
    json.dumps(modules, default=_refuse)
    arrays = _trained_arrays(model, modules, base_fingerprint, trained, exclude)
    for parts, variable in nnx.to_flat_state(nnx.state(model, InputStatistic)):
        arrays[path_name(parts)] = np.asarray(variable[...])
    drawn = {}
    for name, projection in find_modules(model).items():
        if isinstance(projection, Drawn):
            values = {k: np.asarray(v[...]) for k, v in projection.values.items()}
            record = describe_draw(projection, values)
            if record is None:
                # Trained values are among the arrays already.
                arrays |= {f"{name}/values/{k}": v for k, v in values.items()}
                arrays[f"{name}/key"] = np.asarray(projection.key[...])
            else:
                drawn[name] = record
    for name, array in arrays.items():
        if not np.all(np.isfinite(np.asarray(array, np.float64))):
            raise ValueError(f"{name} must be finite to be saved. Got inf or NaN.")
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
        that has the same adapters with the same settings already (after
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
    if jax.tree.leaves(nnx.state(model, AdapterParam)):
        _check_settings(model, record["modules"])
    else:
        numbers = sum(array.size for array in arrays.values())
        model = _rebuild_modules(model, record["modules"], numbers)
    model = _make_room(model, arrays, base["exclude"])
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    names = {path_name(parts): parts for parts in flat}
    statistics = {n for n, p in names.items() if isinstance(flat[p], InputStatistic)}
    misshapen = [
        f"{name} {stored} instead of {own}"
        for name in sorted(arrays.keys() & names.keys())
        for stored, own in (
            (arrays[name].shape, flat[names[name]].shape),
            (arrays[name].dtype, flat[names[name]].dtype),
        )
        # Adapters in bfloat16 had statistics of that dtype at first.
        if stored != own and not (name in statistics and stored == jnp.bfloat16)
    ]
    # Not before the sizes are known to be those of the stored arrays.
    arrays = arrays | ({} if misshapen else drawn_arrays(model, record))
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
            "base_model must have the places, shapes and dtypes of the file. Got "
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
    record, arrays = read_record(path, "adapter", "save_adapter", _FORMAT)
    kinds = {
        **{"modules": list, "projections": dict, "generator": str},
        **{"base": dict, "metadata": dict},
    }
    wrong = [k for k, kind in kinds.items() if not isinstance(record.get(k), kind)]
    if not wrong:
        base, modules = record["base"], record["modules"]
        draws = record["projections"].values()
        parts = {
            "base": _all_strings(base, "fingerprint", "exclude") and _compiles(base),
            "modules": all(_all_strings(module, "at", "kind") for module in modules),
            "projections": all(_is_draw(draw) for draw in draws),
        }
        wrong = [name for name, whole in parts.items() if not whole]
    if wrong:
        raise ValueError(
            f"adapter must have a whole record. Got {path} with other {wrong}."
        )
    return record, arrays


def _all_strings(part: Any, *names: str) -> bool:
    return isinstance(part, dict) and all(isinstance(part.get(n), str) for n in names)


def _compiles(base: dict[str, str]) -> bool:
    try:
        re.compile(base["exclude"])
    except re.error:
        return False
    return True


def _is_draw(draw: Any) -> bool:
    if not isinstance(draw, dict) or not isinstance(draw.get("probes"), dict):
        return False
    words = draw.get("key")
    return (
        isinstance(words, list)
        and len(words) == 2
        and all(isinstance(word, int) and 0 <= word < 2**32 for word in words)
    )


def _trained_arrays(
    model: nnx.Module,
    modules: list[dict[str, Any]],
    base_fingerprint: str,
    trained: str | None,
    exclude: str,
) -> dict[str, np.ndarray]:
    """What a file must hold besides projections; refuses what it would lose."""
    pattern = exclude if trained is None else trained
    places = [base_name(m["at"]) for m in modules if KINDS[m["kind"]].replaces]
    replaced = tuple(f"{place}/" for place in places)
    arrays, lost = {}, []
    named, alone = False, True
    # What may differ from the base must be left out of its fingerprint.
    uncovered = [p for p in places if not re.fullmatch(exclude, f"{p}/kernel")]
    for name, variable in held(model):
        if isinstance(variable, FOREIGN):
            if isinstance(variable, AdapterParam):
                arrays[name] = np.asarray(variable[...])
            continue
        plain = base_name(name)
        excluded = re.fullmatch(exclude, plain) is not None
        matches = re.fullmatch(pattern, plain) is not None
        named |= matches
        alone &= excluded
        if matches or plain.startswith(replaced):
            arrays[name] = np.asarray(variable[...])
            if not excluded:
                uncovered.append(name)
        elif excluded:
            lost.append(name)
    if not arrays:
        raise ValueError(
            f"model must have AdapterParam or parameters matching {pattern!r}. "
            "Got none."
        )
    if trained is not None and not named:
        raise ValueError(
            f"trained must match parameters of the model. Got {trained!r}, which "
            "matches none."
        )
    if lost:
        raise ValueError(
            f"trained must match all that exclude leaves out of the fingerprint, or "
            f"the file would lose it. Got {pattern!r}, without {lost}."
        )
    if uncovered:
        raise ValueError(
            "exclude must match all that trained names and all that was replaced, here "
            "and for the fingerprint: the rest is compared with the base. Got "
            f"{exclude!r}, without {uncovered}."
        )
    found = base_fingerprint if alone else fingerprint(model, exclude=exclude)
    if found != base_fingerprint:
        raise ValueError(
            "model must have the parameters of the base but for adapters and what "
            f"exclude matches, {exclude!r}: fingerprint {base_fingerprint}. Got "
            f"{found}: what else was trained (a head of another name, biases, LoRA "
            "without lora_param_type=AdapterParam) must be named in exclude, here and "
            "for the fingerprint."
        )
    return arrays


def _make_room(model: Any, arrays: dict[str, np.ndarray], exclude: str) -> Any:
    """Gives modules of a clone the leaves, sizes and dtypes of the file.

    Calibrated projections have other leaves than the map draws, and a head, which
    belongs to the task, as many outputs as the task.
    """

    def visit(parts: tuple[Any, ...], node: Any) -> Any:
        if isinstance(node, nnx.Linear):
            name = f"{path_name(parts)}/kernel"
            kernel = arrays.get(name, np.zeros(0))
            fits = kernel.ndim == 2 and len(kernel) == node.in_features
            if fits and re.fullmatch(exclude, base_name(name)):
                node.out_features = kernel.shape[1]
                node.param_dtype = kernel.dtype
                bias = arrays.get(f"{path_name(parts)}/bias", kernel)
                own_leaves: Any = (
                    (node.kernel, kernel.shape, kernel.dtype),
                    (node.bias, kernel.shape[1:], bias.dtype),
                )
                for own, shape, dtype in own_leaves:
                    if own is not None:
                        own.set_value(jax.ShapeDtypeStruct(shape, dtype))
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


def _refuse(value: Any) -> None:
    raise ValueError(
        "an adapter's settings must be names and numbers to be saved; give activations "
        f"by name. Got {value!r}."
    )


def describe_modules(model: nnx.Module) -> list[dict[str, Any]]:
    """The adapters around a base module and the replacements of one, outer ones first.

    ``at`` is the place in the base model. An adapter of a kind that is not listed is
    left out: such a file loads into a model that has the adapter already.
    """
    found = {name: describe(module) for name, module in find_modules(model).items()}
    specs = {name: spec for name, spec in found.items() if spec is not None}
    return [{"at": _place(name, specs)} | spec for name, spec in specs.items() if name]


def _place(name: str, specs: Mapping[str, Any]) -> str:
    """A path without the ``base_module`` of adapters; a base may have such a part."""
    parts = name.split("/")
    wrapped = ("/".join(parts[:i]) in specs for i in range(len(parts)))
    return "/".join(
        part
        for part, inside in zip(parts, wrapped, strict=True)
        if not (inside and part == "base_module")
    )


def _check_settings(model: nnx.Module, specs: list[dict[str, Any]]) -> None:
    """Refuses a model whose adapters are others than those of a file."""
    found = json.loads(json.dumps(describe_modules(model)))
    # Files of before name no base_module of the base either.
    places = [[base_name(spec["at"]) for spec in each] for each in (found, specs)]
    if places[0] != places[1]:
        raise ValueError(
            "base_model must have the adapters of the file, or none. Got some at "
            f"{places[0]} instead of {places[1]}."
        )
    for own, spec in zip(found, specs, strict=True):
        # Files of before a setting existed do not name it.
        other = {
            k: (own.get(k), v) for k, v in spec.items() if k != "at" and own.get(k) != v
        }
        if other:
            raise ValueError(
                f"the adapter at {spec['at']} must have the settings of the file. Got "
                f"(own, file) values {other}."
            )


def _rebuild_modules(
    model: nnx.Module, specs: list[dict[str, Any]], numbers: int
) -> Any:
    """Puts adapters around the modules of a base, none of a rank above ``numbers``."""
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
                rank = spec.get("rank")
                if isinstance(rank, int) and rank > numbers:
                    raise ValueError(
                        f"the adapter at {spec['at']} must have a rank of at most the "
                        f"{numbers} numbers of the file. Got {rank}."
                    )
                try:
                    node = KINDS[spec["kind"]].build(node, spec)
                except (KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"the adapter at {spec['at']} must have the settings of its "
                        f"kind. Got {spec}: {type(error).__name__} {error}."
                    ) from error
        return node

    return nnx.recursive_map(build, model)
