"""NorMuon's scaling of each neuron, against the paper's formula, and on the steps of other rules."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import LEAVES, LOW_RANK, run, steps_of, trees
from oracles import normuon_steps

B2 = 0.9
STEP_OF_NEURONS = optax.chain(go.scale_by_neuron_rms(B2), go.scale_by_shape())


def papers_steps(gradients):
    """The paper's steps of each kernel `(fan_in, fan_out)`, whose neurons are the paper's rows."""
    kernels = np.stack(gradients).reshape(len(gradients), -1, *gradients[0].shape[-2:])
    each = [normuon_steps(list(np.float64(g).swapaxes(1, 2)), 0.9, B2) for g in np.moveaxis(kernels, 1, 0)]
    return np.moveaxis(each, 0, 1).swapaxes(-1, -2).reshape(np.shape(gradients))


def neuron_norms(step):
    return np.linalg.norm(step, axis=-2)


def test_normuon_is_the_papers(leaves):
    tx = go.normuon(1.0, momentum=0.9, b2=B2, orthogonalizer=go.polar)
    steps, _ = steps_of(tx, leaves)
    for name, gradients in leaves.items():
        np.testing.assert_allclose(steps[name], papers_steps(gradients), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "inner",
    [
        go.scale_by_muon(),
        go.low_rank(go.scale_by_muon(), **LOW_RANK),
        go.unbiased_low_rank(go.scale_by_muon(), **LOW_RANK, full_rank_fraction=0.4),
    ],
    ids=["muon", "galore_muon", "gum"],
)
def test_neurons_get_steps_of_one_length_first_and_matrices_keep_the_length_of_their_step(leaves, inner):
    plain = steps_of(go.matrix_optimizer(inner, 1.0, go.shape_factor()), leaves)[0]
    found, state = steps_of(go.matrix_optimizer(inner, 1.0, STEP_OF_NEURONS), leaves)
    for name, steps in found.items():
        for step, before in zip(steps, plain[name], strict=True):
            np.testing.assert_allclose(
                np.linalg.norm(step, axis=(-2, -1)), np.linalg.norm(before, axis=(-2, -1)), rtol=1e-5
            )
        norms = neuron_norms(steps[0])
        np.testing.assert_allclose(norms, np.broadcast_to(norms[..., :1], norms.shape), rtol=1e-5)
        assert np.ptp(neuron_norms(plain[name][0])) > 1e-2
        assert np.ptp(neuron_norms(steps[-1])) > 1e-3
    sizes = {
        name: np.shape(state[-1].inner.inner_states["matrices"].inner_state[1][0].nu[name]) for name in LEAVES
    }
    assert sizes == {name: (*shape[:-2], 1, shape[-1]) for name, shape in LEAVES.items()}


def test_a_step_of_equal_neurons_stays_as_it_is(rng):
    rule = go.scale_by_neuron_rms()
    steps = [{"w": jnp.float32(rng.choice([-1.0, 1.0], size=(4, 6)))} for _ in range(3)]
    found, _ = run(rule, steps)
    for step, after in zip(steps, found, strict=True):
        np.testing.assert_allclose(after["w"], step["w"], rtol=1e-6)


def test_a_zero_step_and_a_silent_neuron_stay_zero(rng):
    step = jnp.float32(rng.normal(size=(2, 4, 6))).at[0].set(0).at[1, :, 2].set(0)
    found, state = run(go.scale_by_neuron_rms(), [step, step])
    assert np.isfinite(found[1]).all()
    assert np.isfinite(state.nu).all()
    np.testing.assert_array_equal(np.asarray(found[1] == 0), np.asarray(step == 0))


def test_stacked_layers_step_as_separate_ones(rng):
    stack = [jnp.float32(rng.normal(size=(3, 6, 9))) for _ in range(3)]
    apart = trees({str(i): [g[i] for g in stack] for i in range(3)})
    whole = run(go.normuon(0.1), [{"w": g} for g in stack])[0]
    single = run(go.normuon(0.1), apart)[0]
    for together, each in zip(whole, single, strict=True):
        np.testing.assert_allclose(together["w"], jnp.stack(list(each.values())), rtol=0, atol=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"b2 must be at least 0 and below 1, got 1\.0"):
        go.scale_by_neuron_rms(1.0)
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        go.normuon(0.1, eps=-1)
