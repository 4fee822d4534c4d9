"""Projects gradients before they are averaged: an update from means of linear functions of the gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_function, check_rule
from .._core.context import MatrixContext
from .._core.measurements import Record, Replay
from .._core.trees import flat, is_masked
from .._linalg.numerics import wide_dtype


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

    A step averages `(r + 1) n + γ/L m n` numbers a block (one row is for the energy outside), and `r (m + n)`
    more for a power step, in place of `m n`. Leaves that are not projected are averaged whole. The result is
    that of

        tx.update(mean(grad(loss)(params, batch)), state, params)

    up to the rounding of sums. `find_subspace` reads the gradient through products (`track_subspace`, the
    default; `sketched_subspace`; `subspace_iteration`) or not at all (`random_subspace`). Any other finder,
    `svd_subspace` and your own among them, receives the mean gradient itself, which then exists at refreshes
    only. With several microbatches, a refresh computes the gradients once more for each of its means.
    `metrics(state)["captured_energy"]` is then an estimate: one random combination of rows measures the
    energy outside, which is right in the mean.

    On several devices, call it within `jax.shard_map` over the mesh axes of the data. Each device holds the
    whole parameters and state, or these are sharded over other axes, which are Auto axes.

    Args:
      tx: any optax transformation. If it holds no low-rank rule, or passes it no extra arguments, it gets the
        mean gradient. Nothing may change the gradient before a low-rank rule; a transformation that reads it
        there reads zeros.
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
      NameError: `axes` are no axes of an enclosing `shard_map`.

    Examples:
      >>> tx, P = gum_optax.galore_muon(1e-3, rank=2), jax.sharding.PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> def train_step(params, state, batches):  # (microbatches, windows, features)
      ...     loss = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      ...     value, updates, state = gum_optax.projected_update(
      ...         tx, loss, batches, state, params, axes="data"
      ...     )
      ...     return optax.apply_updates(params, updates), state, value
      >>> specs = P(), P(), P(None, "data")
      >>> step = jax.jit(jax.shard_map(train_step, mesh=mesh, in_specs=specs, out_specs=P()))
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> params, state, value = step(params, tx.init(params), jnp.ones((2, 3, 4)))
      >>> float(value), int(gum_optax.metrics(state)["refresh_count"])
      (16.0, 1)
    """
    check_rule("tx", tx)
    check_function("loss", loss, "lambda params, batch: ...")
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    _check_axes(axes)
    update = optax.with_extra_args_support(tx).update
    mean_of = _mean_over(loss, batches, params, axes)
    treedef = jax.tree.structure(params, is_leaf=is_masked)
    zeros = flat(optax.tree.zeros_like(params))

    record = Record(lambda f: mean_of(lambda _, leaves: f(leaves)), zeros)
    update(treedef.unflatten(zeros), state, params, context=MatrixContext(measurements=record), **extra_args)

    def everything(value, leaves):
        whole = {i: x for i, x in enumerate(leaves) if i not in record.leaf_indices and not is_masked(x)}
        return value, whole, [measurement.of(leaves) for measurement in record.measurements]

    value, whole, means = mean_of(everything)
    leaves = [whole[i].astype(x.dtype) if i in whole else x for i, x in enumerate(zeros)]
    replay = Replay(record, leaves, means)
    context = MatrixContext(measurements=replay)
    updates, state = update(treedef.unflatten(leaves), state, params, context=context, **extra_args)
    return value, updates, state


def _check_axes(axes: tuple[str, ...]) -> None:
    for axis in axes:
        try:
            jax.lax.axis_index(axis)
        except NameError:
            raise NameError(
                f"axes has {axis!r}, which is no axis of a mesh here: call projected_update within a"
                " jax.shard_map over that axis, or leave out axes on one device."
            ) from None


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
        """Marks a tree as device-varying; otherwise JAX inserts the psum of the gradients itself."""
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
            start = jax.tree.map(lambda x: jnp.zeros(x.shape, wide_dtype(x)), like)
            total, _ = jax.lax.scan(one, own(start), batches)
            mean = jax.tree.map(lambda x: x / count, total)
        else:
            mean = jax.tree.map(lambda x: x.astype(wide_dtype(x)), f(*only))
        return jax.lax.pmean(mean, axes) if axes else mean

    return mean_of
