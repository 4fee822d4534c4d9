"""No step on a gradient that is not finite: of that leaf, or of the whole tree."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._core.context import NO_CONTEXT, MatrixContext
from .._core.guard import Guard
from .._core.measurements import Sketches
from .._core.trees import concrete, places_of
from .._linalg.numerics import is_finite


class SkipNonFiniteState(NamedTuple):
    """State of `skip_non_finite`, and of every optimizer here."""

    skipped: Int[Array, ""]  # steps so far that some leaf has skipped
    inner: Any


def _whole(updates: Any, sketches: Sketches | None) -> Guard:
    """All leaves step or none."""
    known = jax.tree.leaves(updates) if sketches is None else sketches.finite_where(updates).values()
    return Guard(is_finite(*jax.tree.leaves(list(known))))


def _by_leaf(updates: Any, sketches: Sketches | None) -> Guard:
    """Each leaf steps where its own gradient is finite."""
    if sketches is None:
        known = dict(zip(places_of(updates), jax.tree.leaves(updates), strict=True))
    else:
        known = sketches.finite_where(updates)
    leaves = {place: is_finite(*jax.tree.leaves(x)) for place, x in known.items()}
    # The barrier keeps XLA from repeating the conjunction in each of the few numbers that wait for all
    # leaves.
    taken = jax.lax.optimization_barrier(jnp.all(jnp.stack([jnp.asarray(True), *leaves.values()])))
    return Guard(taken, leaves)


def _skipping(guard_of: Any, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` under a guard of its own, or under that of a wrapper around it."""
    taking = optax.with_extra_args_support(inner)

    def init(params):
        return SkipNonFiniteState(jnp.zeros((), jnp.int32), inner.init(concrete(params)))

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        outer = context.accept
        own = guard_of(updates, context.measurements) if outer is None else Guard(outer.taken)
        context = dataclasses.replace(context, accept=own)
        steps, new = taking.update(updates, state.inner, params, context=context, **extra_args)
        steps = _steps(own, steps, updates if params is None else params)
        return steps, SkipNonFiniteState(state.skipped + ~own.taken, own.keep_rest(new, state.inner))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _steps(guard: Guard, steps: Any, like: Any) -> Any:
    """Zero where a leaf does not step, in the dtypes of `like`."""
    leaves, treedef = jax.tree.flatten(steps)
    rows = zip(guard.accepted(steps), leaves, treedef.flatten_up_to(like), strict=True)
    return treedef.unflatten([jnp.where(yes, s, 0).astype(jnp.result_type(x)) for yes, s, x in rows])


def skip_non_finite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Skip a step whose gradient holds a NaN or an infinity: zero updates, inner's state as it was.

    Every optimizer of this library skips by itself, leaf by leaf: a leaf whose gradient is not finite keeps
    its parameter and its state. Put this around one, or around any chain, to skip the whole step instead:

        tx = skip_non_finite(optax.chain(optax.clip_by_global_norm(1.0), gum(1e-3)))

    The first step then waits for the last gradient, so that all of them are in memory at once; leaf by leaf,
    a gradient is used up when the backward pass has made it.

    Unlike `optax.apply_if_finite` it never gives up and applies one, and it selects instead of
    branching, so that state is still updated in place: that of rules that read `accept` of the
    argument `context` (see `MatrixContext`), as this library's momentum, Adam and subspaces do; of others,
    such as `optax.adamw`, a CPU makes a copy. Updates
    come back in the parameters' dtype.

    The clock of the periods, and that of a schedule within `inner`, stop with the rest of the state, so that
    a skipped refresh comes a step later; a schedule outside, as `optax.inject_hyperparams` has it, goes on.
    Under `vmap` over runs with their own gradients the clocks may therefore differ, and every refresh is
    computed on every step.
    """
    return _skipping(_whole, inner)


def skip_leaves(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`skip_non_finite` leaf by leaf: what every optimizer of this library is within.

    A leaf whose gradient holds a NaN or an infinity has a zero update, and keeps its momentum and its
    projector; the others step. What leaves share, which is counts, draws and metrics, describes steps that
    all leaves have taken: it stays as it was when one has not, so that a refresh is repeated until every leaf
    has had it. `inner` must keep the arrays of each leaf by the guard it is passed; large ones that it does
    not keep would wait for all gradients.
    """
    return _skipping(_by_leaf, inner)


def skip_as_one(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation of anybody's under a guard: its leaves step if all of them do. No state of its own."""
    taking = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        guard = context.accept
        if guard is None:
            return taking.update(updates, state, params, context=context, **extra_args)
        own = Guard(jnp.all(jnp.stack([jnp.asarray(True), *guard.accepted(updates)])))
        context = dataclasses.replace(context, accept=own)
        steps, new = taking.update(updates, state, params, context=context, **extra_args)
        kept = own.keep_rest(new, state)
        return jax.tree.map(lambda s: jnp.where(own.taken, s, 0), steps), guard.as_kept(kept)

    return optax.GradientTransformationExtraArgs(inner.init, update)  # pyright: ignore[reportArgumentType]
