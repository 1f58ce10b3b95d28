"""What an adapter file may rebuild: kinds of adapters, described by names and numbers.

The values come from the file's arrays. Modules that stand on their own are built as
shapes alone, those that read the weights around which they stand from a fixed stream;
their rank is at most the count of numbers in the file.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from snnk_jax import activations
from snnk_jax import features as features_lib
from snnk_jax.nn import (
    Adapted,
    AdapterParam,
    BottleneckAdapter,
    DoRA,
    MergedPooler,
    Scaled,
    SNNKAdapter,
    SNNKDense,
    SNNKMlp,
    SNNKPooler,
    VeRA,
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
      cls: its class.
      describe: its settings, as what JSON can hold.
      build: puts one of these settings around a base module.
      replaces: whether it stands in the place of the base module, which is gone.
    """

    cls: type
    describe: Callable[[Any], dict[str, Any]]
    build: Callable[[Any, dict[str, Any]], nnx.Module]
    replaces: bool = False


def describe(module: nnx.Module) -> dict[str, Any] | None:
    """The kind and the settings of an adapter or a replacement; None for others."""
    for name, kind in KINDS.items():
        if kind.replaces and type(module) is kind.cls:
            return {"kind": name} | kind.describe(module)
    if getattr(module, "base_module", None) is None:
        return None
    # A subclass may compute something else.
    adapter = module.adapter if type(module) is Adapted else module
    if isinstance(adapter, nnx.LoRA) and not isinstance(adapter.lora_a, AdapterParam):
        return None  # a part of the base
    for name, kind in KINDS.items():
        if type(adapter) is kind.cls:
            spec = {"kind": name} | kind.describe(adapter)
            if type(module) is Adapted:
                spec["parallel"] = module.parallel
            return spec
    return None


def describe_features(fm: features_lib.FeatureMap) -> dict[str, Any]:
    fields = {
        f.name: _describe_field(getattr(fm, f.name))
        for f in dataclasses.fields(fm)
        if f.init
    }
    name = type(fm).__name__
    # A map of one's own may have the name of one of ours.
    if getattr(features_lib, name, type(fm)) is not type(fm):
        name = f"custom:{name}"
    return {"kind": name, "fields": fields}


def _describe_field(value: Any) -> Any:
    """A feature map in a field as its description, alone or in a tuple."""
    if isinstance(value, features_lib.FeatureMap):
        return describe_features(value)
    if isinstance(value, tuple):
        return [_describe_field(item) for item in value]
    return value


def build_features(spec: dict[str, Any]) -> features_lib.FeatureMap:
    kind = getattr(features_lib, str(spec["kind"]), None)
    if not (isinstance(kind, type) and issubclass(kind, features_lib.FeatureMap)):
        raise ValueError(f"features must be a known feature map. Got {spec['kind']!r}.")
    return kind(**{name: _build_field(v) for name, v in spec["fields"].items()})


def _build_field(value: Any) -> Any:
    if isinstance(value, dict):
        return build_features(value)
    if isinstance(value, list):
        return tuple(_build_field(item) for item in value)
    return value


def _dtypes(module: Any) -> dict[str, str | None]:
    dtype = None if module.dtype is None else jnp.dtype(module.dtype).name
    return {"dtype": dtype, "param_dtype": jnp.dtype(module.param_dtype).name}


def _param_dtype(module: Any) -> dict[str, str]:
    return {"param_dtype": jnp.dtype(module.param_dtype).name}


def _describe_snnk(adapter: SNNKAdapter) -> dict[str, Any]:
    return {
        "dim": adapter.dim,
        "features": describe_features(adapter.projection.features),
        "normalize": adapter.normalize,
        "standardize": adapter.standardize,
        "rank": adapter.rank,
        "modulate": adapter.modulate,
        "train_projection": adapter.projection.trainable,
        **_dtypes(adapter),
    }


def _shapes_of(build: Callable[[dict[str, Any]], nnx.Module]) -> Any:
    """Builds one module of each spec as shapes, and returns copies of it.

    A file holds dozens of adapters with the same settings. Drawing each of them only to
    overwrite it takes most of the time of a load.
    """

    @functools.lru_cache(maxsize=64)
    def shapes(spec: str) -> nnx.Module:
        return nnx.eval_shape(lambda: build(json.loads(spec)))

    return lambda spec: nnx.clone(shapes(json.dumps(spec, sort_keys=True)))


@_shapes_of
def _snnk_shapes(spec: dict[str, Any]) -> nnx.Module:
    names = ("normalize", "rank", "modulate", "train_projection", *_DTYPES)
    # Files written before the field existed have no such adapters.
    options = {name: spec[name] for name in names} | {
        "standardize": spec.get("standardize", False)
    }
    return SNNKAdapter(
        spec["dim"],
        features=build_features(spec["features"]),
        rngs=nnx.Rngs(0),
        **options,
    )


def _build_snnk(base: Any, spec: dict[str, Any]) -> nnx.Module:
    return Adapted(base, _snnk_shapes(_own(spec)), parallel=spec["parallel"])


def _own(spec: dict[str, Any]) -> dict[str, Any]:
    """The settings of an adapter without its place."""
    return {k: v for k, v in spec.items() if k not in ("at", "parallel")}


def _describe_bottleneck(adapter: BottleneckAdapter) -> dict[str, Any]:
    activation = adapter.activation
    name = activation.name
    return {
        "dim": adapter.dim,
        "bottleneck": adapter.bottleneck,
        # The row itself, which JSON refuses, where the name stands for another one.
        "activation": name if _is_named(activation) else activation,
        "scale": adapter.scale,
        **_dtypes(adapter),
    }


def _is_named(activation: activations.Activation) -> bool:
    name = activation.name
    return name in activations.names() and activations.get(name) == activation


@_shapes_of
def _bottleneck_shapes(spec: dict[str, Any]) -> nnx.Module:
    options = {name: spec[name] for name in ("activation", "scale", *_DTYPES)}
    return BottleneckAdapter(
        spec["dim"], spec["bottleneck"], rngs=nnx.Rngs(0), **options
    )


def _build_bottleneck(base: Any, spec: dict[str, Any]) -> nnx.Module:
    return Adapted(base, _bottleneck_shapes(_own(spec)), parallel=spec["parallel"])


def _describe_lora(adapter: nnx.LoRA) -> dict[str, Any]:
    return {
        "in_features": adapter.in_features,
        "lora_rank": adapter.lora_a.shape[1],
        "out_features": adapter.out_features,
        **_dtypes(adapter),
    }


@_shapes_of
def _lora_shapes(spec: dict[str, Any]) -> nnx.Module:
    return nnx.LoRA(
        spec["in_features"],
        spec["lora_rank"],
        spec["out_features"],
        lora_param_type=AdapterParam,
        # As they are spelt by whoever makes one: equal layers compile once.
        dtype=spec["dtype"] and getattr(jnp, spec["dtype"]),
        param_dtype=getattr(jnp, spec["param_dtype"]),
        rngs=nnx.Rngs(0),
    )


def _build_lora(base: Any, spec: dict[str, Any]) -> nnx.Module:
    adapter = _lora_shapes(_own(spec))
    adapter.base_module = nnx.data(base)
    return adapter


def _describe_ranked(adapter: DoRA | VeRA) -> dict[str, Any]:
    return {"rank": adapter.rank, **_param_dtype(adapter)}


def _build_dora(base: Any, spec: dict[str, Any]) -> nnx.Module:
    dtype = spec["param_dtype"]
    return DoRA(base, spec["rank"], param_dtype=dtype, rngs=nnx.Rngs(0))


def _build_vera(base: Any, spec: dict[str, Any]) -> nnx.Module:
    dtype = spec["param_dtype"]
    return VeRA(base, spec["rank"], param_dtype=dtype, rngs=nnx.Rngs(0))


def _describe_scaled(adapter: Scaled) -> dict[str, Any]:
    return {"where": adapter.where, **_param_dtype(adapter)}


def _build_scaled(base: Any, spec: dict[str, Any]) -> nnx.Module:
    return Scaled(base, spec["where"], param_dtype=spec["param_dtype"])


def _describe_dense(layer: SNNKDense) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "features": describe_features(layer.projection.features),
        "use_bias": layer.bias is not None,
        "dtype": None if layer.dtype is None else jnp.dtype(layer.dtype).name,
        "param_dtype": jnp.dtype(layer.readout.dtype).name,
    }


@_shapes_of
def _dense_shapes(spec: dict[str, Any]) -> nnx.Module:
    return _DENSE[spec["kind"]](
        spec["in_features"],
        spec["out_features"],
        features=build_features(spec["features"]),
        use_bias=spec["use_bias"],
        dtype=spec["dtype"],
        param_dtype=spec["param_dtype"],
        rngs=nnx.Rngs(0),
    )


def _build_dense(base: Any, spec: dict[str, Any]) -> nnx.Module:
    return _dense_shapes(_own(spec))


_DTYPES = ("dtype", "param_dtype")
_DENSE = {"SNNKDense": SNNKDense, "SNNKMlp": SNNKMlp, "SNNKPooler": SNNKPooler}

KINDS: dict[str, Kind] = {
    "SNNKAdapter": Kind(SNNKAdapter, _describe_snnk, _build_snnk),
    "BottleneckAdapter": Kind(
        BottleneckAdapter, _describe_bottleneck, _build_bottleneck
    ),
    "LoRA": Kind(nnx.LoRA, _describe_lora, _build_lora),
    "DoRA": Kind(DoRA, _describe_ranked, _build_dora),
    "VeRA": Kind(VeRA, _describe_ranked, _build_vera),
    "Scaled": Kind(Scaled, _describe_scaled, _build_scaled),
    **{
        name: Kind(cls, _describe_dense, _build_dense, replaces=True)
        for name, cls in _DENSE.items()
    },
    "MergedPooler": Kind(
        MergedPooler, lambda module: {}, lambda base, spec: MergedPooler(), True
    ),
}
