"""Experiments on snnk_jax: ``python -m experiments.main --config=configs/NAME.py``."""

from experiments.config import load_config as load_config
