"""Factors of LoRA: `a` from all axes of a layer's input to the rank, `b` from there to all of its output."""

import re

from .leaves import Leaf, Model, Reading, matrix

_FACTOR = re.compile(r"^(?P<stem>.*?)(lora[_.]?)(?P<side>[abAB])$")


def _side(leaf: Leaf) -> tuple[str, tuple[str, ...]] | None:
    """Whether a leaf is an `a` or a `b`, and what its partner is called with the side taken out.

    `w_lora_a`, `lora_a/kernel`, `lora/a`, `lora_A/default/weight`.
    """
    for depth in range(len(leaf.path) - 1, max(len(leaf.path) - 4, -1), -1):
        name = leaf.path[depth]
        found = _FACTOR.match(name)
        if found is not None:
            side, stem = found["side"].lower(), found["stem"]
        elif name in ("a", "b", "A", "B") and depth and leaf.path[depth - 1].lower().endswith("lora"):
            side, stem = name.lower(), ""
        else:
            continue
        return side, (*leaf.path[:depth], stem + "lora", *leaf.path[depth + 1 :])
    return None


def factors(leaf: Leaf, model: Model) -> Reading | None:
    """Both factors of a pair go the same way."""
    found = _side(leaf)
    if found is None or len(leaf.shape) < 2 or "bias" in leaf.name:
        return None
    side, pair = found
    partner = next(
        (x for x in model.leaves if x.path != leaf.path and _side(x) == ("ba"[side == "b"], pair)), None
    )
    a, b = (leaf, partner) if side == "a" else (partner, leaf)
    stack = _stack_of(a, b, leaf)
    free = range(stack, len(leaf.shape))
    rank = leaf.shape[-1] if side == "a" else leaf.shape[stack]
    if rank == 1:
        return Reading(None, "vector", "a LoRA factor of rank 1")
    if side == "a":
        return matrix(leaf, free[:-1], free[-1:], "a LoRA factor")
    return matrix(leaf, free[:1], free[1:], "a LoRA factor")


def _stack_of(a: Leaf | None, b: Leaf | None, leaf: Leaf) -> int:
    """How many axes both factors have in front of their own: the rank ends `a` and comes next in `b`."""
    if a is None or b is None:
        return len(leaf.stack)
    ways = range(min(len(a.shape), len(b.shape)) - 1)
    return next(
        (s for s in ways if a.shape[:s] == b.shape[:s] and b.shape[s] == a.shape[-1]), len(leaf.stack)
    )
