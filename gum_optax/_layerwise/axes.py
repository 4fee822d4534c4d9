"""Where an axis of an operand is in the result of an operation of JAX that works on each row alone."""

import math
from collections.abc import Callable, Sequence
from typing import Any

Shape = Sequence[int]

# Operations on each number by itself.
_NAMES = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp complex
    conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
    igamma imag integer_pow is_finite layout_constraint le lgamma log log1p logistic lt max min mul ne neg
    nextafter not or population_count pow real reduce_precision rem round rsqrt select_n sharding_constraint
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
    xor
"""
ELEMENTWISE = frozenset(_NAMES.split())


def _bits(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    return axes[0] if len(out) >= len(shapes[0]) else None


def _one(axes: Sequence[int | None]) -> int | None:
    """The axis of the only operand that has one."""
    known = [axis for axis in axes if axis is not None]
    return known[0] if len(known) == 1 else None


def _broadcast(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    return p["broadcast_dimensions"][axes[0]]


def _transpose(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    return list(p["permutation"]).index(axes[0])


def _reshape(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    (axis, shape), before = (axes[0], shapes[0]), math.prod(shapes[0][: axes[0]])
    kept = [i for i, size in enumerate(out) if size == shape[axis] and math.prod(out[:i]) == before]
    return kept[0] if kept else None


def _squeeze(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    return _without(p["dimensions"], axes[0])


def _reduce(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    return _without(p["axes"], axes[0])


def _without(gone: Sequence[int], axis: int) -> int | None:
    return None if axis in gone else axis - sum(x < axis for x in gone)


def _along(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    return None if p["axis"] == axes[0] else axes[0]


def _sorted(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    return None if p["dimension"] in axes or len(set(axes)) > 1 else axes[0]


def _concatenated(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    known = {axis for axis in axes if axis is not None}
    return known.pop() if len(known) == 1 and p["dimension"] not in known else None


def _sliced(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    strides = p["strides"]
    is_whole = out[axes[0]] == shapes[0][axes[0]] and (strides is None or strides[axes[0]] == 1)
    return axes[0] if is_whole else None


def _dynamically_sliced(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    axis = _one(axes)
    return axis if axis is not None and axes[0] == axis and out[axis] == shapes[0][axis] else None


def _padded(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    axis = _one(axes)
    return (
        axis
        if axis is not None and axes[0] == axis and tuple(p["padding_config"][axis]) == (0, 0, 0)
        else None
    )


def _product(p: Any, axes: Any, shapes: Any, out: Shape) -> int | None:
    contracted, batched = p["dimension_numbers"]
    known = [(side, axis) for side, axis in enumerate(axes) if axis is not None]
    if any(axis in contracted[side] for side, axis in known):
        return None
    places = {_in_product(contracted, batched, shapes, side, axis) for side, axis in known}
    return places.pop() if len(places) == 1 and (len(known) == 1 or known[0][1] in batched[0]) else None


def _in_product(contracted: Any, batched: Any, shapes: Any, side: int, axis: int) -> int:
    """The place of an axis in a product: batch axes, free axes of the left, free axes of the right."""
    if axis in batched[side]:
        return list(batched[side]).index(axis)
    free = [[i for i in range(len(shapes[k])) if i not in (*contracted[k], *batched[k])] for k in (0, 1)]
    return len(batched[0]) + (len(free[0]) if side else 0) + free[side].index(axis)


AXIS_RULES: dict[str, Callable[..., int | None]] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "concatenate": _concatenated,
    "slice": _sliced,
    "dynamic_slice": _dynamically_sliced,
    "pad": _padded,
    "dot_general": _product,
    "sort": _sorted,
    "bitcast_convert_type": _bits,
}
AXIS_RULES |= dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along)
AXIS_RULES |= {
    f"reduce_{name}": _reduce for name in ("sum", "max", "min", "prod", "and", "or", "xor")
} | dict.fromkeys(("argmax", "argmin"), _reduce)
