"""Reads axis names. They have priority over shapes and paths: they are the model's own names for its axes."""

from .leaves import Leaf, Model, Reading, matrix, words

# Words for an axis of layers, experts or groups in MaxText, Levanter, Haliax and Flax's examples.
_EXPERTS = frozenset({"expert", "experts", "exp"})
_STACK = frozenset(
    {"layer", "layers", "block", "blocks", "stage", "stages", "repeat", "repeats", "stack", "scan", "depth"}
    | {"group", "groups"}
    | _EXPERTS
)
_HEADS = frozenset({"head", "heads"})
# MaxText calls the size of a head `kv`, and the axis of queries, keys and values `qkv`; Penzai has
# `projection`.
_OF_HEADS = frozenset({"kv", "qkv", "projection"})
_VOCABULARY = frozenset({"vocab", "vocabulary"})


def _is_stack(name: str | None) -> bool:
    return name is not None and not _STACK.isdisjoint(words(name)) and not _is_heads(name)


def _is_heads(name: str | None) -> bool:
    return name is not None and (name.lower() in _OF_HEADS or not _HEADS.isdisjoint(words(name)))


def _counts_experts(name: str | None) -> bool:
    return name is not None and not _EXPERTS.isdisjoint(words(name))


def has_experts_as_features(leaf: Leaf) -> bool:
    """Whether one side of the leaf's matrix is the experts, as in a router."""
    return bool(leaf.axes) and any(_counts_experts(leaf.axes[axis]) for axis in leaf.free)


def stack_by_names(axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """The axes whose names tell that they count layers or experts; in a router, experts are the output."""
    stack = [i for i, name in enumerate(axes) if _is_stack(name)]
    if len(axes) - len(stack) == 1:
        stack = [i for i in stack if not _counts_experts(axes[i])]
    return tuple(stack)


def vocabulary_or_norm(leaf: Leaf, model: Model) -> Reading | None:
    """A table or a head has an axis for the vocabulary; a norm has an axis name of its own in MaxText."""
    del model
    named = {word for name in leaf.axes if name is not None for word in words(name)}
    if not _VOCABULARY.isdisjoint(named):
        first = next(
            i for i, name in enumerate(leaf.axes) if name and not _VOCABULARY.isdisjoint(words(name))
        )
        return Reading(None, "embedding" if first == leaf.free[0] else "head", "an axis of the vocabulary")
    return Reading(None, "vector", "axis names: a norm") if "norm" in named else None


def by_axis_names(leaf: Leaf, model: Model) -> Reading | None:
    """Heads and the size of a head are one side; the remaining axes are the other side."""
    del model
    if not any(_is_stack(name) or _is_heads(name) for name in leaf.axes):
        return None  # the names are only of mesh axes or features
    free = leaf.free
    if len(free) == 2:
        return matrix(leaf, free[:1], free[1:], "axis names")
    heads = [axis for axis in free if _is_heads(leaf.axes[axis])]
    rest = [axis for axis in free if axis not in heads]
    if not heads or not rest or heads not in (list(free[: len(heads)]), list(free[-len(heads) :])):
        return None
    sides = (heads, rest) if heads[0] == free[0] else (rest, heads)
    return matrix(leaf, *sides, "axis names")
