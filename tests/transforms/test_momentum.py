"""Momentum kept in bfloat16, and Adam that keeps its moments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go
from gum_optax._core.acceptance import Acceptance
from gum_optax._core.context import MatrixContext
from gum_optax._transforms.momentum import adam, ema, trace
from gum_optax._transforms.storage import round_stochastically

from helpers import run, sequence

KEY = jax.random.key(0)


def test_stochastic_rounding_gives_a_neighbour_and_the_number_itself_on_average():
    x = jnp.float32([1.001, -3.1415927, 1e-30, 1e30, 0.0, 1.5])
    keys = jax.random.split(KEY, 4000)
    rounded = np.asarray(jax.vmap(round_stochastically, (0, None))(keys, x), np.float64)
    x = np.asarray(x, np.float64)
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 1e-38))) - 7)
    assert (np.abs(rounded - x) < ulp).all()
    np.testing.assert_array_equal(rounded[:, 4:], np.broadcast_to(x[4:], (4000, 2)))  # nothing to round
    spread = rounded[:, :4].std(0) / np.sqrt(len(keys))
    assert (np.abs(rounded[:, :4].mean(0) - x[:4]) / spread).max() < 4


def test_what_is_not_finite_stays_so():
    x = jnp.float32([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(round_stochastically(KEY, x).astype(jnp.float32), x)


def test_a_rounded_momentum_does_not_stall_where_the_nearest_would():
    """`m ← 0.999 m + 0.002` goes from 1 to 2, but rounding to nearest takes 1.001 back to 1."""
    g, steps = jnp.full((64, 64), 0.002), 1000
    rule = trace(0.999, dtype=jnp.bfloat16)
    start = rule.init(g)._replace(trace=jnp.ones_like(g, jnp.bfloat16))

    def step(state, _):
        return rule.update(g, state)[1], None

    momentum = jax.lax.scan(step, start, length=steps)[0].trace.astype(jnp.float32)
    exact = 2 - 0.999**steps
    assert abs(float(momentum.mean()) - exact) < 4 * float(momentum.std()) / 64
    assert jnp.float32(0.999 + 0.002).astype(jnp.bfloat16) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: go.muon(0.1, momentum_dtype=dtype),
        lambda dtype: go.galore_muon(0.1, 2, 3, momentum_dtype=dtype),
        lambda dtype: go.gum(0.1, 2, 3, 0.5, momentum_dtype=dtype),
        lambda dtype: go.sumo(0.1, 2, 3, momentum_dtype=dtype),
    ],
    ids=["muon", "galore_muon", "gum", "sumo"],
)
def test_momentum_and_slots_are_bfloat16_and_close_to_the_float32_ones(make):
    leaves = [sequence(np.random.default_rng(i), (5, 8), 4) for i in range(4)]
    gradients = [{str(i): leaf[step] for i, leaf in enumerate(leaves)} for step in range(4)]
    (exact, wide), (rounded, narrow) = (run(make(dtype), gradients) for dtype in (None, "bfloat16"))
    pairs = list(zip(traces(wide), traces(narrow), strict=True))
    assert pairs
    for m, low in pairs:
        assert low.dtype == jnp.bfloat16
        # One rounding is at most 2⁻⁷ of an entry, and the average holds a few of them.
        assert np.linalg.norm(m - low.astype(jnp.float32)) < 2**-6 * np.linalg.norm(m)
    # The first step comes before any rounding.
    np.testing.assert_allclose(exact[0]["0"], rounded[0]["0"], atol=1e-5)


def traces(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [x for path, x in leaves if ".trace" in jax.tree_util.keystr(path)]


def test_half_the_momentum():
    params = {str(i): {"kernel": jax.ShapeDtypeStruct((64, 96), jnp.float32)} for i in range(4)}
    wide, narrow = (
        go.memory_report(go.gum(0.1, 8, 3, 0.25, momentum_dtype=dtype), params)
        for dtype in (None, jnp.bfloat16)
    )
    momentum = 4 * (4 * 8 * 96 + 64 * 96)  # four of r × n and one slot, in float32
    saved = wide.total - narrow.total
    assert momentum / 2 - 64 <= saved <= momentum / 2  # except the counters for rounding


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="momentum_dtype must be float32, bfloat16 or int8, got 'float16'"):
        go.muon(0.1, momentum_dtype="float16")


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (adam(0.8, 0.99, 1e-6), optax.scale_by_adam(0.8, 0.99, 1e-6)),
        (ema(0.8), optax.ema(0.8, debias=False, accumulator_dtype=jnp.float32)),
    ],
    ids=["adam", "ema"],
)
def test_a_rule_that_may_reject_is_optax_own_and_a_rejected_step_leaves_its_moments(ours, plain):
    gradients = [{"w": g, "v": g[0]} for g in sequence(np.random.default_rng(0), (3, 5), 6)]
    state = expected_state = plain.init(gradients[0])
    for number, g in enumerate(gradients):
        accepted = number % 3 != 1
        step, new = ours.update(g, state, context=MatrixContext(accept=Acceptance(jnp.asarray(accepted))))
        state = new._replace(count=state.count + accepted)  # as the wrapper keeps what the rule does not
        if accepted:
            expected, expected_state = plain.update(g, expected_state)
            chex.assert_trees_all_close(step, expected, rtol=4 * float(jnp.finfo(jnp.float32).eps))
        chex.assert_trees_all_equal(state, expected_state)
    alone = ours.update(gradients[0], state)
    chex.assert_trees_all_equal(alone, plain.update(gradients[0], state))
