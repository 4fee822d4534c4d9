#!/usr/bin/env bash
# optax 0.2.8: `optax.MultiSteps` runs the whole inner optimizer on every mini-step, and holds three copies of the
# parameters for it.
#
# `MultiSteps(tx, every_k_schedule=k)` adds up the gradients of k microbatches. One would expect it to run `tx` once for
# the k of them. Its update runs `tx` each time and then chooses, by `where`, between the new state and the old one,
# and multiplies the step by zero. So an optimizer that works hard pays k times: the compiled mini-step of
# `optax.contrib.muon` does all of its Newton-Schulz products whether or not anything is emitted. Arguments donated and
# updates applied, AdamW writes its state in place and needs no temporaries; under MultiSteps it needs three times the
# bytes of the parameters, beside the accumulator, and four times with `should_skip_update_fn=skip_not_finite`.
# A mean over microbatches inside the training step (`jax.lax.scan`), followed by one update, needs the accumulator only.
#
# Seen on a CPU with Python 3.11 and the versions below: the lines under EXPECTED, from the compiled programs. The script
# fails when they change.
set -euo pipefail
versions=("jax==0.10.2" "optax==0.2.8")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/python" -m pip install -q "${versions[@]}"

cd "$work"
cat > cost.py <<'PYTHON'
import functools

import jax
import jax.numpy as jnp
import optax


def compiled(tx, width, layers=4):
    params = {f"w{i}": jax.ShapeDtypeStruct((width, width), jnp.float32) for i in range(layers)}
    state = jax.eval_shape(tx.init, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step.lower(params, state, params).compile(), 4 * width * width * layers


def report(name, tx, width, of):
    plain, _ = compiled(of, width)
    program, parameters = compiled(tx, width)
    work = program.cost_analysis()["flops"] / plain.cost_analysis()["flops"]
    held = program.memory_analysis().temp_size_in_bytes / parameters
    print(f"{name}: {work:.1f} of the operations, temporaries {held:.0f} x parameters")


def accumulated(tx, **kwargs):
    return optax.MultiSteps(tx, every_k_schedule=8, **kwargs).gradient_transformation()


adamw, muon = optax.adamw(1e-3), optax.contrib.muon(1e-3)
report("adamw", adamw, 512, adamw)
report("a mini-step of adamw", accumulated(adamw), 512, adamw)
skipping = accumulated(adamw, should_skip_update_fn=optax.skip_not_finite)
report("a mini-step of adamw that may be skipped", skipping, 512, adamw)
plain, _ = compiled(muon, 64)
mini, _ = compiled(accumulated(muon), 64)
print(f"a mini-step of muon: {mini.cost_analysis()['flops'] / plain.cost_analysis()['flops']:.2f} of the operations")
PYTHON
JAX_PLATFORMS=cpu "$work/env/bin/python" -W ignore cost.py > seen
cat > EXPECTED <<'TEXT'
adamw: 1.0 of the operations, temporaries 0 x parameters
a mini-step of adamw: 2.5 of the operations, temporaries 3 x parameters
a mini-step of adamw that may be skipped: 2.7 of the operations, temporaries 4 x parameters
a mini-step of muon: 1.01 of the operations
TEXT
cat seen
diff EXPECTED seen && echo "Unchanged: every mini-step is a whole step of the inner optimizer."
