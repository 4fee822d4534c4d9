"""State that comes from a checkpoint: whether it is this optimizer's, and how it becomes another's."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._core.checks import check_rule
from .._linalg.orthonormal import orthonormalize
from .._lowrank.low_rank import LowRankState
from .containers import (
    Decided,
    Match,
    Names,
    argument_of,
    array_name,
    differences,
    has_numbers,
    low_rank_places,
    match,
    named_arrays,
)

# Against rounding that adds up: new columns may be nearly in the span of the old ones.
_SHIFTED_PASSES = 3
# The fields of what starts anew: a matrix that is no longer projected, a group's slots.
_MAY_GO = ("projectors", "low", "full", "outside")


def _periods(tx: optax.GradientTransformation, params: Any) -> dict[Names, int]:
    """Of the rules in `tx`, by their places; compiled, so that no other state is made."""

    def periods(params):
        arrays = named_arrays(tx.init(params))
        return {place: arrays[*place, "period"] for place in low_rank_places(arrays)}

    return {place: int(period) for place, period in jax.jit(periods)(params).items()}


def check_state(tx: optax.GradientTransformation, state: Any, params: Any) -> None:
    """Compare a state with what `tx` would have: call it once after a restore.

    A state of another rank or fraction has other shapes, and one of another period would go on with momenta
    of blocks that are no longer the drawn ones; the step would be wrong without a word.

    Args:
      tx: any optax transformation.
      state: as restored, arrays or shapes, in any container: of Orbax and Flax without a target, of NNX, or a
        training state that holds it in a field `opt_state`. Of shapes, the period is not compared.
      params: the parameters, arrays or shapes.

    Raises:
      ValueError: it is of another optimizer, another version of this library, or of one with another `rank`,
        `full_rank_fraction`, `period` or `momentum_dtype`; the message names each difference.
    """
    check_rule("tx", tx)
    like = jax.eval_shape(tx.init, params)
    matched = match(state, like)
    found = differences(matched, like)
    held = {place: matched.found[*place, "period"] for place in low_rank_places(matched.found) if not found}
    if any(map(has_numbers, held.values())):
        periods = _periods(tx, params)
        its = {place: int(jnp.asarray(x)) for place, x in held.items() if has_numbers(x)}
        found += [
            f"period is {x} in place of {periods[place]}" for place, x in its.items() if x != periods[place]
        ]
    if found:
        raise ValueError(
            "this state is of another optimizer: "
            + "; ".join(sorted(found))
            + ". Restore it with the arguments that it was saved with; gum_optax.convert_state changes them."
        )


def convert_state(tx: optax.GradientTransformation, state: Any, params: Any) -> Any:
    """The state of an optimizer with another rank, period or fraction, at the beginning of a period.

        P ← the first r' columns of P, or P and r' - r random columns, made orthonormal
        R ← its first r' rows, or R and zeros

    Counts, key, moments of unprojected leaves and of `others` stay; matrices that were not projected and are
    now, or the other way round, start anew. With the same arguments, it is the same state in the structure
    of `tx.init(params)`, whatever it was restored into, and at any step.

    Args:
      tx: the new optimizer.
      state: of the old one, before a step that begins a period unless all arguments are the same; arrays, in
        any container that `check_state` takes.
      params: the parameters.

    Raises:
      TypeError: the state has shapes in place of arrays.
      ValueError: the state is within a period, or is not of the same kind of optimizer and parameters.
    """
    check_rule("tx", tx)
    new = tx.init(params)
    matched, wanted = match(state, new), named_arrays(new)
    places = low_rank_places(wanted)
    old = {name: _array(name, x) for name, x in matched.found.items()}
    shapes = [{name: x.shape for name, x in arrays.items()} for arrays in (old, wanted)]
    periods = [[arrays.get((*place, "period")) for place in places] for arrays in (old, wanted)]
    is_same = not matched.rest and shapes[0] == shapes[1] and periods[0] == periods[1]
    if not is_same:
        _check_begins(old)
        _check_kind(matched, places)

    def converted(path, x):
        name = array_name(path)
        decided = argument_of(name, places)
        # The draw of the new period is made anew, with the new arguments.
        is_drawn = name[-1:] == ("period",) or (decided is not None and decided[0] == "index")
        return x if name not in old or (is_drawn and not is_same) else _fitted(name, decided, old[name], x)

    return jax.tree_util.tree_map_with_path(converted, new)


def _array(name: Names, x: Any) -> Array:
    if not has_numbers(x):
        raise TypeError(
            f"convert_state needs arrays, but {'/'.join(name)} is a {type(x).__name__}; restore it first."
        )
    return jnp.asarray(x)


def _check_begins(old: dict[Names, Array]) -> None:
    for place in low_rank_places(old):
        period = int(old[*place, "period"])
        if into := int(old[*place, "count"]) % period:
            raise ValueError(
                f"a state is converted at the beginning of a period, but {into} of {period} steps of this one"
                f" are taken: take {period - into} more, or go back to an earlier checkpoint."
            )


def _check_kind(matched: Match, places: Sequence[Names]) -> None:
    """Arrays that the new optimizer has no place for are of what starts anew, or an error."""
    fields = {*_MAY_GO, *(str(LowRankState._fields.index(field)) for field in _MAY_GO)}
    starts = [*places, *(matched.positions[*place, "count"][:-1] for place in places)]

    def may_go(name):
        return any(name[: len(start)] == start and fields & set(name[len(start) :][:1]) for start in starts)

    lost = [spelled for name, spelled in matched.rest.items() if not may_go(name)]
    if lost:
        raise ValueError(
            "this state is not of the same kind of optimizer and parameters: the new one has no"
            f" {', '.join(sorted(lost))}."
        )


def _fitted(
    name: Names, decided: Decided | None, x: Float[Array, "..."], like: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`x` in the shape of `like`: the axis that an argument decides is cut, or filled up."""
    if x.shape == like.shape:
        return x.astype(like.dtype)
    field, _, axis = decided or ("", "", 0)
    others = [i for i in range(like.ndim) if i != axis % like.ndim]
    if not field or x.ndim != like.ndim or any(x.shape[i] != like.shape[i] for i in others):
        raise ValueError(
            f"{'/'.join(name)} has shape {x.shape} and would have {like.shape}: no change of"
            " rank, period or fraction does that; give its own parameters and kind of optimizer."
        )
    size = like.shape[axis]
    kept = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    rest = jax.lax.slice_in_dim(like, kept.shape[axis], size, axis=axis)
    if field != "projectors":
        return jnp.concatenate([kept.astype(like.dtype), jnp.zeros_like(rest)], axis)
    return orthonormalize(jnp.concatenate([kept.astype(like.dtype), rest], axis), _SHIFTED_PASSES)
