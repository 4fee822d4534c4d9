"""Leaves that are not matrices, by their names and shapes."""

import re
from collections.abc import Sequence

from .attention import in_attention
from .leaves import KERNELS, Leaf, Model, Path, Reading, words

# Last words of the names of projections of any input; Stable Diffusion projects times by `emb_layers`.
_PROJECTIONS = frozenset({"proj", "projection", "layers"})
# Words for layers, none of which is a norm, a token or a table by itself.
_LAYERS = _PROJECTIONS | {"dense", "linear", "mlp", "modulation", "mapping", "mixer", "up", "down"}
# Leaves with one number per feature, head or layer, and the rate tables of Mamba and RWKV.
_VECTORS = frozenset(
    {
        "scale",
        "gamma",
        "beta",
        "sink",
        "sinks",
        "temperature",
        "dt",
        "layerscale",
        "layer_scale",
    }
    | {"ls1", "ls2", "gamma_1", "gamma_2", "time_decay", "time_first", "time_faaaa"}
)
_VECTOR_WORDS = frozenset({"bias", "biases", "scale", "scales", "sinks", "beta", "gamma"})
_BIAS = re.compile(r"b\d*$")
_ADAPTIVE = frozenset({"ada", "adaptive", "cond", "conditional", "film"})
_NORM_WORDS = frozenset({"ln", "norm", "norms", "rmsnorm", "layernorm"})
# Words for rows that belong to a position or a role in the sequence, and not to an input.
_TOKEN_WORDS = frozenset(
    {"token", "tokens", "latent", "latents", "register", "registers", "probe", "pos", "position", "positions"}
    | {"posemb", "prompt", "prompts"}
)
_MIXTURES = frozenset({"moe", "expert", "experts", "sparse", "mixture", "routed"})
# Words for a layer between tokens and features, beside "embed" and words that begin with "emb".
_TABLES = frozenset({"wte", "wpe", "table", "lookup", "vocab", "codebook", "codebooks", "codevectors"})
# TransformerLens' names for tables and the head.
_TABLE_NAMES, _HEAD_NAMES = frozenset({"w_e", "w_pos"}), frozenset({"w_u"})
_POSITIONS = frozenset({"pos", "position", "positions", "positional", "wpe", "type", "segment", "relative"})
_HEADS = frozenset({"cls", "logits", "classifier", "classifiers", "readout", "lmhead", "predictions"})
# The last layer of a network that is called a head has one of these names.
_LAST = frozenset({"out", "output", "final", "decoder", "predictor", "last"})
# In `q_head` and `multi_head`, "head" means a head of attention.
_NO_HEADS = frozenset({"q", "k", "v", "multi", "attention", "attn", "num", "per"})


def is_norm(leaf: Leaf) -> bool:
    """Whether a leaf belongs to a norm, by its own or its module's name.

    A gated norm also has matrices, and a layer makes the scales of an adaptive one.
    """
    own, module = words(leaf.name), words("".join(leaf.path[-2:-1]))
    is_of_a_layer = module[-1:] != () and (module[-1] in _LAYERS or not _ADAPTIVE.isdisjoint(module))
    if leaf.name in KERNELS and is_of_a_layer:
        return False
    named = own if not _LAYERS.isdisjoint(own) else (*module, *own)
    return any(word.endswith("norm") or word in _NORM_WORDS for word in named)


def _is_rate(name: str) -> bool:
    """Whether a name is that of the rates of a state space model: `A_log`, `log_A_real`, `A_imag`."""
    own = set(words(name))
    return {"a", "log"} <= own or ("a" in own and not own.isdisjoint({"real", "imag"}))


def is_vector(leaf: Leaf) -> bool:
    """Whether a leaf has a vector's name: the scale of a norm, a bias, the `D` of a state space model."""
    if leaf.factor is not None:
        return False  # the `b` of LoRA is not a bias
    own = leaf.name.lower()
    is_bias = _BIAS.match(leaf.name) is not None or not _VECTOR_WORDS.isdisjoint(words(own))
    return is_bias or own in _VECTORS or leaf.name == "D" or _is_rate(leaf.name) or is_norm(leaf)


def vectors(leaf: Leaf, model: Model) -> Reading | None:
    """Norms, biases, sinks and rates are updated elementwise, also in stacks."""
    del model
    return Reading(None, "vector", "a norm, bias or scale by name") if is_vector(leaf) else None


def tokens(leaf: Leaf, model: Model) -> Reading | None:
    """Positions, register tokens, class tokens and latents are rows that no input selects."""
    del model
    own = words(leaf.name)
    is_of_a_layer = own[:1] == ("w",) or not _LAYERS.isdisjoint(own)
    if _TOKEN_WORDS.isdisjoint(own) or leaf.name.lower() in KERNELS or is_of_a_layer:
        return None
    kind = "embedding" if _is_embedding(leaf.name) else "token"
    return Reading(None, kind, "tokens or positions by name")


def is_router(leaf: Leaf) -> bool:
    """Whether a leaf selects experts: it is called `router`, or it is the `gate` of a mixture."""
    named = {word for name in leaf.path for word in words(name)}
    own = {word for name in leaf.path[-2:] for word in words(name)}
    is_gate = any(name.lower() in ("gate", "gating") for name in leaf.path[-2:])
    return "router" in own or (is_gate and not _MIXTURES.isdisjoint(named))


def of_a_stack(leaf: Leaf, model: Model) -> Reading | None:
    """A leaf whose blocks have at most one axis holds a vector per layer."""
    del model
    return Reading(None, "vector", "a vector in each layer") if len(leaf.free) < 2 else None


def _is_embedding(name: str) -> bool:
    own = words(name)
    is_named = any("embed" in word or word.startswith("emb") or word in _TABLES for word in own)
    return (is_named and own[-1] not in _PROJECTIONS and "mapping" not in own) or name.lower() in _TABLE_NAMES


def is_head(name: str) -> bool:
    """Whether a name means a head: `lm_head` or `ClassificationHead_0`, but not `MultiHeadAttention`."""
    own = words(name)
    if "pre" in own or "router" in own:
        return False  # the layer before the head, or another kind of head
    if own[-1:] in (("head",), ("heads",)):
        return _NO_HEADS.isdisjoint(own) and name != "heads"  # a module of heads, or the heads of attention
    return name.lower() in _HEAD_NAMES or not _HEADS.isdisjoint(own) or any("logit" in word for word in own)


def _kernels(model: Model, module: Path) -> list[Leaf]:
    """The leaves of a module that may be matrices."""
    return [x for x in model.inside(module) if len(x.shape) > 1 and not is_vector(x)]


def tables(leaf: Leaf, model: Model) -> Reading | None:
    """Embeddings: the leaf, its module, or an outer module with no other kernel has an embedding's name.

    In a network called `embedder`, embeddings have their own names, and other kernels are matrices.
    """
    is_shared = [name for name in leaf.path if name != "params"][:-1] == ["shared"] or leaf.path == (
        "shared",
    )
    near = is_shared or any(map(_is_embedding, leaf.path[-2:]))
    is_alone = any(
        _is_embedding(name) and len(_kernels(model, leaf.path[: depth + 1])) == 1
        for depth, name in enumerate(leaf.path[:-2])
    )
    if not near and not is_alone:
        return None
    return Reading(None, "embedding", "an embedding by name")


def heads(leaf: Leaf, model: Model) -> Reading | None:
    """Output layers: the leaf or its module is named a head, or the leaf is the last layer of a head."""
    by_name = Reading(None, "head", "a head by name")
    if any(map(is_head, leaf.path[-2:])) or leaf.path[:1] in (("output",), ("unembed",)):
        return by_name
    for depth, name in enumerate(leaf.path[:-2]):
        several = words(name)[-1:] == ("heads",)
        if not (is_head(name) or name == "heads") or (several and in_attention(leaf)):
            continue
        is_one_of = several or leaf.path[depth + 1].isdigit()
        if _is_last(leaf, _kernels(model, leaf.path[: depth + 1 + is_one_of])):
            return by_name
    return None


def _is_last(leaf: Leaf, kernels: Sequence[Leaf]) -> bool:
    """Whether a leaf is the output layer of a network, by numbers and names."""
    if len(kernels) == 1:
        return True
    if not _LAST.isdisjoint(words(leaf.path[-2])) and not in_attention(leaf):
        return True
    beside = [x for x in kernels if x.path[:-2] == leaf.path[:-2] and _stem(x) == _stem(leaf)]
    return len(beside) == len(kernels) and _number(leaf) == max(map(_number, beside))


def _stem(leaf: Leaf) -> str:
    return re.sub(r"_?\d+$", "", leaf.path[-2])


def _number(leaf: Leaf) -> int:
    digits = re.search(r"\d+$", leaf.path[-2])
    return int(digits.group()) if digits else -1


def sized_as_the_vocabulary(leaf: Leaf, model: Model) -> Reading | None:
    """The head is the only matrix outside of the layers with the shape of an embedding or its transpose."""
    twins = model.once(_twins)
    is_only = len(twins) == 1 and twins[0].path == leaf.path
    return Reading(None, "head", "a side as long as the vocabulary") if is_only else None


def _twins(model: Model) -> list[Leaf]:
    of_tokens = [
        x
        for x in model.leaves
        if len(x.block) == 2
        and any(map(_is_embedding, x.path[-2:]))
        and _POSITIONS.isdisjoint(word for name in x.path[-2:] for word in words(name))
    ]
    sizes = {x.block for x in of_tokens if x.block[0] > x.block[1]}
    others = [x for x in model.leaves if len(x.shape) == 2 and x not in of_tokens and not is_vector(x)]
    if any(map(is_head, (name for x in others for name in x.path[-2:]))):
        return []
    return [x for x in others if x.block in sizes or x.block[::-1] in sizes]


def last_of_a_compact_model(leaf: Leaf, model: Model) -> Reading | None:
    """The head is the last `Dense_n` at the root of a Linen model with `@nn.compact`."""
    root = leaf.path[:-2]
    if len(leaf.path) < 2 or root not in ((), ("params",)) or _stem(leaf) != "Dense" or leaf.name != "kernel":
        return None
    if len(leaf.shape) != 2:
        return None  # in a stack of layers
    dense = [
        x for x in model.inside(root) if x.path[:-2] == root and _stem(x) == "Dense" and x.name == "kernel"
    ]
    others = [x for x in model.inside(root) if x not in dense and len(x.shape) > 1 and not is_vector(x)]
    if len(dense) + len(others) < 2 or any(is_head(name) for x in others for name in x.path[-2:]):
        return None
    if len(dense) == 1 and any(leaf.shape[-1] in x.shape for x in others):
        return None  # it may also be the first layer
    if any(leaf.shape[-1] == x.block[0] for x in others if len(x.block) == 2 and tables(x, model) is None):
        return None  # another layer reads what it makes
    is_last = _number(leaf) == max(map(_number, dense))
    return Reading(None, "head", "the last Dense of a compact model") if is_last else None
