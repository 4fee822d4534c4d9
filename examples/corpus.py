"""Real text as token ids, from a byte-level BPE tokenizer that is trained once and cached with the ids.

The default text is the `chitchat-dataset` package (MIT): 7,168 conversations between people.
"""

import hashlib
import importlib.util
import json
import lzma
import os
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"  # between documents
VALIDATION_SHARE = 0.05
ENCODED_AT_ONCE = 1000  # documents; an encoding takes a hundred times the memory of its ids


class CorpusError(ValueError):
    """The text can't be used; the message is one sentence for the user."""


def conversations() -> list[str]:
    """The documents of `chitchat-dataset`: one for each conversation, with a line for each message."""
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError("The default text is missing: run `pip install chitchat-dataset==0.9.0`.")
    path = Path(spec.submodule_search_locations[0]) / "dataset.json"
    turns = [chat["messages"] for chat in json.loads(path.read_text("utf-8")).values()]
    texts = ["\n".join("- " + " ".join(m["text"] for m in turn) for turn in chat) for chat in turns]
    return [text for text in texts if text.strip()]


def documents_of(path: Path) -> list[str]:
    r"""The documents of the user's own text, which may be compressed by xz.

    `\x1e`, ASCII's record separator, separates documents. Without it, blank lines do. A text of few
    paragraphs is split into lines or pieces, so that some documents can be held out.
    """
    opened = lzma.open if path.suffix == ".xz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise CorpusError(f"There is no text file {path}.") from None
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise CorpusError(f"The text file {path} can't be read as UTF-8: {error}.") from None
    paragraphs = [part.strip() for part in text.split("\x1e" if "\x1e" in text else "\n\n")]
    if (kept := [part for part in paragraphs if part]) and len(kept) < 20:
        lines = [line for line in text.splitlines() if line.strip()]
        kept = lines if len(lines) >= 20 else [text[i : i + 1000] for i in range(0, len(text), 1000)]
    if not kept:
        raise CorpusError(f"The text file {path} is empty.")
    return kept


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE, which encodes any text and decodes it to the same text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gum_optax"


class Corpus:
    """Training and validation ids, and their tokenizer.

    Every twentieth document is for validation, so that the split never changes.
    """

    def __init__(self, text: Path | None, vocabulary: int):
        documents = conversations() if text is None else documents_of(text)
        digest = hashlib.sha256("\x1e".join(documents).encode()).hexdigest()[:16]
        self.name = f"{'chitchat' if text is None else text.stem}-{digest}"
        folder = cache_directory() / f"{digest}-bpe{vocabulary}"
        if not (folder / "validation.npy").exists():
            print("training a tokenizer on the text, once ...", flush=True)
            self._write(folder, documents, vocabulary)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.train = np.load(folder / "train.npy", mmap_mode="r")
        self.validation = np.load(folder / "validation.npy", mmap_mode="r")

    @staticmethod
    def _write(folder: Path, documents: list[str], vocabulary: int) -> None:
        tokenizer = train_tokenizer(documents, vocabulary)
        end = tokenizer.token_to_id(END)
        encoded = [
            np.array([*e.ids, end], np.uint16)
            for start in range(0, len(documents), ENCODED_AT_ONCE)
            for e in tokenizer.encode_batch(documents[start : start + ENCODED_AT_ONCE])
        ]
        every = round(1 / VALIDATION_SHARE)
        parts = {
            "train": [ids for i, ids in enumerate(encoded) if i % every],
            "validation": encoded[::every],
        }
        replace_file(folder / "tokenizer.json", lambda part: tokenizer.save(str(part)))
        for name, ids in parts.items():  # validation.npy comes last: a folder with it is complete
            flat = np.concatenate([np.empty(0, np.uint16), *ids])
            replace_file(folder / f"{name}.npy", lambda part, flat=flat: np.save(part, flat))

    def require(self, length: int, batch: int) -> None:
        """Refuse a text that is too short for one batch of training and one window of validation."""
        if len(self.train) < batch * length + 1 or len(self.validation) < length + 1:
            raise CorpusError(
                f"The text is too short: {len(self.train)} training and {len(self.validation)} validation"
                f" tokens, but a batch needs {batch * length + 1} and {length + 1};"
                " give more text, or a smaller --batch or --seq."
            )

    def opening(self) -> str:
        """The start of the validation text, as a prompt in the style of the text."""
        return self.tokenizer.decode(self.validation[:16].tolist())

    def batch(self, step: int, *, batch: int, length: int, seed: int) -> np.ndarray:
        """Windows of `length + 1` ids for one step.

        The function is pure, so that a resumed run sees the same windows. Each epoch is a permutation of
        them.
        """
        windows = (len(self.train) - 1) // length
        places = np.arange(step * batch, (step + 1) * batch)
        order = {
            e: np.random.default_rng((seed, int(e))).permutation(windows) for e in set(places // windows)
        }
        starts = [order[place // windows][place % windows] * length for place in places]
        return np.stack([self.train[s : s + length + 1] for s in starts]).astype(np.int32)

    def validation_batches(self, *, batch: int, length: int, most: int) -> np.ndarray:
        """The first `most` batches of validation windows `(batches, batch, length + 1)`, always the same."""
        windows = (len(self.validation) - 1) // length
        batch = min(batch, windows)
        starts = np.arange(min(most, windows // batch) * batch) * length
        rows = np.stack([self.validation[s : s + length + 1] for s in starts]).astype(np.int32)
        return rows.reshape(-1, batch, length + 1)


def replace_file(path: Path, write) -> None:
    """Write beside `path`, then rename, so that a stopped run leaves no incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{os.getpid()}-{path.name}")
    write(part)
    os.replace(part, path)
