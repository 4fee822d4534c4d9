"""Fine-tuning: checkpoints in Hugging Face's format, packed questions and answers, LoRA, greedy answers."""

import dataclasses
import functools
import itertools
import json
import math
import shutil
import sys
from decimal import Decimal
from pathlib import Path

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from tokenizers.pre_tokenizers import ByteLevel

import gum_optax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import answers  # noqa: E402
import finetune  # noqa: E402
import generate  # noqa: E402
import llama  # noqa: E402
import lora  # noqa: E402
import losses  # noqa: E402
import pretrained  # noqa: E402
import smollm  # noqa: E402
import supervised  # noqa: E402
from corpus import CorpusError, train_tokenizer  # noqa: E402
from optimizers import optimizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("example_environment")

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "eos_token_id": 0,
}
CONFIGS = {
    "llama": {"tie_word_embeddings": True, "rope_theta": 5e4},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2},
}
TEMPLATE = (
    "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def config_of(kind):
    return COMMON | {"model_type": kind} | CONFIGS[kind]


def model_of(config, seed=0):
    """A model with random norms and biases too, so that no tensor can stand for another."""
    model = llama.Llama(pretrained.size_of(config), dtype=jnp.float32, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model, nnx.Param)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(treedef, moved))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny LLaMA that knows a few sums."""
    place = tmp_path_factory.mktemp("model") / "tiny"
    place.mkdir()
    texts = [
        f"<user>What is {a} plus {b}?</user> {a} + {b} = {a + b}\n#### {a + b}"
        for a in range(9)
        for b in range(9)
    ]
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.save(str(place / "tokenizer.json"))
    config = config_of("llama") | {"vocab_size": tokenizer.get_vocab_size()}
    (place / "config.json").write_text(json.dumps(config))
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    pretrained.save(model_of(config), place, place)
    return place


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A file of sums."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    items = [
        {"prompt": f"What is {a} plus {b}?", "completion": f"{a} + {b} = {a + b}\n#### {a + b}"}
        for a in range(9)
        for b in range(9)
    ]
    file.write_text("\n".join(map(json.dumps, items)) + "\n")
    return file


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_model_is_loaded_to_the_bit(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(kind)))
    model = model_of(config_of(kind))
    pretrained.save(model, tmp_path, tmp_path)
    found = pretrained.load(tmp_path, jnp.float32)
    offset = pretrained.FAMILIES[kind].norm_offset
    # Gemma's norms are stored less one, which rounds.
    chex.assert_trees_all_close(nnx.state(found), nnx.state(model), rtol=0, atol=1e-7 if offset else 0)
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
    chex.assert_trees_all_close(found(tokens), model(tokens), atol=1e-5)


def test_what_does_not_fit_is_refused(checkpoint, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(checkpoint, place)
    config = json.loads((place / "config.json").read_text())
    for changed, message in [
        ({"model_type": "mamba"}, "mamba are not supported, only llama"),
        ({"attention_bias": True}, "with attention_bias are not supported"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding window"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn are not supported"),
        ({"hidden_size": 64}, "config.json wants"),
        ({"num_hidden_layers": 3}, r"missing: \['model.layers.2"),
        ({"num_hidden_layers": 1}, r"without a place: \['model.layers.1"),
    ]:
        (place / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(pretrained.PretrainedError, match=message):
            pretrained.load(place, jnp.float32)
    with pytest.raises(pretrained.PretrainedError, match=r"There is no .*config.json"):
        pretrained.load(tmp_path, jnp.float32)
    (place / "config.json").write_text(json.dumps(config))
    (place / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(pretrained.PretrainedError, match="can't be read"):
        pretrained.load(place, jnp.float32)


def test_the_frequencies_of_llama_3_are_the_formula():
    rope = llama.Rope(5e5, 8.0, 8192, 1.0, 4.0)
    expected = []
    for i in range(32):
        f = 5e5 ** (-i / 32)
        wave = 2 * math.pi / f
        if wave > 8192:
            expected.append(f / 8)
        elif wave < 8192 / 4:
            expected.append(f)
        else:
            smooth = (8192 / wave - 1) / 3
            expected.append((1 - smooth) * f / 8 + smooth * f)
    np.testing.assert_allclose(rope.frequencies(64), expected, rtol=1e-5)


def test_llama_cpp_order_of_rows_is_undone():
    x = np.arange(2 * 6 * 3.0).reshape(12, 3)
    # llama.cpp: of each head, row i of the first half, then row i of the second.
    permuted = np.concatenate([head[[0, 3, 1, 4, 2, 5]] for head in x.reshape(2, 6, 3)])
    np.testing.assert_array_equal(smollm.unpermuted(permuted, 2), x)


def test_a_model_of_llama_cpp_becomes_a_checkpoint(tmp_path):
    """A GGUF file as llama.cpp's converter writes it, with the embedding in eight bits."""
    config = config_of("llama") | {"tie_word_embeddings": True}
    model = model_of(config)
    pretrained.save(model, write_config(tmp_path / "source", config), tmp_path / "source")
    theirs = {name: np.asarray(read()) for name, read in pretrained.tensors_of(tmp_path / "source")}
    heads = {"attn_q": 4, "attn_k": 2}
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for part, name in [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm")]:
        x = theirs[f"{name}.weight"]
        if part == "token_embd":
            writer.add_tensor(f"{part}.weight", gguf.quants.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{part}.weight", x)
    for layer, (part, name) in itertools.product(range(2), smollm.PARTS.items()):
        x = theirs[f"model.layers.{layer}.{name}.weight"]
        if part in heads:
            x = x.reshape(heads[part], 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(f"blk.{layer}.{part}.weight", np.ascontiguousarray(x))
    write_fields(writer)
    smollm.convert(tmp_path / "model.gguf", tmp_path / "found")
    found = pretrained.load(tmp_path / "found", jnp.float32)
    kernels = [nnx.state(x)["layers"] for x in (found, model)]
    chex.assert_trees_all_equal(*kernels)
    # Q8_0: rows of 32 numbers in steps of their largest over 127, which is a float16.
    x = np.asarray(model.embed.embedding)
    half = np.abs(x).max(1, keepdims=True) / 254
    assert np.all(np.abs(found.embed.embedding - x) <= 1.1 * half)
    chat = supervised.Chat(tmp_path / "found")
    ids, start = chat.ids(supervised.Item("12", "7"))
    # The template, digits one by one, and the end.
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == "<user>12</user>>7<end>"
    assert ids[start:] == [chat.tokenizer.token_to_id("7"), 0]
    assert chat.ends == [0]


def write_config(place, config):
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    return place


def write_fields(writer):
    """The settings and the tokenizer of a GGUF file."""
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5e4)
    writer.add_vocab_size(300)
    tokens = ["<end>", *sorted(ByteLevel.alphabet()), "12"]
    tokens += [f"unused{i}" for i in range(300 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 299)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_greedy_completions_are_those_of_the_whole_model(kind):
    model = model_of(config_of(kind))
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
    graph, weights = nnx.split(model)
    found = generate.completions(model, prompts, [0], steps=5, batch=2)
    likeliest = jax.jit(lambda tokens: nnx.merge(graph, weights)(tokens)[0].argmax(-1))
    for prompt, new in zip(prompts, found, strict=True):
        tokens = np.zeros((1, 11), np.int32)  # what follows a token does not change what it predicts
        tokens[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + 5):
            tokens[0, at] = likeliest(tokens)[at - 1]
        expected = tokens[0, len(prompt) : len(prompt) + 5].tolist()
        assert new == (expected[: expected.index(0)] if 0 in expected else expected)


def test_a_completion_stops_at_its_end():
    model = model_of(config_of("llama"))
    (whole,) = generate.completions(model, [[5, 6]], [299], steps=6)
    end = whole[2]
    first = whole.index(end)
    assert generate.completions(model, [[5, 6]], [end], steps=6) == [whole[:first]]


def test_packed_items_have_the_loss_of_each_alone(checkpoint, sums):
    """Neighbours in a window do not see each other, and prompts and padding do not count."""
    chat, data = supervised.Chat(checkpoint), supervised.from_file(sums)
    model = pretrained.load(checkpoint, jnp.float32)
    windows = supervised.Windows(data, chat, 100)
    batch = windows.batch(0, batch=2, seed=1)
    assert len(np.unique(batch.texts[0])) > 3  # several items, and the rest
    total = count = 0
    held = {tuple(ids): start for ids, start in windows.train}
    for row in range(2):
        for text in set(batch.texts[row]) - {-1}:
            own = batch.texts[row] == text
            ids = [int(batch.tokens[row][own][0])] + [int(x) for x in batch.tokens[row][own][1:]]
            (whole,) = [ids_ for ids_ in held if list(ids_[:-1]) == ids]
            logits = model(jnp.asarray([ids]))[0]
            start = held[whole]
            picked = jax.nn.log_softmax(logits)[np.arange(len(ids)), np.asarray(whole[1:])]
            total -= float(picked[start - 1 :].sum())
            count += len(whole) - start
    assert int((batch.targets >= 0).sum()) == count
    np.testing.assert_allclose(losses.model_loss(model, batch), total / count, rtol=1e-5)


def test_each_epoch_has_every_item_once_and_a_batch_is_a_function_of_its_step(checkpoint, sums):
    chat, data = supervised.Chat(checkpoint), supervised.from_file(sums)
    windows = supervised.Windows(data, chat, 100)
    steps = len(windows._epoch(0, 7)) + len(windows._epoch(1, 7))
    seen = []
    for step in range(steps):
        batch = windows.batch(step, batch=1, seed=7)
        for text in range(batch.texts[0].max() + 1):
            seen.append(tuple(batch.tokens[0][batch.texts[0] == text]))
    assert sorted(seen) == sorted(2 * [tuple(ids[:-1]) for ids, _ in windows.train])
    again = supervised.Windows(data, chat, 100).batch(steps - 1, batch=1, seed=7)
    chex.assert_trees_all_equal(again, batch)


def test_items_that_do_not_fit_into_a_window_are_counted(checkpoint, sums):
    chat, data = supervised.Chat(checkpoint), supervised.from_file(sums)
    sizes = [len(chat.ids(item)[0]) - 1 for item in (*data.train, *data.held_out)]
    longest = max(sizes)
    assert supervised.Windows(data, chat, longest).left_out == 0
    data.train.append(supervised.Item("1 + 1", "2 " * longest))
    assert supervised.Windows(data, chat, longest).left_out == 1


def test_no_held_out_prompt_is_trained_on(sums):
    items = [supervised.Item(str(i % 5), "x") for i in range(20)]
    data = supervised.checked("some", items, items[:2])
    assert [x.prompt for x in data.held_out] == ["0", "1"]
    assert [x.prompt for x in data.train] == ["2", "3", "4"]
    with pytest.raises(CorpusError, match="0 items to train on and 5 to hold out"):
        supervised.checked("some", items, items)
    data = supervised.from_file(sums)
    assert len(data.train) == 72
    assert len(data.held_out) == 9


def test_the_default_data_holds_out_whole_templates():
    pytest.importorskip("reasoning_gym", reason="needs `pip install reasoning-gym==0.1.25` and a C compiler")
    data = supervised.gsm_symbolic(600)
    assert {x.prompt for x in data.train}.isdisjoint(x.prompt for x in data.held_out)
    assert len(data.train) > 400
    assert len(data.held_out) > 30
    assert all(isinstance(supervised.final_answer(x.completion), Decimal) for x in data.train)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 2"),
        ('{"prompt": "a"}', "Line 2"),
        ('{"prompt": "a", "completion": 3}', "Line 2"),
        ("[1]", "Line 2"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(CorpusError, match=message):
        supervised.from_file(file)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 apples and 4\n#### 7", Decimal(7)),
        ("It is -3.\n#### -12.50", Decimal("-12.5")),
        ("#### 1\nThen\n#### 1,200", Decimal(1200)),
        ("The sum\n$40.", Decimal(40)),
        ("no number", "no number"),
        ("", ""),
    ],
)
def test_the_final_answer_is_the_last(text, found):
    assert supervised.final_answer(text) == found


def test_the_interval_is_wilsons():
    """Its ends are the shares at which the observed one is 1.96 standard deviations away."""
    for right, of in [(0, 10), (3, 10), (50, 100), (100, 100)]:
        for end in answers.interval(right, of):
            z = abs(right / of - end) / math.sqrt(max(end * (1 - end), 1e-30) / of)
            assert (
                z == pytest.approx(1.959964, rel=1e-5)
                or (right, end) in [(0, 0.0)]
                or end == pytest.approx(1)
            )


def test_adapters_start_at_nothing_and_merge_into_the_kernels():
    config = config_of("qwen2")
    plain, model = model_of(config), model_of(config)
    tokens = jnp.asarray([[3, 1, 4, 1, 5]])
    lora.add_adapters(model, 3, 1, nnx.Rngs(0))
    chex.assert_trees_all_equal(model(tokens), plain(tokens))
    adapters = nnx.state(model, nnx.LoRAParam)
    assert {x.shape[-1] for x in jax.tree.leaves(adapters)} >= {3}
    assert set(adapters["layers"]) == {1}
    nnx.update(model, jax.tree.map(lambda x: x + 0.1, adapters))
    expected = model(tokens)
    lora.merge_adapters(model)
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    assert float(jnp.abs(expected - plain(tokens)).max()) > 0.1
    chex.assert_trees_all_close(model(tokens), expected, atol=1e-4)


def arguments(checkpoint, sums, out, *more):
    given = ["--model", checkpoint, "--data", sums, "--out", out, "--steps", 8, "--batch", 2, "--seq", 64]
    return [
        *map(str, given),
        "--period",
        "3",
        "--save-every",
        "3",
        "--eval-every",
        "4",
        "--answers",
        "3",
        *more,
    ]


def records(place):
    found = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


@pytest.mark.parametrize(
    "more",
    [
        ("--optimizer", "gum", "--last-layers", "1"),
        ("--optimizer", "adamw", "--layerwise"),
        ("--optimizer", "lora", "--last-layers", "1"),
        ("--optimizer", "mezo"),
    ],
    ids=["gum", "layer by layer", "lora", "mezo"],
)
def test_a_run_is_written_and_resumed_to_the_bit(more, checkpoint, sums, tmp_path, monkeypatch, capsys):
    command = functools.partial(arguments, checkpoint, sums)
    assert finetune.main(command(tmp_path / "whole", *more)) == 0
    shown = capsys.readouterr().out
    assert "answers exact" in shown
    assert "--- after:" in shown
    assert "optimizer state" in shown
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["before"]["of"] == summary["after"]["of"] == 3
    assert {"loss.png", "before.json", "model"} <= {x.name for x in (tmp_path / "whole").iterdir()}

    class Stop:
        calls = 0

        @property
        def came(self):
            Stop.calls += 1
            return Stop.calls > 5

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "StopSignal", Stop)
        assert finetune.main(command(tmp_path / "cut", *more)) == 0
    assert len(records(tmp_path / "cut")) == 5
    assert finetune.main(command(tmp_path / "cut", *more, "--resume")) == 0
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    again = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert again["after"] == summary["after"]
    assert again["before"] == summary["before"]
    # The written model has the loss that was reported, and the tokenizer.
    model = pretrained.load(tmp_path / "whole" / "model", jnp.float32)
    chat = supervised.Chat(tmp_path / "whole" / "model")
    windows = supervised.Windows(supervised.from_file(sums), chat, 64)
    found = [losses.model_loss(model, batch) for batch in windows.validation_batches(batch=2, most=16)]
    assert float(np.mean(found)) == pytest.approx(summary["after"]["val_loss"], rel=1e-5)


def test_only_the_last_layers_are_trained(checkpoint, sums, tmp_path):
    command = arguments(checkpoint, sums, tmp_path / "run", "--optimizer", "adamw", "--last-layers", "1")
    assert finetune.main([*command, "--answers", "0", "--lr", "1e-2"]) == 0
    before, after = (
        dict(nnx.to_flat_state(nnx.state(pretrained.load(place, jnp.float32))))
        for place in (checkpoint, tmp_path / "run" / "model")
    )
    changed = {path for path in after if not np.array_equal(after[path], before[path])}
    assert {path[:2] for path in changed} == {("layers", 1)}
    assert len(changed) == 9


def test_a_second_task_is_watched_and_protected_weights_stand(checkpoint, sums, tmp_path):
    """The top half of each matrix's singular values is that of the checkpoint; alone, AdamW moves it."""
    more = ("--optimizer", "adamw", "--lr", "1e-3", "--answers", "0", "--weight-decay", "0.1")
    kernel = "model.layers.0.mlp.up_proj.weight"
    before = _tensor(checkpoint, kernel)
    gaps = {}
    for protect in ("0.5", "0"):
        out = tmp_path / protect
        given = arguments(checkpoint, sums, out, *more, "--protect", protect, "--watch", str(sums))
        assert finetune.main(given) == 0
        summary = json.loads((out / "summary.json").read_text())
        for when in ("before", "after"):  # the same data here
            assert summary[when]["watched_loss"] == pytest.approx(summary[when]["val_loss"], rel=1e-6)
        u, s, vt = np.linalg.svd(before)
        half = len(s) // 2
        gaps[protect] = np.abs(_tensor(out / "model", kernel) @ vt[:half].T - u[:, :half] * s[:half]).max()
    assert gaps["0.5"] < 1e-5 < 1e-3 < gaps["0"]


def _tensor(place, name):
    with safetensors.safe_open(str(place / "model.safetensors"), "numpy") as file:
        return np.float64(file.get_tensor(name))


def test_a_head_may_be_a_matrix_of_its_own(checkpoint):
    size = pretrained.size_of(pretrained.read_config(checkpoint))
    model = llama.Llama(size, dtype=jnp.float32, rngs=nnx.Rngs(0))
    params = jax.eval_shape(lambda: nnx.state(model, nnx.Param))
    data = supervised.Data("some", [], [])

    def blocks(*more):
        options = finetune.parser().parse_args(["--optimizer", "muon", *more])
        tx = optimizer(finetune.settings_of(options, checkpoint, data), finetune.KNOWN)
        found = gum_optax.describe(tx, params).leaves
        return {x.name: x.blocks for x in found if x.name.startswith("layers/0/")}

    whole, cut = blocks(), blocks("--per-head")
    heads = {f"layers/0/{name}/kernel" for name in ("query", "key", "value")}
    assert {name for name in whole if whole[name] != cut[name]} == heads
    assert cut["layers/0/query/kernel"] == "4 of 8 × 32"
    assert cut["layers/0/key/kernel"] == "2 of 8 × 32"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume"], "needs the directory"),
        (["--layerwise", "--optimizer", "lora"], "leave out --last-layers and lora"),
        (["--last-layers", "9"], "the model has 2 layers"),
        (["--lora-rank", "2"], "is for --optimizer lora, not gum"),
        (["--per-head", "--optimizer", "adamw"], "--per-head is for muon, "),
        (["--protect", "0.5", "--optimizer", "lora"], "--protect is for adamw, "),
        (["--optimizer", "mezo", "--layerwise"], "mezo has no gradients"),
        (["--watch", "nothing.jsonl"], "There is no file nothing.jsonl"),
        (["--optimizer", "adamw", "--momentum-dtype", "bfloat16"], "--momentum-dtype is for"),
        (["--seq", "4"], "fits into --seq 4 tokens"),
        (["--data", "nothing.jsonl"], "There is no file nothing.jsonl"),
        (["--model", "nothing"], "There is no nothing/config.json"),
    ],
)
def test_what_can_not_run_is_refused_in_a_sentence(
    more, message, checkpoint, sums, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert finetune.main(["--model", str(checkpoint), "--data", str(sums), *more]) == 2
    assert message in capsys.readouterr().err


def test_the_rank_of_lora_matches_the_state_of_gum(checkpoint):
    options = finetune.parser().parse_args(["--optimizer", "lora", "--rank", "8"])
    data = supervised.Data("some", [], [])
    settings = finetune.settings_of(options, checkpoint, data)
    size = pretrained.size_of(pretrained.read_config(checkpoint))
    fans = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    numbers = 2 * sum(m + n for m, n in fans)  # of a factor of rank one, in both layers
    # GUM: projector and momentum, r (m + n), and one slot of full rank for each shape.
    expected = 8 * numbers + (32 * 32 + 32 * 16 + 32 * 48)
    assert settings.lora_rank == pytest.approx(expected / (2 * numbers), abs=1)
    assert dataclasses.replace(settings, rank=16).lora_rank == settings.lora_rank
    assert lora.matching_rank(dataclasses.replace(settings, rank=16), size, 2) > settings.lora_rank
