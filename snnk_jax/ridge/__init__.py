"""Ridge regression of features: streamed, sharded, exact.

The objective is, everywhere, with weights w, features Phi and an intercept b that is
not penalised,

    sum_i w_i |y_i - phi_i V - b|^2 / sum_i w_i  +  l2 |V|^2,

so that ``l2`` means the same for any number of rows. scikit-learn's ``alpha`` is ``l2``
times the sum of the weights.
"""

from snnk_jax.ridge._cg import CGReport as CGReport
from snnk_jax.ridge._cg import solve_cg as solve_cg
from snnk_jax.ridge._glm import ConvergenceWarning as ConvergenceWarning
from snnk_jax.ridge._glm import GLMSolution as GLMSolution
from snnk_jax.ridge._glm import fit_glm as fit_glm
from snnk_jax.ridge._privacy import PrivacyReport as PrivacyReport
from snnk_jax.ridge._privacy import clip_rows as clip_rows
from snnk_jax.ridge._privacy import privatize as privatize
from snnk_jax.ridge._rows import fit as fit
from snnk_jax.ridge._sharded import shardings as shardings
from snnk_jax.ridge._sharded import update_sharded as update_sharded
from snnk_jax.ridge._solve import PrecisionWarning as PrecisionWarning
from snnk_jax.ridge._solve import RidgePath as RidgePath
from snnk_jax.ridge._solve import RidgeSolution as RidgeSolution
from snnk_jax.ridge._solve import leave_one_out as leave_one_out
from snnk_jax.ridge._solve import select_l2 as select_l2
from snnk_jax.ridge._solve import solve as solve
from snnk_jax.ridge._stats import RidgeStats as RidgeStats
from snnk_jax.ridge._stats import init as init
from snnk_jax.ridge._stats import merge as merge
from snnk_jax.ridge._sums import Total as Total
from snnk_jax.ridge._update import downdate as downdate
from snnk_jax.ridge._update import downdate_chunks as downdate_chunks
from snnk_jax.ridge._update import update as update
from snnk_jax.ridge._update import update_chunks as update_chunks
