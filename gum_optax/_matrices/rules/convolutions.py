"""Convolutions: the fan-in of an output channel is the whole window times all input channels.

Flax, Haiku          (*window, in, out)      the matrix (window · in, out)
Equinox, PyTorch     (out, in, *window)      the matrix (out, in · window)
"""

import itertools

from .leaves import Leaf, Model, Reading, matrix, words

_LARGEST_FILTER = 8  # the longest window of depthwise convolutions over time; Mamba and Griffin have 4
_LARGEST_WINDOW = 32  # the largest patches of vision transformers; longer axes are features
_CONVOLUTION = frozenset({"conv", "convs", "convolution", "stem", "downsample", "upsample", "patchify"})
_POINTWISE = frozenset({"pointwise", "proj", "projection"})
# Kernels with three or more axes and such names are no convolutions.
_STACKS = frozenset({"expert", "experts", "moe", "layers", "blocks"})


def _is_by_name(leaf: Leaf) -> bool:
    named = {word for name in leaf.path for word in words(name)}
    return any(word in _CONVOLUTION or word.startswith("conv") for word in named)


def convolutions(leaf: Leaf, model: Model) -> Reading | None:
    """Reads a convolution by name; the small axes are the window."""
    del model
    window = len(leaf.block) - 2
    if window == 0 and _is_filter(leaf):
        return Reading(None, "depthwise convolution", "a window for each channel")
    if not 1 <= window <= 3 or not _is_by_name(leaf):
        return None
    is_front, is_back = (max(sizes) <= _LARGEST_WINDOW for sizes in (leaf.block[:window], leaf.block[2:]))
    if not is_front and not is_back:
        return None
    # If both ends are small, the name decides: PyTorch's kernels are called `weight`.
    out_first = is_back and (not is_front or leaf.name == "weight")
    return _read(leaf, "a convolution by name", out_first=out_first)


def _is_filter(leaf: Leaf) -> bool:
    """Whether a leaf `(window, channels)` is a depthwise convolution without the axis of its one input."""
    named = {word for name in leaf.path[-2:] for word in words(name)}
    is_named = any(word.startswith("conv") for word in named) and _POINTWISE.isdisjoint(named)
    small, large = sorted(leaf.block)
    return is_named and small <= _LARGEST_FILTER and large >= 8 * small


def _mentions_a_stack(leaf: Leaf) -> bool:
    """Whether a name means a stack: one that a number follows means a list."""
    rows = itertools.pairwise((*leaf.path, ""))
    return any(not _STACKS.isdisjoint(words(name)) and not inner.isdigit() for name, inner in rows)


def square_windows(leaf: Leaf, model: Model) -> Reading | None:
    """Reads a convolution by a square window of two or three axes, if no name mentions a stack."""
    del model
    window = len(leaf.block) - 2
    if not 2 <= window <= 3 or _mentions_a_stack(leaf):
        return None
    front, back = set(leaf.block[:window]), set(leaf.block[2:])
    if len(front) == 1 and max(front) <= _LARGEST_WINDOW:
        return _read(leaf, "a square window in front", out_first=False)
    if len(back) == 1 and max(back) <= min(_LARGEST_WINDOW, *leaf.block[:2]):
        return _read(leaf, "a square window at the end", out_first=True)
    return None


def _read(leaf: Leaf, reason: str, *, out_first: bool) -> Reading:
    *window, inputs, output = (*leaf.free[2:], *leaf.free[1::-1]) if out_first else leaf.free
    if leaf.shape[inputs] == 1:
        return Reading(None, "depthwise convolution", "one input channel a group")
    window = [] if all(leaf.shape[axis] == 1 for axis in window) else window
    reduction = (inputs, *window) if out_first else (*window, inputs)
    return matrix(leaf, reduction, (output,), reason)
