"""LoRA factors: `a` maps all axes of a layer's input to the rank, `b` maps the rank to all output axes."""

import functools
import re
from collections.abc import Sequence

from .leaves import Leaf, Model, Path, Reading, matrix

_FACTOR = re.compile(r"^(?P<stem>.*?)(lora[_.]?)(?P<side>[abAB])$")


@functools.lru_cache(maxsize=4096)
def _side(path: Path) -> tuple[str, Path] | None:
    """The side of a factor, "a" or "b", and the path of its pair, which is the path without the side.

    Examples are `w_lora_a`, `lora_a/kernel`, `lora/a` and `lora_A/default/weight`.
    """
    for depth in range(len(path) - 1, max(len(path) - 4, -1), -1):
        name = path[depth]
        matched = _FACTOR.match(name)
        if matched is not None:
            side, stem = matched["side"].lower(), matched["stem"]
        elif name in ("a", "b", "A", "B") and depth and path[depth - 1].lower().endswith("lora"):
            side, stem = name.lower(), ""
        else:
            continue
        return side, (*path[:depth], stem + "lora", *path[depth + 1 :])
    return None


def is_factor(leaf: Leaf) -> bool:
    """Whether a leaf is a LoRA factor."""
    return _side(leaf.path) is not None


def _sides(model: Model) -> dict[tuple[str, Path], Leaf]:
    return {side: leaf for leaf in model.leaves if (side := _side(leaf.path)) is not None}


def partner(leaf: Leaf, model: Model) -> Leaf | None:
    """The other factor of a leaf's pair."""
    side_and_pair = _side(leaf.path)
    if side_and_pair is None:
        return None
    side, pair = side_and_pair
    return model.once(_sides).get(("ba"[side == "b"], pair))


def factors(leaf: Leaf, model: Model) -> Reading | None:
    """The rank is one side; all other axes are the other side."""
    side_and_pair = _side(leaf.path)
    if side_and_pair is None:
        return None
    other = partner(leaf, model)
    is_a = side_and_pair[0] == "a"
    a, b = (leaf, other) if is_a else (other, leaf)
    free = range(_stack_of(a, b, leaf), len(leaf.shape))
    split = len(free) - 1 if is_a else 1
    return matrix(leaf, free[:split], free[split:], "a LoRA factor")


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
