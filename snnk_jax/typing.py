"""Array aliases and the glossary of dimension letters.

Shapes in signatures are read from the right, ``*b`` stands for any leading axes:

======  =====================================================
letter  axis
======  =====================================================
``b``   batch (any number of leading axes)
``t``   tokens
``d``   input width of a layer or feature map
``o``   output width of a layer
``m``   features (``num_features``, real columns of ``phi``)
``n``   examples, or classes where a head is meant
``h w c``  height, width and channels of an image
======  =====================================================
"""

from typing import Any

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt32

Dtype = DTypeLike
"""Anything that names a dtype: ``jnp.float32``, ``"bfloat16"``, ..."""

Params = Any
"""The pytree that ``FeatureMap.init`` returns: arrays only."""

__all__ = [
    "Array",
    "Dtype",
    "Float",
    "Int",
    "Key",
    "PRNGKeyArray",
    "Params",
    "UInt32",
]
