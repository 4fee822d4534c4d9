"""NorMuon's second moment: one step size for each neuron."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._core.checks import check_decay, check_number
from .._linalg.numerics import safe_reciprocal
from .._mesh.explicit import zeros
from .per_matrix import per_matrix


class NeuronRmsState(NamedTuple):
    """State of `scale_by_neuron_rms`.

    Examples:
      >>> state = gum_optax.scale_by_neuron_rms().init({"kernel": jnp.ones((4, 8))})
      >>> state.nu["kernel"].shape
      (1, 8)
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    nu: optax.Updates  # each leaf (*blocks, 1, fan_out) float32: the mean square of each neuron's steps


def scale_by_neuron_rms(b2: Any = 0.95, eps: Any = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Divide the step of each neuron by the root of its second moment, and keep the norm of the whole step.

        v ← β₂ v + (1 - β₂) mean(O²)         the mean over the inputs of each neuron
        Ô = O / (√v + ε),   step = Ô |O|_F / |Ô|_F

    After Muon's rule this is NorMuon: an orthogonal step still moves some neurons more than others. The rule
    wants steps `(*blocks, fan_in, fan_out)`, whose columns are the neurons, as `matrix_optimizer` gives them
    to a `scale`. It works on the steps of every rule; the example is GUM with it.

    The bias of `v` towards its start is the same for all neurons, so that it cancels.

    Args:
      b2: `β₂` in `[0, 1)`; 0.95 as in the paper's code.
      eps: `ε`; 1e-8 as in microsoft/dion.

    Returns:
      A transformation over trees of `(*blocks, fan_in, fan_out)` leaves. State: `fan_out` numbers per matrix.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type; at `init`, a leaf is no matrix.

    Examples:
      >>> rule = gum_optax.unbiased_low_rank(gum_optax.scale_by_muon(), 2, 200, 1 / 16)
      >>> scale = optax.chain(gum_optax.scale_by_neuron_rms(), gum_optax.scale_by_shape())
      >>> tx = gum_optax.matrix_optimizer(rule, 1e-3, scale)
      >>> gum_optax.memory_report(tx, {"kernel": jnp.ones((3, 4, 8))}).state["nu"]  # bytes of 3 × 8 neurons
      96

    References:
      Li et al., NorMuon, arXiv 2510.05491, Algorithm 1.
    """
    b2 = check_decay("b2", b2)
    eps = check_number("eps", eps, at_least=0)

    def init(key, leaf):
        del key
        return (zeros(leaf, 1, -1),)

    def update(count, o, v):
        del count
        squares = jnp.mean(o * o, axis=-2, keepdims=True)
        v = b2 * v + (1 - b2) * squares
        factor = 1 / (jnp.sqrt(v) + eps)
        # The norms follow from the squares, so that the step is read once.
        norm, new_norm = (
            jnp.sqrt(jnp.sum(x, axis=-1, keepdims=True)) for x in (squares, squares * factor * factor)
        )
        return o * (factor * (norm * safe_reciprocal(new_norm))), v

    return per_matrix(NeuronRmsState, init, update)
