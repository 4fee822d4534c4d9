"""How leaves go through a function: one after the other, or a few at once; `xla.py` says what it saves."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .trees import merge, split
from .xla import after, depend_on, unstacked, wait_for


def map_sequentially(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map` in which each leaf waits for the result of the leaf before it, small leaves first.

    If a result has several arrays, the next leaf waits for the first of them.

    Results are computed and freed one leaf at a time, largest last, so that they reuse the memory of
    gradients that are no longer needed. Without the order, XLA's CPU scheduler computes all results at once,
    for concurrency, which needs temporaries of all gradients' size. The scheduler drops
    `optimization_barrier`, so the order must be in the data: the last operand of each leaf, which should be
    the smallest, depends on the result before. A TPU's scheduler saves memory by itself; there the order
    would only keep a result from being fused into what reads it.
    """
    leaves, treedef = jax.tree.flatten(tree)
    rows = list(zip(leaves, *(treedef.flatten_up_to(other) for other in others), strict=True))
    results: dict[int, Any] = {}
    before = None
    for leaf_index, (*operands, last) in sorted(enumerate(rows), key=lambda row: row[1][-1].size):
        results[leaf_index] = f(*operands, last if before is None else depend_on(last, before))
        first = jax.tree.leaves(results[leaf_index])[0]
        before = first if first.size else before  # an empty one has no number to wait for
    return treedef.unflatten([results[leaf_index] for leaf_index in range(len(rows))])


# Any small number: a stack of up to six matrices takes one pass on a GPU, of up to twelve two.
_AT_ONCE = 6
# On a GPU leaves of up to this share of all numbers go through a function at once. Measured on an H200's
# compiler, twelve layers of width 512: two of the largest leaves, or five of the others.
_SHARE = 1 / 26
# The same for functions that make no other matrices: five of the largest leaves, or 14 of the others.
_SHARE_OF_LEAN = 1 / 10
# The same for small leaves, which a CPU takes all at once: all coordinates of the attention's leaves, and one
# leaf of the others.
_SHARE_OF_SMALL = 1 / 3


def at_once_on_gpu(count: int) -> int:
    """How many of `count` matrices go through a function at once on a GPU: half, or six if that is more."""
    return min(max(count // 2, _AT_ONCE), count)


def map_in_place(f: Callable[[Array], Array], stack: Float[Array, "k m n"]) -> Float[Array, "k m n"]:
    """`f(stack)` of a function of stacks, in place: one matrix at a time, on a GPU half of them.

    Each result overwrites its matrix, where `jax.lax.map` would allocate a second array for the results. A
    GPU launches as many kernels for half a stack as for one matrix.
    """

    def one_by_one(stack):
        def step(i, stack):
            x = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(stack, f(x).astype(stack.dtype), i, axis=0)

        return jax.lax.fori_loop(0, len(stack), step, stack)

    def in_halves(stack):
        def step(i, stack):
            x = jax.lax.dynamic_slice_in_dim(stack, i * size, size)
            return jax.lax.dynamic_update_slice_in_dim(stack, f(x).astype(stack.dtype), i * size, axis=0)

        size = at_once_on_gpu(len(stack))
        whole, left = divmod(len(stack), size)
        stack = jax.lax.fori_loop(0, whole, step, stack)
        return stack.at[-left:].set(f(stack[-left:]).astype(stack.dtype)) if left else stack

    return jax.lax.platform_dependent(stack, cuda=in_halves, default=one_by_one)


def same_shape_groups(leaves: Sequence[Any], kinds: Sequence[Hashable]) -> list[list[int]]:
    """The indices of leaves in groups: single matrices of one kind are a group, a stack is one by itself."""
    rows = enumerate(zip(leaves, kinds, strict=True))
    return _grouped([kind if math.prod(x.shape[:-2]) == 1 else leaf_index for leaf_index, (x, kind) in rows])


def _grouped(kinds: Sequence[Hashable]) -> list[list[int]]:
    """The indices of equal kinds, together."""
    groups: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(i)
    return list(groups.values())


def cut(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """The indices in pieces of `size` or fewer."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def map_batched(f: Callable[[Array], Array], tree: Any) -> Any:
    """`jax.tree.map` of a function of stacks of matrices; single matrices of one shape form a stack.

    XLA compiles the function once for each stack, and holds the whole stack: for small leaves. On a GPU a
    third of all numbers goes through `f` at once; on a TPU one leaf.
    """
    return jax.lax.platform_dependent(
        tree,
        cuda=functools.partial(_map_pieces, f, _SHARE_OF_SMALL),
        tpu=functools.partial(map_sequentially, f),
        default=functools.partial(_map_stacks, f),
    )


def wait_for_steps(steps: Array, tree: Any) -> Any:
    """`tree`, whose leaves a CPU computes after `steps`, and a GPU if they are single matrices.

    Then two sets of steps share their temporaries. A GPU would write stacks out for it: the update of `gum`,
    scanned layers, would hold 0.39 of the gradients on an H200 in place of 0.28.
    """

    def later(x):
        return wait_for(steps, x) if math.prod(x.shape[:-2]) == 1 else depend_on(x, steps)

    return jax.tree.map(later, tree)


def map_matrices(f: Callable[[Array], Array], tree: Any) -> Any:
    """`map_sequentially` of a function of stacks of matrices; on a GPU a few leaves go through it at once.

    A GPU writes a single matrix out before it waits for its turn: it may be a momentum, which takes up its
    gradient so. Otherwise the sum waits too, and all gradients stay in memory until then.
    """

    def on_gpu(tree):
        def written(x):
            return jax.lax.optimization_barrier(x) if math.prod(x.shape[:-2]) == 1 else x

        return _map_pieces(f, _SHARE, jax.tree.map(written, tree))

    return jax.lax.platform_dependent(tree, cuda=on_gpu, default=functools.partial(map_sequentially, f))


def map_lean(f: Callable[[Sequence[Array]], list[Array]], tree: Any) -> Any:
    """Each leaf through a function of several stacks that makes no others; on a GPU a few leaves at once.

    The large stacks of a GPU go through `f` together: they hold the gradients of scanned layers, which the
    backward pass makes together.
    """

    def one(x):
        return f([x])[0]

    def on_gpu(tree):
        leaves = jax.tree.leaves(tree)
        least = _SHARE * sum(x.size for x in leaves)
        are_large = [math.prod(x.shape[:-2]) > 1 and x.size > least for x in leaves]
        large, rest = split(tree, are_large)
        done = jax.tree.structure(large).unflatten(f(jax.tree.leaves(large)) if any(are_large) else [])
        return merge(done, _map_pieces(one, _SHARE_OF_LEAN, rest))

    return jax.lax.platform_dependent(tree, cuda=on_gpu, default=functools.partial(jax.tree.map, one))


def map_together(f: Callable[..., Array], *columns: Sequence[Array]) -> list[Array]:
    """`map` of a function that treats every number by itself, in one kernel of a GPU."""
    shapes = [x.shape for x in columns[0]]
    if len(shapes) == 1:
        return [f(*(x for (x,) in columns))]
    flat = f(*(jnp.concatenate([x.ravel() for x in arrays]) for arrays in columns))
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(jnp.split(flat, ends[:-1]), shapes, strict=True)]


# How many arrays of one shape a kernel of a GPU reduces over their columns. Given three, XLA would first
# write out what is reduced (`findings/xla_gpu_variadic_reduce.sh`): the temporaries of `sinkgd`, scanned
# layers, would be 0.25 of the gradients on an H200. Over their rows it reduces any number at once.
_COLUMNS_AT_ONCE = 2


def reduce_together(
    f: Callable[[Any, Any], Array], arrays: Sequence[Float[Array, "..."]], axis: int
) -> list[Float[Array, "..."]]:
    """Arrays of numbers of at least 0, each reduced by `f` over an axis, which is kept.

    Args:
      f: `jax.lax.add` or `jax.lax.max`.
      arrays: those of one shape are reduced together, in one kernel of a GPU.
      axis: -1 or -2.
    """

    def reduced(xs):
        axes = (xs[0].ndim + axis,)
        if len(xs) == 1:  # a sum that XLA knows, which a sum of a list is not
            return [jax.lax.reduce(xs[0], jnp.float32(0), f, axes)]
        return jax.lax.reduce(xs, [jnp.float32(0)] * len(xs), lambda a, b: list(map(f, a, b)), axes)

    results = list(arrays)
    for of_shape in _grouped([x.shape for x in arrays]):
        for some in cut(of_shape, len(of_shape) if axis == -1 else _COLUMNS_AT_ONCE):
            for i, x in zip(some, reduced([arrays[i] for i in some]), strict=True):
                results[i] = jnp.expand_dims(x, axis)
    return results


def _map_stacks(f: Callable[[Array], Array], tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    groups = same_shape_groups(leaves, [(x.shape, x.dtype) for x in leaves])
    several = [[leaves[leaf_index] for leaf_index in leaf_indices] for leaf_indices in groups]
    results = map_sequentially(f, [jnp.stack(xs) if len(xs) > 1 else xs[0] for xs in several])
    for leaf_indices, result in zip(groups, results, strict=True):
        rows = unstacked(result) if len(leaf_indices) > 1 else [(result,)]
        for leaf_index, (x,) in zip(leaf_indices, rows, strict=True):
            leaves[leaf_index] = x
    return treedef.unflatten(leaves)


def _map_pieces(f: Callable[[Array], Array], share: float, tree: Any) -> Any:
    """Leaves whose matrices have one shape go through `f` together, up to a share of all numbers at once.

    Each piece waits for the one before, as in `map_sequentially`. Without that, a training step of `sinkgd`,
    12 layers of width 256, needs temporaries of 1.10 of the gradients on an H200, with it 0.57.
    """
    leaves, treedef = jax.tree.flatten(tree)
    most = share * sum(x.size for x in leaves)
    pieces: dict[Hashable, list[list[int]]] = {}
    for leaf_index, x in enumerate(leaves):
        of_shape = pieces.setdefault((*x.shape[-2:], x.dtype), [[]])
        if sum(leaves[i].size for i in of_shape[-1]) + x.size > most and of_shape[-1]:
            of_shape.append([])
        of_shape[-1].append(leaf_index)
    # The backward pass begins with the last layers.
    before = None
    for piece in reversed([piece for of_shape in pieces.values() for piece in of_shape]):
        parts = [leaves[i] if before is None else after(leaves[i], before) for i in piece]
        before, start = f(_concatenated(parts)), 0
        for i in piece:
            blocks = math.prod(leaves[i].shape[:-2])
            part = before[start : start + blocks] if len(piece) > 1 else before
            leaves[i], start = part.reshape(leaves[i].shape), start + blocks
    return treedef.unflatten(leaves)


def _concatenated(leaves: Sequence[Array]) -> Array:
    """The matrices of several leaves as one stack; one leaf as it is."""
    if len(leaves) == 1:
        return leaves[0]
    return jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in leaves])
