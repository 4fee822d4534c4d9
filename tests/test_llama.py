"""The output layer of the examples' model: a loss that never holds all logits."""

import functools
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import llama
import losses

WINDOWS, LENGTH, HIDDEN, VOCABULARY = 2, 12, 8, 24


def head(kernel, x):
    return x @ kernel


def chunked(positions, kernel, x, targets):
    return losses.chunked_cross_entropy(functools.partial(head, kernel), x, targets, positions)


def plain(kernel, x, targets):
    return losses.cross_entropy(functools.partial(head, kernel), x, targets)


def values(length=LENGTH, vocabulary=VOCABULARY):
    rng = np.random.default_rng(0)
    kernel = jnp.float32(rng.normal(size=(HIDDEN, vocabulary)))
    x = jnp.float32(rng.normal(size=(WINDOWS, length, HIDDEN)))
    return kernel, x, jnp.asarray(rng.integers(0, vocabulary, size=(WINDOWS, length)))


# One position at a time, a divisor, with a rest, and all at once.
@pytest.mark.parametrize("positions", [1, 4, 5, 12, 100])
def test_the_loss_in_chunks_is_the_plain_loss_and_so_is_its_gradient(positions):
    expected = jax.value_and_grad(plain, argnums=(0, 1))(*values())
    found = jax.jit(jax.value_and_grad(functools.partial(chunked, positions), argnums=(0, 1)))(*values())
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_logits_of_all_tokens_are_not_held():
    """Temporaries of the compiled gradient, over the bytes of all logits."""
    arguments = values(length=64, vocabulary=2048)
    logits = WINDOWS * 64 * 2048 * 4

    def temporaries(loss):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes / logits

    assert temporaries(plain) > 1
    assert temporaries(functools.partial(chunked, 4)) < 4 / 16


def test_each_device_may_sum_the_loss_of_its_own_windows():
    kernel, x, targets = values()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def on_each(kernel, x, targets):
        return jax.lax.psum(chunked(5, kernel, x, targets), "data")

    specs = P(), P("data"), P("data")
    mapped = jax.jit(jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=P()))
    np.testing.assert_allclose(mapped(kernel, x, targets), plain(kernel, x, targets), rtol=1e-6)


def test_the_loss_of_the_model_does_not_depend_on_the_chunks():
    model = llama.Llama(llama.SIZES["tiny"], dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 512, size=(2, 9)))
    at_once = 2 * 3 * 512  # three positions of two windows
    loss = jax.jit(jax.value_and_grad(functools.partial(losses.next_token_loss, graph)), static_argnums=2)
    chex.assert_trees_all_close(loss(params, tokens, at_once), loss(params, tokens), rtol=1e-5, atol=1e-6)
