"""Means of linear functions of a gradient that nobody forms.

`projected_update` traces an update twice. The first time a `Record` notes which means the rules measure, and
returns zeros. Then one pass over the microbatches takes all these means. The second time a `Replay` returns
them, in the same order.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from .trees import leaf_indices_of

# `(f, *operands) -> f(gradients, *operands)`, its mean over microbatches: `f` is linear in the gradients, a
# list with an entry for each leaf.
MeanOf = Callable[..., Any]

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # jax 0.9
    from jax.core import get_opaque_trace_state  # pyright: ignore


class Measurement(NamedTuple):
    """A linear function of the gradients of some leaves."""

    leaf_indices: Sequence[int]
    f: Callable[[Sequence[Any]], Any]

    def of(self, leaves: Sequence[Any]) -> Any:
        """Applies the function to its leaves, given the gradients of all leaves."""
        return self.f([leaves[leaf_index] for leaf_index in self.leaf_indices])


class Record:
    """Notes the measurements of an update, the first of two times that it is traced.

    It travels as `measurements` of the context. A rule that does not need the gradients of some leaves
    themselves calls `mean` for what it needs of them.
    """

    def __init__(self, mean_of: MeanOf, leaves: Sequence[Any]):
        self.mean_of = mean_of
        self.leaves = leaves  # zeros in place of the gradient
        self._trace = get_opaque_trace_state(convention="flax")
        self.measurements: list[Measurement] = []
        self.results: list[Any] = []  # of `once`
        self._needed: set[int] = set()

    @property
    def leaf_indices(self) -> set[int]:
        """The leaves whose gradients nobody needs whole."""
        measured = {i for measurement in self.measurements for i in measurement.leaf_indices}
        return measured - self._needed

    def need(self, leaf_indices: Sequence[int]) -> None:
        """The gradients of these leaves are needed whole, even if they are measured too."""
        self._needed.update(leaf_indices)

    def mean(self, leaf_indices: Sequence[int], f: Callable[[Sequence[Any]], Any]) -> Any:
        """The mean of `f`, which is linear in the leaves at `leaf_indices`; zeros in this trace."""
        self.measurements.append(Measurement(leaf_indices, f))
        return optax.tree.zeros_like(jax.eval_shape(self.measurements[-1].of, self.leaves))

    def once(self, leaf_indices: Sequence[int], make: Callable[[MeanOf], Any]) -> Any:
        """The result of `make`, which needs several means one after the other; it is made in this trace.

        Raises:
          ValueError: the update is traced within a conditional, where no mean can be taken.
        """
        if get_opaque_trace_state(convention="flax") != self._trace:
            raise ValueError(
                "tx runs a low-rank rule within a conditional, as optax.apply_if_finite does, where"
                " projected_update cannot ask it anything; leave that out: a gradient that is not finite is"
                " skipped without it."
            )
        result = make(lambda f: self.mean_of(Measurement(leaf_indices, f).of))
        self.results.append(result)
        return result

    def check_untouched(self, updates: Any) -> None:
        """Checks nothing: only `Replay` knows which leaves are never formed."""

    def finite_where(self, updates: Any) -> dict[int, Any]:
        """For each leaf, by its index, arrays that are finite where its gradient is; none in this trace."""
        return dict.fromkeys(leaf_indices_of(updates))


class Replay:
    """Returns the means, the second time that an update is traced; the calls come in the same order."""

    def __init__(self, record: Record, leaves: Sequence[Any], means: Sequence[Any]):
        self.leaves: Sequence[Any] = leaves
        self.leaf_indices: set[int] = record.leaf_indices
        self._means = list(zip(record.measurements, means, strict=True))
        self._next, self._results = iter(self._means), iter(record.results)

    def mean(self, leaf_indices: Sequence[int], f: Callable[[Sequence[Any]], Any]) -> Any:
        """The mean that the same call recorded."""
        del f
        measurement, mean = next(self._next)
        assert list(measurement.leaf_indices) == list(leaf_indices), "an update must measure the same twice"
        return mean

    def once(self, leaf_indices: Sequence[int], make: Callable[[MeanOf], Any]) -> Any:
        """The result that the same call made."""
        del leaf_indices, make
        return next(self._results)

    def need(self, leaf_indices: Sequence[int]) -> None:
        """Does nothing: the gradients of these leaves are there."""

    def check_untouched(self, updates: Any) -> None:
        """Refuses to project a leaf that a transformation has changed.

        Raises:
          ValueError: a leaf has changed.
        """
        for leaf_index, x in zip(leaf_indices_of(updates), jax.tree.leaves(updates), strict=True):
            if leaf_index in self.leaf_indices and x is not self.leaves[leaf_index]:
                raise ValueError(
                    "a transformation before the low-rank rule changes the gradient, which projected_update"
                    " never forms; put it after the rule, or do without (clipping by a global norm is"
                    " impossible)."
                )

    def finite_where(self, updates: Any) -> dict[int, Any]:
        """For each leaf, by its index, arrays that are finite where its gradient is."""
        # A number of G that is not finite makes its whole column of `PᵀG` not finite, and low-rank rules
        # measure `PᵀG` of every leaf, leaf by leaf.
        known: dict[int, Any] = {
            i: [x] for i, x in zip(leaf_indices_of(updates), jax.tree.leaves(updates), strict=True)
        }
        for measurement, mean in self._means:
            if isinstance(mean, list):
                for i, x in zip(measurement.leaf_indices, mean, strict=True):
                    known.setdefault(i, []).append(x)
        return {i: known[i] for i in leaf_indices_of(updates)}


Measurements = Record | Replay
