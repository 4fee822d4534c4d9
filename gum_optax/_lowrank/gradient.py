"""The gradient as a low-rank rule sees it: its leaves held, or only means of linear functions of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from .._core.measurements import Sketches
from .._linalg.numerics import exact_matmul, inverse
from .._linalg.orthonormal import project
from .._matrices.view import View, plain_view
from .finders import SubspaceFinder
from .refresh import Found, refreshed, refreshed_by_means, stayed
from .slots import Group, gather_blocks, gather_early


class Energy(NamedTuple):
    """`|PᵀG|²` and `|G|²` of a leaf, over the square of its largest coordinate: safe from 1e-30 to 1e30."""

    scale: Float[Array, ""]
    inside: Float[Array, ""]
    whole: Float[Array, ""]


def _squares(x: Float[Array, "..."], scale: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.sum(jnp.square(x * inverse(scale)), dtype=jnp.float32)


# Any number: it names a stream.
_SIGNS = 1

# From a block of the gradient and its projector to the input of the rule at full rank.
SlotInput = Callable[[Float[Array, "m n"], Float[Array, "m r"]], Float[Array, "m n"]]


class Seen(NamedTuple):
    """What a subspace makes of a leaf's gradient."""

    projector: Float[Array, "*b m r"]  # P
    rotation: Float[Array, "*b r r"]  # from the one before
    coordinates: Float[Array, "*b r n"]  # R = PᵀG
    energy: Energy


def _seen(g: Array, stored: Array, p: Array, rotation: Array) -> Seen:
    r = project(p, g)
    scale = jnp.max(jnp.abs(r))
    # Of the gradient as it is stored: to sum up another view, XLA would write it out.
    return Seen(p, rotation, r, Energy(scale, _squares(r, scale), _squares(stored, scale)))


class Held(NamedTuple):
    """The gradients of the projected leaves."""

    stored: Sequence[Float[Array, "..."]]  # as the model has them
    views: Sequence[View]

    def seen(
        self,
        find: SubspaceFinder,
        due: Bool[Array, ""],
        accepted: Sequence[Bool[Array, ""]],
        count: Int[Array, ""],
        keys: Key[Array, "leaves"],
        projectors: Sequence[Array],
    ) -> list[Seen]:
        """New projectors where they are due, and coordinates."""
        rows = list(zip(self.stored, self.views, projectors, strict=True))
        seen = refreshed(find, due, count, keys, rows, _seen)
        # A leaf that does not step keeps its projector; what else was made of its gradient is not used.
        return [
            new._replace(
                projector=jnp.where(yes, new.projector, p),
                rotation=jnp.where(yes, new.rotation, stayed([p])[0][1]),
            )
            for new, yes, p in zip(seen, accepted, projectors, strict=True)
        ]

    def gather(
        self, input_of: SlotInput, group: Group, index: Int[Array, "k"], projectors: Sequence[Array]
    ) -> Float[Array, "k m n"]:
        """`input_of` of the blocks at `index` of a group, one at a time."""
        members = [
            ((self.stored[i], self.views[i]), (projectors[i], plain_view(projectors[i])))
            for i in group.leaf_indices
        ]
        one_by_one = gather_early if set(group.sizes) == {1} else gather_blocks
        return jax.lax.platform_dependent(
            cpu=lambda: one_by_one(input_of, members, index, group),
            default=lambda: gather_blocks(input_of, members, index, group),
        )


class Sketched(NamedTuple):
    """The same of gradients that nobody holds: see `projected_update`."""

    sketches: Sketches
    places: Sequence[int]  # of the projected leaves, among all leaves of the parameters
    views: Sequence[View]

    def _matrices(self, stored: Sequence[Array]) -> list[Array]:
        return [view.of(g) for view, g in zip(self.views, stored, strict=True)]

    def seen(
        self,
        find: SubspaceFinder,
        due: Bool[Array, ""],
        accepted: Sequence[Bool[Array, ""]],
        count: Int[Array, ""],
        keys: Key[Array, "leaves"],
        projectors: Sequence[Array],
    ) -> list[Seen]:
        found = self._refreshed(find, [due & yes for yes in accepted], count, keys, projectors)
        new, rotations = [p for p, _ in found], [rotation for _, rotation in found]
        coordinates = self.coordinates(new)
        return list(map(Seen, new, rotations, coordinates, self.energies(keys, new, coordinates)))

    def _refreshed(
        self, find: Any, due: Sequence[Any], count: Any, keys: Any, projectors: Sequence[Array]
    ) -> list[Found]:
        def make(mean_of):
            def of_seen(f, *operands):
                return mean_of(lambda stored: f(self._matrices(stored), *operands))

            return refreshed_by_means(find, jnp.any(jnp.asarray(due)), count, list(keys), of_seen, projectors)

        # Found before it is known whether the gradient is finite, which `due` says by now.
        found = self.sketches.once(self.places, make)
        pairs = zip(due, found, stayed(projectors), strict=True)
        return [jax.tree.map(functools.partial(jnp.where, yes), new, old) for yes, new, old in pairs]

    def coordinates(self, projectors: Sequence[Array]) -> list[Array]:
        return self.sketches.mean(
            self.places, lambda stored: list(map(project, projectors, self._matrices(stored)))
        )

    def energies(
        self, keys: Key[Array, "leaves"], projectors: Sequence[Array], coordinates: Sequence[Array]
    ) -> list[Energy]:
        """`|G - P PᵀG|²` is the mean of `|wᵀ(G - P PᵀG)|²` over random signs `w`; of these, one."""

        def signs(key, p):
            key = jax.random.fold_in(key, _SIGNS)  # the finder draws from the same one
            w = jax.random.rademacher(key, (*p.shape[:-1], 1), jnp.float32)
            return w - exact_matmul(p, exact_matmul(p.mT, w))

        outside = list(map(signs, keys, projectors))
        rows = self.sketches.mean(
            self.places, lambda stored: list(map(project, outside, self._matrices(stored)))
        )

        def energy(r, z):
            scale = jnp.max(jnp.abs(r))
            return Energy(scale, _squares(r, scale), _squares(r, scale) + _squares(z, scale))

        return list(map(energy, coordinates, rows))

    def gather(
        self, input_of: SlotInput, group: Group, index: Int[Array, "k"], projectors: Sequence[Array]
    ) -> Float[Array, "k m n"]:
        def blocks(leaves, views):
            return gather_blocks(
                lambda x: x, [((leaves[i], views[i]),) for i in group.leaf_indices], index, group
            )

        gradients = self.sketches.mean(self.places, lambda stored: blocks(stored, self.views))
        return jax.lax.map(
            lambda pair: input_of(*pair), (gradients, blocks(projectors, list(map(plain_view, projectors))))
        )
