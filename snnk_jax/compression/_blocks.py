"""The feed-forward blocks of a model, found by rules."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax.compression._taps import Apply, Reader
from snnk_jax.nn._linear import is_plain
from snnk_jax.surgery import find_modules


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressRule:
    """Where the feed-forward blocks of a model are.

    Args:
      path: regular expression that must match the whole path of a block, its attribute
        names joined by ``/``: ``blocks/[0-9]+/mlp``. A layer that holds the two Linears
        itself, without a module for the feed-forward part, is a block too, of which
        only the Linears can be replaced.
      first: path inside the block of the ``nnx.Linear`` before the activation.
      second: path inside the block of the ``nnx.Linear`` behind it.
      norm: path, beside the block, of the LayerNorm that reads the residual sum of a
        post-norm layer; where the block holds the Linears itself, inside it. None: the
        layer is pre-norm, and the module around the block returns the residual sum.
      where: slice of the matches, in model order; None takes all.

    Raises:
      ValueError: if a path is not a regular expression or empty.

    Example:
      >>> import snnk_jax as snnk
      >>> vit = snnk.CompressRule(path=r"blocks/[0-9]+/mlp")
      >>> bert = snnk.CompressRule(path=r"blocks/[0-9]+/mlp", norm="norm2")
    """

    path: str
    first: str = "fc1"
    second: str = "fc2"
    norm: str | None = None
    where: slice | None = None

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"path must be a regular expression. Got {self.path!r}: {error}."
            ) from error
        for name in ("first", "second", "norm"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must name a module. Got ''.")


@dataclasses.dataclass(frozen=True)
class Block:
    """One feed-forward block, by its names and sizes.

    Attributes:
      name: path of the block.
      first: path of the Linear before the activation.
      second: path of the Linear behind it.
      stream: path of the module at which the residual sum is read.
      post_norm: whether the sum goes into that module, or comes out of it.
      dim: d, width of the inputs.
      width: l, hidden width.
      out: o, width of the outputs.
      biases: whether the Linears have biases.
      whole: whether the block does nothing but the two Linears and the activation, so
        that another module may stand in its place.
    """

    name: str
    first: str
    second: str
    stream: str
    post_norm: bool
    dim: int
    width: int
    out: int
    biases: tuple[bool, bool]
    whole: bool = True

    @property
    def parameters(self) -> int:
        """Numbers stored in the two Linears."""
        d, width, o = self.dim, self.width, self.out
        return width * (d + o) + self.biases[0] * width + self.biases[1] * o

    @property
    def flops(self) -> int:
        """Multiplications and additions of a token in the two products."""
        return 2 * self.width * (self.dim + self.out)


def find_blocks(model: nnx.Module, rules: Sequence[CompressRule]) -> list[Block]:
    """The blocks that the rules match, in model order.

    Raises:
      ValueError: if a rule matches nothing, or what it names is not there or no pair
        of Linears one of which reads what the other writes.
    """
    if not rules:
        raise ValueError("rules must hold at least one CompressRule. Got none.")
    modules = find_modules(model)
    claimed: dict[str, Block] = {}
    for rule in rules:
        names = [name for name in modules if name and re.fullmatch(rule.path, name)]
        chosen = [n for n in names[rule.where or slice(None)] if n not in claimed]
        if not chosen:
            raise ValueError(
                f"every rule must match a module. Got unused {rule.path!r}; the paths "
                f"are {[name for name in modules if name]}."
            )
        claimed |= {name: _block(name, rule, modules) for name in chosen}
    return [claimed[name] for name in modules if name in claimed]


def _block(name: str, rule: CompressRule, modules: dict[str, Any]) -> Block:
    first, second = (f"{name}/{part}" for part in (rule.first, rule.second))
    up, down = modules.get(first), modules.get(second)
    if not (is_plain(up) and is_plain(down)):
        raise ValueError(
            f"{name} must hold nnx.Linear layers in {rule.first!r} and "
            f"{rule.second!r}. Got {type(up).__name__} and {type(down).__name__}."
        )
    if up.out_features != down.in_features:
        raise ValueError(
            f"{second!r} must read what {first!r} writes. Got widths "
            f"{down.in_features} and {up.out_features}."
        )
    around = name.rpartition("/")[0]
    places = [f"{place}/{rule.norm}".lstrip("/") for place in (around, name)]
    norm = next((place for place in places if rule.norm and place in modules), None)
    if rule.norm and norm is None:
        raise ValueError(f"norm must be a module at {places}. Got none.")
    return Block(
        name,
        first,
        second,
        # List-like containers are not called; what holds them is.
        stream=norm or _called(around, modules) or name,
        post_norm=norm is not None,
        dim=up.in_features,
        width=up.out_features,
        out=down.out_features,
        biases=(up.bias is not None, down.bias is not None),
    )


def inspect(
    model: nnx.Module, blocks: Sequence[Block], batch: Any, apply: Apply
) -> list[Block]:
    """Finds out which blocks are whole, and where their residual sums are.

    Raises:
      ValueError: if the sum of a layer does not change by what its second Linear adds.
    """
    names = {n for b in blocks for n in (b.name, b.first, b.second, b.stream)}
    reader = Reader(model, names, apply)
    _, seen = jax.jit(reader)(reader.state, batch)
    found = []
    for block in blocks:
        pairs = (
            (seen[block.name][0], seen[block.first][0]),
            (seen[block.name][1], seen[block.second][1]),
        )
        whole = all(
            getattr(a, "shape", None) == b.shape and bool(jnp.all(a == b))
            for a, b in pairs
        )
        inside = not whole and not block.post_norm
        stream = block.name if inside else block.stream
        found.append(dataclasses.replace(block, whole=whole, stream=stream))
    _check_sum(reader, found[0], batch, seen)
    return found


def _check_sum(reader: Reader, block: Block, batch: Any, seen: Any) -> None:
    output, which = seen[block.second][1], 0 if block.post_norm else 1
    before = seen[block.stream][which]
    # As large as what it is added to, which would round a smaller one away.
    size = max(float(jnp.max(jnp.abs(x))) for x in (before, output))
    scale = 2.0 ** np.round(np.log2(max(size, 1.0)))
    row = jnp.asarray(scale * (np.arange(output.shape[-1]) % 3 - 1), output.dtype)
    shift = jnp.broadcast_to(row, output.shape)
    _, moved = jax.jit(reader)(reader.state, batch, {block.second: shift})
    after = moved[block.stream][which]
    change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    if change.shape != output.shape or not np.allclose(
        change, np.asarray(shift, np.float64), atol=0.05 * scale
    ):
        where = "the input of" if block.post_norm else "the output of"
        raise ValueError(
            f"{where} {block.stream!r} must be a sum with the output of "
            f"{block.second!r}: name the LayerNorm behind a post-norm layer in "
            f"CompressRule(norm=...). Got {block.stream!r}, which does not follow it."
        )


def _called(name: str, modules: dict[str, Any]) -> str:
    while name and isinstance(modules.get(name), nnx.List | nnx.Dict):
        name = name.rpartition("/")[0]
    return name
