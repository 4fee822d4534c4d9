"""What the updates of optimizers hold beside gradients and state: bytes, from the shapes of the parameters.

XLA computes most results in the memory of gradients that are no longer needed. What is left, measured by
`benchmarks/layerwise.py`:

    low-rank rules     the coordinates PᵀG of all leaves, r n numbers a matrix, in float32
    sampled blocks     q m n numbers a matrix, in float32. Layer by layer three times (input, momentum, step)
                       the blocks that a layer has on average, at least one of each shape
    Muon               the momentum in float32, where gradients are narrower; or what Newton-Schulz holds of
                       the matrices that it takes at once: X and the next X, m n each, the Gram matrix and
                       its polynomial, m² each
    optax's Muon       all matrices at once: their size; in bfloat16 on a card that computes in float32,
                       2.5 times their size in float32
"""

from collections.abc import Callable, Sequence
from typing import Any

from .._core.batches import at_once_on_gpu

_FLOAT32 = 4
# Measured for a card of compute capability 8.9, in bfloat16: 2.56 on the shapes of LLaMA-3-8B, 1.6 on twelve
# layers of width 512. Elsewhere 1.00 to 1.03 of the size of the matrices in their own dtype.
_OPTAX_MUON_WIDENED = 2.5

# From the parameters that one call of the update gets, as shapes, to bytes. Stacked leaves have three axes.
Temporaries = Callable[[Sequence[Any]], int]


def of_fused(leaves: Sequence[Any]) -> int:
    """AdamW's and SinkGD's: XLA fuses the whole update, but for vectors."""
    del leaves
    return 0


def of_factored(platform: str) -> Temporaries:
    """Those of `optax.scale_by_factored_rms`: the steps in float32; a GPU fuses the whole update."""
    return of_fused if platform == "gpu" else lambda leaves: _FLOAT32 * sum(x.size for x in leaves)


def of_muon(platform: str) -> Temporaries:
    """Muon's. Newton-Schulz takes one matrix at a time, on a GPU half a stack (`map_in_place`)."""

    def temporaries(leaves):
        matrices = _matrices(leaves)
        widened = sum((_FLOAT32 - x.dtype.itemsize) * x.size for x in matrices)
        products = [_newton_schulz(x, platform) for x in matrices]
        return max(widened, *products)

    return temporaries


def of_galore_muon(rank: int) -> Temporaries:
    """GaLore-Muon's."""
    return lambda leaves: _coordinates(_matrices(leaves), rank)


def of_gum(rank: int, fraction: float) -> Temporaries:
    """GUM's, `fraction` of whose blocks run at full rank."""

    def temporaries(leaves):
        matrices = _matrices(leaves)
        blocks: dict[tuple[int, ...], int] = {}
        for x in matrices:
            if min(x.shape[1:]) > rank:
                sides = tuple(sorted(x.shape[1:]))
                blocks[sides] = blocks.get(sides, 0) + x.shape[0]
        sampled = sum(max(round(fraction * count), 1) * m * n for (m, n), count in blocks.items())
        copies = 3 if all(x.shape[0] == 1 for x in matrices) else 1
        full = _FLOAT32 * copies * sampled if fraction else 0
        return _coordinates(matrices, rank) + full

    return temporaries


def of_optax_muon(computes_in_bfloat16: bool) -> Temporaries:
    """Those of `optax.contrib.muon`."""

    def temporaries(leaves):
        matrices = _matrices(leaves)
        if computes_in_bfloat16 or all(x.dtype.itemsize == _FLOAT32 for x in matrices):
            return sum(x.size * x.dtype.itemsize for x in matrices)
        return int(_OPTAX_MUON_WIDENED * _FLOAT32 * sum(x.size for x in matrices))

    return temporaries


def _matrices(leaves: Sequence[Any]) -> list[Any]:
    return [x for x in leaves if x.ndim == 3]


def _newton_schulz(stack: Any, platform: str) -> int:
    count, m, n = stack.shape[0], *sorted(stack.shape[1:])
    at_once = at_once_on_gpu(count) if platform == "gpu" else 1
    return _FLOAT32 * at_once * 2 * (m * n + m * m)


def _coordinates(matrices: Sequence[Any], rank: int) -> int:
    projected = [x for x in matrices if min(x.shape[1:]) > rank]
    return _FLOAT32 * sum(x.shape[0] * rank * max(x.shape[1:]) for x in projected)
