"""`transformers` and our LLaMA compute the same logits, before and after training: `nox -s transformers`."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

torch = pytest.importorskip("torch", reason="needs torch: nox -s transformers")
transformers = pytest.importorskip("transformers", reason="needs transformers: nox -s transformers")

import pretrained  # noqa: E402
import smollm  # noqa: E402

pytestmark = pytest.mark.trainers

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 200,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-3": ("Llama", {"rope_scaling": LLAMA_3, "head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma3": ("Gemma3Text", {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24}),
}


def logits_of(directory, tokens):
    """Of `transformers`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_before_and_after_training(case, tmp_path):
    name, changed = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON | changed)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for x in theirs.parameters():  # norms and biases too
            x.add_(0.05 * torch.randn_like(x))
    theirs.save_pretrained(tmp_path / "before")
    tokens = np.random.default_rng(0).integers(1, 200, (2, 40))
    ours = pretrained.load(tmp_path / "before", jnp.float32)
    expected = logits_of(tmp_path / "before", tokens)
    np.testing.assert_allclose(ours(jnp.asarray(tokens)), expected, atol=1e-3)
    # A step of training: any change of all weights.
    params = nnx.state(ours, nnx.Param)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(params))))
    nnx.update(ours, jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), params))
    pretrained.save(ours, tmp_path / "before", tmp_path / "after")
    after = ours(jnp.asarray(tokens))
    assert np.abs(after - expected).max() > 0.05
    np.testing.assert_allclose(after, logits_of(tmp_path / "after", tokens), atol=1e-3)


def test_bfloat16_checkpoints_are_read(tmp_path):
    config = transformers.LlamaConfig(**COMMON)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = np.arange(1, 20)[None]
    ours = pretrained.load(tmp_path, jnp.float32)
    np.testing.assert_allclose(ours(jnp.asarray(tokens)), logits_of(tmp_path, tokens), atol=1e-3)


def test_the_default_model_and_its_tokenizer_are_those_of_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF")
    directory = smollm.checkpoint()
    text = "The capital of France is Paris, founded in 250 BC.\n  It's  the 4th-largest!"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm.package_file().parent, gguf_file=smollm.package_file().name
    )
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([ids])).logits.numpy()
    ours = pretrained.load(directory, jnp.float32)
    np.testing.assert_allclose(ours(jnp.asarray([ids])), expected, atol=1e-3)
    config = json.loads((directory / "config.json").read_text())
    assert config["num_key_value_heads"] == 3
