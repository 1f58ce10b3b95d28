"""How well truncated Hermite series compute the kernel of an activation.

Inputs as in Figure 1 of "Fast Neural Kernel Embeddings for General Activations" (Han et
al., arXiv 2209.04121), at other norms as well. The published recipe takes the Hermite
coefficients at norm one and the dual kernel of the polynomial that they make; ours
takes them at the norm of each input. All in float64.
"""

import functools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import snnk_jax as snnk
from experiments import plots
from experiments.jobs import Job, run_study
from experiments.report import markdown
from snnk_jax.infinite._hermite import coefficients, polynomial_table, truncation

METHODS = {
    "own": "coefficients at each norm",
    "bound": "bound on it",
    "mended": "published, mended",
    "released": "published, as released",
}


def inputs(config: Any, norm: float) -> np.ndarray:
    """Gaussian rows whose norms lie around ``norm``."""
    rng = np.random.default_rng(config.seed)
    x = rng.normal(size=(config.examples, config.dim))
    return x * norm / math.sqrt(config.dim)


def exact_kernel(activation: str, x: np.ndarray) -> np.ndarray:
    """The dual kernel, in closed form where there is one."""
    net = snnk.infinite.serial(
        snnk.infinite.Dense(), snnk.infinite.Activation(activation)
    )
    with jax.enable_x64(True):
        rows = jnp.asarray(x * math.sqrt(x.shape[1]), jnp.float64)
        return np.asarray(net.kernel(rows, get="nngp"))


def published_series(activation: str, degree: int) -> np.ndarray:
    """The polynomial of the Hermite series at norm one, in powers of z."""
    series = snnk.activations.get(activation).hermite(degree + 1)
    roots = np.sqrt([math.factorial(j) for j in range(degree + 1)])
    powers = np.polynomial.hermite_e.herme2poly(series / roots)
    return np.pad(powers, (0, degree + 1 - len(powers)))


def measure(activation: str, norm: float, config: Any) -> dict[str, Any]:
    """Errors of every method at every degree, relative in the Frobenius norm."""
    x = inputs(config, norm)
    exact = exact_kernel(activation, x)
    size = np.linalg.norm(exact)
    own, bound, worst, excess = _own_errors(activation, x, exact, config.own_degrees)
    released, mended = _published_errors(activation, x, exact, config.degrees)
    row = {
        "activation": activation,
        "norm": norm,
        "own": own / size,
        "bound": bound / size,
        "worst": worst,
        "excess": excess,
        "released": released / size,
        "mended": mended / size,
        "monte_carlo": [
            _monte_carlo(activation, x, exact, m, config.seed + 1) / size
            for m in config.samples
        ],
    }
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}


def _own_errors(
    activation: str, x: np.ndarray, exact: np.ndarray, degrees: int
) -> tuple[np.ndarray, ...]:
    """Frobenius errors, their bounds, the worst entry, the worst excess over a bound.

    Entries count relative to the root of the product of their diagonal entries.
    """
    row = snnk.activations.get(activation)
    norms = np.linalg.norm(x, axis=1)
    unit = x / norms[:, None]
    rho = np.clip(unit @ unit.T, -1, 1)
    np.fill_diagonal(rho, 1.0)
    root = np.sqrt(np.maximum(np.diag(exact), np.finfo(float).tiny))
    scale = np.outer(root, root)
    with jax.enable_x64(True):
        c = jnp.asarray(norms, jnp.float64)
        a = coefficients(row, degrees + 1, c)
        kept = jnp.tri(degrees + 1, dtype=a.dtype)  # degrees 0 to q, for each q
        each = jnp.broadcast_to(c[None], (degrees + 1, len(x)))
        tails = np.sqrt(truncation(row, kept[:, None] * a[None], each))
        a = np.asarray(a)
    rest, power = exact.copy(), np.ones_like(rho)
    columns = []
    for q in range(degrees + 1):
        rest -= np.outer(a[:, q], a[:, q]) * power
        power *= rho
        error, tail = np.abs(rest) / scale, np.outer(tails[q], tails[q])
        columns.append(
            (
                np.linalg.norm(rest),
                np.linalg.norm(tail),
                np.max(error),
                np.max(error - tail / scale),
            )
        )
    return tuple(np.array(columns).T)


def _published_errors(
    activation: str, x: np.ndarray, exact: np.ndarray, degrees: int
) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the dual of the published polynomial, without its last term and with.

    The released code returns before it adds the term of the highest degree.
    """
    square = np.sum(x**2, axis=1)
    q = x @ x.T
    np.fill_diagonal(q, square)
    errors = []
    with np.errstate(over="ignore", invalid="ignore"):
        for degree in range(degrees + 1):
            table = polynomial_table(tuple(published_series(activation, degree)))
            before, rest, power = exact, exact, np.ones_like(q)
            for entries in table:
                row = np.polynomial.polynomial.polyval(square, entries)
                before, rest = rest, rest - np.outer(row, row) * power
                power = power * q
            errors.append((np.linalg.norm(before), np.linalg.norm(rest)))
    return tuple(np.array(errors).T)


def _monte_carlo(
    activation: str, x: np.ndarray, exact: np.ndarray, samples: int, seed: int
) -> float:
    """The error of a mean over Gaussian directions."""
    row = snnk.activations.get(activation)
    rng = np.random.default_rng(seed)
    total = np.zeros_like(exact)
    for start in range(0, samples, 4096):
        count = min(4096, samples - start)
        phi = row.evaluate(x @ rng.normal(size=(x.shape[1], count)))
        total += phi @ phi.T
    return float(np.linalg.norm(total / samples - exact))


def jobs(config: Any) -> Iterator[Job]:
    """Every activation at every norm."""
    for activation in config.activations:
        for norm in config.norms:
            name = f"{activation} | {norm:g}"
            yield name, functools.partial(measure, activation, norm, config)


def check(config: Any) -> None:
    """Raises ValueError for a value that the experiment could not use."""
    for key in ("activations", "plotted"):
        unknown = [n for n in config[key] if n not in snnk.activations.names()]
        if unknown or not config[key]:
            raise ValueError(
                f"config.{key} must be among {', '.join(snnk.activations.names())}. "
                f"Got {config[key]}."
            )
    for key in ("examples", "dim", "degrees", "own_degrees"):
        if not config[key] > 0:
            raise ValueError(f"config.{key} must be positive. Got {config[key]}.")
    if not config.degrees <= config.own_degrees <= 63:
        raise ValueError(
            "config.own_degrees must be at least degrees and at most 63. "
            f"Got {config.own_degrees} and {config.degrees}."
        )
    for key in ("norms", "samples"):
        if not config[key] or not min(config[key]) > 0:
            raise ValueError(f"config.{key} must be positive. Got {config[key]}.")
    if config.seed < 0:
        raise ValueError(f"config.seed must not be negative. Got {config.seed}.")


def run(
    config: Any, workdir: str | pathlib.Path, command: str = ""
) -> list[dict[str, Any]]:
    """Measures every activation and writes the report; finished jobs are not repeated.

    Args:
      config: a config of ``configs/dual_error.py``.
      workdir: folder of ``rows.jsonl``, ``report.md`` and the plot.
      command: shown in the report.

    Returns:
      The rows, one an activation and norm.
    """
    check(config)
    return run_study(
        config,
        workdir,
        command,
        jobs(config),
        functools.partial(report, config=config),
    )


def report(
    workdir: pathlib.Path, rows: Sequence[dict[str, Any]], config: Any
) -> list[str]:
    """The parts of the report; the plot is drawn on the way."""
    excess = max(max(row["excess"]) for row in rows)
    shown = [
        row
        for activation in config.plotted
        for row in rows
        if row["activation"] == activation and row["norm"] in config.plotted_norms
    ]
    if shown:
        plots.depth_curves(
            workdir / "degrees.png",
            {
                f"{row['activation']}, norm {row['norm']:g}": _curves(row, config)
                for row in shown
            },
            "relative error",
            "Hermite degree",
        )
    return [
        f"{config.examples} Gaussian inputs of {config.dim} coordinates, norms around "
        "the one given; errors of the kernel matrix relative in the Frobenius norm.",
        "Of all degrees, activations and norms, no entry's error exceeds its bound by "
        f"more than {excess:.0e} of the root of its diagonal entries (rounding).",
        "![error against degree](degrees.png)",
        f"## Degree {config.table_degree}",
        _degree_table(rows, config),
        "## Least degree",
        f"For an error of {config.near_target:g} up to norm 1, of "
        f"{config.far_target:g} up to the largest norm; no more than "
        f"{config.own_degrees} are tried.",
        _least_table(rows, config),
    ]


def least_degree(errors: Sequence[float], target: float) -> int | None:
    """The first degree from which on no error is above the target."""
    above = [q for q, error in enumerate(errors) if not error <= target]
    first = above[-1] + 1 if above else 0
    return first if first < len(errors) else None


def _curves(row: dict[str, Any], config: Any) -> dict[str, np.ndarray]:
    stop = config.degrees + 1
    curves = {
        title: np.array([row[key][1:stop]], np.float64)
        for key, title in METHODS.items()
    }
    for samples, error in zip(config.samples, row["monte_carlo"], strict=True):
        curves[f"Monte Carlo, m = {samples:,}"] = np.full((1, config.degrees), error)
    return curves


def _degree_table(rows: Sequence[dict[str, Any]], config: Any) -> str:
    q = config.table_degree
    header = ["activation", "norm", *METHODS.values(), "worst entry"]
    lines = [[*header, *(f"Monte Carlo, m = {m:,}" for m in config.samples)]]
    for row in rows:
        cells = [_number(row[key][q]) for key in (*METHODS, "worst")]
        cells += [_number(error) for error in row["monte_carlo"]]
        lines.append([row["activation"], f"{row['norm']:g}", *cells])
    return markdown(lines, left=1)


def _least_table(rows: Sequence[dict[str, Any]], config: Any) -> str:
    norms = [f"norm {norm:g}" for norm in config.norms]
    header = ["activation", *norms, "up to norm 1", "up to the largest norm"]
    lines = [header]
    for activation in config.activations:
        mine = [row for row in rows if row["activation"] == activation]
        near = [least_degree(row["own"], config.near_target) for row in mine]
        far = [least_degree(row["own"], config.far_target) for row in mine]
        cells = [
            f"{_or_more(n)} / {_or_more(f)}" for n, f in zip(near, far, strict=True)
        ]
        small = [n for n, row in zip(near, mine, strict=True) if row["norm"] <= 1]
        lines.append([activation, *cells, _most(small), _most(far)])
    return markdown(lines, left=1)


def _most(degrees: Sequence[int | None]) -> str:
    known = [degree for degree in degrees if degree is not None]
    return str(max(known)) if len(known) == len(degrees) and known else "-"


def _or_more(degree: int | None) -> str:
    return "-" if degree is None else str(degree)


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "inf"
