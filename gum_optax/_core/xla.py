"""What is done for the compiler's sake: the order of results, loops and branches, opaque constants.

Each function returns what the plain code returns; those that map leaves are in `batches.py`. The table shows
what each function saves, measured with jax 0.10.2 on a CPU: the matrices of twelve decoder layers of width
512 as separate leaves (eight layers for a whole training step), with the optimizers of
`benchmarks/memory.py`.

| function | what was measured | with | without |
|---|---|---|---|
| `map_sequentially`, by `depend_on` | temporaries of `muon` over the gradients | 0.00 | 0.57 |
| | temporaries of a training step of `muon` over AdamW's | 1.00 | 2.04 |
| `in_one` | temporaries of a training step of `sinkgd` over AdamW's | 1.59 | 2.18 |
| `rolled_but_on_tpu` | s to compile `gum`, a third of the blocks sampled: the loop over slots | 11.8 | 15.3 |
| `map_in_place` | temporaries of `muon`, scanned layers, gradients kept | 0.45 | 1.23 |
| | the same on a TPU, in training | 0.00 | 0.45 |
| `map_in_place`, `repeat` | kernels of `muon` on an H200, scanned layers | 486 | 3657 |
| `map_matrices` | kernels of `muon` on an H200, separate layers | 1224 | 3723 |
| | temporaries of a training step of `muon` there, eight layers of width 2048 | 0.38 | 1.25 |
| `map_lean` | kernels of `sinkgd` on an H200, separate layers | 496 | 3196 |
| `map_lean`, `map_together`, `reduce_together` | the same, scanned layers | 78 | 194 |
| `barrier_but_on_cpu` | temporaries of a training step of `muon` over AdamW's, jax 0.12.0 | 1.00 | 1.29 |
| `barrier_on_tpu` | temporaries of `gum` layer by layer, bfloat16, a TPU, width 2048 | 0.19 | 0.32 |
| `add_product` | temporaries of `sumo` on an H200, scanned layers | 0.22 | 0.38 |
| `wait_for` | temporaries of `gum` on an H200, scanned layers | 0.28 | 0.33 |
| | temporaries of a training step of `gum`, eight layers of width 2048 | 0.41 | 1.27 |
| | the same on an H200 | 1.36 | 1.48 |
| `if_needed` | conditionals of `sumo` on an H200, separate layers | 1 | 85 |
| `map_batched`, `same_shape_groups` | s to compile `galore_muon` | 5.9 | 8.9 |
| `opaque_constants`, by `unstacked` | s to compile `galore_muon` | 5.9 | 10.3 |

`one_by_one_on_cpu` avoids a hang. `tests/test_budgets.py` holds the temporaries. What a row lacks is
explained at its function.
"""

import math
from collections.abc import Callable, Iterable, Sequence
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


def after(x: Array, result: Array) -> Array:
    """`x`, computed after `result`: the order is in the data."""
    return x + _zero(result).astype(x.dtype)


@jax.jit  # traced once for all leaves of a shape
def depend_on(x: Array, result: Array) -> Array:
    """`x`, which a CPU computes only after `result`."""
    return jax.lax.platform_dependent(x, result, cpu=after, default=lambda x, _: x)


def wait_for(result: Any, operands: Any) -> Any:
    """`operands`, which a GPU reads, and of which a CPU reads the last, only after `result` is computed.

    XLA's GPU scheduler keeps `optimization_barrier`; that of a CPU drops it before jax 0.12, and so the order
    is in the data there: the last operand should be the smallest. The barrier has a whole result written,
    where data would let it be fused into what reads it. A TPU's scheduler finds its own order.
    """

    def on_cpu(result, operands):
        (*others, last), treedef = jax.tree.flatten(operands)
        return treedef.unflatten([*others, after(last, jax.tree.leaves(result)[0])])

    return jax.lax.platform_dependent(
        result,
        operands,
        cpu=on_cpu,
        cuda=lambda *both: jax.lax.optimization_barrier(both)[1],
        default=lambda _, operands: operands,
    )


def barrier_but_on_cpu(x: Any) -> Any:
    """An array or a tree of them: all are computed before any is read, and no reader is fused into them.

    From jax 0.12 on, a CPU keeps the barrier in its schedule as an instruction. There a gradient would be
    used one instruction later, when the backward pass has made one more.
    """
    return jax.lax.platform_dependent(x, cpu=lambda x: x, default=jax.lax.optimization_barrier)


def barrier_on_tpu(x: Any) -> Any:
    """An array or a tree of them: a TPU computes all before it reads any, and fuses no reader into them."""
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)


def add_product(
    g: Float[Array, "*b m n"], p: Float[Array, "*b m r"], x: Float[Array, "*b r n"]
) -> Float[Array, "*b m n"]:
    """`G + P X`, on a GPU in the memory of `G`.

    For stacks that are stored transposed, XLA's GPU compiler writes out `P X` and its sum with `G`, but adds
    `Xᵀ Pᵀ` as it goes. Single matrices it adds in place in the plain form alone.
    """

    def transposed(g, p, x):
        return (g.mT + x.mT @ p.mT).mT

    def plain(g, p, x):
        return g + p @ x

    if math.prod(g.shape[:-2]) <= 1:
        return plain(g, p, x)
    return jax.lax.platform_dependent(g, p, x, cuda=transposed, default=plain)


def in_one(f: Callable[..., Any], *operands: Any) -> Any:
    """`f(*operands)` as one instruction on a CPU, which frees the operands that nothing else reads.

    XLA's CPU scheduler goes breadth first: it computes gradients much faster than a chain of instructions
    uses them up. A conditional is one instruction, and XLA moves nothing out of it, as it would out of a
    loop. On other devices a conditional would keep its results from being fused into what reads them.
    """

    def never(*operands):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *operands))

    def branched(*operands):
        # The barrier hides from XLA that the condition always holds.
        return jax.lax.cond(jax.lax.optimization_barrier(True), f, never, *operands)

    return jax.lax.platform_dependent(*operands, cpu=branched, default=f)


def if_needed(is_needed: Array, f: Callable[..., Any], *operands: Any) -> Any:
    """`f(*operands)` if it is needed, else the last operand; each is an array or a tree of them.

    Where it is not needed, `f` must return its last operand too: a GPU, which may wait for the host at each
    conditional, always calls it.
    """

    def chosen(*operands):
        return jax.lax.cond(is_needed, f, lambda *operands: operands[-1], *operands)

    return jax.lax.platform_dependent(*operands, cuda=f, default=chosen)


def rolled_but_on_tpu(rolled: Callable[..., Any], unrolled: Callable[..., Any], *operands: Any) -> Any:
    """The same result by a loop over leaves, or, on a TPU, by a copy of the code for each leaf.

    A loop compiles once, however many layers there are. On a TPU, XLA moves the conversion of each leaf to
    bfloat16, which products need, out of the loop, and holds all converted leaves; unrolled code holds one.
    """
    return jax.lax.platform_dependent(*operands, tpu=unrolled, default=rolled)


def repeat(step: Callable[[Any, Any], Any], x: Any, rows: Any) -> Any:
    """`x`, an array or a tree of them, after `step(x, row)` for each row: by a loop, whose iterations share
    their buffers.

    On a GPU a stack takes no loop, which would launch kernels that count and cut out the rows. A
    single matrix keeps it: without loops XLA orders the steps of separate leaves so that most of them are in
    memory at once (a whole training step of `muon`, 12 layers of width 256: 2.04 of the gradients for 1.09).
    """

    def looped(x):
        return jax.lax.scan(lambda x, row: (step(x, row), None), x, rows)[0]

    def unrolled(x):
        for i in range(len(jax.tree.leaves(rows)[0])):
            x = step(x, jax.tree.map(lambda row, i=i: row[i], rows))
        return x

    if all(math.prod(leaf.shape[:-2]) <= 1 for leaf in jax.tree.leaves(x)):
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
    if not len(first):
        return []
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
