"""Chips by their memory: for predictions, and for programs compiled ahead of time."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A chip, by its kind and its memory in bytes."""

    platform: str  # cpu, gpu or tpu, whose compilers differ in what they copy
    memory: int
    computes_in_bfloat16: bool = True  # if not, XLA computes sums of bfloat16 arrays in float32

    @property
    def usable(self) -> int:
        """What a program can plan for: all but 5 %, which stay for the runtime and for fragmentation.

        A v5e reports 15.75 of its 16 GiB. On a GPU, JAX takes 75 % first: `XLA_CLIENT_MEM_FRACTION=0.95`
        gives it this much at once.
        """
        return int(0.95 * self.memory)


CHIPS = {
    # What the drivers of these cards report: 141 and 24 GiB.
    "h200": Chip("gpu", 151397597184),
    "24gb": Chip("gpu", 25769803776, computes_in_bfloat16=False),  # compute capability 8.9
    # https://cloud.google.com/tpu/docs/v5e and https://cloud.google.com/tpu/docs/v6e
    "v5e": Chip("tpu", 16 * 2**30),
    "v6e": Chip("tpu", 32 * 2**30),
}
# Of unknown memory.
CPU = Chip("cpu", 0, computes_in_bfloat16=False)
