"""How many parameters a model trains, and how many it holds."""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from snnk_jax.nn._variables import AdapterParam, InputStatistic, RandomProjection


def _in_head(path: tuple[Any, ...], variable: Any) -> bool:
    """Whether a path is in the model's own ``head``, adapted or not."""
    return next((part for part in path if part != "base_module"), None) == "head"


HEAD = nnx.All(nnx.Param, _in_head)
"""NNX filter of the parameters that belong to the task: what is in ``head``.

The same that files of adapters leave out of the fingerprint.
"""

_PARAMETERS = nnx.Any(nnx.Param, InputStatistic)


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: trained ones with the head apart, and frozen ones.

    Attributes:
      trained: trained parameters without the head.
      head: trained parameters of the head.
      frozen: parameters that are not trained.
      projections: frozen random values, which a file can name by their key.
    """

    trained: int
    head: int
    frozen: int
    projections: int

    @property
    def total(self) -> int:
        """All numbers the model holds."""
        return self.trained + self.head + self.frozen + self.projections


def count_parameters(
    model: nnx.Module, trainable: Any = None, *, head: Any = HEAD
) -> ParameterCounts:
    """Counts the parameters of a model, or of its shapes under ``nnx.eval_shape``.

    Random streams, batch statistics and other state are no parameters.

    Args:
      model: any NNX model.
      trainable: NNX filter of the variables that are trained; None means adapters and
        head.
      head: NNX filter of the head.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> from snnk_jax.models.bert import Bert, BertConfig
      >>> config = BertConfig.preset("base")
      >>> bert = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
      >>> snnk.nn.count_parameters(bert).head
      1538
    """
    if trainable is None:
        trainable = _adapters_and(head)
    _, params, projections, frozen, _ = nnx.split(
        model, trainable, RandomProjection, _PARAMETERS, ...
    )
    heads = nnx.filter_state(params, head)
    return ParameterCounts(
        trained=_size(params) - _size(heads),
        head=_size(heads),
        frozen=_size(frozen),
        projections=_size(projections),
    )


def parameter_groups(
    model: nnx.Module, trainable: Any = None, *, head: Any = HEAD
) -> list[tuple[str, int, int]]:
    """Rows ``(group, parameters, trained parameters)``, in model order.

    A group is the first part of a path, with the blocks taken together and the
    adapters and projections inside them apart. See :func:`count_parameters` for the
    arguments.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> layer = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
      >>> model = snnk.nn.DoRA(layer, 2, rngs=nnx.Rngs(1))
      >>> sorted(snnk.nn.parameter_groups(model))[0]
      ('base_module', 40, 0)
    """
    if trainable is None:
        trainable = _adapters_and(head)
    kept = nnx.Any(RandomProjection, _PARAMETERS)
    _, params, rest, _ = nnx.split(model, trainable, kept, ...)
    rows: dict[str, list[int]] = {}
    for state, trained in ((params, True), (rest, False)):
        for path, variable in nnx.to_flat_state(state):
            name = str(path[0])
            if isinstance(variable, AdapterParam):
                name += " (adapters)"
            elif isinstance(variable, RandomProjection):
                name += " (projections)"
            row = rows.setdefault(name, [0, 0])
            row[0] += math.prod(variable.shape)
            row[1] += math.prod(variable.shape) * trained
    return [(name, total, trained) for name, (total, trained) in rows.items()]


def parameter_table(
    model: nnx.Module, trainable: Any = None, *, head: Any = HEAD
) -> str:
    """The text that :func:`print_trainable` prints."""
    counts = count_parameters(model, trainable, head=head)
    lines = [f"{'group':28}{'parameters':>12}{'trained':>12}"]
    for name, total, trained in parameter_groups(model, trainable, head=head):
        lines.append(f"{name:28}{total:12,}{trained:12,}")
    share = (counts.trained + counts.head) / max(counts.total, 1)
    lines.append(f"{'total':28}{counts.total:12,}{counts.trained + counts.head:12,}")
    lines.append(
        f"trained without the head {counts.trained:,}, head {counts.head:,}, "
        f"{share:.2%} of all; frozen projections {counts.projections:,}"
    )
    return "\n".join(lines)


def print_trainable(
    model: nnx.Module, trainable: Any = None, *, head: Any = HEAD
) -> ParameterCounts:
    """Prints what a model trains: by group, with and without the head, and the rest.

    Args:
      model: any NNX model, or its shapes.
      trainable: NNX filter of the variables that are trained; None means adapters and
        head. ``nnx.Param`` for full fine-tuning.
      head: NNX filter of the head.

    Returns:
      The counts.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> from snnk_jax.models.bert import Bert, BertConfig
      >>> fm = snnk.features.ArcCosine(num_features=16)
      >>> rule = snnk.SwapRule(
      ...     path=r"blocks/[0-9]+/(attention|mlp)",
      ...     build=lambda module, rngs: snnk.nn.Adapted(
      ...         module, snnk.nn.SNNKAdapter(128, features=fm, rngs=rngs)
      ...     ),
      ... )
      >>> bert = Bert(BertConfig.preset("tiny", vocab_size=99), rngs=nnx.Rngs(0))
      >>> model, _ = snnk.swap_modules(bert, [rule], rngs=nnx.Rngs(1))
      >>> counts = snnk.nn.print_trainable(model)
      group                         parameters     trained
      blocks (adapters)                  8,704       8,704
      head                                 258         258
      blocks (projections)               8,200           0
      blocks                           396,544           0
      embeddings                        78,720           0
      pooler                            16,512           0
      total                            508,938       8,962
      trained without the head 8,704, head 258, 1.76% of all; frozen projections 8,200
      >>> counts.trained
      8704
    """
    print(parameter_table(model, trainable, head=head), flush=True)
    return count_parameters(model, trainable, head=head)


def _adapters_and(head: Any) -> Any:
    return nnx.Any(AdapterParam, nnx.All(nnx.Param, head))


def _size(state: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
