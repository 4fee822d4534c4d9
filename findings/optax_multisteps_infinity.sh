#!/usr/bin/env bash
# optax 0.2.8: one microbatch with an infinite gradient ends a training under `optax.MultiSteps`, silently.
#
# `MultiSteps` clears its accumulator after a step by multiplying it by zero. A number that has overflowed in one
# microbatch gives 0 * inf = NaN there, and stays NaN for good: no later microbatch can bring it back. The accumulator is
# outside the inner optimizer, so that wrappers which protect it make it worse to notice: `optax.apply_if_finite` rejects
# every step from then on, the parameters stand still and nothing is raised; after `optax.zero_nans` the number that
# overflowed gets a step of zero for ever, and all others go on. With `should_skip_update_fn=optax.skip_not_finite` the
# microbatch does not reach the accumulator. That is not the default.
#
# The script takes 40 steps of two microbatches each. The third gradient overflows in one of two numbers.
#
# Seen on a CPU with Python 3.11 and the versions below: the lines under EXPECTED. The script fails when they change.
set -euo pipefail
versions=("jax==0.10.2" "optax==0.2.8")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/python" -m pip install -q "${versions[@]}"

cd "$work"
cat > accumulate.py <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def steps_of_each_number(tx, **kwargs):
    """How many of 40 steps change each of two numbers."""
    rule = optax.MultiSteps(tx, every_k_schedule=2, **kwargs)
    params = jnp.zeros(2)
    state, update, moved = rule.init(params), jax.jit(rule.update), jnp.zeros(2, int)
    for i in range(80):
        step, state = update(jnp.array([1.0, jnp.inf if i == 2 else 1.0]), state, params)
        moved += jnp.isfinite(step) & (step != 0)
    return moved.tolist(), state.acc_grads.tolist()


sgd = optax.sgd(1.0)
for name, found in {
    "apply_if_finite": steps_of_each_number(optax.apply_if_finite(sgd, max_consecutive_errors=100)),
    "zero_nans": steps_of_each_number(optax.chain(optax.zero_nans(), sgd)),
    "skip_not_finite": steps_of_each_number(sgd, should_skip_update_fn=optax.skip_not_finite),
}.items():
    moved, accumulator = found
    print(f"{name}: steps {moved} of 40, accumulator {accumulator}")
PYTHON
JAX_PLATFORMS=cpu "$work/env/bin/python" accumulate.py > seen
cat > EXPECTED <<'TEXT'
apply_if_finite: steps [1, 1] of 40, accumulator [0.0, nan]
zero_nans: steps [40, 1] of 40, accumulator [0.0, nan]
skip_not_finite: steps [39, 39] of 40, accumulator [1.0, 1.0]
TEXT
cat seen
diff EXPECTED seen && echo "Unchanged: what overflowed once stays in the accumulator."
