"""Every rule against its NumPy oracle over several periods, in both orientations and stacked."""

import chex
import jax
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import STEPS, muon_rule, run, sequence, trees
from oracles import galore_muon_steps, gum_steps, jordan, muon_steps, oracle, sumo_steps

BETA, RANK, PERIOD = 0.9, 3, 4
# Float32 products against float64 ones, through ten steps and five Newton-Schulz steps each.
TOLERANCE = {"rtol": 0, "atol": 2e-4}


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_the_newton_schulz_of_its_momentum(leaves, nesterov):
    rule = optax.chain(optax.trace(BETA, nesterov=nesterov), go.orthogonalize())
    updates, _ = run(go.as_matrices(rule), trees(leaves))
    for name, gradients in leaves.items():
        expected = oracle(muon_steps, gradients, BETA, nesterov=nesterov)
        np.testing.assert_allclose([u[name] for u in updates], expected, **TOLERANCE)


def test_galore_muon_runs_in_the_top_singular_subspace_and_keeps_its_momentum(leaves):
    rule = go.low_rank(muon_rule(BETA), RANK, PERIOD, find_subspace=go.svd_subspace)
    updates, _ = run(go.as_matrices(rule), trees(leaves))
    for name, gradients in leaves.items():
        expected = oracle(galore_muon_steps, gradients, RANK, PERIOD, BETA)
        np.testing.assert_allclose([u[name] for u in updates], expected, **TOLERANCE)


@pytest.mark.parametrize("rotates", [False, True])
def test_the_momentum_of_galore_muon_stays_or_follows_the_subspace(leaves, rotates):
    tx = go.galore_muon(
        1.0,
        RANK,
        PERIOD,
        momentum=BETA,
        find_subspace=go.svd_subspace,
        on_refresh=go.rotate if rotates else go.keep,
        orthogonalizer=go.newton_schulz,
        consistent_rms=None,
    )
    updates, _ = run(tx, trees(leaves))
    for name, gradients in leaves.items():
        expected = oracle(galore_muon_steps, gradients, RANK, PERIOD, BETA, rotates=rotates)
        fan_in, fan_out = gradients[0].shape[-2:]
        factor = -np.sqrt(max(1, fan_out / fan_in))
        np.testing.assert_allclose([u[name] / factor for u in updates], expected, **TOLERANCE)


def test_rotated_momentum_and_the_raw_residual_are_sumo_with_newton_schulz(leaves):
    rule = go.low_rank(
        muon_rule(BETA),
        RANK,
        PERIOD,
        find_subspace=go.svd_subspace,
        on_refresh=go.rotate,
        residual=go.add_raw,
    )
    updates, _ = run(go.as_matrices(rule), trees(leaves))
    for name, gradients in leaves.items():
        expected = oracle(sumo_steps, gradients, RANK, PERIOD, BETA, step=jordan, ratio=np.inf)
        np.testing.assert_allclose([u[name] for u in updates], expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("compensation", "weights"),
    [(go.complement, None), (go.low_variance, lambda q: (1.0, 1.0, 1 / q))],
    ids=["complement", "low_variance"],
)
@pytest.mark.parametrize("linear", [False, True], ids=["newton_schulz", "momentum_only"])
def test_both_branches_of_gum_follow_the_paper(leaves, compensation, weights, linear):
    """The inner rule is also linear: an orthogonalizer is scale invariant and would hide the weights."""
    inner = optax.trace(BETA) if linear else muon_rule(BETA)
    rule = go.unbiased_low_rank(
        inner, RANK, PERIOD, 0.4, find_subspace=go.svd_subspace, compensation=compensation, key=3
    )
    tx = go.as_matrices(rule)
    gradients = trees(leaves)
    state = jax.jit(tx.init)(gradients[0])
    update = jax.jit(tx.update)
    updates, sampled = [], []
    for g in gradients:
        u, state = update(g, state)
        updates.append(u)
        sampled.append({name: np.asarray(index) for name, index in state.outside.index.items()})
    # Groups are by shape, in the order of the leaves: 6x9 holds "stack" (3), "tall" (1), "wide" (1).
    blocks = {
        "stack": ("6x9", 0, 3),
        "tall": ("6x9", 3, 1),
        "wide": ("6x9", 4, 1),
        "tall_stack": ("5x10", 0, 2),
    }
    total, slots = {"6x9": 5, "5x10": 2}, {"6x9": 2, "5x10": 1}
    assert {name: index.shape for name, index in sampled[0].items()} == {k: (v,) for k, v in slots.items()}
    runs_of_both = set()
    for name, gradients in leaves.items():
        group, start, size = blocks[name]
        drawn = [[start + b in sampled[t][group] for t in range(0, STEPS, PERIOD)] for b in range(size)]
        runs_of_both |= {flag for flags in drawn for flag in flags}
        q = slots[group] / total[group]
        step = {"step": lambda x: x} if linear else {}
        expected = oracle(
            gum_steps, gradients, RANK, PERIOD, BETA, q=q, sampled=drawn, weights=weights, **step
        )
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose([u[name] for u in updates], expected, rtol=0, atol=2e-4 * scale)
    assert runs_of_both == {False, True}


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_gum_is_the_same_function_with_and_without_jit(self):
        gradients = trees({"w": sequence(np.random.default_rng(2), (4, 6, 9), 5)})
        tx = go.as_matrices(go.unbiased_low_rank(muon_rule(), 2, 2, 0.5, key=1))
        init, update = self.variant(tx.init), self.variant(tx.update)
        state, reference = init(gradients[0]), jax.jit(tx.init)(gradients[0])
        chex.assert_trees_all_equal_structs(state, reference)
        for g in gradients:
            before = state
            step, state = update(g, state)
            expected, reference = jax.jit(tx.update)(g, reference)
            chex.assert_trees_all_close(step, expected, atol=1e-5)
            chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
            chex.assert_trees_all_equal(state.outside.index, reference.outside.index)
