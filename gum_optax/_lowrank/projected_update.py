"""Project before the reduce: an update from means of linear functions of the gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_rule
from .._core.context import MatrixContext
from .._core.measurements import Answering, Asking
from .._core.trees import flat, is_hole


def projected_update(
    tx: optax.GradientTransformation,
    loss: Callable[[Any, Any], Any],
    batches: Any,
    state: Any,
    params: Any,
    *,
    axes: str | tuple[str, ...] = (),
    **extra_args: Any,
) -> tuple[Any, Any, Any]:
    """The update of the mean gradient over microbatches and devices, without ever forming it.

    What `gum`, `galore_muon` and their kin need of a projected leaf is linear in its gradient `G`. So each
    microbatch and device projects its own `Gᵢ`, and only results are added up:

        every step      R = mean(Pᵀ Gᵢ),   and the γ sampled blocks of mean(Gᵢ)
        every K steps   C = mean(Pᵀ Gᵢ),   Y = mean(Gᵢ Cᵀ),   P ← orthonormalize(Y)   (twice, at first)

    `(r + 1) n + γ/L m n` numbers a block and a step (one row is for the energy outside), and `r (m + n)` more
    a power step, in place of `m n`. Leaves that are not projected are averaged whole. The result is that of

        tx.update(mean(grad(loss)(params, batch)), state, params)

    up to the rounding of sums. `find_subspace` reads the gradient through products (`track_subspace`, the
    default; `sketched_subspace`; `subspace_iteration`) or not at all (`random_subspace`). Any other finder,
    `svd_subspace` and your own among them, is given the mean gradient itself, which then exists at refreshes
    only. With several microbatches the gradients are computed once more for each mean of a refresh.
    `metrics(state)["captured_energy"]` is then an estimate: the energy outside is that of one random
    combination of rows, right in the mean.

    On several devices call it within `jax.shard_map` over the mesh axes of the data, parameters and state
    being whole (or sharded over other axes, Auto ones) on each:

        @jax.jit
        @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P(None, "data")), out_specs=P())
        def train_step(params, state, batches):  # (microbatches, windows, tokens)
            value, updates, state = projected_update(tx, loss, batches, state, params, axes="data")
            return optax.apply_updates(params, updates), state, value

    Args:
      tx: any optax transformation; one that holds no low-rank rule, or passes it no extra arguments, gets the
        mean gradient. Before a low-rank rule nothing may change the gradient, and what reads it reads zeros.
      loss: `(params, batch) -> scalar`, a mean over a microbatch.
      batches: a tree of arrays whose first axis counts the microbatches.
      state: of `tx`.
      params: the parameters, floating-point leaves.
      axes: mesh axes of an enclosing `shard_map` to average over.
      extra_args: for `tx.update`.

    Returns:
      The mean loss, the updates, and the new state.

    Raises:
      ValueError: `batches` is empty or its leaves count different microbatches; a transformation before the
        rule changes the gradient, or runs the rule in a conditional; a `residual` other than `drop`, which
        needs all of it; Explicit mesh axes outside of a `shard_map`.
    """
    check_rule("tx", tx)
    update = optax.with_extra_args_support(tx).update
    mean_of = _mean_over(loss, batches, params, (axes,) if isinstance(axes, str) else tuple(axes))
    treedef = jax.tree.structure(params, is_leaf=is_hole)
    zeros = flat(optax.tree.zeros_like(params))

    asking = Asking(lambda f: mean_of(lambda _, leaves: f(leaves)), zeros)
    update(treedef.unflatten(zeros), state, params, context=MatrixContext(measurements=asking), **extra_args)

    def everything(value, leaves):
        whole = {i: x for i, x in enumerate(leaves) if i not in asking.places and not is_hole(x)}
        return value, whole, [question.of(leaves) for question in asking.questions]

    value, whole, answers = mean_of(everything)
    leaves = [whole[i].astype(x.dtype) if i in whole else x for i, x in enumerate(zeros)]
    answering = Answering(asking, leaves, answers)
    context = MatrixContext(measurements=answering)
    updates, state = update(treedef.unflatten(leaves), state, params, context=context, **extra_args)
    return value, updates, state


def _wide(x: Any) -> Any:
    """What sums of `x` are kept in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _mean_over(loss: Any, batches: Any, params: Any, axes: tuple[str, ...]) -> Callable[[Any], Any]:
    """From `f(loss, gradient leaves)` to its mean over microbatches and mesh axes, in float32 at least."""
    counts = sorted({jnp.shape(x)[:1] for x in jax.tree.leaves(batches)})
    if len(counts) != 1 or counts[0] in ((), (0,)):
        raise ValueError(
            "batches must be arrays whose first axis counts the microbatches, at least one, as many in each;"
            f" got shapes {[jnp.shape(x) for x in jax.tree.leaves(batches)]}."
        )
    ((count,),) = counts

    def own(tree):
        """Typed as different on every device: else JAX itself would sum gradients with regard to it."""
        return jax.lax.pcast(tree, axes, to="varying") if axes else tree

    def gradient(batch):
        value, tree = jax.value_and_grad(loss)(own(params), batch)
        return value, flat(tree)

    only = gradient(jax.tree.map(lambda x: x[0], batches)) if count == 1 else None

    def mean_of(f):
        def one(total, batch):
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, f(*gradient(batch))), None

        if only is None:
            like = jax.eval_shape(lambda: f(*gradient(jax.tree.map(lambda x: x[0], batches))))
            start = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x)), like)
            total, _ = jax.lax.scan(one, own(start), batches)
            mean = jax.tree.map(lambda x: x / count, total)
        else:
            mean = jax.tree.map(lambda x: x.astype(_wide(x)), f(*only))
        return jax.lax.pmean(mean, axes) if axes else mean

    return mean_of
