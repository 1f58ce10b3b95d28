"""What random features can do for each layer of a model."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnk_jax._samples import evenly
from snnk_jax.activations import Activation
from snnk_jax.activations import get as get_activation
from snnk_jax.diagnostics import LayerReport, layer_report
from snnk_jax.features._base import accumulation_dtype
from snnk_jax.nn._linear import is_plain
from snnk_jax.surgery import SwapRule, find_modules, swap_modules
from snnk_jax.typing import Array

# What a verdict means, after "3 of 12 layers".
_MEANINGS = {
    "random": "can be carried by random features, Psi(W, b) of the given weights",
    "calibrated": "need a readout fitted on samples (calibration.fit_readout)",
    "affine": "need no random features, an affine map is as good",
    "leave": "should be left alone",
}
_HEADER: tuple[str, ...] = (
    *("path", "in→out", "kappa", "balanced", "spread"),
    *("affine", "random", "calibrated", "m", "verdict"),
)


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """What :func:`model_report` says of the layers of a model; printed as a table.

    Attributes:
      layers: a :class:`snnk_jax.diagnostics.LayerReport` by path, in model order.
      shapes: inputs and outputs of each layer.
      samples: how many inputs each layer was judged on.
      tolerance: the relative error that was good enough.
    """

    layers: dict[str, LayerReport]
    shapes: dict[str, tuple[int, int]]
    samples: dict[str, int]
    tolerance: float

    @property
    def counts(self) -> dict[str, int]:
        """The number of layers with each verdict."""
        return {verdict: len(self._paths(verdict)) for verdict in _MEANINGS}

    @property
    def summary(self) -> str:
        """Which layers have which verdict, in words."""
        lines = []
        for verdict, meaning in _MEANINGS.items():
            if paths := self._paths(verdict):
                line = f"{len(paths)} of {len(self.layers)} layers {meaning}: "
                line += ", ".join(paths) + "."
                lines += textwrap.wrap(
                    line, 88, subsequent_indent="  ", break_on_hyphens=False
                )
        return "\n".join(lines)

    def _paths(self, verdict: str) -> list[str]:
        return [path for path, row in self.layers.items() if row.verdict == verdict]

    def __str__(self) -> str:
        table = [_HEADER]
        for path, row in self.layers.items():
            sizes = (row.kappa.raw, row.kappa.balanced, row.spread)
            errors = (row.affine, row.random, row.calibrated)
            numbers = (f"{value:.3g}" for value in (*sizes, *errors))
            shape = "→".join(map(str, self.shapes[path]))
            count = str(row.num_features)
            table.append((path, shape, *numbers, count, row.verdict))
        few, many = min(self.samples.values()), max(self.samples.values())
        count = str(few) if few == many else f"{few} to {many}"
        return "\n".join(
            [
                *_aligned(table),
                "",
                f"Relative errors on {count} inputs of each layer; "
                f"{self.tolerance:g} is good enough.",
                self.summary,
            ]
        )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """First and last column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [first.ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([*cells, last]))
    return lines


class _Samples:
    """The inputs of one layer. Hashes by identity: NNX takes it for a constant."""

    def __init__(self):
        self.calls: list[np.ndarray] = []

    def add(self, x: Any) -> None:
        values = np.asarray(x)
        self.calls.append(values.reshape(-1, values.shape[-1]))

    def thinned(self, count: int) -> np.ndarray:
        """At most ``count`` of them, evenly spread."""
        rows = np.concatenate(self.calls)
        return rows[evenly(len(rows), count)]


class _Recorder(nnx.Module):
    """Calls a Linear and keeps its inputs."""

    def __init__(self, linear: nnx.Linear):
        self.linear = linear
        self.samples = _Samples()

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        # Models may trace their layers, for nnx.remat or nnx.jit: hence a callback.
        jax.debug.callback(self.samples.add, x)
        return self.linear(x, *args, **kwargs)


def model_report(
    model: nnx.Module,
    *inputs: Any,
    activations: Mapping[str, str | Activation | Callable[[Array], Array]],
    max_samples: int = 2048,
    num_features: int | None = None,
    tolerance: float = 0.3,
    **call_kwargs: Any,
) -> ModelReport:
    r"""Judges every Linear with an activation behind it: can random features carry it?

    Calls a clone of the model once, as ``model(*inputs, **call_kwargs)``, keeps what
    each named Linear reads, and asks :func:`snnk_jax.diagnostics.layer_report` what
    carries :math:`f(xW + b)` within a relative error: random features, whose variance
    grows as :math:`e^{2\kappa} / m` (:func:`snnk_jax.diagnostics.kappa`,
    :func:`snnk_jax.diagnostics.predicted_rmse`); a readout fitted on these inputs
    (:func:`snnk_jax.calibration.fit_linear`); an affine map fitted on them
    (:func:`snnk_jax.diagnostics.block_linearity`); or none of them. A layer that is
    called several times is judged on the inputs of all its calls.

    Args:
      model: any NNX model, in the mode you want it judged in: ``model.eval()`` first if
        it has dropout.
      *inputs: a batch of real inputs; a few thousand rows at every layer are plenty.
      activations: by regular expression for the whole path of Linear modules, as in
        :class:`snnk_jax.SwapRule`, the function f behind them, by name, row or
        function. The first expression that matches a path counts.
      max_samples: rows used for each layer, evenly spread over all it got.
      num_features: m; None takes for each layer the largest that is still cheaper,
        ``d o / (d + o)``. That is below the d + 1 columns of an exact affine part,
        without which ``random`` is large, or infinite for functions like GELU with a
        linear part of their own: name a larger m to learn what features would achieve.
      tolerance: the relative error that is good enough.
      **call_kwargs: handed to the model.

    Raises:
      ValueError: if an expression matches no Linear, or a module that is not an
        ``nnx.Linear`` with the call of that class, or none that an earlier one does
        not; if a Linear is never called; for an unknown activation, inputs of a layer
        that are not finite, or ``max_samples`` below 2.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225; balanced
      features: Likhosherstov et al., "FAVOR#", arXiv 2302.00787.

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> from snnk_jax.models.vit import ViT, ViTConfig
      >>> config = ViTConfig(
      ...     hidden_size=16, depth=2, num_heads=2, mlp_dim=32,
      ...     image_size=8, patch_size=2, num_classes=5,
      ... )
      >>> vit = ViT(config, rngs=nnx.Rngs(0))
      >>> images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
      >>> report = snnk.nn.model_report(
      ...     vit, images, activations={r"blocks/\d+/mlp/fc1": "gelu"}
      ... )
      >>> print(report.summary)
      2 of 2 layers should be left alone: blocks/0/mlp/fc1, blocks/1/mlp/fc1.
      >>> round(report.layers["blocks/0/mlp/fc1"].kappa.raw, 1)
      3.3
    """
    if max_samples < 2:
        raise ValueError(f"max_samples must be at least 2. Got {max_samples}.")
    rows = {path: get_activation(fn) for path, fn in activations.items()}
    rules = [
        SwapRule(path=path, build=lambda linear, rngs: _Recorder(linear))
        for path in activations
    ]
    linears = [
        name
        for name, module in find_modules(model).items()
        if name and is_plain(module)
    ]
    exist = f"the Linear modules are {linears}."
    if not rules:
        raise ValueError(f"activations must name a Linear. Got none; {exist}")
    for rule in rules:
        found = find_modules(model, rule.path)
        others = [name for name in found if name not in linears]
        if others or not found:
            raise ValueError(
                f"activations must match paths of Linear modules only. Got {rule.path} "
                f"for {others or 'nothing'}; {exist}"
            )
    recorded, swaps = swap_modules(model, rules, rngs=nnx.Rngs(0))
    recorded(*inputs, **call_kwargs)
    jax.effects_barrier()
    recorders = {
        name: module
        for name, module in find_modules(recorded).items()
        if isinstance(module, _Recorder)
    }
    silent = [name for name, r in recorders.items() if not r.samples.calls]
    if silent:
        raise ValueError(
            f"the model must call every Linear that activations name. Got {silent} "
            f"without a call; {exist}"
        )
    behind = {
        name: rows[path] for path, names in swaps.matched.items() for name in names
    }
    layers, shapes, samples = {}, {}, {}
    for name, recorder in recorders.items():
        kernel, bias = recorder.linear.kernel[...], recorder.linear.bias
        dtype = accumulation_dtype(kernel.dtype)
        x = jnp.asarray(recorder.samples.thinned(max_samples), dtype)
        if not jnp.all(jnp.isfinite(x)):
            raise ValueError(f"inputs of {name} must be finite. Got inf or NaN.")
        layers[name] = layer_report(
            behind[name],
            x,
            kernel.astype(dtype),
            None if bias is None else bias[...].astype(dtype),
            num_features=num_features,
            tolerance=tolerance,
        )
        shapes[name], samples[name] = kernel.shape, len(x)
    return ModelReport(layers, shapes, samples, tolerance)
