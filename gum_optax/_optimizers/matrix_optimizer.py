"""What all optimizers share: matrices to one rule, all other leaves to another."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_number, check_rule, is_function
from .._core.trees import merge, split
from .._matrices.as_matrices import as_matrices
from .._matrices.decisions import Decisions
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._matrices.parts import Apart
from .._matrices.view import views_of
from .._mesh.axis_names import with_axis_names
from .._state.containers import with_clear_errors
from .._transforms.momentum import adam
from .._transforms.scaling import scale_by_fans, scale_by_shape
from .._transforms.skip_non_finite import skip_as_one, skip_leaves

# From the dimension numbers of a tree to the transformation that scales its steps.
Scaling = Callable[[Any], optax.GradientTransformation]


def by_shape(consistent_rms: Any) -> Scaling:
    """`scale_by_shape`, checked before there is a tree."""
    if consistent_rms is not None:
        check_number("consistent_rms", consistent_rms, at_least=0)
    return lambda dims: scale_by_shape(dims, consistent_rms)


def by_fan_ratio(dims: Any) -> optax.GradientTransformation:
    """`√(fan_out / fan_in)`: the step's operator norm between RMS norms is then the learning rate."""
    return scale_by_fans(dims, lambda fan_in, fan_out: (fan_out / fan_in) ** 0.5)


def by_constant(scale: Any) -> Scaling:
    """The same factor for every matrix."""
    scale = check_number("scale", scale, at_least=0)
    return lambda dims: optax.scale(scale)


def partitioned(
    rules: Mapping[str, optax.GradientTransformation], kinds: Callable[[Any], Sequence[str]]
) -> optax.GradientTransformationExtraArgs:
    """`optax.partition`, with its state, for any tree: one that can be called, it would take for a function.

    Args:
      rules: a transformation for each kind of leaf.
      kinds: from a tree to the kind of each of its leaves.
    """
    taking = {name: optax.with_extra_args_support(rule) for name, rule in rules.items()}

    def parts(tree):
        found = kinds(tree)
        return {name: split(tree, [kind == name for kind in found])[0] for name in rules}

    def init(params):
        states = {name: taking[name].init(part) for name, part in parts(params).items()}
        return optax.PartitionState({name: optax.MaskedState(state) for name, state in states.items()})

    def update(updates, state, params=None, **extra_args):
        beside = dict.fromkeys(rules) if params is None else parts(params)
        steps, states = updates, {}
        for name, part in parts(updates).items():
            inner = state.inner_states[name].inner_state
            step, inner = taking[name].update(part, inner, beside[name], **extra_args)
            steps, states[name] = merge(step, steps), optax.MaskedState(inner)
        return steps, optax.PartitionState(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _decays(weight_decay: Any) -> bool:
    """Whether parameters are needed; without decay `params=None` is fine. A traced number is not zero."""
    return not (isinstance(weight_decay, int | float) and weight_decay == 0)


def _decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, or nothing."""
    return optax.add_decayed_weights(weight_decay, mask) if _decays(weight_decay) else optax.identity()


def at_least_float32(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run `rule` on float32 gradients where theirs are narrower: its state is float32, and stays so."""

    def widened(tree):
        def wide(x):
            dtype = jnp.result_type(x)
            inexact = jnp.issubdtype(dtype, jnp.inexact)
            return jnp.asarray(x, jnp.promote_types(dtype, jnp.float32)) if inexact else x

        return jax.tree.map(wide, tree)

    taking = optax.with_extra_args_support(rule)

    def update(updates, state, params=None, **extra_args):
        return taking.update(widened(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: rule.init(widened(params)), update)


def matrices_and_others(
    rule: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    scaling: Scaling,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
    *,
    others_rule: optax.GradientTransformation | None = None,
    wide: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer from a rule over `(*blocks, m, n)`: the arguments that all optimizers share.

        matrices:   W ← W - η (scaling(rule(G)) + λ W)          others:   AdamW at the same η

    Args:
      rule: gives the step of the matrices, still pointing up the gradient, unscaled.
      learning_rate: `η`, a number or a schedule.
      scaling: from dimension numbers to the transformation that scales the step in the model's own axes,
        `by_shape(consistent_rms)` or `by_constant(scale)`.
      weight_decay: `λ`, decoupled, for matrices and for the default `others`.
      weight_decay_mask: a tree of booleans, or a function from the parameters to one, as in
        `optax.adamw`.
      weight_dimension_numbers: a tree, or a function from the parameters to one, of
        `optax.contrib.MuonDimensionNumbers`, `None` at leaves that are not matrices. Default:
        `hidden_matrices`.
      others: the transformation of all leaves that are not matrices. Default: AdamW.
      others_rule: a rule for them that takes AdamW's place, with the same decay and learning rate.
      wide: as in `as_matrices`; False for rules that tell fan-in from fan-out.

    Raises:
      TypeError, ValueError: an argument out of range or of the wrong type; at `init`, dimension
        numbers that do not fit a leaf, or a complex or integer matrix.
    """
    weight_decay = check_number("weight_decay", weight_decay, at_least=0)
    if not callable(learning_rate):
        learning_rate = check_number("learning_rate", learning_rate, at_least=0)
    check_rule("others", optax.identity() if others is None else others)
    decisions = Decisions(weight_dimension_numbers)

    def routed(tree):
        """The transformation for one tree; functions of the parameters see it whole, without holes."""
        treedef = jax.tree.structure(tree)
        entries = decisions.of(tree)
        dims = treedef.unflatten(entries)
        mask = weight_decay_mask(tree) if is_function(weight_decay_mask) else weight_decay_mask
        descent = optax.chain(
            _decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate)
        )
        matrices = optax.chain(as_matrices(rule, dims, wide=wide), scaling(dims), descent)
        rest = optax.chain(at_least_float32(adam() if others_rule is None else others_rule), descent)
        outer = rest if others is None else skip_as_one(others)
        rules: dict[str, optax.GradientTransformation] = {"matrices": matrices, "others": outer}
        return partitioned(rules, lambda _: ["others" if entry is None else "matrices" for entry in entries])

    def init(params):
        # Before optax masks anything away: an error then names the leaf's own path.
        entries = decisions.made_at_init(params)
        chosen, _ = split(params, [entry is not None for entry in entries])
        kernels = Apart(jax.tree.structure(params).unflatten(entries), chosen)
        views_of(kernels.entries, kernels.apart(chosen), wide=True)
        return routed(params).init(params)

    def update(updates, state, params=None, **extra_args):
        return routed(updates).update(updates, state, params, **extra_args)

    named = with_axis_names(skip_leaves(optax.GradientTransformationExtraArgs(init, update)))
    told = optax.GradientTransformationExtraArgs(decisions.told_at_init(named.init), named.update)  # pyright: ignore
    return with_clear_errors(told)
