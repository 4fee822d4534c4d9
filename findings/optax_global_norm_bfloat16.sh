#!/usr/bin/env bash
# optax 0.2.8: the global norm of a tree in bfloat16 stops growing with the number of leaves.
#
# `optax.tree.norm`, and with it `optax.clip_by_global_norm`, squares and sums each leaf and then adds the sums of
# the leaves in their own dtype, one after the other. In bfloat16, which keeps eight bits, a running total of 256 equal
# sums no longer changes when the next one is added: 1024 leaves of norm 1 have the norm 16 in place of 32. Gradients are
# in bfloat16 where weights are, and a model of many layers that are not stacked has hundreds of leaves. Clipping to a
# norm of 1 then leaves a norm of 2. A tree of the same numbers whose layers are stacked into one leaf has the right
# norm, because the sum within a leaf is accumulated in float32; so has the tree in float32.
#
# The script draws gradients of 32 to 128 layers, seven matrices and two norms each, and compares each tree with the
# same numbers in float32.
#
# Seen on a CPU with Python 3.11 and the versions below: the lines under EXPECTED. The script fails when they change.
set -euo pipefail
versions=("jax==0.10.2" "optax==0.2.8")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/python" -m pip install -q "${versions[@]}"

cd "$work"
cat > norms.py <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def norm_in_float32(tree):
    return float(optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree)))


def report(name, tree):
    clipped, _ = optax.clip_by_global_norm(1.0).update(tree, optax.EmptyState())
    found, right = float(optax.tree.norm(tree)), norm_in_float32(tree)
    print(f"{name}: {found / right:.2f} of the norm; clipped to 1: {norm_in_float32(clipped):.2f}")


for count in (64, 256, 512, 1024):
    report(f"{count} leaves of norm 1", {f"{i:04d}": jnp.ones(1, jnp.bfloat16) for i in range(count)})
report("1024 rows of one leaf", {"stacked": jnp.ones((1024, 1), jnp.bfloat16)})


def gradients(layers, dtype=jnp.bfloat16):
    shapes = [(32, 32)] * 4 + [(32, 88)] * 2 + [(88, 32)] + [(32,)] * 2
    keys = jax.random.split(jax.random.key(0), (layers, len(shapes)))
    return [[jax.random.normal(k, s).astype(dtype) for k, s in zip(row, shapes)] for row in keys]


for layers in (32, 64, 128):
    report(f"{layers} layers of a transformer", gradients(layers))
PYTHON
JAX_PLATFORMS=cpu "$work/env/bin/python" norms.py > seen
cat > EXPECTED <<'TEXT'
64 leaves of norm 1: 1.00 of the norm; clipped to 1: 1.00
256 leaves of norm 1: 1.00 of the norm; clipped to 1: 1.00
512 leaves of norm 1: 0.71 of the norm; clipped to 1: 1.41
1024 leaves of norm 1: 0.50 of the norm; clipped to 1: 2.00
1024 rows of one leaf: 1.00 of the norm; clipped to 1: 1.00
32 layers of a transformer: 0.97 of the norm; clipped to 1: 1.03
64 layers of a transformer: 0.96 of the norm; clipped to 1: 1.04
128 layers of a transformer: 0.81 of the norm; clipped to 1: 1.24
TEXT
cat seen
diff EXPECTED seen && echo "Unchanged: the norm of many leaves in bfloat16 is too small."
