"""Checkpoints of LLaMA, Mistral, Qwen and Gemma in Hugging Face's format, read into a `Llama` and written.

A checkpoint is a directory with `config.json`, `*.safetensors` and `tokenizer.json`.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import safe_open
from safetensors.flax import save_file

from llama import Llama, Rope, Size

Config = dict[str, Any]


class PretrainedError(ValueError):
    """The checkpoint can't be used; the message is one sentence for the user."""


def _rope(config: Config, kind: str = "full_attention") -> Rope:
    """The rotary positions of a kind of layers, as version 4 of `transformers` stores them or version 5."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get(kind, found)
    sliding = kind == "sliding_attention"
    base = found.get("rope_theta") or config.get(
        "rope_local_base_freq" if sliding else "rope_theta", 10_000.0
    )
    scaling = found.get("rope_type", found.get("type", "default"))
    # In version 4 the scaling is that of layers that see all tokens.
    if scaling == "default" or (sliding and "rope_parameters" not in config):
        return Rope(base)
    if scaling == "linear":
        return Rope(base, found["factor"])
    if scaling == "llama3":
        original, factor = found["original_max_position_embeddings"], found["factor"]
        return Rope(base, factor, original, found["low_freq_factor"], found["high_freq_factor"])
    raise PretrainedError(f"Rotary positions of the type {scaling} are not supported, only linear, llama3.")


def _windows(config: Config) -> tuple[int | None, ...]:
    """How many tokens each layer sees; `None`: all."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    # Gemma 3 before version 5: every `sliding_window_pattern`-th layer sees all tokens.
    pattern = config.get("sliding_window_pattern", 6)
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _gemma(config: Config) -> dict[str, Any]:
    return {"activation": nnx.gelu, "embedding_scale": math.sqrt(config["hidden_size"])}


def _gemma3(config: Config) -> dict[str, Any]:
    return _gemma(config) | {
        "normed_heads": True,
        "normed_outputs": True,
        "windows": _windows(config),
        "window_rope": _rope(config, "sliding_attention"),
        "attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
    }


class Family(NamedTuple):
    """How the models of one `model_type` differ from LLaMA."""

    changes: Callable[[Config], dict[str, Any]] = lambda config: {}
    norm_offset: float = 0.0  # Gemma stores the scale of a norm less one
    tied: bool = False  # whether embedding and head are one where the config doesn't say it


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(lambda config: {"attention_bias": True}),
    "qwen3": Family(lambda config: {"normed_heads": True}),
    "gemma": Family(_gemma, 1.0, tied=True),
    "gemma3_text": Family(_gemma3, 1.0, tied=True),
}


def family_of(config: Config) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise PretrainedError(f"Models of the type {kind} are not supported, only {', '.join(FAMILIES)}.")
    wide = config.get("sliding_window") if config.get("use_sliding_window", kind == "mistral") else None
    for name in ("mlp_bias", *(("attention_bias",) if kind != "qwen2" else ())):
        if config.get(name):
            raise PretrainedError(f"Models of the type {kind} with {name} are not supported.")
    if wide and kind != "gemma3_text":
        raise PretrainedError(f"Models of the type {kind} with a sliding window are not supported.")
    return FAMILIES[kind]


def size_of(config: Config) -> Size:
    """The shape of the model of a `config.json`."""
    family = family_of(config)
    llama = Size(
        hidden=config["hidden_size"],
        feed_forward=config["intermediate_size"],
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        vocabulary=config["vocab_size"],
        kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        rope=_rope(config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", family.tied),
    )
    return dataclasses.replace(llama, **family.changes(config))


# Our names of a layer's parts, and Hugging Face's. With norms behind the parts, that in front of the
# feed-forward has another name.
PARTS = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMED_OUTPUTS = {
    "feed_forward_norm": "pre_feedforward_layernorm",
    "out_norm": "post_attention_layernorm",
    "down_norm": "post_feedforward_layernorm",
}
WHOLE = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}


def their_name(path: tuple[Any, ...], size: Size) -> str:
    """Hugging Face's name of the tensor at a path of our parameters."""
    *place, field = path
    parts = PARTS | (NORMED_OUTPUTS if size.normed_outputs else {})
    owner = f"model.layers.{place[1]}.{parts[place[2]]}" if place[0] == "layers" else WHOLE[place[0]]
    return f"{owner}.{'bias' if field == 'bias' else 'weight'}"


def _converted(field: Any, x: jax.Array, offset: float) -> jax.Array:
    """Kernels are transposed; `offset` is added to the scales of norms."""
    if field == "kernel":
        return x.T
    return (x.astype(jnp.float32) + offset).astype(x.dtype) if field == "scale" and offset else x


def read_config(directory: Path) -> Config:
    path = directory / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise PretrainedError(f"There is no {path}; give the directory of a checkpoint.") from None
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path} can't be read: {error}.") from None


def tensors_of(directory: Path) -> Iterator[tuple[str, Callable[[], jax.Array]]]:
    """Name and reader of every tensor in the directory's files."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise PretrainedError(f"There are no *.safetensors in {directory}.")
    for file in files:
        try:
            opened = safe_open(file, framework="flax")
        except Exception as error:  # the type is safetensors' own
            raise PretrainedError(f"{file} can't be read: {error}.") from None
        with opened:
            for name in opened.keys():  # noqa: SIM118, the file is no mapping
                yield name, lambda opened=opened, name=name: opened.get_tensor(name)


def load(directory: Path, dtype: Any, weights_dtype: Any = jnp.float32) -> Llama:
    """The model of a checkpoint, which computes in `dtype`.

    Raises:
      PretrainedError: the model is of another kind, a tensor is missing, has another shape, or has no place.
    """
    config = read_config(directory)
    size, offset = size_of(config), family_of(config).norm_offset
    model = nnx.eval_shape(lambda: Llama(size, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    flat = dict(nnx.to_flat_state(params))
    places = {their_name(path, size): path for path in flat}
    missing, odd = set(places), []
    for name, read in tensors_of(directory):
        if name not in places:
            # A tied head is the embedding again; inverse frequencies are computed.
            odd += [] if name.endswith("rotary_emb.inv_freq") or (size.tied and "lm_head" in name) else [name]
            continue
        path = places[name]
        x = _converted(path[-1], read().astype(weights_dtype), offset)
        if x.shape != flat[path].shape:
            raise PretrainedError(f"{name} has the shape {x.shape}, config.json wants {flat[path].shape}.")
        flat[path] = flat[path].replace(x)
        missing.discard(name)
    if missing or odd:
        raise PretrainedError(f"Tensors without a place: {odd[:5]}; missing: {sorted(missing)[:5]}.")
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


# Of a checkpoint's directory, what a fine-tuned model keeps as it is.
KEPT = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*", "vocab.json")


def save(model: Llama, like: Path, directory: Path) -> None:
    """Write a model as a checkpoint, with the tokenizer and the settings of the checkpoint `like`."""
    config = read_config(like)
    size, offset = size_of(config), family_of(config).norm_offset
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    tensors = {
        their_name(path, size): _converted(path[-1], x.get_value(), -offset).copy() for path, x in flat
    }
    directory.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype)
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    (directory / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=1))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if directory.resolve() != like.resolve():
        for file in (file for pattern in KEPT for file in like.glob(pattern)):
            shutil.copy(file, directory / file.name)
