"""Feature maps of feature maps."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from snnk_jax import projections
from snnk_jax.features._base import FeatureMap, Precision
from snnk_jax.typing import Array, Dtype, Float, Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Chain(FeatureMap):
    r"""Feature maps one after the other: :math:`\Phi_k \circ \dots \circ \Phi_1`.

    It stands wherever a feature map is applied, as in :class:`snnk_jax.nn.SNNKDense`:
    a network with frozen random layers and a trained readout, which merged ("bundled")
    layers become.

    Only the last map meets weights. :meth:`psi` and :meth:`exact` are its own: their
    kernel is ``[m_{k-1}, o]``, a linear layer on the features of the maps before, and
    the x of :meth:`exact` are these features, :meth:`inner`. Given the first maps,

    .. math::
      E[\Phi(x) \cdot \Psi(w, b)] = K_k(\Phi_{k-1} \circ \dots \circ \Phi_1(x), (w, b)).

    The kernel of a chain with a layer of the inputs is not estimated without bias by
    any readout: the later maps see noise of the earlier ones.

    :class:`ArcCosine` of order 1 keeps norms, :math:`E \lVert\Phi(x)\rVert^2 = \lVert
    x\rVert^2`, and may be stacked. Norms of exponential maps (:class:`URF`) grow from
    level to level as :math:`e^{\kappa}` of the one before, until they overflow: with
    weights of norm 1, :math:`\kappa` goes as 1, 2.5, 11, 4e4.

    Args:
      maps: :math:`\Phi_1, \dots, \Phi_k`, the first one applied first.

    Parameters: those of the maps, named ``map0_omega``, ``map1_omega``, ...; each map
    draws from a key of its own. ``num_features``, ``projection`` and ``precision`` are
    those of the last map.

    Raises:
      ValueError: without maps, or for something else among them.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225
      (bundling); Cho and Saul, "Kernel Methods for Deep Learning", NIPS 2009 (layers
      of arc-cosine kernels).

    Example:
      >>> import jax
      >>> import snnk_jax as snnk
      >>> arc = snnk.features.ArcCosine(num_features=32)
      >>> fm = snnk.features.Chain((arc, snnk.features.ArcCosine(num_features=16)))
      >>> params = fm.init(jax.random.key(0), 8)
      >>> {name: value.shape for name, value in params.items()}
      {'map0_omega': (32, 8), 'map1_omega': (16, 32)}
      >>> fm.phi(params, jax.numpy.ones((5, 8))).shape
      (5, 16)
    """

    maps: tuple[FeatureMap, ...]
    num_features: int = dataclasses.field(init=False, repr=False)
    projection: str = dataclasses.field(init=False, repr=False)
    precision: Precision | None = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        maps = tuple(self.maps)
        if not maps or not all(isinstance(fm, FeatureMap) for fm in maps):
            raise ValueError(
                f"maps must be feature maps, at least one. Got {self.maps!r}."
            )
        object.__setattr__(self, "maps", maps)
        for name in ("num_features", "projection", "precision"):
            object.__setattr__(self, name, getattr(maps[-1], name))
        super().__post_init__()

    def init(self, key: PRNGKeyArray, dim: int, dtype: Dtype = jnp.float32) -> Params:
        """Draws the parameters of all maps; see :class:`FeatureMap`."""
        stages = zip(self.maps, self._keys(key), self._widths(dim), strict=True)
        return _join(fm.init(key, width, dtype) for fm, key, width in stages)

    def redraw(self, params: Params, key: PRNGKeyArray, dim: int) -> Params:
        """Draws the random parts of all maps anew and keeps what was calibrated."""
        stages = zip(
            self.maps,
            self._split(params),
            self._keys(key),
            self._widths(dim),
            strict=True,
        )
        return _join(fm.redraw(part, key, width) for fm, part, key, width in stages)

    def inner(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b n"]:
        """The features that the last map is applied to, the last one of all."""
        *first, last = self._split(params)
        for fm, part in zip(self.maps, first, strict=False):
            x = fm.phi(part, x)
        return self.maps[-1].inner(last, x)

    def phi(self, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Maps inputs to the features of the last map."""
        for fm, part in zip(self.maps, self._split(params), strict=True):
            x = fm.phi(part, x)
        return x

    def psi(
        self,
        params: Params,
        kernel: Float[Array, "n o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "m o"]:
        """The readout of the last map for weights over :meth:`inner`."""
        return self.maps[-1].psi(self._split(params)[-1], kernel, bias)

    def exact(
        self,
        x: Float[Array, "*b n"],
        kernel: Float[Array, "n o"],
        bias: Float[Array, " o"] | None = None,
    ) -> Float[Array, "*b o"]:
        """The kernel of the last map; ``x`` are the features :meth:`inner`."""
        return self.maps[-1].exact(x, kernel, bias)

    def _keys(self, key: PRNGKeyArray) -> list[PRNGKeyArray]:
        words = projections.streams(projections.key_words(key), len(self.maps))
        return [jax.random.wrap_key_data(w, impl="threefry2x32") for w in words]

    def _widths(self, dim: int) -> list[int]:
        return [dim, *(fm.num_features for fm in self.maps[:-1])]

    def _split(self, params: Params) -> list[Params]:
        """The parameters of each map, under its own names."""
        prefixes = [f"map{i}_" for i in range(len(self.maps))]
        return [
            {
                name.removeprefix(prefix): value
                for name, value in params.items()
                if name.startswith(prefix)
            }
            for prefix in prefixes
        ]


def _join(parts: Iterable[Params]) -> Params:
    """One flat dict: modules keep parameters by names that attributes may have."""
    return {
        f"map{i}_{name}": value
        for i, part in enumerate(parts)
        for name, value in part.items()
    }
