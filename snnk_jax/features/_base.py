"""The contract of a feature map."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from snnk_jax import projections
from snnk_jax._arguments import check_size
from snnk_jax.projections import accumulation_dtype as accumulation_dtype
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray

Precision = Literal["default", "high", "highest"]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def compiled(method: _Method) -> _Method:
    """Compiles a method of a frozen dataclass as a whole, once per value and shapes.

    Called outside of ``jax.jit`` it is then one program, not dozens of small ones.
    """
    return cast(_Method, jax.jit(method, static_argnums=0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMap(abc.ABC):
    r"""A pair of maps with :math:`E[\Phi(x) \cdot \Psi(w, b)] = K(x, (w, b))`.

    A feature map is a frozen dataclass that hashes by value and holds no arrays: all
    randomness is in the pytree that :meth:`init` draws, and :meth:`phi` and
    :meth:`psi` are pure functions of it.

    Args:
      num_features: real columns of :meth:`phi`.
      projection: how the directions are drawn, see ``snnk_jax.projections.names()``.
      precision: precision of the matrix products, as for ``jax.lax.dot``; None leaves
        the choice to JAX's default, which on a TPU is one bfloat16 pass.
    """

    num_features: int
    projection: str = "orthogonal"
    precision: Precision | None = None

    def __post_init__(self):
        num_features = check_size("num_features", self.num_features)
        object.__setattr__(self, "num_features", num_features)
        projections.check_name(self.projection)
        if self.precision not in (None, "default", "high", "highest"):
            raise ValueError(
                "precision must be None, 'default', 'high' or 'highest'. "
                f"Got {self.precision!r}."
            )

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws the frozen parameters for inputs of width ``dim``."""

    @abc.abstractmethod
    def phi(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Maps inputs to features, each example for itself."""

    @abc.abstractmethod
    def psi(
        self,
        params: Params,
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "m o"]:
        """Maps weights and biases to the readout that :meth:`phi` contracts with."""

    @abc.abstractmethod
    def exact(
        self,
        x: Float[Array, "*b d"],
        kernel: Float[Array, "d o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "*b o"]:
        """The kernel that ``phi @ psi`` estimates without bias."""

    def inner(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b n"]:
        """What the weights of :meth:`psi` and :meth:`exact` are a layer of: the inputs.

        For a :class:`~snnk_jax.features.Chain` the features before the last map.
        """
        return x

    def redraw(self, params: Params, key: PRNGKeyArray, dim: int) -> Params:
        """Draws the random parts of ``params`` anew and keeps what was calibrated."""
        dtype = next(
            v.dtype for v in params.values() if jnp.issubdtype(v.dtype, jnp.floating)
        )
        return {**params, **self.init(key, dim, dtype)}

    def directions(self, key: PRNGKeyArray, num: int, dim: int, dtype: Dtype) -> Params:
        """Draws ``num`` random directions of the chosen projection."""
        return projections.params(self.projection, key, num, dim, dtype)

    def project(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Projects onto the directions, accumulated in float32 or better."""
        return projections.apply(params, x, precision=self.precision)


def share_out(total: int, weights: Sequence[float] | np.ndarray) -> tuple[int, ...]:
    """Shares ``total`` out in proportion, at least one each, by largest remainders."""
    shares = np.asarray(weights, np.float64)
    spare = total - len(shares)
    ideal = shares / shares.sum() * spare
    counts = np.floor(ideal).astype(int)
    order = np.argsort(counts - ideal, kind="stable")
    counts[order[: spare - counts.sum()]] += 1
    return tuple(int(count) + 1 for count in counts)


def squared_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """Sum of squares along the last axis, accumulated in float32 or better."""
    x = x.astype(accumulation_dtype(x.dtype))
    return jnp.sum(x * x, axis=-1)
