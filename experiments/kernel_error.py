"""How well feature maps estimate ``f(x @ kernel + bias)``, pointwise.

Synthetic layers of several norms and spectra; every map, projection and activation on
them at several numbers of features, beside the constant and the affine predictors.
The maps see the inputs they are calibrated on, the errors are those of other inputs.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import snnk_jax as snnk
from experiments import plots
from experiments.jobs import run_study
from experiments.report import markdown
from snnk_jax.features import URF, ArcCosine, Exponential, FeatureMap, Polynomial

BALANCED = "+ balanced"


@dataclasses.dataclass(frozen=True)
class Regime:
    """Norms and spectra of inputs and weights.

    Attributes:
      kappa: mean input norm times mean weight norm.
      decay: coordinate i has a standard deviation of ``i ** -decay``, the coordinates
        of the weights in a random order; isotropic vectors of fixed norm for 0.
    """

    kappa: float
    decay: float = 0.0


REGIMES = {
    "iso 0.5": Regime(0.5),
    "iso 1": Regime(1.0),
    "iso 2": Regime(2.0),
    "iso 4": Regime(4.0),
    "ffn 8": Regime(8.0),  # |x| = sqrt(64), |w| = 1 has the same pre-activations
    "i^-1 4": Regime(4.0, 1.0),
    "i^-1 10": Regime(10.0, 1.0),
    "i^-2 40": Regime(40.0, 2.0),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """Inputs to calibrate on, inputs to judge on, and weights."""

    calibration: jax.Array
    x: jax.Array
    kernel: jax.Array
    bias: jax.Array


def make_layer(regime: Regime, config: ConfigDict) -> Layer:
    """A layer of a regime, inputs and weights of equal mean norm, biases N(0, 1)."""
    dim, outputs, calibration = config.dim, config.outputs, config.calibration
    rng = np.random.default_rng(config.data_seed)
    x = rng.normal(size=(calibration + config.examples, dim))
    w = rng.normal(size=(outputs, dim))
    bias = rng.normal(size=outputs)
    if regime.decay:
        spectrum = np.arange(1, dim + 1) ** -regime.decay
        x, w = x * spectrum, w * spectrum[rng.permutation(dim)]
    else:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        w /= np.linalg.norm(w, axis=1, keepdims=True)
    x *= math.sqrt(regime.kappa) / np.linalg.norm(x, axis=1).mean()
    w *= math.sqrt(regime.kappa) / np.linalg.norm(w, axis=1).mean()
    arrays = (x[:calibration], x[calibration:], w.T, bias)
    return Layer(*(jnp.asarray(array, jnp.float32) for array in arrays))


@dataclasses.dataclass(frozen=True)
class Job:
    """One map on one layer at one number of features."""

    study: str
    activation: str
    regime: str
    label: str
    num_features: int
    features: FeatureMap
    with_bias: bool = False
    calibrate: str = ""  # "", "references", "balance" or "readout"

    @property
    def name(self) -> str:
        parts = (self.study, self.activation, self.regime, self.label)
        return " | ".join((*parts, str(self.num_features)))


def jobs(config: ConfigDict) -> Iterator[Job]:
    """All jobs of a config, in the order of the report."""
    studies = {
        "projections": _projections,
        "activations": _activations,
        "arccos": _arccos,
        "exponential": _exponential,
        "polynomial": _polynomial,
    }
    for study in config.studies:
        for regime in config.regimes:
            for num_features in config.num_features:
                yield from studies[study](config, regime, num_features)


def _projections(config: ConfigDict, regime: str, m: int) -> Iterable[Job]:
    """Plain cosine features without biases, as in the paper's experiment."""
    for projection in config.projections:
        fields: dict[str, Any] = {
            "num_features": m,
            "projection": projection,
            "scale": 1.0,
            "kappa": REGIMES[regime].kappa,
        }
        plain = URF(activation="cos", **fields)
        job = Job("projections", "cos", regime, projection, m, plain)
        yield job
        exact = dataclasses.replace(plain, exact_degree=0)
        yield dataclasses.replace(job, label=f"{projection}, exact 0", features=exact)
        if REGIMES[regime].decay:
            shrunk = dataclasses.replace(plain, shrinkage=True)
            for label, features in {"": plain, ", shrunk": shrunk}.items():
                yield dataclasses.replace(
                    job,
                    label=f"{projection}{label} {BALANCED}",
                    features=features,
                    calibrate="balance",
                )


def _activations(config: ConfigDict, regime: str, m: int) -> Iterable[Job]:
    """Every activation with biases: the plain map and what improves it."""
    if m < config.dim + 1 + 2 * 24:
        return
    swept = config.activations[: config.swept_activations]
    for activation in config.activations if m == config.main_num_features else swept:
        plain = URF(
            activation=activation,
            num_features=m,
            scale=1.0,
            kappa=min(REGIMES[regime].kappa, 10.0),
        )
        job = Job("activations", activation, regime, "plain", m, plain, True)
        exact = dataclasses.replace(plain, exact_degree=1)
        shrunk = dataclasses.replace(exact, shrinkage=True)
        yield job
        yield dataclasses.replace(job, label="exact 1", features=exact)
        yield dataclasses.replace(
            job, label="exact 1, shrunk", features=shrunk, calibrate="references"
        )
        yield dataclasses.replace(
            job,
            label=f"exact 1, shrunk {BALANCED}",
            features=shrunk,
            calibrate="balance",
        )
        yield dataclasses.replace(
            job,
            label="fitted readout",
            features=ArcCosine(num_features=m - config.dim - 1),
            calibrate="readout",
        )


def _arccos(config: ConfigDict, regime: str, m: int) -> Iterable[Job]:
    # Homogeneous: the norms do not matter, one isotropic regime and the decaying ones.
    if regime.startswith(("iso", "ffn")) and regime != config.regimes[0]:
        return
    for order in (0, 1, 2, 3):
        for projection in config.projections if order == 1 else ("orthogonal",):
            features = ArcCosine(order=order, num_features=m, projection=projection)
            yield Job("arccos", f"K_{order}", regime, projection, m, features)


def _exponential(config: ConfigDict, regime: str, m: int) -> Iterable[Job]:
    kappa = REGIMES[regime].kappa
    plain = Exponential(num_features=m, scale=1.0, kappa=kappa)
    job = Job("exponential", "exp", regime, "A = 0", m, plain)
    shape = Exponential.best_shape(kappa, config.dim)
    exact = dataclasses.replace(plain, exact_degree=0)
    yield job
    yield dataclasses.replace(
        job, label="best A", features=dataclasses.replace(plain, shape=shape)
    )
    yield dataclasses.replace(job, label="exact 0", features=exact)
    yield dataclasses.replace(
        job, label=f"A = 0 {BALANCED}", features=plain, calibrate="balance"
    )


def _polynomial(config: ConfigDict, regime: str, m: int) -> Iterable[Job]:
    for sketch in ("maclaurin", "tensor_sketch", "tensor_srht"):
        features = Polynomial(
            coefficients=(0.5, -1.0, 0.7, 0.2),
            num_features=m,
            sketch=sketch,
            kappa=REGIMES[regime].kappa,
        )
        yield Job("polynomial", "cubic", regime, sketch, m, features)


def measure(job: Job, layer: Layer, config: ConfigDict) -> dict[str, Any]:
    """Errors of a job over keys, and those of the predictors it must beat."""
    fm = job.features
    bias = layer.bias if job.with_bias else None
    readout = job.calibrate == "readout"
    if readout:
        exact = _wide(snnk.kernels.ffl(job.activation, layer.x, layer.kernel, bias))
    else:
        exact = _wide(fm.exact(layer.x, layer.kernel, bias))
    params = fm.init(jax.random.key(0), config.dim)
    if job.calibrate == "balance":
        params = snnk.calibration.balance(
            fm, params, layer.calibration, layer.kernel, bias
        )
    if job.calibrate == "references":
        params = snnk.calibration.set_references(fm, params, layer.calibration)
    keys = config.readout_draws if readout else config.draws
    squares = []
    for seed in range(keys):
        fresh = fm.redraw(params, jax.random.key(seed + 1), config.dim)
        if readout:
            estimate = _fitted(job, fresh, layer, bias)
        else:
            estimate = snnk.snnk_dense(fm, fresh, layer.x, layer.kernel, bias)
        error = np.mean((_wide(estimate) - exact) ** 2)
        squares.append(error if np.isfinite(error) else np.inf)
    rmse = math.sqrt(np.mean(squares))
    size = math.sqrt(np.mean(exact**2))
    spread = math.sqrt(np.mean(np.var(exact, axis=0)))
    row: dict[str, Any] = {
        **{f.name: getattr(job, f.name) for f in dataclasses.fields(job)},
        "features": type(fm).__name__,
        "relative": rmse / size,
        "low": math.sqrt(min(squares)) / size,
        "high": math.sqrt(max(squares)) / size,
        "to_spread": rmse / spread,
        "r2": 1 - (rmse / spread) ** 2,
        "constant": spread / size,
        "keys": keys,
    }
    if config.predict and job.study == "activations" and not readout:
        predicted = snnk.diagnostics.predicted_rmse(
            fm, params, layer.calibration, layer.kernel, bias
        )
        row["predicted"] = predicted / spread
    if job.study in ("activations", "projections"):
        affine = snnk.diagnostics.affine_rmse(
            job.activation, layer.x, layer.kernel, bias
        )
        row["affine"] = affine / spread
        row["best_affine"] = _best_affine(job, layer, bias, exact) / spread
    return row


def _fitted(job: Job, params: Any, layer: Layer, bias: jax.Array | None) -> jax.Array:
    """ReLU features and an affine part with a readout fitted to the layer."""

    def columns(x: jax.Array) -> jax.Array:
        ones = jnp.ones((len(x), 1), x.dtype)
        return jnp.concatenate([ones, x, job.features.phi(params, x)], axis=1)

    target = snnk.kernels.ffl(job.activation, layer.calibration, layer.kernel, bias)
    psi, _ = snnk.calibration.fit_linear(columns(layer.calibration), target)
    return snnk.contract(columns(layer.x), psi)


def _best_affine(
    job: Job, layer: Layer, bias: jax.Array | None, exact: np.ndarray
) -> float:
    """Error of the affine map of x fitted on the calibration inputs."""

    def columns(x: jax.Array) -> np.ndarray:
        return np.concatenate([np.ones((len(x), 1)), _wide(x)], axis=1)

    target = snnk.kernels.ffl(job.activation, layer.calibration, layer.kernel, bias)
    solution, *_ = np.linalg.lstsq(
        columns(layer.calibration), _wide(target), rcond=None
    )
    return math.sqrt(np.mean((columns(layer.x) @ solution - exact) ** 2))


def _wide(values: jax.Array) -> np.ndarray:
    return np.asarray(values, np.float64)


def check(config: Any) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    studies = ("projections", "activations", "arccos", "exponential", "polynomial")
    choices: dict[str, Iterable[str]] = {
        "studies": studies,
        "regimes": REGIMES,
        "projections": snnk.projections.gaussian_names(),
        "activations": snnk.activations.names(),
    }
    for key, known in choices.items():
        unknown = [name for name in config[key] if name not in known]
        if unknown or not config[key]:
            raise ValueError(
                f"config.{key} must be some of {', '.join(known)}. Got {config[key]}."
            )
    for key in ("dim", "outputs", "calibration", "examples", "draws", "readout_draws"):
        if not config[key] > 0:
            raise ValueError(f"config.{key} must be positive. Got {config[key]}.")
    if not config.num_features or min(config.num_features) < 16:
        raise ValueError(
            f"config.num_features must be at least 16. Got {config.num_features}."
        )


def run(
    config: ConfigDict, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Measures every job and writes the report; finished jobs are not repeated.

    Args:
      config: a config of ``configs/kernel_error.py``.
      workdir: folder of ``rows.jsonl``, ``report.md`` and the plots.
      command: shown in the report.

    Returns:
      The rows of the report.
    """
    check(config)
    layers = {name: make_layer(REGIMES[name], config) for name in config.regimes}
    todo = [
        (job.name, functools.partial(measure, job, layers[job.regime], config))
        for job in jobs(config)
    ]
    sizes = {
        name: dataclasses.asdict(
            snnk.diagnostics.kappa(layer.calibration, layer.kernel)
        )
        for name, layer in layers.items()
    }
    return run_study(
        config,
        workdir,
        command,
        todo,
        functools.partial(_report, sizes=sizes, config=config),
    )


def _report(
    workdir: pathlib.Path,
    rows: list[dict[str, Any]],
    sizes: dict[str, dict[str, float]],
    config: ConfigDict,
) -> list[str]:
    parts = []
    size_rows = [
        [name, *(f"{value:.3g}" for value in size.values())]
        for name, size in sizes.items()
    ]
    parts.append(_table(["regime", "kappa", "balanced", "rms of w.x"], size_rows))
    for study in config.studies:
        mine = [row for row in rows if row["study"] == study]
        if not mine:
            continue
        key = "to_spread" if study == "activations" else "relative"
        parts.append(f"## {study}\n\n{_DESCRIPTIONS[study]}")
        parts.append(_study_table(mine, key))
        if study == "activations" and config.predict:
            parts.append(_prediction_table(mine))
        curves = _curves(mine, key)
        if curves:
            plots.log_curves(workdir / f"{study}.png", curves, _AXES[key])
            parts.append(f"![{study}]({study}.png)")
    return parts


_AXES = {
    "relative": "relative Frobenius error",
    "to_spread": "error / spread of the outputs",
}
_DESCRIPTIONS = {
    "projections": (
        "cos(x @ kernel) without biases: relative Frobenius error, root mean square "
        "over keys; *constant* predicts each output's mean."
    ),
    "activations": (
        "Layers with biases: error relative to the outputs' own spread over inputs; "
        "*affine* is the exact Taylor map, *best affine* is fitted."
    ),
    "arccos": "Arc-cosine features against their own kernel K_n: relative error.",
    "exponential": "exp(x @ kernel): relative Frobenius error.",
    "polynomial": "0.5 - z + 0.7 z^2 + 0.2 z^3: relative Frobenius error.",
}


def _study_table(rows: list[dict[str, Any]], key: str) -> str:
    """One line a map and activation at each m, one column a regime."""
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        name = (row["activation"], row["label"], str(row["num_features"]))
        cells.setdefault(name, {})[row["regime"]] = _number(row[key])
        unit = 1.0 if key == "to_spread" else row["constant"]
        for rival in ("affine", "best_affine"):
            if rival in row:
                line = cells.setdefault((row["activation"], rival, ""), {})
                line[row["regime"]] = _number(row[rival] * unit)
        if key == "relative":
            line = cells.setdefault((row["activation"], "constant", ""), {})
            line[row["regime"]] = _number(row["constant"])
    order = sorted(cells, key=lambda name: (name[0], name[2] != "", name[1]))
    lines = [[*name, *(cells[name].get(r, "") for r in regimes)] for name in order]
    return _table(["f", "map", "m", *regimes], lines)


def _prediction_table(rows: list[dict[str, Any]]) -> str:
    """Predicted over measured error, by map: how far the diagnostics are right."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        predicted = row.get("predicted")
        if predicted is not None and math.isfinite(predicted * row["to_spread"]):
            small = REGIMES[row["regime"]].kappa <= 2
            name = (row["label"], "at most 2" if small else "4 and more")
            ratios.setdefault(name, []).append(predicted / row["to_spread"])
    lines = []
    for name, values in ratios.items():
        within = np.mean(np.abs(np.array(values) - 1) <= 0.15)
        quantiles = np.quantile(values, (0.0, 0.5, 1.0))
        cells = (f"{q:.2f}" if q > 0.005 else f"{q:.0e}" for q in quantiles)
        lines.append([*name, *cells, f"{within:.0%}"])
    header = ["predicted / measured", "kappa", "least", "median", "largest"]
    return _table([*header, "within 15 %"], lines)


def _curves(
    rows: list[dict[str, Any]], key: str
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Panels by regime of error against m; of the first activation where several."""
    first = rows[0]["activation"]
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["activation"] != first or not math.isfinite(row[key]):
            continue
        lines = panels.setdefault(f"{first}, {row['regime']}", {})
        lines.setdefault(row["label"], []).append((row["num_features"], row[key]))
        unit = 1.0 if key == "to_spread" else row["constant"]
        rivals = {"constant": unit, "affine": row.get("affine", np.nan) * unit}
        for rival, value in rivals.items():
            if math.isfinite(value):
                points = lines.setdefault(rival, [])
                if (row["num_features"], value) not in points:
                    points.append((row["num_features"], value))
    return panels


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "inf"
    return f"{value:.3f}" if value < 100 else f"{value:.0e}"


def _table(header: list[str], lines: list[list[str]]) -> str:
    return markdown([header, *lines], left=len(header))
