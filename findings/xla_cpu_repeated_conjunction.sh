#!/usr/bin/env bash
# jax 0.12.0.1 and 0.10.2 on a CPU: "keep the old state unless all gradients are finite" compiles to code that grows with the
# square of the number of arrays.
#
# A training step that skips gradients with a NaN makes one flag for each of n gradients, joins them by `and` or by
# `jnp.all`, and chooses with the one result between the new and the old of n arrays; loss scaling does so too. One would
# think that XLA joins the flags once. It takes the whole chain of n `and`s, which are cheap, into the kernel of each of the
# n choices: n² of them. With 384 arrays the program below has 147456 and took 24 s to compile (jax 0.12.0.1, two cores). The
# same step took 0.8 s with the flags joined by a dot product of those that are false, which is zero where all are true: for
# a CPU, XLA fuses no dot product into what reads it. `optimization_barrier` around the result helps in jax 0.12.0.1, and
# does nothing in jax 0.10.2, which drops it on a CPU.
#
# Seen with Python 3.13 (jax 0.12 needs 3.12 or newer) and the versions below: the lines under EXPECTED, instructions
# `and` in the compiled programs. The script fails when they change.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > flags.py <<'PYTHON'
import functools

import jax
import jax.numpy as jnp


def chain(flags):
    return functools.reduce(jnp.logical_and, flags)


def stack(flags):
    return jnp.all(jnp.stack(flags))


def barrier(flags):
    return jax.lax.optimization_barrier(stack(flags))


def dot(flags):
    false = (~jnp.stack(flags)).astype(jnp.float32)
    return jnp.dot(false, false) == 0


def ands(join, count):
    """How many `and`s a step for so many arrays has."""

    @jax.jit
    def step(gradients, new, old):
        ok = join([jnp.all(jnp.isfinite(g)) for g in gradients])
        return [jnp.where(ok, after, before) for after, before in zip(new, old)]

    arrays = [jax.ShapeDtypeStruct((8, 8), jnp.float32)] * count
    return step.lower(arrays, arrays, arrays).compile().as_text().count(" and(")


jax.config.update("jax_platforms", "cpu")
for join in chain, stack, barrier, dot:
    print(f"jax {jax.__version__}, {join.__name__}:", *(ands(join, count) for count in (16, 32, 64)))
PYTHON
for version in 0.10.2 0.12.0.1; do
    "${PYTHON:-python3.13}" -m venv "env-$version"
    "env-$version/bin/python" -m pip install -q "jax==$version"
    "env-$version/bin/python" flags.py
done | tee seen

cat > EXPECTED <<'TEXT'
jax 0.10.2, chain: 256 1024 4096
jax 0.10.2, stack: 256 1024 4096
jax 0.10.2, barrier: 256 1024 4096
jax 0.10.2, dot: 16 32 64
jax 0.12.0.1, chain: 256 1024 4096
jax 0.12.0.1, stack: 256 1024 4096
jax 0.12.0.1, barrier: 31 63 127
jax 0.12.0.1, dot: 16 32 64
TEXT
diff EXPECTED seen
echo "as described"
