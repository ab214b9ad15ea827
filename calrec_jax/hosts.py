"""Several processes as one run: joining them, and telling a person what happened when one is missing or dies.

Notable: JAX ends a process by abort(), from a thread of its own, when the others cannot be reached; no Python code can
put that into words. So a joined command runs as a child of a small process that forwards signals to it, waits for it,
and says what its end means. Processes wait for each other by JAX's coordination service and not by a collective, which
other hosts' devices would have to take part in: an hour of work on one host alone is waited for, its error is heard by
all, and its death ends all after `--heartbeat_seconds`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from calrec_jax.errors import CalrecError

_CHILD = "CALREC_JOINED"
_FAILED = "calrec/failed/"  # keys of the coordination service: why a process failed, by its number
_LISTEN_SECONDS = 1  # how often one that waits asks whether another has failed
_LAST_WORDS_SECONDS = 3  # how long one that fails stays, so that those who wait hear of it
_barriers = itertools.count()
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
            "hosts again: what is done is kept, and training resumes from its last checkpoint",
            file=sys.stderr,
        )
        return 1
    return status if status >= 0 else 128 - status


def leave(status: int, reason: str = "") -> None:
    """Ends a joined process at once: at a normal exit JAX would wait minutes for processes that are gone.

    Args:
      status: the exit status.
      reason: of a failure; processes that wait for this one end with it.
    """
    if not os.environ.get(_CHILD):
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes twice: from the terminal, and from `supervise`
    if status and joined():
        with contextlib.suppress(Exception):  # they may be gone
            if not _service().key_value_dir_get(_FAILED):  # else another one is the reason, and is said to be
                _service().key_value_set(f"{_FAILED}{processes()[0]}", reason or f"ended with status {status}")
                time.sleep(_LAST_WORDS_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def joined() -> bool:
    """Whether this process is one of several; JAX is not imported to find out."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def processes() -> tuple[int, int]:
    """Which process this is, and of how many.

    Raises:
      CalrecError: JAX finds other hosts, and they were not joined.
    """
    import jax

    index, count = jax.process_index(), jax.process_count()
    if count > 1 and not jax.distributed.is_initialized():
        raise CalrecError(
            f"this is one of {count} hosts, and they were not joined: start the same command on all of them with "
            "--multihost, or on one with JAX_PLATFORMS=cpu in the environment"
        )
    return index, count


def is_first() -> bool:
    """Whether this process writes what all share: logs, facts and manifests."""
    return not joined() or processes()[0] == 0


def barrier(name: str) -> None:
    """Waits until all processes are here, however long that takes.

    Args:
      name: of the place; all processes come to the same places in the same order.

    Raises:
      CalrecError: another process failed, is gone, or is at another place.
    """
    if not joined():
        return
    (index, count), number = processes(), next(_barriers)
    place = f"calrec/barrier/{number}/"
    with deaths():
        _service().key_value_set(f"{place}{index}", name)
        if index == 0:
            for other in range(count):
                _hear(f"{place}{other}", name)
            _service().key_value_set(f"{place}all", name)
        _hear(f"{place}all", name)


def _service() -> Any:
    """JAX's client of the coordination service; JAX has no public name for it (Orbax reaches it in the same way)."""
    from jax._src import distributed

    assert distributed.global_state.client is not None
    return distributed.global_state.client


def _hear(key: str, name: str) -> None:
    """Waits until a key is set, or a process has failed."""
    import jax

    while True:
        try:
            there = _service().blocking_key_value_get(key, _LISTEN_SECONDS * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        else:
            break
        for failed, reason in _service().key_value_dir_get(_FAILED):
            raise CalrecError(f"process {failed.removeprefix(_FAILED)} failed, and this one ends with it: {reason}")
    if there != name:
        raise CalrecError(
            f"process {processes()[0]} is at {name!r} and another one at {there!r}: start the same command, with the "
            "same settings, on all hosts"
        )


def all_agree(value: bool) -> bool:
    """Whether `value` is true on every process."""
    if not joined():
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
            "what is done is kept, and training resumes from its last checkpoint"
        ) from error


def first_alone(name: str, action: Callable[[], object]) -> None:
    """Runs `action` on the first process, while the others wait for it.

    Args:
      name: what is done, as it is said of one that waits.
      action: must not wait for other processes.

    Raises:
      CalrecError: of the action; on the others, that it failed, and why.
    """
    if is_first():
        action()
    else:
        print(f"calrec: process 0 does {name}; waiting for it", flush=True)
    barrier(name)


def first_then_all(name: str, action: Callable[[], _T]) -> _T:
    """Runs `action` on the first process, and then on the others, which find what the first has written."""
    if is_first():
        result = action()
        barrier(name)
        return result
    barrier(name)
    return action()
