"""Whether an update of one layer reads the gradients of another, found by following the numbers of a trace.

Every number of the trace is shared, or belongs to the embedding, to the head or to the layers. A stack of
layers keeps the axis that counts them through operations that work on each layer by itself. Where an
operation sums over that axis, or combines numbers of two owners, the result belongs to no layer any more.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from .axes import AXIS_RULES, ELEMENTWISE


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a number comes from: the owners that it depends on, and the axis that counts the layers."""

    owners: frozenset[Any] = frozenset()
    axis: int | None = None  # None: there is none, or the layers are mixed


_SHARED = Origin()


def _mixed(origins: Iterable[Origin]) -> Origin:
    return Origin(frozenset().union(*(origin.owners for origin in origins)), None)


def _joined(a: Origin, b: Origin) -> Origin:
    """The origin of a number that is either of two, or a combination of them."""
    if not b.owners or a == b:
        return a
    return b if not a.owners else _mixed((a, b))


def origins_of(f: Callable[..., Any], arguments: Sequence[Any], origins: Sequence[Any]) -> Any:
    """The origin of every number of `f(*arguments)`, as a tree like the result.

    Args:
      f: the function, which is only traced.
      arguments: trees of shapes.
      origins: for every argument, a tree with an `Origin` for each leaf.
    """
    traced, shapes = jax.make_jaxpr(f, return_shape=True)(*arguments)
    leaves = jax.tree.leaves(list(origins))
    return jax.tree.structure(shapes).unflatten(_followed(traced.jaxpr, leaves))


def _followed(jaxpr: Any, origins: Sequence[Origin]) -> list[Origin]:
    """The origins of the results of a jaxpr, from those of its arguments; its constants are shared."""
    known: dict[Any, Origin] = dict(zip(jaxpr.invars, origins, strict=True))

    def of(variable):
        # A literal cannot be hashed.
        return _SHARED if hasattr(variable, "val") else known.get(variable, _SHARED)

    for equation in jaxpr.eqns:
        operands = [of(variable) for variable in equation.invars]
        if any(operand.owners for operand in operands):
            known |= dict(zip(equation.outvars, _of_results(equation, operands), strict=True))
    return [of(variable) for variable in jaxpr.outvars]


def _of_results(equation: Any, operands: list[Origin]) -> list[Origin]:
    """The origins of the results of one operation."""
    name, count = equation.primitive.name, len(equation.outvars)
    if name == "optimization_barrier":
        return operands
    if name == "cond":
        return _of_branches(equation, operands)
    if name in ("while", "scan"):
        return _LOOPS[name](equation, operands)
    if (inner := _inner_of(equation)) is not None and len(inner.invars) == len(operands):
        return _followed(inner, operands)
    if all(operand.axis is None for operand in operands):
        return [_mixed(operands)] * count
    owning = {operand for operand in operands if operand.owners}
    if len({operand.owners for operand in owning}) > 1 or any(x.axis is None for x in owning):
        return [_mixed(operands)] * count
    (owners,) = {operand.owners for operand in owning}
    axis = _axis_after(equation, operands)
    return [Origin(owners, axis)] * count


def _axis_after(equation: Any, operands: list[Origin]) -> int | None:
    """The axis of the result that counts the layers, or None if the operation mixes layers."""
    name = equation.primitive.name
    axes = [operand.axis for operand in operands]
    shapes = [variable.aval.shape for variable in equation.invars]
    if name in ELEMENTWISE:
        known = {axis for axis in axes if axis is not None}
        return known.pop() if len(known) == 1 else None
    rule = AXIS_RULES.get(name)
    return None if rule is None else rule(equation.params, axes, shapes, equation.outvars[0].aval.shape)


def _inner_of(equation: Any) -> Any:
    """The jaxpr that an operation calls."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (found := equation.params.get(name)) is not None:
            return getattr(found, "jaxpr", found)
    return None


def _of_branches(equation: Any, operands: list[Origin]) -> list[Origin]:
    which, *rest = operands
    results: list[Origin] = [_SHARED] * len(equation.outvars)
    for branch in equation.params["branches"]:
        results = list(map(_joined, results, _followed(branch.jaxpr, rest)))
    # A choice that depends on one layer's numbers passes that on to all that is chosen.
    return [_mixed((which, result)) for result in results] if which.owners else results


def _until_stable(body: Callable[[list[Origin]], list[Origin]], carried: list[Origin]) -> list[Origin]:
    while True:
        after = list(map(_joined, carried, body(carried)))
        if after == carried:
            return carried
        carried = after


def _of_while(equation: Any, operands: list[Origin]) -> list[Origin]:
    p = equation.params
    of_condition, of_body = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    constants = operands[of_condition:of_body]
    carried = _until_stable(
        lambda carried: _followed(p["body_jaxpr"].jaxpr, constants + carried), operands[of_body:]
    )
    (goes_on,) = _followed(p["cond_jaxpr"].jaxpr, operands[:of_condition] + carried)
    return [_mixed((goes_on, x)) for x in carried] if goes_on.owners else carried


def _of_scan(equation: Any, operands: list[Origin]) -> list[Origin]:
    p = equation.params
    start, count = _constants_and_carried(p)
    constants, rest = operands[:start], operands[start:]
    rows = [_of_row(x) for x in rest[count:]]

    def body(carried):
        return _followed(p["jaxpr"].jaxpr, constants + carried + rows)

    carried = _until_stable(lambda carried: body(carried)[:count], rest[:count])
    stacked = [x if x.axis is None else Origin(x.owners, x.axis + 1) for x in body(carried)[count:]]
    return carried + stacked


def _constants_and_carried(p: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried from turn to turn."""
    if "num_consts" in p:
        return p["num_consts"], p["num_carry"]
    constants, carried, _ = p["ft_in"].unpack()  # from jax 0.12 on
    return len(constants), len(carried)


def _of_row(x: Origin) -> Origin:
    """A row of the first axis; a loop over the layers mixes them."""
    return x if x.axis is None else Origin(x.owners, x.axis - 1 if x.axis else None)


_LOOPS = {"while": _of_while, "scan": _of_scan}
