"""Several processes as one run: joining them, and telling a person what happened when one is missing or dies.

Notable: JAX ends a process by abort(), from a thread of its own, when the others cannot be reached; no Python code can
put that into words. So a joined command runs as a child of a small process that forwards signals to it, waits for it,
and says what its end means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from calrec_jax.errors import CalrecError

_CHILD = "CALREC_JOINED"
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Which process this is, as the flags say.

    Attributes:
      coordinator_address: `host:port` of process 0, reachable from all.
      process_count: processes of the run.
      process_index: of this one, from 0.
      detect: find the three above by the machine's own means (TPU VMs, Slurm).
      join_seconds: how long to wait for all processes at the start.
      heartbeat_seconds: after how long a silent process counts as dead.
    """

    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    detect: bool = False
    join_seconds: int = 300
    heartbeat_seconds: int = 100

    def __post_init__(self):
        named = (self.coordinator_address, self.process_count, self.process_index)
        if self.detect and any(value is not None for value in named):
            raise CalrecError("--multihost finds the processes itself: leave out --coordinator_address and the like")
        if not self.detect and any(value is not None for value in named):
            if None in named:
                raise CalrecError("--coordinator_address, --process_count and --process_index go together: give all")
            assert self.process_count is not None and self.process_index is not None
            if not 0 <= self.process_index < self.process_count:
                raise CalrecError(
                    f"--process_index={self.process_index}: must be from 0 to --process_count less one, "
                    f"{self.process_count - 1}"
                )
        for name in ("join_seconds", "heartbeat_seconds"):
            if getattr(self, name) < 1:
                raise CalrecError(f"--{name}={getattr(self, name)}: must be at least 1")

    @property
    def several(self) -> bool:
        """Whether there is anything to join."""
        return self.detect or (self.process_count or 1) > 1

    def join(self) -> None:
        """Makes this process one of the run's; JAX must not have been used yet.

        Raises:
          CalrecError: the processes cannot be found, or the coordinator's port is taken.
        """
        import jax

        name = "?" if self.detect else f"{self.process_index} of {self.process_count}"
        print(f"calrec: process {name}, waiting up to {self.join_seconds} s for the others", flush=True)
        try:
            jax.distributed.initialize(
                self.coordinator_address,
                self.process_count,
                self.process_index,
                initialization_timeout=self.join_seconds,
                heartbeat_timeout_seconds=self.heartbeat_seconds,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise CalrecError(f"the processes could not be joined: {str(error).splitlines()[0]}") from error
        print(
            f"calrec: process {jax.process_index()} of {jax.process_count()}, {jax.device_count()} devices", flush=True
        )


def supervise(hosts: Hosts) -> int | None:
    """Runs this command once more as a child and waits for it.

    Returns:
      None in the child, which goes on; in the parent the exit status, after saying what an abort means.
    """
    if os.environ.get(_CHILD):
        return None
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env={**os.environ, _CHILD: "1"})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: child.send_signal(received))
    status = child.wait()
    if status == -signal.SIGABRT:
        print(
            f"calrec: error: process {'?' if hosts.process_index is None else hosts.process_index}: another process "
            f"did not join within --join_seconds={hosts.join_seconds}, or died (it was silent for "
            f"--heartbeat_seconds={hosts.heartbeat_seconds}); its own log says why. Start the same command on all "
            "hosts again: training resumes from its last checkpoint",
            file=sys.stderr,
        )
        return 1
    return status if status >= 0 else 128 - status


def leave(status: int) -> None:
    """Ends a joined process at once: at a normal exit JAX would wait minutes for processes that are gone."""
    if os.environ.get(_CHILD):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def is_first() -> bool:
    """Whether this process writes what all share: logs, facts and manifests."""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def all_agree(value: bool) -> bool:
    """Whether `value` is true on every process."""
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


@contextlib.contextmanager
def deaths() -> Iterator[None]:
    """Turns the error of a collective whose other side is gone into one that says so.

    Raises:
      CalrecError: in place of JAX's error, where there are several processes.
    """
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1:
            raise
        raise CalrecError(
            f"process {jax.process_index()}: another process is gone, or the connection to it "
            f"({str(error).splitlines()[0]}); its own log says why. Start the same command on all hosts again: "
            "training resumes from its last checkpoint"
        ) from error


def first_then_all(name: str, action: Callable[[], _T]) -> _T:
    """Runs `action` on the first process, and then on the others, which find what the first has written."""
    if is_first():
        result = action()
        barrier(name)
        return result
    barrier(name)
    return action()
