r"""Physics-informed networks: two quantum particles, and the Burgers equation.

Both ansatzes satisfy the boundary and initial conditions exactly, so that nothing but
the equation is in the loss.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.networks.training import Problem

# Half the side of the box: the exact wave function is below 1e-5 on its walls.
_WALL = 4.0
# Points on a side of the grid that judges.
_SIDE = 64


def problems(config: ConfigDict) -> list[Problem]:
    """The problems that the config names."""
    return [PROBLEMS[name](config) for name in config.problems]


def derivatives(
    f: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``f``, its first and its second derivative along a coordinate, ``[n]`` each.

    Args:
      f: from ``[n, d]`` to ``[n]``, a function of each row alone.
      x: points, ``[n, d]``.
      axis: the coordinate.
    """
    direction = jnp.zeros_like(x).at[:, axis].set(1)

    def slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(f, (x,), (direction,))

    (value, first), (_, second) = jax.jvp(slope, (x,), (direction,))
    return value, first, second


def two_body(config: ConfigDict) -> Problem:
    r"""The ground state of two particles in a trap that attract one another.

    :math:`H = -\tfrac12(\partial_1^2 + \partial_2^2) + \tfrac12(x_1^2 + x_2^2) +
    \tfrac k2 (x_1 - x_2)^2`. In :math:`R, r = (x_1 \pm x_2)/\sqrt2` it is two
    oscillators, of frequencies 1 and :math:`\omega = \sqrt{1 + 2k}`, so that
    :math:`E = (1 + \omega)/2` and :math:`\psi \propto e^{-R^2/2 - \omega r^2/2}`.

    The loss is the Rayleigh quotient :math:`\int \tfrac12 |\nabla\psi|^2 + V\psi^2 /
    \int \psi^2 \ge E` on a grid that is shifted at random in every step; the residual
    of the equation would be zero at excited states too.
    """
    coupling = config.two_body.coupling
    omega = math.sqrt(1 + 2 * coupling)
    energy = (1 + omega) / 2
    # Midpoints: exact to rounding for a smooth function that vanishes on the walls.
    x = _square(_SIDE, jnp.full((1, 2), 0.5))
    centre, relative = (x[:, 0] + x[:, 1]) ** 2 / 2, (x[:, 0] - x[:, 1]) ** 2 / 2
    exact = _unit(jnp.exp(-(centre + omega * relative) / 2))
    data = {"x": x, "exact": exact}

    def psi(model: Any, x: jax.Array) -> jax.Array:
        return jnp.prod(1 - (x / _WALL) ** 2, axis=-1) * model(x)[:, 0]

    def quotient(model: Any, x: jax.Array) -> jax.Array:
        value, pullback = jax.vjp(lambda x: psi(model, x), x)
        (slopes,) = pullback(jnp.ones_like(value))
        potential = jnp.sum(x**2, axis=-1) / 2
        potential = potential + coupling / 2 * (x[:, 0] - x[:, 1]) ** 2
        density = jnp.sum(slopes**2, axis=-1) / 2 + potential * value**2
        return jnp.sum(density) / jnp.sum(value**2)

    def loss(model: Any, data: Any, key: jax.Array) -> jax.Array:
        side = math.isqrt(config.optim.batch_size)
        return quotient(model, _square(side, jax.random.uniform(key, (1, 2))))

    def evaluate(model: Any, data: Any) -> dict[str, jax.Array]:
        found = quotient(model, data["x"])
        error = jnp.linalg.norm(_unit(psi(model, data["x"])) - data["exact"])
        return {
            "quotient": found,
            "error": error,
            "log10_error": jnp.log10(error),
            "energy_error": jnp.abs(found / energy - 1),
        }

    return Problem(
        name="two_body",
        inputs=2,
        outputs=1,
        data=data,
        example=x,
        loss=loss,
        evaluate=evaluate,
        choose_by="quotient",
        reported={
            "error": "relative L2 error",
            "energy_error": "relative error of E",
        },
        curve="log10_error",
        truth=np.asarray(exact).reshape(_SIDE, _SIDE),
        predict=lambda model, data: _unit(psi(model, data["x"])).reshape(_SIDE, _SIDE),
    )


def _square(side: int, shift: jax.Array) -> jax.Array:
    """A grid over the box, ``[side ** 2, 2]``, shifted by parts of its spacing."""
    line = jnp.arange(side, dtype=jnp.float32)
    grid = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), axis=-1)
    return _WALL * (2 * (grid.reshape(-1, 2) + shift) / side - 1)


def _unit(psi: jax.Array) -> jax.Array:
    """The wave function of unit norm on the grid, positive on the whole."""
    return psi / (jnp.linalg.norm(psi) * jnp.sign(jnp.sum(psi)))


def burgers(config: ConfigDict) -> Problem:
    r"""The Burgers equation :math:`u_t + u u_x = \nu u_{xx}`, into its shock.

    On :math:`x \in [-1, 1]`, :math:`t \in [0, 1]`, from :math:`u(0, x) =
    -\sin \pi x`. The ansatz is :math:`u = -\sin(\pi x) + t(1 - x^2) N(t, x)`, the loss
    the mean square of the residual on random points.
    """
    viscosity = config.burgers.viscosity
    times, places = np.linspace(0, 1, _SIDE), np.linspace(-1, 1, 4 * _SIDE)
    exact = burgers_solution(times, places, viscosity)
    grid = np.stack(np.meshgrid(times, places, indexing="ij"), axis=-1).reshape(-1, 2)
    data = {
        "x": jnp.asarray(grid, jnp.float32),
        "exact": jnp.asarray(exact.reshape(-1), jnp.float32),
    }

    def solution(model: Any, points: jax.Array) -> jax.Array:
        t, x = points[:, 0], points[:, 1]
        return -jnp.sin(jnp.pi * x) + t * (1 - x**2) * model(points)[:, 0]

    def residual(model: Any, points: jax.Array) -> jax.Array:
        def u(points: jax.Array) -> jax.Array:
            return solution(model, points)

        later = jnp.zeros_like(points).at[:, 0].set(1)
        _, u_t = jax.jvp(u, (points,), (later,))
        value, u_x, u_xx = derivatives(u, points, 1)
        return u_t + value * u_x - viscosity * u_xx

    def loss(model: Any, data: Any, key: jax.Array) -> jax.Array:
        unit = jax.random.uniform(key, (config.optim.batch_size, 2))
        points = jnp.stack([unit[:, 0], 2 * unit[:, 1] - 1], axis=-1)
        return jnp.mean(residual(model, points) ** 2)

    def evaluate(model: Any, data: Any) -> dict[str, jax.Array]:
        error = jnp.linalg.norm(solution(model, data["x"]) - data["exact"])
        error = error / jnp.linalg.norm(data["exact"])
        return {
            "residual": jnp.mean(residual(model, data["x"]) ** 2),
            "error": error,
            "log10_error": jnp.log10(error),
        }

    return Problem(
        name="burgers",
        inputs=2,
        outputs=1,
        data=data,
        example=data["x"],
        loss=loss,
        evaluate=evaluate,
        choose_by="residual",
        reported={"error": "relative L2 error", "residual": "mean squared residual"},
        curve="log10_error",
        truth=exact,
        predict=lambda model, data: solution(model, data["x"]).reshape(exact.shape),
    )


def burgers_solution(
    times: np.ndarray, places: np.ndarray, viscosity: float, order: int = 200
) -> np.ndarray:
    r"""The solution by the Cole-Hopf transform and Gauss-Hermite quadrature.

    .. math::
      u(t, x) = -\frac{\int \sin\pi(x - \eta)\, g(x - \eta)\, e^{-\eta^2/4\nu t} d\eta}
        {\int g(x - \eta)\, e^{-\eta^2/4\nu t} d\eta}, \qquad
      g(y) = e^{-\cos(\pi y)/2\pi\nu}.

    Args:
      times: ``[t]``.
      places: ``[x]``.
      viscosity: :math:`\nu`.
      order: nodes of the quadrature.

    Returns:
      ``float64[t, x]``.

    References:
      Basdevant et al., "Spectral and finite difference solutions of the Burgers
      equation", Computers & Fluids 14, 1986.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(order)
    spread = np.sqrt(4 * viscosity * times)[:, None, None]
    y = places[None, :, None] - spread * nodes[None, None, :]
    exponent = -np.cos(np.pi * y) / (2 * np.pi * viscosity)
    density = np.exp(exponent - exponent.max(axis=-1, keepdims=True)) * weights
    return -(np.sin(np.pi * y) * density).sum(axis=-1) / density.sum(axis=-1)


PROBLEMS = {"two_body": two_body, "burgers": burgers}


def check(config: ConfigDict) -> None:
    """Raises ValueError for an equation that is not there, or has no solution."""
    if not config.problems or not set(config.problems) <= set(PROBLEMS):
        raise ValueError(
            f"config.problems must be some of {', '.join(PROBLEMS)}. "
            f"Got {config.problems}."
        )
    if not config.two_body.coupling >= 0:
        raise ValueError(
            "config.two_body.coupling must not be negative. "
            f"Got {config.two_body.coupling}."
        )
    if not config.burgers.viscosity > 0:
        raise ValueError(
            "config.burgers.viscosity must be positive. "
            f"Got {config.burgers.viscosity}."
        )
