"""A LLaMA-style decoder in Flax NNX: RMSNorm, rotary positions, gated feed-forward.

The variants of Qwen and Gemma are choices of `Size`. By default there is none of them.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

Cache = tuple[jax.Array, jax.Array]  # the keys and values of one layer, (batch, length, kv_heads, head_dim)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: the frequencies fall from 1 to about `1 / base`."""

    base: float = 10_000.0
    # Divides all frequencies (Gemma 3), or, with `original`, only the low ones (LLaMA 3.1).
    factor: float = 1.0
    original: int = 0  # the length of the texts that the model was first trained on
    low: float = 1.0  # waves longer than `original / low` are divided by the factor
    high: float = 4.0  # waves shorter than `original / high` are kept

    def frequencies(self, head_dim: int) -> jax.Array:
        half = head_dim // 2
        frequency = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if not self.original:
            return frequency / self.factor
        # LLaMA 3.1's interpolation between kept and divided, by how often a wave fits into `original`.
        turns = self.original * frequency / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model; `rank` is the default rank of the low-rank optimizers, a quarter of the width."""

    hidden: int
    feed_forward: int
    heads: int
    layers: int
    vocabulary: int
    kv_heads: int | None = None  # heads of keys and values; default: as many as of queries
    head_dim: int | None = None  # default: hidden / heads
    rope: Rope = Rope()
    norm_eps: float = 1e-6
    tied: bool = False  # whether the embedding is the output layer too
    attention_bias: bool = False  # of query, key and value (Qwen 2)
    normed_heads: bool = False  # a norm of each head's queries and keys (Qwen 3, Gemma 3)
    normed_outputs: bool = False  # a norm behind attention and feed-forward (Gemma 3)
    activation: Callable[[jax.Array], jax.Array] = nnx.silu
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # of queries times keys; default: 1 / sqrt(head_dim)
    # For each layer the tokens that it sees, and its positions; default: all tokens, `rope`.
    windows: tuple[int | None, ...] = ()
    window_rope: Rope | None = None

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def rank(self) -> int:
        """A quarter of the width: 128 at 60m, as in GaLore's C4 runs."""
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


def rotate_positions(x: jax.Array, positions: jax.Array | None = None, rope: Rope = Rope()) -> jax.Array:
    """Rotary position embedding of `(batch, length, heads, head_dim)`; `positions` are `(batch, length)`."""
    if positions is None:
        positions = jnp.arange(x.shape[1])
    angle = positions.astype(jnp.float32)[..., None] * rope.frequencies(x.shape[-1])
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def by_token(x: jax.Array) -> jax.Array:
    """`(batch, length, hidden)` as `(tokens, hidden)`.

    The gradient of a kernel is then one product of two matrices. XLA's CPU backend takes twice as long for a
    sum over batch and length (jaxlib 0.10.2, 1024 tokens, 192 x 512: 14.1 ms against 7.3).
    """
    return x.reshape(-1, x.shape[-1])


class Block(nnx.Module):
    """Attention and a gated feed-forward, each behind its norm.

    By default a token sees all tokens before it. Otherwise `mask` says which it sees, `(batch, 1, length,
    length)`, and `positions`, `(batch, length)`, where it stands.
    """

    def __init__(self, size: Size, dtype: jnp.dtype, rngs: nnx.Rngs, number: int = 0):
        def linear(fan_in, fan_out, use_bias=False):
            return nnx.Linear(fan_in, fan_out, use_bias=use_bias, dtype=dtype, rngs=rngs)

        def norm(width):
            return nnx.RMSNorm(width, epsilon=size.norm_eps, dtype=dtype, rngs=rngs)

        head = size.head_width
        wide, narrow = size.heads * head, (size.kv_heads or size.heads) * head
        self.head_dim, self.scale, self.activation = head, size.attention_scale, size.activation
        self.window = size.windows[number] if size.windows else None
        self.rope = size.window_rope if self.window and size.window_rope else size.rope
        self.attention_norm = norm(size.hidden)
        self.query = linear(size.hidden, wide, size.attention_bias)
        self.key = linear(size.hidden, narrow, size.attention_bias)
        self.value = linear(size.hidden, narrow, size.attention_bias)
        self.out = linear(wide, size.hidden)
        self.feed_forward_norm = norm(size.hidden)
        self.gate = linear(size.hidden, size.feed_forward)
        self.up = linear(size.hidden, size.feed_forward)
        self.down = linear(size.feed_forward, size.hidden)
        self.query_norm, self.key_norm = (norm(head) if size.normed_heads else None for _ in range(2))
        self.out_norm, self.down_norm = (norm(size.hidden) if size.normed_outputs else None for _ in range(2))

    def __call__(
        self, x: jax.Array, positions: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        q, k, v = self._heads(x, positions)
        if self.window is not None and x.shape[1] > self.window:
            at = jnp.arange(x.shape[1])
            near = at[:, None] - at < self.window
            mask = near & (at[:, None] >= at if mask is None else mask)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=self.scale, is_causal=mask is None)
        return self._finish(x, mixed)

    def decode(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache, at: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """The block for the tokens in the columns from `at` on, and the cache with their keys and values."""
        q, *new = self._heads(x, positions)
        k, v = (
            jax.lax.dynamic_update_slice(old, x, (0, at, 0, 0)) for old, x in zip(cache, new, strict=True)
        )
        if self.window is not None:
            columns = at + jnp.arange(x.shape[1])[:, None]
            mask = mask & (columns - jnp.arange(k.shape[1]) < self.window)
        return self._finish(x, jax.nn.dot_product_attention(q, k, v, mask=mask, scale=self.scale)), (k, v)

    def _heads(self, x: jax.Array, positions: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, `(batch, length, heads, head_dim)`."""
        h = self.attention_norm(by_token(x))
        q, k, v = (f(h).reshape(*x.shape[:2], -1, self.head_dim) for f in (self.query, self.key, self.value))
        q, k = (f(y) if f else y for f, y in ((self.query_norm, q), (self.key_norm, k)))
        return rotate_positions(q, positions, self.rope), rotate_positions(k, positions, self.rope), v

    def _finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """What follows the attention."""
        tokens = by_token(x)
        mixed = self.out(mixed.reshape(len(tokens), -1))
        tokens = tokens + (self.out_norm(mixed) if self.out_norm else mixed)
        h = self.feed_forward_norm(tokens)
        h = self.down(self.activation(self.gate(h)) * self.up(h))
        return (tokens + (self.down_norm(h) if self.down_norm else h)).reshape(x.shape)


class Llama(nnx.Module):
    """Tokens `(batch, length)` to float32 logits `(batch, length, vocabulary)`."""

    def __init__(self, size: Size, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.embed = nnx.Embed(size.vocabulary, size.hidden, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(size, dtype, rngs, number) for number in range(size.layers)])
        self.norm = nnx.RMSNorm(size.hidden, epsilon=size.norm_eps, dtype=dtype, rngs=rngs)
        self.embedding_scale = size.embedding_scale
        if not size.tied:
            self.lm_head = nnx.Linear(size.hidden, size.vocabulary, use_bias=False, dtype=dtype, rngs=rngs)

    def start(self, tokens: jax.Array) -> jax.Array:
        """What the first layer reads."""
        x = self.embed(tokens)
        return x if self.embedding_scale == 1 else x * self.embedding_scale

    def hidden(
        self, tokens: jax.Array, positions: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """What the output layer reads: `(batch, length, hidden)`."""
        x = self.start(tokens)
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.norm(x)

    def logits(self, x: jax.Array) -> jax.Array:
        """The output layer."""
        return self.lm_head(x) if hasattr(self, "lm_head") else self.embed.attend(x)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        return self.logits(self.hidden(tokens, positions, mask)).astype(jnp.float32)
