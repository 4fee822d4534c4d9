"""Temporaries of whole training steps, ordinary and layer by layer, compiled for a chip.

    python benchmarks/layerwise.py                                   # CPU
    python benchmarks/layerwise.py --chip h200 --width 2048          # ahead of time: chips.py says how
    python benchmarks/layerwise.py --chip 24gb --model LLaMA-3-8B

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
from typing import Any

import jax
import jax.numpy as jnp
import optax
from chips import CHIPS, KNOWN, PACKAGES, device_of, on_chip
from results import RESULTS, Results

import gum_optax as go
from gum_optax import report
from gum_optax._core.chips import CPU, Chip
from gum_optax._state.step_memory import Update


def model_of(width: int, feed_forward: int, heads: int, vocabulary: int = 4096) -> report.Architecture:
    """Twelve layers whose queries, keys and values are as wide as the model."""
    return report.Architecture(
        12, width, feed_forward, heads, heads, width // heads, vocabulary, 2, biases=False, tied=False
    )


MODELS = {
    "64": model_of(64, 176, 4, 512),
    "512": model_of(512, 1376, 8),
    "1024": model_of(1024, 2752, 16),
    "2048": model_of(2048, 5504, 32),
}
# The 7B is LLaMA 2's, by its published configuration.
PUBLISHED = {
    "LLaMA-3-8B": report.MODELS["llama-3-8b"],
    "LLaMA-2-7B": report.Architecture(32, 4096, 11008, 32, 32, 128, 32000, 2, biases=False, tied=False),
}


def shapes_of(model: report.Architecture, dtype: Any) -> dict[str, Any]:
    """The parameters, as shapes; layers are stacked."""
    return report.in_parts(report.shapes(model, dtype))


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


def layer(model: report.Architecture, own: Any, x: Any) -> Any:
    """Attention and a gated feed-forward, each behind its norm."""

    def linear(name: str, x: Any) -> Any:
        return x @ own[f"{name}_proj"]["kernel"]

    h = rms_norm(x, own["norm_0"]["scale"])
    q, k, v = (linear(name, h).reshape(*h.shape[:2], -1, model.head_dim) for name in "qkv")
    mixed = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    x = x + linear("o", mixed.reshape(*h.shape[:2], -1))
    h = rms_norm(x, own["norm_1"]["scale"])
    return x + linear("down", jax.nn.silu(linear("gate", h)) * linear("up", h))


def head(own: Any, x: Any, tokens: Any) -> Any:
    logits = rms_norm(x, own["norm"]["scale"]) @ own["lm_head"]["kernel"]
    labels = tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def ordinary(tx: Any, model: report.Architecture) -> Callable[..., Any]:
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


def layer_by_layer(tx: Any, model: report.Architecture, **options: Any) -> Callable[..., Any]:
    """The same step by `layerwise_update`."""

    def step(params: Any, state: Any, tokens: Any) -> Any:
        value, params, state = go.layerwise_update(
            tx, embed, functools.partial(layer, model), head, tokens, state, params, **options
        )
        return params, state, value

    return step


STEPS = {"ordinary": ordinary, "layer by layer": layer_by_layer}


def compiled(
    kind: str, tx: Any, model: report.Architecture, tokens: int, dtype: Any, device: Any = True
) -> Any:
    """The compiled, donated step."""
    params = shapes_of(model, dtype)
    arguments = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((1, tokens + 1), jnp.int32)
    step = STEPS[kind](tx, model)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*on_chip(arguments, device)).compile()


def measure(
    kind: str, tx: Any, model: report.Architecture, tokens: int, dtype: Any, device: Any = True
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


def updates(rank: int, dtype: Any, chip: Chip = CPU) -> dict[str, Update]:
    """The optimizers of the table, with what the prediction says of them."""
    found = report.updates(rank, 1 / 12, dtype, chip)
    return found | {"optax.sgd": found["optax.adamw"]._replace(tx=optax.sgd(1.0))}


def predicted(
    kind: str, update: Update, model: report.Architecture, tokens: int, dtype: Any, platform: str
) -> float:
    """MiB of the whole step, as `python -m gum_optax.report --chip` predicts them."""
    needed = report.activations(model, 1, tokens, dtype)
    return report.steps(model, update, needed, tokens + 1, dtype, platform)[kind].peak / 2**20


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "| optimizer, step | arguments MiB | gradients MiB | temporaries MiB | over gradients | in all MiB"
        " | predicted MiB | off by | compile s |",
        "|---" * 9 + "|",
    ]
    for name, row in sorted(rows.items()):
        share = row["temporaries"] / row["gradients"]
        sizes = f"{row['arguments']:.0f} | {row['gradients']:.0f} | {row['temporaries']:.0f}"
        total = row["arguments"] + row["temporaries"]
        beside = f"{total:.0f} | | "
        if "predicted" in row:
            beside = f"{total:.0f} | {row['predicted']:.0f} | {100 * (row['predicted'] / total - 1):+.1f} %"
        lines.append(f"| {name} | {sizes} | {share:.2f} | {beside} | {row['seconds']:.0f} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--chip", choices=CHIPS, default="cpu")
    p.add_argument("--width", choices=MODELS, default="512")
    p.add_argument("--model", choices=PUBLISHED, help="in place of a width: bfloat16, 1024 tokens")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="with --width")
    p.add_argument("--rank", type=int, help="default: an eighth of the width; with --model 128")
    p.add_argument("--optimizers", default="gum;galore_muon;muon;optax.sgd;optax.adamw", help="by ;")
    p.add_argument("--steps", default=",".join(STEPS))
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    if options.model:
        model, described, dtype, tokens = PUBLISHED[options.model], options.model, "bfloat16", 1024
        rank = options.rank or 128
    else:
        model, dtype, tokens = MODELS[options.width], options.dtype, 128
        described, rank = f"width {model.hidden}, {model.layers} layers", options.rank or model.hidden // 8
    setting = f"{options.chip}, {described}, {dtype}, 1 × {tokens} tokens, rank {rank}"
    print(setting, flush=True)
    results = Results(options.out / "layerwise.json", table)
    rows = results.rows(setting)
    chip = KNOWN[options.chip]
    known = updates(rank, dtype, chip)
    for optimizer in options.optimizers.split(";"):
        for kind in options.steps.split(","):
            row = measure(kind, known[optimizer].tx, model, tokens, dtype, device_of(options.chip))
            rows[f"`{optimizer}`, {kind}"] = row
            print(f"  {optimizer}, {kind}: " + " ".join(f"{k} {v:.0f}" for k, v in row.items()), flush=True)
            for name, found in rows.items():  # of older rows too, for the prediction may have changed
                name, step = name[1:].split("`, ")
                found["predicted"] = predicted(step, known[name], model, tokens, dtype, chip.platform)
            results.add(setting, rows, *PACKAGES[options.chip])
    print(results.text())


if __name__ == "__main__":
    main()
