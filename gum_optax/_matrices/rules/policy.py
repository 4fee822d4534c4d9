"""The policy: a list of rules decides which leaf is which matrix, and the first rule that applies wins."""

import math
import re
from collections.abc import Sequence
from typing import Any

from ..dimension_numbers import LAST_TWO, OUT_IN
from .attention import beside_its_bias, beside_its_other_side, by_name_and_size, einsums
from .axes import by_axis_names, has_experts_as_features, vocabulary_comes_first, vocabulary_or_norm
from .convolutions import convolutions, square_windows
from .kinds import (
    heads,
    is_router,
    last_of_a_compact_model,
    of_a_stack,
    sized_as_the_vocabulary,
    tables,
    tokens,
    vectors,
)
from .leaves import Leaf, Model, Reading, Rule, last_two, leaves_of
from .lora import alike, factors, with_factors
from .modules import layers
from .stacks import with_stacks

# A side of so many numbers, more than eight times the other, may be a vocabulary: tokenizers of language
# models have more entries, and MLPs are at most eight times as wide as the model (Gemma 2B).
_SHORTEST_VOCABULARY = 8192


def _nothing(leaf: Leaf, model: Model) -> Reading | None:
    """Scalars, vectors and empty leaves are not matrices."""
    del model
    if len(leaf.shape) < 2 or 0 in leaf.shape:
        return Reading(None, "vector", "fewer than two axes" if 0 not in leaf.shape else "empty")
    return None


def _otherwise(leaf: Leaf, model: Model) -> Reading:
    """The last two axes; outside of the layers, a side as long as a vocabulary makes that doubtful."""
    del model
    reading = last_two(leaf, "the last two axes")
    is_outside = len(leaf.shape) == 2 and not re.search(r"\d", "/".join(leaf.path))
    small, large = sorted(leaf.block)[-2:]
    if is_outside and large >= _SHORTEST_VOCABULARY and large > 8 * small:
        return reading._replace(doubt="a table or a head, as one side is as long as a vocabulary")
    return reading


RULES: Sequence[Rule] = (
    _nothing,
    vectors,
    tokens,
    vocabulary_or_norm,
    tables,
    heads,
    layers,
    factors,
    of_a_stack,
    sized_as_the_vocabulary,
    last_of_a_compact_model,
    by_axis_names,
    einsums,
    convolutions,
    beside_its_bias,
    square_windows,
    beside_its_other_side,
    by_name_and_size,
    _otherwise,
)


def readings(params: Any) -> list[Reading]:
    """The reading of each leaf of a tree, in the order of the leaves."""
    model = with_stacks(with_factors(Model(leaves_of(params))))
    first = (next(filter(None, (rule(leaf, model) for rule in RULES))) for leaf in model.leaves)
    rows = [_with_two_sides(*pair) for pair in zip(model.leaves, first, strict=True)]
    return alike([_with_sides_of_head(*pair, model) for pair in zip(model.leaves, rows, strict=True)], model)


def _with_sides_of_head(leaf: Leaf, reading: Reading, model: Model) -> Reading:
    """Tell which axes of a head are its fan-in: a head has no entry, but rules of its own need to know.

    Its layer decides, or its window, as for a matrix; then the name of its axes. A leaf called `weight` whose
    axes have no names is `(out, in)`, as in PyTorch.
    """
    if reading.kind != "head":
        return reading
    for rule in (layers, convolutions, square_windows):
        if (found := rule(leaf, model)) is not None and found.entry is not None:
            return reading._replace(head=found.entry)
    is_out_first = vocabulary_comes_first(leaf) if leaf.axes else leaf.name == "weight"
    return reading._replace(head=OUT_IN if is_out_first else LAST_TWO)


def _with_two_sides(leaf: Leaf, reading: Reading) -> Reading:
    """Read a block with a side of 1 as a vector, whatever its axes are called, and mark routers."""
    if reading.entry is None:
        return reading
    for axes in (reading.entry.reduction_axis, reading.entry.output_axis):
        several = axes if isinstance(axes, tuple) else (axes,)
        if math.prod(leaf.shape[axis] for axis in several) == 1:
            return Reading(None, "vector", "a side of 1")
    if is_router(leaf) or (has_experts_as_features(leaf) and leaf.factor is None):
        return reading._replace(kind="router", reason=f"a router: {reading.reason}")
    return reading
