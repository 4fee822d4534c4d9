"""What all optimizers share, and what a rule is.

A rule is an optax transformation that turns gradients into steps up the gradient, without a learning rate.
Muon's rule is `scale_by_muon()`. A rule of this library sees only matrices: every leaf is `(*blocks, m, n)`
with `m <= n`, whatever its shape in the model, and a stack of layers is a leaf with blocks. A rule treats all
blocks of a leaf alike, and keeps one state for each leaf, beside its matrices.

Rules wrap rules. `low_rank(inner)` projects the matrices and runs `inner` on the coordinates, which are
matrices again, `(*blocks, r, n)`. `unbiased_low_rank(inner)` also runs `inner` on a few full matrices.
`optax.chain` runs one rule after the other. So an optimizer is a composition, and a new one is a few lines.

`matrix_optimizer` makes an optimizer of a rule. From the outside in, it

1. explains mismatched arguments of `update` (`with_clear_errors`),
2. warns of doubtful matrices at `init` (`warning_at_init`),
3. copies the axis names of the parameters onto the state (`with_axis_names`),
4. rejects the step of a leaf whose gradient is not finite (`skip_leaves`),
5. routes matrices to the rule and all other leaves to AdamW (`optax.partition`),
6. shows the matrices to the rule in their canonical view (`as_matrices`),
7. scales the rule's step, adds weight decay, and multiplies by the learning rate.

Steps 4 and 6 tell the rule what they know in one extra argument, `context`: see `_core/context.py`.

An argument of an optimizer that takes a function has the default `None`, because `optax.inject_hyperparams`
takes a default that is a function for a schedule.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_mask, check_number, check_rule, is_function, is_rule, shown
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.partition import partition_matrices
from .._core.trees import leaves_of_prefix, split
from .._core.turns import Turn, WholeStep
from .._matrices.as_matrices import as_matrices
from .._matrices.decisions import Decisions
from .._matrices.dimension_numbers import Entry, WeightDimensionNumbers
from .._matrices.parts import Apart
from .._matrices.view import views_of
from .._mesh.axis_names import with_axis_names
from .._state.containers import with_clear_errors
from .._transforms.momentum import adam
from .._transforms.scaling import scale_by_fans
from .._transforms.skip_non_finite import skip_as_one, skip_leaves
from .others_by_kind import ByKind, OfAnyKind

# A number, a function of the fan-in and fan-out of a matrix, or a rule over `(*blocks, fan_in, fan_out)`.
Scale = float | jax.Array | Callable[[int, int], Any] | optax.GradientTransformation
# A number, or a rule that adds the decay to a step up the gradient.
WeightDecay = float | jax.Array | optax.GradientTransformation


def checked_decay(weight_decay: Any) -> Any:
    """A number of at least 0, or a rule as it is."""
    return weight_decay if is_rule(weight_decay) else check_number("weight_decay", weight_decay, at_least=0)


def decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """The rule of the decay; without decay the identity, which needs no parameters."""
    if is_rule(weight_decay):
        return weight_decay if mask is None else optax.masked(weight_decay, mask)
    # A traced number counts as nonzero.
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)
    return optax.add_decayed_weights(weight_decay, mask) if decays else optax.identity()


def _mask_for(tree: Any, mask: Any, turn: WholeStep) -> Any:
    """The mask of the weight decay for one tree."""

    def of(whole):
        return mask(whole) if is_function(mask) else mask

    if mask is None or not isinstance(turn, Turn):
        return of(tree)
    by_leaf = turn.of_whole(tree, lambda whole: leaves_of_prefix(of(whole), whole))
    return jax.tree.structure(tree).unflatten(by_leaf)


def _check_mask_fits(mask: Any, params: Any) -> None:
    """Refuse a mask that is a tree of other leaves: optax's error names internal functions."""
    if mask is None or is_function(mask):
        return
    try:
        leaves_of_prefix(mask, params)
    except ValueError:
        raise ValueError(
            "weight_decay_mask must be a tree of booleans like the parameters,"
            f" {shown(jax.tree.structure(params))}, got {shown(jax.tree.structure(mask))}; a function from"
            " the parameters to the tree fits every model."
        ) from None


def _rescaling(scale: Scale) -> Callable[[Any], optax.GradientTransformation]:
    """A function from the dimension numbers of a tree to the transformation that scales its steps."""
    if is_rule(scale):
        return lambda dims: without_measurements(as_matrices(scale, dims, wide=False))
    if callable(scale):
        return lambda dims: scale_by_fans(dims, scale)
    factor = check_number("scale", scale, at_least=0)
    return lambda dims: optax.scale(factor)


def without_measurements(
    rule: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Run `rule` on steps: what is measured of the gradient is not of them."""

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        context = dataclasses.replace(context, measurements=None)
        return rule.update(updates, state, params, context=context, **extra_args)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def at_least_float32(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run `rule` on gradients of at least float32, so that the state of `rule` is and stays float32."""

    def promoted(tree):
        def of(x):
            dtype = jnp.result_type(x)
            inexact = jnp.issubdtype(dtype, jnp.inexact)
            return jnp.asarray(x, jnp.promote_types(dtype, jnp.float32)) if inexact else x

        return jax.tree.map(of, tree)

    taking = optax.with_extra_args_support(rule)

    def update(updates, state, params=None, **extra_args):
        return taking.update(promoted(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: rule.init(promoted(params)), update)


def _auxiliary(others_rule: optax.GradientTransformation | ByKind | None) -> ByKind | OfAnyKind:
    if isinstance(others_rule, ByKind):
        return others_rule
    return OfAnyKind(adam() if others_rule is None else check_rule("others_rule", others_rule))


def _check_matrices(params: Any, entries: Sequence[Entry]) -> None:
    """Refuse leaves that are not matrices before optax masks the tree, so that errors name their paths."""
    chosen, _ = split(params, [entry is not None for entry in entries])
    kernels = Apart(jax.tree.structure(params).unflatten(entries), chosen)
    views_of(kernels.entries, kernels.apart(chosen), wide=True)


def matrix_optimizer(
    rule: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    scale: Scale,
    *,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
    others_rule: optax.GradientTransformation | ByKind | None = None,
    wide: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Make an optimizer from a rule for matrices, as all optimizers of this library do.

        matrices      W ← W - η (scale · rule(G) + λ W)
        all others    W ← W - η (Adam(G) + λ W)

    The optimizer finds the matrices of the model, passes them to the rule as `(*blocks, m, n)` with `m <= n`,
    and updates all other leaves by AdamW. It skips a leaf whose gradient holds a NaN or an infinity: the
    parameter and its state stay unchanged. The example is GaLore with the sign of a momentum in place of
    Adam.

    Args:
      rule: any transformation over trees of `(*blocks, m, n)` leaves, whose step points up the gradient:
        `scale_by_muon()`, `low_rank(...)`, `unbiased_low_rank(...)`, `optax.scale_by_lion()`, or a chain. It
        keeps its state leaf by leaf if its update reads `accept` of the argument `context` (a
        `MatrixContext`), as the rules of this library do; the state of another rule stays whole on a step
        that any leaf skips.
      learning_rate: `η`, a number or a schedule; the schedule counts the steps that all leaves take.
      scale: the factor of the step, a number or a function `(fan_in, fan_out) -> number`, such as
        `shape_factor()` for orthogonal steps, or `fan_ratio`; or a rule over the steps as `(*blocks, fan_in,
        fan_out)`, such as `scale_by_neuron_rms()`. (`optax.inject_hyperparams` mistakes a function for a
        schedule: name `scale` in `static_args`.)
      weight_decay: `λ`, decoupled, or a rule that adds the decay to the step, such as
        `cautious_weight_decay(λ)`. It applies to the matrices and to the default `others`.
      weight_decay_mask: a tree of booleans, or a function from the parameters to one, as in `optax.adamw`.
      weight_dimension_numbers: which leaves are matrices along which axes: a tree of
        `optax.contrib.MuonDimensionNumbers`, with `None` for leaves that are not matrices; a function from
        the parameters to one; or a mapping from path patterns. Default: `hidden_matrices`.
      others: the transformation for all leaves that are not matrices, with its own learning rate and decay.
        Default: AdamW at `learning_rate`.
      others_rule: a rule in place of AdamW's, with the same learning rate and decay.
      wide: whether the shorter side of each matrix comes first. False keeps `(*blocks, fan_in, fan_out)`, for
        rules that distinguish rows from columns.

    Returns:
      A transformation over the parameters of a model, as `muon` is. Its state has the axis names of the
      parameters, and `update` explains mismatched arguments.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type; at `init`, dimension numbers do
        not fit a leaf, or a matrix is complex or integer.

    Examples:
      >>> params = {"embedding": jnp.ones((16, 4)), "kernel": jnp.ones((4, 8))}
      >>> rule = gum_optax.low_rank(optax.scale_by_lion(), rank=2, period=200)
      >>> tx = gum_optax.matrix_optimizer(rule, 1e-4, 1.0, weight_decay=0.1)
      >>> [(leaf.name, leaf.kind, leaf.rank) for leaf in gum_optax.describe(tx, params).leaves[:2]]
      [('embedding', 'embedding', None), ('kernel', 'matrix', 2)]
    """
    check_rule("rule", rule)
    rescale = _rescaling(scale)
    weight_decay = checked_decay(weight_decay)
    if not callable(learning_rate):
        learning_rate = check_number("learning_rate", learning_rate, at_least=0)
    if others is not None:
        others = skip_as_one(check_rule("others", others))
    auxiliary = _auxiliary(others_rule)
    check_mask("weight_decay_mask", weight_decay_mask)
    decisions = Decisions(weight_dimension_numbers)

    def routed(tree, turn=NO_CONTEXT.turn):
        """The transformation for one tree; functions of the parameters get the whole tree, nothing masked."""
        treedef = jax.tree.structure(tree)
        entries = turn.of_whole(tree, decisions.of)
        dims = treedef.unflatten(entries)
        mask = _mask_for(tree, weight_decay_mask, turn)
        descent = optax.chain(
            decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate)
        )
        matrices = optax.chain(as_matrices(rule, dims, wide=wide), rescale(dims), descent)
        rest = others or optax.chain(at_least_float32(auxiliary.of(tree, turn)), descent)
        return partition_matrices(matrices, rest, tree, entries)

    def init(params):
        entries = decisions.decide_at_init(params)
        auxiliary.at_init(params)
        _check_matrices(params, entries)
        _check_mask_fits(weight_decay_mask, params)
        return routed(params).init(params)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        return routed(updates, context.turn).update(updates, state, params, context=context, **extra_args)

    named = with_axis_names(skip_leaves(optax.GradientTransformationExtraArgs(init, update)))
    init_and_warn = decisions.warning_at_init(named.init)
    warned = optax.GradientTransformationExtraArgs(init_and_warn, named.update)  # pyright: ignore
    return with_clear_errors(warned)
