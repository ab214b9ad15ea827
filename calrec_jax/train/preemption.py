"""Stopping when the machine is about to be taken away: SIGTERM, and what a TPU's maintenance event sends."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from calrec_jax.errors import Stopped


class Preemption:
    """While it is entered, SIGTERM does not end the process but is noted for the loop to ask about.

    Several processes agree on a step that all of them have yet to reach: JAX's own service hears the signal there,
    whichever process gets it.
    """

    def __init__(self) -> None:
        self._received = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        # Signals can be handled in the main thread alone; elsewhere SIGTERM keeps its meaning.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, *_: Any) -> None:
        self._received = True

    def reached(self, step: int) -> bool:
        """Whether the run is to stop after this step; to be asked after each one."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._received

    def stop(self, out: Path, step: int) -> NoReturn:
        """Ends the command, as a success: what was trained is saved.

        Raises:
          Stopped: always.
        """
        raise Stopped(f"train: asked to stop; {out} is saved at step {step}, and the same command resumes it")
