"""The loop over the blocks: gather, choose, fit, replace."""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from snnk_jax.compression._blocks import Block, CompressRule, find_blocks, inspect
from snnk_jax.compression._gather import Data, Task, sensitivity
from snnk_jax.compression._methods import (
    Fit,
    Method,
    Site,
    hidden,
    inputs,
    solve,
)
from snnk_jax.compression._report import (
    BlockReport,
    CompressionReport,
    agreement,
    explained,
)
from snnk_jax.compression._select import allocate, eliminate
from snnk_jax.compression._taps import Apply, call, place
from snnk_jax.compression._units import Units
from snnk_jax.nn import RandomProjection
from snnk_jax.ridge._solve import moments
from snnk_jax.surgery import find_modules

Metric = Literal["plain", "norm", "gauss_newton"]

# Eigenvalues of a metric below this share of their mean are lifted to it.
_FLOOR = 1e-3
# Least number of units a block gets from a common budget.
_LEAST = 8


def compress(
    model: nnx.Module,
    calibration_inputs: Sequence[Any] | Callable[[], Iterable[Any]],
    rules: Sequence[CompressRule],
    *,
    budget: float | Mapping[str, int],
    budget_of: Literal["parameters", "flops"] = "parameters",
    method: Method | None = None,
    metric: Metric = "gauss_newton",
    corrected: bool = True,
    spread: Literal["equal", "curves"] = "equal",
    order: Literal["forward", "backward"] = "forward",
    sweeps: int = 1,
    l2: float | None = None,
    weights: Callable[[Any], Any] | None = None,
    apply: Apply = call,
    evaluate: Callable[[Any], float] | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    probes: int = 16,
    seed: int = 0,
) -> tuple[Any, CompressionReport]:
    r"""Replaces the feed-forward blocks of a model by smaller ones, without training.

    Block by block: its inputs are gathered in the model as replaced so far, and one
    matrix is fitted in closed form, streamed over any number of tokens in memory
    :math:`O(l^2)`, so that :math:`F(x) + (s^{\text{dense}} - s)` comes out: what the
    block returns, and what the layer's residual sum s lacks to that of the dense model
    (the error of the blocks before is made good).

    Plain :math:`R^2` of a block does not say what it costs the model. The metric
    weighs the errors of the block's outputs by which units are selected, and by which
    the penalty is: ``"gauss_newton"`` :math:`E[J^\top J]` with J the derivative of
    the model's outputs, tokens weighed by how much the outputs depend on them;
    ``"norm"`` the gain of the LayerNorm behind a post-norm
    layer, on what is left of the mean; ``"plain"`` none.

    Args:
      model: any NNX model; it is left as it is.
      calibration_inputs: batches without labels, or a function that returns an
        iterator over them; each pass reads them anew and in the same order. A mapping
        holds keyword arguments of the model, a tuple or list positional ones, anything
        else is the one argument. Batches of one shape compile once.
      rules: where the blocks are.
      budget: share of the matched blocks' stored parameters (or FLOPs) that is left,
        in (0, 1]; or the size of each block by its path.
      budget_of: what the share is of.
      method: how a block is made smaller, by default :class:`Units`: its own units,
        selected by elimination, and their readout.
      metric: see above.
      corrected: aim at the dense model's residual sum, not only at the own output.
      spread: ``"equal"`` gives each block the same share; ``"curves"`` gives the
        units to the blocks whose error in the metric they lower most, by each block's
        error curve in the dense model (for ``Units`` selected by elimination).
      order: in which the blocks are replaced.
      sweeps: how often; from the second time on a block is made anew among the
        replacements of all others. Forward, nothing changes: a block saw the final
        ones before it the first time.
      l2: penalty of the fits; None takes that of least generalised cross-validation.
      weights: ``weights(batch)`` returns the weight of every token, zero for padding.
      apply: ``apply(model, batch)`` runs the model and returns an array, for models
        that are not called as above.
      evaluate: a task metric of a model, for the report.
      state_dir: folder that keeps the sums of every pass, written atomically every 50
        batches: a call that was killed goes on where it was. Sums of another model or
        of other settings are refused.
      probes: batches from which the report's R^2 and output agreement are taken.
      seed: of what is random.

    Returns:
      A compressed clone and its :class:`CompressionReport`.

    Raises:
      ValueError: for rules, sizes or settings that do not fit the model, before
        anything is gathered.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225 (a block as
      feature map and one matrix); Hassibi and Stork, "Optimal brain surgeon", 1993.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> config = snnk.models.vit.ViTConfig(
      ...     image_size=8, patch_size=4, num_classes=10,
      ...     hidden_size=16, depth=2, num_heads=2, mlp_dim=64,
      ... )
      >>> model = snnk.models.vit.ViT(config, rngs=nnx.Rngs(0))
      >>> head = model.head.kernel  # zero at the start: nothing would matter
      >>> head[...] = jax.random.normal(jax.random.key(1), head.shape)
      >>> images = jax.random.normal(jax.random.key(0), (4, 32, 8, 8, 3))
      >>> rules = [snnk.CompressRule(path=r"blocks/[0-9]+/mlp")]
      >>> small, report = snnk.compress(model, list(images), rules, budget=0.25)
      >>> small.blocks[0].mlp.fc1.out_features, report.share <= 0.25
      (15, True)
    """
    method = Units() if method is None else method
    data = Data(calibration_inputs, apply, weights, state_dir)
    _check(budget, budget_of, metric, spread, order, method, probes, sweeps)
    blocks = find_blocks(model, rules)
    sizes = _sizes(blocks, method, budget, budget_of)
    if metric == "norm" and not all(block.post_norm for block in blocks):
        raise ValueError("metric 'norm' must have the norm of each rule. Got none.")
    blocks = inspect(model, blocks, data.first(), apply)
    head = data.head(probes)
    roots, scales = _metric(model, blocks, data, metric, seed)
    start = functools.partial(
        Task,
        dense=model,
        corrected=corrected,
        data=data,
    )
    if spread == "curves":
        tasks = [
            start(
                model=model,
                block=block,
                root=roots.get(block.name),
                scales=scales.get(block.name),
                # Nothing is replaced yet: there is no error to make good.
                corrected=False,
                label="alone",
            )
            for block in blocks
        ]
        sizes = _spread(tasks, budget, budget_of, method)
    ordered = blocks if order == "forward" else blocks[::-1]
    originals: dict[str, Any] = find_modules(model)
    current, fits, reports = nnx.clone(model), dict[str, Fit](), dict[str, Any]()
    for turn, (index, block) in itertools.product(range(sweeps), enumerate(ordered)):
        if turn:
            back = {name: originals[name] for name in fits[block.name].modules}
            current = place(current, back)
        label = f"{index:03}-{block.name}" + (f"-sweep{turn}" if turn else "")
        task = start(
            model=current,
            block=block,
            root=roots.get(block.name),
            scales=scales.get(block.name),
            label=label,
        )
        modules: dict[str, Any] = find_modules(current)
        key = jax.random.fold_in(jax.random.key(seed), index)
        site = Site(task, modules[block.first], modules[block.second], l2, key)
        size = sizes[block.name]
        fit = fits[block.name] = method.fit(site, size)
        current = place(current, fit.modules)
        reports[block.name] = _measure(task, head, current, fit, size, method)
    outputs = [
        np.concatenate([np.asarray(run(m, apply, batch)) for batch in head])
        for m in (current, model)
    ]
    cosine, r2 = agreement(*outputs)
    report = CompressionReport(
        blocks=tuple(reports.values()),
        parameters=num_parameters(current),
        dense_parameters=num_parameters(model),
        cosine=cosine,
        output_r2=r2,
        score=None if evaluate is None else float(evaluate(current)),
        dense_score=None if evaluate is None else float(evaluate(model)),
    )
    return current, report


def num_parameters(model: nnx.Module) -> int:
    """Numbers in the variables of a model, without frozen randomness."""
    kept = nnx.state(model, nnx.Not(nnx.Any(RandomProjection, nnx.RngState)))
    return sum(leaf.size for leaf in jax.tree.leaves(kept))


def _check(
    budget: Any,
    budget_of: str,
    metric: str,
    spread: str,
    order: str,
    method: Method,
    probes: int,
    sweeps: int,
) -> None:
    for name, value, known in (
        ("budget_of", budget_of, ("parameters", "flops")),
        ("metric", metric, ("plain", "norm", "gauss_newton")),
        ("spread", spread, ("equal", "curves")),
        ("order", order, ("forward", "backward")),
    ):
        if value not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}. Got {value!r}."
            )
    if not isinstance(method, Method):
        raise ValueError(f"method must be a Method. Got {method!r}.")
    for name, count in (("probes", probes), ("sweeps", sweeps)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1. Got {count}.")
    by_error = isinstance(method, Units) and method.select == "elimination"
    if spread == "curves" and not (by_error and not isinstance(budget, Mapping)):
        raise ValueError(
            "spread 'curves' must have a share as budget, and Units selected by "
            f"elimination. Got {budget!r} and {method!r}."
        )
    if not isinstance(budget, Mapping) and not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], or sizes by path. Got {budget}.")


def _sizes(
    blocks: Sequence[Block],
    method: Method,
    budget: float | Mapping[str, int],
    budget_of: str,
) -> dict[str, int]:
    names = [block.name for block in blocks]
    if isinstance(budget, Mapping):
        if set(budget) != set(names):
            raise ValueError(
                f"budget must name the blocks {names}. Got {list(budget)}."
            )
        for block in blocks:
            size = budget[block.name]
            if not method.least <= size <= method.largest(block):
                raise ValueError(
                    f"sizes must be {method.least} to {method.largest(block)} for "
                    f"{block.name}. Got {size}."
                )
        return dict(budget)
    return {
        b.name: method.size_for(b, budget * getattr(b, budget_of), budget_of)
        for b in blocks
    }


def _metric(
    model: nnx.Module, blocks: Sequence[Block], data: Data, metric: Metric, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
    """Roots R, the squared error being that of ``T R``, and factors of the tokens."""
    if metric == "plain":
        return {}, {}
    if metric == "norm":
        modules, roots = find_modules(model), dict[str, np.ndarray]()
        for block in blocks:
            scale = getattr(modules[block.stream], "scale", None)
            gain = np.ones(block.out) if scale is None else np.asarray(scale[...])
            roots[block.name] = (np.eye(block.out) - 1 / block.out) * gain
        return roots, {}
    found, scales = sensitivity(model, blocks, data, seed)
    return {name: _root(matrix) for name, matrix in found.items()}, scales


def _root(metric: np.ndarray) -> np.ndarray:
    eigenvalues, vectors = np.linalg.eigh(metric)
    least = _FLOOR * max(float(np.mean(eigenvalues)), np.finfo(float).tiny)
    return vectors * np.sqrt(np.maximum(eigenvalues, least))


def _spread(
    tasks: Sequence[Task], budget: Any, budget_of: str, method: Method
) -> dict[str, int]:
    """Sizes by the error curves of the blocks, each alone in the dense model."""
    curves, prices, least, total = {}, {}, {}, 0.0
    index = 0 if budget_of == "parameters" else 1
    for task in tasks:
        block = task.block
        stats = moments(task.gather(hidden, block.name))
        least[block.name] = min(_LEAST, block.width)
        curve = eliminate(stats, [least[block.name]], task.judged)[1]
        curves[block.name] = {
            n: e * stats.weight / stats.rows for n, e in curve.items()
        }
        nothing, one = (method.cost(block, size)[index] for size in (0, 1))
        prices[block.name] = float(one - nothing)
        total += budget * getattr(block, budget_of) - nothing
    if sum(prices[name] * least[name] for name in prices) > total:
        raise ValueError(
            f"budget must leave {_LEAST} units to every block. Got {budget}."
        )
    return allocate(curves, prices, total, least)


def run(model: nnx.Module, apply: Apply, batch: Any) -> Any:
    """The model's outputs, compiled."""
    return _run(apply, *nnx.split(model), batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(apply: Apply, graphdef: Any, state: Any, batch: Any) -> Any:
    return apply(nnx.merge(graphdef, state), batch)


def _measure(
    task: Task, head: Data, after: nnx.Module, fit: Fit, size: int, method: Method
) -> BlockReport:
    """Compares a replacement with the target on the first batches."""
    block, solution = task.block, fit.solution
    stats = task.gather(inputs, "", data=head)
    affine = solve(stats, None, task.judged)
    total = moments(stats)
    spread = total.y_square / total.weight
    out = block.name if block.name in fit.modules else block.second
    error = task.residual(after, out, head)
    metric = np.eye(block.out) if task.root is None else task.root @ task.root.T
    parameters, flops = method.cost(block, size)
    fitted = {}
    if solution is not None:
        readout = fit.readout
        if readout is None:
            readout = np.asarray(solution.kernel)[:, : block.out]
            fitted["effective_rank"] = float(solution.dof)
        fitted |= {
            "l2": solution.l2,
            "condition": solution.condition,
            "readout_norm": float(np.linalg.norm(readout)),
        }
    judged = np.sum(spread[task.judged])
    return BlockReport(
        name=block.name,
        method=type(method).__name__,
        size=size,
        parameters=parameters,
        dense_parameters=block.parameters,
        flops=flops,
        dense_flops=block.flops,
        r2=explained(np.trace(error), np.sum(spread[: block.out])),
        r2_metric=explained(np.sum(metric * error), judged),
        linear_r2=explained(np.sum(affine.residual[task.judged]), judged),
        **fitted,
    )
