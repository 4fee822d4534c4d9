"""The turns of a step: each calls the optimizer on the whole tree, of which a few leaves are live."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from .._core.context import MatrixContext
from .._core.trees import columns, is_masked
from .._core.turns import Ledger, Place, Turn
from .._core.xla import barrier_on_tpu, depend_on, row_major, stacks_in_place
from .._transforms.skip_non_finite import SkipNonFiniteState
from .division import KINDS, SHARED, Divided, Division


class Carry(NamedTuple):
    """What the turns of the layers change."""

    params: Any  # of the layers
    state: list[Any]  # the pieces of the layers in the state
    ledger: list[Any]


class Step:
    """A step that is taken in turns: the head, the layers from the last to the first, the embedding.

    Args:
      tx: the optimizer.
      division: of the parameters.
      params: before the step.
      state: before the step.
      is_accepted: whether the loss is finite.
      apply: `(params, updates, *, context) -> params`.
      extra_args: for `tx.update`.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        division: Division,
        params: Any,
        state: Any,
        is_accepted: Bool[Array, ""],
        apply: Callable[..., Any],
        extra_args: dict[str, Any],
    ):
        self._update = optax.with_extra_args_support(tx).update
        self._division, self._is_accepted = division, is_accepted
        self._apply, self._extra_args = apply, extra_args
        self._params, self._state = division.divide(params), division.divide(state)
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
        self._ledger: list[Any] | None = None

    def take(self, kind: str, gradient: Any) -> None:
        """The turn of the head or of the embedding."""
        ledger = Ledger(self._ledger)
        context = self._context(kind, 0, ledger)
        (own,), state = self._params.of_kind(kind), self._state.of_kind(kind)
        updates, state, _ = self._updated(kind, gradient, own, state, context)
        self._params = self._params.with_pieces({kind: [self._applied(kind, own, updates, context)]})
        self._state = self._state.with_pieces({kind: state})
        self._ledger = ledger.after

    def carry(self) -> Carry:
        """What the turns of the layers change, before them or after some of them."""
        assert self._ledger is not None, "the head takes the first turn"
        return Carry(self._params.of_kind("layers")[0], self._state.of_kind("layers"), self._ledger)

    def carried(self, carry: Carry) -> None:
        """Continues from what turns of layers have made."""
        self._params = self._params.with_pieces({"layers": [carry.params]})
        self._state = self._state.with_pieces({"layers": carry.state})
        self._ledger = carry.ledger

    def with_layer(self, carry: Carry, number: Int[Array, ""] | int, gradient: Any) -> Carry:
        """The turn of one layer, given the gradient of its parameters."""
        division, ledger = self._division, Ledger(carry.ledger)
        # Only what a loop carries needs a layout.
        placed, carried = (row_major, stacks_in_place) if division.is_stacked else (lambda x: x,) * 2
        own, state = placed(
            (division.layer(carry.params, number), [division.layer(piece, number) for piece in carry.state])
        )
        context = self._context("layers", number, ledger)
        updates, state, _ = self._updated("layers", division.around(own, gradient), own, state, context)
        if division.is_stacked:
            own, updates = self._rows_to_add_to(carry.params, number, updates)
        own = self._applied("layers", own, updates, context)
        # A TPU would add all float32 steps of the layer where it writes the stacks, after the last of them.
        own = jax.tree.map(barrier_on_tpu, own)
        return carried(
            Carry(
                division.with_layer(carry.params, number, own),
                [division.with_layer(*row) for row in _rows(carry.state, number, state)],
                ledger.after,
            )
        )

    def after(self, carry: Carry, x: Any, number: int) -> Any:
        """`x`, computed only after the step of a layer."""
        return _after(self._division.layer(carry.params, number), x)

    def after_head(self, x: Any) -> Any:
        """`x`, computed only after the step of the head, whose gradient would wait for the layers' steps."""
        return _after(self._params.of_kind("head"), x)

    def finished(self) -> tuple[Any, Any]:
        """The parameters and the state after the step, and after the turn of what all leaves share."""
        ledger = Ledger(self._ledger)
        _, _, new = self._updated(None, None, None, [], self._context(None, 0, ledger))
        if not ledger.after and _skips(self._state.tree()):
            raise ValueError(
                "tx runs an optimizer of this library without the extra arguments of its update, as"
                " optax.MultiSteps does; layerwise_update passes it the turn of each layer there. Leave that"
                " out; gum_optax.projected_update averages microbatches."
            )
        division = self._division

        def chosen(after, before):
            return after if id(after) in ledger.marked else jnp.where(self._is_accepted, after, before)

        shared = jax.tree.map(chosen, new.of_kind(SHARED), self._state.of_kind(SHARED))
        pieces = zip(self._state.of_kind("layers"), new.of_kind("layers"), strict=True)
        of_no_layer = [division.rest(*row) for row in pieces]
        return self._params.tree(), self._state.with_pieces({SHARED: shared, "layers": of_no_layer}).tree()

    def _context(self, kind: str | None, number: Any, ledger: Ledger) -> MatrixContext:
        turn = Turn(
            shapes=self._shapes,
            places=self._places(kind),
            layer=number if kind == "layers" else 0,
            layers=self._division.count,
            is_accepted=self._is_accepted,
            is_last=kind is None,
            ledger=ledger,
        )
        return MatrixContext(turn=turn)

    def _updated(
        self, kind: str | None, gradient: Any, own: Any, state: list[Any], context: MatrixContext
    ) -> tuple[Any, list[Any], Divided]:
        """The updates, the new state of a kind, and the whole new state."""
        updates = self._tree_of(self._params, kind, [gradient])
        params = self._tree_of(self._params, kind, [own])
        before = self._tree_of(self._state, kind, state)
        updates, after = self._update(updates, before, params, context=context, **self._extra_args)
        divided = self._division.divide(after)
        new = [] if kind is None else divided.of_kind(kind)
        return updates, self._unless_rejected(new, state), divided

    def _applied(self, kind: str, own: Any, updates: Any, context: MatrixContext) -> Any:
        """The new parameters of a kind."""
        params = self._tree_of(self._params, kind, [own])
        (new,) = self._division.divide(self._apply(params, updates, context=context)).of_kind(kind)
        return self._unless_rejected(new, own)

    def _rows_to_add_to(self, stacks: Any, number: Any, updates: Any) -> tuple[Any, Any]:
        """The parameters of a layer, and the updates.

        A TPU cuts each row out again once it has the update, and holds none before.
        """
        divided = self._division.divide(updates)
        (own,) = divided.of_kind("layers")
        late = jax.tree.map(lambda update: barrier_on_tpu((number, update)), own)
        numbers, own = columns(own, late, 2)
        rows = row_major(jax.tree.map(self._division.layer, stacks, numbers))
        return rows, divided.with_pieces({"layers": [own]}).tree()

    def _unless_rejected(self, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(self._is_accepted, x, y).astype(y.dtype), new, old)

    def _tree_of(self, divided: Divided, kind: str | None, own: list[Any]) -> Any:
        """The tree of a turn: the pieces of one kind, and zeros in place of the other two."""
        pieces = {other: self._zeros(divided, other) for other in KINDS if other != kind}
        return divided.with_pieces(pieces | ({} if kind is None else {kind: own})).tree()

    def _zeros(self, divided: Divided, kind: str) -> list[Any]:
        pieces = divided.of_kind(kind)
        if kind == "layers":
            pieces = jax.eval_shape(
                lambda pieces: [self._division.layer(piece, 0) for piece in pieces], pieces
            )
        return jax.tree.map(jnp.zeros_like, pieces)

    def _places(self, kind: str | None) -> Any:
        """The place of each leaf of a turn in the whole tree."""
        leaves, treedef = jax.tree.flatten(self._shapes, is_leaf=is_masked)
        numbered = [x if is_masked(x) else i for i, x in enumerate(leaves)]
        divided = self._division.divide(treedef.unflatten(numbered))

        def of(own, pieces):
            is_row = own == "layers" and self._division.is_stacked
            return jax.tree.map(lambda *numbers: Place(numbers, is_row, own == kind), *pieces)

        rows = zip(divided.kinds, divided.pieces, strict=True)
        pieces = [
            self._division.around_each(piece, lambda each, own=own: of(own, each))
            if own == "layers"
            else of(own, [piece])
            for own, piece in rows
        ]
        return divided._replace(pieces=pieces).tree()


def _skips(state: Any) -> bool:
    """Whether a state is of an optimizer that skips steps, as all of this library do."""

    def is_skipping(x):
        return isinstance(x, SkipNonFiniteState)

    return any(map(is_skipping, jax.tree.leaves(state, is_leaf=is_skipping)))


def _after(params: Any, x: Any) -> Any:
    """`x`, computed only after parameters."""
    leaves = jax.tree.leaves(params)
    x, leaves = jax.lax.optimization_barrier((x, leaves))
    for leaf in leaves:
        x = jax.tree.map(lambda x, leaf=leaf: depend_on(x, leaf) if leaf.size else x, x)
    return x


def _rows(state: list[Any], number: Any, new: list[Any]) -> list[tuple[Any, Any, Any]]:
    return [(piece, number, own) for piece, own in zip(state, new, strict=True)]
