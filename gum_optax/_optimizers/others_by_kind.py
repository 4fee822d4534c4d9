"""Rules for the leaves that are not hidden matrices: embedding tables, heads, and vectors."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax

from .._core.context import NO_CONTEXT, MatrixContext
from .._core.partition import partition
from .._matrices.dimension_numbers import names_of
from .._matrices.hidden_matrices import policy


def others_by_kind(
    tables: optax.GradientTransformation,
    heads: optax.GradientTransformation,
    vectors: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Each rule for its kind of leaf; the names of the whole tree decide.

    Args:
      tables: for embeddings, `(vocabulary, width)`.
      heads: for the kernels of heads, `(width, vocabulary)`, and for embeddings named as kernels.
      vectors: for all other leaves: norms and biases, `(*layers, n)`.
    """
    rules: dict[Hashable, optax.GradientTransformation] = {
        "tables": tables,
        "heads": heads,
        "vectors": vectors,
    }

    def init(params):
        return partition(rules, params, _kinds(params)).init(params)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        of_leaves = partition(rules, updates, context.turn.of_whole(updates, _kinds))
        return of_leaves.update(updates, state, params, context=context, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


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


def _kinds(params: optax.Params) -> list[str]:
    """The kind of each leaf, by name."""

    def kind(path, x, reading):
        if jnp.iscomplexobj(x):
            raise TypeError(
                f"leaf {jax.tree_util.keystr(path)} is complex, but this optimizer's rules are for real"
                " numbers; pass others=optax.adamw(learning_rate), for instance."
            )
        if jnp.ndim(x) < 2 or (reading.entry is None and reading.kind not in ("embedding", "head")):
            return "vectors"
        is_table = reading.kind == "embedding" and names_of(path)[-1] != "kernel"
        return "tables" if is_table else "heads"

    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [kind(*leaf, reading) for leaf, reading in zip(leaves, policy(params), strict=True)]
