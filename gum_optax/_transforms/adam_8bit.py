"""Adam with moments of eight bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._core.checks import check_adam
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.trees import columns
from .._linalg.quantize import SIGNED_FLOAT, SQUARES, Code, dequantize, quantize
from .storage import keys_of, noise_of, scales_beside

# Leaves with fewer numbers stay in float32, as in bitsandbytes (`min_8bit_size`), and so do those whose rows
# are shorter than half a block, for which scales would cost more than a sixteenth.
_SMALLEST = 4096
_SHORTEST_ROW = 64


class ScaleByAdam8bitState(NamedTuple):
    """State of `scale_by_adam_8bit`; a leaf in float32 has no scales (`optax.MaskedNode`).

    Examples:
      >>> state = gum_optax.scale_by_adam_8bit().init({"embedding": jnp.ones((64, 128))})
      >>> state.mu["embedding"].nbytes, state.mu_scales["embedding"].shape, str(state.nu["embedding"].dtype)
      (8192, (64, 1), 'uint8')
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates  # float8 codes of the mean, or float32
    nu: optax.Updates  # uint8 codes of the mean square, or float32
    mu_scales: optax.Updates  # each leaf (*, ceil(n / 128)) float32
    nu_scales: optax.Updates


def scale_by_adam_8bit(
    b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` whose moments are stored in eight bits, rounded stochastically.

        M ← b1 M + (1 - b1) G,   V ← b2 V + (1 - b2) G²,   step = M/(1 - b1ᵗ) / (√(V/(1 - b2ᵗ)) + eps)

    Between steps a number of M is a sign, four bits of exponent and three of mantissa; a number of V is five
    bits of exponent and three of mantissa. 128 numbers of a row share a float32 scale. Rounding keeps the
    mean of both: to nearest, V would not move, since a step changes it by less than an eighth. The step
    itself reads the moments before rounding.

    Leaves with fewer than 4096 numbers (as in bitsandbytes) or rows shorter than 64 stay in float32.

    Args:
      b1, b2, eps: Adam's, with optax's defaults.

    Returns:
      A transformation over trees of any shapes. State: 2.06 bytes a number; Adam's own is 8.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type; at `init`, a leaf is complex or
        integer.

    Examples:
      >>> params = {"embedding": jnp.ones((512, 128))}
      >>> rules = optax.scale_by_adam(), gum_optax.scale_by_adam_8bit()
      >>> [sum(gum_optax.memory_report(rule, params).state.values()) for rule in rules]  # bytes
      [524292, 135172]

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861: blocks with a scale.
      The codes are other ones: theirs is a table, which is read number by number.
    """
    b1, b2, eps = check_adam(b1, b2, eps)

    def init(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"leaf {jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}, but scale_by_adam_8bit is"
                    " for real floating-point numbers: give the leaf to optax.adamw by optax.partition."
                )
        mu, nu = (
            jax.tree.map(lambda x, code=code: _zeros(x, code), params) for code in (SIGNED_FLOAT, SQUARES)
        )
        scales = (jax.tree.map(_no_scales, params) for _ in range(2))
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), mu, nu, *scales)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))

        def moved(g, mu, nu, mu_scales, nu_scales, mu_key, nu_key):
            g = jnp.asarray(g, jnp.float32)
            m = b1 * _load(mu, mu_scales, SIGNED_FLOAT) + (1 - b1) * g
            v = b2 * _load(nu, nu_scales, SQUARES) + (1 - b2) * g * g
            step = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            codes, scales = zip(
                _store(mu, m, mu_key, SIGNED_FLOAT), _store(nu, v, nu_key, SQUARES), strict=True
            )
            return step, *codes, *scales

        keys = (keys_of(updates, state.count, context.turn, seed) for seed in range(2))
        rows = jax.tree.map(moved, updates, *state[1:], *keys)
        steps, *moments = columns(updates, rows, 5)
        if (accept := context.accept) is not None:
            moments = map(accept.keep_if_rejected, moments, state[1:])
        return steps, ScaleByAdam8bitState(count, *moments)

    return optax.GradientTransformationExtraArgs(init, update)


def _gets_codes(x: Any) -> bool:
    """Whether a leaf of the parameters gets moments of eight bits."""
    return jnp.size(x) >= _SMALLEST and x.shape[-1] >= _SHORTEST_ROW


def _zeros(x: Any, code: Code) -> Array:
    return jnp.zeros_like(x, code.dtype if _gets_codes(x) else jnp.float32)


def _no_scales(x: Any) -> Any:
    return scales_beside(x) if _gets_codes(x) else optax.MaskedNode()


def _is_coded(stored: Array, code: Code) -> bool:
    # By the dtype, not by the size: `layerwise_update` passes one row of a stack, which may be too small.
    return stored.dtype == code.dtype


def _load(stored: Array, scales: Any, code: Code) -> Array:
    return dequantize(stored, scales, code) if _is_coded(stored, code) else stored


def _store(stored: Array, moment: Array, key: Any, code: Code) -> tuple[Array, Any]:
    if not _is_coded(stored, code):
        return moment, optax.MaskedNode()
    return quantize(moment, noise_of(key, moment.shape), code)
