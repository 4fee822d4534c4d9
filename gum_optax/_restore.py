"""State that comes from a checkpoint: whether it is this optimizer's, and how it becomes another's."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ._checks import check_rule
from ._dimensions import unboxed
from ._low_rank import LowRankState
from ._report import states_of
from ._subspace import orthonormalize

# The arguments that decide the shape of a state's fields, and the axis that each decides.
_ARGUMENTS = {
    "projectors": ("rank", -1),
    "low": ("rank", -2),
    "slots": ("full_rank_fraction", 0),
    "index": ("full_rank_fraction", 0),
}
# Against rounding that adds up: new columns may be nearly in the span of the old ones.
_SHIFTED_PASSES = 3


def _field(path: Any) -> str:
    """The field of the low-rank state that a leaf is in."""
    return next((key.name for key in reversed(path) if getattr(key, "name", None) in _ARGUMENTS), "")


def _by_path(state: Any) -> dict[Any, Any]:
    """Its arrays, alike for a state of Flax NNX, whose arrays are in variables, and a pure one."""
    return {unboxed(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}


def _low_rank_states(state: Any) -> list[LowRankState]:
    return [x for x in states_of(state) if isinstance(x, LowRankState)]


def _periods(tx: optax.GradientTransformation, params: Any) -> list[int]:
    """Of the rules in `tx`; compiled, so that no other state is made."""
    found = jax.jit(lambda params: [x.period for x in _low_rank_states(tx.init(params))])(params)
    return [int(period) for period in found]


def check_state(tx: optax.GradientTransformation, state: Any, params: Any) -> None:
    """Compare a state with what `tx` would have: call it once after a restore.

    A state of another rank or fraction has other shapes, and one of another period would go on with momenta
    of blocks that are no longer the drawn ones; the step would be wrong without a word.

    Args:
      tx: any optax transformation.
      state: as restored, arrays or shapes.
      params: the parameters, arrays or shapes.

    Raises:
      ValueError: it is of another optimizer, another version of this library, or of one with another `rank`,
        `full_rank_fraction`, `period` or `momentum_dtype`; the message names each difference.
    """
    check_rule("tx", tx)
    held = _by_path(state)
    wanted = _by_path(jax.eval_shape(tx.init, params))
    name = jax.tree_util.keystr
    found = [f"{name(path)} is missing" for path in wanted if path not in held]
    found += [f"{name(path)} is no part of this optimizer's" for path in held if path not in wanted]
    for path in wanted.keys() & held.keys():
        x, like = held[path], wanted[path]
        if jnp.shape(x) != like.shape:
            because = f" (another {_ARGUMENTS[_field(path)][0]})" if _field(path) else ""
            found.append(f"{name(path)} has shape {jnp.shape(x)} in place of {like.shape}{because}")
        elif jnp.result_type(x) != like.dtype:
            found.append(f"{name(path)} has dtype {jnp.result_type(x)} in place of {like.dtype}")
    pairs = [] if found else zip(_low_rank_states(state), _periods(tx, params), strict=True)
    periods = [(int(jnp.asarray(x.period)), period) for x, period in pairs]
    found += [f"period is {its} in place of {period}" for its, period in periods if its != period]
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
    now, or the other way round, start anew.

    Args:
      tx: the new optimizer.
      state: of the old one, before a step that begins a period; arrays.
      params: the parameters.

    Raises:
      ValueError: the state is within a period, or is not of the same kind of optimizer and parameters.
    """
    check_rule("tx", tx)
    for node in _low_rank_states(state):
        period = int(jnp.asarray(node.period))
        if into := int(jnp.asarray(node.count)) % period:
            raise ValueError(
                f"a state is converted at the beginning of a period, but {into} of {period} steps of this one"
                f" are taken: take {period - into} more, or go back to an earlier checkpoint."
            )
    old = _by_path(state)

    def converted(path, new):
        path = unboxed(path)
        names = [getattr(key, "name", None) for key in path]
        # The draw of the new period is made anew, with the new arguments.
        if path not in old or names[-1] == "period" or "index" in names:
            return new
        return _fitted(path, jnp.asarray(old[path]), new)

    new = tx.init(params)
    lost = [path for path in old.keys() - _by_path(new).keys() if not _may_go(path)]
    if lost:
        raise ValueError(
            "this state is not of the same kind of optimizer and parameters: the new one has no"
            f" {', '.join(sorted(map(jax.tree_util.keystr, lost)))}."
        )
    return jax.tree_util.tree_map_with_path(converted, new)


def _may_go(path: Any) -> bool:
    """Whether a leaf is of what starts anew: a matrix that is no longer projected, a group's slots."""
    return any(getattr(key, "name", None) in (*_ARGUMENTS, "full", "outside") for key in path)


def _fitted(path: Any, x: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` in the shape of `like`: the axis that an argument decides is cut, or filled up."""
    if x.shape == like.shape:
        return x.astype(like.dtype)
    field = _field(path)
    _, axis = _ARGUMENTS.get(field, ("", 0))
    others = [i for i in range(like.ndim) if i != axis % like.ndim]
    if not field or x.ndim != like.ndim or any(x.shape[i] != like.shape[i] for i in others):
        raise ValueError(
            f"{jax.tree_util.keystr(path)} has shape {x.shape} and would have {like.shape}: no change of"
            " rank, period or fraction does that; give its own parameters and kind of optimizer."
        )
    size = like.shape[axis]
    kept = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    rest = jax.lax.slice_in_dim(like, kept.shape[axis], size, axis=axis)
    if field != "projectors":
        return jnp.concatenate([kept.astype(like.dtype), jnp.zeros_like(rest)], axis)
    return orthonormalize(jnp.concatenate([kept, rest], axis), _SHIFTED_PASSES)
