#!/usr/bin/env bash
# optax 0.2.8: with weights in bfloat16 Adam's second moment rises and never falls.
#
# `optax.adam` and `optax.adamw` keep the second moment in the dtype of the parameters; `mu_dtype` sets that of the first
# moment only. The moment is 0.999 of the old one and 0.001 of the square of the gradient. In bfloat16, which keeps eight
# bits, a fall by a thousandth is less than half of the last bit and is rounded away: the second moment is the largest
# that there has been, and a rise must be large to be seen. So gradients that shrink, as after the first steps of a
# training, shrink the steps with them: after 100 gradients of 1 and 8000 of 0.01 the step of `adam(1.0)` is 0.03, and
# 0.87 with parameters in float32. With `b2=0.99` a fall is large enough to be kept.
# `optax.inject_hyperparams` does more: it casts every number to the dtype of the parameters unless `hyperparam_dtype` is
# given, 0.999 becomes 1 in bfloat16, the correction of the second moment's bias is 0 / 0, and the first step is NaN.
#
# Seen on a CPU with Python 3.11 and the versions below: the lines under EXPECTED. The script fails when they change.
set -euo pipefail
versions=("jax==0.10.2" "optax==0.2.8")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/python" -m pip install -q "${versions[@]}"

cd "$work"
cat > moments.py <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def after(tx, dtype, gradients):
    """The last step, and the state, after (count, gradient) in turn."""
    params = jnp.ones(1, dtype)
    state, update, step = tx.init(params), jax.jit(tx.update), None
    for count, value in gradients:
        for _ in range(count):
            step, state = update(jnp.full(1, value, dtype), state, params)
    return abs(float(step[0])), state


for b2 in (0.999, 0.99):
    for dtype in (jnp.float32, jnp.bfloat16):
        step, state = after(optax.adam(1.0, b2=b2), dtype, [(100, 1.0), (8000, 0.01)])
        _, before = after(optax.adam(1.0, b2=b2), dtype, [(100, 1.0)])
        kept = float(optax.tree.get(state, "nu")[0]) / float(optax.tree.get(before, "nu")[0])
        print(f"b2={b2} {jnp.dtype(dtype)}: the second moment is {kept:.3f} of what it was, the step {step:.2f}")
for dtype in (jnp.float32, jnp.bfloat16):
    step, state = after(optax.inject_hyperparams(optax.adam)(1.0), dtype, [(1, 1.0)])
    print(f"inject_hyperparams {jnp.dtype(dtype)}: b2 {float(state.hyperparams['b2']):.3f}, first step {step:.2f}")
PYTHON
JAX_PLATFORMS=cpu "$work/env/bin/python" moments.py > seen
cat > EXPECTED <<'TEXT'
b2=0.999 float32: the second moment is 0.001 of what it was, the step 0.87
b2=0.999 bfloat16: the second moment is 1.000 of what it was, the step 0.03
b2=0.99 float32: the second moment is 0.000 of what it was, the step 1.00
b2=0.99 bfloat16: the second moment is 0.000 of what it was, the step 0.89
inject_hyperparams float32: b2 0.999, first step 1.00
inject_hyperparams bfloat16: b2 1.000, first step nan
TEXT
cat seen
diff EXPECTED seen && echo "Unchanged: in bfloat16 the second moment does not fall."
