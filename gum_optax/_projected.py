"""Project before the reduce: an update from means of linear functions of the gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._checks import check_rule
from ._subspace import MeanOf


class _Standing:
    """Leaves that stand for a gradient."""

    def __init__(self, leaves: Sequence[Any]):
        self.leaves = leaves

    def check_untouched(self, updates: Any) -> None:
        """Refuse leaves that something has made of them.

        Raises:
          ValueError: there is one.
        """
        known = {id(x) for x in self.leaves}
        for path, x in jax.tree_util.tree_leaves_with_path(updates):
            if id(x) not in known:
                where = jax.tree_util.keystr(path)
                raise ValueError(
                    f"a transformation before the low-rank rule changes the gradient {where}, which"
                    " projected_update never forms; put it after the rule, or do without (clipping by a"
                    " global norm is impossible)."
                )


class Asking(_Standing):
    """The first of two times that an update is traced: notes what rules ask of a gradient that nobody holds.

    It travels as the extra argument `sketches`. A rule that can do without the gradients of some leaves calls
    `mean` for what it needs of them; the second time, the same calls in the same order are `Answering`'s.
    """

    def __init__(self, mean_of: MeanOf, leaves: Sequence[Any]):
        super().__init__(leaves)
        self.mean_of = mean_of
        self.asked: list[Callable[[Sequence[Any]], Any]] = []
        self.made: list[Any] = []
        self.places: set[int] = set()

    def mean(self, places: Sequence[int], f: Callable[[Sequence[Any]], Any]) -> Any:
        """The mean of `f`, linear in the leaves at `places`; for now zeros."""
        self.places |= set(places)

        def of_all(leaves):
            return f([leaves[i] for i in places])

        self.asked.append(of_all)
        return optax.tree.zeros_like(jax.eval_shape(of_all, self.leaves))

    def once(self, places: Sequence[int], make: Callable[[MeanOf], Any]) -> Any:
        """What `make` makes of means that it needs one after the other."""
        made = make(lambda f: self.mean_of(lambda leaves: f([leaves[i] for i in places])))
        self.made.append(made)
        return made

    def finite_where(self) -> list[Any]:
        """What is finite where the gradient is."""
        return []


class Answering(_Standing):
    """The second time: every call gets what the same call asked for."""

    def __init__(self, asking: Asking, leaves: Sequence[Any], answers: Sequence[Any]):
        super().__init__(leaves)
        self._held = [x for i, x in enumerate(leaves) if i not in asking.places]
        self._answers, self._next = answers, iter(answers)
        self._made = iter(asking.made)

    def mean(self, places: Sequence[int], f: Callable[[Sequence[Any]], Any]) -> Any:
        del places, f
        return next(self._next)

    def once(self, places: Sequence[int], make: Callable[[MeanOf], Any]) -> Any:
        del places, make
        return next(self._made)

    def finite_where(self) -> list[Any]:
        # A number of G that is not finite leaves none finite in its column of `PᵀG`.
        return jax.tree.leaves((self._held, self._answers))


Sketches = Asking | Answering


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
        every K steps   C = mean(Pᵀ Gᵢ),   Y = mean(Gᵢ Cᵀ),   P ← orthonormalize(Y)

    `r n + γ/L m n` numbers a block and a step, and `r (m + n)` more a power step, in place of `m n`. Leaves
    that are not projected are averaged as they are. The result is that of

        tx.update(mean(grad(loss)(params, batch)), state, params)

    up to the rounding of sums, where `find_subspace` is made of power steps (`track_subspace`, the default;
    `subspace_iteration`) or of none (`random_subspace`). With several microbatches the gradients are computed
    once more for each mean of a refresh. `metrics(state)["captured_energy"]` is then an estimate: the energy
    outside is that of one random combination of rows, right in the mean.

    On several devices call it within `jax.shard_map` over the mesh axes of the data, parameters and state
    being whole (or sharded over other axes, Auto ones) on each:

        @jax.jit
        @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P(None, "data")), out_specs=P())
        def train_step(params, state, batches):  # (microbatches, windows, tokens)
            value, updates, state = projected_update(tx, loss, batches, state, params, axes="data")
            return optax.apply_updates(params, updates), state, value

    Args:
      tx: any optax transformation; one that holds no low-rank rule, or passes it no extra arguments, gets the
        mean gradient. Nothing may change
        the gradient before a low-rank rule does: its norm is not known.
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
        rule changes the gradient; a `residual` other than `drop`, which needs all of it.
      TypeError: the finder needs all of it (`svd_subspace`, `randomized_svd`, one of your own).
    """
    check_rule("tx", tx)
    update = optax.with_extra_args_support(tx).update
    mean_of = _mean_over(loss, batches, params, (axes,) if isinstance(axes, str) else tuple(axes))
    treedef = jax.tree.structure(params)
    zeros = jax.tree.leaves(optax.tree.zeros_like(params))

    asking = Asking(lambda f: mean_of(lambda _, leaves: f(leaves)), zeros)
    update(treedef.unflatten(zeros), state, params, sketches=asking, **extra_args)

    def everything(value, leaves):
        rest = [x for i, x in enumerate(leaves) if i not in asking.places]
        return value, rest, [f(leaves) for f in asking.asked]

    value, rest, answers = mean_of(everything)
    held = iter(rest)
    leaves = [x if i in asking.places else next(held).astype(x.dtype) for i, x in enumerate(zeros)]
    answering = Answering(asking, leaves, answers)
    updates, state = update(treedef.unflatten(leaves), state, params, sketches=answering, **extra_args)
    return value, updates, state


def _mean_over(loss: Any, batches: Any, params: Any, axes: tuple[str, ...]) -> Callable[[Any], Any]:
    """From `f(loss, gradient leaves)` to its mean over microbatches and mesh axes, in float32."""
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
        return value, jax.tree.leaves(tree)

    held = gradient(jax.tree.map(lambda x: x[0], batches)) if count == 1 else None

    def mean_of(f):
        def one(total, batch):
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, f(*gradient(batch))), None

        if held is None:
            like = jax.eval_shape(lambda: f(*gradient(jax.tree.map(lambda x: x[0], batches))))
            start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
            total, _ = jax.lax.scan(one, own(start), batches)
            mean = jax.tree.map(lambda x: x / count, total)
        else:
            mean = jax.tree.map(lambda x: x.astype(jnp.float32), f(*held))
        return jax.lax.pmean(mean, axes) if axes else mean

    return mean_of
