"""Means of linear functions of a gradient that nobody holds: what rules ask, and the answers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from .trees import places_of

# `(f, *operands) -> f(gradients, *operands)`, its mean over microbatches: `f` is linear in the gradients, a
# list with an entry for each leaf.
MeanOf = Callable[..., Any]

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # jax 0.9
    from jax.core import get_opaque_trace_state  # pyright: ignore


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
