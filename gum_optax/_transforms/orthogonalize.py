"""Orthogonalize each matrix of a tree."""

import jax
import optax

from .._core.batches import map_batched, map_matrices, map_sequentially, wait_for_steps
from .._core.checks import check_function, renamed_argument
from .._core.context import NO_CONTEXT, MatrixContext
from .._linalg.newton_schulz import Orthogonalizer, newton_schulz
from .._matrices.view import views_beside
from .._mesh.distribute import distribute


def orthogonalize(
    method: Orthogonalizer = newton_schulz, *, batched: bool = False, together: bool | None = None
) -> optax.GradientTransformation:
    """Replace each matrix by its polar factor: `step = method(g)`.

    Momentum followed by `orthogonalize` is Muon's rule: `optax.chain(optax.trace(0.95), orthogonalize())`.

    Args:
      method: `newton_schulz` (with its coefficients bound by `functools.partial`) or `polar`; any
        function from `(*, m, n)` to `(*, m, n)`.
      batched: whether single matrices of one shape go through `method` as one stack. XLA then compiles
        `method` once for all of them and holds all of them in memory: this is for small leaves, such as
        coordinates in a subspace.
      together: the old name of `batched`, deprecated.

    Returns:
      A stateless `optax.GradientTransformation` over trees of `(*, m, n)` leaves.

    Raises:
      TypeError: `method` is not a function.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> rule = gum_optax.orthogonalize(gum_optax.polar)
      >>> steps, state = rule.update(gradients, rule.init(gradients))
      >>> print(np.linalg.svd(steps["kernel"], compute_uv=False).round(3))
      [1. 1. 1. 1.]
    """
    check_function("method", method, "gum_optax.newton_schulz")
    batched = renamed_argument("orthogonalize", "together", together, "batched", batched)
    map_leaves = map_batched if batched else map_matrices
    jitted = jax.jit(method)  # all leaves of one shape share one trace

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del state, params, extra_args
        if context.turn.is_probe:
            return updates, optax.EmptyState()
        if first := jax.tree.leaves(context.waits_for)[:1]:
            updates = wait_for_steps(first[0], updates)
        views = views_beside(updates, context.views)
        if not any(view.sharding for view in jax.tree.leaves(views)):
            return map_leaves(jitted, updates), optax.EmptyState()
        # Do not stack leaves that have different shardings.
        steps = map_sequentially(lambda view, x: distribute(jitted, x, view.sharding), views, updates)
        return steps, optax.EmptyState()

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
