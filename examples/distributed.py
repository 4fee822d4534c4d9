"""Pretrain a LLaMA with GUM on many devices and hosts, and continue after a preemption.

    python examples/distributed.py --out runs/mesh                      # all devices of one host
    python examples/distributed.py --out gs://bucket/run --distributed  # on every host of a TPU slice

There are three ways to share the work, all with the same loss. `--parallel fsdp` splits every matrix and its
state over all devices. `data` keeps them whole on each device. `projected` keeps them whole, too, but sends
and accumulates projected gradients (`--microbatches`). With `--layerwise`, `fsdp` and `data` take the step of
one layer after the other, and never hold the gradients of all. The same command continues from the newest
checkpoint, on any number of devices.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gum_optax as go

from corpus import Corpus
from layered import Layered
from llama import SIZES, Llama
from losses import following, next_token_loss
from options import positive, rate, seed
from training import RunError, StopSignal, check_settings

PARALLEL = ("fsdp", "data", "projected")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parallel", choices=PARALLEL, default="fsdp")
    p.add_argument("--model", choices=SIZES, default="3m")
    p.add_argument("--steps", type=positive, default=200)
    p.add_argument(
        "--batch", type=positive, default=16, help="windows in a step, on all devices (default: 16)"
    )
    p.add_argument(
        "--microbatches",
        type=positive,
        default=1,
        help="microbatches in a step, with --parallel projected or --layerwise (default: 1)",
    )
    p.add_argument(
        "--layerwise",
        action="store_true",
        help="step one layer after the other, with --parallel fsdp or data",
    )
    p.add_argument("--seq", type=positive, default=128, help="tokens in a window (default: 128)")
    p.add_argument("--lr", type=rate, default=3e-3, help="learning rate of the matrices (default: 3e-3)")
    p.add_argument(
        "--others-lr",
        type=rate,
        default=3e-2,
        help="AdamW's learning rate, for the other leaves (default: 3e-2)",
    )
    p.add_argument("--period", type=positive, default=100, help="steps between new subspaces (default: 100)")
    p.add_argument(
        "--save-every", type=positive, default=100, help="steps between checkpoints (default: 100)"
    )
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--text", type=Path, help="your own text, UTF-8 (default: chitchat-dataset)")
    p.add_argument("--out", required=True, help="for checkpoints: a folder that all hosts see, or gs://...")
    p.add_argument("--distributed", action="store_true", help="several processes, one on each host")
    by_hand = p.add_argument_group("for clusters that JAX does not detect; it detects TPU, SLURM and GKE")
    by_hand.add_argument("--coordinator", help="host:port of the first process")
    by_hand.add_argument("--processes", type=positive)
    by_hand.add_argument("--process", type=int, help="the number of this process")
    return p


def shardings_of(params: Any, mesh: Mesh, parallel: str) -> Any:
    """For FSDP, the longer side of each matrix over all devices if they divide it; otherwise no side."""

    def of(x):
        longer = max(range(x.ndim), key=lambda axis: (x.shape[axis], axis), default=0)
        if parallel != "fsdp" or x.ndim < 2 or x.shape[longer] % mesh.size:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*("data" if axis == longer else None for axis in range(x.ndim))))

    return jax.tree.map(of, params)


def optimizer(options: argparse.Namespace, shardings: Any) -> optax.GradientTransformation:
    """GUM with the matrices' shardings, and AdamW for embedding, head and norms.

    Gradients are not clipped: a projected gradient has no global norm, and neither rule depends on its scale.
    """

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(0, peak, options.steps // 10, options.steps, peak / 10)

    return go.gum(
        schedule(options.lr),
        rank=SIZES[options.model].rank,
        period=options.period,
        key=options.seed,
        weight_decay=0.1,
        others=optax.adamw(schedule(options.others_lr), b2=0.95, weight_decay=0.1),
        # With the shardings, FSDP exchanges one small Gram matrix for each full-rank block.
        orthogonalizer=functools.partial(go.gram_newton_schulz, restart=5),
        weight_dimension_numbers=go.with_shardings(shardings),
    )


class Run:
    """A model and its optimizer on a mesh, and the compiled step; `start` makes the arrays."""

    def __init__(self, options: argparse.Namespace, mesh: Mesh):
        self.options, self.mesh = options, mesh
        # The matrix units of accelerators want bfloat16; a CPU has no such units.
        dtype = jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
        make = functools.partial(Llama, SIZES[options.model], dtype=dtype)
        model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        self.graph, _ = nnx.split(model, nnx.Param)
        self.layered = Layered(model)
        divide = self.layered.divide if options.layerwise else lambda params: params
        self.weights = lambda: divide(nnx.split(make(rngs=nnx.Rngs(options.seed)), nnx.Param)[1])
        shapes = jax.eval_shape(self.weights)
        shardings = shardings_of(shapes, mesh, options.parallel)
        self.tx = optimizer(options, shardings)
        self.shapes = shapes, jax.eval_shape(self.tx.init, shapes)
        self.shardings = shardings, go.state_shardings(self.tx, shapes, shardings)
        self.split, whole = NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P())
        kind = "layerwise" if options.layerwise else options.parallel
        steps = {"layerwise": self.layerwise_step, "projected": self.projected_step}
        self.step = jax.jit(
            steps.get(kind, self.plain_step),
            donate_argnums=0,
            in_shardings=(self.shardings, self.split),
            out_shardings=(self.shardings, whole),
        )

    def start(self) -> Any:
        """Parameters and optimizer state, sharded from the start."""
        params, state = self.shardings
        weights = jax.jit(self.weights, out_shardings=params)()
        found = weights, jax.jit(self.tx.init, out_shardings=state)(weights)
        # No other check notices a seed that differs between hosts.
        go.check_processes_agree(found)
        return found

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        return next_token_loss(self.graph, params, tokens)

    def plain_step(self, state: Any, batches: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        loss, gradients = jax.value_and_grad(self.loss)(params, batches[0])
        updates, opt_state = self.tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def layerwise_step(self, state: Any, batches: jax.Array) -> tuple[Any, jax.Array]:
        """The same step, one layer after the other."""
        params, opt_state = state
        count, own = self.options.microbatches, self.layered
        tokens = batches if count > 1 else batches[0]
        loss, params, opt_state = go.layerwise_update(
            self.tx, own.embed, own.layer, own.head, following(tokens), opt_state, params, microbatches=count
        )
        return (params, opt_state), loss

    def projected_step(self, state: Any, batches: jax.Array) -> tuple[Any, jax.Array]:
        """The same step from gradients that are projected before the devices average them."""

        def on_each(state, batches):
            params, opt_state = state
            loss, updates, opt_state = go.projected_update(
                self.tx, self.loss, batches, opt_state, params, axes="data"
            )
            return (optax.apply_updates(params, updates), opt_state), loss

        specs = P(), P(None, "data")
        return jax.shard_map(on_each, mesh=self.mesh, in_specs=specs, out_specs=P())(state, batches)

    def batches(self, corpus: Corpus, step: int) -> jax.Array:
        """The `(microbatches, windows, tokens)` of a step; each host keeps what its devices read."""
        o = self.options
        tokens = corpus.batch(step, batch=o.batch, length=o.seq, seed=o.seed)
        batches = tokens.reshape(o.microbatches, -1, tokens.shape[-1])
        return jax.make_array_from_callback(batches.shape, self.split, lambda index: batches[index])


# The settings that a resumed run must share. Devices, hosts and ways to share the work may change.
SETTINGS = ("model", "steps", "batch", "seq", "lr", "others_lr", "period", "seed")


def settings_of(options: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    found = {name: getattr(options, name) for name in SETTINGS} | {"text": corpus.name}
    # Such a run has its parameters in another tree; checkpoints made before the option existed have none.
    return found | {"layerwise": options.layerwise or None}


def restored(
    run: Run, state: Any, settings: dict[str, Any], checkpoints: ocp.CheckpointManager, step: int
) -> Any:
    """The state of a checkpoint; raises if the checkpoint belongs to another run."""
    found = checkpoints.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))["settings"]
    check_settings(run.options.out, found, settings)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    state = checkpoints.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
    go.check_processes_agree(state)
    return state


def train(
    run: Run, state: Any, corpus: Corpus, checkpoints: ocp.CheckpointManager, stop: StopSignal | None
) -> Iterator[tuple[int, float]]:
    """Train from the newest checkpoint to the last step or a preemption; yields number and loss of a step."""
    settings = settings_of(run.options, corpus)
    step = checkpoints.latest_step() or 0
    if step:
        state = restored(run, state, settings, checkpoints, step)
    going = True
    while going and step < run.options.steps:
        state, loss = run.step(state, run.batches(corpus, step))
        step += 1
        # Saves at intervals, at the last step, and before a preemption. JAX tells all processes of a
        # preemption; a single process gets the signal itself.
        going = not (checkpoints.reached_preemption(step) or (stop is not None and stop.came))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings))
        checkpoints.save(step, args=args, force=step == run.options.steps or not going)
        yield step, float(loss)
    checkpoints.wait_until_finished()


def check(options: argparse.Namespace) -> None:
    """Refuse numbers that do not fit each other or the devices, and a file as --out."""
    windows = jax.device_count() * options.microbatches
    if options.batch % windows:
        raise RunError(
            f"--batch {options.batch} must be a multiple of {windows}: {jax.device_count()} devices with"
            f" {options.microbatches} microbatches each."
        )
    if options.layerwise and options.parallel == "projected":
        raise RunError("--layerwise is for --parallel fsdp or data, not projected.")
    if options.microbatches > 1 and options.parallel != "projected" and not options.layerwise:
        raise RunError(f"--microbatches is for --parallel projected or --layerwise, not {options.parallel}.")
    if "://" not in options.out and Path(options.out).exists() and not Path(options.out).is_dir():
        raise RunError(f"{options.out} is a file; give a new directory as --out.")


def note(line: str) -> None:
    """Print on one host only."""
    if jax.process_index() == 0:
        print(line, flush=True)


def run_all(options: argparse.Namespace) -> None:
    check(options)
    corpus = Corpus(options.text, SIZES[options.model].vocabulary)
    corpus.require(options.seq, options.batch)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    run = Run(options, mesh)
    state = run.start()
    held = sum(x.nbytes for x in jax.tree.leaves(state)) / 2**20
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)) / 2**20
    note(f"{jax.device_count()} devices, {options.parallel}: {held:.1f} MiB in all, {here:.1f} on each")
    every = ocp.CheckpointManagerOptions(save_interval_steps=options.save_every, max_to_keep=2)
    where = options.out if "://" in options.out else Path(options.out).absolute()
    stop = None if options.distributed else StopSignal()
    with ocp.CheckpointManager(where, options=every) as checkpoints:
        for step, loss in train(run, state, corpus, checkpoints, stop):
            note(json.dumps({"step": step, "loss": loss}))


def main(argv: list[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    by_hand = (options.coordinator, options.processes, options.process)
    if options.distributed:
        jax.distributed.initialize(*by_hand)
    elif by_hand != (None,) * 3:
        p.error("--coordinator, --processes and --process are for --distributed; add it")
    try:
        run_all(options)
    except ValueError as error:  # RunError and CorpusError are ValueErrors
        print(f"distributed.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
