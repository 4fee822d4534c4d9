"""Small functions and tables that several test modules share."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

# A trace makes many objects that live on, and each collection looks at them again: an eighth of the time.
gc.set_threshold(50_000, 20, 20)

# If two programs round differently, Newton-Schulz multiplies the difference by up to its slope at zero:
# 3.4445⁵ = 485 for Jordan's five steps, and 485 roundings of float32 are 6e-5.
AMPLIFIED = 1.5e-4

LOW_RANK = {"rank": 2, "period": 3}
# Every optimizer, with arguments for a small state and short periods.
OPTIMIZERS = {
    "muon": (go.muon, {}),
    "normuon": (go.normuon, {}),
    "galore_muon": (go.galore_muon, LOW_RANK),
    "gum": (go.gum, LOW_RANK | {"full_rank_fraction": 0.3}),
    "galore": (go.galore, LOW_RANK),
    "sumo": (go.sumo, LOW_RANK),
    "swan": (go.swan, {}),
    "sinkgd": (go.sinkgd, {"rounds": 3}),
    "golore": (go.golore, LOW_RANK | {"random_after": 3}),
    "fira": (go.fira, LOW_RANK),
    "frugal": (go.frugal, LOW_RANK),
    "trion": (go.trion, {"rank": 2}),
    "dion": (go.dion, {"rank": 2}),
    "cosmos": (go.cosmos, {"rank": 2}),
    "scion": (go.scion, {}),
    "adalomo": (go.adalomo, {}),
    "hfac": (go.hfac, {}),
}

# Their steps are relative to the parameters.
NEED_PARAMETERS = ("adalomo",)


def gum_by_neuron(learning_rate, **keywords):
    """GUM with NorMuon's step sizes and cautious decay."""
    rule = go.unbiased_low_rank(go.scale_by_muon(batched=True), **LOW_RANK, full_rank_fraction=0.4)
    scale = optax.chain(go.scale_by_neuron_rms(), go.scale_by_shape())
    return go.matrix_optimizer(
        rule, learning_rate, scale, weight_decay=go.cautious_weight_decay(0.1), **keywords
    )


# One of each kind: full rank, low rank, sampled, rotated with a raw residual, stateless, state per matrix.
# The other optimizers run the shared tests only in the long tests.
CORE = ("muon", "galore_muon", "gum", "sumo", "sinkgd", "dion")
CORE_AND_LONG = [pytest.param(name, marks=[pytest.mark.long] * (name not in CORE)) for name in OPTIMIZERS]

# For tests of temporaries that expect results one after the other.
sequential_steps = pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="the XLA of jax 0.9 holds the steps of all leaves: muon has 1.0 of the gradients",
)

# Both orientations, single and stacked. The fixture `leaves` has their gradients.
LEAVES = {"wide": (6, 9), "tall": (9, 6), "stack": (3, 6, 9), "tall_stack": (2, 10, 5)}
STEPS = 10


def run(tx, gradients, params=None):
    """The updates of the jitted `tx` over a list of gradient trees, and the last state.

    The default parameters are ones.
    """
    params = jax.tree.map(jnp.ones_like, gradients[0]) if params is None else params
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    updates = []
    for g in gradients:
        u, state = update(g, state, params)
        updates.append(u)
    return updates, state


def muon_rule(momentum=0.9, method=go.newton_schulz):
    trace = optax.trace(momentum, accumulator_dtype=jnp.float32)
    return optax.chain(trace, go.orthogonalize(method))


def sequence(rng, shape, steps, drift=0.3):
    """Gradients that move slowly: a fixed matrix plus noise, with separated singular values."""
    *batch, m, n = shape
    u = np.linalg.qr(rng.normal(size=(*batch, m, m)))[0]
    v = np.linalg.qr(rng.normal(size=(*batch, n, n)))[0][..., : min(m, n)]
    spectrum = 2.0 ** -np.arange(min(m, n))
    base = (u[..., : min(m, n)] * spectrum) @ np.swapaxes(v, -1, -2)
    noise = drift * np.linalg.norm(base) / np.sqrt(m * n) * rng.normal(size=(steps, *shape))
    return [np.float32(base + e) for e in noise]


def trees(gradients):
    """Convert a dict of lists to a list of dicts."""
    return [dict(zip(gradients, row, strict=True)) for row in zip(*gradients.values(), strict=True)]


def steps_of(tx, leaves):
    """The steps of a descent at learning rate one, and the states before each step and after the last one."""
    gradients = trees(leaves)
    states, updates = [jax.jit(tx.init)(gradients[0])], []
    update = jax.jit(tx.update)
    for g in gradients:
        u, state = update(g, states[-1])
        updates.append(u)
        states.append(state)
    return {name: [-np.asarray(u[name]) for u in updates] for name in leaves}, states
