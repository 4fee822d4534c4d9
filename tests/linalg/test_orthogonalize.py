"""Orthogonalizers against the SVD, and their identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gum_optax as go
from gum_optax._linalg.newton_schulz import POLAR_EXPRESS_MINIMAX

from helpers import AMPLIFIED
from oracles import jordan, msign

express = functools.partial(go.newton_schulz, coefficients=go.POLAR_EXPRESS)
ALL = {
    "jordan": go.newton_schulz,
    "gram": go.gram_newton_schulz,
    "fastest": go.fastest_newton_schulz,
    "polar_express": express,
    "polar": go.polar,
}
SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))
SEEDS = st.integers(0, 2**16)


def orthonormal(rng, rows, columns):
    return np.float32(np.linalg.qr(rng.normal(size=(rows, columns)))[0])


def with_spectrum(rng, m, n, singular):
    k = len(singular)
    return jnp.float32(orthonormal(rng, m, k) * singular @ orthonormal(rng, n, k).T)


@given(SHAPES, SEEDS)
def test_newton_schulz_is_its_polynomial(shape, seed):
    x = np.random.default_rng(seed).normal(size=shape)
    np.testing.assert_allclose(jax.jit(go.newton_schulz)(jnp.float32(x)), jordan(x), atol=2e-4)


@pytest.mark.parametrize("coefficients", [go.JORDAN, go.POLAR_EXPRESS], ids=["jordan", "polar_express"])
@pytest.mark.parametrize("condition", [1e1, 1e5])
def test_the_gram_form_is_the_plain_form_up_to_rounding(rng, coefficients, condition):
    x = with_spectrum(rng, 24, 96, np.geomspace(1, 1 / condition, 24))
    plain = go.newton_schulz(x, coefficients)
    # Measured: 2e-5. Errors of the Gram matrix grow with the number of rows since its last computation.
    np.testing.assert_allclose(go.gram_newton_schulz(x, coefficients), plain, atol=1e-4)
    np.testing.assert_allclose(go.gram_newton_schulz(x, coefficients, restart=1), plain, atol=1e-4)
    with pytest.raises(ValueError, match="restart must be at least 1, got 0"):
        go.gram_newton_schulz(x, restart=0)


def test_the_fastest_way_is_the_gram_form_of_wide_matrices_on_a_cpu_alone(rng):
    gram = functools.partial(go.gram_newton_schulz, restart=5)
    for shape, on_a_cpu in (
        ((16, 16), go.newton_schulz),
        ((31, 16), go.newton_schulz),
        ((16, 32), gram),
        ((48, 16), gram),
    ):
        x = jnp.float32(rng.standard_normal(shape))
        for platform, way in (("cpu", on_a_cpu), ("cuda", go.newton_schulz), ("tpu", go.newton_schulz)):
            found, expected = (
                jax.jit(f).trace(x).lower(lowering_platforms=(platform,)).as_text().count("dot_general")
                for f in (go.fastest_newton_schulz, way)
            )
            assert found == expected > 0
        np.testing.assert_allclose(go.fastest_newton_schulz(x), go.newton_schulz(x), atol=1e-4)


@pytest.mark.parametrize("small", [1e-2, 1e-3, 3e-4, 1e-7, 0])
def test_without_restarts_the_gram_form_is_close_to_float64_whatever_the_condition(rng, small):
    """The bound is in spectral norm, because the Gram matrix loses small singular values to rounding."""
    left, _ = np.linalg.qr(rng.standard_normal((16, 16)))
    right, _ = np.linalg.qr(rng.standard_normal((64, 16)))
    x = np.float32((left * np.r_[1, np.full(15, small)]) @ right.T)
    exact = np.float64(x) / np.linalg.norm(np.float64(x))
    for a, b, c in go.JORDAN:
        gram = exact @ exact.T
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    found = go.gram_newton_schulz(jnp.asarray(x), restart=5)
    assert np.linalg.norm(found - exact, 2) < 2e-3


def test_the_gram_form_costs_less_on_wide_matrices():
    x = jax.ShapeDtypeStruct((16, 128), jnp.float32)

    def flops(method):
        return jax.jit(method).lower(x).compile().cost_analysis()["flops"]

    one_row = flops(functools.partial(go.newton_schulz, coefficients=go.JORDAN[:1]))
    # XLA counts the loop of the plain form once; the Gram form has no loop.
    assert flops(go.gram_newton_schulz) < 0.7 * len(go.JORDAN) * one_row


def test_bfloat16_products_keep_singular_values_near_one(rng):
    x = with_spectrum(rng, 16, 64, np.geomspace(1, 0.01, 16))
    singular = np.linalg.svd(go.newton_schulz(x, dtype=jnp.bfloat16))[1]
    assert 0.6 < singular.min() <= singular.max() < 1.3


@given(SHAPES, SEEDS)
def test_polar_is_the_polar_factor(shape, seed):
    x = np.random.default_rng(seed).normal(size=shape)
    if np.linalg.cond(x) < 1e3:  # the factor of an ill-conditioned matrix is itself ill-conditioned
        np.testing.assert_allclose(jax.jit(go.polar)(jnp.float32(x)), msign(x), atol=2e-3)


def test_polar_is_exact_at_real_sizes_and_condition_1e5(rng):
    u, v = orthonormal(rng, 256, 256), orthonormal(rng, 1024, 256)
    x = jnp.asarray(u * np.geomspace(1, 1e-5, 256, dtype=np.float32) @ v.T)
    assert np.linalg.norm(go.polar(x) - u @ v.T) / 16 < 5e-3  # the rounding of x times its condition
    low = jnp.asarray(u[:, :32] @ v[:, :32].T)
    np.testing.assert_allclose(go.polar(low), low, atol=1e-5)


def test_polar_is_exact_at_condition_1e4_and_cuts_the_null_space(rng):
    singular = np.float32([1, 1e-1, 1e-2, 1e-3, 1e-4])
    u, v = orthonormal(rng, 8, 5), orthonormal(rng, 12, 5)
    np.testing.assert_allclose(go.polar(jnp.asarray(u * singular @ v.T)), u @ v.T, atol=2e-3)
    out = np.linalg.svd(go.polar(with_spectrum(rng, 8, 12, [1.0, 0.5])), compute_uv=False)
    np.testing.assert_allclose(out, [1, 1, 0, 0, 0, 0, 0, 0], atol=1e-5)


def test_polar_express_brings_singular_values_from_1e_3_up_to_one(rng):
    x = with_spectrum(rng, 10, 14, np.geomspace(1e-3, 1, 10))
    np.testing.assert_allclose(np.linalg.svd(express(x), compute_uv=False), 1, atol=1e-2)
    assert np.linalg.norm(express(x) - msign(np.float64(x))) / np.sqrt(10) < 1e-2


def test_jordan_brings_singular_values_near_one(rng):
    x = with_spectrum(rng, 10, 14, np.geomspace(3e-2, 1, 10))
    out = np.linalg.svd(go.newton_schulz(x), compute_uv=False)
    assert out.min() > 0.65  # the published band is about [0.7, 1.2]
    assert out.max() < 1.25


@pytest.mark.parametrize("promotions", [0, 2, 5])
def test_high_pass_is_its_polynomials_of_the_singular_values(rng, promotions):
    singular = np.array([1.0, 0.7, 0.4, 0.1, 0.02])
    x = with_spectrum(rng, 5, 8, singular)
    u, _, vt = np.linalg.svd(np.float64(x), full_matrices=False)
    wanted = singular / np.linalg.norm(singular)
    for step in range(5):
        s = wanted
        wanted = (15 * s - 10 * s**3 + 3 * s**5) / 8 if step < promotions else (5 * s**3 - 3 * s**5) / 2
    for form in (go.newton_schulz, go.gram_newton_schulz):
        np.testing.assert_allclose(form(x, go.high_pass(promotions)), u * wanted @ vt, atol=1e-5)


@pytest.mark.parametrize(("a", "b", "c"), sorted(set(go.high_pass(1))))
def test_rows_of_high_pass_rise_from_0_to_1_and_are_flat_there(a, b, c):
    """With the linear term as large as that allows, or zero: this defines the two quintics."""
    assert (a + b + c, a + 3 * b + 5 * c) == (1, 0)
    u = np.linspace(0, 1, 1001)
    slope = a + 3 * b * u + 5 * c * u**2
    assert slope.min() > -1e-12
    # A larger linear term, with the same value and slope at 1, would have a negative slope below 1.
    steeper = (a + 0.1) + 3 * (b - 0.2) * u + 5 * (c + 0.1) * u**2
    assert a == 0 or steeper.min() < -1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6,), "at most the number of steps, 5, got 6"),
        ((-1,), "at least 0"),
        ((0, 0), "steps must be at least 1"),
    ],
)
def test_high_pass_refuses_other_numbers_of_steps(arguments, message):
    with pytest.raises(ValueError, match=message):
        go.high_pass(*arguments)


def test_polar_express_rows_are_minimax_each_on_the_range_that_the_row_before_leaves():
    """The errors of each quintic at its extremes are equal in size: this property defines the quintic.

    The listing fits row k on [max(l, u/41.5), u] ("cushion" 0.02407) and centres it at 1 over [l, u];
    from the fourth row on l exceeds the cushion, so there the ends are l and u themselves.
    """
    table = np.asarray(POLAR_EXPRESS_MINIMAX)
    low, high = 1e-3, 1.0
    for row, (a, b, c) in enumerate(table):
        fitted_low = max(low, 0.02407327424182761 * high)
        x = np.linspace(fitted_low, high, 200_001)
        y = a * x + b * x**3 + c * x**5
        inner = np.flatnonzero(np.diff(np.sign(np.diff(y)))) + 1
        extremes = y[[0, *inner, -1]]
        assert len(extremes) == 4 or row >= 6  # the last rows are those of Newton-Schulz, up to rounding
        centre = (extremes.max() + extremes.min()) / 2
        if row < 6:
            np.testing.assert_allclose(np.abs(extremes / centre - 1), extremes.max() / centre - 1, rtol=1e-3)
        whole = np.linspace(low, high, 200_001)
        image = a * whole + b * whole**3 + c * whole**5
        low, high = image.min(), image.max()
    assert abs(low - 1) < 1e-6
    assert abs(high - 1) < 1e-6


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_orthogonalizing_commutes_with_an_orthonormal_lift(rng, method):
    p, r = orthonormal(rng, 9, 4), jnp.float32(rng.normal(size=(4, 11)))
    np.testing.assert_allclose(method(p @ r), p @ method(r), atol=AMPLIFIED)


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_orthogonalizing_is_scale_invariant_and_takes_zero_to_zero(rng, method):
    x = jnp.float32(rng.normal(size=(5, 7)))
    for scale in (1e-30, 1e-3, 1e30):
        np.testing.assert_allclose(method(scale * x), method(x), atol=AMPLIFIED)
    np.testing.assert_array_equal(method(jnp.zeros((5, 7))), 0)


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_orthogonalizing_a_stack_is_orthogonalizing_each_and_a_transpose_its_transpose(rng, method):
    x = jnp.float32(rng.normal(size=(2, 3, 5, 7)))
    together = method(x)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(together[i, j], method(x[i, j]), atol=AMPLIFIED)
    np.testing.assert_allclose(method(x.mT), together.mT, atol=AMPLIFIED)


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_bfloat16_is_computed_in_float32(rng, method):
    x = jnp.asarray(rng.normal(size=(5, 7)), jnp.bfloat16)
    assert method(x).dtype == jnp.bfloat16
    exact = method(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(method(x)), np.float32(exact))


def test_the_loop_is_not_unrolled_into_memory():
    """More steps need no more temporaries."""

    def temporaries(steps):
        method = functools.partial(go.newton_schulz, coefficients=go.JORDAN[:1] * steps)
        compiled = jax.jit(method).lower(jax.ShapeDtypeStruct((4, 64, 128), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(40) <= temporaries(5) + 40 * 3 * 4


def test_orthogonalize_maps_its_method_over_the_tree(rng):
    tree = {"a": jnp.float32(rng.normal(size=(2, 3, 4))), "b": None}
    tx = go.orthogonalize(go.polar)
    step, state = tx.update(tree, tx.init(tree))
    np.testing.assert_allclose(
        step["a"], go.polar(tree["a"]), atol=1e-6
    )  # jax 0.9 fuses the two forms differently
    assert step["b"] is None
    assert not jax.tree.leaves(state)
