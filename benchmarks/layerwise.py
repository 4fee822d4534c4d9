"""Temporaries of whole training steps, ordinary and layer by layer, compiled for a chip.

    python benchmarks/layerwise.py                                   # CPU
    python benchmarks/layerwise.py --chip h200 --width 2048          # ahead of time: chips.py says how
    python benchmarks/layerwise.py --chip 24gb --llama3-8b

The model is a LLaMA-style decoder of scanned layers, 1 × 128 tokens, and the rank is an eighth of the width.
The ordinary step recomputes each layer in its backward pass, as the step layer by layer does. Parameters and
state are donated. The temporaries include gradients and activations. The script merges the results into
`docs/results/layerwise.json` and writes the table of all results beside it.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import memory
import optax
from chips import CHIPS, PACKAGES, device_of, on_chip
from results import RESULTS, Results

import gum_optax as go


class Model(NamedTuple):
    """The shape of a decoder; `key_width` is the width of keys and values."""

    width: int
    feed_forward: int
    heads: int
    key_width: int
    layers: int
    vocabulary: int


MODELS = {
    "64": Model(64, 176, 4, 64, 12, 512),
    "512": Model(512, 1376, 8, 512, 12, 4096),
    "1024": Model(1024, 2752, 16, 1024, 12, 4096),
    "2048": Model(2048, 5504, 32, 2048, 12, 4096),
}
LLAMA3_8B = Model(4096, 14336, 32, 1024, 32, 128256)


def shapes_of(model: Model, dtype: Any) -> dict[str, Any]:
    """The parameters, as shapes; layers are stacked."""

    def leaf(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def kernel(fan_in: int, fan_out: int) -> Any:
        return {"kernel": leaf(model.layers, fan_in, fan_out)}

    d, k, f = model.width, model.key_width, model.feed_forward
    layers = {"q": kernel(d, d), "k": kernel(d, k), "v": kernel(d, k), "o": kernel(d, d)}
    layers |= {"gate": kernel(d, f), "up": kernel(d, f), "down": kernel(f, d)}
    norms = {name: {"scale": leaf(model.layers, d)} for name in ("attention_norm", "mlp_norm")}
    return {
        "embed": {"embedding": leaf(model.vocabulary, d)},
        "layers": layers | norms,
        "head": {"norm": {"scale": leaf(d)}, "lm_head": {"kernel": leaf(d, model.vocabulary)}},
    }


def rms_norm(x: Any, scale: Any) -> Any:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


def rotated(x: Any) -> Any:
    """Rotary positions of `(batch, length, heads, head_dim)`."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def embed(own: Any, tokens: Any) -> Any:
    return own["embedding"][tokens[:, :-1]]


def layer(model: Model, own: Any, x: Any) -> Any:
    """Attention and a gated feed-forward, each behind its norm."""
    h = rms_norm(x, own["attention_norm"]["scale"])
    head_dim = model.width // model.heads
    q, k, v = (
        (h @ own[name]["kernel"]).reshape(*h.shape[:2], own[name]["kernel"].shape[-1] // head_dim, head_dim)
        for name in "qkv"
    )
    mixed = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    x = x + mixed.reshape(h.shape) @ own["o"]["kernel"]
    h = rms_norm(x, own["mlp_norm"]["scale"])
    return x + (jax.nn.silu(h @ own["gate"]["kernel"]) * (h @ own["up"]["kernel"])) @ own["down"]["kernel"]


def head(own: Any, x: Any, tokens: Any) -> Any:
    logits = rms_norm(x, own["norm"]["scale"]) @ own["lm_head"]["kernel"]
    labels = tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def ordinary(tx: Any, model: Model) -> Callable[..., Any]:
    """The ordinary step, each layer rematerialized."""
    one = jax.checkpoint(functools.partial(layer, model))

    def loss(params: Any, tokens: Any) -> Any:
        x = embed(params["embed"], tokens)
        x, _ = jax.lax.scan(lambda x, own: (one(own, x), None), x, params["layers"])
        return head(params["head"], x, tokens)

    def step(params: Any, state: Any, tokens: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def layer_by_layer(tx: Any, model: Model) -> Callable[..., Any]:
    """The same step by `layerwise_update`."""

    def step(params: Any, state: Any, tokens: Any) -> Any:
        value, params, state = go.layerwise_update(
            tx, embed, functools.partial(layer, model), head, tokens, state, params
        )
        return params, state, value

    return step


STEPS = {"ordinary": ordinary, "layer by layer": layer_by_layer}


def compiled(kind: str, tx: Any, model: Model, tokens: int, dtype: Any, device: Any = True) -> Any:
    """The compiled, donated step."""
    params = shapes_of(model, dtype)
    arguments = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((1, tokens + 1), jnp.int32)
    step = STEPS[kind](tx, model)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*on_chip(arguments, device)).compile()


def measure(
    kind: str, tx: Any, model: Model, tokens: int, dtype: Any, device: Any = True
) -> dict[str, float]:
    """MiB of arguments, gradients and temporaries, and seconds to compile."""
    start = time.perf_counter()
    analysis = compiled(kind, tx, model, tokens, dtype, device).memory_analysis()
    gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes_of(model, dtype)))
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "arguments": analysis.argument_size_in_bytes / 2**20,
        "gradients": gradients / 2**20,
        "temporaries": (analysis.temp_size_in_bytes + new) / 2**20,
        "seconds": time.perf_counter() - start,
    }


def optimizers(rank: int, dtype: Any) -> dict[str, Callable[[], Any]]:
    """The optimizers of the table."""
    stored = jnp.dtype(dtype).name

    def gum(**others: Any) -> Any:
        return go.gum(1e-3, rank, full_rank_fraction=1 / 12, momentum_dtype=stored, **others)

    # A second moment by row and column for embedding and head, in place of AdamW's two moments.
    factored = optax.chain(optax.scale_by_factored_rms(), optax.scale_by_learning_rate(1e-3))
    return {
        "gum": gum,
        "gum, factored others": lambda: gum(others=factored),
        "galore_muon": lambda: go.galore_muon(1e-3, rank, momentum_dtype=stored),
        "muon": lambda: go.muon(1e-3, momentum_dtype=stored),
        "sinkgd": lambda: go.sinkgd(1e-3),
        "optax.sgd": lambda: optax.sgd(1e-3),
        "optax.adamw": lambda: optax.adamw(1e-3),
        "optax.contrib.muon": memory.optax_muon,
    }


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "| optimizer, step | arguments MiB | gradients MiB | temporaries MiB | over gradients | compile s |",
        "|---" * 6 + "|",
    ]
    for name, row in rows.items():
        share = row["temporaries"] / row["gradients"]
        sizes = f"{row['arguments']:.0f} | {row['gradients']:.0f} | {row['temporaries']:.0f}"
        lines.append(f"| {name} | {sizes} | {share:.2f} | {row['seconds']:.0f} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--chip", choices=CHIPS, default="cpu")
    p.add_argument("--width", choices=MODELS, default="512")
    p.add_argument("--llama3-8b", action="store_true", help="the shapes of LLaMA-3-8B, bfloat16, rank 128")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--tokens", type=int, help="default: 128; with --llama3-8b 1024")
    p.add_argument("--optimizers", default="gum;galore_muon;muon;optax.sgd;optax.adamw", help="by ;")
    p.add_argument("--steps", default=",".join(STEPS))
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    model = LLAMA3_8B if options.llama3_8b else MODELS[options.width]
    dtype = "bfloat16" if options.llama3_8b else options.dtype
    tokens = options.tokens or (1024 if options.llama3_8b else 128)
    rank = 128 if options.llama3_8b else model.width // 8
    name = "LLaMA-3-8B" if options.llama3_8b else f"width {model.width}, {model.layers} layers"
    setting = f"{options.chip}, {name}, {dtype}, 1 × {tokens} tokens, rank {rank}"
    print(setting, flush=True)
    results = Results(options.out / "layerwise.json", table)
    rows = results.rows(setting)
    for optimizer in options.optimizers.split(";"):
        for kind in options.steps.split(","):
            tx = optimizers(rank, dtype)[optimizer]()
            row = measure(kind, tx, model, tokens, jnp.dtype(dtype), device_of(options.chip))
            rows[f"`{optimizer}`, {kind}"] = row
            print(f"  {optimizer}, {kind}: " + " ".join(f"{k} {v:.0f}" for k, v in row.items()), flush=True)
            results.add(setting, rows, *PACKAGES.get(options.chip, []))
    print(results.text())


if __name__ == "__main__":
    main()
