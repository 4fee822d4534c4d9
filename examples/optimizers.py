"""The optimizers of `pretrain.py`, made from the settings of a run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import gum_optax as go


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that determine a run: the same settings give the same losses, bit for bit."""

    optimizer: str
    model: str
    steps: int
    batch: int
    seq: int
    lr: float
    others_lr: float
    rank: int
    period: int
    full_rank_fraction: float
    weight_decay: float
    seed: int
    text: str  # the name of the corpus and a digest of its content
    momentum_dtype: str = "float32"  # or bfloat16 or int8, for the optimizers in MOMENTUM_DTYPE
    weights_dtype: str = "float32"  # or bfloat16, without a float32 copy
    others: str = "adamw"  # of OTHERS
    clip: float = 1.0  # the largest norm of the gradient; 0: any
    layerwise: bool = False  # one layer after the other; then each layer's gradient is clipped by itself


def completed(kind: type[Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a run stored; one that did not exist yet had its default."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING} | dict(held)


def schedule(s: Settings, peak: float) -> optax.Schedule:
    """Linear warm-up over a tenth of the steps, then a cosine to a tenth (GaLore's C4 runs)."""
    warmup = max(1, s.steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(s.steps, warmup + 1), peak / 10)


def _adamw(lr: optax.ScalarOrSchedule, weight_decay: float) -> optax.GradientTransformation:
    return optax.adamw(lr, b2=0.95, weight_decay=weight_decay)


def adamw_8bit(lr: optax.ScalarOrSchedule, weight_decay: float) -> optax.GradientTransformation:
    return go.adamw_8bit(lr, b2=0.95, weight_decay=weight_decay)


def by_kind(
    make: Callable[[Any, float], optax.GradientTransformation], lr: Any, *, others: Any, weight_decay: float
) -> optax.GradientTransformation:
    """One optimizer for the hidden matrices, at a rate of their own, and another for the other leaves."""

    def kinds(params):
        entries = go.hidden_matrices(params)
        return jax.tree.map(lambda x, entry: "others" if entry is None else "matrices", params, entries)

    return optax.partition({"matrices": make(lr, weight_decay), "others": others}, kinds)


# (settings, learning rate, others=, weight_decay=) -> the optimizer.
Maker = Callable[..., optax.GradientTransformation]


# AdamW's peak rate for all leaves that are not matrices, tuned with `3m` on the benchmark's runs
# (docs/results/losses.md). A larger model or a longer run wants less.
OTHERS_LR = 9.6e-2

# Each optimizer and a default learning rate, within a factor of two of the best in docs/results/losses.md.
OPTIMIZERS: dict[str, tuple[Maker, float]] = {
    "adamw": (lambda s, lr, **kw: by_kind(_adamw, lr, **kw), 1.5e-3),
    "muon": (lambda s, lr, **kw: go.muon(lr, momentum_dtype=s.momentum_dtype, **kw), 6e-3),
    "normuon": (lambda s, lr, **kw: go.normuon(lr, momentum_dtype=s.momentum_dtype, **kw), 6e-3),
    "galore_muon": (
        lambda s, lr, **kw: go.galore_muon(lr, s.rank, s.period, momentum_dtype=s.momentum_dtype, **kw),
        3e-3,
    ),
    "gum": (
        lambda s, lr, **kw: go.gum(
            lr,
            s.rank,
            s.period,
            s.full_rank_fraction,
            key=s.seed,
            momentum_dtype=s.momentum_dtype,
            **kw,
        ),
        3e-3,
    ),
    "galore": (lambda s, lr, **kw: go.galore(lr, s.rank, s.period, **kw), 1.2e-2),
    "golore": (
        # As in the paper's experiments, the subspace is random for the last fifth.
        lambda s, lr, **kw: go.golore(lr, s.rank, s.period, random_after=s.steps * 4 // 5, key=s.seed, **kw),
        1.2e-2,
    ),
    "fira": (lambda s, lr, **kw: go.fira(lr, s.rank, s.period, **kw), 6e-3),
    "frugal": (lambda s, lr, **kw: go.frugal(lr, s.rank, s.period, **kw), 3e-3),
    "sumo": (
        lambda s, lr, **kw: go.sumo(lr, s.rank, s.period, key=s.seed, momentum_dtype=s.momentum_dtype, **kw),
        3e-3,
    ),
    "swan": (lambda s, lr, **kw: go.swan(lr, **kw), 1.92e-1),
    "sinkgd": (lambda s, lr, **kw: go.sinkgd(lr, **kw), 2.4e-2),
    "trion": (lambda s, lr, **kw: go.trion(lr, s.rank, **kw), 3e-3),
    "dion": (lambda s, lr, **kw: go.dion(lr, s.rank, key=s.seed, **kw), 2.4e-2),
    "cosmos": (lambda s, lr, **kw: go.cosmos(lr, s.rank, key=s.seed, **kw), 6e-3),
    "adalomo": (lambda s, lr, **kw: go.adalomo(lr, **kw), 1e-2),
    "hfac": (lambda s, lr, **kw: go.hfac(lr, **kw), 1.5e-3),
    # Scion has norm balls of its own for embedding, head and norms.
    "scion": (lambda s, lr, others, **kw: go.scion(lr, **kw), 3.75e-4),
}


def _adafactor(lr: Any, weight_decay: float) -> optax.GradientTransformation:
    """Adafactor's second moment, a row and a column for each matrix, without a momentum."""
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(lr),
    )


# (learning rate, weight decay) -> the optimizer of embedding, head and norms.
OthersMaker = Callable[[Any, float], optax.GradientTransformation]
OTHERS: dict[str, OthersMaker] = {
    "adamw": _adamw,
    "adamw_8bit": adamw_8bit,
    "adafactor": _adafactor,
    "frozen": lambda lr, weight_decay: optax.set_to_zero(),
}

# The optimizers that can keep their momentum in bfloat16 or int8.
MOMENTUM_DTYPE = ("muon", "normuon", "galore_muon", "gum", "sumo")


def optimizer(
    s: Settings,
    makers: Mapping[str, tuple[Maker, float]] = OPTIMIZERS,
    others_makers: Mapping[str, OthersMaker] = OTHERS,
) -> optax.GradientTransformation:
    """The optimizer of a run, with clipped gradients and `others_lr` for the other leaves.

    Its updates and its state are float32 whatever the weights are.
    """
    make, _ = makers[s.optimizer]
    others = others_makers[s.others](schedule(s, s.others_lr), s.weight_decay)
    made = make(s, schedule(s, s.lr), others=others, weight_decay=s.weight_decay)
    clipped = optax.chain(optax.clip_by_global_norm(s.clip), made) if s.clip else made
    return clipped if s.weights_dtype == "float32" else go.float32_steps(clipped)
