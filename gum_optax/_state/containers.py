"""Optimizer states in any container: their arrays by name, and whether they fit a transformation.

A state is a tree of NamedTuples, tuples and dicts. Trainers and checkpoints return it in other containers:
NamedTuples as dicts or lists, tuples as dicts of "0", "1", ..., arrays in boxes, and the whole state inside a
training state. The names along the path to each array stay the same.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._core.checks import shown
from .._core.context import NO_CONTEXT
from .._core.trees import key_name
from .._core.turns import Turn

Names = tuple[str, ...]
Decided = tuple[str, str, int]  # a field of a low-rank state, an argument, the axis that it decides

# Flax, MaxText, Tunix, Kauldron and others keep the optimizer state in this field of a training state.
_STATE_FIELD = "opt_state"
# The arguments that decide the shape of a low-rank state's fields, and the axis that each decides.
_ARGUMENTS = {
    "projectors": ("rank", -1),
    "low": ("rank", -2),
    "slots": ("full_rank_fraction", 0),
    "index": ("full_rank_fraction", 0),
}
# How many differences an error lists; in another optimizer's state every array differs.
_LISTED = 8


def array_name(path: tuple[Any, ...]) -> Names:
    """The names along a path to an array, without the final `value`s: Orbax restores a box as a dict."""
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
    """The names of each `LowRankState`, identified by three fields that no other state combines."""
    known = set(names)
    signs = ("refreshes", "period", "captured")
    places = dict.fromkeys(name[:-1] for name in known if name[-1:] == ("captured",))
    return sorted(place for place in places if all((*place, sign) in known for sign in signs))


def argument_of(name: Names, places: Iterable[Names]) -> Decided | None:
    """The field of a low-rank state that holds an array, the argument for it, and the axis it decides."""
    for place in places:
        if name[: len(place)] == place:
            rest = name[len(place) :]
            field = next(iter(rest[1:] if rest[:1] == ("outside",) else rest), "")
            return (field, *_ARGUMENTS[field]) if field in _ARGUMENTS else None
    return None


class Match(NamedTuple):
    """The result of `match`."""

    found: dict[Names, Any]  # arrays of the state, by their names in the transformation's state
    rest: dict[Names, str]  # names of all other arrays, and their paths as the container spells them
    positions: dict[Names, Names]  # the transformation's names, and the same names with NamedTuples as tuples


def match(state: Any, like: Any) -> Match:
    """The arrays of a state in any container, by their names in `like`.

    Args:
      state: an optimizer state, or a training state with one in a field `opt_state`.
      like: the state of a transformation from its `init`: arrays or shapes.

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
    """The path of the optimizer state in a training state; empty if `held` is itself an optimizer state."""
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
    """The same tree with tuples in place of NamedTuples, so that positions replace names."""

    def is_named_tuple(x):
        return isinstance(x, tuple) and hasattr(x, "_fields")

    def plain(x):
        return tuple(map(_without_fields, x)) if is_named_tuple(x) else x

    return jax.tree.map(plain, tree, is_leaf=is_named_tuple)


def differences(matched: Match, like: Any) -> list[str]:
    """The differences of a state from `like`, one entry per array."""
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
    """Shape and dtype of an array, a shape or a number."""
    known = hasattr(x, "shape") and hasattr(x, "dtype")
    return (tuple(x.shape), x.dtype) if known else (np.shape(x), jnp.result_type(x))


def has_numbers(x: Any) -> bool:
    """Whether `x` holds numbers, and not only a shape and a dtype."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | int | float)


def with_clear_errors(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with an `update` that explains mismatched state, gradients and parameters.

    It checks them only if gradients and parameters have different shapes, or after `update` fails or changes
    the type of its state, so it compiles and traces nothing otherwise.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra_args):
        in_turn = isinstance(extra_args.get("context", NO_CONTEXT).turn, Turn)
        if params is not None and not in_turn:
            _check_shapes(updates, params)
        # A turn has parts of the state.
        with contextlib.nullcontext() if in_turn else clear_errors(tx, updates, state, params):
            steps, new = tx.update(updates, state, params, **extra_args)
        if list(map(type_of, jax.tree.leaves(new))) != list(map(type_of, jax.tree.leaves(state))):
            _check_together(tx, updates, state, params)
        return steps, new

    return optax.GradientTransformationExtraArgs(tx.init, update)


@contextlib.contextmanager
def clear_errors(
    tx: optax.GradientTransformation,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
) -> Iterator[None]:
    """Explain mismatched state, gradients and parameters, if what runs within fails."""
    try:
        yield
    except Exception:
        _check_together(tx, updates, state, params)
        raise


def _check_shapes(updates: optax.Updates, params: optax.Params) -> None:
    """Refuse a gradient of another shape than its parameter: a transposed one would make a step."""
    leaves = jax.tree.leaves(updates), jax.tree.leaves(params)
    if len(leaves[0]) != len(leaves[1]) or all(
        np.shape(g) == np.shape(p) for g, p in zip(*leaves, strict=True)
    ):
        return
    shapes = {name: np.shape(p) for name, p in named_arrays(params).items()}
    entries = [
        f"{'/'.join(name)} has shape {np.shape(g)} in place of {shapes[name]}"
        for name, g in named_arrays(updates).items()
        if np.shape(g) != shapes.get(name, np.shape(g))
    ]
    if entries:
        raise ValueError(
            f"updates must have the shapes of params, but {listed(entries)}; pass update(gradients, state,"
            " params) the gradients of these parameters."
        )


def _check_together(
    tx: optax.GradientTransformation,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
) -> None:
    """Raise an error that names mismatched leaves, if there are any.

    Raises:
      ValueError: gradients and parameters do not match, or the state matches neither.
    """
    if params is not None:
        of_updates, of_params = named_arrays(updates).keys(), named_arrays(params).keys()
        if of_updates != of_params:
            alone = (("updates", of_updates - of_params), ("params", of_params - of_updates))
            found = [
                f"only {tree} has {listed(sorted(map('/'.join, names)))}" for tree, names in alone if names
            ]
            raise ValueError(
                f"updates and params must be trees of the same leaves, but {', and '.join(found)}; the order"
                " of the arguments is update(gradients, state, params)."
            )
    try:
        like = jax.eval_shape(tx.init, updates if params is None else params)
    except Exception:
        return  # the error of `update` itself is clearer
    if type(state) is not type(like):
        raise ValueError(
            f"state must be what this optimizer's init makes, a {type(like).__name__}, got a"
            f" {type(state).__name__}; if that holds its arrays, as a checkpoint restored without a target"
            " does, gum_optax.convert_state(tx, state, params) gives the state."
        )
    entries = differences(match(state, like), like)
    if params is None:  # then the dtype of the parameters of `others`, and of their state, is unknown
        entries = [entry for entry in entries if "['others']" not in entry or " has dtype " not in entry]
    if entries:
        raise ValueError(
            "this state is not one of this optimizer for these gradients: "
            + listed(entries)
            + ". Make it by tx.init(params) with the same arguments and leaves; if it was cast to another"
            " dtype, gum_optax.convert_state(tx, state, params) casts it back."
        )


def check_holds(state: Any, like: Any) -> None:
    """Refuse a state without arrays, such as the `None` of a missing entry of a checkpoint."""
    if jax.tree.leaves(like) and not jax.tree.leaves(state):
        raise ValueError(
            f"state holds no array, got {shown(state)}; pass the optimizer state of the checkpoint, or start"
            " anew with tx.init(params)."
        )


def listed(entries: list[str]) -> str:
    """The first entries, and how many more there are, so that a message can be read."""
    more = len(entries) - _LISTED
    return "; ".join(entries[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
