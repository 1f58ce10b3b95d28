"""Pretrained architectures in plain Flax NNX."""

from snnk_jax.models import bert as bert
from snnk_jax.models import vit as vit
