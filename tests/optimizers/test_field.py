"""GaLore, SUMO, SWAN and SinkGD against their oracles and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gum_optax as go
from gum_optax._linalg.normalizers import sinkhorn_together

from helpers import STEPS, run, sequence, steps_of, trees
from oracles import galore_steps, oracle, sinkgd_step, sumo_steps, swan_step

RANK, PERIOD = 3, 4
# A dict of leaves that `hidden_matrices` reads as matrices, with only the optimizer's own scale.
PLAIN = {"find_subspace": go.svd_subspace}


def test_galore_is_its_algorithm(leaves):
    steps, _ = steps_of(go.galore(1.0, RANK, PERIOD, **PLAIN), leaves)
    for name, gradients in leaves.items():
        expected = oracle(galore_steps, gradients, RANK, PERIOD)
        np.testing.assert_allclose(steps[name], expected, rtol=0, atol=2e-4)


@pytest.mark.skipif(not hasattr(optax.contrib, "galore"), reason="optax has had it since 0.2.8")
def test_galore_is_optax_galore_step_by_step_on_square_matrices():
    rng = np.random.default_rng(2)
    gradients = trees({"a": sequence(rng, (7, 7), STEPS), "c": sequence(rng, (5, 5), STEPS)})
    params = {name: jnp.ones_like(g) for name, g in gradients[0].items()}
    ours = go.galore(0.1, RANK, PERIOD, scale=0.25, weight_decay=0.01, **PLAIN)
    theirs = optax.contrib.galore(0.1, RANK, PERIOD, scale=0.25, weight_decay=0.01)
    (a, _), (b, _) = run(ours, gradients, params), run(theirs, gradients, params)
    for x, y in zip(a, b, strict=True):
        for name in x:
            np.testing.assert_allclose(x[name], y[name], atol=2e-6)


@pytest.mark.parametrize("raw", [True, False], ids=["raw_residual", "no_residual"])
def test_sumo_is_its_algorithm(leaves, raw):
    residual = go.add_raw if raw else go.drop
    tx = go.sumo(1.0, RANK, PERIOD, momentum=0.9, residual=residual, **PLAIN)
    steps, _ = steps_of(tx, leaves)
    for name, gradients in leaves.items():
        expected = oracle(sumo_steps, gradients, RANK, PERIOD, 0.9, raw=raw)
        scale = 0.2 * np.sqrt(max(gradients[0].shape[-2:]))
        np.testing.assert_allclose(np.asarray(steps[name]) / scale, expected, rtol=0, atol=1e-3)


def test_the_limiter_acts_when_a_norm_grows_and_never_on_a_full_rank_orthogonal_step():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 4, 6))
    limiter = go.limit_norm_growth(1.1)
    norms = [1.0, 5.0, 5.0, 0.5, 0.0, 9.0]
    expected, previous = [], 0.0
    for norm in norms:
        previous = min(norm, 1.1 * previous) if previous else norm
        expected.append(previous)
    unit = np.float32(x / np.linalg.norm(x, axis=(1, 2), keepdims=True))
    updates, _ = run(limiter, [np.float32(norm) * unit for norm in norms])
    np.testing.assert_allclose([np.linalg.norm(u[0]) for u in updates], expected, rtol=1e-5)
    orthogonal = [np.asarray(go.polar(jnp.float32(rng.normal(size=(2, 4, 6))))) for _ in range(3)]
    updates, _ = run(limiter, orthogonal)
    np.testing.assert_allclose(updates, orthogonal, rtol=1e-5)


@pytest.mark.parametrize("extreme", [1e-30, 1.0, 1e30])
def test_sinkgd_is_its_algorithm_with_the_outputs_as_rows(leaves, extreme):
    first = {name: [np.float32(extreme) * gradients[0]] for name, gradients in leaves.items()}
    steps, _ = steps_of(go.sinkgd(1.0), first)
    for name, gradients in leaves.items():
        kernel = np.float64(gradients[0])  # (fan_in, fan_out): the outputs are columns
        blocks = kernel.reshape(-1, *kernel.shape[-2:])
        expected = np.stack([sinkgd_step(b.T).T for b in blocks]).reshape(kernel.shape)
        np.testing.assert_allclose(steps[name][0] / 0.05, expected, rtol=0, atol=1e-4)


def test_swan_is_its_algorithm_with_the_outputs_as_rows(leaves):
    first = {name: [gradients[0]] for name, gradients in leaves.items()}
    steps, _ = steps_of(go.swan(1.0, orthogonalizer=go.polar), first)
    for name, gradients in leaves.items():
        kernel = np.float64(gradients[0])
        blocks = kernel.reshape(-1, *kernel.shape[-2:])
        expected = np.stack([swan_step(b.T).T for b in blocks]).reshape(kernel.shape)
        np.testing.assert_allclose(steps[name][0] / 0.05, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("make", [go.swan, go.sinkgd])
def test_stateless_means_a_step_count_at_most(make):
    state = make(1.0).init({"kernel": jnp.ones((4, 6))})
    assert sum(x.size for x in jax.tree.leaves(state.inner.inner_states["matrices"])) == 0


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**16))
def test_sinkhorn_is_multi_norm_of_rows_and_columns(m, n, seed):
    x = jnp.float32(np.random.default_rng(seed).normal(size=(m, n)))
    alternating = go.multi_norm((go.unit_rows, go.unit_columns), 5)
    found, expected = jax.jit(lambda x: (go.sinkhorn(x), alternating(x)))(x)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(found))), 1, rtol=1e-4)


def test_sinkhorn_takes_columns_of_any_size(rng):
    x = rng.normal(size=(5, 7)) * np.geomspace(1, 1e-30, 7)
    np.testing.assert_allclose(go.sinkhorn(jnp.float32(x)), sinkgd_step(x), atol=1e-4)
    with pytest.raises(ValueError, match="first must be -1 or -2, got 0"):
        go.sinkhorn(jnp.ones((3, 4)), first=0)


@pytest.mark.parametrize("first", [-1, -2])
def test_stacks_are_scaled_together_as_each_alone(rng, first):
    """As a GPU takes scanned layers: three of one shape, and one of another."""
    shapes = [(2, 5, 7), (3, 4, 6), (2, 5, 7), (2, 5, 7)]
    xs = [jnp.float32(rng.normal(size=shape) * 10.0**i) for i, shape in enumerate(shapes)]
    found, alone = jax.jit(
        lambda xs: (sinkhorn_together(xs, 5, first), [go.sinkhorn(x, 5, first) for x in xs])
    )(xs)
    for x, expected in zip(found, alone, strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-5)


def test_single_norms_are_the_named_optimizers(rng):
    x = {"kernel": jnp.float32(rng.normal(size=(4, 6)))}

    def step(tx):
        return run(tx, [x])[0][0]["kernel"]

    def of(*projections):
        return optax.chain(go.normalize(go.multi_norm(projections)), optax.scale_by_learning_rate(1.0))

    np.testing.assert_array_equal(step(of(jnp.sign)), step(optax.sign_sgd(1.0)))
    normalized = optax.chain(optax.normalize_by_update_norm(), optax.scale(-(24**0.5)))
    np.testing.assert_allclose(step(of(go.unit_frobenius)), step(normalized), rtol=1e-5)
    whitened = step(of(functools.partial(go.whiten, method=go.newton_schulz)))
    muon = step(go.muon(1.0, momentum=0.0))
    np.testing.assert_allclose(whitened / jnp.linalg.norm(whitened), muon / jnp.linalg.norm(muon), atol=1e-6)
    # The optimizers treat outputs as rows.
    flipped = {name: g.T for name, g in x.items()}
    for make, projections, rounds in (
        (go.swan, (go.standardize_rows, go.whiten), 1),
        (go.sinkgd, (go.unit_rows, go.unit_columns), 5),
    ):
        arguments = {"orthogonalizer": go.polar} if make is go.swan else {}
        expected = go.multi_norm(projections, rounds)(flipped["kernel"]).T
        np.testing.assert_allclose(step(make(1.0, scale=1.0, **arguments)), -expected, atol=1e-4)


@pytest.mark.parametrize(
    "method", [go.sinkhorn, go.standardize_rows, go.unit_rows, go.unit_columns, go.unit_frobenius, go.whiten]
)
def test_normalizers_keep_zero_rows_and_columns_and_are_scale_free_but_for_whitening(rng, method):
    x = rng.normal(size=(5, 7)).astype(np.float32)
    x[1] = 0
    if method is not go.standardize_rows:  # it subtracts each row's mean from zeros too
        x[:, 2] = 0
    out = np.asarray(method(jnp.asarray(x)))
    assert not out[x == 0].any() or method is go.whiten
    np.testing.assert_allclose(out[1], 0, atol=0 if method is not go.whiten else 1e-6)
    if method is not go.whiten:  # whitening keeps the norm of its input
        for scale in (1e-30, 1e30):
            np.testing.assert_allclose(method(jnp.float32(scale) * x), out, atol=1e-4)
    np.testing.assert_array_equal(method(jnp.zeros((3, 4))), 0)
    assert method(jnp.ones((3, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def scratch(function, *arguments, **options):
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


VECTORS = 20 * 4 * (256 + 512)  # bytes: a twelfth of the matrix


@pytest.mark.parametrize("first", [-1, -2])
def test_sinkhorn_writes_the_matrix_once(first):
    """The scratch is vectors: the compiled function has no temporary of the matrix's size."""
    matrix = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    assert scratch(functools.partial(go.sinkhorn, first=first), matrix) < VECTORS


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="the XLA of jax 0.9 writes out two matrices here")
def test_a_whole_step_of_sinkgd_needs_vectors_beside_gradient_and_parameters():
    tx = go.sinkgd(0.1)
    params = {"kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32)}

    def step(g, state, params):
        u, state = tx.update(g, state, params)
        return optax.apply_updates(params, u), state

    state = jax.eval_shape(tx.init, params)
    assert scratch(step, params, state, params, donate_argnums=(1, 2)) < VECTORS


def test_randomized_svd_captures_what_the_svd_captures_from_a_random_start(rng):
    u = np.linalg.qr(rng.normal(size=(48, 48)))[0]
    v = np.linalg.qr(rng.normal(size=(96, 48)))[0]
    g = jnp.float32(u * (1.0 + np.arange(48)) ** -0.7 @ v.T)
    p0 = jnp.zeros((48, 8))

    def captured(p):
        return float(jnp.sum((p.mT @ g) ** 2))

    p = go.randomized_svd(jax.random.key(1), g, p0)
    assert captured(p) > 0.99 * captured(go.svd_subspace(jax.random.key(1), g, p0))
    np.testing.assert_allclose(p.mT @ p, np.eye(8), atol=5e-6)
    other = go.randomized_svd(jax.random.key(2), g, p0)
    assert (p != other).any()
    # The columns are ordered: the first columns alone are a good subspace.
    first = go.svd_subspace(jax.random.key(1), g, jnp.zeros((48, 2)))
    assert captured(p[:, :2]) > 0.99 * captured(first)


def test_polar_by_products_is_exact_at_condition_1e5_where_the_gram_matrix_is_not(rng):
    u, v = (np.linalg.qr(rng.normal(size=(n, 64)))[0] for n in (64, 256))
    x = np.float32(u * np.geomspace(1, 1e-5, 64) @ v.T)
    left, _, right = np.linalg.svd(np.float64(x), full_matrices=False)
    exact = left @ right

    def distance(y):
        return np.linalg.norm(y - exact) / np.linalg.norm(exact)

    assert distance(go.polar_by_products(jnp.asarray(x))) < 1.5e-3
    assert distance(go.polar(jnp.asarray(x))) < 1.5e-3
    values, vectors = np.linalg.eigh(x @ x.T)
    by_gram = (vectors / np.sqrt(np.maximum(values, 1e-12))) @ vectors.T @ x
    assert distance(by_gram) > 0.1


BASES = {"sgd": optax.identity, "momentum": lambda: optax.trace(0.9)}
BASES |= {"adam": optax.scale_by_adam, "lion": optax.scale_by_lion}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_the_paradigm_takes_any_base(base):
    rng = np.random.default_rng(5)
    gradients = [{"w": g} for g in sequence(rng, (6, 4, 7), 5)]
    updates, state = run(go.as_matrices(go.unbiased_low_rank(base(), 2, 2, 0.34)), gradients)
    assert all(np.isfinite(u["w"]).all() and u["w"].any() for u in updates)
    # Sampled blocks step outside the subspace, all others inside it.
    p, step = state.projectors["w"], updates[-1]["w"]
    out = np.linalg.norm(step - p @ (p.mT @ step), axis=(1, 2)) / np.linalg.norm(step, axis=(1, 2))
    sampled = np.asarray(state.outside.index["4x7"])
    assert (out[sampled] > 0.5).all()
    assert (np.delete(out, sampled) < 1e-5).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="scale must be at least 0, got -1"):
        go.galore(1.0, scale=-1)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        go.sinkgd(1.0, rounds=0)
    with pytest.raises(ValueError, match=r"norm_growth must be at least 1, got 0\.5"):
        go.sumo(1.0, norm_growth=0.5)
    with pytest.raises(ValueError, match="projections must hold at least one function"):
        go.multi_norm(())
    with pytest.raises(TypeError, match="orthogonalizer must be a function"):
        go.swan(1.0, orthogonalizer="polar")
