"""A small model of embedding, layers and head, as a stack and as a sequence, with both kinds of steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax as go

LAYERS, WIDTH, WIDE, VOCABULARY = 4, 6, 9, 11


def params(*, stacked=True, dtype=jnp.float32, shapes=None, width=WIDTH, wide=WIDE, count=LAYERS):
    """Layers with two shapes of matrices, a norm, and a matrix no larger than the rank."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) / 2, dtype)

    kernels = {"q": (width, width), "k": (width, width), "up": (width, wide), "down": (wide, width)}
    kernels |= {"few": (2, width)} | (shapes or {})
    layers = {name: {"kernel": array(count, *shape)} for name, shape in kernels.items()}
    layers["norm"] = {"scale": jnp.ones((count, width), dtype)}
    if not stacked:
        layers = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)]
    head = {"norm": {"scale": jnp.ones(width, dtype)}, "lm_head": {"kernel": array(width, VOCABULARY)}}
    return {"embed": {"embedding": array(VOCABULARY, width)}, "layers": layers, "head": head}


def embed(own, batch):
    return own["embedding"][batch[0]]


def layer(own, x):
    h = x * own["norm"]["scale"]
    h = jnp.tanh(h @ own["q"]["kernel"]) * jnp.cos(h @ own["k"]["kernel"]) + h[..., :2] @ own["few"]["kernel"]
    return x + jnp.tanh(h @ own["up"]["kernel"]) @ own["down"]["kernel"]


def head(own, x, batch):
    logits = (x * own["norm"]["scale"]) @ own["lm_head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch[1]).mean()


def loss(params, batch, layer=layer):
    """The loss, in the ordinary way."""
    x = embed(params["embed"], batch)
    if isinstance(params["layers"], list):
        for own in params["layers"]:
            x = layer(own, x)
    else:
        x, _ = jax.lax.scan(lambda x, own: (layer(own, x), None), x, params["layers"])
    return head(params["head"], x, batch)


def batch(step, windows=3):
    rng = np.random.default_rng(step)
    return tuple(jnp.asarray(rng.integers(0, VOCABULARY, (windows, 5))) for _ in range(2))


def ordinary(tx, loss=loss):
    """The step of `tx.update` and `optax.apply_updates`."""

    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step)


def layer_by_layer(tx, embed=embed, layer=layer, head=head, **options):
    """The same step by `layerwise_update`, donated."""

    def step(params, state, batch):
        value, params, state = go.layerwise_update(tx, embed, layer, head, batch, state, params, **options)
        return params, state, value

    return jax.jit(step, donate_argnums=(0, 1))


def run(step, tx, params, batches):
    """The last parameters, the last state, and the losses."""
    params = jax.tree.map(jnp.copy, params)  # the step may donate them
    state, losses = jax.jit(tx.init)(params), []
    for data in batches:
        params, state, value = step(params, state, data)
        losses.append(float(value))
    return params, state, losses


def gap(found, expected):
    """The largest difference of a leaf, over the largest number of that leaf."""
    rows = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in rows)


small_gum = functools.partial(go.gum, 1e-2, rank=2, period=3, full_rank_fraction=0.3)
