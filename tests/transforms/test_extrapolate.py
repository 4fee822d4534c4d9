"""Extrapolation: the loop of the paper's kind in NumPy, and the cases in which optax has the same."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gum_optax as go

TARGET = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
START = {"kernel": jnp.ones((4, 6))}


def loss(params):
    """Curved, so that gradients at other places differ."""
    return jnp.sum((params["kernel"] - TARGET) ** 2 + 0.1 * params["kernel"] ** 4)


def trained(tx, steps, loss=loss):
    params, state, gradient = START, tx.init(START), jax.grad(loss)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_it_is_the_loop_with_momentum():
    """`W½ = W - γ g₋`, the gradient there, momentum and decay at `W`."""
    rate, gamma, beta, decay = 0.02, 0.05, 0.9, 0.1
    w, v, before = np.ones((4, 6)), 0.0, 0.0
    for _ in range(20):
        half = w - gamma * before
        before = 2 * (half - np.float64(TARGET)) + 0.4 * half**3
        v = beta * v + before
        w = w - rate * (v + decay * w)
    inner = optax.chain(optax.trace(beta), optax.add_decayed_weights(decay), optax.scale(-rate))
    params, state = trained(go.extrapolate(inner, optax.scale(gamma)), 20)
    found = go.evaluation_parameters(state, params)["kernel"]
    np.testing.assert_allclose(found, w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(params["kernel"], w - gamma * before, rtol=1e-5, atol=1e-6)


def test_around_sgd_it_is_optimistic_gradient_descent():
    """optax starts with the first gradient as the last one, ours with none: a shift by `γ g₀`."""
    rate, gamma = 0.03, 0.06
    ours = go.extrapolate(optax.sgd(rate), optax.scale(gamma))
    theirs = optax.optimistic_gradient_descent(rate, 1.0, gamma / rate)
    gradient = jax.grad(loss)(START)
    updates, state = ours.update(gradient, ours.init(START), START)
    params = optax.apply_updates(START, updates)
    updates, other = theirs.update(gradient, theirs.init(START), START)
    beside = jax.tree.map(lambda x, g: x - gamma * g, optax.apply_updates(START, updates), gradient)
    for _ in range(20):
        chex.assert_trees_all_close(params, beside, rtol=1e-5, atol=1e-6)
        gradient = jax.grad(loss)(params)
        updates, state = ours.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        updates, other = theirs.update(gradient, other, beside)
        beside = optax.apply_updates(beside, updates)


def test_where_the_gradient_is_the_same_everywhere_it_is_sam_downwards():
    """`optax.contrib.sam` with a plain scale takes a fresh gradient; a linear loss has no other."""

    def linear(params):
        return jnp.sum(TARGET * params["kernel"])

    outer = go.muon(0.05)
    sam = optax.contrib.sam(outer, optax.scale(0.1), sync_period=2)
    params, state = trained(go.extrapolate(outer, optax.scale(0.1)), 6, loss=linear)
    expected, _ = trained(sam, 12, loss=linear)
    chex.assert_trees_all_close(go.evaluation_parameters(state, params), expected, rtol=1e-5, atol=1e-6)


def test_sam_around_our_optimizers_is_the_extragradient_of_two_gradients():
    outer, gamma, w = go.galore_muon(0.05, 2, 3), 0.1, START
    state = outer.init(w)
    for _ in range(6):
        half = jax.tree.map(lambda x, g: x - gamma * g, w, jax.grad(loss)(w))
        updates, state = outer.update(jax.grad(loss)(half), state, w)
        w = optax.apply_updates(w, updates)
    found, _ = trained(optax.contrib.sam(outer, optax.scale(gamma), sync_period=2), 12)
    chex.assert_trees_all_close(found, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda tx: tx, go.skip_non_finite])
def test_a_gradient_that_is_not_finite_moves_nothing(wrap):
    tx = wrap(go.extrapolate(go.muon(0.1), optax.scale(0.1)))
    params, state = trained(tx, 2)
    updates, after = tx.update({"kernel": jnp.full((4, 6), jnp.nan)}, state, params)
    assert (updates["kernel"] == 0).all()
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert a.ndim == 0 or (a == b).all()


def test_the_direction_may_be_noise_or_a_sign():
    noise = optax.chain(optax.set_to_zero(), optax.add_noise(0.04, 0.0, 1))
    for direction, size in ((noise, 0.2), (optax.chain(optax.scale_by_sign(), optax.scale(0.3)), 0.3)):
        params, state = trained(go.extrapolate(optax.sgd(0.01), direction), 3)
        gap = params["kernel"] - go.evaluation_parameters(state, params)["kernel"]
        assert float(jnp.sqrt(jnp.mean(gap**2))) == pytest.approx(size, rel=0.5)


def test_what_is_missing_is_said():
    tx = go.extrapolate(optax.sgd(0.1), optax.scale(0.1))
    with pytest.raises(ValueError, match="extrapolate needs the parameters"):
        tx.update(START, tx.init(START))
    with pytest.raises(ValueError, match="extrapolate needs the gradient itself"):
        go.projected_update(tx, lambda p, b: loss(p) * jnp.sum(b), jnp.ones((2, 1)), tx.init(START), START)
    with pytest.raises(ValueError, match="extrapolates 1 leaves, and the parameters have 2"):
        go.evaluation_parameters(tx.init(START), START | {"bias": jnp.ones(2)})
    with pytest.raises(ValueError, match="needs a state of extrapolate"):
        go.evaluation_parameters(optax.sgd(0.1).init(START), START)


def test_it_works_on_a_flax_nnx_optimizer_and_on_some_of_the_leaves():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, go.extrapolate(optax.sgd(0.1), optax.scale(0.5)), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    gradients = jax.tree.map(jnp.ones_like, before)
    optimizer.update(model, gradients)
    found = go.evaluation_parameters(optimizer.opt_state, nnx.state(model, nnx.Param))
    expected = jax.tree.map(lambda x: x - 0.1, before)
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    params = {"extrapolation": jnp.ones(3), "frozen": jnp.ones(2)}
    tx = optax.masked(
        go.extrapolate(optax.sgd(0.1), optax.scale(0.5)), {"extrapolation": True, "frozen": False}
    )
    updates, state = tx.update(params, tx.init(params), params)
    found = go.evaluation_parameters(state, optax.apply_updates(params, updates))
    np.testing.assert_allclose(found["extrapolation"], 0.9, rtol=1e-6)
