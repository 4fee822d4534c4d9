"""Which leaves of a model are matrices: the library's policy, and the user's word over it."""

import functools
from typing import Any, Protocol, runtime_checkable

import jax

from .dimension_numbers import (
    Entry,
    WeightDimensionNumbers,
    dimension_numbers,
    is_patterns,
    leaf_names,
    matching,
)
from .rules.leaves import Reading
from .rules.policy import readings


class RoutingWarning(UserWarning):
    """A leaf may be another matrix than it is taken for, or a pattern of paths matches nothing."""


@runtime_checkable
class GivesReadings(Protocol):
    """A function from parameters to dimension numbers that knows reasons as well."""

    def readings(self, params: Any) -> list[Reading]:
        """What each leaf is taken for."""
        ...


def hidden_matrices(params: Any, *, routers: bool = True) -> Any:
    """The dimension numbers of the hidden weight matrices of a model, `None` at other leaves.

    The policy, from the strongest evidence to the weakest; the first that has a say decides:

    1. *Vectors*: leaves with fewer than two axes in a block, or a side of 1; norms, biases, scales and
       sinks by name, in stacks as well; tokens, latents and positions by name.
    2. *Factors of LoRA* are matrices, both of a pair alike: `a` from all axes of the input to the rank, `b`
       from the rank to all axes of the output.
    3. *Tables and heads*: an axis named after the vocabulary; the leaf, or the module that holds it, named
       after an embedding or a head; the one matrix with the shape of the embedding; the last `Dense` of a
       compact Linen model. A network called `embedder` or `head` holds matrices besides.
    4. *Names of axes* (`nnx.Variable`, Linen's boxes, `haliax.NamedArray`) say which axis is layers, experts,
       heads; the kind of an Equinox or Haliax layer says which axes are its input's.
    5. *Convolutions* by name or by a square window: `(window · in, out)`; depthwise ones are vectors.
    6. *Attention with heads on an axis of their own*: by the bias, which has the axes of the output; by the
       other side of the attention; by an axis that all kernels nearby share, which is a stack's; by name and
       sizes.
    7. *Everything else*: the last two axes; axes before them are a stack of blocks.

    Where two readings are as plausible, `init` warns with a `RoutingWarning`; `gum_optax.describe` shows the
    reason for every leaf.

    Args:
      params: a tree of arrays or `jax.ShapeDtypeStruct`s: a Linen parameter dict, an NNX state, an Equinox
        module, or any other tree whose paths carry names.
      routers: whether the routers of a mixture of experts are matrices. They multiply activations as any
        linear layer does, and MaxText's own dimension numbers for Muon include them.
        `weight_dimension_numbers=functools.partial(hidden_matrices, routers=False)` gives them to `others`.

    Returns:
      A tree of the same structure with `optax.contrib.MuonDimensionNumbers` or `None` at the leaves. Override
      an entry and pass the tree as `weight_dimension_numbers` where a model differs, or a mapping from
      patterns: `{"*/kernel_of_layers": MuonDimensionNumbers(0, -1), "*/gate/*": None}`.
    """
    return jax.tree.structure(params).unflatten(
        [reading.entry for reading in policy(params, routers=routers)]
    )


def policy(params: Any, *, routers: bool = True) -> list[Reading]:
    """The readings of `hidden_matrices`."""
    found = readings(params)
    if routers:
        return found
    return [x._replace(entry=None, reason="a router") if x.kind == "router" else x for x in found]


def decided(spec: WeightDimensionNumbers, tree: Any) -> list[Reading]:
    """What each leaf is taken for by an optimizer's `weight_dimension_numbers`, with the reason."""
    if spec is None or spec is hidden_matrices:
        return policy(tree)
    if isinstance(spec, functools.partial) and spec.func is hidden_matrices:
        return policy(tree, **spec.keywords)
    if isinstance(spec, GivesReadings):
        return spec.readings(tree)
    if isinstance(spec, dict) and is_patterns(spec, tree):
        found = [matching(spec, "/".join(names)) for names in leaf_names(tree)]
        defaults = policy(tree)
        return [
            x if at is None else _users(spec[at], f"your pattern {at!r}")
            for at, x in zip(found, defaults, strict=True)
        ]
    return [_users(entry, "your dimension numbers") for entry in dimension_numbers(spec, tree)]


def _users(entry: Entry, reason: str) -> Reading:
    return Reading(entry, "other" if entry is None else "matrix", reason)
