"""Adapters of one base model: kept, switched, saved in small files, merged."""

from snnk_jax.adapters._bank import AdapterBank as AdapterBank
from snnk_jax.adapters._fingerprint import fingerprint as fingerprint
from snnk_jax.adapters._merge import MergeReport as MergeReport
from snnk_jax.adapters._merge import merge_adapters as merge_adapters
from snnk_jax.adapters._store import load_adapter as load_adapter
from snnk_jax.adapters._store import read_metadata as read_metadata
from snnk_jax.adapters._store import save_adapter as save_adapter
