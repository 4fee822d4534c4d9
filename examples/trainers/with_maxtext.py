"""GUM in MaxText: its own training loop on synthetic tokens, layers scanned, saved and resumed.

DECOUPLE_GCLOUD=TRUE python examples/trainers/with_maxtext.py --steps 6 --out run
"""

import os

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")  # before MaxText is imported: no cloud clients

import jax
from maxtext.trainers.pre_train import train
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

import gum_optax
from gum_optax.trainers import maxtext

from counting import BATCH, GUM, LENGTH, VOCABULARY, arguments, report

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
    "adam_weight_decay": 0.0,
    "warmup_steps_fraction": 0.0,
    # The length of the schedule must not change when a run is resumed.
    "learning_rate_schedule_steps": 100,
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "enable_goodput_recording": False,
}


def main() -> None:
    asked = arguments(__doc__)
    maxtext.install(gum_optax.gum, **GUM)
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
    state = train.train_loop(config, recorder)  # train.main(argv) does the same, and returns nothing
    report(state["optimizer"]["opt_state"])


if __name__ == "__main__":
    main()
