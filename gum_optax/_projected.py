"""Project before the reduce: an update from means of linear functions of the gradient."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # jax 0.9
    from jax.core import get_opaque_trace_state  # pyright: ignore

from ._checks import check_rule
from ._subspace import MeanOf
from ._trees import flat, is_hole, places_of


class Question(NamedTuple):
    """A linear function of the gradients of some leaves."""

    places: Sequence[int]
    f: Callable[[Sequence[Any]], Any]

    def of(self, leaves: Sequence[Any]) -> Any:
        """Of the gradients of all leaves."""
        return self.f([leaves[place] for place in self.places])


class Asking:
    """The first of two times that an update is traced: notes what rules ask of a gradient that nobody holds.

    It travels as the extra argument `sketches`. A rule that can do without the gradients of some leaves calls
    `mean` for what it needs of them; the second time, the same calls in the same order are `Answering`'s.
    """

    def __init__(self, mean_of: MeanOf, leaves: Sequence[Any]):
        self.mean_of = mean_of
        self.leaves = leaves  # stand for the gradient
        self._trace = get_opaque_trace_state(convention="flax")
        self.questions: list[Question] = []
        self.made: list[Any] = []
        self._needed: set[int] = set()

    @property
    def places(self) -> set[int]:
        """The leaves whose gradients nobody needs as they are."""
        return {place for question in self.questions for place in question.places} - self._needed

    def need(self, places: Sequence[int]) -> None:
        """The gradients of these are needed as they are, whatever else is asked of them."""
        self._needed.update(places)

    def mean(self, places: Sequence[int], f: Callable[[Sequence[Any]], Any]) -> Any:
        """The mean of `f`, linear in the leaves at `places`; for now zeros."""
        self.questions.append(Question(places, f))
        return optax.tree.zeros_like(jax.eval_shape(self.questions[-1].of, self.leaves))

    def once(self, places: Sequence[int], make: Callable[[MeanOf], Any]) -> Any:
        """What `make` makes of means that it needs one after the other.

        Raises:
          ValueError: what is asked is known within a conditional only.
        """
        if get_opaque_trace_state(convention="flax") != self._trace:
            raise ValueError(
                "tx runs a low-rank rule within a conditional, as optax.apply_if_finite does, where"
                " projected_update cannot ask it anything; leave that out: a gradient that is not finite is"
                " skipped without it."
            )
        made = make(lambda f: self.mean_of(Question(places, f).of))
        self.made.append(made)
        return made

    def check_untouched(self, updates: Any) -> None:
        """Which leaves must be, is known the second time."""

    def finite_where(self, updates: Any) -> dict[int, Any]:
        """For each leaf, by its place, what is finite where its gradient is: as yet nothing."""
        return dict.fromkeys(places_of(updates))


class Answering:
    """The second time: every call gets what the same call asked for."""

    def __init__(self, asking: Asking, leaves: Sequence[Any], answers: Sequence[Any]):
        self.leaves, self.places = leaves, asking.places
        self._answered = list(zip(asking.questions, answers, strict=True))
        self._next, self._made = iter(self._answered), iter(asking.made)

    def mean(self, places: Sequence[int], f: Callable[[Sequence[Any]], Any]) -> Any:
        del f
        question, answer = next(self._next)
        assert list(question.places) == list(places), "an update must ask the same whenever it is traced"
        return answer

    def once(self, places: Sequence[int], make: Callable[[MeanOf], Any]) -> Any:
        del places, make
        return next(self._made)

    def need(self, places: Sequence[int]) -> None:
        """They are there."""

    def check_untouched(self, updates: Any) -> None:
        """Refuse to project a leaf that something has changed.

        Raises:
          ValueError: there is one.
        """
        for place, x in zip(places_of(updates), jax.tree.leaves(updates), strict=True):
            if place in self.places and x is not self.leaves[place]:
                raise ValueError(
                    "a transformation before the low-rank rule changes the gradient, which projected_update"
                    " never forms; put it after the rule, or do without (clipping by a global norm is"
                    " impossible)."
                )

    def finite_where(self, updates: Any) -> dict[int, Any]:
        # A number of G that is not finite leaves none finite in its column of `PᵀG`, which low-rank rules ask
        # of every leaf, leaf by leaf.
        known: dict[int, Any] = {
            place: [x] for place, x in zip(places_of(updates), jax.tree.leaves(updates), strict=True)
        }
        for question, answer in self._answered:
            if isinstance(answer, list):
                for place, x in zip(question.places, answer, strict=True):
                    known.setdefault(place, []).append(x)
        return {place: known[place] for place in places_of(updates)}


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
    update(treedef.unflatten(zeros), state, params, sketches=asking, **extra_args)

    def everything(value, leaves):
        whole = {i: x for i, x in enumerate(leaves) if i not in asking.places and not is_hole(x)}
        return value, whole, [question.of(leaves) for question in asking.questions]

    value, whole, answers = mean_of(everything)
    leaves = [whole[i].astype(x.dtype) if i in whole else x for i, x in enumerate(zeros)]
    answering = Answering(asking, leaves, answers)
    updates, state = update(treedef.unflatten(leaves), state, params, sketches=answering, **extra_args)
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
