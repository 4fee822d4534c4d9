"""The mean over draws of the lifted input of the inner rule is the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go
from gum_optax._lowrank import blocks, gather, slots
from gum_optax._matrices.dimension_numbers import LAST_TWO
from gum_optax._matrices.view import plain_view, view_of

from helpers import muon_rule

L, SLOTS, M, N, RANK, DRAWS = 5, 2, 4, 6, 2, 3000
Q = SLOTS / L
COMPENSATIONS = {"complement": go.complement, "low_variance": go.low_variance}


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    gradients = jnp.float32(rng.normal(size=(3, L, M, N)))
    # A subspace that depends neither on the draw nor on the gradient gives the strongest form of the test.
    p = jnp.float32(np.linalg.qr(rng.normal(size=(L, M, RANK)))[0])
    return gradients, p


def estimates(problem, compensation, inner):
    """The lifted steps of a linear inner rule, `(draws, steps, L, m, n)`, and the sampled blocks."""
    gradients, p = problem

    def one(seed):
        tx = go.unbiased_low_rank(
            inner, RANK, 10, Q, find_subspace=lambda key, g, previous: p, compensation=compensation, key=seed
        )
        state, steps = tx.init(gradients[0]), []
        for g in gradients:
            step, state = tx.update(g, state)
            steps.append(step)
        return jnp.stack(steps), state.outside.index[f"{M}x{N}"]

    return jax.jit(jax.vmap(one))(jnp.arange(DRAWS))


@pytest.mark.parametrize("compensation", COMPENSATIONS.values(), ids=COMPENSATIONS)
@pytest.mark.parametrize("beta", [0.0, 0.9], ids=["identity", "trace"])
def test_the_mean_over_draws_is_the_full_rule(problem, compensation, beta):
    inner = optax.trace(beta) if beta else optax.identity()
    steps, _ = estimates(problem, compensation, inner)
    expected, momentum = [], 0.0
    for g in np.float64(problem[0]):
        momentum = beta * momentum + g
        expected.append(momentum)
    steps = np.float64(steps)
    z = (steps.mean(0) - expected) / (steps.std(0) / np.sqrt(DRAWS))
    # The test bounds the largest of the normal scores of fixed seeds, one for each step and block.
    assert np.abs(z).max() < 4.5
    assert (steps.std(0) > 0).all()  # the score of a constant has no meaning


NOT_LINEAR = {"adam": optax.scale_by_adam(), "lion": optax.scale_by_lion(), "muon": muon_rule()}


@pytest.mark.parametrize("inner", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_the_step_of_a_rule_that_is_not_linear_is_biased(problem, inner):
    """The claim of the documents, with the same score."""
    steps, _ = estimates(problem, go.complement, inner)
    state, expected = inner.init(problem[0][0]), []
    for g in problem[0]:
        step, state = inner.update(g, state)
        expected.append(step)
    steps = np.float64(steps)
    z = (steps.mean(0) - np.float64(expected)) / (steps.std(0) / np.sqrt(DRAWS))
    assert np.abs(z).max() > 20


@pytest.mark.parametrize("compensation", COMPENSATIONS.values(), ids=COMPENSATIONS)
def test_the_variance_is_the_formulas(problem, compensation):
    steps, _ = estimates(problem, compensation, optax.identity())
    gradients, p = np.float64(problem[0]), np.float64(problem[1])
    inside = p @ np.swapaxes(p, -1, -2) @ gradients
    a = np.sum(inside**2, axis=(-2, -1))
    b = np.sum((gradients - inside) ** 2, axis=(-2, -1))
    formula = {
        "complement": Q / (1 - Q) * a + (1 - Q) / Q * b,
        "low_variance": (1 - Q) / Q * b,
    }[compensation.__name__]
    squares = np.sum((np.float64(steps) - gradients) ** 2, axis=(-2, -1))
    # The variable has two values, so the same sample gives the standard error of its mean square.
    z = (squares.mean(0) - formula) / (squares.std(0) / np.sqrt(DRAWS))
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("compensation", COMPENSATIONS.values(), ids=COMPENSATIONS)
@pytest.mark.parametrize("q", [1 / 16, 0.4, 0.9])
def test_weights_satisfy_the_two_conditions_of_unbiasedness(compensation, q):
    weights = compensation(q)
    np.testing.assert_allclose((1 - q) * weights.low + q * weights.inside, 1)
    np.testing.assert_allclose(q * weights.outside, 1)


def test_dropping_what_lies_outside_is_biased_and_the_test_sees_it(problem):
    """The same z-score is large for plain low rank, so the check above can fail."""
    gradients, p = problem
    tx = go.low_rank(optax.identity(), RANK, 10, find_subspace=lambda key, g, previous: p)
    step, _ = tx.update(gradients[0], tx.init(gradients[0]))
    assert float(jnp.abs(step - gradients[0]).max()) > 0.1


def test_a_users_own_compensation_is_a_function_of_q(problem):
    gradients, p = problem

    def halved(q):
        return go.Weights(low=0.5, inside=0.25, outside=2.0)

    tx = go.unbiased_low_rank(
        optax.identity(), RANK, 10, Q, find_subspace=lambda key, g, previous: p, compensation=halved, key=1
    )
    g = gradients[0]
    step, state = tx.update(g, tx.init(g))
    inside = p @ (p.mT @ g)
    expected = np.array(0.5 * inside)
    for block in np.asarray(state.outside.index[f"{M}x{N}"]):
        expected[block] = 0.25 * inside[block] + 2 * (g - inside)[block]
    np.testing.assert_allclose(step, expected, atol=1e-5)


@pytest.mark.parametrize("sizes", [(3, 2), (1, 3), (1, 1)])
def test_blocks_are_gathered_the_same_by_slot_and_early(sizes):
    rng = np.random.default_rng(0)
    leaves = [rng.standard_normal((size, 3, 4), np.float32) for size in sizes]
    projectors = [rng.standard_normal((size, 3, 2), np.float32) for size in sizes]
    group = slots.Group("3x4", (3, 4), tuple(range(len(sizes))), sizes, 2)
    members = [
        [(jnp.asarray(x), plain_view(x)) for x in pair] for pair in zip(leaves, projectors, strict=True)
    ]
    orders = [gather.gather_by_slot] + [gather.gather_early] * (set(sizes) == {1})
    blocks_of = [np.concatenate(arrays) for arrays in (leaves, projectors)]
    for index in ([0, 1], [sum(sizes) - 1, 0]):
        expected = [g - p @ (p.T @ g) for g, p in zip(*(x[index] for x in blocks_of), strict=True)]
        for order in orders:
            found = order(lambda g, p: g - p @ (p.T @ g), members, jnp.asarray(index), group)
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=order.__name__)


@pytest.mark.parametrize("held", [(-1, 0, -1, 1, -1, 2), (2, -1, 1, 0, -1, -1), (-1,) * 6])
def test_slots_are_written_back_the_same_by_choice_and_sequentially(held):
    rng = np.random.default_rng(0)
    leaf, values = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((3, 4, 5))
    expected = leaf.reshape(6, 4, 5).copy()
    for block, slot in enumerate(held):
        expected[block] = values[slot] if slot >= 0 else expected[block]
    for put in (slots._by_choice, slots._sequentially):
        found = put(jnp.asarray(leaf), jnp.asarray(values), jnp.asarray(held))
        np.testing.assert_array_equal(found, np.float32(expected).reshape(leaf.shape))


@pytest.mark.parametrize("held", [-1, 0, 2])
@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5)])
def test_a_slot_is_written_back_to_a_single_matrix(held, shape):
    rng = np.random.default_rng(2)
    leaf, values = rng.standard_normal(shape), rng.standard_normal((3, 4, 5))
    found = slots.scatter_blocks(jnp.asarray(leaf), jnp.asarray(values), jnp.asarray([held]))
    np.testing.assert_array_equal(found, np.float32(leaf if held < 0 else values[held].reshape(shape)))


@pytest.mark.parametrize("sizes", [(3, 2), (1, 1, 1), (1, 4)], ids=str)
def test_a_slot_reads_its_block_of_stacks_of_single_matrices_and_of_both(sizes):
    rng = np.random.default_rng(1)
    leaves = [rng.standard_normal((size, 6, 4)).astype(np.float32) for size in sizes]
    views = [view_of((), x, LAST_TWO, wide=True) for x in leaves]
    members = [((jnp.asarray(x), view),) for x, view in zip(leaves, views, strict=True)]
    for place, x in enumerate(leaves):
        for number in range(len(x)):
            (block,) = blocks.read(members, jnp.int32(place), jnp.int32(number))
            np.testing.assert_array_equal(block, x[number].T)


def with_a_slot_in_each_leaf(inner, params):
    """GUM of `inner` whose two slots hold a block of the first leaf and one of the second, with its state."""
    for key in range(99):
        rule = go.unbiased_low_rank(inner, 1, 9, 0.5, key=key)
        tx = go.matrix_optimizer(rule, 1.0, 1.0)
        state = tx.init(params)
        outside = state.inner.inner_states["matrices"].inner_state[0].outside
        if sorted(np.asarray(outside.index["4x6"]) // 2) == [0, 1]:
            return tx, state
    raise AssertionError


@pytest.mark.parametrize("rank", [1, 2])  # two as there are slots: a mask of slots then fits the wrong axis
def test_a_low_rank_rule_in_the_slots_keeps_the_state_of_a_leaf_that_skips(rng, rank):
    """The other slot goes on as if nothing had happened, over a refresh in the slots."""
    gradients = [{name: np.float32(rng.normal(size=(2, 4, 6))) for name in ("down", "up")} for _ in range(3)]
    inner = go.low_rank(go.scale_by_muon(), rank, 2, on_refresh=go.rotate)
    tx, state = with_a_slot_in_each_leaf(inner, gradients[0])
    update = jax.jit(tx.update)

    def slots_of(state):
        outside = state.inner.inner_states["matrices"].inner_state[0].outside
        return np.asarray(outside.index["4x6"]) // 2, (outside.slots.projectors, outside.slots.low)

    for g in gradients[:2]:
        _, state = update(g, state)
    leaf_of_slot, before = slots_of(state)
    _, expected = slots_of(update(gradients[2], state)[1])
    _, found = slots_of(update(gradients[2] | {"up": np.full((2, 4, 6), np.nan, np.float32)}, state)[1])
    for slot, leaf in enumerate(leaf_of_slot):
        wanted = before if leaf else expected
        rows = zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
        for x, y in rows:
            if x.ndim == 3:
                np.testing.assert_allclose(x[slot], y[slot], atol=1e-6)
