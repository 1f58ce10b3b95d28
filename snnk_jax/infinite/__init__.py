"""Networks of infinite width: their exact NNGP and NTK kernels.

The first kernel is the mean of products of channels, ``x @ y / d``; ``Dense`` and
``Conv`` have the NTK parameterisation.
"""

from snnk_jax.infinite import sketches as sketches
from snnk_jax.infinite._empirical import empirical as empirical
from snnk_jax.infinite._features import Features as Features
from snnk_jax.infinite._features import features as features
from snnk_jax.infinite._finite import FiniteNetwork as FiniteNetwork
from snnk_jax.infinite._finite import finite as finite
from snnk_jax.infinite._kernel import Kernels as Kernels
from snnk_jax.infinite._kernel import blocks as blocks
from snnk_jax.infinite._kernel import kernel as kernel
from snnk_jax.infinite._landmarks import LandmarkFeatures as LandmarkFeatures
from snnk_jax.infinite._large import Nystrom as Nystrom
from snnk_jax.infinite._large import computed_product as computed_product
from snnk_jax.infinite._large import kernel_cg as kernel_cg
from snnk_jax.infinite._large import nystrom as nystrom
from snnk_jax.infinite._large import save_kernel as save_kernel
from snnk_jax.infinite._large import stored_product as stored_product
from snnk_jax.infinite._layers import Activation as Activation
from snnk_jax.infinite._layers import AvgPool as AvgPool
from snnk_jax.infinite._layers import Conv as Conv
from snnk_jax.infinite._layers import Dense as Dense
from snnk_jax.infinite._layers import FanInSum as FanInSum
from snnk_jax.infinite._layers import FanOut as FanOut
from snnk_jax.infinite._layers import Flatten as Flatten
from snnk_jax.infinite._layers import GlobalAvgPool as GlobalAvgPool
from snnk_jax.infinite._layers import Identity as Identity
from snnk_jax.infinite._layers import Layer as Layer
from snnk_jax.infinite._layers import LayerNorm as LayerNorm
from snnk_jax.infinite._layers import NormalizedExponential as NormalizedExponential
from snnk_jax.infinite._layers import Residual as Residual
from snnk_jax.infinite._layers import parallel as parallel
from snnk_jax.infinite._layers import serial as serial
from snnk_jax.infinite._predict import KernelRidge as KernelRidge
from snnk_jax.infinite._predict import Posterior as Posterior
from snnk_jax.infinite._predict import ensemble as ensemble
from snnk_jax.infinite._predict import gp_posterior as gp_posterior
from snnk_jax.infinite._predict import gradient_flow as gradient_flow
from snnk_jax.infinite._predict import kernel_ridge as kernel_ridge
from snnk_jax.infinite._predict import one_hot as one_hot
from snnk_jax.infinite._suggest import Suggestion as Suggestion
from snnk_jax.infinite._suggest import suggest_features as suggest_features
