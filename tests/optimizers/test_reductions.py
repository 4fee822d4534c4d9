"""Cases in which one optimizer equals another exactly, not approximately."""

import inspect

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import AMPLIFIED, muon_rule, run, sequence, trees

STEPS, RANK, PERIOD = 7, 3, 3


def constant_subspace(key, gradient, previous):
    return jnp.broadcast_to(jnp.eye(*previous.shape[-2:]), previous.shape)


@pytest.fixture(scope="module")
def gradients():
    rng = np.random.default_rng(4)
    shapes = {"a": (6, 9), "b": (9, 6), "stack": (4, 6, 9), "alone": (5, 11)}
    return trees({name: sequence(rng, shape, STEPS) for name, shape in shapes.items()})


def assert_same(a, b, gradients, exactly=True):
    left, right = (run(go.as_matrices(rule), gradients)[0] for rule in (a, b))
    for x, y in zip(left, right, strict=True):
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=0, atol=0 if exactly else AMPLIFIED)


def test_gum_without_full_rank_blocks_is_galore_muon_with_restarts(gradients):
    a = go.unbiased_low_rank(muon_rule(), RANK, PERIOD, 0.0)
    b = go.low_rank(muon_rule(), RANK, PERIOD, on_refresh=go.restart)
    assert_same(a, b, gradients)


def test_gum_without_full_rank_blocks_is_galore_muon_within_the_first_period(gradients):
    a = go.unbiased_low_rank(muon_rule(), RANK, STEPS, 0.0)
    assert_same(a, go.low_rank(muon_rule(), RANK, STEPS), gradients)


def test_gum_with_all_blocks_at_full_rank_is_muon(gradients):
    assert_same(go.unbiased_low_rank(muon_rule(), RANK, PERIOD, 1.0), muon_rule(), gradients)


@pytest.mark.parametrize("wrap", [go.low_rank, lambda *a: go.unbiased_low_rank(*a, 0.25)])
def test_a_rank_of_m_or_more_is_muon(gradients, wrap):
    for rank in (6, 50):
        assert_same(wrap(muon_rule(), rank, PERIOD), muon_rule(), gradients)


def test_a_shape_with_one_block_is_muon_and_the_others_are_not(gradients):
    updates, state = run(go.as_matrices(go.unbiased_low_rank(muon_rule(), RANK, PERIOD, 0.2)), gradients)
    full, _ = run(go.as_matrices(muon_rule()), gradients)
    np.testing.assert_allclose(updates[-1]["alone"], full[-1]["alone"], atol=1e-5)
    assert np.abs(updates[-1]["stack"] - full[-1]["stack"]).max() > 1e-2
    assert set(state.outside.index) == {"6x9"}


def test_separate_leaves_and_one_stacked_leaf_are_the_same_blocks():
    """Slots over several leaves (a branch per slot) and over one stack (a gather) agree."""
    rng = np.random.default_rng(5)
    stacked = sequence(rng, (6, 5, 8), STEPS)
    apart = [{f"{i}": g[i] for i in range(6)} for g in stacked]
    rule = go.unbiased_low_rank(muon_rule(), RANK, PERIOD, 0.34, find_subspace=go.svd_subspace, key=2)
    a, _ = run(go.as_matrices(rule), [{"w": g} for g in stacked])
    b, _ = run(go.as_matrices(rule), apart)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x["w"], np.stack([y[f"{i}"] for i in range(6)]), atol=2e-5)


def test_without_momentum_weights_change_nothing_under_an_orthogonalizer(gradients):
    """`NS(c R) = NS(R)`: the 1/q of the paper matters only for other inner rules."""
    same = lambda q: go.Weights(1.0, 0.0, 1.0)  # noqa: E731
    a = go.unbiased_low_rank(muon_rule(), RANK, PERIOD, 0.3, compensation=same)
    b = go.unbiased_low_rank(muon_rule(), RANK, PERIOD, 0.3)
    assert_same(a, b, gradients, exactly=False)


def test_the_raw_residual_with_an_identity_inside_is_the_gradient(gradients):
    rule = go.low_rank(optax.identity(), RANK, PERIOD, residual=go.add_raw)
    assert_same(rule, optax.identity(), gradients, exactly=False)


def test_rotated_linear_momentum_is_the_projection_of_a_momentum_that_lies_in_both_subspaces():
    """If all gradients lie in one subspace of dimension r, rotation loses nothing: this is plain momentum."""
    rng = np.random.default_rng(6)
    basis = np.linalg.qr(rng.normal(size=(6, RANK)))[0]
    sequence_in_subspace = [{"w": np.float32(basis @ rng.normal(size=(RANK, 9)))} for _ in range(STEPS)]
    rule = go.low_rank(optax.trace(0.9), RANK, 2, find_subspace=go.svd_subspace, on_refresh=go.rotate)
    assert_same(rule, optax.trace(0.9), sequence_in_subspace, exactly=False)


@pytest.mark.parametrize("on_refresh", [go.rotate, go.keep, go.restart])
def test_an_inner_rule_that_masks_a_leaf_runs_on_the_others_as_alone(gradients, on_refresh):
    def rule(inner):
        return go.low_rank(inner, RANK, PERIOD, on_refresh=on_refresh)

    masked = optax.masked(optax.trace(0.9), {name: name == "a" for name in gradients[0]})
    some, alone = (run(go.as_matrices(rule(inner)), gradients)[0] for inner in (masked, optax.trace(0.9)))
    for x, y in zip(some, alone, strict=True):
        np.testing.assert_array_equal(x["a"], y["a"])


@pytest.mark.skipif(
    "consistent_rms" not in inspect.signature(optax.contrib.muon).parameters,
    reason="optax.contrib.muon has had consistent_rms since 0.2.8",
)
def test_muon_is_optax_muon():
    rng = np.random.default_rng(7)
    gradients = trees({"wide": sequence(rng, (6, 9), 4), "tall": sequence(rng, (9, 6), 4)})
    params = {name: jnp.ones_like(g) for name, g in gradients[0].items()}
    for rms in (0.2, None):
        # Not with Nesterov: optax corrects the bias of its two terms separately, which changes their mix.
        ours = go.muon(0.1, momentum=0.9, consistent_rms=rms, weight_decay=0.01)
        theirs = optax.contrib.muon(0.1, beta=0.9, nesterov=False, consistent_rms=rms, weight_decay=0.01)
        (a, _), (b, _) = run(ours, gradients, params), run(theirs, gradients, params)
        for x, y in zip(a, b, strict=True):
            for name in x:
                np.testing.assert_allclose(x[name], y[name], atol=5e-5)


@pytest.mark.parametrize("find", [go.svd_subspace, constant_subspace])
def test_layers_by_themselves_are_the_layers_of_a_stack(find):
    """Matrices of one shape in several leaves share a loop, an orthogonalization and slots."""
    stacks = sequence(np.random.default_rng(5), (4, 6, 9), STEPS)
    optimizers = [
        go.galore_muon(0.1, RANK, PERIOD, find_subspace=find),
        go.gum(0.1, RANK, PERIOD, 0.5, find_subspace=find),
    ]
    for tx in optimizers:
        together, _ = run(tx, [{"stack": g} for g in stacks])
        apart, _ = run(tx, [{str(i): g[i] for i in range(4)} for g in stacks])
        for x, y in zip(together, apart, strict=True):
            np.testing.assert_allclose(x["stack"], [y[str(i)] for i in range(4)], atol=AMPLIFIED)
