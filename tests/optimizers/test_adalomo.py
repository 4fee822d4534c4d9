"""AdaLomo: the authors' equations in NumPy, optax's chain on single matrices, stacks, and layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import run
from oracles import adalomo_weights

STEPS = 20


@pytest.fixture
def gradients(rng):
    """Of a stack, a table, a head and norms, single and stacked, of sizes from 1e-4 to 1."""
    shapes = {
        "layers": {"kernel": (3, 6, 9), "scale": (3, 6)},
        "embed": {"embedding": (20, 6)},
        "head": {"kernel": (6, 20)},
        "norm": {"scale": (6,)},
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    sizes = 10.0 ** rng.uniform(-4, 0, size=(STEPS, len(leaves)))
    rows = [[np.float32(s * rng.normal(size=x)) for s, x in zip(row, leaves, strict=True)] for row in sizes]
    return [treedef.unflatten(row) for row in rows]


def weights_after(tx, params, gradients):
    """The weights after each step."""
    state, found = jax.jit(tx.init)(params), []
    update = jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_weights_are_the_authors(rng, gradients, decay):
    """Each layer of a stack is a matrix, and each of its norms a vector, by itself."""
    params = jax.tree.map(lambda g: np.float32(rng.normal(size=g.shape)), gradients[0])
    found = weights_after(go.adalomo(0.02, weight_decay=decay), params, gradients)

    def check(last, *own):
        expected = adalomo_weights(*np.float64(own[:1]), np.float64(own[1:]), 0.02, decay)[-1]
        np.testing.assert_allclose(last, expected, rtol=2e-6, atol=1e-6)

    trees = found[-1], params, *gradients
    for layer in range(3):
        jax.tree.map(check, *(jax.tree.map(lambda x, i=layer: x[i], tree["layers"]) for tree in trees))
    for name in ("embed", "head", "norm"):
        jax.tree.map(check, *(tree[name] for tree in trees))


def test_it_is_optax_chain_on_single_matrices(rng):
    gradients = [{"kernel": np.float32(rng.normal(size=(6, 9)))} for _ in range(STEPS)]
    params = {"kernel": np.float32(rng.normal(size=(6, 9)))}
    chain = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(1e-3),
        optax.scale(-0.02),
    )
    found, beside = (weights_after(tx, params, gradients)[-1]["kernel"] for tx in (go.adalomo(0.02), chain))
    np.testing.assert_allclose(found, beside, rtol=1e-6, atol=1e-7)


def test_zeros_stay_and_huge_gradients_leave_no_infinity():
    params = {"kernel": jnp.ones((4, 6))}
    tx = go.adalomo(0.1)
    updates, _ = run(tx, [{"kernel": jnp.zeros((4, 6))}] * 2, params)
    assert all((u["kernel"] == 0).all() for u in updates)
    updates, state = run(tx, [{"kernel": jnp.full((4, 6), 1e30)}] * 2, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert float(jnp.abs(updates[-1]["kernel"]).max()) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e5, 1e14])
@pytest.mark.parametrize("make", [go.adalomo, go.hfac])
def test_a_row_of_zeros_beside_others_of_any_size_is_finite(make, size):
    gradient = jnp.full((4, 6), size).at[1].set(0)
    for eps in (1e-30, 1e-35):
        (updates,), _ = run(make(0.1, eps=eps), [{"kernel": gradient}], {"kernel": jnp.ones((4, 6))})
        assert np.isfinite(updates["kernel"]).all()
    assert (updates["kernel"][1] == 0).all()
    assert (jnp.abs(updates["kernel"][0]) > 0.01).all()


def test_empty_leaves_are_fine():
    params = {"kernel": jnp.zeros((0, 6)), "bias": jnp.zeros((0,))}
    (updates,), _ = run(go.adalomo(0.1), [params], params)
    assert updates["kernel"].shape == (0, 6)


def test_the_state_is_a_row_and_a_column():
    params = {"layers": {"kernel": jnp.ones((3, 6, 9))}, "embed": {"embedding": jnp.ones((20, 6))}}
    state = jax.eval_shape(go.adalomo(0.1).init, params)
    numbers = sum(x.size for x in jax.tree.leaves(state) if x.dtype == jnp.float32)
    assert numbers == 3 * (6 + 9) + 20 + 6


def test_in_a_subspace_the_size_is_that_of_the_whole_weight(rng):
    """`low_rank` gives the second moment of the coordinates; the step is as large as the weight says."""
    inner = optax.chain(go.scale_by_factored_rms(), go.clip_by_rms())
    rule = optax.chain(go.low_rank(inner, 2, 5), go.scale_by_parameter_rms())
    gradient, params = {"kernel": np.float32(rng.normal(size=(6, 9)))}, {"kernel": jnp.full((6, 9), 3.0)}
    (updates,), _ = run(go.matrix_optimizer(rule, 1.0, 1.0), [gradient], params)
    # Two coordinates of RMS one in six: the step has RMS √(2/6) of the weight's 3.
    size = np.sqrt(np.mean(np.square(updates["kernel"])))
    assert size == pytest.approx(3 * np.sqrt(2 / 6), rel=1e-3)  # the columns of P are unit to 1e-4


def test_it_needs_parameters():
    tx = go.adalomo(0.1)
    params = {"kernel": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("argument", ["decay_rate", "eps", "parameter_eps", "threshold", "weight_decay"])
def test_negative_arguments_are_refused(argument):
    with pytest.raises(ValueError, match="must be at least" if argument != "threshold" else "at least"):
        go.adalomo(0.1, **{argument: -1.0})
