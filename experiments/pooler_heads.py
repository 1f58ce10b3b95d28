"""Heads of a frozen encoder: poolers and classifiers, dense, as SNNKs, and merged."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import snnk_jax as snnk
from experiments.pooler_states import States
from snnk_jax.features import URF, ArcCosine, FeatureMap
from snnk_jax.nn import MergedPooler, SNNKMlp, SNNKPooler


class DensePooler(nnx.Module):
    """``tanh`` of a linear map, like that of a BERT, of any width."""

    def __init__(self, dim: int, width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.dense = nnx.Linear(dim, width, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(x))


class Head(nnx.Module):
    """A pooler and a classifier, under the names that they have in a BERT."""

    def __init__(self, pooler: nnx.Module, head: nnx.Module):
        self.pooler = pooler
        self.head = head

    def __call__(self, x: jax.Array) -> jax.Array:
        pooler: Any = self.pooler
        head: Any = self.head
        return head(pooler(x))


def dense_head(dim: int, width: int, outputs: int, rngs: nnx.Rngs) -> Head:
    """A dense pooler and a zero classifier."""
    return Head(DensePooler(dim, width, rngs=rngs), _classifier(width, outputs, rngs))


def _classifier(dim: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    zeros = nnx.initializers.zeros_init()
    return nnx.Linear(dim, outputs, kernel_init=zeros, rngs=rngs)


def feature_map(kind: str, config: Any, states: States) -> FeatureMap:
    """Features of states at norm one: ``tanh`` and ``cos`` by URF, ``relu``.

    The linear part of tanh takes a column for every input, so it has the many features.
    """
    sizes = config.pooler
    small = sizes.num_features if kind in ("cos", "relu") else sizes.merged_features
    return _map_of(kind, small, sizes.scale / states.norm)


def merged_map(kind: str, config: Any, states: States) -> FeatureMap:
    """The features of merged heads and of closed forms, many of any kind."""
    sizes = config.pooler
    return _map_of(kind, sizes.merged_features, sizes.scale / states.norm)


def _map_of(kind: str, num_features: int, scale: float) -> FeatureMap:
    if kind == "relu":
        return ArcCosine(num_features=num_features)
    return URF(activation=kind, num_features=num_features, scale=scale)


@dataclasses.dataclass(frozen=True)
class Method:
    """A head.

    Attributes:
      title: how tables call it.
      build: ``build(config, states, source, rngs)`` makes it; ``source`` is a dense
        head, trained where one is asked for.
      source: ``"none"``; ``"pooler"``, the pretrained pooler, or the trained dense head
        where there is none; ``"head"``, the trained dense head.
      ridge: the features of a head in closed form, None for one that is trained.
    """

    title: str
    build: Callable[[Any, States, Head, nnx.Rngs], Any] | None = None
    source: str = "none"
    ridge: str | None = None


def _dense(config: Any, states: States, source: Head, rngs: nnx.Rngs) -> Head:
    return source


def _linear(config: Any, states: States, source: Head, rngs: nnx.Rngs) -> Head:
    return Head(MergedPooler(), _classifier(states.dim, states.classes, rngs))


def _narrow(budget: Callable[[Any, States], int]) -> Any:
    """The dense pooler whose trained parameters are next to a budget."""

    def build(config: Any, states: States, source: Head, rngs: nnx.Rngs) -> Head:
        each = states.dim + 1 + states.classes
        width = max(1, round((budget(config, states) - states.classes) / each))
        return dense_head(states.dim, width, states.classes, rngs)

    return build


def _pooler_budget(config: Any, states: States) -> int:
    """Trained parameters of an SNNK pooler and its classifier."""
    d, o = states.dim, states.classes
    return config.pooler.num_features * d + d + d * o + o


def _merged_budget(config: Any, states: States) -> int:
    return (config.pooler.merged_features + 1) * states.classes


def _pooler(kind: str, init: str) -> Any:
    def build(config: Any, states: States, source: Head, rngs: nnx.Rngs) -> Head:
        return _with_pooler(
            source, feature_map(kind, config, states), init, states, rngs
        )

    return build


def _with_pooler(
    source: Head, features: FeatureMap, init: Any, states: States, rngs: nnx.Rngs
) -> Head:
    x = None if init == "random" else jnp.asarray(states.x["train"][:4096])
    if init == "psi" and not isinstance(features, URF):
        x = None
    rule = snnk.SwapRule(
        path="pooler",
        build=lambda pooler, rngs: SNNKPooler.from_pooler(
            pooler, features=features, init=init, x=x, rngs=rngs
        ),
    )
    return snnk.swap_modules(source, [rule], rngs=rngs)[0]


def _merged(kind: str, init: str) -> Any:
    def build(config: Any, states: States, source: Head, rngs: nnx.Rngs) -> Head:
        features = merged_map(kind, config, states)
        if init != "random":
            return snnk.nn.merge_pooler(
                _with_pooler(source, features, init, states, rngs)
            )
        zeros = nnx.initializers.zeros_init()
        merged = SNNKMlp(
            *(states.dim, states.classes),
            features=features,
            readout_init=zeros,
            rngs=rngs,
        )
        return Head(MergedPooler(), merged)

    return build


METHODS: dict[str, Method] = {
    "dense": Method("Dense pooler and classifier", _dense),
    "linear": Method("Classifier alone", _linear),
    "dense_narrow": Method("Narrow dense pooler", _narrow(_pooler_budget)),
    "dense_slim": Method("Narrowest dense pooler", _narrow(_merged_budget)),
    "cos_random": Method("SNNK pooler, cosine, random", _pooler("cos", "random")),
    "cos_samples": Method(
        "SNNK pooler, cosine, fitted", _pooler("cos", "samples"), "pooler"
    ),
    "relu_random": Method("SNNK pooler, ReLU, random", _pooler("relu", "random")),
    "relu_samples": Method(
        "SNNK pooler, ReLU, fitted", _pooler("relu", "samples"), "pooler"
    ),
    "tanh_random": Method("SNNK pooler, tanh, random", _pooler("tanh", "random")),
    "tanh_psi": Method("SNNK pooler, tanh, Ψ(W, b)", _pooler("tanh", "psi"), "pooler"),
    "tanh_samples": Method(
        "SNNK pooler, tanh, fitted", _pooler("tanh", "samples"), "pooler"
    ),
    "merged_cos": Method("Merged SNNK, cosine, zero", _merged("cos", "random")),
    "merged_relu": Method("Merged SNNK, ReLU, zero", _merged("relu", "random")),
    "merged_tanh": Method("Merged SNNK, tanh, zero", _merged("tanh", "random")),
    "merged_tanh_psi": Method(
        "Merged SNNK, tanh, Ψ(W, b)", _merged("tanh", "psi"), "head"
    ),
    "merged_tanh_samples": Method(
        "Merged SNNK, tanh, fitted", _merged("tanh", "samples"), "head"
    ),
    "merged_relu_samples": Method(
        "Merged SNNK, ReLU, fitted", _merged("relu", "samples"), "head"
    ),
    "ridge_linear": Method("Ridge, the states", ridge="linear"),
    "ridge_cos": Method("Ridge, cosine features", ridge="cos"),
    "ridge_relu": Method("Ridge, ReLU features", ridge="relu"),
    "ridge_tanh": Method("Ridge, tanh features", ridge="tanh"),
    "constant": Method("Constant, the more frequent class", ridge="constant"),
}
