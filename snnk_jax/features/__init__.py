r"""Feature maps: pure pairs :math:`\Phi, \Psi` with a shared random projection."""

from snnk_jax.features._arccos import ArcCosine as ArcCosine
from snnk_jax.features._base import FeatureMap as FeatureMap
from snnk_jax.features._urf import URF as URF
