"""Flax NNX layers built on feature maps, and the adapters they are compared with."""

from snnk_jax.nn._adapter import Adapted as Adapted
from snnk_jax.nn._adapter import BottleneckAdapter as BottleneckAdapter
from snnk_jax.nn._adapter import SNNKAdapter as SNNKAdapter
from snnk_jax.nn._bundle import BundledStack as BundledStack
from snnk_jax.nn._bundle import FoldedFeatures as FoldedFeatures
from snnk_jax.nn._bundle import StackReport as StackReport
from snnk_jax.nn._bundle import bundle_stack as bundle_stack
from snnk_jax.nn._dense import SNNKDense as SNNKDense
from snnk_jax.nn._lowrank import DoRA as DoRA
from snnk_jax.nn._lowrank import Scaled as Scaled
from snnk_jax.nn._lowrank import VeRA as VeRA
from snnk_jax.nn._mlp import SNNKMlp as SNNKMlp
from snnk_jax.nn._projection import Drawn as Drawn
from snnk_jax.nn._projection import Projection as Projection
from snnk_jax.nn._projection import redraw as redraw
from snnk_jax.nn._report import ModelReport as ModelReport
from snnk_jax.nn._report import model_report as model_report
from snnk_jax.nn._standardize import standardize as standardize
from snnk_jax.nn._variables import AdapterParam as AdapterParam
from snnk_jax.nn._variables import InputStatistic as InputStatistic
from snnk_jax.nn._variables import RandomProjection as RandomProjection
