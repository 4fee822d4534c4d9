"""Shardings that rules are told: which side to project, and over what to spread an orthogonalization."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from ._dimensions import ShardedDimensionNumbers, WeightDimensionNumbers, dimension_numbers, names_of
from ._hidden import hidden_matrices


def with_shardings(
    param_shardings: Any, weight_dimension_numbers: WeightDimensionNumbers = None
) -> Callable[[Any], Any]:
    """Dimension numbers that tell where each leaf lives, for an optimizer's `weight_dimension_numbers`.

    A matrix that is sharded along one of its sides is then projected along the other, even if that is the
    longer: `PᵀG` and the lift are local, and coordinates live where the columns do. Full-size momenta are
    orthogonalized with their long side spread over all mesh axes that shard them. The state's shapes follow
    from the names in the specs and not from the size of the mesh: a checkpoint fits every mesh that has them.

    Args:
      param_shardings: a `jax.sharding.NamedSharding` for each leaf of the parameters.
      weight_dimension_numbers: as in `muon`. Default: `hidden_matrices`.

    Raises:
      TypeError: once there are parameters, one that is a matrix has no `NamedSharding`.
    """
    spec = hidden_matrices if weight_dimension_numbers is None else weight_dimension_numbers
    leaves = jax.tree_util.tree_leaves_with_path(param_shardings)
    shardings = {names_of(path): sharding for path, sharding in leaves}

    def told(params: Any) -> Any:
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)

        def beside(path, entry):
            sharding = shardings.get(names_of(path))
            if not isinstance(sharding, NamedSharding):
                raise TypeError(
                    "param_shardings must hold a jax.sharding.NamedSharding for leaf"
                    f" {jax.tree_util.keystr(path)}, got {sharding!r}."
                )
            return ShardedDimensionNumbers(entry.reduction_axis, entry.output_axis, sharding)

        entries = zip(paths, dimension_numbers(spec, params), strict=True)
        return treedef.unflatten([e if e is None else beside(path, e) for (path, _), e in entries])

    return told
