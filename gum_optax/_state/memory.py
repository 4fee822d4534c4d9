"""Computes from shapes alone what an optimizer holds in memory."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_arrays, check_rule
from .._matrices.dimension_numbers import leaf_names

# State that belongs to no single leaf: GUM's slots, and bookkeeping such as counts and keys.
_SLOTS, _BOOKKEEPING = "slots", "bookkeeping"


class LeafMemory(NamedTuple):
    """A row of `memory_report`, in bytes.

    Examples:
      >>> report = gum_optax.memory_report(gum_optax.galore(1e-3, rank=2), {"kernel": jnp.ones((4, 8))})
      >>> report.leaves[0].name, report.leaves[0].parameters, report.leaves[0].state
      ('kernel', 128, {'projectors': 32, 'mu': 64, 'nu': 64})
    """

    name: str  # the leaf's path, "layers/0/kernel", or a name for shared state
    shape: tuple[int, ...]  # the shape of the parameter, () for shared state
    parameters: int
    gradients: int
    state: dict[str, int]  # by kind: "trace", "mu", "projectors", "slots", ...


class MemoryReport(NamedTuple):
    """Bytes per leaf and in total; `str()` is a table.

    Examples:
      >>> report = gum_optax.memory_report(optax.adamw(1e-3), {"kernel": jnp.ones((4, 8))})
      >>> report.parameters, report.gradients, report.state, report.total  # bytes
      (128, 128, {'mu': 128, 'nu': 128, 'bookkeeping': 4}, 516)
    """

    leaves: tuple[LeafMemory, ...]
    temporaries: (
        int | None
    )  # temporaries of a donated update and apply, gradients excluded; None: not compiled

    @property
    def parameters(self) -> int:
        return sum(leaf.parameters for leaf in self.leaves)

    @property
    def gradients(self) -> int:
        return sum(leaf.gradients for leaf in self.leaves)

    @property
    def state(self) -> dict[str, int]:
        """State by kind, over all leaves."""
        total: dict[str, int] = {}
        for leaf in self.leaves:
            for kind, size in leaf.state.items():
                total[kind] = total.get(kind, 0) + size
        return total

    @property
    def total(self) -> int:
        """Parameters, gradients, state and, if compiled, temporaries."""
        return self.parameters + self.gradients + sum(self.state.values()) + (self.temporaries or 0)

    def __str__(self) -> str:
        kinds = list(self.state)
        heads = ["leaf", "shape", "parameters", "gradients", *kinds]
        lines = [heads]
        for leaf in self.leaves:
            sizes = [leaf.parameters, leaf.gradients, *(leaf.state.get(kind, 0) for kind in kinds)]
            shape = "×".join(map(str, leaf.shape)) or "-"
            lines.append([leaf.name, shape, *map(mib, sizes)])
        totals = [self.parameters, self.gradients, *self.state.values()]
        lines.append(["total (MiB)", "", *map(mib, totals)])
        return f"{aligned(lines)}\n{self._summary()}"

    def _summary(self) -> str:
        state, temporaries = sum(self.state.values()), self.temporaries
        shown = "not compiled (compiled=True adds them)" if temporaries is None else f"{mib(temporaries)} MiB"
        return f"state {mib(state)} MiB, temporaries {shown}, in all {mib(self.total)} MiB"


def mib(size: int) -> str:
    """A number of bytes in MiB, as text."""
    return "-" if not size else f"{size / 2**20:.1f}" if size >= 2**16 else f"{size / 2**20:.4f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text with aligned columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines)


def memory_report(
    tx: optax.GradientTransformation,
    params: Any,
    *,
    gradient_dtype: Any = None,
    compiled: Any = False,
    keep_gradients: bool = False,
) -> MemoryReport:
    """Report what a model and its optimizer hold, leaf by leaf: parameters, gradients, and the state by kind.

    All figures but temporaries come from `jax.eval_shape`, so a laptop can plan a model of 70B parameters. A
    state array belongs to the parameter whose path ends the array's path. The report lists all other state
    (counts, keys, GUM's slots) after the parameters.

    Args:
      tx: any optax optimizer.
      params: a tree of arrays or of `jax.ShapeDtypeStruct`s.
      gradient_dtype: the dtype of the gradients; by default that of each parameter.
      compiled: whether to compile a donated update and apply, and report its temporaries. True compiles for
        the default backend; a device compiles for that device, which may be one of a topology that is not
        present (`jax.experimental.topologies`).
      keep_gradients: whether the gradients of the compiled step are arguments that the step may not
        overwrite. By default the step computes its gradients itself, as a training step does.

    Returns:
      A `MemoryReport`; print it.

    Raises:
      TypeError: `tx` is not an `optax.GradientTransformation`.

    Examples:
      >>> params = {"layers": {"kernel": jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16)}}
      >>> print(gum_optax.memory_report(gum_optax.gum(1e-3), params))
               leaf          shape  parameters  gradients  projectors   trace  bookkeeping   slots
      layers/kernel  80×8192×28672     35840.0    35840.0       320.0  1120.0            -       -
        bookkeeping              -           -          -           -       -       0.0000       -
              slots              -           -          -           -       -            -  4480.0
        total (MiB)                    35840.0    35840.0       320.0  1120.0       0.0000  4480.0
      state 5920.0 MiB, temporaries not compiled (compiled=True adds them), in all 77600.0 MiB
    """
    check_rule("tx", tx)
    check_arrays("params", params)
    shapes = jax.eval_shape(lambda tree: jax.tree.map(jnp.asarray, tree), params)
    gradients = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype if gradient_dtype is None else gradient_dtype), shapes
    )
    state = jax.eval_shape(tx.init, shapes)
    owned: dict[tuple[str, ...], LeafMemory] = {}
    for names, leaf, g in zip(
        leaf_names(shapes), jax.tree.leaves(shapes), jax.tree.leaves(gradients), strict=True
    ):
        owned[names] = LeafMemory(
            "/".join(names) or "(the only leaf)", leaf.shape, _bytes(leaf), _bytes(g), {}
        )
    shared: dict[str, int] = {}
    paths = jax.tree_util.tree_leaves_with_path(state)
    for names, (path, leaf) in zip(leaf_names(state), paths, strict=True):
        owner, start = _owner(names, owned)
        if owner is None or _SLOTS in names:
            kinds, kind = shared, _SLOTS if _SLOTS in names else _BOOKKEEPING
        else:
            kinds, kind = owner.state, _last_field(path[:start])
        kinds[kind] = kinds.get(kind, 0) + _bytes(leaf)
    rest = tuple(LeafMemory(kind, (), 0, 0, {kind: size}) for kind, size in shared.items())
    device = None if isinstance(compiled, bool) else compiled
    temporaries = None
    if compiled:
        temporaries = _temporaries(tx, device, shapes, state, gradients, keep_gradients=keep_gradients)
    return MemoryReport((*owned.values(), *rest), temporaries)


def _owner(names: tuple[str, ...], owned: dict[tuple[str, ...], LeafMemory]) -> tuple[LeafMemory | None, int]:
    """The parameter whose path ends a path of the state, and the index at which the parameter's path begins.

    For a part of a kernel, a number follows the parameter's path.
    """
    ends = [names, names[:-1]] if names and names[-1].isdigit() else [names]
    owners = ((owned[end[i:]], i) for end in ends for i in range(len(end) + 1) if end[i:] in owned)
    return next(owners, (None, 0))


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _last_field(path: Any) -> str:
    """The last field on the path to a leaf of the state, which is optax's own name for the leaf."""
    fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return fields[-1] if fields else "state"


# Rows of the products that stand for a backward pass. XLA would turn a product with one row into a sum.
_TOKENS = 8


def _made_within(gradients: optax.Updates) -> optax.Updates:
    """Recompute the gradients inside the step: XLA then has to hold them, and may overwrite them."""

    def products(tree):
        def product(g):
            rows = g.reshape(-1, *g.shape[-1:])[:_TOKENS]
            return g[..., : len(rows)] @ rows[: g.shape[-1]]

        return jax.lax.optimization_barrier(jax.tree.map(lambda g: product(g) if g.ndim else g + 1, tree))

    def either(tree):
        # Use a branch on CPUs, because they have no products in bfloat16 and would hold wider ones. Use
        # products elsewhere, because on a TPU a branch copies.
        which = jnp.asarray(sum(map(jnp.sum, jax.tree.leaves(tree)))) > 0
        branches = (functools.partial(jax.tree.map, lambda g, x=x: g + x) for x in (1, 2))
        return jax.lax.cond(which, *branches, tree)

    return jax.lax.platform_dependent(gradients, cpu=either, default=products)


def _temporaries(
    tx: optax.GradientTransformation,
    device: Any,
    params: Any,
    state: Any,
    gradients: Any,
    *,
    keep_gradients: bool,
) -> int | None:
    # Keep the arguments in the order of the results: JAX gives a result the first donated argument of its
    # shape. In another order it would give new parameters the buffer of a momentum, and would first copy that
    # away.
    def step(params, state, gradients):
        if not keep_gradients:
            gradients = _made_within(gradients)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    arguments = params, state, gradients
    if device is not None:
        place = jax.sharding.SingleDeviceSharding(device)
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    analysis = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile().memory_analysis()
    if analysis is None:
        return None
    made = 0 if keep_gradients else sum(map(_bytes, jax.tree.leaves(gradients)))
    # Cut at zero: a step need not hold all gradients at once.
    return max(analysis.temp_size_in_bytes - made, 0)
