"""Distributes full-size matrices over a mesh while they are orthogonalized."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float


def distribute(
    method: Callable[[Array], Array], x: Float[Array, "*b m n"], sharding: NamedSharding | None
) -> Float[Array, "*b m n"]:
    """`method(x)`, with `x` resharded for it so that the short side of each matrix is whole.

    The Gram matrix of the short side is then one sum over the devices that share a matrix. Without the
    resharding, XLA would gather the matrix in every product. There are three routes: all mesh axes that shard
    matrices share the long side; or the mesh axes of the short side divide the matrices among themselves; or
    all mesh axes divide the matrices. The function takes the route that sends the fewest numbers:

        2 Σ (1 - 1/moved) x.size / devices  +  2 (1 - 1/sharing) blocks short²

    The first term is the way there and back, summed over its stages. The second term is one Gram matrix for
    each block of a device (as in `gram_newton_schulz` without restarts; plain Newton-Schulz has one per
    step).
    """
    if sharding is None:
        return method(x)
    *batch, rows, columns = sharding.spec
    is_wide = x.shape[-1] >= x.shape[-2]
    short, long = (_names(rows), _names(columns)) if is_wide else (_names(columns), _names(rows))
    # Put the mesh axes of the long side first: the pieces of the long side then only split, and no device
    # swaps whole pieces.
    routes = [[_Layout(tuple(batch), (*long, *short), moved=short)]]
    if batch == [None]:
        # Move one mesh axis after the other: XLA does not find the direct route.
        by_short_axes = _Layout((short,), long, moved=short)
        routes += [[by_short_axes], [by_short_axes, _Layout(((*short, *long),), (), moved=long)]]
    sizes = sharding.mesh.shape
    routes = [route for route in routes if all(layout.divides(x, sizes) for layout in route)]
    if not routes:
        return method(x)
    route = min(routes, key=lambda route: _sent(x, sizes, route))
    # Constrain the first and the last sharding too. Otherwise XLA would move other computations into the
    # resharded region, and would move more than this one array.
    specs = [sharding.spec, *(layout.spec(is_wide) for layout in route)]
    for spec in specs:
        x = _resharded(x, sharding, spec)
    x = _block_by_block(method, sharding.mesh, route[-1].batch)(x)
    for spec in reversed(specs):
        x = _resharded(x, sharding, spec)
    return x


class _Layout(NamedTuple):
    """A sharding of matrices whose short side is whole."""

    batch: tuple[Any, ...]  # mesh axes, an entry for each batch axis
    long: tuple[str, ...]  # mesh axes that share the long side
    moved: tuple[str, ...]  # mesh axes whose devices exchange pieces to reach this layout

    def spec(self, is_wide: bool) -> tuple[Any, ...]:
        return (*self.batch, *((None, self.long) if is_wide else (self.long, None)))

    def divides(self, x: Array, sizes: Any) -> bool:
        parts = [_count(_names(entry), sizes) for entry in (*self.batch, self.long)]
        whole = [*x.shape[:-2], max(x.shape[-2:])]
        return not any(size % part for size, part in zip(whole, parts, strict=True))


def _sent(x: Array, sizes: Any, route: Sequence[_Layout]) -> float:
    """How many numbers a route sends: the formula in `distribute`."""
    batch, long, _ = route[-1]
    taking, sharing = _count([name for entry in batch for name in _names(entry)], sizes), _count(long, sizes)
    blocks, short = math.prod(x.shape[:-2]) / taking, min(x.shape[-2:])
    moves = sum(1 - 1 / _count(layout.moved, sizes) for layout in route) * x.size / (taking * sharing)
    return 2 * moves + 2 * (1 - 1 / sharing) * blocks * short**2


def _count(names: Sequence[str], sizes: Any) -> int:
    """The number of devices along mesh axes."""
    return math.prod(sizes[name] for name in names)


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _block_by_block(method: Callable[[Array], Array], mesh: Any, batch: Sequence[Any]) -> Any:
    """`method` on each device's own blocks: a loop over blocks on several devices would gather the blocks."""
    manual = {name for entry in batch for name in _names(entry)}
    if not manual:
        return method
    spec = PartitionSpec(*batch)
    known = mesh if jax.sharding.get_abstract_mesh().empty else None
    return jax.shard_map(method, mesh=known, in_specs=spec, out_specs=spec, axis_names=manual)


def _resharded(x: Array, sharding: NamedSharding, spec: Any) -> Array:
    # Use the mesh in force if there is one: its axes are Auto within `on_auto_axes`.
    spec = PartitionSpec(*spec)
    is_set = not jax.sharding.get_abstract_mesh().empty
    return jax.lax.with_sharding_constraint(x, spec if is_set else NamedSharding(sharding.mesh, spec))
