"""The command `calrec`: one verb a step, all of them over the same gin file and run folder.

Notable: nothing heavy is imported before a verb runs, so `calrec --help` answers at once. `verbs.py` has the flags,
`actions.py` what each verb does; here is what they share: exit statuses, several hosts, gin files.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from calrec_jax import allocator, hosts
from calrec_jax.errors import CalrecError, Stopped
from calrec_jax.verbs import COMPUTING, ON_HOSTS, VERBS, parse

if TYPE_CHECKING:
    from calrec_jax.config import Config
    from calrec_jax.pipeline import Line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: arguments without the program's name; those of the process when None.

    Returns:
      The exit status: 0; 1 for a mistake that the user can mend, printed as `calrec: error: …`; 130 after Ctrl-C.
    """
    try:
        arguments = parse(argv)
        if argv is None and arguments.verb in COMPUTING:
            allocator.set_allocator()
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        if _hosts(arguments).several:
            status = hosts.supervise(_hosts(arguments))
            if status is not None:
                return status
        if argv is None:
            # A line as it is printed, also into a file or a pipe: what a person watches a long run by.
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        _run(arguments)
    except CalrecError as error:
        message = str(error).split("\n  In call to configurable")[0]  # where gin was when it passed the error on
        print(f"calrec: error: {message}", file=sys.stderr)
        hosts.leave(1, message)
        return 1
    except Stopped as stopped:
        print(stopped, flush=True)
        return 0
    except KeyboardInterrupt:
        print("\ncalrec: interrupted; running the same command again resumes", file=sys.stderr)
        hosts.leave(130, "interrupted")
        return 130
    except BrokenPipeError:  # e.g. `calrec … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # a mistake of ours
        if hosts.joined():
            traceback.print_exc()
            hosts.leave(1, f"{type(error).__name__}: {error}")
        raise
    return 0


def _hosts(arguments: argparse.Namespace) -> hosts.Hosts:
    """What the flags of a verb that can run on several hosts say; for the others, one process."""
    if arguments.verb not in ON_HOSTS:
        return hosts.Hosts()
    return hosts.Hosts(
        arguments.coordinator_address,
        arguments.process_count,
        arguments.process_index,
        arguments.multihost,
        arguments.join_seconds,
        arguments.heartbeat_seconds,
    )


def _run(arguments: argparse.Namespace) -> None:
    from calrec_jax import artifacts, config

    if _hosts(arguments).several:
        _hosts(arguments).join()

    verb = VERBS[arguments.verb]
    if not verb.of_line:
        return verb.call(arguments)
    if arguments.verb == "quickstart":
        from calrec_jax import quickstart

        arguments.gin_file = arguments.gin_file or [quickstart.GIN_FILE]
        arguments.run_dir = arguments.run_dir or quickstart.RUN_DIR
    if not arguments.gin_file:
        raise CalrecError(f"--gin_file is missing, for example: {verb.example}")
    bindings = arguments.bindings
    if arguments.run_dir is not None:
        bindings = [*bindings, f"RUN_DIR={os.path.expanduser(arguments.run_dir)!r}"]
    if getattr(arguments, "engine", None):
        bindings = [*bindings, f"prepare.engine={arguments.engine!r}"]
    if getattr(arguments, "profile_steps", None):
        bindings = [*bindings, f"train.profile_steps=({arguments.profile_steps[0]}, {arguments.profile_steps[1]})"]
    if getattr(arguments, "split", None):
        bindings = [*bindings, f"run.split={arguments.split!r}"]
    modules: Sequence[str] = config.MODULES
    skip: Sequence[str] = config.TENSORFLOW_CONFIGURABLES
    if arguments.verb == "eval_tasks":
        modules, skip = (*modules, "calrec_jax.integrations.seqio_eval"), ()
    loaded = config.load(arguments.gin_file, bindings, arguments.gin_search_paths, modules=modules, skip=skip)
    line = _line(loaded)
    line.check(loaded)
    with artifacts.disk_errors(line.run_dir):
        verb.call(line, arguments)


def _line(loaded: Config) -> Line:
    from calrec_jax.pipeline import Line

    bound = {binding.name for binding in loaded.bindings}
    missing = [f"run.{name}" for name in ("run_dir", "target") if f"run.{name}" not in bound]
    if missing:
        raise CalrecError(
            f"the gin files do not set {' and '.join(missing)}; a run file begins like runs/quickstart.gin"
        )
    return Line()  # type: ignore[call-arg]  # gin passes the arguments
