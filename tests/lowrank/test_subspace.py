"""Finders are orthonormal for every gradient, and capture as much of it as the SVD does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gum_optax as go
from gum_optax._linalg.orthonormal import orthonormalize, outside
from gum_optax._lowrank.finders import count_sketch
from gum_optax._lowrank.switch import few_finders_of, finders_of

from helpers import sequence

FINDERS = {
    "svd": go.svd_subspace,
    "iteration": go.subspace_iteration,
    "sketched": go.sketched_subspace,
    "random": go.random_subspace,
}
KEY = jax.random.key(0)
# A float32 Gram matrix of up to 64 rows; measured 5e-7.
ORTHONORMAL = 5e-6


def start(m, r, *batch):
    return go.random_subspace(KEY, jnp.zeros((*batch, m, 1)), jnp.zeros((*batch, m, r)))


def defect(p):
    return float(jnp.abs(p.mT @ p - jnp.eye(p.shape[-1])).max())


def captured(p, g):
    return float(jnp.sum((p.mT @ g) ** 2) / jnp.sum(g**2))


def gradients(m=24, n=40, seed=0):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(m, n)).astype(np.float32)
    low = (rng.normal(size=(m, 2)) @ rng.normal(size=(2, n))).astype(np.float32)
    one_hot = np.zeros((m, n), np.float32)
    one_hot[3, 5] = 1
    decay = np.linalg.qr(rng.normal(size=(m, m)))[0] * np.float32(10.0) ** -np.linspace(0, 8, m) @ g
    return {
        "gaussian": g,
        "tiny": g * 1e-30,
        "huge": g * 1e30,
        "zero": 0 * g,
        "constant": np.ones_like(g),
        "one_hot": one_hot,
        "rank_2": low,
        "condition_1e8": np.float32(decay),
    }


@pytest.mark.parametrize("finder", FINDERS.values(), ids=FINDERS)
def test_columns_are_orthonormal_whatever_the_gradient(finder):
    find = jax.jit(finder)
    for name, g in gradients().items():
        p = find(KEY, jnp.asarray(g), start(24, 7))
        assert p.shape == (24, 7), name
        assert p.dtype == jnp.float32, name
        assert defect(p) < ORTHONORMAL, name


@settings(max_examples=8)  # each example compiles every finder
@given(st.integers(2, 12), st.integers(1, 12), st.lists(st.integers(1, 2), max_size=2), st.data())
def test_finders_take_any_stack_of_any_shape(m, n, batch, data):
    rank = data.draw(st.integers(1, m - 1))
    g = jnp.float32(np.random.default_rng(0).normal(size=(*batch, m, n)))
    for finder in FINDERS.values():
        p = jax.jit(finder)(KEY, g, start(m, rank, *batch))
        assert p.shape == (*batch, m, rank)
        assert defect(p) < ORTHONORMAL


def test_svd_subspace_is_the_top_of_numpys(rng):
    g = rng.normal(size=(2, 8, 12))
    p = go.svd_subspace(KEY, jnp.float32(g), start(8, 3, 2))
    u = np.linalg.svd(g)[0][..., :3]
    np.testing.assert_allclose(p @ p.mT, u @ np.swapaxes(u, -1, -2), atol=1e-5)


def drifting(steps=6, m=48, n=96, exponent=0.7):
    """Gradients with a power-law spectrum and new noise in each step, a third of their norm."""
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(m, m)))[0]
    v = np.linalg.qr(rng.normal(size=(n, m)))[0]
    base = u * (1.0 + np.arange(m)) ** -exponent @ v.T
    noise = 0.3 * np.linalg.norm(base) / np.sqrt(m * n)
    for _ in range(steps):
        base = base + 0.2 * noise * rng.normal(size=(m, n))
        yield jnp.float32(base + noise * rng.normal(size=(m, n)))


def test_the_default_finder_captures_what_the_svd_captures():
    """The finder makes two power steps at first, then one at each refresh."""
    p, share = start(48, 12), []
    for step, g in enumerate(drifting(steps=12)):
        before = p
        (form,), phase = few_finders_of(go.track_subspace, jnp.int32(step))
        assert int(phase) == min(step, 1)
        p = form(lambda f, *operands, g=g: f(g, *operands), KEY, p)
        np.testing.assert_array_equal(p, go.subspace_iteration(KEY, g, before, 1 if step else 2))
        forms, phase = finders_of(go.track_subspace, jnp.int32(step))  # as on a TPU
        own = forms[int(phase)](lambda f, *operands, g=g: f(g, *operands), KEY, before)
        np.testing.assert_array_equal(own, p)
        share.append(captured(p, g) / captured(go.svd_subspace(KEY, g, p), g))
    assert share[0] > 0.96  # measured 0.967; a power step from a random subspace captures 0.93
    assert min(share[1:]) > 0.97


def test_warm_iteration_captures_what_the_svd_captures():
    p, find = start(48, 12), jax.jit(go.subspace_iteration)
    for step, g in enumerate(drifting()):
        p = find(KEY, g, p)
        share = captured(p, g) / captured(go.svd_subspace(KEY, g, p), g)
        assert share > (0.97 if step else 0.93)  # the first step starts from a random subspace


def iterated_by_numpy(g, p, iterations):
    """The docstring's formula in float64."""
    p = np.asarray(p, np.float64)
    for _ in range(iterations):
        y = g @ np.swapaxes(g, -1, -2) @ p
        p = np.linalg.qr(y / np.linalg.norm(y, axis=(-2, -1), keepdims=True) + 1e-5 * p)[0]
    return p


@pytest.mark.parametrize("decades", [0, 1, 3])
def test_iteration_is_numpys(rng, decades):
    """The result does not suffer from fewer orthonormalization passes between steps."""
    u, v = (np.linalg.qr(rng.normal(size=(size, 24)))[0] for size in (24, 40))
    g = u * 10.0 ** -np.linspace(0, decades, 24) @ v.T
    p = start(24, 7)
    found = go.subspace_iteration(KEY, jnp.float32(g), p, iterations=3)
    exact = iterated_by_numpy(g, p, 3)
    np.testing.assert_allclose(found @ found.mT, exact @ exact.T, atol=2e-6)  # measured: 2e-7


def test_iteration_is_numpys_where_the_gradient_sees_nothing(rng):
    """The gradient has rank 2: five of seven directions come from the floor, 1e-5 over a rounding of 1e-7."""
    g = rng.normal(size=(4, 24, 2)) @ rng.normal(size=(4, 2, 40))
    p = start(24, 7, 4)
    found = go.subspace_iteration(KEY, jnp.float32(g), p)
    exact = iterated_by_numpy(g, p, 2)
    # Measured: 9e-4 with any passes between the steps, but 3e-2 without a clean pass there.
    np.testing.assert_allclose(found @ found.mT, exact @ np.swapaxes(exact, -1, -2), atol=2e-3)


def sketched_by_numpy(key, g, p, iterations):
    """The docstring's formula in float64."""
    n, r = g.shape[-1], p.shape[-1]
    drawn = np.asarray(jax.random.randint(key, (n,), 0, 2 * r))
    sketch = np.zeros((n, r))
    sketch[np.arange(n), drawn % r] = np.where(drawn < r, 1, -1)
    y = g @ sketch
    y = y / np.linalg.norm(y, axis=(-2, -1), keepdims=True) + 1e-2 * np.asarray(p, np.float64)
    return iterated_by_numpy(g, np.linalg.qr(y)[0], iterations)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_sketched_subspace_is_numpys(rng, iterations):
    """The projectors of a stack."""
    g = rng.normal(size=(2, 24, 40)) * np.linspace(1, 3, 40)
    p = start(24, 7, 2)
    found = go.sketched_subspace(KEY, jnp.float32(g), p, iterations)
    exact = sketched_by_numpy(KEY, g, p, iterations)
    np.testing.assert_allclose(found @ found.mT, exact @ np.swapaxes(exact, -1, -2), atol=2e-6)


def test_a_sketch_loses_nothing_in_the_mean(rng):
    """`E|GS|² = |G|²` for every gradient: here for equal columns, whose sum the signs keep bounded."""
    g = np.ones((1, 40))
    keys = jax.random.split(KEY, 2000)
    squares = jax.vmap(lambda key: jnp.sum((g @ count_sketch(key, 40, 7)) ** 2))(keys)
    z = (np.mean(squares) - 40) / (np.std(squares) / np.sqrt(len(keys)))
    assert abs(z) < 4
    assert np.std(squares) > 1  # the columns do share entries


def test_a_sketch_and_a_power_step_find_more_than_a_power_step():
    """The first subspace, compared by the exact energy."""
    for g in drifting():
        sketched, iterated = (
            captured(find(KEY, g, start(48, 12), iterations=1), g)
            for find in (go.sketched_subspace, go.subspace_iteration)
        )
        assert sketched > iterated


def test_where_a_sketch_cancels_the_floor_a_power_step_starts_from_the_previous_subspace(rng):
    """`G S / |G S| + δ P` of the first block has 24 of 32 directions up to rounding, which could give NaN."""
    p = start(48, 32, 2)
    v = np.linalg.qr(rng.normal(size=(2, 32, 8)))[0]
    cancelled = v @ np.swapaxes(v, -1, -2)
    sketch = rng.normal(size=p.shape) @ (np.eye(32) - cancelled)
    sketch /= np.linalg.norm(sketch, axis=(-2, -1), keepdims=True)
    sketch[0] = np.sqrt(1 - 8e-4) * sketch[0] - (1e-2 * np.asarray(p) @ cancelled)[0]  # norm one
    g = jnp.float32(sketch @ np.linalg.pinv(count_sketch(KEY, 400, 32)))
    found = go.sketched_subspace(KEY, g, p)
    assert defect(found) < ORTHONORMAL
    iterated = go.subspace_iteration(KEY, g, p, iterations=1)
    np.testing.assert_array_equal(found[0], iterated[0])
    assert np.abs(found - iterated)[1].max() > 0.1


def test_iteration_costs_a_small_fraction_of_the_svd():
    """The test compares XLA's count of floating-point operations with the least that an SVD needs."""
    m, n, r = 128, 512, 16
    args = (KEY, jax.ShapeDtypeStruct((m, n), jnp.float32), jax.ShapeDtypeStruct((m, r), jnp.float32))
    cost = jax.jit(go.subspace_iteration).lower(*args).compile().cost_analysis()["flops"]
    # The reduction to bidiagonal form alone takes 4 m² n - 4/3 m³ (Golub and Van Loan, section 5.4.8).
    assert cost < 0.35 * (4 * m**2 * n - 4 / 3 * m**3)


def test_iteration_stays_close_to_the_previous_basis():
    """The finder keeps signs and order, so that an unchanged momentum keeps its meaning."""
    g = next(drifting())
    p = go.subspace_iteration(KEY, g, start(48, 12))
    for _ in range(20):
        p = go.subspace_iteration(KEY, g, p)
    again = go.subspace_iteration(KEY, g + 1e-3 * jnp.abs(g).max(), p)
    assert float(jnp.diagonal(p.mT @ again).min()) > 0.9


@pytest.mark.parametrize("finder", [go.subspace_iteration, go.sketched_subspace])
def test_zero_gradient_keeps_the_previous_subspace(finder):
    p = start(24, 7)
    np.testing.assert_allclose(finder(KEY, jnp.zeros((24, 40)), p), p, atol=1e-6)


def test_random_subspace_is_uniform():
    """`E[P Pᵀ] = (r/m) I` by z-scores, and every draw is different."""
    m, r, count = 6, 2, 4000
    keys = jax.random.split(KEY, count)
    p = jax.vmap(lambda key: go.random_subspace(key, jnp.zeros((m, 1)), jnp.zeros((m, r))))(keys)
    mean = np.asarray((p @ p.mT).mean(0), np.float64)
    spread = np.asarray((p @ p.mT).std(0)) / np.sqrt(count)
    assert np.abs((mean - np.eye(m) * r / m) / spread).max() < 4.5  # the largest of 21 scores
    signs = np.asarray(p[:, 0, 0] > 0).mean()
    assert abs(signs - 0.5) < 4 * 0.5 / np.sqrt(count)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_orthonormalize_is_qr_up_to_condition_1e6(rng, condition):
    u = np.linalg.qr(rng.normal(size=(40, 8)))[0]
    v = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    y = jnp.float32(u * np.geomspace(1, 1 / condition, 8) @ v)
    q = orthonormalize(y)
    assert defect(q) < ORTHONORMAL
    # The columns are equal up to rounding times the condition: a triangular factor with a positive diagonal.
    assert float(jnp.diagonal(q.mT @ y).min()) > 0
    if condition <= 1e4:
        assert float(jnp.abs(jnp.tril(q.mT @ y, -1)).max()) < 1e-5


def test_outside_is_the_residual_and_zero_where_it_is_rounding(rng):
    g = jnp.float32(rng.normal(size=(3, 10, 14)))
    p = go.svd_subspace(KEY, g, start(10, 4, 3))
    np.testing.assert_allclose(outside(p, g), g - p @ (p.mT @ g), atol=1e-5)
    exact = jnp.float32(rng.normal(size=(3, 10, 4)) @ rng.normal(size=(3, 4, 14)))
    np.testing.assert_array_equal(outside(go.svd_subspace(KEY, exact, p), exact), 0)
    np.testing.assert_array_equal(outside(p, jnp.zeros_like(g)), 0)
    # bfloat16 rounds the gradient itself by 0.2 % of its norm; 3 % is more than rounding.
    coarse = exact.astype(jnp.bfloat16)
    q = go.svd_subspace(KEY, coarse, p)
    np.testing.assert_array_equal(outside(q, coarse), 0)
    seen = (exact + 0.03 * jnp.linalg.norm(exact) / jnp.linalg.norm(g) * g).astype(jnp.bfloat16)
    assert outside(go.svd_subspace(KEY, exact, p), seen).any(axis=(1, 2)).all()
    # The finder judges every block separately.
    mixed = jnp.stack([exact[0], g[1]])
    residual = outside(go.svd_subspace(KEY, mixed, p[:2]), mixed)
    assert not residual[0].any()
    assert residual[1].any()


# The residual over the gradient, and how much of it may lie in the subspace. In bfloat16, where a residual is
# more than the gradient's rounding, one projection leaves 1e-5; in float32 it would leave 2e-3.
@pytest.mark.parametrize(
    ("dtype", "share", "largest"), [(jnp.float32, 1e-4, 1e-6), (jnp.bfloat16, 2e-2, 1e-4)]
)
def test_a_small_residual_is_orthogonal_to_the_subspace(rng, dtype, share, largest):
    p = np.linalg.qr(rng.normal(size=(96, 24)))[0]
    g = p @ rng.normal(size=(24, 160))
    noise = rng.normal(size=g.shape)
    g = g + share * np.linalg.norm(g) / np.linalg.norm(noise) * noise
    residual = np.asarray(outside(jnp.float32(p), jnp.asarray(g, dtype)), np.float64)
    assert np.linalg.norm(p.T @ residual) < largest * np.linalg.norm(residual)


def test_slowly_moving_sequences_of_the_helpers_have_a_subspace_to_find():
    g = sequence(np.random.default_rng(0), (6, 9), 2)[0]
    assert captured(go.svd_subspace(KEY, jnp.asarray(g), start(6, 3)), g) > 0.9
