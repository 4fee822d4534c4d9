"""Different rules for different leaves of a tree."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import optax


def partition(
    rules: Mapping[Hashable, optax.GradientTransformation], tree: Any, labels: Sequence[Hashable]
) -> optax.GradientTransformationExtraArgs:
    """`optax.partition` of trees like `tree`, with a label for each leaf of it."""
    tree_of_labels = jax.tree.structure(tree).unflatten(labels)
    # Pass the labels as a function: `optax.partition` would call a tree of labels that is callable.
    return optax.partition(rules, lambda _: tree_of_labels)


def partition_matrices(
    matrices: optax.GradientTransformation,
    others: optax.GradientTransformation,
    tree: Any,
    entries: Sequence[Any],
) -> optax.GradientTransformationExtraArgs:
    """One rule for the leaves that are matrices, and another for those whose entry is None."""
    labels = ["others" if entry is None else "matrices" for entry in entries]
    return partition({"matrices": matrices, "others": others}, tree, labels)
