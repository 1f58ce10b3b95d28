"""What a compression did to every block, and to the model."""

import dataclasses
import json
from typing import Any

import numpy as np

# Column titles of the table and how a block's value is printed.
_COLUMNS = (
    ("block", "name", "{}"),
    ("size", "size", "{}"),
    ("parameters", "parameters", "{}"),
    ("share", "share", "{:.3f}"),
    ("FLOP share", "flop_share", "{:.3f}"),
    ("R2", "r2", "{:.4f}"),
    ("R2 metric", "r2_metric", "{:.4f}"),
    ("linear R2", "linear_r2", "{:.4f}"),
    ("l2", "l2", "{:.1e}"),
    ("kappa", "condition", "{:.1e}"),
    ("rank", "effective_rank", "{:.1f}"),
    ("norm", "readout_norm", "{:.2f}"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockReport:
    """One replaced block.

    Attributes:
      name: path of the block.
      method: what replaced it.
      size: units, features or ranks.
      parameters: numbers stored after, in float32.
      dense_parameters: before.
      flops: of a token after.
      dense_flops: before.
      r2: share of the target's variance that the replacement explains.
      r2_metric: the same in the metric.
      linear_r2: the same of an affine map of the input: how linear the block is.
      l2: penalty of the fit; NaN where nothing was fitted, as for the next three.
      condition: condition number of the normal equations.
      effective_rank: degrees of freedom of the fit; NaN for a map of lower rank too.
      readout_norm: Frobenius norm of the readout.
    """

    name: str
    method: str
    size: int
    parameters: int
    dense_parameters: int
    flops: int
    dense_flops: int
    r2: float
    r2_metric: float
    linear_r2: float
    l2: float = float("nan")
    condition: float = float("nan")
    effective_rank: float = float("nan")
    readout_norm: float = float("nan")

    @property
    def share(self) -> float:
        """Stored numbers after, as a share of those before."""
        return self.parameters / self.dense_parameters

    @property
    def flop_share(self) -> float:
        """FLOPs after, as a share of those before."""
        return self.flops / self.dense_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """A compression, block by block and end to end.

    Attributes:
      blocks: the blocks in the order in which they were replaced.
      parameters: of the model after, without frozen randomness.
      dense_parameters: before.
      cosine: mean cosine of the compressed and the dense outputs, on the first
        calibration batches.
      output_r2: share of the dense outputs' variance that the compressed explain.
      score: of ``evaluate`` on the compressed model; None without.
      dense_score: on the dense model.
    """

    blocks: tuple[BlockReport, ...]
    parameters: int
    dense_parameters: int
    cosine: float
    output_r2: float
    score: float | None = None
    dense_score: float | None = None

    @property
    def share(self) -> float:
        """Stored numbers of all replaced blocks, as a share of those before."""
        before = sum(block.dense_parameters for block in self.blocks)
        return sum(block.parameters for block in self.blocks) / before

    @property
    def flop_share(self) -> float:
        """FLOPs of all replaced blocks, as a share of those before."""
        before = sum(block.dense_flops for block in self.blocks)
        return sum(block.flops for block in self.blocks) / before

    def __str__(self) -> str:
        cells = [[title for title, _, _ in _COLUMNS]]
        for block in self.blocks:
            cells.append([f.format(getattr(block, n)) for _, n, f in _COLUMNS])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
            for row in cells
        ]
        lines.append(
            f"blocks keep {self.share:.2%} of their parameters and "
            f"{self.flop_share:.2%} of their FLOPs; the model has {self.parameters} of "
            f"{self.dense_parameters} parameters; outputs: cosine {self.cosine:.4f}, "
            f"R2 {self.output_r2:.4f}"
        )
        if self.score is not None and self.dense_score is not None:
            lines.append(f"score {self.score:.4f}, dense {self.dense_score:.4f}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it; numbers that are not finite as null."""
        record = dataclasses.asdict(self)
        record |= {"share": self.share, "flop_share": self.flop_share}
        return json.dumps(_finite(record), indent=1)


def agreement(ours: np.ndarray, dense: np.ndarray) -> tuple[float, float]:
    """Mean cosine of rows, and the share of the dense outputs' variance explained."""
    ours = np.asarray(ours, np.float64).reshape(len(ours), -1)
    dense = np.asarray(dense, np.float64).reshape(len(dense), -1)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(dense, axis=1)
    products = np.sum(ours * dense, axis=1)
    cosine = np.mean(products / np.maximum(norms, np.finfo(float).tiny))
    return float(cosine), explained(
        np.sum((ours - dense) ** 2), np.sum((dense - dense.mean(axis=0)) ** 2)
    )


def explained(residual: float, spread: float) -> float:
    """R^2; NaN where there is nothing to explain."""
    return 1 - float(residual) / float(spread) if spread > 0 else float("nan")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
