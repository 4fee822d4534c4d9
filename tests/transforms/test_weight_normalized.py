"""Weight normalization: the chain rule, norms that change by their own step, and columns of zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import run


def gradnormlorp(rate, rank=2, period=3, **arguments):
    galore = go.as_matrices(go.low_rank(optax.scale_by_adam(), rank, period))
    inner = optax.chain(galore, optax.scale_by_learning_rate(rate))
    rule = go.weight_normalized(inner, optax.adam(rate))
    return go.matrix_optimizer(optax.chain(rule, optax.scale(-1.0)), 1.0, 1.0, wide=False, **arguments)


@pytest.fixture
def leaves(rng):
    shapes = {"wide": (6, 9), "tall": (9, 6), "stack": (3, 6, 9)}
    return [{name: jnp.float32(rng.normal(size=x)) for name, x in shapes.items()} for _ in range(5)]


def test_a_step_is_weight_normalizations(leaves):
    """The gradients of `W = g v / |v|` by autodiff at `v = W`, `g = |W|`; then the two steps."""
    w, gradient = leaves[0]["tall"], leaves[1]["tall"]
    (found,), _ = run(go.weight_normalized(optax.sgd(0.3), optax.sgd(0.2)), [{"w": gradient}], {"w": w})

    def product(v, g):
        return jnp.sum(gradient * g * v / jnp.linalg.norm(v, axis=0))

    v, g = np.float64(w), np.linalg.norm(np.float64(w), axis=0)
    dv, dg = jax.grad(product, (0, 1))(w, jnp.linalg.norm(w, axis=0))
    turned = v - 0.3 * np.float64(dv)
    expected = (g - 0.2 * np.float64(dg)) * turned / np.linalg.norm(turned, axis=0) - v
    np.testing.assert_allclose(found["w"], expected, rtol=1e-4, atol=1e-5)


def test_to_first_order_two_sgds_are_sgd(leaves):
    w, gradient = {"w": leaves[0]["stack"]}, {"w": leaves[1]["stack"]}
    for rate in (1e-2, 1e-3):
        (found,), _ = run(go.weight_normalized(optax.sgd(rate), optax.sgd(rate)), [gradient], w)
        gap = np.abs(found["w"] / rate + gradient["w"]).max()
        assert gap < 10 * rate + 1e-3  # float32 rounds W' - W


def test_norms_change_by_their_own_step_exactly(leaves):
    params = leaves[0]
    tx = go.weight_normalized(optax.sgd(0.3), optax.set_to_zero())
    (updates,), _ = run(tx, leaves[1:2], params)
    for name, w in optax.apply_updates(params, updates).items():
        before, after = (np.linalg.norm(np.float64(x), axis=-2) for x in (params[name], w))
        np.testing.assert_allclose(after, before, rtol=1e-6)
        assert np.abs(w - params[name]).max() > 0.1
    constant = optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.full_like(x, 0.25), g))
    (updates,), _ = run(go.weight_normalized(optax.sgd(0.3), constant), leaves[1:2], params)
    for name, w in optax.apply_updates(params, updates).items():
        before, after = (np.linalg.norm(np.float64(x), axis=-2) for x in (params[name], w))
        np.testing.assert_allclose(after, before + 0.25, rtol=1e-6)


def test_decay_of_the_magnitude_shrinks_the_norms(leaves):
    params = leaves[0]
    magnitude = optax.chain(optax.set_to_zero(), optax.add_decayed_weights(0.1), optax.scale(-1.0))
    (updates,), _ = run(go.weight_normalized(optax.set_to_zero(), magnitude), leaves[1:2], params)
    jax.tree.map(lambda u, w: np.testing.assert_allclose(u, -0.1 * w, rtol=1e-4, atol=1e-6), updates, params)


def test_columns_of_zeros_step_and_no_step_stays():
    params, gradient = {"w": jnp.zeros((4, 3))}, {"w": jnp.ones((4, 3))}
    (updates,), _ = run(go.weight_normalized(optax.sgd(0.5), optax.sgd(0.5)), [gradient], params)
    np.testing.assert_array_equal(updates["w"], np.full((4, 3), -0.5))
    (updates,), _ = run(go.weight_normalized(optax.sgd(0.5), optax.sgd(0.5)), [params], params)
    np.testing.assert_array_equal(updates["w"], 0)


def test_gradnormlorp_has_the_state_of_the_exact_form_and_descends(leaves):
    params = {"kernel": leaves[0]["wide"]}
    state = jax.eval_shape(gradnormlorp(0.1).init, params)
    numbers = sum(x.size for x in jax.tree.leaves(state) if x.ndim >= 2)
    assert numbers == 6 * 2 + 2 * 2 * 9 + 2 * 9
    tx, target = gradnormlorp(0.05), leaves[1]["wide"]

    def loss(params):
        return jnp.mean((params["kernel"] - target) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    first, state = loss(params), tx.init(params)
    for _ in range(200):
        params, state = step(params, state)
    assert float(loss(params)) < 0.05 * float(first)


def test_a_gradient_that_is_not_finite_moves_nothing(leaves):
    params = {"kernel": leaves[0]["stack"]}
    (updates,), state = run(gradnormlorp(0.1), [{"kernel": jnp.full((3, 6, 9), jnp.inf)}], params)
    assert not updates["kernel"].any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_it_needs_parameters(leaves):
    tx = go.weight_normalized(optax.sgd(0.1), optax.sgd(0.1))
    with pytest.raises(ValueError, match="weight_normalized needs the parameters"):
        tx.update(leaves[0], tx.init(leaves[0]))


def test_the_state_keeps_its_types_beside_weights_in_bfloat16(leaves):
    params = {"w": leaves[0]["wide"].astype(jnp.bfloat16)}
    tx = go.weight_normalized(optax.adam(0.1), optax.adam(0.1))
    state = tx.init(params)
    _, after = tx.update(params, state, params)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
