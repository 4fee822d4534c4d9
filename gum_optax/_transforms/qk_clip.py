"""MuonClip's QK-clip: query and key kernels that grow too large are scaled down, head by head."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._core.checks import check_integer, check_number
from .._matrices.dimension_numbers import leaf_names

Names = tuple[str, ...]


def qk_clip(
    threshold: Any = 100.0, *, query: str = "query", key: str = "key", head_axis: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Scale down the query and key kernels of each head whose attention logits exceed a threshold.

        γ = min(1, τ / S)        S: the head's largest logit `q·k / √d` of this step
        W_q ← √γ (W_q + U_q),   W_k ← √γ (W_k + U_k)
        W_q ←  γ (W_q + U_q)                              where heads share keys, which stay

    So the head's logits shrink by `γ`. It is the last part of a chain, whatever the optimizer is.

    The model reports the logits: `max_logits` has an array `(*layers, heads)` at the path of each attention
    module, or below it. In Flax NNX, a module sows them as `nnx.Intermediate`, and `docs/muon.md` shows the
    training step. With microbatches or several devices, pass the maximum over all of them. A logit that is
    not finite clips nothing.

    Args:
      threshold: `τ`; 100 as in the paper.
      query, key: the names of the two submodules of an attention module. All leaves below them are scaled,
        biases too. Other names serve the two halves of multi-head latent attention, in two parts of a chain.
      head_axis: the axis of the kernels that counts heads, or heads times their width, after the axes of
        `layers`: 1 for Flax's `(embed, heads · d)` and `(embed, heads, d)`, 0 for Equinox's
        `(heads · d, embed)`.

    Returns:
      A stateless transformation over the parameters of a model. Its update needs the parameters and the extra
      argument `max_logits`.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type; at the update, parameters or
        logits are missing, or do not fit.

    Examples:
      >>> tx = optax.chain(optax.sgd(0.1), gum_optax.qk_clip(threshold=100.0))
      >>> params = {"attention": {"query": jnp.ones((4, 4)), "key": jnp.ones((4, 4))}}  # 2 heads of width 2
      >>> gradients, max_logits = optax.tree.zeros_like(params), {"attention": jnp.array([50.0, 400.0])}
      >>> updates, state = tx.update(gradients, tx.init(params), params, max_logits=max_logits)
      >>> optax.apply_updates(params, updates)["attention"]["query"][0].tolist()
      [1.0, 1.0, 0.5, 0.5]

    References:
      Kimi Team, Kimi K2, arXiv 2507.20534, Algorithm 1.
    """
    threshold = check_number("threshold", threshold, at_least=0)
    check_integer("head_axis", head_axis, at_least=0)

    def update(updates, state, params=None, *, max_logits=None, **extra_args):
        del extra_args
        if params is None or max_logits is None:
            raise ValueError(
                "qk_clip needs the parameters and the largest attention logits of this step: call"
                " update(gradients, state, params, max_logits=...)."
            )
        reported = dict(zip(leaf_names(max_logits), jax.tree.leaves(max_logits), strict=True))
        steps, treedef = jax.tree.flatten(updates)
        weights = treedef.flatten_up_to(params)
        for module, sides in _attention_modules(leaf_names(updates), query, key).items():
            logits = _logits_of(module, reported)
            queries, keys = (_head_axes(module, weights, side, logits, head_axis) for side in sides)
            gamma = jnp.where(jnp.isfinite(logits) & (logits > threshold), threshold / logits, 1.0)
            shared = _are_shared(module, weights, queries, keys, logits)
            for leaf_index, axis in (queries if shared else queries | keys).items():
                factor = gamma if shared else jnp.sqrt(gamma)
                steps[leaf_index] = _scaled(steps[leaf_index], weights[leaf_index], factor, axis)
        return treedef.unflatten(steps), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _attention_modules(names: list[Names], query: str, key: str) -> dict[Names, tuple[list[int], list[int]]]:
    """The leaves of query and key, by the path of the module that has both."""
    found: dict[Names, dict[str, list[int]]] = {}
    for leaf_index, path in enumerate(names):
        for depth, name in enumerate(path):
            if name in (query, key):
                found.setdefault(path[:depth], {}).setdefault(name, []).append(leaf_index)
    modules = {path: (of[query], of[key]) for path, of in found.items() if query in of and key in of}
    if not modules:
        raise ValueError(f"qk_clip finds no module with {query!r} and {key!r} in it; give their names.")
    return modules


def _where(module: Names) -> str:
    return "/".join(module) or "(the whole model)"


def _logits_of(module: Names, reported: dict[Names, Any]) -> Float[Array, "*layers heads"]:
    """The logits that a module reports, at its own path or below it."""
    own = [jnp.asarray(x, jnp.float32) for path, x in reported.items() if path[: len(module)] == module]
    if len(own) != 1 or own[0].ndim == 0:
        raise ValueError(
            f"max_logits must have one array (*layers, heads) at {_where(module)} or below it, but has"
            f" {[x.shape for x in own]}; it has entries at {sorted(map('/'.join, reported))}."
        )
    return own[0]


def _head_axes(
    module: Names, weights: list[Any], side: list[int], logits: Array, head_axis: int
) -> dict[int, int]:
    """The axis of each leaf of query or key that counts heads."""
    layers = logits.shape[:-1]
    ndim = max(weights[leaf_index].ndim for leaf_index in side)
    axes = {}
    for leaf_index in side:
        w = weights[leaf_index]
        # A bias has the kernel's axes but that of its inputs.
        axes[leaf_index] = len(layers) + (head_axis if w.ndim == ndim else 0)
        if w.shape[: len(layers)] != layers or axes[leaf_index] >= w.ndim:
            raise ValueError(
                f"max_logits at {_where(module)} has shape {logits.shape}, (*layers, heads), and head_axis is"
                f" {head_axis}: a kernel of shape {w.shape} does not fit."
            )
    return axes


def _are_shared(
    module: Names, weights: list[Any], queries: dict[int, int], keys: dict[int, int], logits: Array
) -> bool:
    """Whether several heads of queries share a head of keys."""
    heads = logits.shape[-1]
    sizes = [
        {weights[leaf_index].shape[axis] for leaf_index, axis in side.items()} for side in (queries, keys)
    ]
    (size, *more), (key_size, *more_keys) = map(sorted, sizes)
    width = size // heads
    if more or more_keys or size % heads or key_size % width or heads % (key_size // width):
        raise ValueError(
            f"max_logits at {_where(module)} has {heads} heads. Leaves of the query have {sorted(sizes[0])}"
            f" numbers along head_axis and leaves of the key {sorted(sizes[1])}, which heads of one width do"
            " not make."
        )
    return key_size < size


def _scaled(u: Array, w: Array, factor: Float[Array, "*layers heads"], axis: int) -> Array:
    """The step to `factor · (w + u)`, head by head; `u` to the bit where the factor is one."""
    *layers, heads = factor.shape
    size = w.shape[axis]
    of_numbers = jnp.repeat(factor, size // heads, axis=-1)
    around = (1,) * (axis - len(layers)), (1,) * (w.ndim - axis - 1)
    f = of_numbers.reshape(*layers, *around[0], size, *around[1])
    step = u.astype(jnp.float32)
    return (step + (f - 1) * (w.astype(jnp.float32) + step)).astype(u.dtype)
