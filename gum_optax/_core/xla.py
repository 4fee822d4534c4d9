"""What is done for the compiler's sake: the order of results, loops and branches, opaque constants.

Each function returns what the plain code returns. The table shows what each function saves, measured with jax
0.10.2 on a CPU: the matrices of twelve decoder layers of width 512 as separate leaves (eight layers for a
whole training step), with the optimizers of `benchmarks/memory.py`.

| function | what was measured | with | without |
|---|---|---|---|
| `map_sequentially`, by `depend_on` | temporaries of `muon` over the gradients | 0.00 | 0.57 |
| | temporaries of a training step of `muon` over AdamW's | 1.00 | 2.04 |
| `in_one` | temporaries of a training step of `sinkgd` over AdamW's | 1.59 | 2.18 |
| `rolled_but_on_tpu` | s to compile `gum`, a third of the blocks sampled: the loop over slots | 11.8 | 15.3 |
| `map_in_place` | temporaries of `muon`, scanned layers, gradients kept | 0.45 | 1.23 |
| | the same on a TPU, in training | 0.00 | 0.45 |
| `map_in_place`, `repeat` | kernels of `muon` on an H200, scanned layers | 486 | 3657 |
| `map_matrices` | kernels of `muon` on an H200, separate layers | 1197 | 3723 |
| `map_batched`, `same_shape_groups` | s to compile `galore_muon` | 5.9 | 8.9 |
| `opaque_constants`, by `unstacked` | s to compile `galore_muon` | 5.9 | 10.3 |

`one_by_one_on_cpu` avoids a hang. `tests/test_budgets.py` holds the temporaries.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def _zero(x: Array) -> Array:
    """A zero that depends on `x`; NaN and infinity give zero too."""
    zero = x[(0,) * x.ndim] * 0
    return jnp.where(jnp.isnan(zero), 0, zero)


@jax.jit  # traced once for all leaves of a shape
def depend_on(x: Array, result: Array) -> Array:
    """`x`, which a CPU computes only after `result`."""

    def waiting(x, result):
        return x + _zero(result).astype(x.dtype)

    return jax.lax.platform_dependent(x, result, cpu=waiting, default=lambda x, _: x)


def in_one(f: Callable[..., Any], *operands: Any) -> Any:
    """`f(*operands)` as one instruction on a CPU, which frees the operands that nothing else reads.

    XLA's CPU scheduler goes breadth first: it computes gradients much faster than a chain of instructions
    uses them up. A conditional is one instruction, and XLA moves nothing out of it, as it would out of a
    loop. On other devices a conditional would keep its results from being fused into what reads them.

    Args:
      f: the function.
      operands: the arguments of `f`.
    """

    def never(*operands):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *operands))

    def branched(*operands):
        # The barrier hides from XLA that the condition always holds.
        return jax.lax.cond(jax.lax.optimization_barrier(True), f, never, *operands)

    return jax.lax.platform_dependent(*operands, cpu=branched, default=f)


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


def rolled_but_on_tpu(rolled: Callable[..., Any], unrolled: Callable[..., Any], *operands: Any) -> Any:
    """The same result by a loop over leaves, or, on a TPU, by a copy of the code for each leaf.

    A loop compiles once, however many layers there are. On a TPU, XLA moves the conversion of each leaf to
    bfloat16, which products need, out of the loop, and holds all converted leaves; unrolled code holds one.
    """
    return jax.lax.platform_dependent(*operands, tpu=unrolled, default=rolled)


# On a GPU so many matrices, or half a stack if that is more, go through a function at once.
_AT_ONCE = 6
# On a GPU leaves of up to this share of all numbers go through a function at once. Measured on an H200's
# compiler, twelve layers of width 512: two of the largest leaves, or five of the others.
_SHARE = 1 / 26
# The same for small leaves, which a CPU takes all at once: all coordinates of the attention's leaves, and one
# leaf of the others.
_SHARE_OF_SMALL = 1 / 3


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

        size = min(max(len(stack) // 2, _AT_ONCE), len(stack))
        turns, left = divmod(len(stack), size)
        stack = jax.lax.fori_loop(0, turns, step, stack)
        return stack.at[-left:].set(f(stack[-left:]).astype(stack.dtype)) if left else stack

    return jax.lax.platform_dependent(stack, cuda=in_halves, default=one_by_one)


def repeat(step: Callable[[Array, Any], Array], x: Array, rows: Any) -> Array:
    """`x` after `step(x, row)` for each row: by a loop, whose turns share their buffers.

    On a GPU a stack takes no loop, which would launch kernels that count the turns and cut out the rows. A
    single matrix keeps it: without loops XLA orders the steps of separate leaves so that most of them are in
    memory at once (a whole training step of `muon`, 12 layers of width 256: 2.04 of the gradients for 1.09).
    """

    def looped(x):
        return jax.lax.scan(lambda x, row: (step(x, row), None), x, rows)[0]

    def unrolled(x):
        for i in range(len(jax.tree.leaves(rows)[0])):
            x = step(x, jax.tree.map(lambda row, i=i: row[i], rows))
        return x

    if math.prod(x.shape[:-2]) <= 1:
        return looped(x)
    return jax.lax.platform_dependent(x, cuda=unrolled, default=looped)


def opaque_constants(numbers: Iterable[int], at: Array) -> Sequence[Array | np.uint32]:
    """The numbers, hidden from XLA on a CPU, which then does not know that they are constants.

    XLA's CPU backend compiles equal kernels once, and slices at different constant indices are not equal.
    Measured with 100 slices: 14 ms each, and 1 ms each where the indices come from one of two equal branches.

    Args:
      numbers: not negative. The results are unsigned, so that no code checks their sign.
      at: any computed scalar, which chooses the branch.
    """
    constants = [np.uint32(number) for number in numbers]

    def chosen(at):
        return jax.lax.cond(at > 0, lambda: constants, lambda: constants)

    return jax.lax.platform_dependent(at, cpu=chosen, default=lambda _: constants)


def unstacked(*stacks: Array) -> list[tuple[Array, ...]]:
    """The rows of arrays of equal length, as `zip(*stacks)` has them."""
    first = stacks[0]
    indices = opaque_constants(range(len(first)), first[(0,) * first.ndim])
    return [
        tuple(jax.lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in stacks)
        for index in indices
    ]


def row_major(tree: Any) -> Any:
    """The arrays with their last axis contiguous.

    Without this, XLA gives a row of a stack the layout in which a product reads or makes it, and the whole
    stack with it: it would copy the stack.
    """

    def of(x):
        return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if x.ndim > 1 else x

    return jax.tree.map(of, tree)


def stacks_in_place(tree: Any) -> Any:
    """Stacks that a loop carries, in the layout that they have as arguments of the program.

    A TPU keeps it by itself, and it is not always row-major there: it depends on the padding.
    """
    return jax.lax.platform_dependent(tree, tpu=lambda tree: tree, default=row_major)


def same_shape_groups(leaves: Sequence[Any], kinds: Sequence[Hashable]) -> list[list[int]]:
    """The indices of leaves in groups: single matrices of one kind are a group, a stack is one by itself."""
    groups: dict[Hashable, list[int]] = {}
    for leaf_index, (x, kind) in enumerate(zip(leaves, kinds, strict=True)):
        alone = math.prod(x.shape[:-2]) == 1
        groups.setdefault(kind if alone else leaf_index, []).append(leaf_index)
    return list(groups.values())


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


def map_matrices(f: Callable[[Array], Array], tree: Any) -> Any:
    """`map_sequentially` of a function of stacks of matrices; on a GPU a few leaves go through it at once."""
    return jax.lax.platform_dependent(
        tree, cuda=functools.partial(_map_pieces, f, _SHARE), default=functools.partial(map_sequentially, f)
    )


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
    """Leaves whose matrices have one shape go through `f` together, up to a share of all numbers at once."""
    leaves, treedef = jax.tree.flatten(tree)
    most = share * sum(x.size for x in leaves)
    pieces: dict[Hashable, list[list[int]]] = {}
    for leaf_index, x in enumerate(leaves):
        of_shape = pieces.setdefault((*x.shape[-2:], x.dtype), [[]])
        if sum(leaves[i].size for i in of_shape[-1]) + x.size > most and of_shape[-1]:
            of_shape.append([])
        of_shape[-1].append(leaf_index)
    in_order = [piece for of_shape in pieces.values() for piece in of_shape]
    together = [_concatenated([leaves[i] for i in piece]) for piece in in_order]
    for piece, result in zip(in_order, map_sequentially(f, together), strict=True):
        start = 0
        for i in piece:
            blocks = math.prod(leaves[i].shape[:-2])
            part = result[start : start + blocks] if len(piece) > 1 else result
            leaves[i], start = part.reshape(leaves[i].shape), start + blocks
    return treedef.unflatten(leaves)


def _concatenated(leaves: Sequence[Array]) -> Array:
    """The matrices of several leaves as one stack; one leaf as it is."""
    if len(leaves) == 1:
        return leaves[0]
    return jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in leaves])


def one_by_one_on_cpu(f: Callable[[Array], Array], x: Float[Array, "*b m n"]) -> Float[Array, "*b i j"]:
    """`f(x)`, where `f` is a function of stacks that calls LAPACK; a CPU calls it for one matrix at a time.

    jaxlib 0.10.0 to 0.11 splits the stack of one LAPACK call over the threads on which XLA's kernels run,
    and waits for the parts on one of those threads. If all threads wait, none is left to work, and the
    program hangs: eight host devices share eight threads and make each call together. jaxlib does not split
    a stack of one matrix, and later versions loop over the stack themselves.
    """
    *batch, m, n = x.shape
    if math.prod(batch) <= 1:
        return f(x)

    def mapped(x):
        results = jax.lax.map(f, x.reshape(-1, m, n))
        return results.reshape(*batch, *results.shape[1:])

    return jax.lax.platform_dependent(x, cpu=mapped, default=f)
