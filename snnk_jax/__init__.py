"""Scalable neural network kernels for JAX and Flax.

Everything is a feature map followed by a linear readout; see the README.
"""

from snnk_jax import activations as activations
from snnk_jax import adapters as adapters
from snnk_jax import bundling as bundling
from snnk_jax import calibration as calibration
from snnk_jax import compression as compression
from snnk_jax import diagnostics as diagnostics
from snnk_jax import features as features
from snnk_jax import infinite as infinite
from snnk_jax import kernels as kernels
from snnk_jax import models as models
from snnk_jax import nn as nn
from snnk_jax import projections as projections
from snnk_jax import ridge as ridge
from snnk_jax.bundling import bundle as bundle
from snnk_jax.compression import CompressRule as CompressRule
from snnk_jax.compression import compress as compress
from snnk_jax.ops import contract as contract
from snnk_jax.ops import snnk_dense as snnk_dense
from snnk_jax.surgery import SwapReport as SwapReport
from snnk_jax.surgery import SwapRule as SwapRule
from snnk_jax.surgery import find_modules as find_modules
from snnk_jax.surgery import swap_modules as swap_modules

__version__ = "0.1.0"
