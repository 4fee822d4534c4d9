"""Where low-rank projection fails and GUM does not: the noisy regression of the GUM paper's Figure 1.

    minimise  f(X) = ½|A X|² + <B, X>,   A = [I 0],   B Gaussian in its leading block,
    from gradients  ∇f(X) + ξ σ C,   ξ = ±1,   C = diag(0, I_r)

The noise is large and of rank r, so the top r singular vectors of a gradient are those of the noise, and
GaLore-Muon never sees the signal. This is bias, which no learning rate removes. The seeds are the blocks of
one stack, so that GUM can draw half of them.

    python examples/linear_regression.py
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import optax

import gum_optax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The setting of arXiv 2510.17802, Figure 1, as far as the paper states it; its code is not public.
SIZE, RANK, NOISE, MOMENTUM, LEARNING_RATE, PERIOD, FRACTION = 20, 12, 100.0, 0.95, 1e-2, 10, 0.5


def rules() -> dict[str, optax.GradientTransformation]:
    """The rule of each method, all with Muon's step."""
    inner = optax.chain(optax.trace(MOMENTUM), gum_optax.orthogonalize())
    svd = gum_optax.svd_subspace
    return {
        "Muon": inner,
        "GaLore-Muon": gum_optax.low_rank(inner, RANK, PERIOD, find_subspace=svd),
        "GUM": gum_optax.unbiased_low_rank(inner, RANK, PERIOD, FRACTION, find_subspace=svd),
        "GUM, low variance": gum_optax.unbiased_low_rank(
            inner, RANK, PERIOD, FRACTION, find_subspace=svd, compensation=gum_optax.low_variance
        ),
    }


def excess_losses(rule: optax.GradientTransformation, steps: int, seeds: int) -> jax.Array:
    """`f - f*` after each step, `(steps, seeds)`."""
    free = SIZE - RANK
    signal = jnp.diag(jnp.arange(SIZE) < free).astype(jnp.float32)  # Aᵀ A
    noise = NOISE * (jnp.eye(SIZE) - signal)  # σ C
    key_b, key_noise = jax.random.split(jax.random.key(0))
    b = jax.random.normal(key_b, (seeds, SIZE, SIZE)).at[:, free:].set(0).at[:, :, free:].set(0)
    schedule = optax.linear_schedule(LEARNING_RATE, 0.0, steps)
    tx = optax.chain(gum_optax.as_matrices(rule), optax.scale_by_learning_rate(schedule))

    def step(carry, key):
        x, state = carry
        sign = jax.random.rademacher(key, (seeds, 1, 1)).astype(jnp.float32)
        updates, state = tx.update(signal @ x + b + sign * noise, state, x)
        x = x + updates
        # f - f* = ½ |A X + B|². This form is exact where the difference of two losses would cancel.
        return (x, state), 0.5 * jnp.sum(jnp.square(signal @ x + b), axis=(1, 2))

    start = jnp.zeros((seeds, SIZE, SIZE))
    keys = jax.random.split(key_noise, steps)
    return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), keys)[1])()


def main(arguments: list[str] | None = None) -> dict[str, jax.Array]:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--steps", type=int, default=4000)
    p.add_argument("--seeds", type=int, default=8, help="an even number (default: 8)")
    p.add_argument("--out", type=Path, default=Path("runs/linear_regression"), metavar="DIR")
    options = p.parse_args(arguments)
    if options.steps < 1 or options.seeds < 2 or options.seeds % 2:
        p.error("--steps must be at least 1, --seeds an even number of at least 2")
    losses = {name: excess_losses(rule, options.steps, options.seeds) for name, rule in rules().items()}

    options.out.mkdir(parents=True, exist_ok=True)
    lines = ["| method | f - f* at the end: median | worst of the seeds |", "|---|---|---|"]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in losses.items():
        lines.append(f"| {name} | {jnp.median(curve[-1]):.1e} | {jnp.max(curve[-1]):.1e} |")
        (line,) = axes.semilogy(jnp.median(curve, axis=1), label=name)
        axes.fill_between(range(len(curve)), curve.min(1), curve.max(1), color=line.get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel="f - f*", title=f"median and range of {options.seeds} seeds")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(options.out / "linear_regression.png", dpi=120)
    plt.close(figure)
    (options.out / "linear_regression.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return losses


if __name__ == "__main__":
    main()
