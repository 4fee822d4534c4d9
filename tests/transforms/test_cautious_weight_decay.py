"""Cautious weight decay, alone and as the decay of the optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import run

DECAY = 0.25
PARAMS = {"dense": {"kernel": (4, 6), "bias": (6,)}, "embed": {"embedding": (5, 4)}}


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes, treedef = jax.tree.flatten(PARAMS, is_leaf=lambda x: isinstance(x, tuple))
    return treedef.unflatten([jnp.float32(rng.normal(size=shape)) for shape in shapes])


def papers(u, w):
    """The step up the gradient with the paper's decay."""
    return np.asarray(u) + DECAY * (np.asarray(u) * np.asarray(w) >= 0) * np.asarray(w)


def test_it_decays_where_step_and_parameter_agree():
    step, params = tree(0), tree(1)
    step["dense"]["bias"] = step["dense"]["bias"].at[:2].set(0)  # without a step, a number decays
    (found,), _ = run(go.cautious_weight_decay(DECAY), [step], params)
    jax.tree.map(lambda f, u, w: np.testing.assert_allclose(f, papers(u, w), rtol=1e-6), found, step, params)


def test_signs_decide_where_a_product_would_underflow():
    u, w = jnp.float32([1e-30, -1e-30]), jnp.float32([1e-20, 1e-20])
    (found,), _ = run(go.cautious_weight_decay(DECAY), [u], w)
    np.testing.assert_array_equal(found, jnp.float32([1e-30 + DECAY * 1e-20, -1e-30]))


@pytest.mark.parametrize("make", [go.gum, go.muon, go.sinkgd, go.scion], ids=lambda make: make.__name__)
def test_every_optimizer_takes_it_for_all_leaves(make):
    gradients, params = tree(2), tree(3)
    (plain,), _ = run(make(0.1), [gradients])
    (found,), _ = run(make(0.1, weight_decay=go.cautious_weight_decay(DECAY)), [gradients], params)
    expected = jax.tree.map(lambda u, w: -0.1 * papers(u / -0.1, w), plain, params)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-7), found, expected)


def test_a_mask_spares_leaves():
    gradients, params = tree(2), tree(3)
    are_tables = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    decay = go.cautious_weight_decay(DECAY)
    (plain,), _ = run(go.muon(0.1), [gradients])
    (every,), _ = run(go.muon(0.1, weight_decay=decay), [gradients], params)
    masked = go.muon(0.1, weight_decay=decay, weight_decay_mask=are_tables(params))
    own = go.muon(0.1, weight_decay=go.cautious_weight_decay(DECAY, are_tables))
    for tx in (masked, own):
        (found,), _ = run(tx, [gradients], params)
        np.testing.assert_array_equal(found["dense"]["bias"], plain["dense"]["bias"])
        np.testing.assert_array_equal(found["dense"]["kernel"], every["dense"]["kernel"])
        np.testing.assert_array_equal(found["embed"]["embedding"], every["embed"]["embedding"])


def test_it_composes_with_optax_alone():
    gradients, params = tree(2), tree(3)
    tx = optax.chain(
        optax.scale_by_adam(), go.cautious_weight_decay(DECAY), optax.scale_by_learning_rate(0.1)
    )
    (found,), _ = run(tx, [gradients], params)
    (step,), _ = run(optax.scale_by_adam(), [gradients])
    jax.tree.map(
        lambda f, u, w: np.testing.assert_allclose(f, -0.1 * papers(u, w), rtol=1e-5), found, step, params
    )


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        go.cautious_weight_decay(-1)
    tx = go.muon(0.1, weight_decay=go.cautious_weight_decay(DECAY))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(tree(2), tx.init(tree(3)))
