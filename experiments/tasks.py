"""Builds what a run trains: the model of a config and the methods that adapt it."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

import snnk_jax as snnk
from snnk_jax.models.bert import Bert, BertConfig
from snnk_jax.models.vit import ViT, ViTConfig
from snnk_jax.nn import HEAD, Adapted, AdapterParam

Rules = list[snnk.SwapRule]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a model.

    Attributes:
      title: how tables call it.
      rules: surgery for a config and the width of the model.
      trainable: NNX filter of the variables that learn.
      trained: regular expression for the trained paths that are not adapter
        parameters, for :func:`snnk_jax.adapters.save_adapter`.
      standardize: whether adapters want to know the scales of their inputs, see
        :func:`snnk_jax.nn.standardize`.
      fresh: start from new weights, each seed from its own.
    """

    title: str
    rules: Callable[[ConfigDict, int], Rules]
    trainable: Any
    trained: str = "head/.*"
    standardize: bool = False
    fresh: bool = False

    @property
    def plain(self) -> bool:
        """Whether the model keeps its modules."""
        return self.rules is _no_rules

    def adapt(self, model: Any, config: ConfigDict, rngs: nnx.Rngs) -> Any:
        """Returns a clone of the model with this method's modules in place."""
        rules = self.rules(config, model.config.hidden_size)
        return snnk.swap_modules(model, rules, rngs=rngs)[0] if rules else model


HOULSBY_PLACES = r"blocks/\d+/(attention|mlp)"
PFEIFFER_PLACES = r"blocks/\d+/mlp"
BLOCK_PLACES = r"blocks/\d+"
LORA_PLACES = r"blocks/\d+/attention/(query|value)"


def _no_rules(config: ConfigDict, dim: int) -> Rules:
    return []


def _dtype(config: ConfigDict) -> str | None:
    """None computes in float32, the dtype of the parameters."""
    return None if config.model.dtype == "float32" else config.model.dtype


def _bottleneck(
    path: str,
    size: Callable[[ConfigDict, int], int],
    parallel: bool = False,
    **fields: Any,
) -> Any:
    def rules(config: ConfigDict, dim: int) -> Rules:
        def build(module: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
            adapter = snnk.nn.BottleneckAdapter(
                dim, size(config, dim), dtype=_dtype(config), rngs=rngs, **fields
            )
            return Adapted(module, adapter, parallel=parallel)

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


def _dora(config: ConfigDict, dim: int) -> Rules:
    def build(linear: nnx.Linear, rngs: nnx.Rngs) -> nnx.Module:
        return snnk.nn.DoRA(linear, config.adapter.lora_rank, rngs=rngs)

    return [snnk.SwapRule(path=LORA_PLACES, build=build)]


def _vera(config: ConfigDict, dim: int) -> Rules:
    def build(linear: nnx.Linear, rngs: nnx.Rngs) -> nnx.Module:
        return snnk.nn.VeRA(linear, config.adapter.vera_rank, rngs=rngs)

    return [snnk.SwapRule(path=LORA_PLACES, build=build)]


def _ia3(config: ConfigDict, dim: int) -> Rules:
    return [
        snnk.SwapRule(
            path=r"blocks/\d+/attention/(key|value)",
            build=lambda linear, rngs: snnk.nn.Scaled(linear, "output"),
        ),
        snnk.SwapRule(
            path=r"blocks/\d+/mlp/fc2",
            build=lambda linear, rngs: snnk.nn.Scaled(linear, "input"),
        ),
    ]


def _in_layer_norm(path: tuple[Any, ...], value: Any) -> bool:
    named = any(str(part).startswith("norm") for part in path)
    return named and issubclass(getattr(value, "type", type(value)), nnx.Param)


def _snnk(
    features: Callable[[ConfigDict], snnk.features.FeatureMap],
    rank: Callable[[ConfigDict], int] | None = None,
    path: str = HOULSBY_PLACES,
    parallel: bool = False,
    **fields: Any,
) -> Any:
    def rules(config: ConfigDict, dim: int) -> Rules:
        def build(module: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
            adapter = snnk.nn.SNNKAdapter(
                dim,
                features=features(config),
                rank=rank(config) if rank else None,
                modulate=rank is None,
                dtype=_dtype(config),
                rngs=rngs,
                **fields,
            )
            return Adapted(module, adapter, parallel=parallel)

        return [snnk.SwapRule(path=path, build=build)]

    return rules


def _relu(field: str) -> Callable[[ConfigDict], snnk.features.FeatureMap]:
    """As many ReLU features as ``config.adapter.FIELD`` says."""

    def features(config: ConfigDict) -> snnk.features.FeatureMap:
        return snnk.features.ArcCosine(
            num_features=config.adapter[field], projection=config.adapter.projection
        )

    return features


def _factored_rank(config: ConfigDict) -> int:
    return config.adapter.factored_rank


def _small_rank(config: ConfigDict) -> int:
    return config.adapter.small_rank


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
_relu_features = _relu("num_features")
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
    "adaptformer": Method(
        "AdaptFormer",
        _bottleneck(
            *(PFEIFFER_PLACES, _configured_bottleneck, True),
            activation="relu",
            scale=0.1,
        ),
        _ADAPTER,
    ),
    "lora": Method("LoRA (query, value)", _lora, _ADAPTER),
    "dora": Method("DoRA (query, value)", _dora, _ADAPTER),
    "vera": Method("VeRA (query, value)", _vera, _ADAPTER),
    "ia3": Method("IA3", _ia3, _ADAPTER),
    "bitfit": Method(
        "BitFit",
        _no_rules,
        nnx.Any(nnx.All(nnx.Param, nnx.PathContains("bias")), HEAD),
        trained="head/.*|(.*/)?bias",
    ),
    "layer_norm": Method(
        "LayerNorm tuning",
        _no_rules,
        nnx.Any(_in_layer_norm, HEAD),
        trained=r"head/.*|(.*/)?norm\d?/.*",
    ),
    "snnk_relu": Method("SNNK adapter, ReLU", _snnk(_relu_features), _ADAPTER),
    "snnk_cos": Method("SNNK adapter, cosine", _snnk(_cos_features), _ADAPTER),
    "snnk_factored": Method(
        "SNNK adapter, ReLU, factored",
        _snnk(_relu("factored_features"), _factored_rank),
        _ADAPTER,
    ),
    "snnk_standard": Method(
        "SNNK adapter, ReLU, standardised",
        _snnk(_relu_features, standardize=True),
        _ADAPTER,
        standardize=True,
    ),
    "snnk_wide": Method(
        "SNNK adapter, ReLU, standardised, wide and factored",
        _snnk(_relu("wide_features"), _factored_rank, standardize=True),
        _ADAPTER,
        standardize=True,
    ),
    "snnk_small": Method(
        "SNNK adapter, ReLU, standardised, factored, small",
        _snnk(_relu("factored_features"), _small_rank, standardize=True),
        _ADAPTER,
        standardize=True,
    ),
    "snnk_leaky": Method("SNNK adapter, leaky ReLU", _snnk(_leaky_features), _ADAPTER),
    "snnk_gaussian": Method(
        "SNNK adapter, Gaussian", _snnk(_gaussian_features), _ADAPTER
    ),
    "snnk_exp": Method("SNNK adapter, positive", _snnk(_exp_features), _ADAPTER),
    "snnk_square": Method("SNNK adapter, quadratic", _snnk(_square_features), _ADAPTER),
    "snnk_pfeiffer": Method(
        "SNNK adapter, ReLU, after the FFN",
        _snnk(_relu_features, path=PFEIFFER_PLACES),
        _ADAPTER,
    ),
    "snnk_parallel": Method(
        "SNNK adapter, ReLU, parallel",
        _snnk(_relu_features, path=HOULSBY_PLACES, parallel=True),
        _ADAPTER,
    ),
    "snnk_block": Method(
        "SNNK adapter, ReLU, after the block",
        _snnk(_relu_features, path=BLOCK_PLACES),
        _ADAPTER,
    ),
    "snnk_trained": Method(
        "SNNK adapter, ReLU, trained projection",
        _snnk(_relu("trained_features"), train_projection=True),
        _ADAPTER,
    ),
    "snnk_trained_small": Method(
        "SNNK adapter, ReLU, trained projection, small",
        _snnk(_relu("small_trained_features"), train_projection=True),
        _ADAPTER,
    ),
    "full": Method("Full fine-tuning", _no_rules, nnx.Param, trained=".*"),
    "scratch": Method("From scratch", _no_rules, nnx.Param, trained=".*", fresh=True),
}


def weights_path(spec: str) -> str:
    """A path, or ``package:NAME/FOLDER`` inside of an installed package.

    Raises:
      FileNotFoundError: if there is no such package; says how to get it.
    """
    if not spec.startswith("package:"):
        return spec
    name, _, folder = spec.removeprefix("package:").partition("/")
    try:
        found = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):  # of a package inside another, or ""
        found = None
    if found is None or found.origin is None:
        raise FileNotFoundError(
            f"config.model.weights must name an installed package. Got {spec!r}: pip "
            f"install --no-deps {name.replace('_', '-')}"
        )
    return str(pathlib.Path(found.origin).parent / folder)


def build_model(config: ConfigDict, num_classes: int, rngs: nnx.Rngs) -> Any:
    """The model of ``config.model``, with ``num_classes`` outputs.

    The head is new, but for a ViT whose weights have one of that size.
    """
    if config.model.family == "bert":
        return _build_bert(config, num_classes, rngs)
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
        return ViT.from_pretrained(
            weights_path(options.weights), dtype=dtype, **changes
        )
    if options.preset:
        return ViT(ViTConfig.preset(options.preset, **changes), dtype=dtype, rngs=rngs)
    sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_dim", "pool")
    sized = ViTConfig(**{name: options[name] for name in sizes}, **changes)
    return ViT(sized, dtype=dtype, rngs=rngs)


def _build_bert(config: ConfigDict, num_outputs: int, rngs: nnx.Rngs) -> Bert:
    options = config.model
    changes = {
        "pool": options.pool,
        "head": "linear",
        "num_outputs": num_outputs,
        "dropout_rate": options.dropout_rate,
        "attention_dropout_rate": options.dropout_rate,
        "remat": options.remat,
    }
    dtype = _dtype(config)
    if options.weights:
        bert = Bert.from_pretrained(
            weights_path(options.weights), dtype=dtype, **changes
        )
        # A classifier of as many outputs may be that of another task.
        nnx.update(bert, jax.tree.map(jnp.zeros_like, nnx.state(bert, HEAD)))
        return bert
    changes |= {"vocab_size": options.vocab_size, "max_length": config.data.length}
    if options.preset:
        sizes = BertConfig.preset(options.preset, **changes)
    else:
        names = ("hidden_size", "depth", "num_heads", "mlp_dim")
        sizes = BertConfig(**{name: options[name] for name in names}, **changes)
    return Bert(sizes, dtype=dtype, rngs=rngs)
