"""Distinguishes attention kernels with a separate axis for heads from stacks of plain matrices.

    queries, keys, values   (embed, heads, head_dim)        the matrix (embed, heads · head_dim)
    the output              (heads, head_dim, embed)        the matrix (heads · head_dim, embed)

A stack `(layers, fan_in, fan_out)` has the same number of axes. The rules use, in this order: the bias of the
same module, which has the axes of the output; the other side of the attention, which agrees on heads,
head_dim and embed; a common first axis of all kernels nearby, which is the axis of a stack; and last the name
and the sizes.
"""

import re
from collections.abc import Sequence

from optax.contrib import MuonDimensionNumbers

from .leaves import Leaf, Model, Reading, Shape, last_two, matrix, words

# The name of an `Einsum` in Gemma and in Tunix's models tells its axes: (heads, embed, head_dim), also in a
# stack of queries, keys and values, or (heads, head_dim, embed).
_GEMMA_INPUTS = frozenset({"q_einsum", "k_einsum", "v_einsum", "kv_einsum", "qkv_einsum"})
_GEMMA_INPUT = MuonDimensionNumbers(reduction_axis=-2, output_axis=(-3, -1))
_GEMMA_OUTPUT = "attn_vec_einsum"

_INPUTS = frozenset({"q", "k", "v", "query", "key", "value", "queries", "keys", "values", "qkv", "kv"})
_JOINED_INPUTS = re.compile(r"w(q|k|v|kv|qkv|qk)(_[ab])?$|w_(q|k|v|kv|qkv)$")
_OUTPUTS = frozenset({"o", "out", "output", "wo"})
_ATTENTION = frozenset({"attention", "attn", "mha", "mla", "attend", "crossattention", "selfattention"})


def _kernel_name(leaf: Leaf) -> str:
    """The name that tells a kernel's role: that of its module if its own is generic, such as `kernel`."""
    generic = leaf.name.lower() in ("kernel", "w", "weight", "weights", "base_kernel")
    return (leaf.path[-2] if generic and len(leaf.path) > 1 else leaf.name).lower()


def _is_input_by_name(leaf: Leaf) -> bool:
    name = _kernel_name(leaf)
    return not _INPUTS.isdisjoint(words(name)) or _JOINED_INPUTS.match(name) is not None


def _is_output_by_name(leaf: Leaf) -> bool:
    return not _OUTPUTS.isdisjoint(words(_kernel_name(leaf)))


def in_attention(leaf: Leaf) -> bool:
    """Whether the path of a leaf mentions attention."""
    return any(not _ATTENTION.isdisjoint(words(name)) for name in leaf.path) or _is_input_by_name(leaf)


def einsums(leaf: Leaf, model: Model) -> Reading | None:
    """Reads Gemma's kernels by name."""
    del model
    name = _kernel_name(leaf)
    if len(leaf.block) < 3 or name not in (*_GEMMA_INPUTS, _GEMMA_OUTPUT):
        return None
    if name == _GEMMA_OUTPUT:
        return _output_of(leaf, "Gemma's name")
    return Reading(_GEMMA_INPUT, "matrix", "Gemma's name")


def _last(leaf: Leaf, count: int) -> Shape:
    return leaf.block[-count:] if len(leaf.block) >= count else ()


def _is_pair(kernel: Leaf, output: Leaf) -> bool:
    """Whether kernels `(e, h, d)` or `(e, h, p·d)` and `(h, d, e)` agree on heads, head_dim and embed."""
    into, out = _last(kernel, 3), _last(output, 3)
    if not into or not out or kernel.block[:-3] != output.block[:-3]:
        return False
    (embed, heads, size), (out_heads, out_size, out_embed) = into, out
    return embed == out_embed and heads == out_heads and size % out_size == 0 and size // out_size <= 3


def _is_fused_pair(kernel: Leaf, output: Leaf) -> bool:
    """`_is_pair` for a kernel `(e, 3, h, d)` with queries, keys and values."""
    into, out = _last(kernel, 4), _last(output, 3)
    if not into or not out or kernel.block[:-4] != output.block[:-3]:
        return False
    return (into[0], *into[2:]) == (out[2], *out[:2]) and into[1] in (2, 3)


def _is_grouped_pair(kernel: Leaf, output: Leaf) -> bool:
    """Whether kernels `(e, k, g, d)` and `(k, g, d, e)` agree: k heads of keys, and g queries for each."""
    into, out = _last(kernel, 4), _last(output, 4)
    if not into or not out or kernel.block[:-4] != output.block[:-4]:
        return False
    return into[0] != out[0] and (*into[1:], into[0]) == out


def _inputs_of(leaf: Leaf, count: int, reason: str) -> Reading:
    """Of the last `count` axes, the first is fan-in and all others are fan-out."""
    free = leaf.free[-count:]
    return matrix(leaf, free[:1], free[1:], reason)


def _output_of(leaf: Leaf, reason: str, count: int = 3) -> Reading:
    """Of the last `count` axes, the last is fan-out and all others are fan-in."""
    free = leaf.free[-count:]
    return matrix(leaf, free[:-1], free[-1:], reason)


def beside_its_bias(leaf: Leaf, model: Model) -> Reading | None:
    """A bias has the axes of the stack and of the output; the axes that it lacks are the fan-in."""
    of_weight = re.sub(r"(^|_)w$", r"\1b", leaf.name)  # Haiku's `w` and AlphaFold's `output_w`
    bias = model.sibling(leaf, "bias") or (model.sibling(leaf, of_weight) if of_weight != leaf.name else None)
    if bias is None or len(leaf.block) < 3:
        return None
    kernel, kept = leaf.block, bias.block
    missing = len(kernel) - len(kept)
    fits = [s for s in range(len(kept)) if (*kernel[:s], *kernel[s + missing :]) == kept]
    if missing < 1 or len(fits) != 1:
        return None
    stack, free = fits[0], leaf.free
    reduction, output = free[stack : stack + missing], free[stack + missing :]
    if missing > 1 and kernel[stack + missing - 1] == 1:
        return Reading(None, "depthwise convolution", "one input channel a group")
    return matrix(leaf, reduction, output, "the axes of its bias")


def beside_its_other_side(leaf: Leaf, model: Model) -> Reading | None:
    """Reads a leaf by its neighbours: the other side of an attention, or a stack that all kernels share."""
    if len(leaf.block) < 3:
        return None
    for around in model.around(leaf):
        others = [x for x in around if len(x.block) >= 3 and x is not leaf]
        kernels = [x for x in others if x.factor is None]
        reading = _paired(leaf, kernels) or _by_heads(leaf, kernels) or _in_a_stack(leaf, kernels)
        if reading is not None:
            return reading
    return None


def _paired(leaf: Leaf, kernels: Sequence[Leaf]) -> Reading | None:
    if any(_is_grouped_pair(x, leaf) for x in kernels):
        return _output_of(leaf, "attention pair of grouped queries", 4)
    if any(_is_grouped_pair(leaf, x) for x in kernels):
        return _inputs_of(leaf, 4, "attention pair of grouped queries")
    if any(_is_fused_pair(leaf, x) for x in kernels):
        return _inputs_of(leaf, 4, "attention pair")
    is_input = any(_is_pair(leaf, x) for x in kernels)
    is_output = any(_is_pair(x, leaf) or _is_fused_pair(x, leaf) for x in kernels)
    if not is_input and not is_output:
        # Grouped keys and values have fewer heads than their queries.
        same = [x for x in kernels if x.block[-3:-2] + x.block[-1:] == leaf.block[-3:-2] + leaf.block[-1:]]
        is_input = any(_is_pair(x, y) for x in same for y in kernels if y is not x)
    if not is_input and not is_output:
        return None
    is_output = is_output and not (is_input and _is_input_by_name(leaf))
    split = _output_of(leaf, "attention pair") if is_output else _inputs_of(leaf, 3, "attention pair")
    if not _share_an_axis(leaf, kernels):
        return split
    # The sizes do not decide: the model has as many layers as it is wide.
    plain = last_two(leaf, "a stack of matrices")
    named = _is_input_by_name(leaf) or _is_output_by_name(leaf)
    chosen, other = (split, plain) if named and in_attention(leaf) else (plain, split)
    return chosen._replace(doubt=f"{other.entry}, as sizes agree on that too")


def _share_an_axis(leaf: Leaf, kernels: Sequence[Leaf]) -> bool:
    """Whether all kernels nearby share the size of the first axis, as layers of a stack do."""
    return bool(kernels) and all(x.block[-3] == leaf.block[-3] for x in kernels)


def _by_heads(leaf: Leaf, kernels: Sequence[Leaf]) -> Reading | None:
    """Reads latent attention, whose kernels have different widths and share only the number of heads."""
    if not in_attention(leaf) or _share_an_axis(leaf, kernels):
        return None
    _, middle, _ = leaf.block[-3:]
    if any(in_attention(x) and x.block[-3] == middle and x.block[-3] != leaf.block[-3] for x in kernels):
        return _inputs_of(leaf, 3, "as many heads as the output")
    if any(
        in_attention(x) and x.block[-2] == leaf.block[-3] and x.block[-3] != leaf.block[-3] for x in kernels
    ):
        return _output_of(leaf, "as many heads as the queries")
    return None


def _in_a_stack(leaf: Leaf, kernels: Sequence[Leaf]) -> Reading | None:
    """Reads a stack by its shared first axis, unless the axis may be that of queries, keys and values."""
    is_shared = _share_an_axis(leaf, [x for x in kernels if len(x.block) == len(leaf.block)])
    if not is_shared or (in_attention(leaf) and _may_be_input(leaf)):
        return None
    return last_two(leaf, "a stack, as the kernels beside it")


def _may_be_input(leaf: Leaf) -> bool:
    """Whether the first axis may be the model's width, which exceeds the number and the size of heads.

    A stack is less deep than its matrices are wide.
    """
    first, middle, last = leaf.block[-3:]
    return first > middle and first >= last


def _may_be_output(leaf: Leaf) -> bool:
    """Whether sizes fit an output: all heads are about as wide as the model, one head is at most half."""
    first, middle, last = leaf.block[-3:]
    return 2 * middle <= last <= 4 * first * middle


def by_name_and_size(leaf: Leaf, model: Model) -> Reading | None:
    """Reads a kernel by its own or its module's name, and by sizes that would be odd for a stack."""
    del model
    if len(leaf.block) < 3 or not in_attention(leaf):
        return None
    plain = last_two(leaf, "the last two axes")
    if _is_input_by_name(leaf):
        is_fused = len(leaf.block) >= 4 and leaf.block[-3] in (2, 3) and leaf.block[-4] > leaf.block[-2]
        if is_fused:
            return _inputs_of(leaf, 4, "fused queries, keys and values by name")
        return _inputs_of(leaf, 3, "queries, keys or values by name") if _may_be_input(leaf) else plain
    if _is_output_by_name(leaf):
        return _output_of(leaf, "the output of attention by name") if _may_be_output(leaf) else plain
    doubt = f"{plain.entry}, a stack of {leaf.block[-3]} matrices {leaf.block[-2]} × {leaf.block[-1]}"
    if _may_be_output(leaf):
        return _output_of(leaf, "in attention, of an output's sizes")._replace(doubt=doubt)
    if _may_be_input(leaf):
        return _inputs_of(leaf, 3, "in attention, of an input's sizes")._replace(doubt=doubt)
    return plain
