r"""Feature maps: pure pairs :math:`\Phi, \Psi` with a shared random projection."""

from snnk_jax.features._append_one import AppendOne as AppendOne
from snnk_jax.features._arccos import ArcCosine as ArcCosine
from snnk_jax.features._base import FeatureMap as FeatureMap
from snnk_jax.features._chain import Chain as Chain
from snnk_jax.features._exponential import Exponential as Exponential
from snnk_jax.features._polynomial import Polynomial as Polynomial
from snnk_jax.features._series import FourierSeries as FourierSeries
from snnk_jax.features._series import fourier_series as fourier_series
from snnk_jax.features._towers import TowerFeatures as TowerFeatures
from snnk_jax.features._urf import URF as URF
