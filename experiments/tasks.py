"""Builds what a run trains: the model of a config and the methods that adapt it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

import snnk_jax as snnk
from snnk_jax.models.vit import ViT, ViTConfig
from snnk_jax.models.vit_params import load_vit
from snnk_jax.nn import Adapted, AdapterParam

Rules = list[snnk.SwapRule]

HEAD = nnx.PathContains("head")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a model.

    Attributes:
      title: how tables call it.
      rules: surgery for a config and the width of the model.
      trainable: NNX filter of the variables that learn.
      trained: regular expression for the trained paths that are not adapter
        parameters, for :func:`snnk_jax.adapters.save_adapter`.
    """

    title: str
    rules: Callable[[ConfigDict, int], Rules]
    trainable: Any
    trained: str = "head/.*"

    def adapt(self, model: ViT, config: ConfigDict, rngs: nnx.Rngs) -> ViT:
        """Returns a clone of the model with this method's modules in place."""
        rules = self.rules(config, model.config.hidden_size)
        return snnk.swap_modules(model, rules, rngs=rngs)[0] if rules else model


HOULSBY_PLACES = r"blocks/\d+/(attention|mlp)"
PFEIFFER_PLACES = r"blocks/\d+/mlp"
LORA_PLACES = r"blocks/\d+/attention/(query|value)"


def _no_rules(config: ConfigDict, dim: int) -> Rules:
    return []


def _dtype(config: ConfigDict) -> str | None:
    """None computes in float32, the dtype of the parameters."""
    return None if config.model.dtype == "float32" else config.model.dtype


def _bottleneck(path: str, size: Callable[[ConfigDict, int], int]) -> Any:
    def rules(config: ConfigDict, dim: int) -> Rules:
        def build(module: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
            adapter = snnk.nn.BottleneckAdapter(
                dim, size(config, dim), dtype=_dtype(config), rngs=rngs
            )
            return Adapted(module, adapter)

        return [snnk.SwapRule(path=path, build=build)]

    return rules


def _configured_bottleneck(config: ConfigDict, dim: int) -> int:
    return config.adapter.bottleneck


def _slim_bottleneck(config: ConfigDict, dim: int) -> int:
    """The bottleneck that trains as many parameters as the SNNK adapter."""
    budget = (config.adapter.num_features + 1) * dim
    return max(1, round((budget - dim) / (2 * dim + 1)))


def _lora(config: ConfigDict, dim: int) -> Rules:
    def build(linear: nnx.Linear, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.LoRA(
            linear.in_features,
            config.adapter.lora_rank,
            linear.out_features,
            base_module=linear,
            lora_param_type=AdapterParam,
            dtype=_dtype(config),
            rngs=rngs,
        )

    return [snnk.SwapRule(path=LORA_PLACES, build=build)]


def _snnk(
    features: Callable[[ConfigDict], snnk.features.FeatureMap], factored: bool = False
) -> Any:
    def rules(config: ConfigDict, dim: int) -> Rules:
        def build(module: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
            adapter = snnk.nn.SNNKAdapter(
                dim,
                features=features(config),
                rank=config.adapter.factored_rank if factored else None,
                modulate=not factored,
                dtype=_dtype(config),
                rngs=rngs,
            )
            return Adapted(module, adapter)

        return [snnk.SwapRule(path=HOULSBY_PLACES, build=build)]

    return rules


def _factored_features(config: ConfigDict) -> snnk.features.FeatureMap:
    return snnk.features.ArcCosine(
        num_features=config.adapter.factored_features,
        projection=config.adapter.projection,
    )


def _projected(
    cls: type[snnk.features.FeatureMap], **fields: Any
) -> Callable[[ConfigDict], snnk.features.FeatureMap]:
    """A feature map of the config's size and projection.

    The adapter hands over unit vectors: at scale 1 the frequencies are N(0, 1).
    """

    def features(config: ConfigDict) -> snnk.features.FeatureMap:
        return cls(
            num_features=config.adapter.num_features,
            projection=config.adapter.projection,
            **fields,
        )

    return features


def _square_features(config: ConfigDict) -> snnk.features.FeatureMap:
    return snnk.features.Polynomial(
        coefficients=(1.0, 1.0, 1.0), num_features=config.adapter.num_features
    )


_ARC, _URF = snnk.features.ArcCosine, snnk.features.URF
_relu_features = _projected(_ARC)
_leaky_features = _projected(_ARC, negative_slope=0.1)
_cos_features = _projected(_URF, activation="cos", scale=1.0)
_gaussian_features = _projected(_URF, activation="gaussian", scale=1.0)
_exp_features = _projected(snnk.features.Exponential, scale=1.0)

_ADAPTER = nnx.Any(AdapterParam, HEAD)

METHODS: dict[str, Method] = {
    "linear_probe": Method("Linear probe", _no_rules, HEAD),
    "houlsby": Method(
        "Houlsby adapter", _bottleneck(HOULSBY_PLACES, _configured_bottleneck), _ADAPTER
    ),
    "houlsby_slim": Method(
        "Houlsby adapter, slim", _bottleneck(HOULSBY_PLACES, _slim_bottleneck), _ADAPTER
    ),
    "pfeiffer": Method(
        "Pfeiffer adapter",
        _bottleneck(PFEIFFER_PLACES, _configured_bottleneck),
        _ADAPTER,
    ),
    "lora": Method("LoRA (query, value)", _lora, _ADAPTER),
    "bitfit": Method(
        "BitFit",
        _no_rules,
        nnx.Any(nnx.All(nnx.Param, nnx.PathContains("bias")), HEAD),
        trained="head/.*|(.*/)?bias",
    ),
    "snnk_relu": Method("SNNK adapter, ReLU", _snnk(_relu_features), _ADAPTER),
    "snnk_cos": Method("SNNK adapter, cosine", _snnk(_cos_features), _ADAPTER),
    "snnk_factored": Method(
        "SNNK adapter, ReLU, factored", _snnk(_factored_features, True), _ADAPTER
    ),
    "snnk_leaky": Method("SNNK adapter, leaky ReLU", _snnk(_leaky_features), _ADAPTER),
    "snnk_gaussian": Method(
        "SNNK adapter, Gaussian", _snnk(_gaussian_features), _ADAPTER
    ),
    "snnk_exp": Method("SNNK adapter, positive", _snnk(_exp_features), _ADAPTER),
    "snnk_square": Method("SNNK adapter, quadratic", _snnk(_square_features), _ADAPTER),
    "full": Method("Full fine-tuning", _no_rules, nnx.Param, trained=".*"),
    "scratch": Method("From scratch", _no_rules, nnx.Param, trained=".*"),
}


def build_model(config: ConfigDict, num_classes: int, rngs: nnx.Rngs) -> ViT:
    """The model of ``config.model``, with a zero head of ``num_classes``."""
    options = config.model
    changes = {
        "image_size": options.image_size,
        "num_classes": num_classes,
        "dropout_rate": options.dropout_rate,
        "patch_dropout": options.patch_dropout,
        "remat": options.remat,
    }
    dtype = _dtype(config)
    if options.weights:
        return load_vit(options.weights, dtype=dtype, **changes)
    if options.preset:
        return ViT(ViTConfig.preset(options.preset, **changes), dtype=dtype, rngs=rngs)
    sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_dim", "pool")
    sized = ViTConfig(**{name: options[name] for name in sizes}, **changes)
    return ViT(sized, dtype=dtype, rngs=rngs)
