"""The command `calrec`: one verb a step, all of them over the same gin file and run folder.

Notable: nothing heavy is imported before a verb runs, so `calrec --help` answers at once. On Linux with glibc the verbs
that train or decode (`_COMPUTING`) start themselves once more with the C allocator set for large arrays, which can only
be done by the environment of a new process; docs/performance.md has what that gains, and `CALREC_ALLOCATOR=0` switches
it off.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from calrec_jax import __version__, hosts
from calrec_jax.errors import CalrecError, Stopped

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
_COMPUTING = ("train", "decode", "baselines", "eval_tasks", "run", "quickstart")
_ON_HOSTS = ("train", "decode", "run")
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
    if arguments.verb not in _ON_HOSTS:
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

    if arguments.verb == "download":
        return _download(arguments)
    if arguments.verb == "synth":
        return _synth(arguments)
    if arguments.verb == "compare":
        return _compare(arguments)
    if arguments.verb in ("import_hf", "export_hf"):
        return _hugging_face(arguments)
    if arguments.verb == "quickstart":
        from calrec_jax import quickstart

        arguments.gin_file = arguments.gin_file or [quickstart.GIN_FILE]
        arguments.run_dir = arguments.run_dir or quickstart.RUN_DIR
    if not arguments.gin_file:
        raise CalrecError(f"--gin_file is missing, for example: {_VERBS[arguments.verb].example}")
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
        call = _VERBS[arguments.verb].call
        assert call is not None
        call(line, arguments)


def _download(arguments: argparse.Namespace) -> None:
    from calrec_jax.data.download import download

    if not arguments.category:
        raise CalrecError(f"--category is missing, for example: {_VERBS['download'].example}")
    download(
        arguments.data_dir,
        arguments.layout,
        arguments.category,
        subset=arguments.subset,
        mirrors=arguments.mirror,
    )


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


def _baselines(line: Line, arguments: argparse.Namespace) -> None:
    from calrec_jax.pipeline import print_summary

    line.run_baselines(arguments.name)
    print_summary(line.layout, line.split)


def _doctor(line: Line, arguments: argparse.Namespace) -> None:
    line.doctor()


def _evaluate(line: Line, arguments: argparse.Namespace) -> None:
    from calrec_jax.pipeline import print_summary

    if arguments.rankings:
        if arguments.split is None:
            raise CalrecError("--rankings: say which split the files rank for, by --split=validation or --split=test")
        line.evaluate_files(arguments.rankings)
        return
    line.evaluate()
    print_summary(line.layout, line.split)


def _compare(arguments: argparse.Namespace) -> None:
    import pathlib

    from calrec_jax import artifacts
    from calrec_jax.evaluate import compare

    groups = compare.parse_groups(arguments.runs)
    out = pathlib.Path(arguments.out).expanduser()
    with artifacts.disk_errors(out):
        found = compare.compare(groups, out, split=arguments.split or "test")
    compare.print_comparison(found)
    print(f"Made:\n  {out / 'compare.html'}\n  {out / 'compare.json'}")


def _hugging_face(arguments: argparse.Namespace) -> None:
    from calrec_jax import artifacts

    out = os.path.expanduser(arguments.out)
    with artifacts.disk_errors(out):
        if arguments.verb == "import_hf":
            from calrec_jax.pretrained.import_hf import import_hf

            import_hf(os.path.expanduser(arguments.source), out, arguments.mesh_shape)
            return
        from calrec_jax.pretrained.export_hf import export_hf

        export_hf(
            os.path.expanduser(arguments.source),
            out,
            tokenizer=arguments.tokenizer,
            dtype=arguments.dtype,
            max_shard_gib=arguments.max_shard_gib,
        )


def _mesh_shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _eval_tasks(line: Line, arguments: argparse.Namespace) -> None:
    line.eval_tasks(arguments.name)


def _export(line: Line, arguments: argparse.Namespace) -> None:
    line.export(arguments.format, arguments.stage, arguments.out)


def _run_line(line: Line, arguments: argparse.Namespace) -> None:
    line.run()
    if hosts.is_first():
        _say_next(line, arguments)


def _compile(line: Line, arguments: argparse.Namespace) -> None:
    from calrec_jax.train.compile import bound_vocab_size, compile_stage, make_mesh

    if arguments.name is None:
        for stage in [arguments.stage] if arguments.stage is not None else line.stages:
            compile_stage(stage, arguments.topology, arguments.num_slices, line.init_from)
    if arguments.stage is not None:
        return
    from calrec_jax.decode.compile import compile_decode

    mesh = make_mesh(arguments.topology, 1)
    for name in [arguments.name] if arguments.name is not None else line.decodes:
        compile_decode(name, line.stages[-1], mesh, bound_vocab_size(line.init_from), arguments.items)


def _quickstart(line: Line, arguments: argparse.Namespace) -> None:
    from calrec_jax import quickstart

    quickstart.make_shop(line)
    _run_line(line, arguments)


def _synth(arguments: argparse.Namespace) -> None:
    from calrec_jax import artifacts
    from calrec_jax.data.synth import Synth, write_synth

    names = ("users", "items", "reviews_per_user", "seed", "category", "layout")
    with artifacts.disk_errors(arguments.out):
        paths = write_synth(arguments.out, Synth(**{name: getattr(arguments, name) for name in names}))
    print("Made:", *(f"  {path} ({path.stat().st_size:,} bytes)" for path in paths), sep="\n")


def _say_next(line: Line, arguments: argparse.Namespace) -> None:
    if line.split == "test":
        files = [f"--gin_file={file}" for file in arguments.gin_file]
        bindings = [f"--gin.{binding}" for binding in arguments.bindings]
        print("Next, the same model on the validation split, where settings are chosen:")
        print(
            f"  {shlex.join(['calrec', 'run', *files, *bindings, f'--run_dir={line.run_dir}', '--split=validation'])}"
        )


class _Verb:
    """A verb; one without `call` is no step of a line, and takes its own options alone."""

    def __init__(
        self,
        call: Callable[[Line, argparse.Namespace], None] | None,
        purpose: str,
        example: str,
        source: tuple[str, str] | None = None,
        **options: dict,
    ):
        self.call, self.purpose, self.example, self.options = call, purpose, f"calrec {example}", options
        self.source = source  # name and help of an argument without a flag


def _two_steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST, two whole numbers of steps")
    return int(first), int(last)


_RUN = "--gin_file=runs/scientific_reproduction.gin --run_dir=runs/sci"
_HOSTS: dict[str, dict] = {
    "multihost": {"action": "store_true", "help": "one of several hosts that find each other (TPU VMs, Slurm)"},
    "coordinator_address": {"metavar": "HOST:PORT", "help": "of process 0, where hosts do not find each other"},
    "process_count": {"type": int, "metavar": "N", "help": "processes of the run"},
    "process_index": {"type": int, "metavar": "I", "help": "of this one, from 0"},
    "join_seconds": {"type": int, "default": 300, "metavar": "S", "help": "how long to wait for all at the start"},
    "heartbeat_seconds": {
        "type": int,
        "default": 100,
        "metavar": "S",
        "help": "silence after which one counts as dead",
    },
}
_SUBSET_HELP = "which reviews; benchmark is the official split of 2023; default: 5core where there is one, else full"
_VERBS = {
    "prepare": _Verb(
        _prepare,
        "raw dumps → a dataset for each category",
        f"prepare {_RUN} --gin.DATA_DIR='\"/data/amazon2018\"'",
        category={"help": "only this one"},
        engine={"metavar": "URL", "help": "in place of prepare.engine, e.g. 'pyspark://?spark.master=local[2]'"},
    ),
    "vocab": _Verb(_vocab, "catalogues → a SentencePiece vocabulary", f"vocab {_RUN}"),
    "train": _Verb(
        _train,
        "datasets → checkpoints, stage by stage",
        f"train {_RUN} --stage=stage2",
        stage={"help": "only this one: stage1 or stage2"},
        profile_steps={
            "type": _two_steps,
            "metavar": "FIRST:LAST",
            "help": "trace these steps into the stage's folder profile/ (TensorBoard, Perfetto), e.g. 20:25",
        },
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
    "baselines": _Verb(
        _baselines,
        "raw dumps → baselines, trained and counted, and a report",
        "baselines --gin_file=runs/scientific_baselines.gin --run_dir=runs/sci --gin.DATA_DIR='\"/data/amazon2018\"'",
        name={"help": "only this one, of run.baselines or as evaluate.baselines names them, into a report of its own"},
        split=_SPLIT,
    ),
    "evaluate": _Verb(
        _evaluate,
        "rankings → metrics and a report",
        f"evaluate {_RUN} --rankings=theirs.jsonl --split=test",
        rankings={
            "action": "append",
            "default": [],
            "metavar": "[NAME=]FILE",
            "help": "a ranking made by others (Parquet, JSONL, TREC run), beside the run's; repeatable, needs --split",
        },
        split=_SPLIT,
    ),
    "compare": _Verb(
        None,
        "reports of several runs → paired differences, one page",
        "compare small=runs/s0,runs/s1,runs/s2 large=runs/l0,runs/l1,runs/l2",
        out={"default": "compare", "metavar": "DIR", "help": "folder of compare.html and compare.json (compare)"},
        split={**_SPLIT, "help": "whose reports are compared (test)"},
    ),
    "eval_tasks": _Verb(
        _eval_tasks,
        "a SeqIO task or mixture → metrics",
        f"eval_tasks {_RUN} --gin.eval_tasks.task='\"calrec_mixture\"'",
        name={"help": "as this one of run.rankings ranks; the first one otherwise"},
        split=_SPLIT,
    ),
    "export": _Verb(
        _export,
        "checkpoint → a model to serve, or a T5X checkpoint, with its model card",
        f"export {_RUN} --format=saved_model",
        format={"required": True, "choices": ("saved_model", "jax", "t5x"), "help": "TensorFlow, jax.export or T5X"},
        stage={"help": "stage1 or stage2; the run's last one otherwise"},
        out={"metavar": "DIR", "help": "a folder that is not there yet; exports/FORMAT of the run folder otherwise"},
    ),
    "run": _Verb(_run_line, "all of the above but eval_tasks and export, in a row", f"run {_RUN}", split=_SPLIT),
    "compile": _Verb(
        _compile,
        "training and decoding steps → do they fit a TPU slice, with no TPU here",
        "compile --gin_file=runs/quickstart.gin --run_dir=none --topology=v5e:4x4",
        topology={"required": True, "metavar": "NAME", "help": "of the slice, e.g. v5e:16x16, v4:8x8x8, v6e:8x8"},
        num_slices={"type": int, "default": 1, "metavar": "N", "help": "slices joined by the data centre's network"},
        stage={"help": "only this one: stage1 or stage2"},
        name={"help": "only this one of run.decodes"},
        items={"type": int, "default": 10_000, "metavar": "I", "help": "of a constrained decode's made-up catalogue"},
    ),
    "download": _Verb(
        None,
        "public sources → raw dumps of Amazon Reviews, resumed and checked",
        "download --layout=2018 --category=Gift_Cards --data_dir=data",
        layout={"choices": ("2014", "2018", "2023"), "default": "2018", "help": "the release; default 2018"},
        category={"action": "append", "default": [], "metavar": "NAME", "help": "repeatable, such as Gift_Cards"},
        subset={"choices": ("5core", "full", "ratings", "benchmark"), "help": _SUBSET_HELP},
        data_dir={"default": "data", "metavar": "DIR", "help": "where the files go; default data"},
        mirror={"action": "append", "metavar": "URL", "help": "in place of the release's own; repeatable"},
    ),
    "synth": _Verb(
        None,
        "raw dumps of any size with made-up users and items, for benchmarks",
        "synth --users=100000 --items=20000 --layout=2018 --out=data",
        users={"type": int, "required": True, "help": "how many"},
        items={"type": int, "required": True, "help": "how many"},
        reviews_per_user={"type": float, "default": 8.0, "help": "their mean (default 8)"},
        layout={"choices": ("2018",), "default": "2018", "help": "of the files (default 2018)"},
        category={"default": "Office_Products", "help": "whose words are used (default Office_Products)"},
        seed={"type": int, "default": 0, "help": "the same seed gives the same bytes (default 0)"},
        out={"required": True, "metavar": "DIR", "help": "the folder to write into"},
    ),
    "import_hf": _Verb(
        None,
        "a Hugging Face folder → checkpoint, gin file and tokenizer to train from",
        "import_hf models/gemma-3-270m --out=models/gemma3_270m",
        source=("DIR", "with config.json, *.safetensors and tokenizer.json or tokenizer.model"),
        out={"required": True, "metavar": "DIR", "help": "the folder to write into"},
        mesh_shape={
            "type": _mesh_shape,
            "metavar": "R,D,F,M",
            "help": "sizes of the mesh (replica, data, fsdp, model) that the parameters are laid over; all on fsdp",
        },
    ),
    "export_hf": _Verb(
        None,
        "a checkpoint → a Hugging Face folder",
        "export_hf runs/toys/stage2 --out=exported",
        source=("CHECKPOINT", "folder of a stage, or what import_hf wrote"),
        out={"required": True, "metavar": "DIR", "help": "the folder to write into"},
        tokenizer={"metavar": "DIR", "help": "in place of the tokenizer folder in or beside the checkpoint's"},
        dtype={"choices": ("float32", "bfloat16", "float16"), "help": "of the tensors; default: as they were imported"},
        max_shard_gib={"type": float, "default": 5.0, "metavar": "GIB", "help": "largest file (default 5)"},
    ),
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
            description=f"{verb.purpose}. {_AGAIN.get(name, _RESUMES if verb.call is not None else '')}".strip(),
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if verb.source:
            one.add_argument("source", metavar=verb.source[0], help=verb.source[1])
        if name == "compare":
            one.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or NAME=RUN,RUN,… for several seeds")
        elif verb.call is not None:
            _add_gin_flags(one)
        for option, settings in (verb.options | (_HOSTS if name in _ON_HOSTS else {})).items():
            one.add_argument(f"--{option}", **settings)
    return parser


_RESUMES = "What is done already is skipped; what was interrupted goes on."
_AGAIN = {"compile": "It writes nothing.", "export": "A folder that is there already is refused."}


def _add_gin_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gin_file", action="append", default=[], metavar="FILE", help=_GIN_FILE_HELP)
    parser.add_argument("--gin.NAME", dest="_", metavar="VALUE", help="sets a macro or a binding; repeatable")
    parser.add_argument(
        "--gin_search_paths", type=_folders, default=[], metavar="DIR,…", help="where gin files are sought first"
    )
    parser.add_argument("--run_dir", metavar="DIR", help="the run folder: shorthand for --gin.RUN_DIR")


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
