"""A LLaMA-style decoder in Flax NNX: RMSNorm, rotary positions, SwiGLU, no biases."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model; `rank` is the default rank of the low-rank optimizers, a quarter of the width."""

    hidden: int
    feed_forward: int
    heads: int
    layers: int
    vocabulary: int

    @property
    def rank(self) -> int:
        """A quarter of the width: 128 at 60m, as in the GUM and GaLore papers."""
        return self.hidden // 4


# 60m, 130m and 350m are the LLaMA sizes of GaLore (arXiv 2403.03507, Table 5); the others are for a laptop.
SIZES = {
    "tiny": Size(hidden=32, feed_forward=64, heads=2, layers=2, vocabulary=512),
    "0.6m": Size(hidden=96, feed_forward=256, heads=4, layers=4, vocabulary=1024),
    "3m": Size(hidden=192, feed_forward=512, heads=6, layers=4, vocabulary=4096),
    "10m": Size(hidden=320, feed_forward=864, heads=10, layers=6, vocabulary=4096),
    "60m": Size(hidden=512, feed_forward=1376, heads=8, layers=8, vocabulary=32000),
    "130m": Size(hidden=768, feed_forward=2048, heads=12, layers=12, vocabulary=32000),
    "350m": Size(hidden=1024, feed_forward=2736, heads=16, layers=24, vocabulary=32000),
}


def rotate_positions(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary position embedding of `(batch, length, heads, head_dim)`."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def by_token(x: jax.Array) -> jax.Array:
    """`(batch, length, hidden)` as `(tokens, hidden)`.

    The gradient of a kernel is then one product of two matrices. XLA's CPU backend takes twice as long for a
    sum over batch and length (jaxlib 0.10.2, 1024 tokens, 192 x 512: 14.1 ms against 7.3).
    """
    return x.reshape(-1, x.shape[-1])


class Block(nnx.Module):
    """Attention and a gated feed-forward, each behind its norm."""

    def __init__(self, size: Size, dtype: jnp.dtype, rngs: nnx.Rngs):
        def linear(fan_in, fan_out):
            return nnx.Linear(fan_in, fan_out, use_bias=False, dtype=dtype, rngs=rngs)

        self.heads = size.heads
        self.attention_norm = nnx.RMSNorm(size.hidden, dtype=dtype, rngs=rngs)
        self.query = linear(size.hidden, size.hidden)
        self.key = linear(size.hidden, size.hidden)
        self.value = linear(size.hidden, size.hidden)
        self.out = linear(size.hidden, size.hidden)
        self.feed_forward_norm = nnx.RMSNorm(size.hidden, dtype=dtype, rngs=rngs)
        self.gate = linear(size.hidden, size.feed_forward)
        self.up = linear(size.hidden, size.feed_forward)
        self.down = linear(size.feed_forward, size.hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        windows, x = x.shape, by_token(x)
        h = self.attention_norm(x)
        q, k, v = (f(h).reshape(*windows[:2], self.heads, -1) for f in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(rotate_positions(q), rotate_positions(k), v, is_causal=True)
        x = x + self.out(mixed.reshape(h.shape))
        h = self.feed_forward_norm(x)
        return (x + self.down(nnx.silu(self.gate(h)) * self.up(h))).reshape(windows)


class Llama(nnx.Module):
    """Tokens `(batch, length)` to float32 logits `(batch, length, vocabulary)`."""

    def __init__(self, size: Size, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.embed = nnx.Embed(size.vocabulary, size.hidden, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(size, dtype, rngs) for _ in range(size.layers)])
        self.norm = nnx.RMSNorm(size.hidden, dtype=dtype, rngs=rngs)
        self.lm_head = nnx.Linear(size.hidden, size.vocabulary, use_bias=False, dtype=dtype, rngs=rngs)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """What the output layer reads: `(batch, length, hidden)`."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.lm_head(self.hidden(tokens)).astype(jnp.float32)


# The most logits at once in the loss: 128 MiB in float32.
LOGITS_AT_ONCE = 2**25


def cross_entropy(head: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array) -> jax.Array:
    """The cross-entropy in nats, summed over all tokens; holds the logits of all of them."""
    logits = head(by_token(x)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets.reshape(-1)).sum()


def chunked_cross_entropy(
    head: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array, positions: int
) -> jax.Array:
    """`cross_entropy` that holds the logits of a few positions of each window at once.

    The backward pass computes the logits of a chunk again. Chunks are cut along the windows, so that a batch
    that is split over devices stays split.

    Args:
      head: from `(batch, positions, hidden)` to logits.
      x: `(batch, length, hidden)`.
      targets: `(batch, length)`, integers.
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


def next_token_loss(
    graph: nnx.GraphDef, params: Any, tokens: jax.Array, logits_at_once: int = LOGITS_AT_ONCE
) -> jax.Array:
    """The mean cross-entropy, in nats, of each token in `(batch, length + 1)` given the tokens before it."""
    model = nnx.merge(graph, params)
    return mean_cross_entropy(model.lm_head, model.hidden(tokens[:, :-1]), tokens[:, 1:], logits_at_once)


def mean_cross_entropy(
    head: nnx.Linear, x: jax.Array, targets: jax.Array, logits_at_once: int = LOGITS_AT_ONCE
) -> jax.Array:
    """The mean cross-entropy in nats; holds about `logits_at_once` logits."""
    positions = max(1, logits_at_once // (len(x) * head.out_features))
    return chunked_cross_entropy(head, x, targets, positions) / targets.size


class Layered:
    """A `Llama` as `gum_optax.layerwise_update` takes it: its embedding, one of its layers, and its head."""

    def __init__(self, model: Llama):
        parts = {"embed": model.embed, "layer": model.layers[0], "norm": model.norm, "lm_head": model.lm_head}
        self.graphs = {name: nnx.split(part, nnx.Param)[0] for name, part in parts.items()}

    @staticmethod
    def divide(params: Any) -> dict[str, Any]:
        """The parameters of the model, divided."""
        head = {name: params[name] for name in ("norm", "lm_head")}
        return {"embed": params["embed"], "layers": params["layers"], "head": head}

    @staticmethod
    def whole(divided: dict[str, Any]) -> nnx.State:
        """The parameters as the model has them."""
        return nnx.State({"embed": divided["embed"], "layers": divided["layers"], **divided["head"]})

    def embed(self, own: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(self.graphs["embed"], own)(tokens[:, :-1])

    def layer(self, own: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(self.graphs["layer"], own)(x)

    def head(self, own: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
        norm, lm_head = (nnx.merge(self.graphs[name], own[name]) for name in ("norm", "lm_head"))
        return mean_cross_entropy(lm_head, norm(x), tokens[:, 1:])
