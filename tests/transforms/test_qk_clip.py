"""QK-clip: the logits of each head, by its definition, whatever the layout of the kernels is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gum_optax as go

EMBED, HEADS, WIDTH, LAYERS = 12, 4, 3, 2
THRESHOLD = 2.0


def attention(rng, key_heads=HEADS, *, fused=True, layers=(), bias=True):
    """The parameters of one attention module, or of a stack of them."""

    def side(heads):
        shape = (heads * WIDTH,) if fused else (heads, WIDTH)
        kernel = jnp.float32(rng.normal(size=(*layers, EMBED, *shape)))
        return {"kernel": kernel} | (
            {"bias": jnp.float32(rng.normal(size=(*layers, *shape)))} if bias else {}
        )

    out = {"kernel": jnp.ones((*layers, HEADS * WIDTH, EMBED))}
    return {"query": side(HEADS), "key": side(key_heads), "out": out}


def logits(params, x):
    """`q·k` of every head for one layer: `(heads, tokens, tokens)`."""
    q, k = (
        (jnp.tensordot(x, params[name]["kernel"], 1) + params[name].get("bias", 0)).reshape(len(x), -1, WIDTH)
        for name in ("query", "key")
    )
    k = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return jnp.einsum("ihd,jhd->hij", q, k)


def clipped(params, max_logits, inner=None, **arguments):
    """Parameters after one step of `inner`, without and with clipping."""
    tx = go.muon(0.1) if inner is None else inner
    gradients = jax.tree.map(jnp.sin, params)
    both = []
    for rule in (tx, optax.chain(tx, go.qk_clip(THRESHOLD, **arguments))):
        extra = {} if rule is tx else {"max_logits": max_logits}
        updates, _ = jax.jit(rule.update)(gradients, rule.init(params), params, **extra)
        both.append(optax.apply_updates(params, updates))
    return both


S = jnp.float32([1.0, 4.0, 2.0, 8.0])
GAMMA = np.float32([1.0, 0.5, 1.0, 0.25])


@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("fused", [True, False])
def test_each_heads_logits_shrink_by_threshold_over_largest(rng, key_heads, fused):
    params, x = attention(rng, key_heads, fused=fused), jnp.float32(rng.normal(size=(5, EMBED)))
    plain, found = clipped({"attention": params}, {"attention": S})
    ratio = logits(found["attention"], x) / logits(plain["attention"], x)
    np.testing.assert_allclose(ratio, np.broadcast_to(GAMMA[:, None, None], ratio.shape), rtol=1e-4)
    np.testing.assert_array_equal(found["attention"]["out"]["kernel"], plain["attention"]["out"]["kernel"])


def test_kernels_share_the_factor_and_shared_keys_stay(rng):
    factor = np.repeat(GAMMA, WIDTH)
    plain, found = clipped(attention(rng), S)
    for name in ("query", "key"):
        for part in ("kernel", "bias"):
            expected = plain[name][part] * np.sqrt(factor)
            np.testing.assert_allclose(found[name][part], expected, rtol=1e-5, atol=1e-6)
    plain, found = clipped(attention(rng, key_heads=2), S)
    np.testing.assert_allclose(
        found["query"]["kernel"], plain["query"]["kernel"] * factor, rtol=1e-5, atol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, found["key"], plain["key"])


@pytest.mark.parametrize("large", [THRESHOLD, 0.0, -jnp.inf, jnp.inf, jnp.nan])
def test_heads_that_do_not_exceed_the_threshold_step_to_the_bit(rng, large):
    plain, found = clipped(attention(rng), jnp.full(HEADS, large))
    jax.tree.map(np.testing.assert_array_equal, found, plain)


@pytest.mark.parametrize("fused", [True, False])
def test_a_stack_of_layers_is_clipped_layer_by_layer(rng, fused):
    params, s = attention(rng, fused=fused, layers=(LAYERS,)), jnp.stack([S, S[::-1]])
    inner = optax.sgd(0.1)
    _, found = clipped({"layers": {"attention": params}}, {"layers": {"attention": s}}, inner)
    for layer in range(LAYERS):
        one = jax.tree.map(lambda x, layer=layer: x[layer], params)
        _, expected = clipped(one, s[layer], inner)
        jax.tree.map(
            lambda f, e, layer=layer: np.testing.assert_allclose(f[layer], e, rtol=1e-6),
            found["layers"]["attention"],
            expected,
        )


def test_outputs_may_be_the_first_axis(rng):
    params, inner = attention(rng), optax.sgd(0.1)
    turned = jax.tree.map(jnp.transpose, params)
    _, expected = clipped(params, S, inner)
    _, found = clipped(turned, S, inner, head_axis=0)
    jax.tree.map(lambda f, e: np.testing.assert_array_equal(f.T, e), found, expected)


class Attention(nnx.Module):
    """Attention that reports its largest logits."""

    def __init__(self, rngs):
        self.query, self.key, self.out = (
            nnx.Linear(EMBED, HEADS * WIDTH, rngs=rngs),
            nnx.Linear(EMBED, HEADS * WIDTH, rngs=rngs),
            nnx.Linear(EMBED, EMBED, rngs=rngs),
        )

    def __call__(self, x):
        q, k = (f(x).reshape(len(x), HEADS, WIDTH) for f in (self.query, self.key))
        s = jnp.einsum("ihd,jhd->hij", q, k) / WIDTH**0.5
        self.sow(nnx.Intermediate, "max_logits", s.max((1, 2)))
        return self.out(jnp.einsum("hij,je->ie", jax.nn.softmax(s), x))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Attention(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_an_nnx_model_stays_below_the_threshold(rng):
    model = Model(nnx.Rngs(0))
    x = jnp.float32(rng.normal(size=(5, EMBED)))
    for layer in model.layers:
        layer.query.kernel[...] *= 9.0
    tx = optax.chain(go.gum(1e-6, rank=2), go.qk_clip(THRESHOLD))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            y, max_logits = nnx.capture(model, nnx.Intermediate)(x)
            return jnp.mean(y**2), max_logits

        gradients, max_logits = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, gradients, max_logits=max_logits)
        return max_logits

    largest = [max(map(jnp.max, jax.tree.leaves(step(model, optimizer)))) for _ in range(3)]
    assert largest[0] > 2 * THRESHOLD
    assert THRESHOLD / 4 < largest[2] < 1.01 * THRESHOLD


BAD = [
    ({}, None, "largest attention logits of this step"),
    ({}, {"attention": jnp.ones(HEADS), "more": jnp.ones(HEADS)}, None),
    (
        {},
        {"other": jnp.ones(HEADS)},
        r"at attention or below it, but has \[\]; it has entries at \['other'\]",
    ),
    ({}, {"attention": {"a": S, "b": S}}, r"has \[\(4,\), \(4,\)\]"),
    ({}, {"attention": jnp.ones(5)}, r"has 5 heads\. Leaves of the query have \[12\] numbers"),
    ({}, {"attention": jnp.ones((3, HEADS))}, r"a kernel of shape \(12,\) does not fit"),
    ({"head_axis": 2}, {"attention": S}, "head_axis is 2: a kernel of shape"),
    ({"query": "q"}, {"attention": S}, "no module with 'q' and 'key'"),
]


@pytest.mark.parametrize(("arguments", "max_logits", "message"), BAD)
def test_logits_that_do_not_fit_are_refused(rng, arguments, max_logits, message):
    params = {"attention": attention(rng)}
    tx = go.qk_clip(**arguments)
    if message is None:
        tx.update(params, tx.init(params), params, max_logits=max_logits)
        return
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, max_logits=max_logits)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        go.qk_clip(-1)
    with pytest.raises(ValueError, match="head_axis must be at least 0, got -1"):
        go.qk_clip(head_axis=-1)
