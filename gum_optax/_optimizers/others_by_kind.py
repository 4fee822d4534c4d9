"""Rules for the leaves that are not hidden matrices: embedding tables, heads, and vectors.

The kinds of these leaves are those of the library's policy for the whole tree, as it is before the matrices
are masked: the matrices beside a leaf are evidence of what it is.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.context import NO_CONTEXT, MatrixContext
from .._core.partition import partition
from .._core.trees import flat, leaf_indices_of
from .._core.turns import Turn, WholeStep
from .._matrices.decisions import Decisions
from .._matrices.dimension_numbers import LAST_TWO, names_of
from .._matrices.rules.leaves import Reading


@dataclasses.dataclass(frozen=True)
class Kind:
    """The rule of a leaf."""

    rule: str  # "tables", "heads" or "vectors"
    numbers: Any = LAST_TWO  # of a table or a head: which axes are fan-in and fan-out


@dataclasses.dataclass(frozen=True)
class ByKind:
    """A rule for the leaves that are not matrices, made for each tree from the kinds of its leaves.

    Attributes:
      make: from the tree of kinds to the rule.
      decisions: what the policy says of the whole tree, whatever dimension numbers the user has given.
    """

    make: Callable[[Any], optax.GradientTransformation]
    decisions: Decisions = dataclasses.field(default_factory=lambda: Decisions(None))

    def at_init(self, params: Any) -> None:
        """Decide what the leaves are, once."""
        self.decisions.decide_at_init(params)

    def of(self, tree: Any, turn: WholeStep) -> optax.GradientTransformation:
        """The rule for `tree`, in which no matrix is masked yet."""
        kinds = turn.of_whole(tree, lambda whole: _kinds(whole, self.decisions.readings(whole)))
        return self.make(jax.tree.structure(tree).unflatten(kinds))


@dataclasses.dataclass(frozen=True)
class OfAnyKind:
    """One rule for all leaves that are not matrices."""

    rule: optax.GradientTransformation

    def at_init(self, params: Any) -> None:
        """Nothing to decide."""

    def of(self, tree: Any, turn: WholeStep) -> optax.GradientTransformation:
        """The rule."""
        return self.rule


def others_by_kind(
    kinds: Any,
    tables: optax.GradientTransformation,
    heads: Callable[[Callable[[Any], Any]], optax.GradientTransformation],
    vectors: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Each rule for its kind of leaf.

    Args:
      kinds: a tree with the kind of each leaf, as `ByKind` passes it.
      tables: for embeddings, `(vocabulary, width)`.
      heads: from dimension numbers to the rule for heads, and for embeddings named as kernels. The dimension
        numbers are a function from the tree of heads, as `as_matrices` takes it.
      vectors: for all other leaves: norms and biases, `(*layers, n)`, and matrices that the user excludes.
    """
    of_whole = flat(kinds)

    def of(tree):
        return [of_whole[leaf_index] for leaf_index in leaf_indices_of(tree)]

    def numbers(tree):
        return jax.tree.structure(tree).unflatten([kind.numbers for kind in of(tree)])

    rules: dict[Hashable, optax.GradientTransformation] = {
        "tables": tables,
        "heads": heads(numbers),
        "vectors": vectors,
    }

    def of_leaves(tree):
        _check_real(tree)
        return partition(rules, tree, [kind.rule for kind in of(tree)])

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        _check_rows(updates, context.turn)
        return of_leaves(updates).update(updates, state, params, context=context, **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: of_leaves(params).init(params), update)


def as_rows(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a rule of matrices on vectors `(*layers, n)`, as matrices `(*layers, 1, n)` of one row."""
    inner = optax.with_extra_args_support(inner)

    def seen(tree):
        return jax.tree.map(lambda x: jnp.atleast_1d(x)[..., None, :], tree)

    def update(updates, state, params=None, **extra_args):
        params = None if params is None else seen(params)
        steps, state = inner.update(seen(updates), state, params, **extra_args)
        return jax.tree.map(lambda s, u: s[..., 0, :].reshape(jnp.shape(u)), steps, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(seen(params)), update)


def _kinds(tree: Any, readings: Sequence[Reading]) -> list[Kind]:
    """The kind of each leaf, by the reading of the policy."""

    def kind(path, x, reading):
        if jnp.ndim(x) < 2 or reading.kind not in ("embedding", "head"):
            return Kind("vectors")
        if reading.kind == "head":
            return Kind("heads", reading.head)
        return Kind("tables" if names_of(path)[-1] != "kernel" else "heads")

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [kind(*leaf, reading) for leaf, reading in zip(leaves, readings, strict=True)]


def _check_rows(tree: Any, turn: WholeStep) -> None:
    """Refuse a stack of numbers: it is one vector, of which a turn would see one number."""
    if not isinstance(turn, Turn):
        return
    rows = zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(turn.beside(tree).places), strict=True
    )
    for (path, x), place in rows:
        if place.is_row and jnp.ndim(x) == 1:
            raise ValueError(
                f"{'/'.join(names_of(path))} has one number for each layer. This optimizer normalizes them as"
                " one vector, and layerwise_update passes one of them at a time: pass"
                " others=optax.adamw(learning_rate), for instance."
            )


def _check_real(tree: Any) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.iscomplexobj(x):
            raise TypeError(
                f"leaf {jax.tree_util.keystr(path)} is complex, but this optimizer's rules are for real"
                " numbers; pass others=optax.adamw(learning_rate), for instance."
            )
