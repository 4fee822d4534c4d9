"""GoLore, Fira, FRUGAL, Trion, Dion, COSMOS and Scion against their oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import run, sequence, steps_of
from oracles import (
    cosmos_steps,
    dct_matrix,
    dion_steps,
    ema,
    fira_steps,
    frugal_steps,
    golore_steps,
    jordan,
    oracle,
    trion_steps,
)

RANK, PERIOD = 3, 4


def rule_state(state):
    """The state of the rule under `skip_non_finite`, `partition`, `masked` and the chain."""
    return state.inner.inner_states["matrices"].inner_state[0]


def per_block(tree, name):
    return [np.float64(block) for block in np.reshape(tree[name], (-1, *tree[name].shape[-2:]))]


def test_golore_is_adam_in_its_subspaces_with_a_rotated_mean(leaves):
    steps, states = steps_of(go.golore(1.0, RANK, PERIOD, key=3), leaves)
    bases = [rule_state(s).projectors for s in states[1::PERIOD]]
    for name, gradients in leaves.items():
        projectors = [list(row) for row in zip(*(per_block(b, name) for b in bases), strict=True)]
        expected = oracle(
            lambda g, projectors: golore_steps(g, projectors, PERIOD), gradients, projectors=projectors
        )
        np.testing.assert_allclose(steps[name], expected, rtol=0, atol=2e-4)


def test_golore_takes_the_gradients_subspace_first_and_random_ones_later(leaves):
    def projectors(key):
        tx = go.golore(1.0, RANK, PERIOD, random_after=PERIOD, find_subspace=go.svd_subspace, key=key)
        return [rule_state(s).projectors["wide"] for s in steps_of(tx, leaves)[1][1::PERIOD]]

    (first, then, _), (other_first, other_then, _) = projectors(0), projectors(1)
    u = np.linalg.svd(leaves["wide"][0])[0][:, :RANK]
    np.testing.assert_allclose(np.abs(np.sum(first * u, axis=0)), 1, rtol=1e-5)
    np.testing.assert_array_equal(first, other_first)
    assert np.abs(then - other_then).max() > 0.1
    with pytest.raises(ValueError, match="random_after must be at least 0"):
        go.golore(1.0, random_after=-1)


def test_a_switched_finder_is_the_first_and_then_the_second():
    def constant(value):
        return lambda key, gradient, previous: jnp.full_like(previous, value)

    finder = go.switch_subspace(3, constant(1.0), constant(2.0))
    rule = go.low_rank(optax.identity(), 2, 1, find_subspace=finder)
    state, seen = rule.init(jnp.ones((4, 7))), []
    for _ in range(5):
        _, state = rule.update(jnp.ones((4, 7)), state)
        seen.append(float(state.projectors[0, 0]))
    assert seen == [1, 1, 1, 2, 2]

    # Nested switches: a finder whose turn would come too late or too early never runs.
    one, two, three = (constant(float(i)) for i in (1, 2, 3))
    early = go.switch_subspace(2, go.switch_subspace(1, one, two), three)
    late = go.switch_subspace(1, one, go.switch_subspace(2, two, three))
    never = go.switch_subspace(1, go.switch_subspace(2, one, two), three)
    assert early == late
    assert (early.steps, never.steps) == ((1, 2), (1,))
    assert never.finders == (one, three)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        go.switch_subspace(-1, go.svd_subspace, go.random_subspace)
    with pytest.raises(TypeError):
        go.switch_subspace(1, go.svd_subspace, "random")


def test_a_module_may_be_called_mu_and_a_mean_of_another_dtype_keeps_it(rng):
    g = {"mu": {"kernel": jnp.float32(rng.normal(size=(4, 7)))}}
    run(go.golore(1.0, 2, 1), [g] * 2)
    adam = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
    rule = go.low_rank(adam, 2, 1, on_refresh=go.rotate_first_moment)
    _, state = run(rule, [g] * 2)
    assert state.low.mu["mu"]["kernel"].dtype == jnp.bfloat16


def test_the_mean_can_only_be_rotated_where_there_is_one():
    rule = go.low_rank(optax.trace(0.9), RANK, PERIOD, on_refresh=go.rotate_first_moment)
    with pytest.raises(ValueError, match="needs a state with a field mu"):
        rule.init(jnp.ones((6, 9)))


@pytest.mark.parametrize("growth", [1.01, 1e6], ids=["limited", "free"])
def test_fira_is_its_algorithm(leaves, growth):
    # The gradients grow, so that the limiter acts.
    growing = {name: [(1 + t) * g for t, g in enumerate(gs)] for name, gs in leaves.items()}
    steps, _ = steps_of(
        go.fira(1.0, RANK, PERIOD, find_subspace=go.svd_subspace, norm_growth=growth), growing
    )
    for name, gradients in growing.items():
        expected = oracle(functools.partial(fira_steps, scale=1.0, growth=growth), gradients, RANK, PERIOD)
        np.testing.assert_allclose(steps[name], expected, rtol=0, atol=1e-3)


def test_firas_residual_rule_belongs_under_low_rank():
    with pytest.raises(ValueError, match="rule for low_rank"):
        run(go.scale_as_inside(), [jnp.ones((4, 7))])


def orthogonal_outside(x):
    o = jordan(x)
    return o * np.sqrt(x.size) / np.linalg.norm(o)


ORTHOGONAL = go.normalize(go.multi_norm((go.newton_schulz, go.unit_frobenius)))


@pytest.mark.parametrize(
    ("residual", "outside"), [(None, np.sign), (ORTHOGONAL, orthogonal_outside)], ids=["sign", "orthogonal"]
)
def test_frugal_is_its_algorithm(leaves, residual, outside):
    tx = go.frugal(1.0, RANK, PERIOD, find_subspace=go.svd_subspace, residual=residual)
    steps, _ = steps_of(tx, leaves)
    for name, gradients in leaves.items():
        expected = np.stack(oracle(functools.partial(frugal_steps, outside=outside), gradients, RANK, PERIOD))
        # The sign of an entry of rounding size is arbitrary: at most one in a hundred.
        close = np.abs(steps[name] - expected) < 1e-3
        assert close.mean() > 0.99


def test_the_raw_residual_is_the_identity_rule(leaves):
    inner = optax.chain(optax.trace(0.9), go.orthogonalize())
    raw, rule = (go.low_rank(inner, RANK, PERIOD, residual=r) for r in (go.add_raw, optax.identity()))
    g = [{"w": x} for x in leaves["stack"]]
    for a, b in zip(run(raw, g)[0], run(rule, g)[0], strict=True):
        np.testing.assert_allclose(a["w"], b["w"], atol=1e-4)
    with pytest.raises(TypeError, match="residual must be a function"):
        go.low_rank(inner, RANK, PERIOD, residual="drop")


@pytest.mark.parametrize("size", [1, 2, 7, 64, 3000])
def test_dct_columns_are_those_of_the_dct_matrix(size):
    rng = np.random.default_rng(size)
    m = rng.normal(size=(size, 5))
    rank = min(size, 4)
    p = np.asarray(go.dct_columns(jnp.float32(m), rank))
    d = dct_matrix(size)
    strongest = np.argsort(-np.abs(d.T @ m).sum(axis=1))[:rank]
    np.testing.assert_allclose(p, d[:, strongest], atol=2e-6)


def test_trion_is_its_algorithm(leaves):
    steps, states = steps_of(go.trion(1.0, RANK, momentum=0.8), leaves)
    for name, gradients in leaves.items():
        expected = oracle(trion_steps, gradients, RANK, 0.8)
        scale = 0.2 * np.sqrt(max(gradients[0].shape[-2:]))
        np.testing.assert_allclose(np.asarray(steps[name]) / scale, expected, rtol=0, atol=3e-4)
    # The state is only the momentum.
    kept = jax.tree.leaves(rule_state(states[0]))
    assert sum(x.size for x in kept) == 1 + sum(g[0].size for g in leaves.values())


def test_dion_is_its_algorithm(leaves):
    steps, states = steps_of(go.dion(1.0, RANK, momentum=0.8, key=5), leaves)
    start = rule_state(states[0]).right
    for name, gradients in leaves.items():
        expected = oracle(
            lambda g, q: dion_steps(g, q[0], 0.8), gradients, q=[[q] for q in per_block(start, name)]
        )
        fan_in, fan_out = gradients[0].shape[-2:]
        scaled = np.asarray(steps[name]) / np.sqrt(fan_out / fan_in)
        np.testing.assert_allclose(scaled, expected, rtol=0, atol=2e-3)


def spectral(x):
    return np.linalg.svd(np.asarray(x), compute_uv=False)


@pytest.mark.parametrize("rank_of_gradient", [0, 1, 2])
def test_dion_takes_no_step_where_the_momentum_is_only_rounding(rng, rank_of_gradient):
    g = np.float32(rng.normal(size=(8, rank_of_gradient)) @ rng.normal(size=(rank_of_gradient, 12)))
    updates, state = run(go.scale_by_dion(4), [g] * 3)
    for u in updates:
        assert (spectral(u)[rank_of_gradient:] < 1e-3).all()
        assert rank_of_gradient == 0 or spectral(u)[0] > 0.5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("first", [0.0, 1.0], ids=["after_zeros", "after_another"])
def test_dion_steps_once_in_a_direction_that_the_momentum_had_not(rng, first):
    """Columns of Q without a direction stay random: from zero they would all turn to the new direction."""
    a, c = np.float32(rng.normal(size=(2, 8, 1)))
    b, d = np.float32(rng.normal(size=(2, 1, 12)))
    values = [spectral(run(go.scale_by_dion(4, key=key), [first * a @ b, c @ d])[0][1]) for key in range(5)]
    # Columns of Q are unit vectors but not orthogonal: four in one direction would give 2.
    assert 0.9 < np.median(values, axis=0)[0] < 1.5
    assert (np.array(values)[:, 1 + int(first) :] < 1e-3).all()


@pytest.mark.parametrize("lost", [0, 1, 2, 40])
def test_dion_stays_finite_at_full_rank_on_momenta_that_have_not_that_rank(rng, lost):
    """The gradient of a kernel behind a layer norm has no component along the vector of ones."""
    size, seeds = 64, 100
    basis = np.linalg.qr(rng.normal(size=(seeds, size, size)))[0][..., : size - lost]
    g = np.float32(basis @ rng.normal(size=(seeds, size - lost, size)))
    updates, state = run(go.scale_by_dion(size), [g, 0.1 * g])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert (spectral(updates[1])[:, 0] > 0.5).all()


def test_feedback_keeps_all_of_the_momentum_but_a_share_of_what_it_stepped_in(rng):
    """M_new = M - (1 - μ) P PᵀM: the momentum loses nothing outside the subspace, and keeps μ inside it."""
    g = jnp.float32(rng.normal(size=(6, 9)))
    for rule, momentum in ((go.scale_by_trion(3, 0.7), 0.7), (go.scale_by_dion(3, 0.7), 0.7)):
        (step,), state = run(rule, [g])
        u, _, _ = np.linalg.svd(np.asarray(step))
        p = u[:, :3]
        np.testing.assert_allclose(state.momentum, g - (1 - momentum) * p @ (p.T @ np.asarray(g)), atol=1e-4)


def test_cosmos_is_its_algorithm(leaves):
    steps, states = steps_of(go.cosmos(1.0, RANK, key=5), leaves)
    start = rule_state(states[0]).basis
    for name, gradients in leaves.items():
        expected = oracle(
            lambda g, u: cosmos_steps(g, u[0]), gradients, u=[[u] for u in per_block(start, name)]
        )
        np.testing.assert_allclose(steps[name], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30])
def test_cosmos_takes_a_step_of_its_size_where_squares_are_not_finite(rng, scale):
    g = [{"w": np.float32(scale * rng.normal(size=(4, 7)))} for _ in range(4)]
    updates, state = run(go.cosmos(1.0, 2), g)
    for u in updates:
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(u["w"]))), 0.2, rtol=1e-3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_scion_takes_the_steepest_step_in_the_ball_of_each_kind_of_layer(rng):
    shapes = {"kernel": (6, 9), "bias": (9,), "gain": (), "norm_scale": (3, 9), "pos_embedding": (1, 7, 5)}
    gradients = {name: list(np.float32(rng.normal(size=(4, *shape)))) for name, shape in shapes.items()}
    # The vocabulary is larger than the width, and the head has fewer classes.
    gradients |= {"embedding": sequence(rng, (11, 5), 4), "lm_head": sequence(rng, (5, 11), 4)}
    gradients |= {"classifier": sequence(rng, (9, 4), 4)}
    momentum, radius, edge_radius = 0.7, 2.0, 3.0
    tx = go.scion(1.0, momentum=momentum, radius=radius, edge_radius=edge_radius)
    steps, _ = steps_of(tx, gradients)

    def rms(d):
        return radius * d / np.sqrt(np.mean(d**2, axis=-1, keepdims=True))

    def sign(width):
        return lambda d: edge_radius * np.sign(d) / width

    balls = {
        "kernel": lambda d: radius * np.sqrt(9 / 6) * jordan(d),
        "bias": rms,
        "gain": lambda d: radius * np.sign(d),
        "norm_scale": rms,
        "embedding": sign(5),
        "pos_embedding": sign(5),
        "lm_head": sign(5),
        "classifier": sign(9),
    }
    for name, ball in balls.items():
        expected = [ball(d) for d in ema([np.float64(g) for g in gradients[name]], momentum)]
        np.testing.assert_allclose(steps[name], expected, rtol=0, atol=1e-3, err_msg=name)


def test_constrained_scion_keeps_weights_in_the_balls(rng):
    params = {"kernel": 0.1 * jnp.ones((4, 7)), "bias": jnp.ones(7), "embedding": jnp.zeros((9, 4))}
    exact = functools.partial(go.spectral_lmo, method=go.polar)
    tx = go.scion(0.3, radius=2.0, edge_radius=3.0, lmo=exact, weight_decay=1.0)
    gradients = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(30):
        u, state = update(gradients, state, params)
        params = optax.apply_updates(params, u)
    # A long pull in one direction moves the weights to the surface of the ball, and they stay there.
    np.testing.assert_allclose(spectral(params["kernel"])[0], 2.0 * np.sqrt(7 / 4), rtol=1e-3)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(params["bias"]))), 2.0, rtol=1e-3)
    np.testing.assert_allclose(np.abs(params["embedding"]).max(), 3.0 / 4, rtol=1e-3)


def test_scions_mask_sees_the_whole_tree():
    params = {"layer": {"kernel": jnp.ones((4, 7)), "bias": jnp.ones(7)}, "empty": jnp.ones((0,))}

    def mask(tree):
        assert tree["layer"]["kernel"].ndim == 2
        return {"layer": {"kernel": True, "bias": False}, "empty": False}

    zeros = jax.tree.map(jnp.zeros_like, params)
    (u,), _ = run(go.scion(0.1, weight_decay=1.0, weight_decay_mask=mask), [zeros], params)
    np.testing.assert_allclose(u["layer"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(u["layer"]["bias"], 0)


LMOS = {
    # Each `lmo` with its norm and the dual norm, for 5 outputs and 7 inputs.
    "spectral": (
        functools.partial(go.spectral_lmo, method=go.polar),
        lambda z: np.linalg.norm(z, 2) * np.sqrt(7 / 5),
        lambda d: np.linalg.norm(d, "nuc") * np.sqrt(5 / 7),
    ),
    "sign": (go.sign_lmo, lambda z: np.abs(z).max() * 7, lambda d: np.abs(d).sum() / 7),
    "row": (
        go.row_lmo,
        lambda z: np.linalg.norm(z, axis=1).max() * np.sqrt(7),
        lambda d: np.linalg.norm(d, axis=1).sum() / np.sqrt(7),
    ),
    "column": (
        go.column_lmo,
        lambda z: np.linalg.norm(z, axis=0).max() / np.sqrt(5),
        lambda d: np.linalg.norm(d, axis=0).sum() * np.sqrt(5),
    ),
}


@pytest.mark.parametrize(("lmo", "size", "dual"), LMOS.values(), ids=LMOS)
def test_an_lmo_is_the_maximizer_on_its_unit_ball(rng, lmo, size, dual):
    d = rng.normal(size=(5, 7))
    z = np.float64(lmo(jnp.float32(d)))
    np.testing.assert_allclose(size(z), 1, rtol=1e-4)
    np.testing.assert_allclose(np.vdot(d, z), dual(d), rtol=1e-4)
    np.testing.assert_array_equal(lmo(jnp.zeros((5, 7))), 0)


def test_bad_input_is_refused():
    for make in (go.trion, go.dion, go.cosmos):
        with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
            make(1.0, 0)
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1, got 1"):
        go.dion(1.0, momentum=1)
    with pytest.raises(ValueError, match="ratio must be at least 0, got -1"):
        go.cosmos(1.0, ratio=-1)
    with pytest.raises(TypeError, match="lmo must be a function"):
        go.scion(1.0, lmo="spectral")
    with pytest.raises(ValueError, match=r"norm_growth must be at least 1, got 0\.5"):
        go.fira(1.0, norm_growth=0.5)
    with pytest.raises(ValueError, match="radius must be at least 0, got -1"):
        go.scion(1.0, radius=-1)
    with pytest.raises(ValueError, match="b1 must be at least 0 and below 1, got 1"):
        go.frugal(1.0, b1=1)
    with pytest.raises(ValueError, match="rank must be at most 4"):
        go.dct_columns(jnp.ones((4, 7)), 5)
