"""Which axes of a leaf count layers or experts, told from the leaves around it where no name says it.

A norm's scale or a bias has one axis. Where it has two, and all leaves of a module have one size in common
along the first of them (or the second, where MaxText's scan puts the layers), that axis counts layers.
"""

import dataclasses
from collections.abc import Sequence

from .axes import stack_by_names
from .kinds import is_norm, is_vector
from .leaves import Leaf, Model, Path, words
from .lora import is_factor

# A module of such a name holds scanned layers, unless its children are numbered.
_STACKS = frozenset({"layers", "blocks", "stack", "stacked", "scan", "experts", "h"})


def with_stacks(model: Model) -> Model:
    """The model, each leaf with the axes of its stack as far as they are known."""
    stacks = {leaf.index: leaf.stack or stack_by_names(leaf.axes) for leaf in model.leaves}
    for module in model.modules():
        inside = [leaf for leaf in model.inside(module) if not leaf.axes and not is_factor(leaf)]
        while (found := _common(module, inside, stacks)) is not None:
            for leaf in inside:
                free = _free(leaf, stacks[leaf.index])
                stacks[leaf.index] = tuple(sorted((*stacks[leaf.index], free[found])))
    leaves = [dataclasses.replace(leaf, stack=stacks[leaf.index]) for leaf in model.leaves]
    return Model(leaves, model.hidden)


def _free(leaf: Leaf, stack: tuple[int, ...]) -> list[int]:
    return [axis for axis in range(len(leaf.shape)) if axis not in stack]


def _common(module: Path, inside: Sequence[Leaf], stacks: dict[int, tuple[int, ...]]) -> int | None:
    """The axis of all blocks in a module that counts layers, None where there is none."""
    blocks = {
        leaf.index: tuple(leaf.shape[axis] for axis in _free(leaf, stacks[leaf.index])) for leaf in inside
    }
    depth = min(map(len, blocks.values()), default=0)
    if len(blocks) < 2 or depth < 2 or max(map(len, blocks.values())) < 3:
        return None
    has_norms = any(map(is_norm, inside))
    in_front = has_norms or any(map(is_vector, inside)) or (bool(module) and _names_a_stack(module))
    for axis, is_told in enumerate((in_front, has_norms)):
        if is_told and len({block[axis] for block in blocks.values()}) == 1:
            return axis
    return None


def _names_a_stack(module: Path) -> bool:
    return words(module[-1])[-1:] != () and words(module[-1])[-1] in _STACKS and not module[-1][-1:].isdigit()
