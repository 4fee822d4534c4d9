"""Shardings that rules are told: which side to project, and over what to spread an orthogonalization."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from optax.contrib import MuonDimensionNumbers

from ._dimensions import Entry, ShardedDimensionNumbers, WeightDimensionNumbers, dimension_numbers, names_of
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


def untold_shardings(params: Any, entries: Sequence[Entry]) -> list[str]:
    """The paths of the matrices that a mesh splits without the optimizer's knowledge.

    A matrix counts if Auto mesh axes of two or more devices split one of its own axes, and its entry does not
    say so: `with_shardings` would make the optimizer send less. The types of arrays tell it Explicit axes.

    Args:
      params: arrays, or shapes that may have a `sharding`.
      entries: of each leaf, as `dimension_numbers` gives them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [
        jax.tree_util.keystr(path)
        for (path, leaf), entry in zip(leaves, entries, strict=True)
        if isinstance(entry, MuonDimensionNumbers) and _is_split(leaf, entry)
    ]


def _is_split(leaf: Any, entry: MuonDimensionNumbers) -> bool:
    """Whether Auto mesh axes split a matrix axis of the leaf."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return False
    mesh = sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    splitting = {name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}
    spec = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
    over = [spec[axis] for axis in jax.tree.leaves((entry.reduction_axis, entry.output_axis))]
    return not splitting.isdisjoint(jax.tree.leaves(over))
