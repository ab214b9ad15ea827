"""The verbs of the command: their flags, their help, and how the command line is read.

Notable: nothing heavy is imported here, nor by `actions.py` before a verb runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from calrec_jax import __version__, actions, allocator
from calrec_jax.errors import CalrecError

COMPUTING = ("train", "decode", "baselines", "eval_tasks", "run", "quickstart")
ON_HOSTS = ("train", "decode", "run")
_SPLIT = {"choices": ("validation", "test"), "help": "in place of run.split"}


class Verb:
    """A verb.

    Attributes:
      call: what it does: of the run and the arguments, or (`of_line` is false) of the arguments alone.
      purpose: what it reads → what it makes.
      example: a whole command.
      of_line: whether it is given the run that gin files describe.
      source: name and help of an argument without a flag.
      options: flag to what argparse wants to know of it.
    """

    def __init__(
        self,
        call: Callable[..., None],
        purpose: str,
        example: str,
        source: tuple[str, str] | None = None,
        of_line: bool = True,
        **options: dict,
    ):
        """Keeps them."""
        self.call, self.purpose, self.example, self.options = call, purpose, f"calrec {example}", options
        self.source, self.of_line = source, of_line


def _mesh_shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


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
VERBS = {
    "prepare": Verb(
        actions.prepare,
        "raw dumps → a dataset for each category",
        f"prepare {_RUN} --gin.DATA_DIR='\"/data/amazon2018\"'",
        category={"help": "only this one"},
        engine={"metavar": "URL", "help": "in place of prepare.engine, e.g. 'pyspark://?spark.master=local[2]'"},
    ),
    "vocab": Verb(actions.vocab, "catalogues → a SentencePiece vocabulary", f"vocab {_RUN}"),
    "train": Verb(
        actions.train,
        "datasets → checkpoints, stage by stage",
        f"train {_RUN} --stage=stage2",
        stage={"help": "only this one: stage1 or stage2"},
        profile_steps={
            "type": _two_steps,
            "metavar": "FIRST:LAST",
            "help": "trace these steps into the stage's folder profile/ (TensorBoard, Perfetto), e.g. 20:25",
        },
    ),
    "decode": Verb(
        actions.decode,
        "checkpoint → completions for each user",
        f"decode {_RUN} --split=validation",
        name={"help": "only this one of run.decodes"},
        split=_SPLIT,
    ),
    "rank": Verb(
        actions.rank,
        "completions → rankings of the catalogue",
        f"rank {_RUN} --name=calrec",
        name={"help": "only this one of run.rankings"},
        split=_SPLIT,
    ),
    "doctor": Verb(
        actions.doctor,
        "how well BM25 finds items by their own texts, and by completions: the ceiling of grounding",
        f"doctor {_RUN}",
        split=_SPLIT,
    ),
    "baselines": Verb(
        actions.baselines,
        "raw dumps → baselines, trained and counted, and a report",
        "baselines --gin_file=runs/scientific_baselines.gin --run_dir=runs/sci --gin.DATA_DIR='\"/data/amazon2018\"'",
        name={"help": "only this one, of run.baselines or as evaluate.baselines names them, into a report of its own"},
        split=_SPLIT,
    ),
    "evaluate": Verb(
        actions.evaluate,
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
    "compare": Verb(
        actions.compare,
        "reports of several runs → paired differences, one page",
        "compare small=runs/s0,runs/s1,runs/s2 large=runs/l0,runs/l1,runs/l2",
        of_line=False,
        out={"default": "compare", "metavar": "DIR", "help": "folder of compare.html and compare.json (compare)"},
        split={**_SPLIT, "help": "whose reports are compared (test)"},
    ),
    "eval_tasks": Verb(
        actions.eval_tasks,
        "a SeqIO task or mixture → metrics",
        f"eval_tasks {_RUN} --gin.eval_tasks.task='\"calrec_mixture\"'",
        name={"help": "as this one of run.rankings ranks; the first one otherwise"},
        split=_SPLIT,
    ),
    "export": Verb(
        actions.export,
        "checkpoint → a model to serve, or a T5X checkpoint, with its model card",
        f"export {_RUN} --format=saved_model",
        format={"required": True, "choices": ("saved_model", "jax", "t5x"), "help": "TensorFlow, jax.export or T5X"},
        stage={"help": "stage1 or stage2; the run's last one otherwise"},
        out={"metavar": "DIR", "help": "a folder that is not there yet; exports/FORMAT of the run folder otherwise"},
    ),
    "run": Verb(actions.run_line, "all of the above but eval_tasks and export, in a row", f"run {_RUN}", split=_SPLIT),
    "compile": Verb(
        actions.compile_steps,
        "training and decoding steps → do they fit a TPU slice, with no TPU here",
        "compile --gin_file=runs/quickstart.gin --run_dir=none --topology=v5e:4x4",
        topology={"required": True, "metavar": "NAME", "help": "of the slice, e.g. v5e:16x16, v4:8x8x8, v6e:8x8"},
        num_slices={"type": int, "default": 1, "metavar": "N", "help": "slices joined by the data centre's network"},
        stage={"help": "only this one: stage1 or stage2"},
        name={"help": "only this one of run.decodes"},
        items={"type": int, "default": 10_000, "metavar": "I", "help": "of a constrained decode's made-up catalogue"},
    ),
    "download": Verb(
        actions.download,
        "public sources → raw dumps of Amazon Reviews, resumed and checked",
        "download --layout=2018 --category=Gift_Cards --data_dir=data",
        of_line=False,
        layout={"choices": ("2014", "2018", "2023"), "default": "2018", "help": "the release; default 2018"},
        category={"action": "append", "default": [], "metavar": "NAME", "help": "repeatable, such as Gift_Cards"},
        subset={"choices": ("5core", "full", "ratings", "benchmark"), "help": _SUBSET_HELP},
        data_dir={"default": "data", "metavar": "DIR", "help": "where the files go; default data"},
        mirror={"action": "append", "metavar": "URL", "help": "in place of the release's own; repeatable"},
    ),
    "synth": Verb(
        actions.synth,
        "raw dumps of any size with made-up users and items, for benchmarks",
        "synth --users=100000 --items=20000 --layout=2018 --out=data",
        of_line=False,
        users={"type": int, "required": True, "help": "how many"},
        items={"type": int, "required": True, "help": "how many"},
        reviews_per_user={"type": float, "default": 8.0, "help": "their mean (default 8)"},
        layout={"choices": ("2018",), "default": "2018", "help": "of the files (default 2018)"},
        category={"default": "Office_Products", "help": "whose words are used (default Office_Products)"},
        seed={"type": int, "default": 0, "help": "the same seed gives the same bytes (default 0)"},
        out={"required": True, "metavar": "DIR", "help": "the folder to write into"},
    ),
    "import_hf": Verb(
        actions.hugging_face,
        "a Hugging Face folder → checkpoint, gin file and tokenizer to train from",
        "import_hf models/gemma-3-270m --out=models/gemma3_270m",
        of_line=False,
        source=("DIR", "with config.json, *.safetensors and tokenizer.json or tokenizer.model"),
        out={"required": True, "metavar": "DIR", "help": "the folder to write into"},
        mesh_shape={
            "type": _mesh_shape,
            "metavar": "R,D,F,M",
            "help": "sizes of the mesh (replica, data, fsdp, model) that the parameters are laid over; all on fsdp",
        },
    ),
    "export_hf": Verb(
        actions.hugging_face,
        "a checkpoint → a Hugging Face folder",
        "export_hf runs/toys/stage2 --out=exported",
        of_line=False,
        source=("CHECKPOINT", "folder of a stage, or what import_hf wrote"),
        out={"required": True, "metavar": "DIR", "help": "the folder to write into"},
        tokenizer={"metavar": "DIR", "help": "in place of the tokenizer folder in or beside the checkpoint's"},
        dtype={"choices": ("float32", "bfloat16", "float16"), "help": "of the tensors; default: as they were imported"},
        max_shard_gib={"type": float, "default": 5.0, "metavar": "GIB", "help": "largest file (default 5)"},
    ),
    "quickstart": Verb(
        actions.quickstart, "the line on a small synthetic shop, in minutes", "quickstart", split=_SPLIT
    ),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
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
        f"{allocator.SWITCH}=0 in the environment keeps the C allocator's own settings.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"calrec {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        one = verbs.add_parser(
            name,
            help=verb.purpose,
            description=f"{verb.purpose}. {_AGAIN.get(name, _RESUMES if verb.of_line else '')}".strip(),
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        one.set_defaults(example=verb.example)
        if verb.source:
            one.add_argument("source", metavar=verb.source[0], help=verb.source[1])
        if name == "compare":
            one.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or NAME=RUN,RUN,… for several seeds")
        elif verb.of_line:
            _add_gin_flags(one)
        for option, settings in (verb.options | (_HOSTS if name in ON_HOSTS else {})).items():
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
