"""The canonical view: inside `as_matrices`, every leaf is a matrix or a stack of them, `(*blocks, m, n)`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_rule
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.trees import concrete
from .._mesh.explicit import on_auto_axes
from .dimension_numbers import WeightDimensionNumbers
from .parts import Apart, PartMeans
from .turns import turn_of_matrices
from .view import views_of


def as_matrices(
    inner: optax.GradientTransformation,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    *,
    wide: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on leaves that are viewed as matrices `(m, n)` or stacks of matrices.

        G (any axes)  →  (*blocks, m, n), m <= n  →  inner  →  back to the axes of G

    The tree keeps its structure and no data moves: XLA folds the transpose or reshape into the next product.
    Axes that are neither reduction nor output axes count as blocks, at any position.

    Args:
      inner: a rule over trees of `(*blocks, m, n)` leaves. It sees parameters in the same view.
      weight_dimension_numbers: `optax.contrib.MuonDimensionNumbers` for all leaves, a tree of them, or a
        function from the tree to such a tree. Default: the last two axes of every leaf.
      wide: whether to put the shorter side first (`m <= n`). False keeps `(*blocks, fan_in, fan_out)`.

    Returns:
      A transformation whose state is that of `inner`. The step keeps the dtype from `inner`.

    Raises:
      ValueError: at `init`, a leaf is empty or has no two matrix axes, or dimension numbers overlap.
      TypeError: at `init`, a leaf is complex or integer.

    Examples:
      >>> for numbers in (gum_optax.LAST_TWO, optax.contrib.MuonDimensionNumbers(0, -1)):
      ...     rule = gum_optax.as_matrices(optax.trace(0.9), numbers)
      ...     print(rule.init({"kernel": jnp.ones((8, 3, 4))}).trace["kernel"].shape)
      (8, 3, 4)
      (3, 4, 8)
    """
    inner = optax.with_extra_args_support(check_rule("inner", inner))

    def seen(views: Any, tree: Any) -> Any:
        return jax.tree.map(lambda x, view: view.of(jnp.asarray(x)), tree, views)

    def init(params):
        params = concrete(params)
        kernels = Apart(weight_dimension_numbers, params)
        parts = kernels.apart(params)
        return inner.init(seen(views_of(kernels.entries, parts, wide=wide), parts))

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        kernels = Apart(weight_dimension_numbers, updates)
        measurements: Any = context.measurements
        if measurements is not None:
            measurements.check_untouched(updates)
            measurements = kernels.measurements_of_parts(measurements, updates)
        # Before types lose their shardings.
        views = views_of(kernels.entries, kernels.apart(updates), wide=wide)

        def inside(updates, state, params, context, extra_args):
            params = None if params is None else seen(views, kernels.apart(params))
            parts = seen(views, kernels.apart(updates))
            # How leaves are stored, for rules that take them through a conditional: see `low_rank`.
            own = kernels.acceptance_of_parts(context.accept, updates)
            turn = turn_of_matrices(context.turn, kernels, updates, wide=wide)
            of_parts = MatrixContext(views, own, measurements, turn)
            steps, state = inner.update(parts, state, params, context=of_parts, **extra_args)
            if context.accept is not None and own is not None:
                context.accept.mark_kept_by(own, state)
            if isinstance(measurements, PartMeans):
                measurements.need_the_rest()
            return kernels.together(jax.tree.map(lambda x, view: view.back(x), steps, views)), state

        return on_auto_axes(inside)(updates, state, params, context, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
