"""JAX's strict flags and all floating-point types, with and without 64 bits."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import AMPLIFIED, CORE_AND_LONG, OPTIMIZERS, run

every_optimizer = pytest.mark.parametrize("name", CORE_AND_LONG)

# All flags that optax.adamw passes, at once; it does not pass jax_numpy_dtype_promotion="strict".
STRICT = {
    "jax_numpy_rank_promotion": "raise",
    "jax_check_tracer_leaks": True,
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_debug_key_reuse": True,
    "jax_enable_checks": True,
    "jax_legacy_prng_key": "error",
    "jax_transfer_guard": "disallow",
    "jax_default_prng_impl": "rbg",
}


@contextlib.contextmanager
def flags(**values):
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def tree(seed=0, dtype=jnp.float32):
    """A stack wide enough for the Gram form, single matrices, an unprojected matrix, and other leaves."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    kernels = {"wide": normal(3, 4, 9), "one": normal(4, 7), "two": normal(7, 4), "small": normal(2, 9)}
    return kernels | {"embedding": normal(8, 4), "bias": normal(4)}


@functools.cache
def optimizer(name):
    make, arguments = OPTIMIZERS[name]
    return make(0.1, weight_decay=0.01, **arguments)


def trained(tx):
    """Two steps, with arguments and results always on the device."""
    params, gradients = tree(), [tree(1), tree(2)]
    with flags(**STRICT):
        state = jax.jit(tx.init)(params)
        update = jax.jit(tx.update)
        for g in gradients:
            updates, state = update(g, state, params)
        return updates


def test_the_flags_are_those_that_adamw_passes():
    assert trained(optax.adamw(0.1))


@every_optimizer
def test_an_optimizer_passes_the_strict_flags_that_adamw_passes(name):
    strict = trained(optimizer(name))
    updates, _ = run(optimizer(name), [tree(1), tree(2)], tree())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=AMPLIFIED), strict, updates[-1])


@pytest.mark.parametrize("rule", [go.low_variance, go.complement])
def test_a_momentum_in_bfloat16_and_each_compensation_lift_no_rank(rule):
    make = functools.partial(go.gum, 0.1, rank=2, full_rank_fraction=0.3, momentum_dtype="bfloat16")
    tx = make(compensation=rule, orthogonalizer=go.polar_by_products)
    with flags(jax_numpy_rank_promotion="raise", jax_debug_key_reuse=True):
        jax.eval_shape(tx.update, tree(), jax.eval_shape(tx.init, tree()), tree())


WIDTHS = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@every_optimizer
def test_with_64_bits_every_pair_of_dtypes_keeps_those_of_the_state_and_of_the_parameters(name):
    tx = optimizer(name)
    with jax.enable_x64(True):
        for wide, narrow in itertools.product(WIDTHS, repeat=2):
            if jnp.float64 not in (wide, narrow):
                continue  # as without 64 bits: the contract
            params, gradients = tree(dtype=wide), tree(1, narrow)
            assert params["one"].dtype == wide
            state = jax.eval_shape(tx.init, params)
            updates, after = jax.eval_shape(tx.update, gradients, state, params)
            assert types(updates) == types(params)
            assert types(after) == types(state)
            matrices = state.inner.inner_states["matrices"]
            assert {x.dtype for x in jax.tree.leaves(matrices)} <= {
                jnp.dtype(d) for d in (jnp.float32, jnp.int32, jnp.uint32)
            }


@every_optimizer
def test_with_64_bits_hyperparameters_of_64_bits_leave_the_state_as_it_is(name):
    make, arguments = OPTIMIZERS[name]
    static = {"rank", "period", "full_rank_fraction", "rounds", "random_after"} & arguments.keys()
    with jax.enable_x64(True):
        params = tree(dtype=jnp.float64)
        numbers = {k: np.float64(x) if isinstance(x, float) else np.int64(x) for k, x in arguments.items()}
        for tx in (
            make(np.float64(0.1), weight_decay=jnp.asarray(0.01), **numbers),
            optax.inject_hyperparams(make, static_args=static)(0.1, weight_decay=0.01, **arguments),
        ):
            state = jax.eval_shape(tx.init, params)
            updates, after = jax.eval_shape(tx.update, params, state, params)
            assert types(updates) == types(params)
            assert jax.tree.leaves(types(after)) == jax.tree.leaves(types(state))


def test_with_64_bits_the_steps_are_those_of_32():
    gradients = [tree(1), tree(2), tree(3)]
    expected, _ = run(optimizer("gum"), gradients, tree())
    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda x: x.astype(jnp.float64), g) for g in (tree(), *gradients)]
        found, _ = run(optimizer("gum"), wide[1:], wide[0])
        for a, b in zip(found, expected, strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=AMPLIFIED), a, b)


def cast(state, dtype):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )


@every_optimizer
def test_a_state_that_was_cast_is_refused_with_the_way_back(name):
    tx, params = optimizer(name), tree()
    state = jax.eval_shape(tx.init, params)
    for dtype in (jnp.bfloat16, jnp.float16):
        with pytest.raises(
            ValueError, match=r"has dtype b?float16 in place of float32.*gum_optax\.convert_state"
        ):
            jax.eval_shape(tx.update, params, cast(state, dtype), params)


@every_optimizer
def test_a_state_that_was_cast_to_64_bits_is_refused_or_stays_so(name):
    """A rule in a subspace measures in float32; the state of all other leaves keeps its dtypes."""
    tx = optimizer(name)
    with jax.enable_x64(True):
        params = tree(dtype=jnp.float64)
        state = cast(jax.eval_shape(tx.init, params), jnp.float64)
        if name in ("muon", "swan", "sinkgd", "dion", "trion", "cosmos", "scion", "adalomo", "hfac"):
            assert types(jax.eval_shape(tx.update, params, state, params)[1]) == types(state)
            return
        with pytest.raises(ValueError, match=r"has dtype float64 in place of float32.*convert_state"):
            jax.eval_shape(tx.update, params, state, params)


def test_convert_state_casts_back_within_a_period():
    tx, params = optimizer("gum"), tree()
    _, state = run(tx, [tree(1)], params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state)
    back = go.convert_state(tx, half, params)
    assert types(back) == types(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), back, state)
