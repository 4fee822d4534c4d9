"""Protected subspaces: what stands after many steps, bases in NumPy, and extensions between tasks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gum_optax as go
from gum_optax._linalg.protected import off_both_sides

from helpers import run

HEADS = {"heads/kernel": go.SPLIT_HEADS_INPUT}
protect = functools.partial(go.protect, weight_dimension_numbers=HEADS)
SHAPES = {"stack": (3, 6, 9), "tall": (9, 6), "heads": (8, 2, 4), "bias": (5,)}


def tree(rng):
    return {
        name: {"kernel" if len(x) > 1 else "bias": jnp.float32(rng.normal(size=x))}
        for name, x in SHAPES.items()
    }


def as_blocks(name, w):
    """Each leaf as `(*blocks, fan_in, fan_out)`: heads are outputs."""
    w = np.float64(jax.tree.leaves(w)[0])
    return w.reshape(8, 8) if name == "heads" else w


def after(tx, params, gradients):
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def check_protected(before, found, fraction):
    """The top singular vectors of the old weights, from NumPy, are those of the new ones, values too."""
    for name in ("stack", "tall", "heads"):
        old, new = as_blocks(name, before[name]), as_blocks(name, found[name])
        k = int(fraction * min(old.shape[-2:]))
        u, s, vt = np.linalg.svd(old, full_matrices=False)
        u, s, v = u[..., :k], s[..., :k], np.swapaxes(vt[..., :k, :], -1, -2)
        np.testing.assert_allclose(new @ v, u * s[..., None, :], atol=2e-6, err_msg=name)
        np.testing.assert_allclose(
            np.swapaxes(u, -1, -2) @ new, np.swapaxes(v * s[..., None, :], -1, -2), atol=2e-6
        )
        assert np.abs(new - old).max() > 0.02


ADAMW = optax.adamw(1e-2, weight_decay=0.5)
MAKERS = {
    "adamw": lambda: ADAMW,
    "muon": lambda: go.muon(1e-2, weight_decay=0.5),
    "gum": lambda: go.gum(1e-2, rank=2, period=3, full_rank_fraction=0.4, weight_decay=0.5),
    "galore": lambda: go.galore(1e-2, rank=2, period=3, weight_decay=0.5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_protected_triplets_stand_after_twenty_steps_with_decay(rng, name):
    params, *gradients = (tree(rng) for _ in range(21))
    found, _ = after(protect(MAKERS[name](), go.protected_subspace(0.5)), params, gradients)
    check_protected(params, found, 0.5)
    if name == "adamw":  # which alone moves them
        with pytest.raises(AssertionError):
            check_protected(params, after(ADAMW, params, gradients)[0], 0.5)


def test_other_leaves_step_as_without_protection(rng):
    params, *gradients = (tree(rng) for _ in range(4))
    found, _ = after(protect(ADAMW), params, gradients)
    plain, _ = after(ADAMW, params, gradients)
    np.testing.assert_array_equal(found["bias"]["bias"], plain["bias"]["bias"])


def test_without_a_subspace_it_is_the_optimizer(rng):
    params, *gradients = (tree(rng) for _ in range(4))
    for bases in (go.protected_subspace(0.0), go.empty_subspace(3)):
        found, _ = after(protect(ADAMW, bases), params, gradients)
        chex.assert_trees_all_close(found, after(ADAMW, params, gradients)[0], atol=1e-6)


def test_all_singular_vectors_but_one_may_be_protected(rng):
    w = jnp.float32(rng.normal(size=(2, 4, 7)))
    left, right = go.protected_subspace(1.0)(w)
    assert left.shape == (2, 4, 3)
    assert right.shape == (2, 7, 3)
    moved = off_both_sides(left, right, jnp.float32(rng.normal(size=(2, 4, 7))))
    assert (np.linalg.matrix_rank(moved, tol=1e-4) == 1).all()


def test_the_state_is_two_bases_and_the_optimizers(rng):
    params = tree(rng)
    tx = protect(ADAMW, go.protected_subspace(0.5))
    state = jax.eval_shape(tx.init, params)
    numbers = sum(x.size for x in jax.tree.leaves(state.bases))
    assert numbers == 3 * 3 * (6 + 9) + 3 * (9 + 6) + 4 * (8 + 8)
    assert jax.tree.structure(state.inner) == jax.tree.structure(ADAMW.init(params))


def extended(s, m, energy, width):
    """GPM's rule in NumPy for one matrix."""
    rest = m - s @ (s.T @ m)
    u, sigma, _ = np.linalg.svd(rest, full_matrices=False)
    total, held, k = np.sum(m**2), np.sum((s.T @ m) ** 2), 0
    while held < energy * total and s.shape[1] + k < width:
        held, k = held + sigma[k] ** 2, k + 1
    return np.concatenate([s, u[:, :k]], 1)


def span(x):
    return x @ np.swapaxes(x, -1, -2)


def test_a_basis_extends_as_in_numpy_and_stays_orthonormal(rng):
    width, moments = 6, [rng.normal(size=(3, 8, 5)) * 2.0 ** -np.arange(5) for _ in range(3)]
    found = jnp.zeros((3, 8, width))
    expected = [np.zeros((8, 0))] * 3
    for m in moments:
        found = jax.jit(go.extend_basis)(found, jnp.float32(m), 0.8)
        expected = [extended(s, own, 0.8, width) for s, own in zip(expected, m, strict=True)]
        for got, s in zip(found, expected, strict=True):
            np.testing.assert_allclose(span(np.asarray(got)), span(s), atol=1e-4)
            np.testing.assert_allclose(got.T @ got, np.diag(np.arange(width) < s.shape[1]), atol=1e-5)


def test_zeros_extend_nothing():
    basis = jnp.eye(6, 4)[:, :2]
    basis = jnp.concatenate([basis, jnp.zeros((6, 2))], 1)
    np.testing.assert_array_equal(go.extend_basis(basis, jnp.zeros((6, 5)), 0.9), basis)


def test_two_tasks_one_after_the_other(rng):
    """What Adam's moment was large in at the end of the first task does not move in the second one."""
    params, *gradients = (tree(rng) for _ in range(9))
    tx = protect(ADAMW, go.empty_subspace(4))
    params, state = after(tx, params, gradients[:4])
    moments = optax.tree.get(state.inner, "mu")
    state = go.extend_protection(state, moments, 0.6, weight_dimension_numbers=HEADS)
    right = optax.tree.get(state.bases, "right")
    before = params
    for g in gradients[4:]:
        updates, state = jax.jit(tx.update)(g, state, params)
        params = optax.apply_updates(params, updates)
    for name in ("stack", "tall", "heads"):
        v = np.float64(jax.tree.leaves(right[name])[0])
        assert 1 <= np.linalg.matrix_rank(v).min() <= 4
        change = as_blocks(name, params[name]) - as_blocks(name, before[name])
        assert np.abs(change @ v).max() < 2e-6 < 0.01 < np.abs(change).max()
    # The protected directions hold the share of each moment.
    m = as_blocks("tall", moments["tall"])
    v = np.float64(jax.tree.leaves(right["tall"])[0])
    assert np.sum((m @ v) ** 2) >= 0.6 * np.sum(m**2) * (1 - 1e-5)


def test_a_gradient_that_is_not_finite_leaves_its_leaf(rng):
    params, gradient = tree(rng), tree(rng)
    tx = protect(go.muon(0.1))
    gradient["tall"]["kernel"] = gradient["tall"]["kernel"].at[0, 0].set(jnp.nan)
    (updates,), state = run(tx, [gradient], params)
    assert not updates["tall"]["kernel"].any()
    assert updates["stack"]["kernel"].all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_what_cannot_be_done_is_said(rng):
    params = tree(rng)
    tx = protect(go.galore_muon(0.1, 2, 3))

    def loss(params, batch):
        return sum(jnp.sum(x * batch) for x in jax.tree.leaves(params))

    with pytest.raises(ValueError, match="protect needs the gradient itself"):
        go.projected_update(tx, loss, jnp.ones((2, 1)), tx.init(params), params)
    with pytest.raises(TypeError, match="extend_protection needs the state of protect"):
        go.extend_protection(ADAMW.init(params), params, 0.5)
    with pytest.raises(ValueError, match="energy"):
        go.extend_protection(tx.init(params), params, 1.5)
    with pytest.raises(ValueError, match="fraction must be between 0 and 1"):
        go.protected_subspace(1.5)


def test_moments_may_be_gradients_of_a_flax_nnx_module():
    model = nnx.Linear(6, 9, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, go.protect(ADAMW, go.empty_subspace(3)), wrt=nnx.Param)
    gradients = nnx.grad(lambda model: jnp.sum(model(jnp.eye(6)) ** 2))(model)
    state = go.extend_protection(optimizer.opt_state, gradients, 0.5)
    (right,) = [x for x in jax.tree.leaves(state.bases) if x.shape == (9, 3)]
    assert 1 <= np.linalg.matrix_rank(right) <= 3


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_moments_of_any_size_extend_alike(rng, size):
    m = jnp.float32(rng.normal(size=(8, 5)))
    expected = go.extend_basis(jnp.zeros((8, 4)), m, 0.7)
    np.testing.assert_allclose(go.extend_basis(jnp.zeros((8, 4)), m * size, 0.7), expected, atol=1e-5)
    basis = jnp.eye(8, 4)
    np.testing.assert_array_equal(go.extend_basis(basis, jnp.full((8, 5), jnp.nan), 0.7), basis)


def test_no_free_columns_and_wrong_bases_are_named(rng):
    params = {"w": {"kernel": jnp.float32(rng.normal(size=(6, 9)))}}
    state = go.protect(ADAMW).init(params)
    with pytest.raises(ValueError, match="has no free column"):
        go.extend_protection(state, params, 0.5)
    with pytest.raises(ValueError, match=r"bases must return columns of the shapes \[\(6,\), \(9,\)\]"):
        go.protect(ADAMW, lambda w: go.protected_subspace(0.5)(w)[::-1]).init(params)
    with pytest.warns(go.RoutingWarning, match="patterns that decide no leaf"):
        go.protect(ADAMW, weight_dimension_numbers={"nothing/kernel": go.LAST_TWO}).init(params)
