"""H-Fac: the transcribed equations in NumPy, Adafactor's step, the first step, and zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import run, steps_of
from oracles import hfac_steps


def test_the_steps_are_the_transcribed_ones(leaves):
    """On both orientations, alone and in stacks."""
    found, _ = steps_of(go.hfac(1.0, b1=0.8, b2=0.9, threshold=0.7), leaves)
    for name, gradients in leaves.items():
        blocks = np.float64(gradients).reshape(len(gradients), -1, *gradients[0].shape[-2:])
        expected = np.stack(
            [hfac_steps(list(own), 0.8, 0.9, threshold=0.7) for own in blocks.swapaxes(0, 1)], 1
        )
        own = np.reshape(found[name], expected.shape)
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_without_momentum_it_is_adafactors_step(rng):
    gradients = [{"w": np.float32(rng.normal(size=(6, 9)))} for _ in range(8)]

    def growing(step, b2):
        return b2 * (1 - b2**step) / (1 - b2 ** (step + 1))

    rms = optax.scale_by_factored_rms(decay_rate=0.9, min_dim_size_to_factor=1, decay_rate_fn=growing)
    expected, _ = run(optax.chain(rms, optax.clip_by_block_rms(1.0)), gradients)
    found, _ = run(go.scale_by_hfac(b1=0.0, b2=0.9), gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_the_averages_are_debiased_ones(rng):
    gradients = [{"w": np.float32(rng.normal(size=(6, 9)))} for _ in range(20)]
    _, state = run(go.scale_by_hfac(), gradients)
    ema = optax.ema(0.9)
    means, _ = run(ema, [{"w": g["w"].mean(1, keepdims=True)} for g in gradients])
    np.testing.assert_allclose(state.u["w"], means[-1]["w"], atol=1e-6)


def test_the_first_step_has_no_momentum_term(rng):
    gradient = {"w": np.float32(rng.normal(size=(6, 9)))}
    (first,), _ = run(go.scale_by_hfac(), [gradient])
    (expected,), _ = run(optax.chain(go.scale_by_factored_rms(), go.clip_by_rms()), [gradient])
    np.testing.assert_allclose(first["w"], expected["w"], rtol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_zeros_give_zero_steps(size):
    updates, state = run(go.hfac(1.0), [{"w": jnp.full((4, 6), size)}] * 3)
    assert all((jnp.abs(u["w"]) <= 1e-10).all() for u in updates)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_bad_arguments_are_refused():
    for arguments in ({"b1": 1.0}, {"b2": -0.1}, {"eps": 0.0}, {"threshold": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            go.hfac(0.1, **arguments)
