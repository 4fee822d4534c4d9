"""What travels inside an update reaches the rules that ask for it, and troubles no others."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

PARAMS = {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}


def watching(seen):
    """A rule with `**extra_args`, which notes what it is passed."""

    def update(updates, state, params=None, **extra_args):
        del params
        seen.append(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def stepped(rule, **extra_args):
    tx = go.matrix_optimizer(rule, 0.5, 1.0)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra_args)
    return updates["w"]


def test_a_rule_is_passed_the_context_beside_a_users_own_extra_arguments():
    seen = []
    np.testing.assert_array_equal(stepped(watching(seen), value=3.0), -0.5 * PARAMS["w"])
    (extra_args,) = seen
    assert extra_args.keys() == {"context", "value"}
    assert extra_args["value"] == 3.0
    context = extra_args["context"]
    assert isinstance(context, go.MatrixContext)
    assert context.views["w"].shape == (4, 6)
    assert context.accept is not None
    assert context.measurements is None


def test_a_rule_without_extra_arguments_is_passed_none():
    np.testing.assert_array_equal(stepped(optax.scale(2.0), value=3.0), -PARAMS["w"])


def test_a_residual_is_passed_coordinates_and_steps_beside_the_context():
    seen = []
    stepped(go.low_rank(optax.scale(2.0), 2, 5, residual=watching(seen)))
    (extra_args,) = seen
    assert extra_args.keys() == {"context", "coordinates", "steps"}
    np.testing.assert_array_equal(extra_args["steps"]["w"], 2 * extra_args["coordinates"]["w"])


def test_the_context_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign"):
        go.MatrixContext().views = {}  # pyright: ignore
