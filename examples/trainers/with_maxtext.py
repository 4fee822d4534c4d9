"""GUM in MaxText: its own training loop on synthetic tokens, layers scanned, saved and resumed.

    DECOUPLE_GCLOUD=TRUE python examples/trainers/with_maxtext.py --steps 6 --out run

MaxText takes no optimizer by name but its own: give `optimizers.get_optimizer` another body.
"""

import os

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")  # before MaxText is imported: no cloud clients

import jax
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR
from maxtext.utils.muon_utils import get_muon_weight_dimension_numbers

import gum_optax

from counting import BATCH, GUM, LENGTH, VOCABULARY, arguments, report


def gum_for_maxtext(config, learning_rate_schedule, model=None, mesh=None):
    """In place of `get_optimizer`: MaxText's own dimension numbers tell where its scans put the layers."""
    del mesh
    dims = get_muon_weight_dimension_numbers(model, config)
    return gum_optax.gum(learning_rate_schedule, **GUM, weight_dimension_numbers=dims)


TINY = {
    "decoder_block": "llama2",
    "base_num_decoder_layers": 2,
    "base_emb_dim": 16,
    "base_mlp_dim": 32,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_target_length": LENGTH,
    "scan_layers": True,
    "attention": "dot_product",
    "dataset_type": "synthetic",
    "dtype": "float32",
    "learning_rate": 0.01,
    "warmup_steps_fraction": 0.0,
    # The schedule's length, which must not change when a run is resumed.
    "learning_rate_schedule_steps": 100,
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "enable_goodput_recording": False,
}


def main() -> None:
    asked = arguments(__doc__)
    optimizers.get_optimizer = gum_for_maxtext
    settings = TINY | {
        "steps": asked.steps,
        "per_device_batch_size": BATCH / jax.device_count(),
        "run_name": "gum",
        "base_output_directory": asked.out,
        "enable_checkpointing": True,
        "async_checkpointing": False,
        "checkpoint_period": 1,
        "metrics_file": asked.out / "losses.jsonl",
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    told = [f"{name}={value}" for name, value in settings.items()]
    config, recorder = train.initialize(["", f"{MAXTEXT_CONFIGS_DIR}/base.yml", *told])
    state = train.train_loop(config, recorder)  # train.main(argv) does it, and gives nothing back
    report(state["optimizer"]["opt_state"])


if __name__ == "__main__":
    main()
