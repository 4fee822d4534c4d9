"""The gradient as a low-rank rule sees it: dense, or known only by means of linear functions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from .._core.acceptance import Accepted, choose
from .._core.keys import some
from .._core.measurements import Measurements
from .._linalg.numerics import exact_matmul
from .._linalg.orthonormal import project
from .._matrices.view import View, plain_view
from .energy import Energy, squares
from .finders import SubspaceFinder
from .gather import gather_by_slot, gather_early
from .projectors import ProjectorStorage, Stored
from .refresh import Found, Projection, no_rotation, projections_of_leaves, refreshed_by_means, unchanged
from .slots import Group

# Any number: it names a stream of random signs.
_SIGNS = 1

# From a block of the gradient and its projector to the input of the rule at full rank.
SlotInput = Callable[[Float[Array, "m n"], Float[Array, "m r"]], Float[Array, "m n"]]


def _no_projection(view: View, p: Array) -> Projection:
    """Of a leaf that takes no step in this turn, so that nothing is traced for it."""
    zero = jnp.zeros((), jnp.float32)
    r = jnp.zeros((*view.shape[:-2], p.shape[-1], view.shape[-1]), jnp.float32)
    return Projection(p, no_rotation(p), r, Energy(zero, zero, zero))


def _unless_rejected(
    accepted: Sequence[Accepted], found: Sequence[Found], projectors: Sequence[Array]
) -> list[Found]:
    """What was found for each leaf; a leaf that rejects the step keeps its projector."""
    rows = zip(accepted, found, unchanged(projectors), strict=True)
    return [jax.tree.map(functools.partial(choose, yes), new, old) for yes, new, old in rows]


class DenseGradient(NamedTuple):
    """The gradients of the projected leaves, as arrays."""

    stored: Sequence[Float[Array, "..."]]  # as the model has them
    views: Sequence[View]
    are_live: Sequence[bool]  # whether each leaf takes a step in this turn

    def refresh_and_project(
        self,
        find: SubspaceFinder,
        is_refresh: Bool[Array, ""],
        accepted: Sequence[Accepted],
        count: Int[Array, ""],
        keys: Key[Array, "leaves"],
        projectors: Sequence[Stored],
        storage: ProjectorStorage,
    ) -> list[Projection]:
        """The projection of each leaf, on a new projector at a refresh."""
        live = [leaf_index for leaf_index, is_live in enumerate(self.are_live) if is_live]
        rows = [(self.stored[i], self.views[i], projectors[i]) for i in live]
        projections = projections_of_leaves(find, is_refresh, count, some(keys, live), rows, storage)
        found = dict(zip(live, projections, strict=True))

        def chosen(leaf_index, accepted, stored):
            if leaf_index not in found:
                return _no_projection(self.views[leaf_index], storage.load(*stored))
            # Nobody reads the rest of a rejected leaf's projection.
            x = found[leaf_index]
            return x._replace(
                projector=storage.choose(accepted, x.projector, stored),
                rotation=choose(accepted, x.rotation, no_rotation(x.projector)),
            )

        return list(map(chosen, range(len(self.stored)), accepted, projectors))

    def slot_inputs(
        self, input_of: SlotInput, group: Group, index: Int[Array, "slots"], projectors: Sequence[Array]
    ) -> Float[Array, "slots m n"]:
        """The slots' inputs of a group: `input_of` each block at `index`, one block at a time."""
        members = [
            ((self.stored[i], self.views[i]), (projectors[i], plain_view(projectors[i])))
            for i in group.leaf_indices
        ]
        gather = gather_early if set(group.sizes) == {1} else gather_by_slot
        return gather(input_of, members, index, group)


class ProjectedGradient(NamedTuple):
    """The gradients of the projected leaves, known by means that are measured: see `projected_update`."""

    measurements: Measurements
    leaf_indices: Sequence[int]  # of the projected leaves, among all leaves of the parameters
    views: Sequence[View]

    def _matrices(self, stored: Sequence[Array]) -> list[Array]:
        return [view.of(g) for view, g in zip(self.views, stored, strict=True)]

    def refresh_and_project(
        self,
        find: SubspaceFinder,
        is_refresh: Bool[Array, ""],
        accepted: Sequence[Accepted],
        count: Int[Array, ""],
        keys: Key[Array, "leaves"],
        projectors: Sequence[Stored],
        storage: ProjectorStorage,
    ) -> list[Projection]:
        """The projection of each leaf, on a new projector at a refresh."""
        old = [storage.load(*stored) for stored in projectors]
        found = self._refreshed(find, [is_refresh & yes for yes in accepted], count, keys, old)
        new, rotations = [p for p, _ in found], [rotation for _, rotation in found]
        coordinates = self.coordinates(new)
        return list(map(Projection, new, rotations, coordinates, self.energies(keys, new, coordinates)))

    def _refreshed(
        self, find: Any, is_refresh: Sequence[Any], count: Any, keys: Any, projectors: Sequence[Array]
    ) -> list[Found]:
        def make(mean_of):
            def of_matrices(f, *operands):
                return mean_of(lambda stored: f(self._matrices(stored), *operands))

            return refreshed_by_means(
                find, jnp.any(jnp.asarray(is_refresh)), count, list(keys), of_matrices, projectors
            )

        # `once` runs in the first trace, where nobody knows yet whether the gradient is finite. The second
        # trace knows, and chooses here.
        found = self.measurements.once(self.leaf_indices, make)
        return _unless_rejected(is_refresh, found, projectors)

    def coordinates(self, projectors: Sequence[Array]) -> list[Array]:
        """`PᵀG` of each leaf."""
        return self.measurements.mean(
            self.leaf_indices, lambda stored: list(map(project, projectors, self._matrices(stored)))
        )

    def energies(
        self, keys: Key[Array, "leaves"], projectors: Sequence[Array], coordinates: Sequence[Array]
    ) -> list[Energy]:
        """Estimates: `|G - P PᵀG|²` is the mean of `|wᵀ(G - P PᵀG)|²` over random signs `w`."""

        def signs(key, p):
            key = jax.random.fold_in(key, _SIGNS)  # the finder draws from `key`
            w = jax.random.rademacher(key, (*p.shape[:-1], 1), jnp.float32)
            return w - exact_matmul(p, exact_matmul(p.mT, w))

        outside = list(map(signs, keys, projectors))
        rows = self.measurements.mean(
            self.leaf_indices, lambda stored: list(map(project, outside, self._matrices(stored)))
        )

        def energy(r, z):
            scale = jnp.max(jnp.abs(r))
            return Energy(scale, squares(r, scale), squares(r, scale) + squares(z, scale))

        return list(map(energy, coordinates, rows))

    def slot_inputs(
        self, input_of: SlotInput, group: Group, index: Int[Array, "slots"], projectors: Sequence[Array]
    ) -> Float[Array, "slots m n"]:
        """The slots' inputs of a group: `input_of` each block at `index`, one block at a time."""

        def blocks(leaves, views):
            return gather_by_slot(
                lambda x: x, [((leaves[i], views[i]),) for i in group.leaf_indices], index, group
            )

        gradients = self.measurements.mean(self.leaf_indices, lambda stored: blocks(stored, self.views))
        return jax.lax.map(
            lambda pair: input_of(*pair), (gradients, blocks(projectors, list(map(plain_view, projectors))))
        )
