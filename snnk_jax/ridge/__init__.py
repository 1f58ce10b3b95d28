"""Ridge regression of features: streamed, sharded, exact.

The objective is, everywhere, with weights w, features Phi and an intercept b that is
not penalised,

    sum_i w_i |y_i - phi_i V - b|^2 / sum_i w_i  +  l2 |V|^2,

so that ``l2`` means the same for any number of rows. scikit-learn's ``alpha`` is ``l2``
times the sum of the weights.
"""

from snnk_jax.ridge._rows import fit as fit
from snnk_jax.ridge._solve import PrecisionWarning as PrecisionWarning
from snnk_jax.ridge._solve import RidgePath as RidgePath
from snnk_jax.ridge._solve import RidgeSolution as RidgeSolution
from snnk_jax.ridge._solve import leave_one_out as leave_one_out
from snnk_jax.ridge._solve import select_l2 as select_l2
from snnk_jax.ridge._solve import solve as solve
from snnk_jax.ridge._stats import RidgeStats as RidgeStats
from snnk_jax.ridge._stats import Total as Total
from snnk_jax.ridge._stats import downdate as downdate
from snnk_jax.ridge._stats import init as init
from snnk_jax.ridge._stats import merge as merge
from snnk_jax.ridge._stats import update as update
from snnk_jax.ridge._stats import update_chunks as update_chunks
