"""Clear errors for bad arguments: the name, the value, and what to write instead."""

import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

T = TypeVar("T")


def _is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def _refuse_traced(name: str, value: Any) -> None:
    if _is_traced(value):
        raise TypeError(
            f"{name} decides shapes or control flow and cannot be a traced value; under"
            f" optax.inject_hyperparams pass static_args={name!r}, or a tuple of all such arguments, such as"
            " static_args=('rank', 'period', 'full_rank_fraction')."
        )


def _python_number(value: Any) -> Any:
    """Convert a scalar of NumPy, JAX or ml_dtypes to a Python number; return anything else unchanged."""
    if not hasattr(value, "dtype") or np.shape(value) != ():
        return value
    if jnp.issubdtype(value.dtype, jnp.integer):
        return int(value)
    return float(value) if jnp.issubdtype(value.dtype, jnp.floating) else value


def check_integer(name: str, value: Any, *, at_least: int) -> int:
    """Check for an integer of at least `at_least`. The integer decides shapes, so it cannot be traced."""
    _refuse_traced(name, value)
    number = _python_number(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.")
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}.")
    return int(number)


def check_number(name: str, value: Any, *, at_least: float, below: float | None = None) -> Any:
    """Check for a real number in `[at_least, below)`. A traced number passes: it has no value to check yet.

    Returns:
      A Python number or a traced float32. Neither changes the dtype of float32 arrays.
    """
    if _is_traced(value):
        return jnp.asarray(value, jnp.float32)
    number = _python_number(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    number = float(number)
    limit = f"at least {at_least}" + ("" if below is None else f" and below {below}")
    # This comparison is false for NaN, so NaN is refused too.
    if not (number >= at_least and (below is None or number < below) and number < float("inf")):
        because = f": {_IN_FLOAT32}" if number == below and _is_coarse(value) else ""
        raise ValueError(f"{name} must be {limit}, got {value!r}{because}.")
    return number


# `optax.inject_hyperparams` casts numbers to the dtype of the parameters.
_IN_FLOAT32 = (
    "this coarse dtype rounds numbers just below 1 to 1; under optax.inject_hyperparams pass"
    " hyperparam_dtype=jnp.float32"
)


def _is_coarse(value: Any) -> bool:
    """Whether the dtype of a number rounds Adam's usual 0.999 to 1."""
    return bool(np.asarray(0.999, getattr(value, "dtype", np.float64)) == 1)


def check_fraction(name: str, value: Any) -> float:
    """Check for a number in `[0, 1]`. It decides how many slots are allocated, so it cannot be traced."""
    _refuse_traced(name, value)
    number = _python_number(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    fraction = float(number)
    if not 0 <= fraction <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}.")
    return fraction


def check_function(name: str, value: Any, example: str) -> Callable[..., Any]:
    """Check for a function: no argument of this library dispatches on strings or flags."""
    if not callable(value):
        raise TypeError(f"{name} must be a function such as {example}, got {value!r}.")
    return value


def is_function(value: Any) -> bool:
    """Whether `value` is a function of a tree and not itself a tree: an Equinox module is callable too."""
    is_node = not jax.tree_util.all_leaves([value])
    return callable(value) and (not is_node or isinstance(value, jax.tree_util.Partial))


def is_rule(value: Any) -> TypeGuard[optax.GradientTransformation]:
    """Whether `value` is an optax transformation: anything with `init` and `update`."""
    return hasattr(value, "init") and hasattr(value, "update")


def check_residual(value: Any) -> Any:
    """Check for a function of the residual, or a rule for it."""
    if not (callable(value) or is_rule(value)):
        raise TypeError(
            "residual must be a function such as gum_optax.drop, or an optax.GradientTransformation such as"
            f" optax.identity(), got {value!r}."
        )
    return value


_RULES = {"tx": "gum_optax.gum(1e-3)", "others": "optax.adamw(1e-3)"}


def check_rule(name: str, value: Any) -> Any:
    """Check for an optax transformation."""
    if not is_rule(value):
        example = _RULES.get(name, "optax.trace(0.95)")
        if is_rule(getattr(value, "tx", None)):
            remedy = "; pass its `tx`"
        elif is_function(value):
            remedy = "; call it with its arguments"
        else:
            remedy = ""
        raise TypeError(
            f"{name} must be an optax.GradientTransformation such as {example}, got {shown(value)}{remedy}."
        )
    return value


def shown(value: Any) -> str:
    """A value in an error message; a long one by its type alone, so that the message can be read."""
    text = repr(value)
    return text if len(text) <= _LONGEST and "\n" not in text else f"a value of type {type(value).__name__}"


# Any number: about two lines of a terminal, in which a tuple of shapes or a small tree can be read.
_LONGEST = 200


def check_arrays(name: str, tree: Any) -> None:
    """Check that the leaves of a tree are arrays, shapes or numbers, and that it is no optimizer's state.

    A model may hold functions and texts too.
    """

    def is_state(x):
        return isinstance(x, tuple) and hasattr(x, "_fields") and type(x).__name__.endswith("State")

    for x in filter(is_state, jax.tree.leaves(tree, is_leaf=is_state)):
        raise TypeError(
            f"{name} must be the parameters, but holds an optimizer's state, {type(x).__name__}; pass the"
            " parameters that the state was made for."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(leaf, numbers.Number):
            raise TypeError(
                f"{name} must be a tree of arrays, but its leaf {jax.tree_util.keystr(path)} is"
                f" {shown(leaf)}; pass the arrays of the model alone: in Equinox"
                " eqx.filter(model, eqx.is_inexact_array), in Flax NNX nnx.state(model, nnx.Param)."
            )


def check_mask(name: str, value: Any) -> Any:
    """Check for a mask as optax takes it: a tree of booleans, or a function from the parameters to one."""
    if not is_function(value):
        for leaf in jax.tree.leaves(value):
            if not isinstance(leaf, bool) and jnp.dtype(getattr(leaf, "dtype", object)) != np.bool_:
                raise TypeError(
                    f"{name} must be a tree of booleans, or a function from the parameters to one, got"
                    f" {shown(value)}."
                )
    return value


def check_decay(name: str, value: Any) -> Any:
    """Check a decay of a second moment, in `[0, 1)`; return it as `check_number` does."""
    if _is_traced(value) and _is_coarse(value):
        # The value is not known here, and a decay of 1 would make the second moment 0 / 0.
        raise TypeError(f"{name} must be at least 0 and below 1, got a traced {value.dtype}: {_IN_FLOAT32}.")
    return check_number(name, value, at_least=0, below=1)


def check_adam(b1: Any, b2: Any, eps: Any) -> tuple[Any, Any, Any]:
    """Check Adam's decays, in `[0, 1)`, and its `eps`; return each as `check_number` does."""
    return (
        check_number("b1", b1, at_least=0, below=1),
        check_decay("b2", b2),
        check_number("eps", eps, at_least=0),
    )


def check_dtype(name: str, value: Any, choices: Mapping[str, T]) -> T:
    """What `choices` has for the dtype `value`; `None` is float32."""
    try:
        return choices[jnp.dtype(jnp.float32 if value is None else value).name]
    except (TypeError, KeyError):
        *first, last = choices
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}.") from None


def check_matrix_leaf(path: Any, leaf: Any) -> None:
    """Check that a matrix leaf has two axes or more and real floating-point numbers."""
    where = jax.tree_util.keystr(path)
    if jnp.ndim(leaf) < 2:
        raise ValueError(
            f"leaf {where} of shape {jnp.shape(leaf)} is not a matrix: it needs two axes or more."
            " Give it to another rule with optax.partition, or give it None as its dimension numbers."
        )
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"leaf {where} has dtype {dtype}; matrices must be real floating point."
            " Cast it, or give it None as its dimension numbers so that `others` updates it."
        )


def renamed_argument(function: str, old: str, given: Any, new: str, value: Any) -> Any:
    """The value of the argument `new` of a public function, which may have been given by its `old` name."""
    if given is None:
        return value
    message = f"{function}'s argument {old} is now {new}; the old name goes with the next version."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return given
