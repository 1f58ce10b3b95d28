"""Activations: one row of facts per function.

Everything the library knows about a function stands in its :class:`Activation`: a
feature map asks the row, not a table of its own. Rows hash by value, so layers that
hold one compile once.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from snnk_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Atom:
    r"""One term :math:`a\cos(s z + \theta)` of a finite Fourier representation."""

    frequency: float
    amplitude: float = 1.0
    phase: float = 0.0


@dataclasses.dataclass(frozen=True)
class Activation:
    """A scalar function and what is known about it.

    Args:
      name: how errors and reports call it.
      fn: the function, applied elementwise to arrays, differentiable by JAX. Rows
        compare by it, so pass a module-level function or a ``functools.partial`` kept
        in one place, not a fresh lambda each time.
      atoms: the exact finite Fourier representation ``f(z) = sum of atoms``; empty if
        there is none.
      degree: ``n`` where ``f(c z) = c**n f(z)`` for all ``c > 0``; None otherwise.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> softsign = snnk.activations.Activation("softsign", lambda z: z / (1 + abs(z)))
      >>> float(softsign(jnp.array(1.0)))
      0.5
    """

    name: str
    fn: Callable[[Array], Array]
    atoms: tuple[Atom, ...] = ()
    degree: int | None = None

    def __post_init__(self):
        if not callable(self.fn):
            raise ValueError(f"fn must be callable. Got {self.fn!r}.")

    def __call__(self, z: Array) -> Array:
        """Applies the function elementwise."""
        return self.fn(z)


@dataclasses.dataclass(frozen=True)
class _Wave:
    """``a cos(b z + c)``, hashable by value."""

    a: float
    b: float
    c: float

    def __call__(self, z: Array) -> Array:
        return self.a * jnp.cos(self.b * z + self.c)


def _cos(a: float = 1.0, b: float = 1.0, c: float = 0.0) -> Activation:
    return Activation("cos", _Wave(a, b, c), atoms=(Atom(b, a, c),))


def _sin(a: float = 1.0, b: float = 1.0, c: float = 0.0) -> Activation:
    wave = _cos(a, b, c - math.pi / 2)
    return dataclasses.replace(wave, name="sin")


def _identity_fn(z: Array) -> Array:
    return z


_exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)


def _relu() -> Activation:
    return Activation("relu", jax.nn.relu, degree=1)


def _gelu(approximate: bool = False) -> Activation:
    return Activation("gelu", _tanh_gelu if approximate else _exact_gelu)


def _tanh() -> Activation:
    return Activation("tanh", jnp.tanh)


def _identity() -> Activation:
    return Activation("identity", _identity_fn, degree=1)


_ROWS: dict[str, Callable[..., Activation]] = {
    "cos": _cos,
    "gelu": _gelu,
    "identity": _identity,
    "relu": _relu,
    "sin": _sin,
    "tanh": _tanh,
}


def names() -> tuple[str, ...]:
    """Names that :func:`get` knows.

    Example:
      >>> import snnk_jax as snnk
      >>> "gelu" in snnk.activations.names()
      True
    """
    return tuple(_ROWS)


def get(
    activation: str | Activation | Callable[[Array], Array], **parameters: float | bool
) -> Activation:
    r"""Returns the row of an activation.

    Args:
      activation: a name of :func:`names`, a row (returned as it is), or a function.
      **parameters: parameters of the named row. ``cos`` and ``sin`` take ``a, b, c``
        for :math:`a\cos(bz+c)` and :math:`a\sin(bz+c)`; ``gelu`` takes ``approximate``
        (False: exact, by erf).

    Raises:
      ValueError: for an unknown name, with the nearest known ones, or parameters that
        the row does not have.

    Example:
      >>> import snnk_jax as snnk
      >>> snnk.activations.get("cos", b=2.0).atoms
      (Atom(frequency=2.0, amplitude=1.0, phase=0.0),)
    """
    if isinstance(activation, str):
        if activation not in _ROWS:
            close = difflib.get_close_matches(activation, _ROWS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"activation must be one of {', '.join(_ROWS)}, an Activation or a "
                f"function. Got {activation!r}.{hint}"
            )
        try:
            return _ROWS[activation](**parameters)
        except TypeError as error:
            raise ValueError(
                f"parameters must be those of {activation}. Got {parameters}: {error}."
            ) from error
    if parameters:
        raise ValueError(
            f"parameters must come with a name. Got {parameters} for {activation!r}."
        )
    if isinstance(activation, Activation):
        return activation
    if not callable(activation):
        raise ValueError(
            f"activation must be a name, an Activation or a function. "
            f"Got {activation!r}."
        )
    return Activation(getattr(activation, "__name__", repr(activation)), activation)
