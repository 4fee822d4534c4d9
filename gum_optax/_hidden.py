"""Which leaves of a model are matrices, told from their paths: the only place that knows Flax's names."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from ._dimensions import LAST_TWO, names_of

# Parts of a path that say "not a hidden matrix". Matched against each name along the path, lower case;
# `head` only as the last word of a name, so that `MultiHeadDotProductAttention` and `heads` do not match.
_EMBEDDING = r"emb|^wte$|^wpe$"
_HEAD = r"(^|_)(lm_?)?head(_?\d+)?$|^lm_?head|logits|unembed|classifier|readout"
_NORM = r"norm|(^|_)ln(_|\d|$)"
_BIAS = r"(^|_)bias$"
_NOT_HIDDEN = re.compile("|".join((_EMBEDDING, _HEAD, _NORM, _BIAS)))
# Names of vectors, which are two-axis leaves in a stack of layers.
_VECTORS = frozenset({"b", "scale", "gamma", "beta"})

# Children of an attention module whose kernels `flax.linen.DenseGeneral` and `nnx.LinearGeneral` give
# three axes or more: (embed, heads, head_dim) for the first three, (heads, head_dim, embed) for the output.
_INPUTS = frozenset({"query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj", "wq", "wk", "wv"})
_OUTPUTS = frozenset({"out", "o", "out_proj", "o_proj", "wo", "attention_output"})
_SPLIT_OUTPUT = MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))
_SPLIT_INPUT = MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)


def _is_general(inputs: list[tuple[int, ...]], output: tuple[int, ...] | None) -> bool:
    """Whether attention kernels of three axes have split heads, rather than being a stack of matrices.

    Split: the inputs are (embed, heads, head_dim), the output (heads, head_dim, embed). A stack is
    (layers, embed, features) and (layers, features, embed). Without both sides to compare, split.
    """
    if output is None or not inputs:
        return True
    return all(i[-3] == output[-1] and i[-1] == output[-2] for i in inputs)


def _attention_modules(shapes: dict[tuple[str, ...], tuple[int, ...]]) -> dict[tuple[str, ...], bool]:
    """For each module that holds kernels of both kinds of name: are its three-axis kernels split?"""
    inputs: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    outputs: dict[tuple[str, ...], tuple[int, ...]] = {}
    for names, shape in shapes.items():
        if len(names) < 2 or names[-1] != "kernel" or len(shape) < 3:
            continue
        module, child = names[:-2], names[-2].lower()
        if child in _INPUTS:
            inputs.setdefault(module, []).append(shape)
        elif child in _OUTPUTS:
            outputs[module] = shape
    return {m: _is_general(inputs.get(m, []), outputs.get(m)) for m in inputs | outputs}


def hidden_matrices(params: Any) -> Any:
    """The dimension numbers of the hidden weight matrices of a Flax model, `None` at other leaves.

    A matrix is every non-empty leaf of two or more axes, unless its path names an embedding, a head, a
    norm or a bias. Its fan-in and fan-out are the last two axes; axes before them are a stack of blocks
    (scanned or vmapped layers, experts, convolution windows). The attention kernels of
    `DenseGeneral` (Linen) and `LinearGeneral` (NNX) are matrices with their heads flattened:
    `(embed, heads·head_dim)` and `(heads·head_dim, embed)`, in a stack too.

    Args:
      params: a tree of arrays or `jax.ShapeDtypeStruct`s: a Linen parameter dict, an NNX state, or
        any other tree whose paths carry names.

    Returns:
      A tree of the same structure with `optax.contrib.MuonDimensionNumbers` or `None` at the leaves.
      Override an entry and pass the tree as `weight_dimension_numbers` where a model differs, such as
      a stack axis that is not in front: `MuonDimensionNumbers(0, -1)` for `(embed, layers, features)`.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    shapes = {names_of(path): jnp.shape(leaf) for path, leaf in leaves}
    split_heads = _attention_modules(shapes)

    def entry(path, leaf):
        names = names_of(path)
        shape = jnp.shape(leaf)
        if len(shape) < 2 or 0 in shape:
            return None
        lowered = [name.lower() for name in names]
        if any(_NOT_HIDDEN.search(name) for name in lowered) or (lowered and lowered[-1] in _VECTORS):
            return None
        # Four axes or more cannot be a plain stack of attention matrices, so heads are split there.
        if len(shape) > 3 or split_heads.get(names[:-2], False):
            child = lowered[-2] if len(lowered) > 1 and lowered[-1] == "kernel" else ""
            if len(shape) > 2 and child in _INPUTS:
                return _SPLIT_OUTPUT
            if len(shape) > 2 and child in _OUTPUTS:
                return _SPLIT_INPUT
        return LAST_TWO

    return treedef.unflatten([entry(path, leaf) for path, leaf in leaves])
