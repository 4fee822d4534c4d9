"""Memory-efficient matrix optimizers for JAX, as compositions of optax transformations."""

from ._dimensions import LAST_TWO as LAST_TWO
from ._hidden import hidden_matrices as hidden_matrices
from ._low_rank import LowRankState as LowRankState
from ._low_rank import add_raw as add_raw
from ._low_rank import drop as drop
from ._low_rank import keep as keep
from ._low_rank import low_rank as low_rank
from ._low_rank import restart as restart
from ._low_rank import rotate as rotate
from ._matrices import as_matrices as as_matrices
from ._optimizers import galore_muon as galore_muon
from ._optimizers import gum as gum
from ._optimizers import muon as muon
from ._orthogonalize import JORDAN as JORDAN
from ._orthogonalize import POLAR_EXPRESS as POLAR_EXPRESS
from ._orthogonalize import newton_schulz as newton_schulz
from ._orthogonalize import orthogonalize as orthogonalize
from ._orthogonalize import polar as polar
from ._report import metrics as metrics
from ._routing import SkipNonFiniteState as SkipNonFiniteState
from ._routing import skip_non_finite as skip_non_finite
from ._sampling import draw as draw
from ._scaling import scale_by_shape as scale_by_shape
from ._subspace import random_subspace as random_subspace
from ._subspace import subspace_iteration as subspace_iteration
from ._subspace import svd_subspace as svd_subspace
from ._unbiased import UnbiasedLowRankState as UnbiasedLowRankState
from ._unbiased import Weights as Weights
from ._unbiased import complement as complement
from ._unbiased import low_variance as low_variance
from ._unbiased import unbiased_low_rank as unbiased_low_rank

__version__ = "0.1.0"
