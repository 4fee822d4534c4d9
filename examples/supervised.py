"""Questions and answers: the items of a file or of `reasoning-gym`, in a model's chat format, packed."""

import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from corpus import CorpusError
from losses import Batch
from pretrained import read_config

HELD_OUT_SHARE = 0.1  # of the items of a file, or of the templates


class Item(NamedTuple):
    """A prompt, and the completion that the model is to learn."""

    prompt: str
    completion: str


class Data(NamedTuple):
    """Items to train on and items held out; no prompt is in both."""

    name: str
    train: list[Item]
    held_out: list[Item]


def checked(name: str, train: list[Item], held_out: list[Item]) -> Data:
    """The data without repeated prompts, and with no prompt of the held-out items in the training items."""
    held_out = list({item.prompt: item for item in held_out}.values())
    held = {item.prompt for item in held_out}
    train = list({item.prompt: item for item in train if item.prompt not in held}.values())
    assert held.isdisjoint(item.prompt for item in train)
    if not (train and held_out):
        raise CorpusError(f"{name} has {len(train)} items to train on and {len(held_out)} to hold out.")
    digest = hashlib.sha256(json.dumps([train, held_out]).encode()).hexdigest()[:16]
    return Data(f"{name}-{digest}", train, held_out)


def from_file(path: Path) -> Data:
    """The items of a file of lines `{"prompt": ..., "completion": ...}`; every tenth is held out."""
    items = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise CorpusError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"The file {path} can't be read as UTF-8: {error}.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            items.append(Item(found["prompt"], found["completion"]))
            if not all(isinstance(text, str) and text.strip() for text in items[-1]):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            wanted = '{"prompt": ..., "completion": ...}'
            raise CorpusError(f"Line {number} of {path} is not {wanted}.") from None
    items = list({item.prompt: item for item in items}.values())
    every = round(1 / HELD_OUT_SHARE)
    return checked(path.stem, [x for i, x in enumerate(items) if i % every], items[::every])


def gsm_symbolic(size: int, seed: int = 0) -> Data:
    """Word problems with a chain of thought; every tenth template is held out as a whole.

    `reasoning-gym` 0.1.25. Its templates come from GSM8K's test set. A template's questions differ in names
    and numbers only, so that a question of a template in training says little about reasoning.
    """
    try:
        reasoning_gym = importlib.import_module("reasoning_gym")
        source = importlib.import_module("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")
    except ImportError:
        raise CorpusError(
            "The default data is missing: run `pip install reasoning-gym==0.1.25`, or give --data."
        ) from None
    found = reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed)
    held = set(sorted(source.tasks_ok)[:: round(1 / HELD_OUT_SHARE)])
    train, held_out = [], []
    for entry, template in zip(found, found.task_indices, strict=True):
        item = Item(entry["question"], entry["metadata"]["answer_cot"])
        (held_out if template in held else train).append(item)
    return checked("gsm-symbolic", train, held_out)


def final_answer(text: str) -> Decimal | str:
    """What stands behind the last `####`, or else the last line; a number if it is one."""
    last = text.rsplit("####", 1)[-1].strip().splitlines()[-1:]
    shown = last[0].strip().rstrip(".") if last else ""
    try:
        return Decimal(shown.replace(",", "").removeprefix("$")).normalize()
    except InvalidOperation:
        return shown


class Chat:
    """The tokenizer of a checkpoint and its chat format: its template, or plain text without one."""

    def __init__(self, directory: Path):
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        file = directory / "tokenizer_config.json"
        settings = json.loads(file.read_text()) if file.exists() else {}
        separate = directory / "chat_template.jinja"
        template = separate.read_text() if separate.exists() else settings.get("chat_template")
        self.special = {name: _text(settings.get(name)) for name in ("bos_token", "eos_token")}
        self.ends = self._ends(read_config(directory).get("eos_token_id"))
        self.template = _environment().from_string(template) if template else None

    def _ends(self, ids: Any) -> list[int]:
        """The tokens that end a completion."""
        own = self.tokenizer.token_to_id(self.special["eos_token"])
        given: list[int | None] = ids if isinstance(ids, list) else [ids]
        found = sorted({end for end in (*given, own) if end is not None})
        if not found:
            raise CorpusError("The checkpoint names no token that ends a text (eos_token).")
        return found

    def prompt(self, text: str) -> str:
        """What stands before the completion."""
        if self.template is None:
            return f"{self.special['bos_token']}{text}\n"
        messages = [{"role": "user", "content": text}]
        return self.template.render(messages=messages, add_generation_prompt=True, **self.special)

    def ids(self, item: Item) -> tuple[list[int], int]:
        """The tokens of an item with its end, and how many of them are the prompt's."""
        prompt = self.tokenizer.encode(self.prompt(item.prompt), add_special_tokens=False).ids
        completion = self.tokenizer.encode(item.completion, add_special_tokens=False).ids
        own = self.tokenizer.token_to_id(self.special["eos_token"])
        return [*prompt, *completion, self.ends[0] if own is None else own], len(prompt)


def _text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _environment() -> jinja2.Environment:
    """Templates as `transformers` renders them."""

    def refuse(message: str) -> None:
        raise CorpusError(f"The chat template refuses the messages: {message}.")

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    found.globals["raise_exception"] = refuse
    return found


class Windows:
    """Items packed into windows of `length` tokens, in an order of its own in each epoch."""

    def __init__(self, data: Data, chat: Chat, length: int):
        self.name, self.length, self.pad = data.name, length, chat.ends[0]
        self.train = list(self._fitting(chat, data.train).values())
        fitting = self._fitting(chat, data.held_out)
        self.questions, self.held_out = list(fitting), list(fitting.values())
        self.left_out = len(data.train) + len(data.held_out) - len(self.train) - len(self.held_out)
        self._epochs: dict[tuple[int, int], list[Batch]] = {}

    def _fitting(self, chat: Chat, items: Sequence[Item]) -> dict[Item, tuple[list[int], int]]:
        """The items that fit into a window, with the tokens of each."""
        encoded = {item: chat.ids(item) for item in items}
        found = {item: ids for item, ids in encoded.items() if len(ids[0]) <= self.length + 1}
        if not found:
            raise CorpusError(f"None of {len(items)} items fits into --seq {self.length} tokens.")
        return found

    def _packed(self, items: Sequence[tuple[list[int], int]]) -> Iterator[Batch]:
        """Windows, each filled until the next item does not fit."""
        window = self._empty()
        used = count = 0
        for ids, start in items:
            if used + len(ids) - 1 > self.length:
                yield window
                window, used, count = self._empty(), 0, 0
            place = slice(used, used + len(ids) - 1)
            window.tokens[place] = ids[:-1]
            window.targets[place] = [-1] * (start - 1) + ids[start:]
            window.texts[place], window.positions[place] = count, np.arange(len(ids) - 1)
            used, count = used + len(ids) - 1, count + 1
        yield window

    def _empty(self) -> Any:
        # The rest of a window is a text of its own, which does not count.
        rest = np.full(self.length, self.pad, np.int32), np.full(self.length, -1, np.int32)
        return Batch(*rest, np.full(self.length, -1, np.int32), np.arange(self.length, dtype=np.int32))

    def _epoch(self, number: int, seed: int) -> list[Batch]:
        if (number, seed) not in self._epochs:
            order = np.random.default_rng((seed, number)).permutation(len(self.train))
            self._epochs[number, seed] = list(self._packed([self.train[i] for i in order]))
        return self._epochs[number, seed]

    def batch(self, step: int, *, batch: int, seed: int) -> Batch:
        """The windows of one step, a pure function of its number and the seed."""
        wanted, epoch, rows = step * batch, 0, []
        while len(rows) < batch:
            windows = self._epoch(epoch, seed)
            rows += windows[wanted : wanted + batch - len(rows)]
            wanted, epoch = max(0, wanted - len(windows)), epoch + 1
        return _stacked(rows)

    def validation_batches(self, *, batch: int, most: int) -> list[Batch]:
        """The first windows of the held-out items, always the same."""
        rows = list(self._packed(self.held_out))
        batch = min(batch, len(rows))
        return [_stacked(rows[i : i + batch]) for i in range(0, len(rows) - batch + 1, batch)][:most]


def _stacked(rows: list[Batch]) -> Batch:
    return Batch(*(np.stack(field) for field in zip(*rows, strict=True)))
