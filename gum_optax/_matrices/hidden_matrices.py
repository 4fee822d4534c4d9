"""Which leaves of a model are matrices: the library's policy, which the user can override."""

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
    """A leaf has a second plausible reading, or a pattern of paths decides no leaf.

    Examples:
      >>> import warnings
      >>> tx = gum_optax.muon(1e-3, weight_dimension_numbers={"mlp/*": gum_optax.LAST_TWO})
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     state = tx.init({"up": {"kernel": jnp.ones((4, 8))}})
      >>> caught[0].category.__name__, str(caught[0].message).split(";")[0]
      ('RoutingWarning', "weight_dimension_numbers has patterns that decide no leaf: ['mlp/*']")
    """


@runtime_checkable
class GivesReadings(Protocol):
    """A function from parameters to dimension numbers that also gives reasons."""

    def readings(self, params: Any) -> list[Reading]:
        """The reading of each leaf."""
        ...


def hidden_matrices(params: Any, *, routers: bool = True) -> Any:
    """The dimension numbers of the hidden weight matrices of a model, and `None` for all other leaves.

    The policy goes from the strongest evidence to the weakest, and the first rule that applies decides:

    1. *Vectors*: leaves with fewer than two axes in a block, or a side of 1; norms, biases, scales and
       sinks by name, also in stacks; tokens, latents and positions by name.
    2. *LoRA factors* are matrices, and both factors of a pair have the same role: `a` maps all axes of the
       input to the rank, `b` maps the rank to all axes of the output.
    3. *Tables and heads*: an axis named after the vocabulary; the leaf, or the module that holds it, named
       after an embedding or a head; the one matrix with the shape of the embedding; the last `Dense` of a
       compact Linen model. A network named `embedder` or `head` may also hold matrices.
    4. *Axis names* (`nnx.Variable`, Linen's boxes, `haliax.NamedArray`) tell which axes are layers, experts
       or heads; the class of an Equinox or Haliax layer tells which axes are the input.
    5. *Convolutions*, by name or by a square window: `(window · in, out)`; depthwise convolutions are
       vectors.
    6. *Attention with a separate axis for heads*: by the bias, which has the axes of the output; by the
       other side of the attention; by an axis that all kernels nearby share, which is the stack; by name and
       sizes.
    7. *Everything else*: the last two axes; axes before them are a stack of blocks.

    If two readings are equally plausible, `init` warns with a `RoutingWarning`. `gum_optax.describe` shows
    the reason for every leaf.

    Args:
      params: a tree of arrays or `jax.ShapeDtypeStruct`s: a Linen parameter dict, an NNX state, an Equinox
        module, or any other tree whose paths carry names.
      routers: whether the routers of a mixture of experts are matrices. Routers multiply activations as every
        linear layer does, and MaxText's own dimension numbers for Muon include them.
        `weight_dimension_numbers=functools.partial(hidden_matrices, routers=False)` gives them to `others`.

    Returns:
      A tree of the same structure with `optax.contrib.MuonDimensionNumbers` or `None` at the leaves. If your
      model differs, override entries and pass the tree as `weight_dimension_numbers`, or pass a mapping from
      patterns: `{"*/kernel_of_layers": MuonDimensionNumbers(0, -1), "*/gate/*": None}`.

    Examples:
      >>> params = {"bias": jnp.ones(8), "embedding": jnp.ones((16, 4)), "kernel": jnp.ones((4, 8))}
      >>> gum_optax.hidden_matrices(params)
      {'bias': None, 'embedding': None, 'kernel': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)}
    """
    return jax.tree.structure(params).unflatten(
        [reading.entry for reading in policy(params, routers=routers)]
    )


def policy(params: Any, *, routers: bool = True) -> list[Reading]:
    """The readings of `hidden_matrices`."""
    all_readings = readings(params)
    if routers:
        return all_readings
    return [x._replace(entry=None, reason="a router") if x.kind == "router" else x for x in all_readings]


def decided(spec: WeightDimensionNumbers, tree: Any) -> list[Reading]:
    """The reading of each leaf under an optimizer's `weight_dimension_numbers`, with the reason."""
    if spec is None or spec is hidden_matrices:
        return policy(tree)
    if isinstance(spec, functools.partial) and spec.func is hidden_matrices:
        return policy(tree, **spec.keywords)
    if isinstance(spec, GivesReadings):
        return spec.readings(tree)
    if isinstance(spec, dict) and is_patterns(spec, tree):
        patterns = [matching(spec, "/".join(names)) for names in leaf_names(tree)]
        defaults = policy(tree)
        return [
            reading if pattern is None else _by_user(spec[pattern], f"your pattern {pattern!r}")
            for pattern, reading in zip(patterns, defaults, strict=True)
        ]
    return [_by_user(entry, "your dimension numbers") for entry in dimension_numbers(spec, tree)]


def _by_user(entry: Entry, reason: str) -> Reading:
    return Reading(entry, "other" if entry is None else "matrix", reason)
