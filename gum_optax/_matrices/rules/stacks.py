"""Finds the axes of a leaf that count layers or experts, by the neighbours of the leaf if no name tells.

The scale of a norm or a bias has one axis. If it has two axes, and all leaves of a module share the size of
the first (or of the second, where MaxText's scan puts the layers), then that axis counts layers.
"""

import dataclasses
from collections.abc import Sequence

from .axes import stack_by_names
from .kinds import is_norm, is_vector
from .leaves import KERNELS, Leaf, Model, Path, words

# A module with such a name holds scanned layers, unless it is a list of layers or the name ends in a number.
_STACKS = frozenset({"layers", "blocks", "stack", "stacked", "scan", "experts", "h"})


def with_stacks(model: Model) -> Model:
    """The model with the stack axes of each leaf, as far as known."""
    stacks = {leaf.index: leaf.stack or stack_by_names(leaf.axes) for leaf in model.leaves}
    for module in model.modules():
        inside = [leaf for leaf in model.inside(module) if not leaf.axes and leaf.factor is None]
        while (axis := _common(module, inside, stacks)) is not None:
            for leaf in inside:
                free = _free(leaf, stacks[leaf.index])
                stacks[leaf.index] = tuple(sorted((*stacks[leaf.index], free[axis])))
    leaves = [dataclasses.replace(leaf, stack=stacks[leaf.index]) for leaf in model.leaves]
    return Model(leaves)


def _free(leaf: Leaf, stack: tuple[int, ...]) -> list[int]:
    return [axis for axis in range(len(leaf.shape)) if axis not in stack]


def _block(leaf: Leaf, stack: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a block, without the axes of size 1 that Equinox gives the bias of a convolution."""
    shape = [leaf.shape[axis] for axis in _free(leaf, stack)]
    while is_vector(leaf) and len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _common(module: Path, inside: Sequence[Leaf], stacks: dict[int, tuple[int, ...]]) -> int | None:
    """The axis of all blocks in a module that counts layers, or None."""
    blocks = {leaf.index: _block(leaf, stacks[leaf.index]) for leaf in inside}
    depth = min(map(len, blocks.values()), default=0)
    if len(blocks) < 2 or depth < 2 or max(map(len, blocks.values())) < 3:
        return None
    flat = [leaf for leaf in inside if len(blocks[leaf.index]) == 2]
    if any(leaf.name in KERNELS and not is_vector(leaf) for leaf in flat):
        return None  # a matrix that is in no stack
    has_norms = any(map(is_norm, inside)) and all(map(is_vector, flat))
    is_list = all("".join(leaf.path[len(module) :][:1]).isdigit() for leaf in inside)
    in_front = any(map(is_vector, inside)) or (bool(module) and _names_a_stack(module) and not is_list)
    for axis, is_plausible in enumerate((in_front, has_norms)):
        if is_plausible and len({block[axis] for block in blocks.values()}) == 1:
            return axis
    return None


def _names_a_stack(module: Path) -> bool:
    return words(module[-1])[-1:] != () and words(module[-1])[-1] in _STACKS and not module[-1][-1:].isdigit()
