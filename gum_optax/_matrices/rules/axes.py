"""Reads axis names. They have priority over shapes and paths: they are the model's own names for its axes."""

from collections.abc import Sequence

from .kinds import is_head
from .leaves import Leaf, Model, Reading, matrix, words

# Words for an axis of layers, experts or groups in MaxText, Levanter, Haliax and Flax's examples.
_EXPERTS = frozenset({"expert", "experts", "exp"})
_STACK = frozenset(
    {"layer", "layers", "block", "blocks", "stage", "stages", "repeat", "repeats", "stack", "scan"}
    | {"group", "groups"}
    | _EXPERTS
)
_HEADS = frozenset({"head", "heads"})
# MaxText calls the size of a head `kv`, and the axis of queries, keys and values `qkv`; Penzai has
# `projection`.
_OF_HEADS = frozenset({"kv", "qkv", "projection"})
_VOCABULARY = frozenset({"vocab", "vocabulary"})


def _counts(name: str | None, what: frozenset[str]) -> bool:
    """Whether an axis counts something: `decoder_layers` does, `expert_mlp` and `block_size` do not."""
    own = [word for word in words(name or "") if word != "axis"]
    return own[-1:] != [] and own[-1] in what and "no" not in own


def _is_stack(name: str | None) -> bool:
    return _counts(name, _STACK) and not _is_heads(name)


def _is_heads(name: str | None) -> bool:
    return name is not None and (name.lower() in _OF_HEADS or not _HEADS.isdisjoint(words(name)))


def has_experts_as_features(leaf: Leaf) -> bool:
    """Whether one side of the leaf's matrix is the experts, as in a router."""
    return bool(leaf.axes) and any(_counts(leaf.axes[axis], _EXPERTS) for axis in leaf.free)


def stack_by_names(axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """The axes whose names tell that they count layers or experts; in a router, experts are the output."""
    stack = [i for i, name in enumerate(axes) if _is_stack(name)]
    if len(axes) - len(stack) == 1:
        stack = [i for i in stack if not _counts(axes[i], _EXPERTS)]
    return tuple(stack)


def vocabulary_comes_first(leaf: Leaf) -> bool:
    """Whether the first axis of a block is that of the vocabulary, as in a table."""
    return bool(leaf.axes) and not _VOCABULARY.isdisjoint(words(leaf.axes[leaf.free[0]] or ""))


def vocabulary_or_norm(leaf: Leaf, model: Model) -> Reading | None:
    """A table or a head has an axis for the vocabulary; a norm has an axis name of its own in MaxText."""
    del model
    named = {word for name in leaf.axes if name is not None for word in words(name)}
    if not _VOCABULARY.isdisjoint(named):
        is_table = vocabulary_comes_first(leaf) and not any(map(is_head, leaf.path[-2:]))
        return Reading(None, "embedding" if is_table else "head", "an axis of the vocabulary")
    return Reading(None, "vector", "axis names: a norm") if "norm" in named else None


def by_axis_names(leaf: Leaf, model: Model) -> Reading | None:
    """Heads, the size of a head and what is between them are one side; the other axes are the other side."""
    del model
    if not any(_is_stack(name) or _is_heads(name) for name in leaf.axes):
        return None  # the names are only of mesh axes or features
    free = leaf.free
    if len(free) == 2:
        return matrix(leaf, free[:1], free[1:], "axis names")
    heads = [i for i, axis in enumerate(free) if _is_heads(leaf.axes[axis])]
    if not heads or len(heads) == len(free):
        return None
    is_first, is_last = heads[0] == 0, heads[-1] == len(free) - 1
    if is_first and is_last:  # (heads, embed, head_dim)
        sides = [axis for i, axis in enumerate(free) if i not in heads], [free[i] for i in heads]
    elif len(heads) == 1 and is_first and len(free) == 3:
        sides = _beside_heads(leaf)
    elif is_first:  # an output; what follows a lone axis of heads is the size of a head
        end = heads[-1] + 1 if len(heads) > 1 else len(free) - 1
        sides = free[:end], free[end:]
    else:
        sides = free[: heads[0]], free[heads[0] :]
    return matrix(leaf, *sides, "axis names")


def _beside_heads(leaf: Leaf) -> tuple[Sequence[int], Sequence[int]]:
    """The sides of `(heads, a, b)` without a name for the size of a head, at most half of the width.

    Square blocks, as of a block-diagonal matrix, are a matrix for each head.
    """
    (heads, first, last), (_, a, b) = leaf.free, leaf.block
    if 2 * a <= b:
        return (heads, first), (last,)
    return (first,), ((heads, last) if 2 * b <= a else (last,))
