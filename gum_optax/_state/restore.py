"""Restores state from a checkpoint: checks that it fits an optimizer, and converts it to another one."""

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
    check_holds,
    differences,
    has_numbers,
    listed,
    low_rank_places,
    match,
    named_arrays,
)
from .eight_bits import are_coded, narrowed, widened

# Three shifted passes keep rounding from adding up: new columns may lie nearly in the span of the old ones.
_SHIFTED_PASSES = 3
# These fields may start anew: those of a matrix that is no longer projected, and the slots of a group.
_MAY_GO = ("projectors", "low", "full", "outside")


def _periods(tx: optax.GradientTransformation, params: Any) -> dict[Names, int]:
    """The periods of the rules in `tx`, by their places; compiled, so that no other state is allocated."""

    def periods(params):
        arrays = named_arrays(tx.init(params))
        return {place: arrays[*place, "period"] for place in low_rank_places(arrays)}

    return {place: int(period) for place, period in jax.jit(periods)(params).items()}


def check_state(tx: optax.GradientTransformation, state: Any, params: Any) -> None:
    """Check that a restored state fits `tx`: call it once after a restore.

    A state with another rank or fraction has other shapes. A state with another period would continue with
    momenta of blocks that are no longer drawn, and its steps would be wrong without an error.

    Args:
      tx: any optax transformation.
      state: the restored state, arrays or shapes, in any container: from Orbax or Flax without a target, from
        NNX, or a training state with the optimizer state in a field `opt_state`. The check skips the period
        of a state of shapes.
      params: the parameters, arrays or shapes.

    Raises:
      ValueError: the state holds no array, or belongs to another optimizer, to another version of this
        library, or to another `rank`, `full_rank_fraction`, `period` or `momentum_dtype`; the message names
        each difference.

    Examples:
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> state = gum_optax.galore_muon(1e-3, rank=2, period=200).init(params)
      >>> gum_optax.check_state(gum_optax.galore_muon(1e-3, rank=2, period=100), state, params)
      Traceback (most recent call last):
          ...
      ValueError: this state is of another optimizer: period is 200 in place of 100. ...
    """
    check_rule("tx", tx)
    like = jax.eval_shape(tx.init, params)
    check_holds(state, like)
    matched = match(state, like)
    entries = differences(matched, like)
    places = low_rank_places(matched.found) if not entries else []
    stored = {place: matched.found[*place, "period"] for place in places}
    if any(map(has_numbers, stored.values())):
        periods = _periods(tx, params)
        known = {place: int(jnp.asarray(x)) for place, x in stored.items() if has_numbers(x)}
        entries += [
            f"period is {x} in place of {periods[place]}" for place, x in known.items() if x != periods[place]
        ]
    if entries:
        raise ValueError(
            "this state is of another optimizer: "
            + "; ".join(sorted(entries))
            + ". Restore it with the arguments that it was saved with; gum_optax.convert_state changes them."
        )


def convert_state(tx: optax.GradientTransformation, state: Any, params: optax.Params) -> optax.OptState:
    """Convert a state to that of an optimizer with another rank, period or fraction.

        P ← the first r' columns of P, or P and r' - r random columns, made orthonormal
        M ← its first r' rows, or M and zeros

    Counts, key, and moments of unprojected leaves and of `others` stay. A matrix that becomes projected, or
    stops being projected, starts anew. Another `momentum_dtype`, or `adamw_8bit` in place of AdamW, rounds to
    nearest. With the same arguments, at any step, the function returns the same state in the structure of
    `tx.init(params)`, whatever container the state comes in (a change from or to eight bits needs names).

    Args:
      tx: the new optimizer.
      state: the state of the old optimizer: arrays, in any container that `check_state` accepts. Unless all
        arguments are the same, the next step must begin a period.
      params: the parameters.

    Raises:
      TypeError: the state has shapes in place of arrays.
      ValueError: the state holds no array, is within a period, or belongs to another kind of optimizer or
        other parameters.

    Examples:
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> state = gum_optax.galore_muon(1e-3, rank=2).init(params)
      >>> state = gum_optax.convert_state(gum_optax.galore_muon(1e-3, rank=3), state, params)
      >>> optax.tree.get(state, "projectors")["kernel"].shape
      (4, 3)
    """
    check_rule("tx", tx)
    new = tx.init(params)
    check_holds(state, new)
    wanted, held = named_arrays(new), named_arrays(state)
    if (are_coded(wanted) or are_coded(held)) and differences(match(state, new), new):
        found = narrowed(_converted(widened(held), widened(wanted)), wanted)
        return jax.tree_util.tree_map_with_path(lambda path, _: found[array_name(path)], new)
    return _converted(state, new)


def _converted(state: Any, new: Any) -> Any:
    """The state in the structure of `new`, with its arrays where they fit."""
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
        # The new arguments need a new draw for the new period.
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
                f"convert_state needs a state at the beginning of a period, but {into} of {period} steps of"
                f" this period are taken: take {period - into} more, or go back to an earlier checkpoint."
            )


def _check_kind(matched: Match, places: Sequence[Names]) -> None:
    """Raise an error if the new optimizer has no place for an array, unless the array may start anew."""
    fields = {*_MAY_GO, *(str(LowRankState._fields.index(field)) for field in _MAY_GO)}
    starts = [*places, *(matched.positions[*place, "count"][:-1] for place in places)]

    def may_go(name):
        return any(name[: len(start)] == start and fields & set(name[len(start) :][:1]) for start in starts)

    lost = [spelled for name, spelled in matched.rest.items() if not may_go(name)]
    if lost:
        raise ValueError(
            "this state is not of the same kind of optimizer and parameters: the new one has no"
            f" {listed(sorted(lost))}. convert_state changes rank, period, fraction and momentum_dtype; for"
            " another kind of optimizer start anew with tx.init(params)."
        )


def _fitted(
    name: Names, decided: Decided | None, x: Float[Array, "..."], like: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`x` in the shape of `like`: cuts or pads the axis that an argument decides."""
    if x.shape == like.shape:
        return x.astype(like.dtype)
    field, _, axis = decided or ("", "", 0)
    others = [i for i in range(like.ndim) if i != axis % like.ndim]
    if not field or x.ndim != like.ndim or any(x.shape[i] != like.shape[i] for i in others):
        raise ValueError(
            f"{'/'.join(name)} has shape {x.shape} and would have {like.shape}: no change of rank, period or"
            " fraction causes that; give the parameters and the kind of optimizer that the state belongs to."
        )
    size = like.shape[axis]
    kept = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    rest = jax.lax.slice_in_dim(like, kept.shape[axis], size, axis=axis)
    if field != "projectors":
        return jnp.concatenate([kept.astype(like.dtype), jnp.zeros_like(rest)], axis)
    return orthonormalize(jnp.concatenate([kept.astype(like.dtype), rest], axis), _SHIFTED_PASSES)
