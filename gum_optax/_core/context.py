"""What travels inside an update.

A rule of optax is called as `update(updates, state, params, **extra_args)`. Wrappers of this library know
things that the rules inside them need: how the model stores a leaf, whether a step is accepted, what to
measure of a gradient that is never formed. A gradient cannot hold these, and the state must not. They travel
in one extra argument, `context`, a `MatrixContext`. Users' own extra arguments, such as the `value` of a line
search, travel beside it and are passed on as they are.

| field | who passes it | who reads it |
|---|---|---|
| `views` | `as_matrices`; `unbiased_low_rank` for its slots | `low_rank`, `orthogonalize`, `normalize` |
| `accept` | `skip_non_finite`; every optimizer; `unbiased_low_rank` for its slots | all rules with state |
| `measurements` | `projected_update` | `skip_non_finite`, `as_matrices`, `low_rank`; others refuse it |
| `turn` | `layerwise_update` | all of these: see `turns.py` |
| `waits_for` | `low_rank` | `orthogonalize` |

Each reader that changes the leaves changes the context with them. `as_matrices` replaces the first four
fields: a fused kernel becomes several leaves, so `accept`, `measurements` and `turn` then count those. Of
these four `low_rank` passes on `accept` and `turn` alone, because coordinates have another shape than the
leaves and are always computed.

`low_rank` passes two more extra arguments to a `residual` that is a rule: `coordinates` (R) and `steps` (S).
They are public, because a user's own residual reads them.

A rule needs to know none of this. optax drops extra arguments for a rule that takes none, and a rule with
`**extra_args` may ignore the context: its state is then restored from outside when a step is rejected, at the
cost of a copy.
"""

import dataclasses
from typing import Any

from .acceptance import Acceptance
from .measurements import Measurements
from .turns import WHOLE_STEP, WholeStep


@dataclasses.dataclass(frozen=True)
class MatrixContext:
    """The extra argument `context` of an update: what a wrapper knows of the leaves that a rule is given.

    Attributes:
      views: a tree with a `View` at each leaf: how the leaf is stored and sharded. `None`: leaves are
        `(*blocks, m, n)` as they stand.
      accept: which leaves step. `None`: all of them do.
      measurements: takes means of linear functions of a gradient that nobody forms; the leaves of the updates
        are then zeros. `None`: the updates are the gradient.
      turn: which leaves of a larger tree the updates are, in a step that is taken layer by layer. By default
        the updates are the whole tree.
      waits_for: arrays that a CPU or a GPU computes first, so that two sets of temporaries share their
        memory. `None`: nothing to wait for.

    The table of this module shows who passes each field and who reads it.

    Examples:
      >>> def update(updates, state, params=None, *, context=gum_optax.MatrixContext(), **extra_args):
      ...     momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state, updates)
      ...     if context.accept is not None:
      ...         momentum = context.accept.keep_if_rejected(momentum, state)
      ...     return momentum, momentum
      >>> rule = optax.GradientTransformationExtraArgs(optax.tree.ones_like, update)
      >>> tx, params = gum_optax.skip_non_finite(rule), {"w": jnp.ones(2)}
      >>> updates, state = tx.update({"w": jnp.full(2, jnp.nan)}, tx.init(params), params)
      >>> bool(updates["w"].any()), state.inner["w"].tolist()
      (False, [1.0, 1.0])
    """

    views: Any = None
    accept: Acceptance | None = None
    measurements: Measurements | None = None
    turn: WholeStep = WHOLE_STEP
    waits_for: Any = None

    def need_gradient(self, name: str) -> None:
        """Refuse measurements, for a rule that needs the gradient itself.

        Raises:
          ValueError: nobody forms the gradient.
        """
        if self.measurements is not None:
            raise ValueError(
                f"{name} needs the gradient itself, and projected_update never forms it: average the"
                " gradients and call update."
            )


# The default of the argument `context`: leaves are matrices, every one steps, the gradient is there.
NO_CONTEXT = MatrixContext()
