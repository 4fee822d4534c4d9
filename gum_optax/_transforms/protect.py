"""Protects what a model has learned: steps stay off chosen subspaces of its matrices."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._core.checks import check_fraction, check_function, check_integer, check_number, check_rule
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.partition import partition_matrices
from .._core.trees import columns
from .._linalg.protected import extend_basis, off_both_sides, top_singular_vectors
from .._matrices.as_matrices import as_matrices
from .._matrices.decisions import Decisions
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._mesh.explicit import whole

Pair = tuple[Float[Array, "*b fan_in k"], Float[Array, "*b fan_out l"]]
# From a weight `(*blocks, fan_in, fan_out)` to orthonormal columns on either side.
FindBases = Callable[[Float[Array, "*b fan_in fan_out"]], Pair]


class Bases(NamedTuple):
    """The protected subspaces.

    Examples:
      >>> tx = gum_optax.protect(optax.sgd(0.1), gum_optax.protected_subspace(0.5))
      >>> state = tx.init({"kernel": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))})
      >>> optax.tree.get(state.bases, "left")["kernel"].shape
      (4, 2)
    """

    left: Any  # U, each leaf (*blocks, fan_in, k) float32
    right: Any  # V, each leaf (*blocks, fan_out, l) float32


class ProtectState(NamedTuple):
    """State of `protect`.

    Examples:
      >>> tx = gum_optax.protect(optax.adam(1e-3), gum_optax.protected_subspace(0.5))
      >>> state = tx.init({"kernel": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))})
      >>> type(state.inner[0]).__name__, optax.tree.get(state.bases, "right")["kernel"].shape
      ('ScaleByAdamState', (4, 2))
    """

    bases: Any  # of the matrices
    inner: Any


def protected_subspace(fraction: Any = 0.5) -> FindBases:
    """Protect the top singular vectors of each weight: a fraction of them on both sides, all but one at most.

    Args:
      fraction: of `min(m, n)`; 1/2 as in the peft library.

    Returns:
      Bases for `protect`.

    Raises:
      TypeError, ValueError: `fraction` is no number in `[0, 1]`.

    Examples:
      >>> left, right = gum_optax.protected_subspace(0.5)(jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0])))
      >>> jnp.abs(left).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]

    References:
      Nayak et al., Sculpting Subspaces, arXiv 2504.07097.
    """
    fraction = check_fraction("fraction", fraction)

    def find(w: Float[Array, "*b m n"]) -> Pair:
        short = min(w.shape[-2:])
        k = math.floor(fraction * short + 1e-9)  # 0.29 of 100 is 29
        return top_singular_vectors(whole(w), min(k, max(short - 1, 0)))

    return find


def empty_subspace(width: int) -> FindBases:
    """Protect nothing at first; `extend_protection` may add up to `width` directions of the outputs.

    Examples:
      >>> left, right = gum_optax.empty_subspace(width=2)(jnp.ones((4, 8)))
      >>> left.shape, right.shape, bool(right.any())
      ((4, 0), (8, 2), False)
    """
    width = check_integer("width", width, at_least=1)

    def find(w: Float[Array, "*b m n"]) -> Pair:
        *b, m, n = w.shape
        return jnp.zeros((*b, m, 0), jnp.float32), jnp.zeros((*b, n, min(width, n)), jnp.float32)

    return find


def _sides(w: Array) -> list[tuple[int, ...]]:
    """The shapes of both bases of a weight but for their last axis."""
    *b, m, n = w.shape
    return [(*b, m), (*b, n)]


def _extended(v: Array, m: Array, energy: Any) -> Array:
    """The basis of the outputs, extended by a moment."""
    if not isinstance(v, jax.core.Tracer) and not (jnp.abs(v).max(-2, initial=0) == 0).any():
        raise ValueError(
            f"a basis of shape {v.shape} has no free column: give protect bases=empty_subspace(width) of a"
            " larger width."
        )
    return extend_basis(v, m.mT, energy)


def _projection(find: FindBases) -> optax.GradientTransformationExtraArgs:
    """Take updates off the bases, which are the state."""

    def found(w):
        bases = find(w)
        if not isinstance(bases, tuple) or [jnp.shape(x)[:-1] for x in bases] != _sides(w):
            raise ValueError(
                f"bases must return columns of the shapes {_sides(w)} and their number for a weight of shape"
                f" {w.shape}, got {jax.tree.map(jnp.shape, bases)}."
            )
        return bases

    def init(params):
        return Bases(*columns(params, jax.tree.map(found, params), 2))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return jax.tree.map(off_both_sides, state.left, state.right, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _extension(energy: Any) -> optax.GradientTransformationExtraArgs:
    """Extend the bases of the outputs by the updates."""

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        # A state of Flax NNX has other containers than the moments.
        leaves, treedef = jax.tree.flatten(state.right)
        rows = zip(leaves, jax.tree.leaves(updates), strict=True)
        return updates, state._replace(right=treedef.unflatten([_extended(v, m, energy) for v, m in rows]))

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _of_matrices(
    rule: optax.GradientTransformation, decisions: Decisions
) -> optax.GradientTransformationExtraArgs:
    """The rule for the matrices, as `(*blocks, fan_in, fan_out)`, and nothing for the other leaves."""

    def routed(tree, turn=NO_CONTEXT.turn):
        treedef = jax.tree.structure(tree)
        entries = turn.of_whole(tree, decisions.of)
        matrices = as_matrices(rule, treedef.unflatten(entries), wide=False)
        return partition_matrices(matrices, optax.identity(), tree, entries)

    def init(params):
        decisions.decide_at_init(params)
        return routed(params).init(params)

    warned = decisions.warning_at_init(init)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        of_tree = routed(updates, context.turn)
        return of_tree.update(updates, state, params, context=context, **extra_args)

    return optax.GradientTransformationExtraArgs(warned, update)  # pyright: ignore[reportArgumentType]


def protect(
    inner: optax.GradientTransformation,
    bases: FindBases | None = None,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Keep every change of a weight off its protected subspaces, on both sides.

        G ← (I - U Uᵀ) G (I - V Vᵀ),   D = inner(G),   step = (I - U Uᵀ) D (I - V Vᵀ)

    So `(W + step) V = W V` and `Uᵀ (W + step) = Uᵀ W`: the protected singular triplets stand to rounding.
    The step is projected too, with learning rate and decay in it, because a step number by number, as
    Adam's, and decay of the weights leave the complement of the subspaces. It goes outside of a whole
    optimizer.

    A new task begins with a new `init`, or with `extend_protection`. Embeddings, heads and vectors are not
    protected: freeze them if they must stay. Weights in bfloat16 are rounded after the step, which moves the
    protected part too.

    Args:
      inner: any optimizer.
      bases: from each weight to its protected subspaces: `protected_subspace(fraction)` (the default),
        `empty_subspace(width)`, or any function from `(*blocks, fan_in, fan_out)` to orthonormal columns
        `(*blocks, fan_in, k)` and `(*blocks, fan_out, l)`.
      weight_dimension_numbers: as in `muon`; the same as the optimizer's.

    Returns:
      A transformation. State: that of `inner`, and `k (m + n)` numbers per matrix, more than a momentum of
      full size from `k > m n / (m + n)`.

    Raises:
      TypeError, ValueError: an argument is of the wrong type; a gradient that is only measured, as in
        `projected_update`, cannot be projected.

    Examples:
      >>> params = {"kernel": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}
      >>> optimizer = gum_optax.sinkgd(1.0, weight_decay=0.1)
      >>> tx = gum_optax.protect(optimizer, gum_optax.protected_subspace(0.5))
      >>> updates, state = tx.update({"kernel": jnp.ones((4, 4))}, tx.init(params), params)
      >>> print(np.linalg.norm(updates["kernel"], axis=0).round(2))  # 4 and 3 stay
      [0.   0.   0.28 0.18]

    References:
      Nayak et al., Sculpting Subspaces, arXiv 2504.07097, which prints `G - U Uᵀ G V Vᵀ`; the authors' and
      peft's code changes weights as here.
    """
    taking = optax.with_extra_args_support(check_rule("inner", inner))
    find = check_function("bases", bases or protected_subspace(), "gum_optax.protected_subspace(0.5)")
    projection = _of_matrices(_projection(find), Decisions(weight_dimension_numbers))

    def init(params):
        return ProtectState(projection.init(params), inner.init(params))

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        context.need_gradient("protect")

        def off(tree):
            steps, _ = projection.update(tree, state.bases, params, context=context)
            return jax.tree.map(lambda s, x: s.astype(x.dtype), steps, tree)

        steps, own = taking.update(off(updates), state.inner, params, context=context, **extra_args)
        return off(steps), ProtectState(state.bases, own)

    return optax.GradientTransformationExtraArgs(init, update)


def extend_protection(
    state: ProtectState,
    moments: optax.Updates,
    energy: Any,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> ProtectState:
    """Protect also the directions in which a moment is large: call it between two tasks.

        V ← [V, top singular vectors of M - M V Vᵀ on the side of the outputs], until they hold `ε |M|²`

    Args:
      state: of `protect`, with free columns from `empty_subspace(width)`. What does not fit is left out, the
        smallest first.
      moments: `M`, a tree like the parameters: Adam's first moment, or a mean of gradients. At a task's end
        Adam's averages about its last ten steps.
      energy: `ε` in `[0, 1)`. The value of GORP was not to be found.
      weight_dimension_numbers: as for `protect`.

    Returns:
      The state with the extended bases.

    Raises:
      TypeError, ValueError: `energy` is out of range, or `state` is not that of `protect`.

    Examples:
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> tx = gum_optax.protect(optax.sgd(1.0), gum_optax.empty_subspace(width=2))
      >>> moments = {"kernel": jnp.eye(1, 4) * jnp.ones((4, 1))}  # the first task moves output 0
      >>> state = gum_optax.extend_protection(tx.init(params), moments, energy=0.9)
      >>> updates, state = tx.update(params, state, params)
      >>> print(np.linalg.norm(updates["kernel"], axis=0).round(3))
      [0. 2. 2. 2.]

    References:
      Wang et al., GORP, arXiv 2507.02503: see `extend_basis`.
    """
    energy = check_number("energy", energy, at_least=0, below=1)
    if not isinstance(state, ProtectState):
        raise TypeError(f"extend_protection needs the state of protect, got {type(state).__name__}.")
    extension = _of_matrices(_extension(energy), Decisions(weight_dimension_numbers))
    _, bases = extension.update(moments, state.bases)
    return state._replace(bases=bases)
