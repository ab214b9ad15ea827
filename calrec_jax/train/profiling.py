"""A window of steps under JAX's profiler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from calrec_jax.errors import CalrecError

FOLDER = "profile"


class Window:
    """Traces steps [first, last) of a stage into its folder `profile/`, which TensorBoard and Perfetto read.

    Args:
      out: the stage's folder.
      steps: (first, last), or None for no trace.

    Raises:
      CalrecError: `steps` is not such a pair.
    """

    def __init__(self, out: Path, steps: Sequence[int] | None):
        numbers = tuple(steps) if isinstance(steps, Sequence) else steps
        if numbers is not None and not (
            isinstance(numbers, tuple)
            and len(numbers) == 2
            and all(isinstance(n, int) for n in numbers)
            and 0 <= numbers[0] < numbers[1]
        ):
            raise CalrecError(f"train.profile_steps={steps!r}: must be two steps, the first and the one after the last")
        self._folder, self._steps, self._running = out / FOLDER, numbers, False

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

    def before(self, step: int, pending: Any) -> None:
        """Starts or ends the trace; to be called before each step, with arrays of the step before it."""
        if self._steps is None:
            return
        first, last = self._steps
        if not self._running and first <= step < last:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step >= last:
            jax.block_until_ready(pending)
            self.__exit__()
            print(f"train: steps {first} to {last} are traced in {self._folder}", flush=True)
