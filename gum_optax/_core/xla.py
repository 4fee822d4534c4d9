"""What is done for the compiler's sake: the order of results, loops and branches, opaque constants.

Each function returns what the plain code returns. The table has figures with each function and without it: of
jax 0.10.2 on a CPU, the matrices of twelve decoder layers of width 512 as separate leaves (eight layers for a
whole training step), the optimizers of `benchmarks/memory.py`.

| function | what was measured | with | without |
|---|---|---|---|
| `map_in_turn`, by `after` | temporaries of `muon` over the gradients | 0.00 | 0.57 |
| | temporaries of a training step of `muon` over AdamW's | 1.00 | 2.04 |
| `after` in the refresh | temporaries of `sumo` over the gradients, stacked leaves | 0.23 | 0.30 |
| `in_one`, by `always` | temporaries of a training step of `sinkgd` over AdamW's | 1.59 | 2.18 |
| `rolled_but_on_tpu`, by `companions` | s to compile `galore_muon`: the loop of the refresh | 5.9 | 30.7 |
| | s to compile `gum`, a third of the blocks sampled: the loop over slots | 11.8 | 15.3 |
| `map_together`, by `companions` | s to compile `galore_muon` | 5.9 | 8.9 |
| `unknown`, by `unstacked` | s to compile `galore_muon` | 5.9 | 10.3 |

`one_by_one_on_cpu` avoids a hang. `tests/test_budgets.py` holds the temporaries.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _zero(x: Array) -> Array:
    """A zero that hangs on `x`; NaN and infinity give zero too."""
    zero = x[(0,) * x.ndim] * 0
    return jnp.where(jnp.isnan(zero), 0, zero)


@jax.jit  # traced once for all leaves of a shape
def after(x: Array, result: Array) -> Array:
    """`x`, which on a CPU is not there before `result`."""

    def waiting(x, result):
        return x + _zero(result).astype(x.dtype)

    return jax.lax.platform_dependent(x, result, cpu=waiting, default=lambda x, _: x)


def always(x: Array) -> Array:
    """True, which XLA does not know: of a number of `x`."""
    number = x[(0,) * x.ndim]
    return (number >= 0) | (number < 0) | jnp.isnan(number)


def in_one(f: Callable[..., Any], once: Array, *operands: Any) -> Any:
    """`f(*operands)`, on a CPU one instruction, after which operands that it alone reads are free.

    XLA's CPU scheduler goes breadth first, and so makes gradients much faster than a chain of instructions
    uses them up. A conditional is one instruction, out of which XLA moves nothing, as it does out of a loop.
    Elsewhere it would keep results from being fused into what reads them.

    Args:
      f: the function.
      once: true, which XLA must not know.
      operands: of `f`.
    """

    def never(*operands):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *operands))

    def branched(once, *operands):
        return jax.lax.cond(once, f, never, *operands)

    def plain(once, *operands):
        del once
        return f(*operands)

    return jax.lax.platform_dependent(once, *operands, cpu=branched, default=plain)


def map_in_turn(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map` in which each leaf waits for the result of the one before, small ones first.

    Of a result with several arrays, it waits for the first.

    Full-size results are then made, used and forgotten one at a time, the largest in the room of the smaller
    gradients, which a training step no longer needs by then. Left alone, XLA's CPU scheduler makes
    all of them first, for concurrency, which needs temporaries of all gradients' size; and it drops
    `optimization_barrier` before it schedules: the order has to be in the data. The last operand, which
    should be the smallest, carries it. On a TPU, whose scheduler saves memory by itself, the order would
    only keep the result from being fused into what reads it.
    """
    leaves, treedef = jax.tree.flatten(tree)
    rows = list(zip(leaves, *(treedef.flatten_up_to(other) for other in others), strict=True))
    results: dict[int, Any] = {}
    before = None
    for place, (*operands, last) in sorted(enumerate(rows), key=lambda row: row[1][-1].size):
        results[place] = f(*operands, last if before is None else after(last, before))
        first = jax.tree.leaves(results[place])[0]
        before = first if first.size else before  # an empty one has no number to wait for
    return treedef.unflatten([results[place] for place in range(len(rows))])


def rolled_but_on_tpu(rolled: Callable[..., Any], unrolled: Callable[..., Any], *operands: Any) -> Any:
    """One of two ways to the same result: a loop over leaves, or the same once for each.

    A loop compiles once, however many layers there are. On a TPU, XLA moves each leaf's conversion to
    bfloat16, for the products, out of the loop, and holds all of them; unrolled, it holds one.
    """
    return jax.lax.platform_dependent(*operands, tpu=unrolled, default=rolled)


def unknown(numbers: Iterable[int], at: Array) -> Sequence[Array | np.uint32]:
    """The numbers, on a CPU as values of which XLA does not know that they are constants.

    XLA's CPU backend compiles equal kernels once, and slices at different constant places are not equal.
    Measured, 100 slices: 14 ms each, and 1 ms each at places that come from either of two equal branches.

    Args:
      numbers: none is negative; the results are unsigned, so that nobody asks whether they are.
      at: any computed scalar, to choose by.
    """
    constants = [np.uint32(number) for number in numbers]

    def chosen(at):
        return jax.lax.cond(at > 0, lambda: constants, lambda: constants)

    return jax.lax.platform_dependent(at, cpu=chosen, default=lambda _: constants)


def unstacked(*stacks: Array) -> list[tuple[Array, ...]]:
    """The rows of arrays that are as long as each other, together: `zip(*stacks)`."""
    first = stacks[0]
    places = unknown(range(len(first)), first[(0,) * first.ndim])
    return [
        tuple(jax.lax.dynamic_index_in_dim(stack, place, keepdims=False) for stack in stacks)
        for place in places
    ]


def companions(leaves: Sequence[Any], kinds: Sequence[Hashable]) -> list[list[int]]:
    """The places of leaves that go together: single matrices of one kind; a stack goes alone."""
    groups: dict[Hashable, list[int]] = {}
    for place, (x, kind) in enumerate(zip(leaves, kinds, strict=True)):
        alone = math.prod(x.shape[:-2]) == 1
        groups.setdefault(kind if alone else place, []).append(place)
    return list(groups.values())


def map_together(f: Callable[[Array], Array], tree: Any) -> Any:
    """`jax.tree.map` of a function of stacks of matrices, single matrices of one shape going as a stack.

    XLA then compiles the function once for all of them, and holds them all: for small leaves.
    """
    return rolled_but_on_tpu(functools.partial(_map_stacks, f), functools.partial(map_in_turn, f), tree)


def _map_stacks(f: Callable[[Array], Array], tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    groups = companions(leaves, [(x.shape, x.dtype) for x in leaves])
    several = [[leaves[place] for place in places] for places in groups]
    results = map_in_turn(f, [jnp.stack(xs) if len(xs) > 1 else xs[0] for xs in several])
    for places, result in zip(groups, results, strict=True):
        rows = unstacked(result) if len(places) > 1 else [(result,)]
        for place, (x,) in zip(places, rows, strict=True):
            leaves[place] = x
    return treedef.unflatten(leaves)


def one_by_one_on_cpu(f: Callable[[Array], Array], x: Float[Array, "*b m n"]) -> Float[Array, "*b i j"]:
    """`f(x)`, where `f` is a function of stacks that calls LAPACK; a CPU calls it for one matrix at a time.

    jaxlib 0.10.0 to 0.11 splits the stack of one LAPACK call over the threads on which XLA's kernels run,
    and waits for the parts on one of those threads. If all threads wait, none is left to work, and the
    program hangs: eight host devices share eight threads and make each call together. A stack of one matrix
    is not split, and later versions loop over the stack themselves.
    """
    *batch, m, n = x.shape
    if math.prod(batch) <= 1:
        return f(x)

    def mapped(x):
        results = jax.lax.map(f, x.reshape(-1, m, n))
        return results.reshape(*batch, *results.shape[1:])

    return jax.lax.platform_dependent(x, cpu=mapped, default=f)
