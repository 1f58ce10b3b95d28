"""Compression of pretrained networks: replace and calibrate, without training."""

from snnk_jax.compression._blocks import Block as Block
from snnk_jax.compression._blocks import CompressRule as CompressRule
from snnk_jax.compression._blocks import find_blocks as find_blocks
from snnk_jax.compression._compress import compress as compress
from snnk_jax.compression._compress import num_parameters as num_parameters
from snnk_jax.compression._features import Features as Features
from snnk_jax.compression._methods import Method as Method
from snnk_jax.compression._rank import Affine as Affine
from snnk_jax.compression._rank import LowRank as LowRank
from snnk_jax.compression._report import BlockReport as BlockReport
from snnk_jax.compression._report import CompressionReport as CompressionReport
from snnk_jax.compression._store import load as load
from snnk_jax.compression._store import read_metadata as read_metadata
from snnk_jax.compression._store import save as save
from snnk_jax.compression._store import structure as structure
from snnk_jax.compression._units import Units as Units
from snnk_jax.compression._weights import Int8 as Int8
from snnk_jax.compression._weights import Magnitude as Magnitude
