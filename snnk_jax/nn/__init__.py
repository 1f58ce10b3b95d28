"""Flax NNX layers built on feature maps."""

from snnk_jax.nn._variables import AdapterParam as AdapterParam
from snnk_jax.nn._variables import RandomProjection as RandomProjection
