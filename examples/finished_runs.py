"""Reads finished runs of `training.py`: settings, metrics, weights, and the activations that they make.

Only parameters are read from a checkpoint, so that a run of any optimizer can be read, also of one that is
not known here. Nothing is written into a run's directory.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import gum_optax

from corpus import Corpus
from llama import SIZES, Llama
from measures import excess_kurtosis, max_over_rms
from training import VALIDATION_BATCHES, RunError, records_of

Weights = dict[str, np.ndarray]  # by the name of the leaf, "layers/0/query/kernel"

# A run in bfloat16 on an accelerator and its weights in float32 here have losses this close, in nats.
SAME_LOSS = 0.01
NEEDED = ("optimizer", "model", "steps", "batch", "seq", "lr", "rank", "period", "seed", "text")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """The settings and the metrics of a run that has reached its last step."""

    path: Path
    settings: dict[str, Any]
    records: list[dict[str, Any]]  # one for each step

    @property
    def val_loss(self) -> float:
        return self.records[-1]["val_loss"]

    def column(self, name: str) -> np.ndarray:
        """A metric at all steps."""
        return np.array([record[name] for record in self.records])


def read_run(path: Path) -> FinishedRun:
    """Read the settings and metrics of a run.

    Raises:
      RunError: the directory is no run, or the run is damaged or not finished.
    """
    files = path / "settings.json", path / "metrics.jsonl"
    if not all(file.is_file() for file in files):
        raise RunError(f"{path} is no run: it needs settings.json and metrics.jsonl, as pretrain.py writes.")
    try:
        settings = json.loads(files[0].read_text())
        records = records_of(files[1])
        missing = [name for name in NEEDED if name not in settings]
        steps = [record["step"] for record in records]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"The settings or the metrics in {path} are damaged.") from None
    if missing:
        raise RunError(f"{path} is no run of pretrain.py: its settings lack {', '.join(missing)}.")
    if settings["model"] not in SIZES:
        raise RunError(f"{path} is a run of the model {settings['model']!r}, which is not known here.")
    if not steps or steps[-1] < settings["steps"]:
        done = steps[-1] if steps else 0
        raise RunError(f"{path} is not finished: it is at step {done} of {settings['steps']}.")
    if steps != list(range(1, len(steps) + 1)) or "val_loss" not in records[-1]:
        raise RunError(f"The metrics in {path} are damaged: they lack steps, or the last validation loss.")
    if not math.isfinite(loss := records[-1]["val_loss"]):
        raise RunError(f"{path} diverged: its last validation loss is {loss}.")
    return FinishedRun(path, settings, records)


def _name(path: Any) -> str:
    """The name of a leaf, without the parts that say how a tree holds it."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value").removeprefix("head/")  # layer by layer, `head` holds norm and head


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters by their names, in order."""
    return {_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def read_weights(run: FinishedRun) -> Weights:
    """The parameters in the last checkpoint, in float32.

    Raises:
      RunError: there is no such checkpoint, or it can't be read.
    """
    step = run.settings["steps"]
    folder = run.path.absolute() / "checkpoints" / str(step)
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "sum": ocp.JsonCheckpointHandler()}
    if not folder.is_dir():
        raise RunError(f"{run.path} has no checkpoint of its last step, {step}.")
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as saved:
            params, opt_state = saved.metadata(folder).item_metadata["state"].tree
            # Orbax leaves out what stands as a placeholder.
            item = [params, jax.tree.map(lambda _: ocp.PLACEHOLDER, opt_state)]
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy)
            params, _ = saved.restore(folder, args=ocp.args.Composite(state=args))["state"]
    except Exception as error:  # the type depends on which file is damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"The checkpoint of step {step} in {run.path} can't be read: {reason}") from None
    return {name: np.asarray(x, np.float32) for name, x in named(params).items()}


@functools.cache
def start_of(model: str, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """A model in float32, and the parameters that a run of this seed starts from."""
    return nnx.split(Llama(SIZES[model], dtype=jnp.float32, rngs=nnx.Rngs(seed)), nnx.Param)


def blocks_by_group(params: Any) -> dict[str, list[str]]:
    """The names of the blocks of each group that GUM draws from, in the order in which it counts them.

    A group holds all hidden matrices of one shape, the shorter side first, in the order of the leaves. Every
    matrix of the example model is a leaf of its own.
    """
    entries = gum_optax.hidden_matrices(params)
    is_matrix = jax.tree.map(lambda _, entry: entry is not None, params, entries)
    groups: dict[str, list[str]] = {}
    for (name, x), matrix in zip(named(params).items(), jax.tree.leaves(is_matrix), strict=True):
        if matrix:
            groups.setdefault("x".join(map(str, sorted(x.shape))), []).append(name)
    return groups


def _watch(model: Llama, found: dict[str, Any]) -> None:
    """Put a function before each linear layer that measures its input.

    This is what Flax calls model surgery: a function takes the place of a submodule.
    """

    def watched(name: str, linear: nnx.Linear) -> Callable[[jax.Array], jax.Array]:
        def call(x):
            wide = x.astype(jnp.float32)
            found[name] = {"kurtosis": excess_kurtosis(wide), "max_over_rms": max_over_rms(wide)}
            return linear(x)

        return call

    linears = [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, nnx.Linear)]
    modules = dict(nnx.iter_modules(model))
    for path, linear in linears:
        setattr(modules[path[:-1]], str(path[-1]), watched("/".join(map(str, path)), linear))


class Validation:
    """Runs weights of one model on the validation text of their run."""

    def __init__(self, model: str, corpus: Corpus, batch: int, seq: int):
        self.corpus, self.batch, self.seq = corpus, batch, seq
        self.tokens = corpus.validation_batches(batch=batch, length=seq, most=VALIDATION_BATCHES)
        self.graph, self.like = start_of(model, 0)
        self.measure_batch = jax.jit(self._measured)

    def _measured(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        model, found = nnx.merge(self.graph, params), {}
        _watch(model, found)
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), found

    def starts_from(self, run: FinishedRun, start: nnx.State) -> bool:
        """Whether these parameters have the loss of the run's first step."""
        s = run.settings
        tokens = self.corpus.batch(0, batch=self.batch, length=self.seq, seed=s["seed"])
        loss, _ = self.measure_batch(start, tokens)
        return abs(float(loss) - run.records[0]["train_loss"]) < SAME_LOSS / 10

    def activations(self, run: FinishedRun, weights: Weights) -> dict[str, dict[str, float]]:
        """Measures of the input of each linear layer, each the mean over the batches.

        Raises:
          RunError: the weights do not have the validation loss that the run ended with.
        """
        leaves = named(self.like)
        if {name: x.shape for name, x in weights.items()} != {name: x.shape for name, x in leaves.items()}:
            raise RunError(f"The weights in {run.path} are not those of the model {run.settings['model']}.")
        params = jax.tree.structure(self.like).unflatten([weights[name] for name in leaves])
        rows = jax.device_get([self.measure_batch(params, tokens) for tokens in self.tokens])
        loss, found = jax.tree.map(lambda *xs: float(np.mean(xs)), *rows)
        if not abs(loss - run.val_loss) < SAME_LOSS:
            raise RunError(
                f"The weights in {run.path} give the validation loss {loss:.4f}, but the run ended with"
                f" {run.val_loss:.4f}: the checkpoint is damaged, or the model is not the same any more."
            )
        return found
