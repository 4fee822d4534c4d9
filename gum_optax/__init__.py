"""Memory-efficient matrix optimizers for JAX, as compositions of optax transformations."""

import sys as _sys
import typing as _typing
import warnings as _warnings

# Optimizers, and what all of them share.
from ._optimizers.adalomo import adalomo as adalomo
from ._optimizers.adamw_8bit import adamw_8bit as adamw_8bit
from ._optimizers.cosmos import CosmosState as CosmosState
from ._optimizers.cosmos import cosmos as cosmos
from ._optimizers.cosmos import scale_by_cosmos as scale_by_cosmos
from ._optimizers.dion import DionState as DionState
from ._optimizers.dion import dion as dion
from ._optimizers.dion import scale_by_dion as scale_by_dion
from ._optimizers.fira import fira as fira
from ._optimizers.frugal import frugal as frugal
from ._optimizers.galore import galore as galore
from ._optimizers.galore import galore_muon as galore_muon
from ._optimizers.golore import golore as golore
from ._optimizers.gum import gum as gum
from ._optimizers.hfac import HFacState as HFacState
from ._optimizers.hfac import hfac as hfac
from ._optimizers.hfac import scale_by_hfac as scale_by_hfac
from ._optimizers.matrix_optimizer import matrix_optimizer as matrix_optimizer
from ._optimizers.muon import muon as muon
from ._optimizers.normuon import normuon as normuon
from ._optimizers.scion import scion as scion
from ._optimizers.sinkgd import sinkgd as sinkgd
from ._optimizers.sumo import sumo as sumo
from ._optimizers.swan import swan as swan
from ._optimizers.trion import TrionState as TrionState
from ._optimizers.trion import dct_columns as dct_columns
from ._optimizers.trion import trion as trion
from ._optimizers.trion import scale_by_trion as scale_by_trion

# A training step layer by layer.
from ._layerwise.layerwise_update import layerwise_update as layerwise_update

# Training without a backward pass.
from ._zeroth_order.directions import gaussian as gaussian
from ._zeroth_order.directions import low_rank_directions as low_rank_directions
from ._zeroth_order.estimate import estimate as estimate
from ._zeroth_order.walk import project_loss as project_loss
from ._zeroth_order.walk import walk as walk

# Functions of a state.
from ._state.describe import Description as Description
from ._state.describe import LeafDescription as LeafDescription
from ._state.describe import describe as describe
from ._state.memory import LeafMemory as LeafMemory
from ._state.memory import MemoryReport as MemoryReport
from ._state.memory import memory_report as memory_report
from ._state.metrics import metrics as metrics
from ._state.restore import check_state as check_state
from ._state.restore import convert_state as convert_state

# A rule in a subspace.
from ._lowrank.finders import random_subspace as random_subspace
from ._lowrank.finders import randomized_svd as randomized_svd
from ._lowrank.finders import sketched_subspace as sketched_subspace
from ._lowrank.finders import subspace_iteration as subspace_iteration
from ._lowrank.finders import svd_subspace as svd_subspace
from ._lowrank.low_rank import LowRankState as LowRankState
from ._lowrank.low_rank import low_rank as low_rank
from ._lowrank.on_refresh import keep as keep
from ._lowrank.on_refresh import restart as restart
from ._lowrank.on_refresh import rotate as rotate
from ._lowrank.on_refresh import rotate_first_moment as rotate_first_moment
from ._lowrank.projected_update import projected_update as projected_update
from ._lowrank.residuals import add_raw as add_raw
from ._lowrank.residuals import drop as drop
from ._lowrank.residuals import scale_as_inside as scale_as_inside
from ._lowrank.switch import switch_subspace as switch_subspace
from ._lowrank.switch import track_subspace as track_subspace
from ._lowrank.unbiased import SampledState as SampledState
from ._lowrank.unbiased import Weights as Weights
from ._lowrank.unbiased import complement as complement
from ._lowrank.unbiased import low_variance as low_variance
from ._lowrank.unbiased import unbiased_low_rank as unbiased_low_rank

# Rules over full matrices, and what is done to a whole step.
from ._transforms.adam_8bit import ScaleByAdam8bitState as ScaleByAdam8bitState
from ._transforms.adam_8bit import scale_by_adam_8bit as scale_by_adam_8bit
from ._transforms.apply_updates import apply_updates as apply_updates
from ._transforms.apply_updates import float32_steps as float32_steps
from ._transforms.cautious_weight_decay import cautious_weight_decay as cautious_weight_decay
from ._transforms.extrapolate import ExtrapolateState as ExtrapolateState
from ._transforms.extrapolate import evaluation_parameters as evaluation_parameters
from ._transforms.extrapolate import extrapolate as extrapolate
from ._transforms.factored_rms import FactoredRmsState as FactoredRmsState
from ._transforms.factored_rms import clip_by_rms as clip_by_rms
from ._transforms.factored_rms import scale_by_factored_rms as scale_by_factored_rms
from ._transforms.factored_rms import scale_by_parameter_rms as scale_by_parameter_rms
from ._transforms.normalize import normalize as normalize
from ._transforms.orthogonalize import orthogonalize as orthogonalize
from ._transforms.protect import Bases as Bases
from ._transforms.protect import ProtectState as ProtectState
from ._transforms.protect import empty_subspace as empty_subspace
from ._transforms.protect import extend_protection as extend_protection
from ._transforms.protect import protect as protect
from ._transforms.protect import protected_subspace as protected_subspace
from ._transforms.qk_clip import qk_clip as qk_clip
from ._transforms.scale_by_muon import scale_by_muon as scale_by_muon
from ._transforms.scale_by_neuron_rms import NeuronRmsState as NeuronRmsState
from ._transforms.scale_by_neuron_rms import scale_by_neuron_rms as scale_by_neuron_rms
from ._transforms.scaling import LimitNormGrowthState as LimitNormGrowthState
from ._transforms.scaling import fan_ratio as fan_ratio
from ._transforms.scaling import limit_norm_growth as limit_norm_growth
from ._transforms.scaling import scale_by_shape as scale_by_shape
from ._transforms.scaling import shape_factor as shape_factor
from ._transforms.skip_non_finite import SkipNonFiniteState as SkipNonFiniteState
from ._transforms.skip_non_finite import skip_non_finite as skip_non_finite
from ._transforms.weight_normalized import WeightNormalizedState as WeightNormalizedState
from ._transforms.weight_normalized import weight_normalized as weight_normalized
from ._transforms.with_second_moment import with_second_moment as with_second_moment
from ._transforms.with_second_moment import xavier_squares as xavier_squares

# A model's leaves seen as matrices.
from ._matrices.as_matrices import as_matrices as as_matrices
from ._matrices.dimension_numbers import CONV_HWIO as CONV_HWIO
from ._matrices.dimension_numbers import CONV_OIHW as CONV_OIHW
from ._matrices.dimension_numbers import LAST_TWO as LAST_TWO
from ._matrices.dimension_numbers import OUT_IN as OUT_IN
from ._matrices.dimension_numbers import SPLIT_HEADS_INPUT as SPLIT_HEADS_INPUT
from ._matrices.dimension_numbers import SPLIT_HEADS_OUTPUT as SPLIT_HEADS_OUTPUT
from ._matrices.dimension_numbers import Parts as Parts
from ._matrices.hidden_matrices import RoutingWarning as RoutingWarning
from ._matrices.hidden_matrices import hidden_matrices as hidden_matrices
from ._matrices.with_shardings import with_shardings as with_shardings

# Shardings.
from ._mesh.axis_names import with_axis_names as with_axis_names
from ._mesh.state_shardings import check_processes_agree as check_processes_agree
from ._mesh.state_shardings import state_shardings as state_shardings

# Functions of arrays.
from ._linalg.newton_schulz import JORDAN as JORDAN
from ._linalg.newton_schulz import POLAR_EXPRESS as POLAR_EXPRESS
from ._linalg.newton_schulz import fastest_newton_schulz as fastest_newton_schulz
from ._linalg.newton_schulz import gram_newton_schulz as gram_newton_schulz
from ._linalg.newton_schulz import high_pass as high_pass
from ._linalg.newton_schulz import newton_schulz as newton_schulz
from ._linalg.normalizers import column_lmo as column_lmo
from ._linalg.normalizers import multi_norm as multi_norm
from ._linalg.normalizers import row_lmo as row_lmo
from ._linalg.normalizers import sign_lmo as sign_lmo
from ._linalg.normalizers import sinkhorn as sinkhorn
from ._linalg.normalizers import spectral_lmo as spectral_lmo
from ._linalg.normalizers import standardize_rows as standardize_rows
from ._linalg.normalizers import unit_columns as unit_columns
from ._linalg.normalizers import unit_frobenius as unit_frobenius
from ._linalg.normalizers import unit_rows as unit_rows
from ._linalg.normalizers import whiten as whiten
from ._linalg.polar import polar as polar
from ._linalg.polar import polar_by_products as polar_by_products
from ._linalg.protected import extend_basis as extend_basis

# Draws, and what travels inside an update.
from ._core.context import MatrixContext as MatrixContext
from ._core.keys import draw as draw

__version__ = "0.1.0"

# Deprecated names from before 0.1.0. The next version removes them.
_RENAMED = {
    "cosmos_rule": "scale_by_cosmos",
    "dion_rule": "scale_by_dion",
    "trion_rule": "scale_by_trion",
}

# Hide this from type checkers: they would accept every name as a name of the package.
if not _typing.TYPE_CHECKING:

    def __getattr__(name):
        if name not in _RENAMED:
            # With the name and the module, Python suggests a similar name.
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}", name=name, obj=_sys.modules[__name__]
            )
        message = (
            f"gum_optax.{name} is now gum_optax.{_RENAMED[name]}; the old name goes with the next version."
        )
        _warnings.warn(message, DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
