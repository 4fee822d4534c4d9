"""Greedy completions of many prompts at once, with the keys and values of earlier tokens kept."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama import Cache, Llama


def _empty_caches(model: Llama, batch: int, length: int) -> list[Cache]:
    layer = model.layers[0]
    heads = layer.key.out_features // layer.head_dim
    zeros = jnp.zeros((batch, length, heads, layer.head_dim), layer.key.dtype)
    return [(zeros, zeros) for _ in model.layers]


def _next(
    model: Llama, tokens: jax.Array, starts: jax.Array, caches: list[Cache], at: Any
) -> tuple[jax.Array, list[Cache]]:
    """The likeliest token after those in the columns from `at` on; row i has its text from `starts[i]` on."""
    columns = at + jnp.arange(tokens.shape[1])
    positions = jnp.maximum(columns - starts[:, None], 0)
    seen = jnp.arange(caches[0][0].shape[1])
    mask = (seen <= columns[:, None]) & (seen >= starts[:, None, None])
    # A column of padding sees itself: a softmax over nothing is not a number.
    mask = (mask | (seen == columns[:, None]))[:, None]
    x, new = model.start(tokens), []
    for layer, cache in zip(model.layers, caches, strict=True):
        x, cache = layer.decode(x, positions, mask, cache, at)
        new.append(cache)
    return model.logits(model.norm(x[:, -1])).argmax(-1), new


@functools.partial(jax.jit, static_argnames=("graph", "steps"))
def _greedy(
    graph: Any, weights: Any, prompts: jax.Array, starts: jax.Array, ends: jax.Array, steps: int
) -> jax.Array:
    model = nnx.merge(graph, weights)
    batch, width = prompts.shape
    token, caches = _next(model, prompts, starts, _empty_caches(model, batch, width + steps), 0)
    found = jnp.zeros((batch, steps), token.dtype).at[:, 0].set(token)

    def going(carry):
        i, _, done, _, _ = carry
        return (i < steps) & ~done.all()

    def step(carry):
        i, token, done, found, caches = carry
        token, caches = _next(model, token[:, None], starts, caches, width + i - 1)
        # After its end a text repeats its last token.
        token = jnp.where(done, found[:, i - 1], token)
        return i + 1, token, done | jnp.isin(token, ends), found.at[:, i].set(token), caches

    done = jnp.isin(token, ends)
    return jax.lax.while_loop(going, step, (jnp.int32(1), token, done, found, caches))[3]


def completions(
    model: Llama, prompts: Sequence[list[int]], ends: Sequence[int], steps: int, batch: int = 32
) -> list[list[int]]:
    """The likeliest continuation of each prompt, token by token, without its end.

    Args:
      model: the model.
      prompts: the tokens of each.
      ends: the tokens that end a text.
      steps: the most new tokens.
      batch: prompts at once.
    """
    graph, weights = nnx.split(model)
    width = max(map(len, prompts))
    found = []
    for first in range(0, len(prompts), batch):
        rows = prompts[first : first + batch]
        padded = np.full((batch, width), ends[0], np.int32)
        starts = np.full(batch, width - 1, np.int32)
        for i, row in enumerate(rows):
            padded[i, width - len(row) :], starts[i] = row, width - len(row)
        new = np.asarray(_greedy(graph, weights, padded, starts, np.asarray(ends), steps))[: len(rows)]
        for row in new.tolist():
            stop = next((i for i, token in enumerate(row) if token in ends), steps)
            found.append(row[:stop])
    return found
