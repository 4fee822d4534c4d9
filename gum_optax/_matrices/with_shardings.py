"""Shardings that rules are told: which side to project, and over what to spread an orthogonalization."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from optax.contrib import MuonDimensionNumbers

from .._mesh.explicit import spec_of
from .dimension_numbers import Entry, Parts, ShardedDimensionNumbers, WeightDimensionNumbers, names_of
from .hidden_matrices import decided
from .rules.leaves import Reading


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
    leaves = jax.tree_util.tree_leaves_with_path(param_shardings)
    return _WithShardings({names_of(path): x for path, x in leaves}, weight_dimension_numbers)


@dataclasses.dataclass(frozen=True)
class _WithShardings:
    """What `with_shardings` gives: a function of the parameters."""

    shardings: dict[tuple[str, ...], Any]  # by the names along a leaf's path
    weight_dimension_numbers: WeightDimensionNumbers

    def __call__(self, params: Any) -> Any:
        return jax.tree.structure(params).unflatten([x.entry for x in self.readings(params)])

    def readings(self, params: Any) -> list[Reading]:
        """What each leaf is taken for, with its sharding."""
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        found = zip(paths, decided(self.weight_dimension_numbers, params), strict=True)
        return [x._replace(entry=self._told(path, x.entry)) for path, x in found]

    def _told(self, path: Any, entry: Entry) -> Entry:
        if entry is None:
            return None
        sharding = self.shardings.get(names_of(path))
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                "param_shardings must hold a jax.sharding.NamedSharding for leaf"
                f" {jax.tree_util.keystr(path)}, got {sharding!r}."
            )
        if isinstance(entry, Parts):
            numbers = entry.numbers
            return entry._replace(
                numbers=ShardedDimensionNumbers(numbers.reduction_axis, numbers.output_axis, sharding)
            )
        return ShardedDimensionNumbers(entry.reduction_axis, entry.output_axis, sharding)


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
    spec = spec_of(sharding, leaf.ndim)
    over = [spec[axis] for axis in jax.tree.leaves((entry.reduction_axis, entry.output_axis))]
    return not splitting.isdisjoint(jax.tree.leaves(over))
