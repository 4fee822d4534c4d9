"""Rejects the step of a gradient that is not finite: the step of that leaf, or of the whole tree."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._core.acceptance import Acceptance
from .._core.checks import check_rule
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.measurements import Measurements
from .._core.trees import concrete, leaf_indices_of
from .._core.turns import Turn
from .._linalg.numerics import all_true, is_finite

# The step of a leaf that is skipped. Added to a parameter it changes no bit, and no sign of a zero. XLA would
# share a table of +0.0 with the zeros that the gradient of an embedding or of scanned layers begins with, and
# a GPU would hold it (`findings/xla_gpu_shared_zeros.sh`).
_NO_STEP = -0.0


class SkipNonFiniteState(NamedTuple):
    """State of `skip_non_finite`, and of every optimizer here.

    Examples:
      >>> tx, params = gum_optax.sinkgd(1e-3), {"kernel": jnp.ones((4, 8))}
      >>> updates, state = tx.update({"kernel": jnp.full((4, 8), jnp.nan)}, tx.init(params), params)
      >>> int(state.skipped), bool(updates["kernel"].any())
      (1, False)
    """

    skipped: Int[Array, ""]  # steps so far that some leaf has skipped
    inner: Any


def _whole(updates: Any, measurements: Measurements | None) -> Acceptance:
    """All leaves accept their steps, or none does."""
    known = jax.tree.leaves(updates) if measurements is None else measurements.finite_where(updates).values()
    return Acceptance(is_finite(*jax.tree.leaves(list(known))))


def _by_leaf(updates: Any, measurements: Measurements | None) -> Acceptance:
    """Each leaf accepts its step if its own gradient is finite."""
    if measurements is None:
        known = dict(zip(leaf_indices_of(updates), jax.tree.leaves(updates), strict=True))
    else:
        known = measurements.finite_where(updates)
    by_leaf = {leaf_index: is_finite(*jax.tree.leaves(x)) for leaf_index, x in known.items()}
    return Acceptance(all_true(by_leaf.values()), by_leaf)


def _in_turn(updates: Any, turn: Turn) -> Acceptance:
    """The acceptance of a step that is taken layer by layer: a layer accepts if all its leaves do.

    In the last turn, which has no leaf of its own, the state that layers share accepts if all layers have.
    """
    rows = zip(jax.tree.leaves(updates), turn.are_live(updates), strict=True)
    accepted = is_finite(*[x for x, is_live in rows if is_live]) & turn.is_accepted
    all_turns = turn.accumulate(jnp.asarray(True), lambda before: before & accepted)
    accepted = all_turns if turn.is_last else accepted
    return Acceptance(accepted, dict.fromkeys(leaf_indices_of(updates), accepted))


def _skipping(
    acceptance_of: Any, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`inner` with an acceptance of its own, or with that of a wrapper around it."""
    taking = optax.with_extra_args_support(inner)

    def init(params):
        return SkipNonFiniteState(jnp.zeros((), jnp.int32), inner.init(concrete(params)))

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        outer = context.accept
        if context.turn.is_probe:
            own = Acceptance(jnp.asarray(True))
        elif outer is None and isinstance(context.turn, Turn):
            own = _in_turn(updates, context.turn)
        elif outer is None:
            own = acceptance_of(updates, context.measurements)
        else:
            own = Acceptance(outer.all_leaves)
        context = dataclasses.replace(context, accept=own)
        steps, new = taking.update(updates, state.inner, params, context=context, **extra_args)
        steps = _steps(own, steps, updates if params is None else params)
        skipped = context.turn.mark(state.skipped + ~own.all_leaves)
        return steps, SkipNonFiniteState(skipped, own.keep_rest_if_rejected(new, state.inner))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _steps(accept: Acceptance, steps: Any, like: Any) -> Any:
    """Zero where a leaf rejects its step, in the dtypes of `like`."""
    leaves, treedef = jax.tree.flatten(steps)
    rows = zip(accept.of_leaves(steps), leaves, treedef.flatten_up_to(like), strict=True)
    return treedef.unflatten([jnp.where(yes, s, _NO_STEP).astype(jnp.result_type(x)) for yes, s, x in rows])


def skip_non_finite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Skip a step whose gradient holds a NaN or an infinity: updates are zero, and inner's state stays.

    Every optimizer of this library skips by itself, leaf by leaf: a leaf whose gradient is not finite keeps
    its parameter and its state. Put this around one, or around any chain, to skip the whole step instead. The
    first step then waits for the last gradient, so that all of them are in memory at once; leaf by leaf, a
    gradient is used up when the backward pass has made it.

    Unlike `optax.apply_if_finite` it never gives up and applies such a step. It selects and does not branch,
    so that state is updated in place, if the rule reads `accept` of the argument `context` (see
    `MatrixContext`), as this library's momentum, Adam and subspaces do. A CPU copies the state of other
    rules, such as `optax.adamw`. Updates have the parameters' dtype.

    The counts of the periods, and of a schedule within `inner`, stop with the rest of the state, so that a
    skipped refresh comes a step later. A schedule outside, such as that of `optax.inject_hyperparams`, goes
    on. Under `vmap` over runs with their own gradients these counts may therefore differ, and every step
    computes a refresh.

    Examples:
      >>> tx = gum_optax.skip_non_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)))
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> gradients = {"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])}
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> bool(updates["a"].any()), int(state.skipped)
      (False, 1)
    """
    return _skipping(_whole, check_rule("inner", inner))


def skip_leaves(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`skip_non_finite` leaf by leaf; every optimizer of this library is wrapped in it.

    A leaf whose gradient holds a NaN or an infinity has a zero update, and keeps its momentum and its
    projector; the others step. Leaves share counts, draws and metrics. These describe steps that all leaves
    accept, and stay as they were if a leaf rejects, so that a refresh is repeated until every leaf has had
    it. `inner` should keep the arrays of each leaf by `accept` of its context: a large array that it does not
    keep waits for all gradients.
    """
    return _skipping(_by_leaf, inner)


def skip_as_one(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Any transformation as one: its leaves accept a step if all of them do. It has no state of its own."""
    taking = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        accept = context.accept
        if accept is None:
            return taking.update(updates, state, params, context=context, **extra_args)
        own = Acceptance(all_true(accept.of_leaves(updates)))
        context = dataclasses.replace(context, accept=own)
        steps, new = taking.update(updates, state, params, context=context, **extra_args)
        kept = own.keep_rest_if_rejected(new, state)
        return jax.tree.map(lambda s: jnp.where(own.all_leaves, s, _NO_STEP), steps), accept.mark_kept(kept)

    return optax.GradientTransformationExtraArgs(inner.init, update)  # pyright: ignore[reportArgumentType]
