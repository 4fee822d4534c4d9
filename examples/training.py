"""One training run: a model, an optimizer, a compiled step, and a directory that it can resume from."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

import gum_optax

from corpus import replace_file
from layered import Layered
from llama import SIZES, Llama
from losses import Batch, following, model_loss
from optimizers import OPTIMIZERS, OTHERS, Settings, completed, optimizer

VALIDATION_BATCHES = 32


class RunError(ValueError):
    """The run can't start; the message is one sentence for the user."""


class Trainer:
    """The compiled step of one run and the state it moves."""

    apply_updates = staticmethod(gum_optax.apply_updates)
    makers = OPTIMIZERS
    others_makers = OTHERS

    def __init__(self, settings: Settings, corpus: Any):
        """`corpus` is what `batch` and `validation_batches` draw from, here a `Corpus`."""
        self.settings, self.corpus = settings, corpus
        # The matrix units of accelerators want bfloat16; a CPU has no such units.
        model = self.make_model(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        self.graph, params, self.frozen = nnx.split(model, self.trained(model), ...)
        params = jax.tree.map(lambda x: x.astype(settings.weights_dtype), params)
        self.layered = Layered(model) if settings.layerwise else None
        if self.layered is not None:
            params = self.layered.divide(params)
        self.tx = optimizer(settings, self.makers, self.others_makers)
        self.state = (params, jax.jit(self.tx.init)(params))
        self.step = 0
        self.seconds = 0.0
        step = jax.jit(self._step, donate_argnums=0)
        self.compiled = step.lower(self.state, self.frozen, self.batch(0), 0).compile()
        self.evaluate_batch = jax.jit(self._loss)
        self.validation = self.validation_batches()

    def make_model(self, dtype: Any) -> Llama:
        """The model before the first step, which computes in `dtype`."""
        return Llama(SIZES[self.settings.model], dtype=dtype, rngs=nnx.Rngs(self.settings.seed))

    def trained(self, model: Llama) -> Any:
        """The filter of the parameters that are trained; the others are frozen."""
        del model
        return nnx.Param

    def batch(self, step: int) -> Batch:
        s = self.settings
        return following(self.corpus.batch(step, batch=s.batch, length=s.seq, seed=s.seed))

    def validation_batches(self) -> list[Batch]:
        s = self.settings
        found = self.corpus.validation_batches(batch=s.batch, length=s.seq, most=VALIDATION_BATCHES)
        return [following(tokens) for tokens in found]

    def _whole(self, params: Any) -> Any:
        """The parameters as the model has them."""
        return params if self.layered is None else self.layered.whole(params)

    def model(self, params: Any, frozen: Any) -> Llama:
        return nnx.merge(self.graph, self._whole(params), frozen)

    def _loss(self, params: Any, frozen: Any, batch: Batch) -> jax.Array:
        return model_loss(self.model(params, frozen), batch)

    def _step(
        self, state: Any, frozen: Any, batch: Batch, step: Any
    ) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
        params, opt_state = state
        # Weights in bfloat16 are rounded stochastically, by bits of this step.
        apply = functools.partial(self.apply_updates, key=self.settings.seed, step=step)
        if (own := self.layered) is not None:
            # Each layer is clipped by its own norm: nobody holds all gradients.
            loss, params, opt_state = gum_optax.layerwise_update(
                self.tx,
                own.embed,
                functools.partial(own.layer, positions=batch.positions, mask=batch.mask()),
                own.head,
                batch,
                opt_state,
                params,
                tied=own.tied,
                per_layer=True,
                apply=apply,
            )
        else:
            loss, gradients = jax.value_and_grad(self._loss)(params, frozen, batch)
            updates, opt_state = self.tx.update(gradients, opt_state, params)
            params = apply(params, updates)
        return (params, opt_state), loss, gum_optax.metrics(opt_state)

    def train_step(self) -> dict[str, Any]:
        """Take one step and return its record, as plain numbers."""
        s = self.settings
        batch = self.batch(self.step)
        start = time.perf_counter()
        state, loss, metrics = self.compiled(self.state, self.frozen, batch, self.step)
        loss, metrics = jax.device_get((loss, metrics))
        # The step is done only now: a failure while waiting must leave state and step number in agreement.
        self.state, self.step = state, self.step + 1
        self.seconds += time.perf_counter() - start
        record = {"step": self.step, "train_loss": float(loss), "tokens": self.step * s.batch * s.seq}
        return record | {"seconds": self.seconds} | {name: x.item() for name, x in metrics.items()}

    def validation_loss(self, batches: list[Batch] | None = None) -> float:
        batches = self.validation if batches is None else batches
        losses = [self.evaluate_batch(self.state[0], self.frozen, batch) for batch in batches]
        return float(np.mean(jax.device_get(losses)))

    def optimizer_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.state[1]))

    def peak_bytes(self) -> int | None:
        """Bytes that the compiled step holds: arguments, results that are not donated, temporaries."""
        m = self.compiled.memory_analysis()
        if m is None:
            return None
        new = m.output_size_in_bytes - m.alias_size_in_bytes
        return m.argument_size_in_bytes + new + m.temp_size_in_bytes

    def sample(self, prompt: str, tokens: int = 80, temperature: float = 0.8) -> str:
        """Continue `prompt`, in one fixed window, so that JAX compiles once."""
        ids = self.corpus.tokenizer.encode(prompt).ids
        length = len(ids) + tokens
        window = np.zeros((1, length), np.int32)
        window[0, : len(ids)] = ids
        draw = jax.jit(
            lambda params, window, at, key: jax.random.categorical(
                key, self.model(params, self.frozen)(window)[0, at - 1] / temperature
            )
        )
        for at in range(len(ids), length):
            key = jax.random.fold_in(jax.random.key(self.settings.seed), at)
            window[0, at] = draw(self.state[0], window, at, key)
        return self.corpus.tokenizer.decode(window[0].tolist())


def checksum(state: Any) -> dict[str, int]:
    """A checksum of a state. Orbax restores a file with a flipped bit without an error."""
    found = 0
    for x in jax.device_get(jax.tree.leaves(state)):
        found = zlib.crc32(x.tobytes(), found)
    return {"crc32": found}


def check_settings(where: Any, held: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to continue a run of other settings; the message reports each difference."""
    different = [f"{k}={held.get(k)!r} (asked {v!r})" for k, v in asked.items() if held.get(k) != v]
    if different:
        raise RunError(
            f"{where} holds another run, with {', '.join(different)}; repeat its options to go on with"
            " it, or give a new --out."
        )


def records_of(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a `metrics.jsonl`; a crash may cut the last line short."""
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class RunDirectory:
    """`settings.json`, `metrics.jsonl` and `checkpoints/` of one run."""

    def __init__(self, path: Path, settings: Settings, *, resume: bool):
        self.path = path.absolute()
        self.settings_file = self.path / "settings.json"
        self.metrics_file = self.path / "metrics.jsonl"
        try:
            self._claim(settings, resume)
        except OSError as error:
            raise RunError(f"{self.path} can't be used: {error.strerror}; give another --out.") from None

    def open(self) -> None:
        """Open the checkpoints. Before this call, the folder holds nothing but the settings."""
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.checkpoints = ocp.CheckpointManager(self.path / "checkpoints", options=options)

    def _claim(self, settings: Settings, resume: bool) -> None:
        asked = dataclasses.asdict(settings)
        if not self.settings_file.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise RunError(f"{self.path} holds other files; give a new directory as --out.")
            replace_file(self.settings_file, lambda part: part.write_text(json.dumps(asked, indent=1)))
            return
        try:
            held = json.loads(self.settings_file.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise RunError(f"{self.settings_file} is damaged; give a new directory as --out.") from None
        check_settings(self.path, completed(type(settings), held), asked)
        if not resume:
            raise RunError(f"{self.path} holds this run already; add --resume to go on, or give a new --out.")

    def restore(self, trainer: Trainer) -> None:
        """Restore the newest readable checkpoint into the trainer, and drop later metrics."""
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, trainer.state)
        for step in sorted(self.checkpoints.all_steps(), reverse=True):
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(like), sum=ocp.args.JsonRestore())
                found = self.checkpoints.restore(step, args=args)
                if found["sum"] != checksum(found["state"]):
                    raise ValueError("its numbers are not those that were saved")
                trainer.state, trainer.step = found["state"], step
                break
            except Exception as error:  # the type depends on which file is damaged
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                print(f"The checkpoint of step {step} can't be read, trying an older one: {reason}")
                self.checkpoints.delete(step)
        kept = [r for r in self.records() if r["step"] <= trainer.step]
        trainer.seconds = kept[-1]["seconds"] if kept else 0.0
        self.metrics_file.write_text("".join(json.dumps(r) + "\n" for r in kept))

    def save(self, trainer: Trainer) -> None:
        if self.checkpoints.latest_step() != trainer.step:
            state, own = ocp.args.StandardSave(trainer.state), ocp.args.JsonSave(checksum(trainer.state))
            self.checkpoints.save(trainer.step, args=ocp.args.Composite(state=state, sum=own))

    def records(self) -> list[dict[str, Any]]:
        """The records of all steps so far."""
        return records_of(self.metrics_file) if self.metrics_file.exists() else []

    def close(self) -> None:
        self.checkpoints.wait_until_finished()
        self.checkpoints.close()


class StopSignal:
    """Records whether Ctrl-C or SIGTERM has come; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.came = True
        message = b"\nstopping after the next step, with a checkpoint; a second Ctrl-C stops at once\n"
        with contextlib.suppress(OSError):
            os.write(2, message)  # a signal may come within a `print`, which cannot run twice at a time
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def train(
    trainer: Trainer, directory: RunDirectory, stop: StopSignal, *, evaluate_every: int, save_every: int
) -> Iterator[dict[str, Any]]:
    """Run to the last step or to a stop signal, yielding each step's record after writing it."""
    s = trainer.settings
    bar = tqdm(total=s.steps, initial=trainer.step, desc=s.optimizer, unit="step", mininterval=0.5)
    rate_from = (trainer.step, trainer.seconds)
    try:
        with directory.metrics_file.open("a") as file, bar:
            while trainer.step < s.steps and not stop.came:
                record = trainer.train_step()
                if trainer.step % evaluate_every == 0 or trainer.step == s.steps:
                    record["val_loss"] = trainer.validation_loss()
                file.write(json.dumps(record) + "\n")
                file.flush()
                rate = (trainer.step - rate_from[0]) * s.batch * s.seq / (trainer.seconds - rate_from[1])
                bar.set_postfix(
                    {"loss": f"{record['train_loss']:.3f}", "tok/s": f"{rate:.0f}"}, refresh=False
                )
                bar.update()
                if trainer.step % save_every == 0:
                    directory.save(trainer)
                yield record
        directory.save(trainer)  # not after an error, when the memory may hold half a step
    finally:
        directory.close()


def train_to_the_end(
    trainer: Trainer, directory: RunDirectory, stop: StopSignal, *, evaluate_every: int, save_every: int
) -> bool:
    """Go on from the newest checkpoint; whether the last step was reached before a stop signal."""
    directory.open()
    directory.restore(trainer)
    for _ in train(trainer, directory, stop, evaluate_every=evaluate_every, save_every=save_every):
        pass
    return trainer.step == trainer.settings.steps
