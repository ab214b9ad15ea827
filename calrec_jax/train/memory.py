"""What a compiled step keeps in a device's memory: known before it runs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from calrec_jax.errors import CalrecError
from calrec_jax.train.flops import CHIPS

WAYS_OUT = (
    "Raise Batching.micro_batches, set TransformerConfig.remat='full', lower Batching.batch_rows, spread parameters "
    "over more of train.mesh_shape's fsdp or model axis, or take a larger slice."
)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
      parameters: of the model.
      optimizer: its state.
      temporaries: activations, gradients and whatever else lives during a step.
      rest: batch, results and program.
      limit: the device's memory; None where it is not known.
    """

    parameters: int
    optimizer: int
    temporaries: int
    rest: int
    limit: float | None

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.parameters + self.optimizer + self.temporaries + self.rest

    @property
    def fits(self) -> bool | None:
        """None where the device's memory is not known."""
        return None if self.limit is None else self.total <= self.limit

    def __str__(self) -> str:
        parts = {"parameters": self.parameters, "optimiser": self.optimizer, "step": self.temporaries + self.rest}
        limit = "" if self.limit is None else f" of {self.limit / 2**30:.1f}"
        named = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"{self.total / 2**30:.2f}{limit} GiB a device ({named})"


def compiled_within_memory(step: Any, *arguments: Any) -> jax.stages.Compiled:
    """Compiles a jitted training step for these arguments, or their shapes.

    Raises:
      CalrecError: the compiler finds no way to fit it into the device's memory.
    """
    try:
        return step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise CalrecError(f"the step does not fit: {str(error).splitlines()[0]} {WAYS_OUT}") from error


def memory_plan(compiled: jax.stages.Compiled, state: Any, shardings: Any, device: jax.Device) -> MemoryPlan:
    """The plan of a compiled step.

    Args:
      compiled: the step.
      state: its state, or the state's shapes.
      shardings: of the state.
      device: one of those it runs on.
    """
    memory = compiled.memory_analysis()
    assert memory is not None
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
        + memory.temp_size_in_bytes
    )
    parameters = _bytes_on_a_device(state.params, shardings.params)
    optimizer = _bytes_on_a_device(state.opt_state, shardings.opt_state)
    chip = CHIPS.get(device.device_kind)
    return MemoryPlan(
        parameters=parameters,
        optimizer=optimizer,
        temporaries=memory.temp_size_in_bytes,
        rest=total - memory.temp_size_in_bytes - parameters - optimizer,
        limit=_limit(device) or (None if chip is None else chip.hbm_gib * 2**30),
    )


def _limit(device: jax.Device) -> int | None:
    """What the device itself says of its memory; nothing on a CPU, or where the device is not here."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return None


def _bytes_on_a_device(arrays: Any, shardings: Any) -> int:
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, arrays, shardings)
    return sum(jax.tree.leaves(sizes))
