r"""How errors of random features grow with depth, beside the bound on them.

Networks ``f(... f(x W_1 + b_1) ... W_L + b_L)`` of several norms, at every depth: each
layer replaced by an SNNK layer, the whole bundled, the bundled features with a readout
in closed form, and the constant predictor. All errors are against the exact network, on
inputs that no method has seen, relative to the size of its outputs.

The bound is the recursion :math:`e_1 = \epsilon_1`,
:math:`e_k = \epsilon_k + \delta_k(e_{k-1})` with :math:`\delta_k(a) = \mathrm{Lip}(f)
\lVert W_k\rVert a` in root mean square, and :math:`\epsilon_k` either what layer k was
measured to add or, where features are bounded, Hoeffding's
:math:`c \sqrt{2 \ln(2 N / p) / n}` for n directions, taken together over the N outputs
of all layers at all inputs. (The paper's form has the number of features upside down.)
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import snnk_jax as snnk
from experiments import plots
from experiments.jobs import run_study
from experiments.report import markdown
from snnk_jax.features import URF, ArcCosine, Chain, FeatureMap

METHODS = {
    "layerwise": "each layer replaced",
    "bound": "bound, measured ε",
    "bounded": "each layer replaced, A < 0",
    "hoeffding": "bound, Hoeffding ε",
    "bundled": "bundled",
    "closed form": "bundled, readout in closed form",
    "constant": "constant",
}
"""Keys of a row and what they are called; each is one number a depth."""

ACTIVATIONS = ("cos", "gelu", "arccos")


@dataclasses.dataclass(frozen=True)
class Job:
    """One network with one draw of the features."""

    activation: str
    norm: float
    num_features: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.activation} | {self.norm:g} | {self.num_features} | {self.seed}"


@dataclasses.dataclass(frozen=True)
class Network:
    """Weights, inputs to solve on and inputs to judge on."""

    kernels: list[jax.Array]
    biases: list[jax.Array | None]
    calibration: jax.Array
    x: jax.Array


def jobs(config: ConfigDict) -> Iterator[Job]:
    """All jobs of a config, in the order of the report."""
    for activation in config.activations:
        # Homogeneous: relative errors of arccos do not depend on the norm.
        norms = config.norms[:1] if activation == "arccos" else config.norms
        for norm in norms:
            for num_features in config.num_features:
                for seed in config.seeds:
                    yield Job(activation, norm, num_features, seed)


def make_network(job: Job, config: ConfigDict) -> Network:
    """A network whose weight columns have one norm, and inputs of norm 1."""
    rng = np.random.default_rng(job.seed)
    kernels, biases = [], []
    for _ in range(config.depth):
        kernel = rng.normal(size=(config.dim, config.dim))
        kernels.append(job.norm * kernel / np.linalg.norm(kernel, axis=0))
        biases.append(config.bias_std * rng.normal(size=config.dim))
    x = rng.normal(size=(config.calibration + config.examples, config.dim))
    x /= np.linalg.norm(x, axis=1, keepdims=True)

    def cast(array: np.ndarray) -> jax.Array:
        return jnp.asarray(array, jnp.float32)

    return Network(
        [cast(kernel) for kernel in kernels],
        # The arc-cosine kernel has no bias.
        [None if job.activation == "arccos" else cast(bias) for bias in biases],
        cast(x[: config.calibration]),
        cast(x[config.calibration :]),
    )


def exact_layer(
    activation: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """What an SNNK layer estimates: the kernel itself for ``arccos``."""
    if activation == "arccos":
        return snnk.kernels.arc_cosine(x, kernel)
    return snnk.kernels.ffl(activation, x, kernel, bias)


def lipschitz(activation: str, kernel: jax.Array) -> float:
    """A Lipschitz constant of the layer in Euclidean norms.

    The gradient of the arc-cosine kernel of order 1 has at most the norm of the weight.
    """
    weights = np.asarray(kernel, np.float64)
    if activation == "arccos":
        return float(np.linalg.norm(weights))
    grid = jnp.linspace(-10.0, 10.0, 10001)
    slope = float(jnp.abs(snnk.activations.get(activation).grad(grid)).max())
    return slope * float(np.linalg.norm(weights, ord=2))


def layer_features(
    job: Job, x: jax.Array, kernel: jax.Array, *, bounded: bool = False
) -> FeatureMap:
    """The map of one layer, scaled for its inputs; A < 0 where it is to be bounded."""
    if job.activation == "arccos":
        return ArcCosine(num_features=job.num_features)
    input_norm = float(jnp.linalg.norm(x, axis=1).mean())
    scale = math.sqrt(job.norm / input_norm)
    if bounded:
        shape = best_bounded_shape(job.norm * input_norm, kernel.shape[0])
        return URF(
            activation=job.activation,
            num_features=job.num_features,
            projection="gaussian",  # independent directions, as Hoeffding needs
            scale=scale,
            shape=shape,
        )
    return URF(
        activation=job.activation,
        num_features=job.num_features,
        scale=scale,
        kappa=min(job.norm * input_norm, 10.0),
        exact_degree=None if job.activation == "cos" else 1,
    )


def best_bounded_shape(kappa: float, dim: int) -> float:
    r"""The A < 0 of the least bound on one direction's product, balanced scale.

    Its logarithm :math:`\tfrac d2 \log(1 + 4a) + \kappa (1 + 4a) / (8a)`, a = -A, is
    least where :math:`16 d a^2 = \kappa (1 + 4a)`.
    """
    return -(4 * kappa + math.sqrt(16 * kappa**2 + 64 * dim * kappa)) / (32 * dim)


def largest_product(fm: URF, x: jax.Array, kernel: jax.Array) -> np.ndarray:
    r"""A bound c on the products of one direction, ``[n, o]``, for one cosine.

    Over all g, :math:`(1 - 4A)^{d/2} e^{2A|g|^2 + \sqrt{1 - 4A}\, g^\top u - |u|^2/2 +
    |t|^2/2}` with :math:`t = c x` and :math:`u = w / c`.
    """
    assert fm.scale is not None
    data, weights = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    t = fm.scale**2 * np.sum(data**2, axis=1)[:, None]
    u = np.sum(weights**2, axis=0)[None] / fm.scale**2
    stretch = 1 - 4 * fm.shape
    exponent = (stretch / (8 * -fm.shape) - 0.5) * u + t / 2
    with np.errstate(over="ignore"):
        return np.exp(len(weights) / 2 * math.log(stretch) + exponent)


def layerwise(
    job: Job, network: Network, config: ConfigDict, *, bounded: bool = False
) -> tuple[list[float], list[float]]:
    """Errors of replaced layers, by depth, and the bound on them; not yet relative."""
    errors, bounds = [], []
    exact = estimate = network.x
    bound = 0.0
    keys = jax.random.split(jax.random.key(job.seed + 1), config.depth)
    outputs = config.depth * config.dim * config.examples
    for key, kernel, bias in zip(keys, network.kernels, network.biases, strict=True):
        fm = layer_features(job, exact, kernel, bounded=bounded)
        params = fm.init(key, config.dim)
        if bounded:
            assert isinstance(fm, URF)
            tail = 2 * math.log(2 * outputs / config.failure)
            c = largest_product(fm, estimate, kernel)
            added = _rms(c) * math.sqrt(tail / (fm.num_features // 2))
            estimate = snnk.snnk_dense(fm, params, estimate, kernel, bias)
        else:
            ideal = exact_layer(job.activation, estimate, kernel, bias)
            estimate = snnk.snnk_dense(fm, params, estimate, kernel, bias)
            added = _rms(estimate - ideal)
        exact = exact_layer(job.activation, exact, kernel, bias)
        bound = added + lipschitz(job.activation, kernel) * bound
        errors.append(_rms(estimate - exact))
        bounds.append(bound)
    return errors, bounds


def level_features(job: Job, config: ConfigDict) -> list[FeatureMap] | None:
    """Maps to bundle, or None for GELU.

    Its linear part takes one column for each feature of the level before, so that
    levels would have to grow.
    """
    if job.activation == "arccos":
        fm: FeatureMap = ArcCosine(num_features=job.num_features)
    elif job.activation == "cos":
        fm = URF(activation="cos", num_features=job.num_features)
    else:
        return None
    return [fm] * config.depth


def bundled_errors(
    job: Job, network: Network, maps: list[FeatureMap], exact: list[jax.Array]
) -> tuple[list[float], list[float | None]]:
    """Errors of the bundled network and its last kappa, by depth.

    Infinite from the depth on where features or readout overflow.
    """
    errors = [math.inf] * len(maps)
    kappas: list[float | None] = [None] * len(maps)
    for depth in range(1, len(maps) + 1):
        try:
            net = snnk.bundle(
                network.kernels[:depth],
                network.biases[:depth],
                maps[:depth],
                jax.random.key(job.seed + 1),
                x=network.calibration,
                max_kappa=math.inf,
            )
        except ValueError as error:
            if "must be finite" not in str(error):
                raise
            break
        errors[depth - 1] = _rms(net(network.x) - exact[depth - 1])
        kappas[depth - 1] = net.levels[-1].kappa
    return errors, kappas


def solved_errors(
    job: Job,
    network: Network,
    maps: list[FeatureMap],
    config: ConfigDict,
    targets: list[jax.Array],
    exact: list[jax.Array],
) -> list[float]:
    """Errors of bundled, rescaled features with readout and bias fitted, by depth."""
    net = snnk.bundle(
        network.kernels,
        network.biases,
        maps,
        jax.random.key(job.seed + 1),
        x=network.calibration,
        max_kappa=config.max_kappa,
        rescale=True,
    )
    errors = []
    for depth, (target, truth) in enumerate(zip(targets, exact, strict=True), start=1):
        chain = Chain(net.features.maps[:depth])  # its parameters are the first ones

        def columns(x: jax.Array, chain: Chain = chain) -> jax.Array:
            ones = jnp.ones((len(x), 1), x.dtype)
            return jnp.concatenate([ones, chain.phi(net.params, x)], axis=1)

        readout, _ = snnk.calibration.fit_linear(columns(network.calibration), target)
        errors.append(_rms(snnk.contract(columns(network.x), readout) - truth))
    return errors


def measure(job: Job, config: ConfigDict) -> dict[str, Any]:
    """Relative errors of every method at every depth."""
    network = make_network(job, config)
    targets, judged = [network.calibration], [network.x]
    for kernel, bias in zip(network.kernels, network.biases, strict=True):
        for values in (targets, judged):
            values.append(exact_layer(job.activation, values[-1], kernel, bias))
    exact = judged[1:]
    errors: dict[str, list[float]] = {}
    errors["layerwise"], errors["bound"] = layerwise(job, network, config)
    if job.activation == "cos":
        errors["bounded"], errors["hoeffding"] = layerwise(
            job, network, config, bounded=True
        )
    kappas: list[float | None] = []
    maps = level_features(job, config)
    if maps is not None:
        errors["bundled"], kappas = bundled_errors(job, network, maps, exact)
        errors["closed form"] = solved_errors(
            job, network, maps, config, targets[1:], exact
        )
    errors["constant"] = [
        _rms(value - target.mean(axis=0)[None])
        for value, target in zip(exact, targets[1:], strict=True)
    ]
    sizes = [_rms(value) for value in exact]
    return {
        **dataclasses.asdict(job),
        **{
            method: [e / size for e, size in zip(values, sizes, strict=True)]
            for method, values in errors.items()
        },
        "kappa": kappas,
    }


def _rms(values: jax.Array | np.ndarray) -> float:
    """Root mean square of the Euclidean norms of rows; infinite for NaN."""
    with np.errstate(over="ignore"):
        squares = np.sum(np.asarray(values, np.float64) ** 2, axis=1)
        mean = float(np.mean(squares))
    return math.sqrt(mean) if math.isfinite(mean) else math.inf


def check(config: Any) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    unknown = [name for name in config.activations if name not in ACTIVATIONS]
    if unknown or not config.activations:
        raise ValueError(
            f"config.activations must be some of {', '.join(ACTIVATIONS)}. "
            f"Got {config.activations}."
        )
    for key in ("dim", "depth", "calibration", "examples", "max_kappa"):
        if not config[key] > 0:
            raise ValueError(f"config.{key} must be positive. Got {config[key]}.")
    if not config.norms or not all(0 < norm < math.inf for norm in config.norms):
        raise ValueError(f"config.norms must be positive. Got {config.norms}.")
    least = config.dim + 1 + 2 * 8  # the linear part and the waves of GELU
    if not config.num_features or min(config.num_features) < least:
        raise ValueError(
            f"config.num_features must be at least {least} for {config.dim} inputs. "
            f"Got {config.num_features}."
        )
    if not config.seeds or min(config.seeds) < 0:
        raise ValueError(f"config.seeds must be numbers from 0 on. Got {config.seeds}.")
    if not 0 < config.failure < 1:
        raise ValueError(f"config.failure must be in (0, 1). Got {config.failure}.")
    if not config.bias_std >= 0:
        raise ValueError(
            f"config.bias_std must not be negative. Got {config.bias_std}."
        )


def run(
    config: ConfigDict, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Measures every network and writes the report; finished jobs are not repeated.

    Args:
      config: a config of ``configs/depth_error.py``.
      workdir: folder of ``rows.jsonl``, ``report.md`` and the plots.
      command: shown in the report.

    Returns:
      The rows, one a network and draw.
    """
    check(config)
    todo = [(job.name, functools.partial(measure, job, config)) for job in jobs(config)]
    return run_study(
        config, workdir, command, todo, functools.partial(report, config=config)
    )


def report(
    workdir: pathlib.Path, rows: list[dict[str, Any]], config: ConfigDict
) -> list[str]:
    """The parts of the report; the plots are drawn on the way."""
    parts = [
        f"Layers of {config.dim} inputs and outputs, inputs of norm 1, weight columns "
        f"of the norm given. Median over {len(config.seeds)} networks, each with its "
        "own draw of the features; the last column has their range at the last depth. "
        "*inf*: features or bound left the range of floating point."
    ]
    for num_features in config.num_features:
        mine = [row for row in rows if row["num_features"] == num_features]
        file = f"m{num_features}.png"
        plots.depth_curves(workdir / file, _panels(mine), "relative error")
        parts.append(f"## m = {num_features}\n\n![m = {num_features}]({file})")
        parts.append(_table(mine, config))
    kappas = _kappa_table(rows, config)
    if kappas:
        parts.append("## kappa of the bundled levels, without rescaling\n\n" + kappas)
    return parts


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[str, float], list[Any]]:
    groups: dict[tuple[str, float], list[Any]] = {}
    for row in rows:
        groups.setdefault((row["activation"], row["norm"]), []).append(row)
    return groups


def _table(rows: list[dict[str, Any]], config: ConfigDict) -> str:
    depths = [str(depth) for depth in range(1, config.depth + 1)]
    lines = [["f", "norm", "method", *depths, f"range at {config.depth}"]]
    for (activation, norm), group in _groups(rows).items():
        for method, title in METHODS.items():
            if method in group[0]:
                values = np.array([row[method] for row in group])
                cells = [_number(value) for value in np.median(values, axis=0)]
                spread = f"{_number(values[:, -1].min())} to "
                spread += _number(values[:, -1].max())
                lines.append([activation, f"{norm:g}", title, *cells, spread])
    return markdown(lines, left=3)


def _kappa_table(rows: list[dict[str, Any]], config: ConfigDict) -> str:
    depths = [str(depth) for depth in range(1, config.depth + 1)]
    lines = [["f", "norm", "m", *depths]]
    for (activation, norm), group in _groups(rows).items():
        for num_features in config.num_features:
            mine = [row for row in group if row["num_features"] == num_features]
            values = [
                [math.inf if kappa is None else kappa for kappa in row["kappa"]]
                for row in mine
                if activation == "cos"
            ]
            if values:
                cells = [_number(value) for value in np.median(values, axis=0)]
                lines.append([activation, f"{norm:g}", str(num_features), *cells])
    return markdown(lines, left=3) if len(lines) > 1 else ""


def _panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Errors ``[seed, depth]`` by panel and method."""
    return {
        f"{activation}, weights of norm {norm:g}": {
            title: np.array([row[method] for row in group])
            for method, title in METHODS.items()
            if method in group[0]
        }
        for (activation, norm), group in _groups(rows).items()
    }


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "inf"
    if value and not 1e-3 <= value < 1e3:
        return f"{value:.0e}"
    return f"{value:.3g}"
