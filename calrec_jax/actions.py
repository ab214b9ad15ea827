"""What each verb of the command does with its arguments; nothing heavy is imported before it does.

Notable: `verbs.py` names them. Most are given the run (`pipeline.Line`); those at the end take their own options alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
from typing import TYPE_CHECKING

from calrec_jax import hosts
from calrec_jax.errors import CalrecError

if TYPE_CHECKING:
    from calrec_jax.pipeline import Line


def prepare(line: Line, arguments: argparse.Namespace) -> None:
    """Makes the dataset of one category, or of each."""
    if arguments.category is not None and arguments.category not in line.all_categories:
        names = ", ".join(line.all_categories)
        raise CalrecError(f"--category={arguments.category} is not in run.categories, which has {names}")
    for category in [arguments.category] if arguments.category is not None else line.all_categories:
        line.prepare(category)


def vocab(line: Line, arguments: argparse.Namespace) -> None:
    """Makes the tokenizer."""
    line.vocab()


def train(line: Line, arguments: argparse.Namespace) -> None:
    """Trains one stage, or all in a row."""
    for stage in [arguments.stage] if arguments.stage is not None else line.stages:
        line.train(stage)


def decode(line: Line, arguments: argparse.Namespace) -> None:
    """Makes the completions of one decode, or of each."""
    for name in [arguments.name] if arguments.name is not None else line.decodes:
        line.decode(name)


def rank(line: Line, arguments: argparse.Namespace) -> None:
    """Makes one ranking, or each."""
    for name in [arguments.name] if arguments.name is not None else line.rankings:
        line.rank(name)


def baselines(line: Line, arguments: argparse.Namespace) -> None:
    """Makes the baselines and their report."""
    from calrec_jax.timing import print_summary

    line.run_baselines(arguments.name)
    print_summary(line.layout, line.split)


def doctor(line: Line, arguments: argparse.Namespace) -> None:
    """Says how well BM25 finds items."""
    from calrec_jax import beside_line

    beside_line.doctor(line)


def evaluate(line: Line, arguments: argparse.Namespace) -> None:
    """Writes the report, or that of rankings made by others."""
    from calrec_jax import beside_line, timing

    if arguments.rankings:
        if arguments.split is None:
            raise CalrecError("--rankings: say which split the files rank for, by --split=validation or --split=test")
        beside_line.evaluate_files(line, arguments.rankings)
        return
    line.evaluate()
    timing.print_summary(line.layout, line.split)


def eval_tasks(line: Line, arguments: argparse.Namespace) -> None:
    """Evaluates SeqIO tasks."""
    from calrec_jax import beside_line

    beside_line.eval_tasks(line, arguments.name)


def export(line: Line, arguments: argparse.Namespace) -> None:
    """Writes a stage for serving, or for T5X."""
    from calrec_jax import beside_line

    beside_line.export(line, arguments.format, arguments.stage, arguments.out)


def run_line(line: Line, arguments: argparse.Namespace) -> None:
    """Runs the whole line."""
    line.run()
    if hosts.is_first():
        _say_next(line, arguments)


def compile_steps(line: Line, arguments: argparse.Namespace) -> None:
    """Compiles steps for a TPU slice that is not here."""
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


def quickstart(line: Line, arguments: argparse.Namespace) -> None:
    """Runs the whole line on a synthetic shop."""
    from calrec_jax import quickstart

    quickstart.make_shop(line)
    run_line(line, arguments)


def _say_next(line: Line, arguments: argparse.Namespace) -> None:
    if line.split == "test":
        files = [f"--gin_file={file}" for file in arguments.gin_file]
        bindings = [f"--gin.{binding}" for binding in arguments.bindings]
        print("Next, the same model on the validation split, where settings are chosen:")
        print(
            f"  {shlex.join(['calrec', 'run', *files, *bindings, f'--run_dir={line.run_dir}', '--split=validation'])}"
        )


def download(arguments: argparse.Namespace) -> None:
    """Fetches raw dumps."""
    from calrec_jax.data.download import download

    if not arguments.category:
        raise CalrecError(f"--category is missing, for example: {arguments.example}")
    download(
        arguments.data_dir,
        arguments.layout,
        arguments.category,
        subset=arguments.subset,
        mirrors=arguments.mirror,
    )


def synth(arguments: argparse.Namespace) -> None:
    """Makes raw dumps up."""
    from calrec_jax import artifacts
    from calrec_jax.data.synth import Synth, write_synth

    names = ("users", "items", "reviews_per_user", "seed", "category", "layout")
    with artifacts.disk_errors(arguments.out):
        paths = write_synth(arguments.out, Synth(**{name: getattr(arguments, name) for name in names}))
    print("Made:", *(f"  {path} ({path.stat().st_size:,} bytes)" for path in paths), sep="\n")


def compare(arguments: argparse.Namespace) -> None:
    """Compares the reports of several runs."""
    import pathlib

    from calrec_jax import artifacts
    from calrec_jax.evaluate import compare

    groups = compare.parse_groups(arguments.runs)
    out = pathlib.Path(arguments.out).expanduser()
    with artifacts.disk_errors(out):
        found = compare.compare(groups, out, split=arguments.split or "test")
    compare.print_comparison(found)
    print(f"Made:\n  {out / 'compare.html'}\n  {out / 'compare.json'}")


def hugging_face(arguments: argparse.Namespace) -> None:
    """Imports a Hugging Face folder, or exports a checkpoint as one."""
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
