"""How many held-out questions a model answers exactly."""

import math
from collections.abc import Sequence
from typing import Any

from generate import completions
from llama import Llama
from supervised import Chat, Item, final_answer

SAMPLES = 3  # answers that are shown


def interval(right: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959964
    share, width = right / of, z**2 / of
    middle = (share + width / 2) / (1 + width)
    half = z / (1 + width) * math.sqrt(share * (1 - share) / of + width / (4 * of))
    return max(middle - half, 0.0), min(middle + half, 1.0)  # past an end by rounding


def answer(model: Llama, chat: Chat, items: Sequence[Item]) -> dict[str, Any]:
    """How many items the model answers exactly, with an interval, and some of its answers."""
    tokens = [chat.ids(item) for item in items]
    steps = max(len(ids) - start for ids, start in tokens)
    found = completions(model, [ids[:start] for ids, start in tokens], chat.ends, steps)
    texts = [chat.tokenizer.decode(ids) for ids in found]
    right = [
        final_answer(text) == final_answer(item.completion) for text, item in zip(texts, items, strict=True)
    ]
    low, high = interval(sum(right), len(items))
    return {
        "right": sum(right),
        "of": len(items),
        "low": low,
        "high": high,
        "samples": [
            {"prompt": item.prompt, "wanted": item.completion, "answer": text}
            for item, text in zip(items[:SAMPLES], texts, strict=False)
        ],
    }
