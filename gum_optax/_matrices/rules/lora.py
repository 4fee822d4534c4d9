"""Factors of LoRA: `a` from all axes of a layer's input to the rank, `b` from there to all of its output."""

import functools
import re
from collections.abc import Sequence

from .leaves import Leaf, Model, Path, Reading, matrix

_FACTOR = re.compile(r"^(?P<stem>.*?)(lora[_.]?)(?P<side>[abAB])$")


@functools.lru_cache(maxsize=4096)
def _side(path: Path) -> tuple[str, Path] | None:
    """Whether a leaf is an `a` or a `b`, and the path of the pair, with the side taken out.

    `w_lora_a`, `lora_a/kernel`, `lora/a`, `lora_A/default/weight`.
    """
    for depth in range(len(path) - 1, max(len(path) - 4, -1), -1):
        name = path[depth]
        found = _FACTOR.match(name)
        if found is not None:
            side, stem = found["side"].lower(), found["stem"]
        elif name in ("a", "b", "A", "B") and depth and path[depth - 1].lower().endswith("lora"):
            side, stem = name.lower(), ""
        else:
            continue
        return side, (*path[:depth], stem + "lora", *path[depth + 1 :])
    return None


def is_factor(leaf: Leaf) -> bool:
    """Whether it is one of LoRA's two."""
    return _side(leaf.path) is not None


def _sides(model: Model) -> dict[tuple[str, Path], Leaf]:
    return {found: leaf for leaf in model.leaves if (found := _side(leaf.path)) is not None}


def partner(leaf: Leaf, model: Model) -> Leaf | None:
    """The other factor of its pair."""
    found = _side(leaf.path)
    if found is None:
        return None
    side, pair = found
    return model.once(_sides).get(("ba"[side == "b"], pair))


def factors(leaf: Leaf, model: Model) -> Reading | None:
    """The rank is one side, all other axes are the other."""
    found = _side(leaf.path)
    if found is None:
        return None
    other = partner(leaf, model)
    is_a = found[0] == "a"
    a, b = (leaf, other) if is_a else (other, leaf)
    free = range(_stack_of(a, b, leaf), len(leaf.shape))
    split = len(free) - 1 if is_a else 1
    return matrix(leaf, free[:split], free[split:], "a LoRA factor")


def alike(readings: Sequence[Reading], model: Model) -> list[Reading]:
    """Both factors of a pair go the same way: where one is no matrix, neither is the other."""
    others = [partner(leaf, model) for leaf in model.leaves]
    return [
        Reading(None, readings[other.index].kind, f"as its partner: {readings[other.index].reason}")
        if other is not None and readings[other.index].entry is None
        else reading
        for reading, other in zip(readings, others, strict=True)
    ]


def _stack_of(a: Leaf | None, b: Leaf | None, leaf: Leaf) -> int:
    """How many axes both factors have in front of their own: the rank ends `a` and comes next in `b`."""
    if a is None or b is None:
        return len(leaf.stack)
    ways = range(min(len(a.shape), len(b.shape)) - 1)
    found = (s for s in ways if a.shape[:s] == b.shape[:s] and b.shape[s] == a.shape[-1])
    return next(found, len(leaf.stack))
