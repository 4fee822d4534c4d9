"""Declares shardings: they decide which side to project and how to distribute an orthogonalization."""

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
    """Dimension numbers with the sharding of each leaf, for an optimizer's `weight_dimension_numbers`.

    The optimizer then projects a matrix that is sharded along one side along its other side, even if that is
    the longer side. So `PᵀG` and the lift are local, and coordinates have the sharding of the columns. Where
    both sides are sharded it projects the longer one: `PᵀG` is then a sum over devices of the shorter side's
    coordinates. The orthogonalization of full-size momenta distributes the long side over all mesh axes that
    shard them. The shapes of the state follow from the names in the specs, not from the size of the mesh: a
    checkpoint fits every mesh with these names.

    Args:
      param_shardings: a `jax.sharding.NamedSharding` for each leaf of the parameters.
      weight_dimension_numbers: as in `muon`. Default: `hidden_matrices`.

    Raises:
      TypeError: a matrix has no `NamedSharding`; raised when the result is called with parameters.

    Examples:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
      >>> numbers = gum_optax.with_shardings({"kernel": sharding})
      >>> tx = gum_optax.galore_muon(1e-3, rank=2, weight_dimension_numbers=numbers)
      >>> state = tx.init({"kernel": jnp.ones((4, 8))})
      >>> optax.tree.get(state, "projectors")["kernel"].shape  # of the side that is whole
      (8, 2)
    """
    leaves = jax.tree_util.tree_leaves_with_path(param_shardings)
    return _WithShardings({names_of(path): x for path, x in leaves}, weight_dimension_numbers)


@dataclasses.dataclass(frozen=True)
class _WithShardings:
    """The result of `with_shardings`: a function of the parameters."""

    shardings: dict[tuple[str, ...], Any]  # by the names along a leaf's path
    weight_dimension_numbers: WeightDimensionNumbers

    def __call__(self, params: Any) -> Any:
        return jax.tree.structure(params).unflatten([x.entry for x in self.readings(params)])

    def readings(self, params: Any) -> list[Reading]:
        """The reading of each leaf, with its sharding."""
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        rows = zip(paths, decided(self.weight_dimension_numbers, params), strict=True)
        return [x._replace(entry=self._with_sharding(path, x.entry)) for path, x in rows]

    def _with_sharding(self, path: Any, entry: Entry) -> Entry:
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


def undeclared_shardings(params: Any, entries: Sequence[Entry]) -> list[str]:
    """The paths of the matrices that a mesh splits without the optimizer's knowledge.

    A matrix counts if Auto mesh axes of two or more devices split one of its own axes, and its entry has no
    sharding: with `with_shardings` the optimizer would send less. Explicit axes need no declaration, because
    they are in the types of the arrays.

    Args:
      params: arrays, or shapes that may have a `sharding`.
      entries: the entry of each leaf, as `dimension_numbers` returns them.
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
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    splitting = {name for name, axis_type in types if axis_type == AxisType.Auto and mesh.shape[name] > 1}
    spec = spec_of(sharding, leaf.ndim)
    matrix_spec = [spec[axis] for axis in jax.tree.leaves((entry.reduction_axis, entry.output_axis))]
    return not splitting.isdisjoint(jax.tree.leaves(matrix_spec))
