"""What an update costs each chip, from shapes alone: arithmetic, memory traffic and bytes on the wire.

    python benchmarks/cost_model.py

The decoders have 1B, 8B and 70B parameters and run on 8, 256 and 4096 chips. Each matrix is sharded along its
longer side over all chips. The costs come on top of what training itself exchanges.
`docs/results/cost_model.md` has the table, the docstrings have the formulas, and the tests compare the
formulas with compiled programs.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from results import RESULTS

FLOAT = 4  # bytes of a number in gradients, momenta and messages: float32
STEPS = 5  # of Newton-Schulz
PERIOD = 200
CHIPS = (8, 256, 4096)


class Matrices(NamedTuple):
    """`blocks` matrices of one shape."""

    blocks: int
    m: int  # the shorter side
    n: int


class Cost(NamedTuple):
    """The cost of one update on each chip."""

    flops: float
    traffic: float  # bytes between a chip and its memory
    wire: float  # bytes that it sends


class Decoder(NamedTuple):
    """The sizes of a decoder's block matrices."""

    layers: int
    width: int
    keys: int  # width of keys, and of values
    feed_forward: int

    def matrices(self) -> list[Matrices]:
        """The matrices, grouped by shape as GUM groups them."""
        sides = [(self.width, self.width)] * 2 + [(self.keys, self.width)] * 2
        sides += [(self.width, self.feed_forward)] * 3
        return [Matrices(self.layers * sides.count(s), *s) for s in dict.fromkeys(sides)]


DECODERS = {
    "1B": Decoder(24, 2048, 2048, 5461),  # GaLore's LLaMA-1B, arXiv 2403.03507, appendix
    "8B": Decoder(32, 4096, 1024, 14336),  # LLaMA-3, arXiv 2407.21783, table 3
    "70B": Decoder(80, 8192, 1024, 28672),
}


def ring(chips: int) -> float:
    """The share of an array that each chip sends in an all-gather, a reduce-scatter or an all-to-all."""
    return (chips - 1) / chips


def adamw(x: Matrices, chips: int) -> Cost:
    """Reads W, G and two moments, writes W and the moments: 7 m n numbers, about 14 operations each."""
    size = x.blocks * x.m * x.n / chips
    return Cost(14 * size, 7 * FLOAT * size, 0)


def newton_schulz(x: Matrices) -> float:
    """`A = X Xᵀ`, `A²` and `B X`, five times: 5 (4 m² n + 2 m³) a matrix."""
    return x.blocks * STEPS * (4 * x.m**2 * x.n + 2 * x.m**3)


def gram_newton_schulz(x: Matrices) -> float:
    """One Gram matrix, 17 products of the short side, one product with X: 4 m² n + 34 m³ a matrix."""
    return x.blocks * (4 * x.m**2 * x.n + 2 * (4 * STEPS - 3) * x.m**3)


def muon(x: Matrices, chips: int) -> Cost:
    """The ideal: an all-to-all sends whole matrices to chips and their steps back: `2 f · 4 L m n / chips`.

    Every chip has an equal share of the work, as if L were a multiple of the number of chips.
    """
    size = x.blocks * x.m * x.n / chips
    # Reads W, G and the momentum, writes the momentum and W. X goes in and out of four products in each step.
    traffic = (3 + 2 + 4 * STEPS) * FLOAT * size
    return Cost(newton_schulz(x) / chips, traffic, 2 * ring(chips) * FLOAT * size)


def galore_muon(x: Matrices, chips: int, rank: int) -> Cost:
    """Project, lift, and Newton-Schulz through the r × r Gram matrix, an all-reduce of L r² numbers.

    Every `PERIOD` steps a power step adds two products and an all-reduce of L m r numbers.
    """
    if x.m <= rank:
        return muon(x, chips)
    product = 2 * x.blocks * rank * x.m * x.n / chips
    flops = 2 * product + gram_newton_schulz(Matrices(x.blocks, rank, x.n)) / chips + 2 * product / PERIOD
    size = x.blocks * x.m * x.n / chips
    traffic = FLOAT * (3 * size + 6 * x.blocks * rank * x.n / chips + x.blocks * rank * x.m)
    sent = x.blocks * rank**2 + x.blocks * rank * x.m / PERIOD
    return Cost(flops, traffic, 2 * ring(chips) * FLOAT * sent)


def gum(x: Matrices, chips: int, rank: int, fraction: float, *, whole: bool = False) -> Cost:
    """GaLore-Muon, and for k slots the residual and Newton-Schulz through their m × m Gram matrices.

    All chips sum the Gram matrices, `2 f · 4 k m²`, which does not shrink with the number of chips. With
    `whole`, an all-to-all sends a slot to one chip and its step back, as in the ideal Muon. That is
    `2 f · 4 k m n / chips` on average, but k chips then work while the others wait.
    """
    if x.m <= rank:
        return muon(x, chips)
    slots = Matrices(min(max(round(fraction * x.blocks), 1), x.blocks), x.m, x.n)
    size = slots.blocks * x.m * x.n / chips
    flops = 8 * rank * size + gram_newton_schulz(slots) / chips
    sent = size if whole else slots.blocks * x.m**2
    low = galore_muon(x, chips, rank)
    sent *= 2 * ring(chips) * FLOAT
    return Cost(low.flops + flops, low.traffic + 6 * FLOAT * size, low.wire + sent)


def total(
    cost: Callable[..., Cost], decoder: Decoder, chips: int, *arguments: float, **options: bool
) -> Cost:
    """The cost of all matrices of a model."""
    costs = [cost(x, chips, *arguments, **options) for x in decoder.matrices()]
    return Cost(*map(sum, zip(*costs, strict=True)))


def table(rank: int, fraction: float) -> list[str]:
    """Three rows for each model and number of chips."""
    lines = [
        "| model | chips | on each chip | AdamW | Muon, ideal | GaLore-Muon | GUM | GUM, slots whole |",
        "|---" * 8 + "|",
    ]
    units = {"flops": ("GFLOP", 1e9), "traffic": ("memory, MiB", 2**20), "wire": ("sent, MiB", 2**20)}
    for name, decoder in DECODERS.items():
        for chips in CHIPS:
            columns = [
                total(adamw, decoder, chips),
                total(muon, decoder, chips),
                total(galore_muon, decoder, chips, rank),
                total(gum, decoder, chips, rank, fraction),
                total(gum, decoder, chips, rank, fraction, whole=True),
            ]
            for field, (label, unit) in units.items():
                cells = " | ".join(f"{getattr(cost, field) / unit:,.1f}" for cost in columns)
                lines.append(f"| {name} | {chips} | {label} | {cells} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rank", type=int, default=128, help="default: %(default)s")
    p.add_argument("--full-rank-fraction", type=float, default=1 / 16, help="GUM's q (default: 1/16)")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    lines = table(options.rank, options.full_rank_fraction)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cost_model.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
