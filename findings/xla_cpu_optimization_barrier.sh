#!/usr/bin/env bash
# jax 0.12.0.1: an `optimization_barrier` can make a CPU program hold more memory; jax 0.10.2 dropped it in time.
#
# `jax.lax.optimization_barrier(x)` is `x`; it keeps XLA from moving or fusing code across it, and is often used to save
# memory. On a CPU it was dropped before XLA scheduled the program. In jax 0.12.0.1 it stays an instruction in the
# schedule, which goes breadth first: each barrier delays what reads it by one turn. In a training step that checks each
# gradient for NaN and adds it to a momentum in place, the backward pass then makes one more gradient before the first
# one is used up, and one more gradient is in memory. The barrier stands only before the sum that checks the
# gradient, and saves nothing: without it both versions compile to the same bytes. On a CPU, leave it out
# (`jax.lax.platform_dependent` chooses by platform), unless it stands in a branch or a loop to keep code there.
#
# Seen on a CPU with Python 3.13 (jax 0.12 needs 3.12 or newer) and the versions below: the lines under EXPECTED, from
# the compiled programs; a matrix is one gradient. The script fails when they change.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > barrier.py <<'PYTHON'
import functools
import sys

import jax
import jax.numpy as jnp

LAYERS, WIDTH, TOKENS = 8, 512, 64


def measure(read):
    """Temporaries of a step with momentum, in matrices; `read` is what the check for NaN sees of a gradient."""

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x * x)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(momentum, params, x):
        def one(m, g):
            seen = read(g)
            return jnp.where(jnp.isfinite(jnp.sum(seen - seen)), 0.9 * m + g, m)

        return jax.tree.map(one, momentum, jax.grad(loss)(params, x))

    w = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * LAYERS
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    return step.lower(w, w, x).compile().memory_analysis().temp_size_in_bytes / (4 * WIDTH * WIDTH)


jax.config.update("jax_platforms", "cpu")
for name, read in ("plain", lambda g: g), ("behind a barrier", jax.lax.optimization_barrier):
    print(f"jax {jax.__version__}, {name}: {measure(read):.2f} matrices")
PYTHON
for version in 0.10.2 0.12.0.1; do
    "${PYTHON:-python3.13}" -m venv "env-$version"
    "env-$version/bin/python" -m pip install -q "jax==$version"
    "env-$version/bin/python" barrier.py
done | tee seen

cat > EXPECTED <<'TEXT'
jax 0.10.2, plain: 3.00 matrices
jax 0.10.2, behind a barrier: 3.00 matrices
jax 0.12.0.1, plain: 3.00 matrices
jax 0.12.0.1, behind a barrier: 3.88 matrices
TEXT
diff EXPECTED seen
echo "as described"
