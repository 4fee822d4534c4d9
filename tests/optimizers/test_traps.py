"""Faults of a plain implementation: rounding as a step, poisoned state, full-size buffers."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import OPTIMIZERS, muon_rule, run, sequence

EVERY = {name: functools.cache(functools.partial(make, 0.1, **kw)) for name, (make, kw) in OPTIMIZERS.items()}
every_optimizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


@pytest.mark.parametrize("finder", [go.svd_subspace, go.subspace_iteration])
def test_a_sampled_block_of_a_rank_deficient_gradient_does_not_move(rng, finder):
    """The residual is rounding; orthogonalization would make it a random step of spectral norm 1.13."""
    gradients = [np.float32(rng.normal(size=(6, 8, 2)) @ rng.normal(size=(6, 2, 12))) for _ in range(6)]
    rule = go.unbiased_low_rank(muon_rule(), 3, 1, 0.34, find_subspace=finder)
    state = jax.jit(rule.init)(gradients[0])
    update = jax.jit(rule.update)
    for g in gradients:
        step, state = update(g, state)
        sampled = np.asarray(state.outside.index["8x12"])
        np.testing.assert_array_equal(step[sampled], 0)
        moving = np.linalg.norm(np.delete(step, sampled, axis=0), axis=(1, 2))
        assert (moving > 0.5).all()


@every_optimizer
def test_zero_gradients_give_zero_steps(make):
    params = {"w": jnp.ones((6, 4, 7)), "v": jnp.ones((7, 4)), "embed": {"embedding": jnp.ones((5, 4))}}
    updates, state = run(make(), [jax.tree.map(jnp.zeros_like, params)] * 5, params)
    for update in updates:
        for leaf in jax.tree.leaves(update):
            np.testing.assert_array_equal(leaf, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@every_optimizer
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_skipped_as_if_it_had_not_come(make, bad):
    """All leaves skip at once here: the state stays unchanged, clocks included."""
    rng = np.random.default_rng(0)
    good = [{"w": g, "b": g[0, 0]} for g in sequence(rng, (5, 4, 7), 7)]
    poisoned = list(good)
    for place in (0, 4, 7):  # the first step, a step within a period, a refresh
        spoilt = {name: g.copy() for name, g in good[min(place, 6)].items()}
        for leaf in spoilt.values():
            leaf.flat[1] = bad
        poisoned.insert(place, spoilt)
    expected, reference = run(make(), good)
    updates, state = run(make(), poisoned)
    kept = [u for i, u in enumerate(updates) if i not in (0, 4, 7)]
    for x, y in zip(kept, expected, strict=True):
        np.testing.assert_array_equal(x["w"], y["w"])
        np.testing.assert_array_equal(x["b"], y["b"])
    for i in (0, 4, 7):
        assert not any(leaf.any() for leaf in jax.tree.leaves(updates[i]))
    assert int(go.metrics(state)["skipped_steps"]) == 3
    jax.tree.map(np.testing.assert_array_equal, state.inner, reference.inner)


def test_a_schedule_waits_for_a_skipped_step_and_one_of_inject_hyperparams_does_not():
    good = {"w": np.ones((4, 7), np.float32)}
    bad = {"w": np.full((4, 7), np.nan, np.float32)}
    constant, _ = run(go.gum(1.0, rank=2), [good] * 3)

    def rate(count):
        return jnp.where(count == 0, 1.0, 2.0**-count)

    injected = optax.inject_hyperparams(go.gum, static_args=("rank", "period", "full_rank_fraction"))
    for tx, rates in ((go.gum(rate, rank=2), (1, 1 / 2, 1 / 4)), (injected(rate, rank=2), (1, 1 / 4, 1 / 8))):
        updates, _ = run(tx, [good, bad, good, good], good)
        assert not updates[1]["w"].any()
        for u, c, expected in zip((updates[0], *updates[2:]), constant, rates, strict=True):
            np.testing.assert_allclose(u["w"], expected * c["w"], rtol=1e-6)


@every_optimizer
@pytest.mark.parametrize(("bad", "good"), ["ab", "ba"])
def test_a_leaf_whose_gradient_is_not_finite_does_not_step_and_the_other_does(make, bad, good):
    """The other matrix steps as usual; the leaf's own state stays unchanged, bit for bit."""
    rng = np.random.default_rng(0)
    gradients = [{"a": a, "b": b} for a, b in zip(*(sequence(rng, (2, 4, 7), 2) for _ in "ab"), strict=True)]
    tx = make()
    update = jax.jit(tx.update)
    params = jax.tree.map(np.ones_like, gradients[0])
    _, before = update(gradients[0], jax.jit(tx.init)(params), params)
    expected, _ = update(gradients[1], before, params)
    steps, after = update(gradients[1] | {bad: np.full_like(gradients[1][bad], np.nan)}, before, params)
    assert not steps[bad].any()
    assert np.signbit(steps[bad] + np.float32(-0.0)).all()  # no parameter changes by a bit
    np.testing.assert_array_equal(steps[good], expected[good])
    assert expected[bad].any()
    assert int(go.metrics(after)["skipped_steps"]) == 1
    found = zip(jax.tree_util.tree_leaves_with_path(after.inner), jax.tree.leaves(before.inner), strict=True)
    for (path, x), y in found:
        assert np.isfinite(x).all(), path
        if x.ndim == 0 or f"'{bad}'" in jax.tree_util.keystr(path):  # counts count whole steps
            np.testing.assert_array_equal(x, y, err_msg=str(path))


@every_optimizer
def test_wrapped_in_skip_non_finite_a_step_is_skipped_whole(make):
    rng = np.random.default_rng(0)
    good = [{"w": g, "b": g[0, 0]} for g in sequence(rng, (5, 4, 7), 2)]
    bad = good[1] | {"b": np.full_like(good[1]["b"], np.nan)}
    tx = go.skip_non_finite(make())
    updates, state = run(tx, [good[0], bad])
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates[1]))
    assert int(go.metrics(state)["skipped_steps"]) == 1
    jax.tree.map(np.testing.assert_array_equal, state.inner, run(tx, [good[0]])[1].inner)


@pytest.mark.parametrize("bad", [complex(0, np.nan), complex(np.inf, 0)])
def test_a_complex_gradient_is_skipped_for_either_part(bad):
    params = {"kernel": jnp.ones((4, 6)), "phase": jnp.ones(3, jnp.complex64)}
    spoilt = params | {"phase": params["phase"].at[1].set(bad)}
    updates, state = run(EVERY["gum"](), [params, spoilt], params)
    assert updates[0]["phase"].any()
    assert updates[1]["kernel"].any()
    assert not updates[1]["phase"].any()
    assert int(go.metrics(state)["skipped_steps"]) == 1


# Without Adam's rules, which have an ε, and SUMO, whose raw residual has the size of the gradient.
SCALE_FREE = ["muon", "galore_muon", "gum", "swan", "sinkgd", "trion", "dion", "scion"]


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_steps_do_not_depend_on_the_scale_of_the_gradient(name, scale):
    make = EVERY[name]
    gradients = [{"w": g} for g in sequence(np.random.default_rng(0), (5, 4, 7), 5)]
    scaled = [{"w": np.float32(scale) * g["w"]} for g in gradients]
    (a, _), (b, state) = run(make(), gradients), run(make(), scaled)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x["w"], y["w"], atol=1e-3)
    assert all(np.isfinite(x).all() for x in go.metrics(state).values())


@every_optimizer
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_finite_gradient_stops_an_optimizer_for_good(make, scale):
    """An overflowing square would make a second moment infinite, and every later step zero."""
    gradients = [{"w": g} for g in sequence(np.random.default_rng(0), (5, 4, 7), 3)]
    gradients[0] = {"w": np.float32(scale) * gradients[0]["w"]}
    updates, state = run(make(), gradients)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert all(u["w"].any(axis=(1, 2)).all() for u in updates[1:])


def hard_gradients():
    """Blocks `4 × 7`: condition 1e8, rank one, constant, one entry, a zero row and column; also scaled."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0][:, :4] for n in (4, 7))
    one, holes = np.zeros((4, 7)), rng.normal(size=(4, 7))
    one[1, 2], holes[0], holes[:, 0] = 1, 0, 0
    blocks = np.stack(
        [(u * 10.0 ** np.linspace(0, -8, 4)) @ v.T, u[:, :1] @ v.T[:1], np.ones((4, 7)), one, holes]
    )
    scales = 10.0 ** np.array([-30, -10, 0, 10, 30])[:, None, None]
    return [
        {"w": x.astype(np.float32)} for x in (blocks, blocks[::-1], blocks * scales, blocks[::-1] / scales)
    ]


@pytest.mark.parametrize("name", EVERY)
def test_ill_conditioned_and_deficient_gradients_give_finite_steps_and_orthonormal_subspaces(name):
    updates, state = run(EVERY[name](), hard_gradients() * 2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    # A sampled block of GUM has no residual here, and a standardized constant is zero.
    if name not in ("gum", "swan"):
        assert all(u["w"].any(axis=(1, 2)).all() for u in updates)
    assert orthonormality_gap(state) < 1e-5


def orthonormality_gap(state):
    """The largest entry of `PᵀP - I` over all projectors."""
    rules = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, go.LowRankState))
    projectors = [p for x in rules if isinstance(x, go.LowRankState) for p in jax.tree.leaves(x.projectors)]
    return max((float(jnp.abs(p.mT @ p - jnp.eye(p.shape[-1])).max()) for p in projectors), default=0)


@pytest.mark.parametrize(
    "name", ["gum", *(pytest.param(x, marks=pytest.mark.long) for x in ("galore_muon", "sumo", "golore"))]
)
def test_ten_thousand_steps_leave_the_subspace_orthonormal(name):
    tx, shape = EVERY[name](), (5, 4, 7)

    def step(state, key):
        g = jax.random.normal(key, shape) + jnp.ones(shape)
        u, state = tx.update({"w": g}, state)
        return state, jnp.isfinite(u["w"]).all()

    state = tx.init({"w": jnp.zeros(shape)})
    state, finite = jax.jit(lambda s, keys: jax.lax.scan(step, s, keys))(
        state, jax.random.split(jax.random.key(0), 10_000)
    )
    assert finite.all()
    assert orthonormality_gap(state) < 1e-5
    assert int(go.metrics(state)["refresh_count"]) == -(-10_000 // 3)


def numbers(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("blocks", "fraction", "slots"), [(12, 1 / 12, 1), (10, 0.4, 4), (6, 0.0, 0)])
def test_state_is_r_m_plus_n_and_the_slots_share_of_mn_a_block(blocks, fraction, slots):
    m, n, r = 16, 40, 4
    tx = go.as_matrices(go.unbiased_low_rank(muon_rule(), r, 5, fraction))
    half = {"a": jnp.zeros((blocks // 2, m, n)), "b": jnp.zeros((blocks // 2, n, m))}
    state = jax.eval_shape(tx.init, half)
    q = slots / blocks
    formula = blocks * (r * (m + n) + q * m * n)
    counts = (state.count, state.refreshes, state.period, state.key, state.captured)
    small = numbers((counts, state.outside.index))
    assert numbers(state) - small == formula + (0 if slots else 1)  # without slots, `slots` is the scalar 0
    assert small == 4 + 2 + (slots or 1)


def test_only_slots_hold_full_size_momentum_once_for_each_group():
    m, n = 16, 40
    params = {f"layer_{i}": {"kernel": jnp.zeros((m, n))} for i in range(12)}
    state = jax.eval_shape(go.gum(0.1, rank=4, full_rank_fraction=1 / 6).init, params)
    full_size = [x for x in jax.tree.leaves(state) if x.ndim >= 2 and x.shape[-2:] in ((m, n), (n, m))]
    assert [x.shape for x in full_size] == [(2, m, n)]


def test_gradients_and_updates_are_never_concatenated():
    """No operation of the compiled step gathers the blocks of several leaves into one array."""
    layers, m, n = 8, 32, 64
    params = {f"layer_{i}": {"kernel": jnp.zeros((m, n))} for i in range(layers)}
    tx = go.gum(0.1, rank=4, full_rank_fraction=1 / 4)
    state = jax.eval_shape(tx.init, params)
    text = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile().as_text()
    sizes = []
    for shape, operation in re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", text):
        if operation not in ("parameter", "get-tuple-element", "tuple"):
            sizes.append(int(np.prod([int(d) for d in shape.split(",")])))
    assert max(sizes) == 2 * m * n  # the two slots


def test_a_stack_of_layers_is_updated_without_a_copy_of_all_of_it_but_the_step():
    """One stacked leaf costs its step, its coordinates and its slots, not its size again."""
    blocks, m, n = 16, 64, 128
    params = {"kernel": jnp.zeros((blocks, m, n))}
    tx = go.gum(0.1, rank=4, full_rank_fraction=1 / 16)
    state = jax.eval_shape(tx.init, params)

    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params).compile()
    whole, coordinates, slots = 4 * blocks * m * n, 4 * blocks * 4 * n, 4 * m * n
    # On a CPU the step has its own buffer, as the result of a product; the rest has the size of the state.
    assert compiled.memory_analysis().temp_size_in_bytes < whole + 4 * (coordinates + slots)


def test_the_guard_takes_what_optax_takes_for_numbers():
    params = {"a": 1.0, "b": np.float32(2), "c": jnp.zeros(0)}
    tx = go.skip_non_finite(optax.sgd(0.5))
    steps, state = tx.update(params, tx.init(params))
    chex.assert_trees_all_equal(steps, jax.tree.map(lambda x: jnp.asarray(-0.5 * x, jnp.float32), params))
    steps, state = tx.update(params | {"a": np.inf}, state)
    assert int(state.skipped) == 1
    assert not any(x.any() for x in jax.tree.leaves(steps))
