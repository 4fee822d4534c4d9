#!/usr/bin/env bash
# MaxText 0.2.5: `fused_qkv` changes which matrices Muon orthogonalizes.
#
# `fused_qkv` stores the queries, keys and values of a layer in one kernel, `qkv_proj`. The model computes the same
# function, and MaxText accepts the setting together with `opt_type=muon`. `maxtext.utils.muon_utils` assigns dimension
# numbers by module name, and its list of query, key and value names lacks `qkv_proj`. The kernel therefore gets the
# numbers of a plain two-dimensional weight, reduction axis 0 and output axis -1, and its axis of heads becomes a batch
# axis: Muon orthogonalizes one 4096 × 128 matrix for each head of llama2-7b. Without `fused_qkv` Muon orthogonalizes
# one 4096 × 4096 matrix for the 32 heads of the queries. The docstring of `transform_logic` promises the latter for
# attention: "QKV: reduction (0,), output (-2, -1)".
#
# The same function gives the numbers of a plain weight to the attention kernels of gemma2, whose modules are named
# `self_attention_local` and `self_attention_global`, and to the `qkv_proj` of gpt3. MaxText refuses to train those two
# families with Muon ("dimension numbers haven't been tested for this model"), so this script does not check them.
#
# Seen on a CPU with Python 3.12 and the versions below: the lines under EXPECTED. The second axis of a kernel is the
# scan over the layers. The script needs Python 3.12 and 2 GB of disk, allocates no parameters, and fails when the
# output changes.
set -euo pipefail
versions=("maxtext==0.2.5" "jax==0.12.0.1" "optax==0.2.8" "flax==0.12.12")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# pip takes hours to resolve MaxText's dependencies; uv takes a minute.
"${PYTHON:-python3.12}" -m venv "$work/env"
"$work/env/bin/python" -m pip install -q "uv==0.13.9"
"$work/env/bin/uv" pip install -q --python "$work/env/bin/python" "${versions[@]}"
# MaxText ships the list of what it needs without the clients of a cloud.
requirements=$(find "$work/env/lib" -name decoupled-requirements.txt)
"$work/env/bin/uv" pip install -q --python "$work/env/bin/python" -r "$requirements" "${versions[@]}"

cd "$work"
cat > dimensions.py <<'PYTHON'
import os

import jax
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils, muon_utils
from maxtext.utils.globals import MAXTEXT_PKG_DIR

BASE = os.path.join(MAXTEXT_PKG_DIR, "configs", "base.yml")
SETTINGS = ["model_name=llama2-7b", "opt_type=muon", "attention=dot_product", "skip_jax_distributed_system=True"]

for fused in (False, True):
    config = pyconfig.initialize([None, BASE, *SETTINGS, f"fused_qkv={fused}"])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
    _, params, _ = nnx.split(model, nnx.Param, ...)
    numbers = nnx.to_pure_dict(muon_utils.get_muon_weight_dimension_numbers(model, config))
    numbers = numbers["decoder"]["layers"]["self_attention"]
    kernels = nnx.to_pure_dict(params)["decoder"]["layers"]["self_attention"]
    for name in [x for x in ("query", "key", "value", "qkv_proj") if x in kernels]:
        shape, (reduction, output) = kernels[name]["kernel"].shape, numbers[name]["kernel"]
        print(f"llama2-7b fused_qkv={fused} {name} {shape} reduction {reduction} output {output}")
PYTHON
JAX_PLATFORMS=cpu DECOUPLE_GCLOUD=TRUE "$work/env/bin/python" dimensions.py > output.txt 2> errors.txt || {
  tail -20 errors.txt
  exit 1
}
cat > EXPECTED <<'TEXT'
llama2-7b fused_qkv=False query (4096, 32, 32, 128) reduction (0,) output (-2, -1)
llama2-7b fused_qkv=False key (4096, 32, 32, 128) reduction (0,) output (-2, -1)
llama2-7b fused_qkv=False value (4096, 32, 32, 128) reduction (0,) output (-2, -1)
llama2-7b fused_qkv=True qkv_proj (4096, 32, 96, 128) reduction (0,) output (-1,)
TEXT
grep '^llama2-7b' output.txt > seen || true
cat seen
diff EXPECTED seen && echo "Unchanged: with fused_qkv, every head is a matrix of its own to Muon."
