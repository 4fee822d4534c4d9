"""The sampled blocks of a step that is taken layer by layer.

A turn updates the slots whose blocks stand in its layer, and passes the slots on to the next turn. The blocks
in the slots, and the numbers that a slot draws, are those of the whole tree.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from .._core.acceptance import Acceptance
from .._core.batches import map_sequentially
from .._core.context import MatrixContext
from .._core.trees import flat, is_masked, key_name
from .._core.turns import Place, Turn
from .._core.xla import barrier_on_tpu, row_major
from .._linalg.orthonormal import lift
from .._matrices.view import View, plain_view
from .gradient import DenseGradient
from .on_refresh import restart
from .plan import LowRankStep
from .slots import Group, Index, Slots, slot_of_each_block


class _Leaf(NamedTuple):
    """A projected leaf of the turn."""

    stored: Float[Array, "..."]  # its gradient as the model has it
    view: View
    first: Int[Array, ""] | int  # the number of its first block in its group
    accepted: Bool[Array, ""]


class SlotsInTurn(NamedTuple):
    """The slots in one turn of a step."""

    inner: optax.GradientTransformationExtraArgs
    slots: Slots
    sampled: Index
    turn: Turn
    input_of: Callable[[Group], Callable[..., Array]]
    is_refresh: Bool[Array, ""]
    extra_args: dict[str, Any]

    def update(
        self, step: LowRankStep, low_steps: Any, state: Any, accept: Acceptance | None
    ) -> tuple[Any, Any]:
        """The steps of the leaves of this turn, and the state of the slots.

        Args:
          step: what the leaves' step is made of.
          low_steps: the leaves' steps in their subspaces.
          state: of the slots before the step; later turns read what the turns before have left.
          accept: which leaves step.
        """
        lifted = []

        def of_turn(slot_state):
            steps, slot_state = self._overwritten(step, low_steps, slot_state, accept)
            lifted.append(steps)
            return self._with_counts(slot_state) if self.turn.is_last else slot_state

        slot_state = self.turn.accumulate(state, of_turn)
        for path, x in _with_paths(slot_state):
            # Nobody chooses again, which would keep the state before the step in memory.
            if _group_of(path) in self.slots.groups:
                self.turn.mark(x)
                if accept is not None:
                    accept.mark_kept(x)
        return lifted[0], slot_state

    def _overwritten(
        self, step: LowRankStep, low_steps: Any, slot_state: Any, accept: Acceptance | None
    ) -> tuple[Any, Any]:
        """The low-rank steps, in place of which sampled blocks take full-rank steps."""
        names = {group.shape: name for name, group in self.slots.groups.items()}
        leaves = self._leaves(step, accept)
        are_live = self.turn.are_live(step.updates)
        treedef = jax.tree.structure(step.updates)
        before: Any = None

        def of_leaf(leaf_index, p, s):
            nonlocal slot_state, before
            name = names.get((p.shape[-2], s.shape[-1]))
            if name is None or not are_live[leaf_index]:
                return lift(p, s)
            # Small leaves first on a TPU too: then few gradients are left when a large leaf takes its step.
            leaf = leaves[leaf_index]
            if before is not None:
                s, stored, first, _ = barrier_on_tpu((s, leaf.stored, leaf.first, before))
                leaf = leaf._replace(stored=stored, first=first)
            before, slot_state = self._of_leaf(name, leaf, slot_state, p, s)
            return before

        leaf_indices = treedef.unflatten(range(len(leaves)))
        return map_sequentially(of_leaf, leaf_indices, step.projectors, low_steps), slot_state

    def _leaves(self, step: LowRankStep, accept: Acceptance | None) -> list[_Leaf]:
        assert isinstance(step.gradient, DenseGradient)
        starts = {}
        for group in self.slots.groups.values():
            starts |= dict(zip(group.leaf_indices, group.starts, strict=True))
        count = len(jax.tree.leaves(self.turn.whole(step.updates)))
        firsts = self.turn.entries(step.updates, [starts.get(i, 0) for i in range(count)])
        accepted = [self.turn.is_accepted] * len(firsts) if accept is None else accept.of_leaves(step.updates)
        rows = zip(step.gradient.stored, step.gradient.views, firsts, accepted, strict=True)
        sizes = [math.prod(view.shape[:-2]) for view in step.gradient.views]
        blocks = zip(map(_Leaf._make, rows), self.turn.rows(step.updates), sizes, strict=True)
        return [leaf._replace(first=leaf.first + row * size) for leaf, row, size in blocks]

    def _of_leaf(self, name: str, leaf: _Leaf, slot_state: Any, p: Array, s: Array) -> tuple[Array, Any]:
        """The step of one leaf, and the slots after it."""
        group = self.slots.groups[name]
        slot_of_block = slot_of_each_block(self.sampled[name], group.blocks)
        batch = leaf.view.shape[:-2]

        def one(number, slot_state, low_rank_step):
            """The step of one block, and the slots after it."""
            number = jnp.asarray(number, jnp.int32)
            own_slot = slot_of_block[leaf.first + number]
            # Without a slot, a block reads any slot and writes it back: XLA reads and writes in place here,
            # but within a branch it would copy all slots.
            slot = jnp.maximum(own_slot, 0)
            old = row_major(_row(slot_state, name, self.slots.groups, slot))

            def sampled(old):
                g = leaf.view.block(leaf.stored, number).astype(jnp.float32)
                x = self.input_of(group)(g, plain_view(p).block(p, number))
                return self._run(name, slot, x[None], old, leaf.accepted)

            def unsampled(old):
                return low_rank_step(), old

            steps, new = row_major(jax.lax.cond(own_slot < 0, unsampled, sampled, old))
            return steps, _put(slot_state, name, slot, new)

        if math.prod(batch) == 1:
            steps, slot_state = one(0, slot_state, lambda: lift(p, s).reshape(1, *leaf.view.shape[-2:]))
            return steps.reshape(leaf.view.shape), slot_state

        def next_block(number, steps_and_state):
            steps, slot_state = steps_and_state
            before = jax.lax.dynamic_slice_in_dim(steps, number, 1)
            new, slot_state = one(number, slot_state, lambda: before)
            return jax.lax.dynamic_update_slice_in_dim(steps, new, number, 0), slot_state

        low_rank_steps = lift(p, s).reshape(-1, *leaf.view.shape[-2:])
        steps, slot_state = jax.lax.fori_loop(0, math.prod(batch), next_block, (low_rank_steps, slot_state))
        return steps.reshape(leaf.view.shape), slot_state

    def _run(self, name: str, slot: Any, x: Float[Array, "1 m n"], old: Any, accepted: Any) -> Any:
        """The rule's step of one slot, and its new state, from that of the slot as `_row` returns it."""
        names = sorted(self.slots.groups)
        place = names.index(name)

        def alone(value):
            return {other: value if other == name else optax.MaskedNode() for other in names}

        empty = alone(jnp.zeros_like(x))
        accept = Acceptance(accepted, {place: accepted})
        state = restart(self.inner, old, empty, None, self.is_refresh)
        state = accept.keep_refreshed_if_rejected(self.inner, state, old, empty)
        size = self.slots.groups[name].slots
        whole = {
            other: jax.ShapeDtypeStruct((group.slots, *group.shape), x.dtype)
            for other, group in self.slots.groups.items()
        }
        places = alone(Place((place,), is_row=True, is_live=True))
        turn = self.turn.inside(whole, places, slot, size)
        context = MatrixContext(alone(plain_view(x)), accept, None, turn)
        steps: Any
        steps, state = self.inner.update(alone(x), state, None, context=context, **self.extra_args)
        return steps[name], state

    def _with_counts(self, slot_state: Any) -> Any:
        """The state in which what slots share, such as a count, has seen this step."""
        name, group = next(iter(self.slots.groups.items()))
        x = jnp.zeros((1, *group.shape), jnp.float32)
        old = _row(slot_state, name, self.slots.groups, jnp.int32(0))
        _, new = self._run(name, jnp.int32(0), x, old, jnp.asarray(True))
        leaves, treedef = jax.tree.flatten(slot_state)
        rows = zip(_with_paths(slot_state), leaves, flat(new), strict=True)
        return treedef.unflatten(
            [old if _group_of(path) in self.slots.groups else after for (path, _), old, after in rows]
        )


def _with_paths(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _group_of(path: Any) -> Any:
    """The last name on the path of an array of the state: of a group, if the array is of slots."""
    return key_name(path[-1]) if path else None


def _row(slot_state: Any, name: str, groups: Any, slot: Any) -> Any:
    """The state of one slot of a group; other groups are masked, and what slots share stays."""

    def of(path, x):
        if _group_of(path) == name:
            return jax.lax.dynamic_index_in_dim(x, slot, keepdims=True)
        return optax.MaskedNode() if _group_of(path) in groups else x

    return jax.tree_util.tree_map_with_path(of, slot_state)


def _put(slot_state: Any, name: str, slot: Any, new: Any) -> Any:
    """The state with one slot of a group replaced."""
    leaves, treedef = jax.tree.flatten(slot_state)
    rows = zip(_with_paths(slot_state), leaves, flat(new), strict=True)
    return treedef.unflatten(
        [
            jax.lax.dynamic_update_index_in_dim(old, x.astype(old.dtype), slot, 0)
            if _group_of(path) == name and not is_masked(x)
            else old
            for (path, _), old, x in rows
        ]
    )
