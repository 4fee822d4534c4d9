"""Optimizer states in any container: their arrays by name, and whether they are those of a transformation.

A state is a tree of NamedTuples, tuples and dicts. Trainers and checkpoints give it back in other containers:
NamedTuples as dicts or lists, tuples as dicts of "0", "1", ..., arrays in boxes, all of it within a training
state. The names along the way to each array stay the same.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._core.trees import key_name

Names = tuple[str, ...]
Decided = tuple[str, str, int]  # a field of a low-rank state, an argument, the axis that this decides

# The field in which Flax, MaxText, Tunix, Kauldron and others keep the optimizer's state in a training state.
_STATE_FIELD = "opt_state"
# The arguments that decide the shape of a low-rank state's fields, and the axis that each decides.
_ARGUMENTS = {
    "projectors": ("rank", -1),
    "low": ("rank", -2),
    "slots": ("full_rank_fraction", 0),
    "index": ("full_rank_fraction", 0),
}
# Differences that an error lists; of another optimizer's state every array is one.
_LISTED = 8


def array_name(path: tuple[Any, ...]) -> Names:
    """The names along a path to an array, without the `value` of boxes: Orbax restores a box as a dict."""
    names: list[str] = []
    for key in path:
        part = key_name(key)
        names += map(str, part if isinstance(part, tuple) else [part])  # a tuple is a key of a flat dict
    while names and names[-1] == "value":
        names.pop()
    return tuple(names)


def named_arrays(tree: Any) -> dict[Names, Any]:
    """The arrays of a state by their names."""
    return {array_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def low_rank_places(names: Iterable[Names]) -> list[Names]:
    """The names of each `LowRankState`, known by fields that no other state has together."""
    known = set(names)
    signs = ("refreshes", "period", "captured")
    places = dict.fromkeys(name[:-1] for name in known if name[-1:] == ("captured",))
    return sorted(place for place in places if all((*place, sign) in known for sign in signs))


def argument_of(name: Names, places: Iterable[Names]) -> Decided | None:
    """The field of a low-rank state that an array is in, the argument and the axis that it decides."""
    for place in places:
        if name[: len(place)] == place:
            rest = name[len(place) :]
            field = next(iter(rest[1:] if rest[:1] == ("outside",) else rest), "")
            return (field, *_ARGUMENTS[field]) if field in _ARGUMENTS else None
    return None


class Match(NamedTuple):
    """What `match` finds."""

    found: dict[Names, Any]  # arrays of the state, by the names that they have in the transformation's
    rest: dict[Names, str]  # of arrays that have none: their names, and how the container spells them
    positions: dict[Names, Names]  # the transformation's names, and what they are with NamedTuples as tuples


def match(state: Any, like: Any) -> Match:
    """The arrays of a state in any container, by the names that they have in `like`.

    Args:
      state: an optimizer state, or a training state with one in a field `opt_state`.
      like: the state of a transformation, as its `init` makes it: arrays or shapes.

    Raises:
      ValueError: several optimizer states in a training state fit equally well.
    """
    wanted = list(named_arrays(like))
    positions = dict(zip(wanted, named_arrays(_without_fields(like)), strict=True))
    known = {position: name for name, position in positions.items()} | {name: name for name in wanted}
    held = {array_name(path): (path, x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    start = _start(held, known)
    inside = {name[len(start) :]: row for name, row in held.items() if name[: len(start)] == start}
    found = {known[name]: x for name, (_, x) in inside.items() if name in known}
    spelled = {name: jax.tree_util.keystr(path) for name, (path, _) in inside.items()}
    return Match(found, {name: spelled[name] for name in inside if name not in known}, positions)


def _start(held: Iterable[Names], known: Iterable[Names]) -> Names:
    """Where in a training state the optimizer's is; the beginning, where it is one itself."""
    known = set(known)
    fits: dict[Names, int] = {(): sum(name in known for name in held)}
    for name in held:
        for i, part in enumerate(name, 1):
            if part == _STATE_FIELD:
                fits[name[:i]] = fits.get(name[:i], 0) + (name[i:] in known)
    most = max(fits.values())
    best = [start for start, fit in fits.items() if fit == most]
    if len(best) > 1 and most:
        raise ValueError(
            f"this holds several optimizer states, {', '.join(map('/'.join, best))}; give one of them."
        )
    return best[0]


def _without_fields(tree: Any) -> Any:
    """The same tree with tuples in place of NamedTuples: names are then positions."""

    def is_named_tuple(x):
        return isinstance(x, tuple) and hasattr(x, "_fields")

    def plain(x):
        return tuple(map(_without_fields, x)) if is_named_tuple(x) else x

    return jax.tree.map(plain, tree, is_leaf=is_named_tuple)


def differences(matched: Match, like: Any) -> list[str]:
    """What makes a state another than `like`, an entry an array."""
    places = low_rank_places(named_arrays(like))
    entries = [f"{spelled} is no part of this optimizer's" for spelled in matched.rest.values()]
    for path, wanted in jax.tree_util.tree_leaves_with_path(like):
        name, spelled = array_name(path), jax.tree_util.keystr(path)
        if name not in matched.found:
            entries.append(f"{spelled} is missing")
            continue
        (shape, dtype), (like_shape, like_dtype) = type_of(matched.found[name]), type_of(wanted)
        if shape != like_shape:
            decided = argument_of(name, places)
            because = f" (another {decided[1]})" if decided else ""
            entries.append(f"{spelled} has shape {shape} in place of {like_shape}{because}")
        elif dtype != like_dtype:
            entries.append(f"{spelled} has dtype {dtype} in place of {like_dtype}")
    return sorted(entries)


def type_of(x: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of an array, or of what stands for one."""
    known = hasattr(x, "shape") and hasattr(x, "dtype")
    return (tuple(x.shape), x.dtype) if known else (np.shape(x), jnp.result_type(x))


def has_numbers(x: Any) -> bool:
    """Whether it is an array, and not only a shape and a dtype."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | int | float)


def with_clear_errors(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx`, whose `update` tells what is wrong where state, gradients and parameters do not go together.

    It looks closer only when `update` has failed, or has changed the type of its state, so that nothing is
    compiled or traced for it otherwise.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra_args):
        try:
            steps, new = tx.update(updates, state, params, **extra_args)
        except Exception:
            _check_together(tx, updates, state, params)
            raise
        if list(map(type_of, jax.tree.leaves(new))) != list(map(type_of, jax.tree.leaves(state))):
            _check_together(tx, updates, state, params)
        return steps, new

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _check_together(tx: Any, updates: Any, state: Any, params: Any) -> None:
    """Raise an error that names what does not go together, if anything.

    Raises:
      ValueError: gradients and parameters, or the state and either, are not of each other.
    """
    if params is not None:
        mine, its = named_arrays(updates), named_arrays(params)
        if mine.keys() != its.keys():
            apart = sorted("/".join(name) for name in mine.keys() ^ its.keys())
            raise ValueError(
                f"updates and params must be trees of the same leaves, but only one has {_some(apart)}."
            )
    try:
        like = jax.eval_shape(tx.init, updates if params is None else params)
    except Exception:
        return  # what `update` said of them is more to the point
    if type(state) is not type(like):
        raise ValueError(
            f"state must be what this optimizer's init makes, a {type(like).__name__}, got a"
            f" {type(state).__name__}; where that holds its arrays, as a checkpoint restored without a target"
            " does, gum_optax.convert_state(tx, state, params) gives the state."
        )
    found = differences(match(state, like), like)
    if params is None:  # then nobody knows what dtype the state of `others` was made for
        found = [entry for entry in found if "['others']" not in entry or " has dtype " not in entry]
    if found:
        raise ValueError(
            "this state is not one of this optimizer for these gradients: "
            + _some(found)
            + ". Make it by tx.init(params) with the same arguments and leaves; where it was cast to another"
            " dtype, gum_optax.convert_state(tx, state, params) casts it back."
        )


def _some(entries: list[str]) -> str:
    more = len(entries) - _LISTED
    return "; ".join(entries[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
