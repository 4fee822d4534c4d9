"""Subspace finders that follow each other; the default finder is one of these."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from .._core.checks import check_function, check_integer
from .._core.measurements import MeanOf
from .._core.turns import Turn, WholeStep
from .finders import ITERATIONS, LinearForm, SubspaceFinder, linear_form, power_steps, subspace_iteration


class SwitchSubspace(NamedTuple):
    """Finders that follow each other: `finders[i]` before step `steps[i]`, the last one from there on."""

    steps: tuple[int, ...]
    finders: tuple[SubspaceFinder, ...]

    def __call__(self, key: PRNGKeyArray, gradient: Array, previous: Array) -> Array:
        """Calls the first finder: a call without a step is the first call."""
        return self.finders[0](key, gradient, previous)


class InTurn(NamedTuple):
    """A finder in one turn of a step: a row draws what its stack would draw."""

    find: SubspaceFinder
    turn: WholeStep

    def __call__(self, key: PRNGKeyArray, gradient: Array, previous: Array) -> Array:
        return self.find(key, gradient, previous)


def in_turn(find: SubspaceFinder, turn: WholeStep) -> SubspaceFinder:
    """The finder for the leaves of a turn."""
    return InTurn(find, turn) if isinstance(turn, Turn) else find


def switch_subspace(steps: int, first: SubspaceFinder, then: SubspaceFinder) -> SubspaceFinder:
    """`first` at refreshes before step number `steps`, and `then` from there on (GoLore).

    Either may itself be such a switch. The phases of `first` after `steps`, and those of `then` before it,
    never run.

    Raises:
      TypeError, ValueError: `steps` is not an integer of at least 0, or a finder is not a function.

    Examples:
      >>> find = gum_optax.switch_subspace(1000, gum_optax.svd_subspace, gum_optax.random_subspace)
      >>> find.steps, [finder.__name__ for finder in find.finders]
      ((1000,), ['svd_subspace', 'random_subspace'])
    """
    steps = check_integer("steps", steps, at_least=0)
    check_function("first", first, "gum_optax.svd_subspace")
    check_function("then", then, "gum_optax.random_subspace")
    phases = {start: finder for start, finder in _phases(first).items() if start < steps}
    # Of the phases that would have begun earlier, the last one begins at `steps`.
    phases |= {max(start, steps): finder for start, finder in _phases(then).items()}
    return SwitchSubspace(tuple(phases)[1:], tuple(phases.values()))


def _phases(find: SubspaceFinder) -> dict[int, SubspaceFinder]:
    """Each finder, by the step from which it runs."""
    if isinstance(find, SwitchSubspace):
        return dict(zip((0, *find.steps), find.finders, strict=True))
    return {0: find}


# Linear forms, and the number of the one that runs.
Phased = tuple[tuple[functools.partial[Any], ...], Int[Array, ""]]


def finders_of(find: SubspaceFinder, step: Int[Array, ""]) -> Phased:
    """The linear forms of all finders, and the number of the one that runs at a step."""
    if isinstance(find, InTurn):
        return _in_rows(finders_of(find.find, step), find.turn)
    phases = _phases(find)
    phase = jnp.sum(step >= jnp.asarray(list(phases))) - 1
    return tuple(linear_form(finder) for finder in phases.values()), phase


def few_finders_of(find: SubspaceFinder, step: Int[Array, ""]) -> Phased:
    """`finders_of`, with one finder in place of several that are all power steps.

    It looks up its number of steps, so that XLA compiles one finder. On a TPU, XLA would move the conversion
    of the gradient to bfloat16 out of its loop.
    """
    if isinstance(find, InTurn):
        return _in_rows(few_finders_of(find.find, step), find.turn)
    forms, phase = finders_of(find, step)
    if all(form.func is power_steps for form in forms):
        iterations = jnp.asarray([form.keywords.get("iterations", ITERATIONS) for form in forms])
        forms = (functools.partial(power_steps, iterations=iterations[phase]),)
    return forms, phase


def _in_rows(found: Phased, turn: WholeStep) -> Phased:
    """The same finders, each with the keys of rows."""
    forms, phase = found
    return tuple(functools.partial(_with_row_keys, form, turn) for form in forms), phase


def _with_row_keys(form: LinearForm, turn: WholeStep, mean_of: MeanOf, keys: Any, previous: Any) -> Any:
    return form(mean_of, [turn.row_key(key) for key in keys], previous)


# Measured (docs/results, "The refresh"): two power steps from the random subspace of `init` find 0.987 of the
# exact subspace's energy; one step from the last period's subspace finds 0.998.
track_subspace: SubspaceFinder = switch_subspace(
    1,
    functools.partial(subspace_iteration, iterations=2),
    functools.partial(subspace_iteration, iterations=1),
)
"""The default finder: two steps of `subspace_iteration` at the first refresh, and one at each later one.

Examples:
  >>> gradient = jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))
  >>> p = gum_optax.track_subspace(jax.random.key(0), gradient, jnp.full((4, 1), 0.5))
  >>> print(np.asarray(p / p[0]).ravel().round(2))  # two steps: the fourth powers of 4, 3, 2, 1
  [1.   0.32 0.06 0.  ]
"""
