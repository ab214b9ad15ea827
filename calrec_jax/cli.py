"""The command `calrec`: one verb a step, all of them over the same gin file and run folder.

Notable: nothing heavy is imported before a verb runs, so `calrec --help` answers at once. On Linux with glibc the verbs
that train or decode (`train`, `decode`, `eval_tasks`, `run`, `quickstart`) start themselves once more with the C
allocator set for large arrays, which can only be done by the environment of a new process; docs/performance.md has what
that gains, and `CALREC_ALLOCATOR=0` switches it off.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from calrec_jax import __version__
from calrec_jax.errors import CalrecError

if TYPE_CHECKING:
    from calrec_jax.config import Config
    from calrec_jax.pipeline import Line

# Large arrays come from one arena that is neither returned to the system nor cut into mappings, on huge pages: freed
# and allocated again at each step, they otherwise cost a page fault per 4 KiB.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_ALLOCATOR_SWITCH = "CALREC_ALLOCATOR"
_COMPUTING = ("train", "decode", "eval_tasks", "run", "quickstart")
_SPLIT = {"choices": ("validation", "test"), "help": "in place of run.split"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: arguments without the program's name; those of the process when None.

    Returns:
      The exit status: 0; 1 for a mistake that the user can mend, printed as `calrec: error: …`; 130 after Ctrl-C.
    """
    try:
        arguments = _parse(argv)
        if argv is None and arguments.verb in _COMPUTING:
            _set_allocator()
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        if argv is None:
            # A line as it is printed, also into a file or a pipe: what a person watches a long run by.
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        _run(arguments)
    except CalrecError as error:
        message = str(error).split("\n  In call to configurable")[0]  # where gin was when it passed the error on
        print(f"calrec: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncalrec: interrupted; running the same command again resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. `calrec … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    from calrec_jax import artifacts, config

    if arguments.verb == "quickstart":
        from calrec_jax import quickstart

        arguments.gin_file = arguments.gin_file or [quickstart.GIN_FILE]
        arguments.run_dir = arguments.run_dir or quickstart.RUN_DIR
    if not arguments.gin_file:
        raise CalrecError(f"--gin_file is missing, for example: {_VERBS[arguments.verb].example}")
    bindings = arguments.bindings
    if arguments.run_dir is not None:
        bindings = [*bindings, f"RUN_DIR={os.path.expanduser(arguments.run_dir)!r}"]
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
        _VERBS[arguments.verb].call(line, arguments)


def _line(loaded: Config) -> Line:
    from calrec_jax.pipeline import Line

    bound = {binding.name for binding in loaded.bindings}
    missing = [f"run.{name}" for name in ("run_dir", "target") if f"run.{name}" not in bound]
    if missing:
        raise CalrecError(
            f"the gin files do not set {' and '.join(missing)}; a run file begins like runs/quickstart.gin"
        )
    return Line()  # type: ignore[call-arg]  # gin passes the arguments


def _prepare(line: Line, arguments: argparse.Namespace) -> None:
    if arguments.category is not None and arguments.category not in line.all_categories:
        names = ", ".join(line.all_categories)
        raise CalrecError(f"--category={arguments.category} is not in run.categories, which has {names}")
    for category in [arguments.category] if arguments.category is not None else line.all_categories:
        line.prepare(category)


def _vocab(line: Line, arguments: argparse.Namespace) -> None:
    line.vocab()


def _train(line: Line, arguments: argparse.Namespace) -> None:
    for stage in [arguments.stage] if arguments.stage is not None else line.stages:
        line.train(stage)


def _decode(line: Line, arguments: argparse.Namespace) -> None:
    for name in [arguments.name] if arguments.name is not None else line.decodes:
        line.decode(name)


def _rank(line: Line, arguments: argparse.Namespace) -> None:
    for name in [arguments.name] if arguments.name is not None else line.rankings:
        line.rank(name)


def _doctor(line: Line, arguments: argparse.Namespace) -> None:
    line.doctor()


def _evaluate(line: Line, arguments: argparse.Namespace) -> None:
    from calrec_jax.pipeline import print_summary

    line.evaluate()
    print_summary(line.layout, line.split)


def _eval_tasks(line: Line, arguments: argparse.Namespace) -> None:
    line.eval_tasks(arguments.name)


def _run_line(line: Line, arguments: argparse.Namespace) -> None:
    line.run()
    _say_next(line, arguments)


def _quickstart(line: Line, arguments: argparse.Namespace) -> None:
    from calrec_jax import quickstart

    quickstart.make_shop(line)
    _run_line(line, arguments)


def _say_next(line: Line, arguments: argparse.Namespace) -> None:
    if line.split == "test":
        files = [f"--gin_file={file}" for file in arguments.gin_file]
        bindings = [f"--gin.{binding}" for binding in arguments.bindings]
        print("Next, the same model on the validation split, where settings are chosen:")
        print(
            f"  {shlex.join(['calrec', 'run', *files, *bindings, f'--run_dir={line.run_dir}', '--split=validation'])}"
        )


class _Verb:
    def __init__(self, call: Callable[[Line, argparse.Namespace], None], purpose: str, example: str, **options: dict):
        self.call, self.purpose, self.example, self.options = call, purpose, f"calrec {example}", options


_RUN = "--gin_file=runs/scientific_reproduction.gin --run_dir=runs/sci"
_VERBS = {
    "prepare": _Verb(
        _prepare,
        "raw dumps → a dataset for each category",
        f"prepare {_RUN} --gin.DATA_DIR='\"/data/amazon2018\"'",
        category={"help": "only this one"},
    ),
    "vocab": _Verb(_vocab, "catalogues → a SentencePiece vocabulary", f"vocab {_RUN}"),
    "train": _Verb(
        _train,
        "datasets → checkpoints, stage by stage",
        f"train {_RUN} --stage=stage2",
        stage={"help": "only this one: stage1 or stage2"},
    ),
    "decode": _Verb(
        _decode,
        "checkpoint → completions for each user",
        f"decode {_RUN} --split=validation",
        name={"help": "only this one of run.decodes"},
        split=_SPLIT,
    ),
    "rank": _Verb(
        _rank,
        "completions → rankings of the catalogue",
        f"rank {_RUN} --name=calrec",
        name={"help": "only this one of run.rankings"},
        split=_SPLIT,
    ),
    "doctor": _Verb(
        _doctor,
        "how well BM25 finds items by their own texts, and by completions: the ceiling of grounding",
        f"doctor {_RUN}",
        split=_SPLIT,
    ),
    "evaluate": _Verb(_evaluate, "rankings → metrics and a report", f"evaluate {_RUN}", split=_SPLIT),
    "eval_tasks": _Verb(
        _eval_tasks,
        "a SeqIO task or mixture → metrics",
        f"eval_tasks {_RUN} --gin.eval_tasks.task='\"calrec_mixture\"'",
        name={"help": "as this one of run.rankings ranks; the first one otherwise"},
        split=_SPLIT,
    ),
    "run": _Verb(_run_line, "all of the above but eval_tasks, in a row", f"run {_RUN}", split=_SPLIT),
    "quickstart": _Verb(_quickstart, "the line on a small synthetic shop, in minutes", "quickstart", split=_SPLIT),
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `bindings` are the flags `--gin.NAME=value`, which argparse has no notion of."""
    given = list(sys.argv[1:] if argv is None else argv)
    bindings = [argument.removeprefix("--gin.") for argument in given if argument.startswith("--gin.")]
    for binding in bindings:
        if "=" not in binding:
            raise CalrecError(f"--gin.{binding} has no value; write --gin.NAME=value in one piece")
    parser = _parser()
    arguments = parser.parse_args([argument for argument in given if not argument.startswith("--gin.")])
    arguments.bindings = bindings
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calrec",
        description="Text-based generative sequential recommendation: raw purchases in, rankings and a report out.",
        epilog="Try `calrec quickstart`, or `calrec VERB --help` for an example of each. "
        f"{_ALLOCATOR_SWITCH}=0 in the environment keeps the C allocator's own settings.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"calrec {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in _VERBS.items():
        one = verbs.add_parser(
            name,
            help=verb.purpose,
            description=f"{verb.purpose}. What is done already is skipped; what was interrupted goes on.",
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        one.add_argument("--gin_file", action="append", default=[], metavar="FILE", help=_GIN_FILE_HELP)
        one.add_argument("--gin.NAME", dest="_", metavar="VALUE", help="sets a macro or a binding; repeatable")
        one.add_argument(
            "--gin_search_paths", type=_folders, default=[], metavar="DIR,…", help="where gin files are sought first"
        )
        one.add_argument("--run_dir", metavar="DIR", help="the run folder: shorthand for --gin.RUN_DIR")
        for option, settings in verb.options.items():
            one.add_argument(f"--{option}", **settings)
    return parser


_GIN_FILE_HELP = "repeatable, later files override; also one of the packaged files, such as runs/quickstart.gin"


def _folders(text: str) -> list[str]:
    return [folder for folder in text.split(",") if folder]


def _set_allocator() -> None:
    """Starts this command once more with the allocator's settings, unless they are there or not wanted."""
    if os.environ.get(_ALLOCATOR_SWITCH) in ("0", "set") or not _has_glibc():
        return
    environment = {**_ALLOCATOR, **os.environ, _ALLOCATOR_SWITCH: "set"}  # what the user has set stays
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _has_glibc() -> bool:
    try:
        return sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
