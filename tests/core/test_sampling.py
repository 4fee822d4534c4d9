"""The draw takes exactly γ of L blocks, every block with frequency q, and is new in each period."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gum_optax as go
from gum_optax._core.keys import key_data, streams

from helpers import AMPLIFIED, muon_rule, run

KEY = np.asarray([0, 7], np.uint32)


def periods(key, count, blocks, k, group="6x9"):
    """The draws of the first `count` periods, `(count, k)`."""
    draws = jax.jit(jax.vmap(lambda p: go.draw(jnp.asarray(key), p, group, blocks, k)))
    return np.asarray(draws(jnp.arange(count)))


@given(st.integers(1, 40), st.data())
def test_exactly_k_different_blocks_are_drawn(blocks, data):
    k = data.draw(st.integers(1, blocks))
    index = np.asarray(go.draw(jnp.asarray(KEY), jnp.int32(3), "g", blocks, k))
    assert index.shape == (k,)
    assert index.dtype == np.int32
    assert len(set(index.tolist())) == k
    assert index.min() >= 0
    assert index.max() < blocks


def test_every_block_is_drawn_with_frequency_q():
    count, blocks, k = 4000, 7, 2
    hits = np.bincount(periods(KEY, count, blocks, k).ravel(), minlength=blocks)
    q = k / blocks
    z = (hits - count * q) / np.sqrt(count * q * (1 - q))
    # Seven correlated normal scores for a fixed seed; one in two thousand seeds exceeds 4 sigma.
    assert np.abs(z).max() < 4


def test_pairs_of_blocks_are_drawn_as_without_replacement():
    count, blocks = 4000, 5
    drawn = np.sort(periods(KEY, count, blocks, 2), axis=1)
    pairs, hits = np.unique(drawn, axis=0, return_counts=True)
    assert len(pairs) == 10
    z = (hits - count / 10) / np.sqrt(count * 0.1 * 0.9)
    assert np.abs(z).max() < 4


def test_each_period_and_each_group_draws_afresh():
    a, b = periods(KEY, 200, 20, 1), periods(KEY, 200, 20, 1, group="9x9")
    # Independent draws agree with probability 1/20.
    for same in (a[1:] == a[:-1], a == b):
        z = (same.mean() - 1 / 20) / np.sqrt(1 / 20 * 19 / 20 / same.size)
        assert abs(z) < 4


def test_the_draw_changes_at_refreshes_and_only_there():
    tx = go.as_matrices(go.unbiased_low_rank(muon_rule(), 2, 3, 0.25, key=5))
    gradients = [{"w": np.ones((12, 4, 5), np.float32) * (t + 1)} for t in range(12)]
    state = jax.jit(tx.init)(gradients[0])
    update, drawn = jax.jit(tx.update), []
    for g in gradients:
        _, state = update(g, state)
        drawn.append(np.asarray(state.outside.index["4x5"]))
    expected = np.asarray([go.draw(state.key, jnp.int32(t // 3), "4x5", 12, 3) for t in range(12)])
    np.testing.assert_array_equal(drawn, expected)
    assert len({tuple(d) for d in drawn}) == 4


@pytest.mark.parametrize("jit", [False, True])
def test_the_same_key_draws_the_same_whatever_its_form(jit):
    wrap = jax.jit if jit else lambda f: f
    gradients = [{"w": np.ones((12, 4, 5), np.float32)}]
    drawn = []
    for key in (7, np.int64(7), jax.random.key(7), jax.random.PRNGKey(7), jnp.int32(7)):
        tx = go.as_matrices(go.unbiased_low_rank(muon_rule(), 2, 3, 0.25, key=key))
        state = wrap(tx.init)(gradients[0])
        drawn.append(np.asarray(wrap(tx.update)(gradients[0], state)[1].outside.index["4x5"]))
    np.testing.assert_array_equal(drawn, [drawn[0]] * len(drawn))


def test_no_stream_is_one_that_a_model_gets_from_the_same_seed():
    """`split(key, n)[i]` is `fold_in(key, i)`, and many models are initialized from `key=0`, the default."""

    def numbers(keys):
        return set(map(tuple, np.asarray(jax.random.key_data(keys)).reshape(-1, 2).tolist()))

    def children(keys, n):
        return jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(n)))(keys)

    seed = jax.random.key(0)
    of_model = children(seed[None], 100)[0]
    assert numbers(of_model) == numbers(jax.random.split(seed, 100))
    theirs = numbers(seed[None]) | numbers(of_model) | numbers(children(of_model, 50))
    for key in (0, seed, jax.random.PRNGKey(0)):
        own = key_data(key)
        drawn = jax.vmap(functools.partial(streams, own, numbers=jnp.arange(50)))(jnp.arange(100))
        ours = {tuple(own.tolist())} | numbers(drawn)
        assert len(ours) == 1 + 100 * 50
        assert not ours & theirs


def test_another_process_draws_the_same():
    """Python's string hash differs between processes, but the draw must not."""
    code = (
        "import jax.numpy as jnp, numpy as np, gum_optax as go;"
        "key = jnp.asarray([0, 7], jnp.uint32);"
        "print([go.draw(key, jnp.int32(p), '6x9', 30, 4).tolist() for p in range(3)])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "1", "JAX_PLATFORMS": "cpu"},
    )
    here = [go.draw(jnp.asarray(KEY), jnp.int32(p), "6x9", 30, 4).tolist() for p in range(3)]
    assert out.stdout.strip() == str(here)


@given(st.integers(1, 12), st.floats(0, 1))
def test_the_number_of_slots_is_the_rounded_share_within_one_and_all(blocks, fraction):
    tx = go.as_matrices(go.unbiased_low_rank(muon_rule(), 2, 3, fraction))
    state = jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct((blocks, 4, 5), jnp.float32)})
    expected = min(max(round(fraction * blocks), 1), blocks) if fraction else 0
    if expected in (0, blocks):  # no sampling: all blocks are low rank, or all are full rank
        assert state.outside.index.shape == ()
        kept = state.projectors["w"] if expected == 0 else state.full[0].trace["w"]
        assert kept.shape == (blocks, 4, 2 if expected == 0 else 5)
    else:
        assert state.outside.index["4x5"].shape == (expected,)


def test_seeds_can_be_vmapped():
    gradients = [{"w": np.random.default_rng(t).normal(size=(6, 4, 5)).astype(np.float32)} for t in range(2)]

    def steps(seed):
        tx = go.as_matrices(go.unbiased_low_rank(muon_rule(), 2, 1, 0.25, key=seed))
        state = tx.init(gradients[0])
        for g in gradients:
            step, state = tx.update(g, state)
        return step, state.outside.index["4x5"]

    together = jax.jit(jax.vmap(steps))(jnp.arange(3))
    for seed in range(3):
        tx = go.as_matrices(go.unbiased_low_rank(muon_rule(), 2, 1, 0.25, key=seed))
        updates, state = run(tx, gradients)
        np.testing.assert_array_equal(together[1][seed], state.outside.index["4x5"])
        np.testing.assert_allclose(together[0]["w"][seed], updates[-1]["w"], atol=AMPLIFIED)
