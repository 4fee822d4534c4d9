"""The cross-entropy of a language model, a part of the logits at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llama import Llama, by_token

# The most logits at once in the loss: 128 MiB in float32.
LOGITS_AT_ONCE = 2**25


def cross_entropy(head: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array) -> jax.Array:
    """The cross-entropy in nats, summed over all targets but -1; holds the logits of all tokens."""
    logits, wanted = head(by_token(x)).astype(jnp.float32), targets.reshape(-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(wanted, 0))
    return jnp.where(wanted >= 0, losses, 0).sum()


def chunked_cross_entropy(
    head: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array, positions: int
) -> jax.Array:
    """`cross_entropy` that holds the logits of a few positions of each window at once.

    The backward pass computes the logits of a chunk again. Chunks are cut along the windows, so that a batch
    that is split over devices stays split.

    Args:
      head: from `(batch, positions, hidden)` to logits.
      x: `(batch, length, hidden)`.
      targets: `(batch, length)`, integers; -1 where no token counts.
      positions: how many positions of each window a chunk has.
    """
    chunks, left = divmod(x.shape[1], positions)
    if chunks + (left > 0) <= 1:
        return cross_entropy(head, x, targets)
    loss = jax.checkpoint(lambda x, targets: cross_entropy(head, x, targets))

    def chunked(a):
        """Whole chunks, `(chunks, batch, positions, ...)`."""
        whole = a[:, : chunks * positions]
        return jnp.moveaxis(whole.reshape(len(a), chunks, positions, *a.shape[2:]), 1, 0)

    def add(total, chunk):
        return total + loss(*chunk), None

    # Of the type of a loss: on devices that sum their own tokens it differs between them.
    zero = 0 * x[0, 0, 0].astype(jnp.float32)
    total, _ = jax.lax.scan(add, zero, (chunked(x), chunked(targets)))
    return total + loss(x[:, -left:], targets[:, -left:]) if left else total


def mean_cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    targets: jax.Array,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> jax.Array:
    """The mean cross-entropy in nats of all targets but -1; holds about `logits_at_once` logits."""
    vocabulary = jax.eval_shape(head, x[0, :1]).shape[-1]
    positions = max(1, logits_at_once // (len(x) * vocabulary))
    counted = jnp.maximum((targets >= 0).sum(), 1)
    return chunked_cross_entropy(head, x, targets, positions) / counted


class Batch(NamedTuple):
    """Windows of tokens, `(batch, length)` each."""

    tokens: Any
    targets: Any  # the token that follows; -1 where it does not count
    # Where several texts share a window: the number of each token's text, and its place in that text.
    texts: Any = None
    positions: Any = None

    def mask(self) -> jax.Array | None:
        """Which tokens each token sees, `(batch, 1, length, length)`: those before it in its own text."""
        if self.texts is None:
            return None
        causal = jnp.tril(jnp.ones((self.tokens.shape[1],) * 2, bool))
        return (causal & (self.texts[:, :, None] == self.texts[:, None]))[:, None]


def following(tokens: Any) -> Batch:
    """The batch of windows of `length + 1` tokens, in which each is to be told from those before it."""
    return Batch(tokens[..., :-1], tokens[..., 1:])


def model_loss(model: Llama, batch: Batch, logits_at_once: int = LOGITS_AT_ONCE) -> jax.Array:
    """The mean cross-entropy in nats of the batch's targets."""
    x = model.hidden(batch.tokens, batch.positions, batch.mask())
    return mean_cross_entropy(model.logits, x, batch.targets, logits_at_once)


def next_token_loss(
    graph: nnx.GraphDef, params: Any, tokens: jax.Array, logits_at_once: int = LOGITS_AT_ONCE
) -> jax.Array:
    """The mean cross-entropy, in nats, of each token in `(batch, length + 1)` given the tokens before it."""
    return model_loss(nnx.merge(graph, params), following(tokens), logits_at_once)
