"""What skipping gradients that are not finite costs: a rule alone, under our guard, under optax's.

    python benchmarks/guard.py --model 60m

The rules are those of `muon`, `galore_muon` and `gum`, on the matrices of a LLaMA. `skip_non_finite` is this
library's guard, and `optax.apply_if_finite` is optax's. The script takes times as `speed.py` does, and
temporaries over the gradients' bytes as `memory.py` does, with the gradients kept.
"""

import functools
from typing import Any

import memory
import optax
import speed
from results import Results

import gum_optax as go

GUARDS = {
    "alone": lambda tx: tx,
    "skip_non_finite": go.skip_non_finite,
    "optax.apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=100),
}


def rules(rank: int) -> dict[str, optax.GradientTransformation]:
    """Rules over matrices, whose steps point up the gradient."""
    muon = go.scale_by_muon(batched=True)
    return {
        "muon": muon,
        "galore_muon": go.low_rank(muon, rank, speed.PERIOD),
        "gum": go.unbiased_low_rank(muon, rank, speed.PERIOD, speed.FRACTION),
    }


def guarded(rule: optax.GradientTransformation, guard: Any) -> optax.GradientTransformation:
    return guard(optax.chain(go.as_matrices(rule), optax.scale_by_learning_rate(1e-3)))


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Milliseconds, their ratio to those of the rule alone, and temporaries."""
    lines = ["| rule | guard | step ms | of alone | refresh ms | of alone | temporaries |", "|---" * 7 + "|"]
    for name, row in rows.items():
        rule, guard = name.split(", ")
        alone = rows[f"{rule}, alone"]
        times = [f"{1e3 * row[k]:.0f} | {row[k] / alone[k]:.3f}" for k in ("step", "refresh")]
        lines.append(f"| `{rule}` | {guard} | {times[0]} | {times[1]} | {row['temporaries']:.3f} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    options = speed.parser(__doc__, model="60m", rounds=15).parse_args(argv)
    results = Results(options.out / "guard.json", table)
    for _, setting, gradients in speed.settings(options):
        makers = {
            f"{name}, {guard}": functools.partial(guarded, rule, how)
            for name, rule in rules(options.rank).items()
            for guard, how in GUARDS.items()
        }
        rows = speed.measure(makers, gradients, options.rounds)
        for name, row in rows.items():
            row["temporaries"] = memory.measure(makers[name](), gradients, True, keep_gradients=True)
        results.add(setting, rows)
    print(results.text())


if __name__ == "__main__":
    main()
