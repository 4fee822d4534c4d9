"""Which leaves of a model are matrices, told from their paths: the only place that knows Flax's names."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from ._dimensions import LAST_TWO, names_of

Names = tuple[str, ...]
Shape = tuple[int, ...]

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
# Words that name a layer between tokens and features; "embed" and what begins with "emb" do so as well.
_TABLES = frozenset({"wte", "wpe"})
_HEADS = frozenset({"cls", "logits", "classifier", "readout", "lmhead"})
# Leaves that are vectors, and have two axes in a stack of layers.
_VECTORS = frozenset({"b", "scale", "gamma", "beta"})

# Children of an attention module whose kernels `flax.linen.DenseGeneral` and `nnx.LinearGeneral` give
# split heads: (embed, heads, head_dim), fused (embed, 3, heads, head_dim), output (heads, head_dim, embed).
_INPUTS = frozenset({"query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj", "wq", "wk", "wv"})
_FUSED = frozenset({"qkv", "kv", "qkv_proj", "kv_proj", "wqkv", "wkv"})
_OUTPUTS = frozenset({"out", "o", "out_proj", "o_proj", "wo", "attention_output"})
_SPLIT_INPUT = MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))
_SPLIT_FUSED = MuonDimensionNumbers(reduction_axis=-4, output_axis=(-3, -2, -1))
_SPLIT_OUTPUT = MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)
# What such a kernel is called: by Flax, and by the `Einsum` of Gemma and of Tunix's models.
_KERNELS = frozenset({"kernel", "w"})
# Gemma's names tell their axes: (heads, embed, head_dim), also in a stack of queries, keys and values,
# and (heads, head_dim, embed).
_GEMMA_INPUT = MuonDimensionNumbers(reduction_axis=-2, output_axis=(-3, -1))
_GEMMA: dict[str, MuonDimensionNumbers] = {"attn_vec_einsum": _SPLIT_OUTPUT}
_GEMMA |= dict.fromkeys(("q_einsum", "k_einsum", "v_einsum", "kv_einsum", "qkv_einsum"), _GEMMA_INPUT)


def _words(name: str) -> list[str]:
    """`MultiHeadAttention_0` is multi, head, attention."""
    return [word.lower() for word in _WORD.findall(name)]


def _is_embedding(names: Names) -> bool:
    return any(
        "embed" in word or word.startswith("emb") or word in _TABLES
        for name in names
        for word in _words(name)
    )


def _is_head(names: Names) -> bool:
    # `lm_head`, `ClassificationHead_0`, not `MultiHeadAttention`
    return any(words[-1:] == ["head"] or not _HEADS.isdisjoint(words) for words in map(_words, names))


def is_edge(names: Names) -> bool:
    """Whether a part of the path names an embedding or a head."""
    return _is_embedding(names) or _is_head(names)


def is_table(names: Names) -> bool:
    """Whether a leaf is a table of vectors, `(vocabulary, width)`, and not the kernel of a layer."""
    return _is_embedding(names) and names[-1] != "kernel"


def _is_hidden(names: Names) -> bool:
    """Whether no part of the path names an embedding, a head, a norm or a bias."""
    if is_edge(names):
        return False
    # A norm or a bias is the leaf or the module that holds it; `PreNormBlock` may hold matrices.
    near = [word for name in names[-2:] for word in _words(name)]
    if any(word.endswith("norm") or word in ("ln", "bias") for word in near):
        return False
    return not names or names[-1].lower() not in _VECTORS


def _is_split_pair(kernel: Shape, output: Shape, embed: int) -> bool:
    """Whether an input kernel and the output kernel of its module agree on the head's size and the width."""
    return len(kernel) >= -embed and kernel[embed] == output[-1] and kernel[-1] == output[-2]


def _attention_entry(names: Names, shapes: dict[Names, Shape]) -> MuonDimensionNumbers | None:
    """The dimension numbers of an attention kernel with split heads, `None` for any other leaf.

    A stack of plain matrices, `(layers, embed, features)`, has as many axes; what tells them apart is the
    other side of the same module, then the bias, which has the output's axes, and for want of both
    that a model is wider than it has heads, where a stack is less deep than a model is wide.
    """
    shape = shapes[names]
    if len(names) < 2 or names[-1] not in _KERNELS or len(shape) < 3:
        return None
    module, child = names[:-2], names[-2].lower()
    if child in _GEMMA:
        return _GEMMA[child]
    inside = {n: s for n, s in shapes.items() if len(n) > 1 and n[:-2] == module and n[-1] == names[-1]}
    beside = {n[-2].lower(): s for n, s in inside.items()}
    outputs = [s for name, s in beside.items() if name in _OUTPUTS and len(s) >= 3]
    if child in _OUTPUTS:
        inputs = [s for name, s in beside.items() if name in _INPUTS and len(s) >= 3]
        fused = [s for name, s in beside.items() if name in _FUSED and len(s) >= 4]
        pairs = [_is_split_pair(s, shape, -3) for s in inputs] + [_is_split_pair(s, shape, -4) for s in fused]
        return _SPLIT_OUTPUT if any(pairs) else None
    embed, entry = (-3, _SPLIT_INPUT) if child in _INPUTS else (-4, _SPLIT_FUSED)
    if child not in _INPUTS | _FUSED or len(shape) < -embed:
        return None
    if outputs:
        return entry if any(_is_split_pair(shape, output, embed) for output in outputs) else None
    bias = shapes.get((*names[:-1], "bias"))
    if bias is not None:
        return entry if bias == shape[:embed] + shape[embed + 1 :] else None
    return entry if shape[embed] > shape[-2] else None


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

    def entry(names):
        if len(shapes[names]) < 2 or 0 in shapes[names] or not _is_hidden(names):
            return None
        return _attention_entry(names, shapes) or LAST_TWO

    return treedef.unflatten([entry(names_of(path)) for path, _ in leaves])
