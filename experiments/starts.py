"""What stands in for feed-forward blocks before they are trained."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from flax import nnx

import snnk_jax as snnk
from experiments import distil
from experiments.splits import Batch

KINDS = {
    "units": "own units, readout fitted",
    "units_random": "as many units, random",
    "psi": "ReLU features, Psi(W)",
    "psi_random": "ReLU features, random readout",
    "dense": "nothing replaced",
}
_BLOCKS = r"blocks/\d+/mlp"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What replaces how many blocks: ``kind-size``, and the number of last blocks."""

    kind: str
    size: int
    top: int

    @classmethod
    def parse(cls, method: str, top: int) -> "Variant":
        """From a string like ``units-96``; ``dense`` has no size.

        Raises:
          ValueError: for another kind or size.
        """
        kind, _, size = method.partition("-")
        sized = size.isdigit() and int(size) > 0
        if kind not in KINDS or sized == (kind == "dense") or (size and not sized):
            raise ValueError(
                f"config.methods must be dense or KIND-SIZE, with KIND of "
                f"{', '.join(list(KINDS)[:-1])}. Got {method!r}."
            )
        return cls(kind, int(size or 0), top)

    @property
    def name(self) -> str:
        """Of its folder."""
        return (
            "dense"
            if self.kind == "dense"
            else f"{self.kind}-{self.size}-top{self.top}"
        )


def build(
    base: Any,
    variant: Variant,
    seed: int,
    batches: Sequence[Batch],
    *,
    norm: str | None,
    probes: int,
) -> Any:
    """The model of a variant before training.

    Args:
      base: the dense model.
      variant: what is replaced by what.
      seed: of what is random.
      batches: inputs from which :func:`snnk_jax.compress` chooses units.
      norm: of the layers, see :class:`snnk_jax.CompressRule`.
      probes: batches of its report.
    """
    if variant.kind == "dense":
        return nnx.clone(base)
    where = slice(len(base.blocks) - variant.top, None)
    if variant.kind == "units":
        rule = snnk.CompressRule(path=_BLOCKS, norm=norm, where=where)
        names = list(snnk.find_modules(base, _BLOCKS))[where]
        model, report = snnk.compress(
            base,
            batches,
            [rule],
            budget=dict.fromkeys(names, variant.size),
            weights=_mask if "mask" in batches[0] else None,
            apply=distil.embed,
            probes=probes,
        )
        print(report, flush=True)
        return model
    make = functools.partial(_BUILDERS[variant.kind], variant.size)
    paths = (f"{_BLOCKS}/fc1", f"{_BLOCKS}/fc2")
    rules = [
        snnk.SwapRule(path=path, build=make, where=where)
        for path in (paths if variant.kind == "units_random" else (_BLOCKS,))
    ]
    rngs = nnx.Rngs(params=seed, projection=seed)
    return snnk.swap_modules(base, rules, rngs=rngs)[0]


def _mask(batch: Any) -> Any:
    return batch["mask"]


def _narrow(size: int, linear: nnx.Linear, rngs: nnx.Rngs) -> nnx.Linear:
    """A random Linear with as many units on its hidden side."""
    into = linear.in_features < linear.out_features
    sides = (linear.in_features, size) if into else (size, linear.out_features)
    return nnx.Linear(
        *sides,
        dtype=linear.dtype,
        param_dtype=linear.param_dtype,
        kernel_init=nnx.initializers.xavier_uniform(),
        rngs=rngs,
    )


def _features(size: int) -> snnk.features.FeatureMap:
    return snnk.features.AppendOne(snnk.features.ArcCosine(num_features=size))


def _psi(size: int, mlp: Any, rngs: nnx.Rngs) -> nnx.Module:
    return snnk.nn.SNNKMlp.from_mlp(mlp, features=_features(size), rngs=rngs)


def _psi_random(size: int, mlp: Any, rngs: nnx.Rngs) -> nnx.Module:
    return snnk.nn.SNNKMlp(
        mlp.fc1.in_features,
        mlp.fc2.out_features,
        features=_features(size),
        dtype=mlp.fc1.dtype,
        param_dtype=mlp.fc1.param_dtype,
        rngs=rngs,
    )


_BUILDERS = {"units_random": _narrow, "psi": _psi, "psi_random": _psi_random}


def stored(model: Any) -> int:
    """Numbers stored in the feed-forward blocks; frozen draws are a seed."""
    blocks = [block.mlp for block in model.blocks]
    return sum(snnk.compression.num_parameters(block) for block in blocks)
