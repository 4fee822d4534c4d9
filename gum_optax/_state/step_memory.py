"""The memory of a whole training step, from shapes alone.

    peak = W + S + B + max over the phases of what a phase holds beside them

In memory during the whole step, exact by `jax.eval_shape`:

    W    parameters                     S    state of the optimizer                     B    tokens

In memory for a time:

    X    the input of every layer, which the backward pass reads
    A    activations of one layer, computed a second time in its backward pass
    Z    logits of the tokens that the loss takes at once
    G    gradients, in the dtype of the parameters: of all, of one layer, of the embedding, of the head
    T    temporaries of the optimizer's update of these parameters: `update_temporaries.py`
    C    on a CPU, the parameters and the state of one layer: XLA cuts them out of their stacks by a copy

The phases of an ordinary step, each layer rematerialized:

    head         X + Z + G(head)
    backward     X + A + G(all)
    update       G(all) + T(all)

The phases of a step by `layerwise_update`:

    head         X + G(head) + max(Z, T(head))
    layer        X + G(layer) + max(A, T(layer)) + C
    embedding    G(embedding) + T(embedding)

Parameters and state are donated, so that the new ones take no memory of their own. XLA may find a better
order: it may use up the gradient of the head before it makes that of the embedding. Where the head is the
embedding, the gradient from the head stays until that of the embedding is added to it.
"""

from typing import Any, NamedTuple

import jax
import optax

from .update_temporaries import Temporaries


class Activations(NamedTuple):
    """Bytes of what the backward pass needs of the forward pass."""

    inputs: int  # X
    layer: int  # A
    logits: int  # Z


class Update(NamedTuple):
    """An optimizer, and the temporaries of its update."""

    tx: optax.GradientTransformation
    matrices: Temporaries
    others: Temporaries  # of embedding, head and norms, layer by layer


class StepMemory(NamedTuple):
    """Bytes of a training step."""

    held: int  # W + S + B
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """The most that is in memory at once."""
        return self.held + max(self.phases.values())


def ordinary_step(update: Update, params: dict[str, Any], batch: int, needed: Activations) -> StepMemory:
    """The memory of a step that makes all gradients, and then updates.

    Args:
      update: the optimizer.
      params: shapes, with the entries `embed`, `layers`, stacked along the first axis, and `head`. If `head`
        has no `lm_head`, it is the embedding.
      batch: bytes of the tokens.
      needed: the activations.
    """
    gradients = bytes_of(params)
    phases = {
        "head": needed.inputs + needed.logits + bytes_of(params["head"]) + _tied(params),
        "backward": needed.inputs + needed.layer + gradients,
        "update": gradients + update.matrices(jax.tree.leaves(params["layers"])),
    }
    return StepMemory(_held(update.tx, params, batch), phases)


def layerwise_step(
    update: Update, params: dict[str, Any], batch: int, needed: Activations, platform: str
) -> StepMemory:
    """The memory of a step by `layerwise_update`.

    Args:
      update, params, batch, needed: as for `ordinary_step`.
      platform: cpu, gpu or tpu.
    """
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), params["layers"])
    embed, head = (params[name] for name in ("embed", "head"))
    table = _tied(params)
    copied = _held(update.tx, {"layers": layer}, 0) if platform == "cpu" else 0
    of_layer = max(needed.layer, update.matrices(jax.tree.leaves(layer)))
    of_head = max(needed.logits, update.others(jax.tree.leaves(head)))
    phases = {
        "head": needed.inputs + bytes_of(head) + table + of_head,
        "layer": needed.inputs + bytes_of(layer) + table + of_layer + copied,
        "embedding": bytes_of(embed) + table + update.others(jax.tree.leaves(embed)),
    }
    return StepMemory(_held(update.tx, params, batch), phases)


def bytes_of(tree: Any) -> int:
    """The bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _tied(params: dict[str, Any]) -> int:
    """The bytes of the gradient that the head sends to the embedding, if both are one."""
    return 0 if "lm_head" in params["head"] else bytes_of(params["embed"])


def _held(tx: optax.GradientTransformation, params: Any, batch: int) -> int:
    return bytes_of(params) + bytes_of(jax.eval_shape(tx.init, params)) + batch
