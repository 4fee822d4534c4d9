"""LoRA factors: `a` maps all axes of a layer's input to the rank, `b` maps the rank to all output axes."""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

from .leaves import KERNELS, Leaf, Model, Path, Reading, matrix

_SIDES = {"a": "a", "down": "a", "in": "a", "b": "b", "up": "b", "out": "b"}
_MOST_BESIDE = 8  # leaves beside a kernel that may be an adapter of it: bias, factors, their scales
_FACTOR = re.compile(rf"^(?P<stem>.*?)(lora[_.]?)(?P<side>{'|'.join(_SIDES)}|A|B)$")


@functools.lru_cache(maxsize=4096)
def _side(path: Path) -> tuple[str, Path] | None:
    """The side of a factor, "a" or "b", and the path of its pair, which is the path without the side.

    Examples are `w_lora_a`, `lora_a/kernel`, `lora/a`, `lora_down` and `lora_A/default/weight`.
    """
    for depth in range(len(path) - 1, max(len(path) - 4, -1), -1):
        name = path[depth]
        matched = _FACTOR.match(name)
        if matched is not None:
            side, stem = matched["side"].lower(), matched["stem"]
        elif name.lower() in _SIDES and depth and path[depth - 1].lower().endswith("lora"):
            side, stem = name.lower(), ""
        else:
            continue
        return _SIDES[side], (*path[:depth], stem + "lora", *path[depth + 1 :])
    return None


def with_factors(model: Model) -> Model:
    """The model with its factors marked: by name, or by the kernel beside them that their product adds to."""
    found = {leaf.index: side for leaf in model.leaves if (side := _side(leaf.path)) is not None}
    for kernel in model.leaves:
        module = kernel.path[:-1]
        if kernel.name not in KERNELS or len(kernel.shape) < 2:
            continue
        beside = [x for x in model.inside(module) if 0 < len(x.path) - len(module) <= 2 and x is not kernel]
        if len(beside) > _MOST_BESIDE or any(x.index in found for x in beside):
            continue
        pair = next(((a, b) for a in beside for b in beside if _make_up(a, b, kernel)), ())
        found |= {x.index: (side, (*module, "lora")) for side, x in zip("ab", pair, strict=False)}
    leaves = [dataclasses.replace(leaf, factor=found.get(leaf.index)) for leaf in model.leaves]
    return Model(leaves)


def _make_up(a: Leaf, b: Leaf, kernel: Leaf) -> bool:
    """Whether `a b` has the shape of a kernel and a lower rank; a stack of all three has axes in front."""
    if len(a.shape) < 2 or len(b.shape) < 2:
        return False
    rank = a.shape[-1]
    return any(
        kernel.shape == a.shape[:-1] + b.shape[stack + 1 :]
        and a.shape[:stack] == b.shape[:stack]
        and b.shape[stack] == rank < min(math.prod(a.shape[stack:-1]), math.prod(b.shape[stack + 1 :]))
        for stack in range(min(len(a.shape), len(b.shape)) - 1)
    )


def _sides(model: Model) -> dict[tuple[str, Path], Leaf]:
    return {leaf.factor: leaf for leaf in model.leaves if leaf.factor is not None}


def partner(leaf: Leaf, model: Model) -> Leaf | None:
    """The other factor of a leaf's pair."""
    if leaf.factor is None:
        return None
    side, pair = leaf.factor
    return model.once(_sides).get(("ba"[side == "b"], pair))


def factors(leaf: Leaf, model: Model) -> Reading | None:
    """The rank is one side; all other axes are the other side."""
    if leaf.factor is None:
        return None
    other = partner(leaf, model)
    is_a = leaf.factor[0] == "a"
    a, b = (leaf, other) if is_a else (other, leaf)
    free = range(_stack_of(a, b, leaf), len(leaf.shape))
    split = len(free) - 1 if is_a else 1
    reason = "a LoRA factor" if _side(leaf.path) else "a factor by the shape of its kernel"
    return matrix(leaf, free[:split], free[split:], reason)


def alike(readings: Sequence[Reading], model: Model) -> list[Reading]:
    """Give both factors of a pair the same role: if one is not a matrix, the other is not either."""
    others = [partner(leaf, model) for leaf in model.leaves]
    return [
        Reading(None, readings[other.index].kind, f"as its partner: {readings[other.index].reason}")
        if other is not None and readings[other.index].entry is None
        else reading
        for reading, other in zip(readings, others, strict=True)
    ]


def _stack_of(a: Leaf | None, b: Leaf | None, leaf: Leaf) -> int:
    """The number of stack axes that both factors share: the rank ends `a` and follows these axes in `b`."""
    if a is None or b is None:
        return len(leaf.stack)
    counts = range(min(len(a.shape), len(b.shape)) - 1)
    fitting = (s for s in counts if a.shape[:s] == b.shape[:s] and b.shape[s] == a.shape[-1])
    return next(fitting, len(leaf.stack))
