"""Where full-size matrices live while they are orthogonalized, and how they come there."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float


def spread(
    method: Callable[[Array], Array], x: Float[Array, "*b m n"], sharding: NamedSharding | None
) -> Float[Array, "*b m n"]:
    """`method(x)`, `x` being laid out for it with the short side of each matrix whole.

    The Gram matrix of the short side is then one sum over the devices that share a matrix, where XLA, left
    alone, would gather the matrix in every product. All mesh axes that shard matrices share the long side; or
    those of the short side take some matrices each; or all of them do: whichever sends least, in numbers

        2 Σ (1 - 1/moved) x.size / devices  +  2 (1 - 1/sharing) blocks short²

    the way there, stage by stage, and back, and one Gram matrix for each of a device's blocks (as of
    `gram_newton_schulz` without restarts; plain Newton-Schulz has one a step).
    """
    if sharding is None:
        return method(x)
    *batch, rows, columns = sharding.spec
    is_wide = x.shape[-1] >= x.shape[-2]
    short, long = (_names(rows), _names(columns)) if is_wide else (_names(columns), _names(rows))
    # Those of the long side first: its own pieces then only split, and no device swaps whole ones.
    ways = [[_Layout(tuple(batch), (*long, *short), moved=short)]]
    if batch == [None]:
        # One mesh axis after the other: XLA does not find the way at once.
        taken = _Layout((short,), long, moved=short)
        ways += [[taken], [taken, _Layout(((*short, *long),), (), moved=long)]]
    sizes = sharding.mesh.shape
    ways = [way for way in ways if all(layout.divides(x, sizes) for layout in way)]
    if not ways:
        return method(x)
    way = min(ways, key=lambda way: _sent(x, sizes, way))
    # Where it comes from and where it goes to are said as well: XLA would else do before and after, in the
    # wrong place, what can wait, and move more than this one array.
    specs = [sharding.spec, *(layout.spec(is_wide) for layout in way)]
    for spec in specs:
        x = _laid_out(x, sharding, spec)
    x = _block_by_block(method, sharding.mesh, way[-1].batch)(x)
    for spec in reversed(specs):
        x = _laid_out(x, sharding, spec)
    return x


class _Layout(NamedTuple):
    """Of matrices whose short side is whole."""

    batch: tuple[Any, ...]  # mesh axes, an entry for each batch axis
    long: tuple[str, ...]  # mesh axes that share the long side
    moved: tuple[str, ...]  # those whose devices exchange pieces to come there

    def spec(self, is_wide: bool) -> tuple[Any, ...]:
        return (*self.batch, *((None, self.long) if is_wide else (self.long, None)))

    def divides(self, x: Array, sizes: Any) -> bool:
        parts = [_count(_names(entry), sizes) for entry in (*self.batch, self.long)]
        whole = [*x.shape[:-2], max(x.shape[-2:])]
        return not any(size % part for size, part in zip(whole, parts, strict=True))


def _sent(x: Array, sizes: Any, way: Sequence[_Layout]) -> float:
    """The cost of a way, as `spread` has it."""
    batch, long, _ = way[-1]
    taking, sharing = _count([name for entry in batch for name in _names(entry)], sizes), _count(long, sizes)
    blocks, short = math.prod(x.shape[:-2]) / taking, min(x.shape[-2:])
    moves = sum(1 - 1 / _count(layout.moved, sizes) for layout in way) * x.size / (taking * sharing)
    return 2 * moves + 2 * (1 - 1 / sharing) * blocks * short**2


def _count(names: Sequence[str], sizes: Any) -> int:
    """Devices along mesh axes."""
    return math.prod(sizes[name] for name in names)


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _block_by_block(method: Callable[[Array], Array], mesh: Any, batch: Sequence[Any]) -> Any:
    """`method` on each device's own blocks: a loop over blocks that live apart would gather them."""
    manual = {name for entry in batch for name in _names(entry)}
    if not manual:
        return method
    spec = PartitionSpec(*batch)
    known = mesh if jax.sharding.get_abstract_mesh().empty else None
    return jax.shard_map(method, mesh=known, in_specs=spec, out_specs=spec, axis_names=manual)


def _laid_out(x: Array, sharding: NamedSharding, spec: Any) -> Array:
    # Where a mesh is set, its axes are what counts: Auto within `on_auto_axes`.
    spec = PartitionSpec(*spec)
    is_set = not jax.sharding.get_abstract_mesh().empty
    return jax.lax.with_sharding_constraint(x, spec if is_set else NamedSharding(sharding.mesh, spec))
