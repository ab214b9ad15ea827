"""What can be done with a run beside its steps: the doctor, rankings of others, SeqIO tasks, exports."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError

if TYPE_CHECKING:
    from calrec_jax.pipeline import Line


def doctor(line: Line) -> None:
    """Prints how well BM25 finds the target category's items by their own texts, and by the completions there."""
    from calrec_jax.rank import doctor as grounding
    from calrec_jax.rank.bm25 import BM25Index
    from calrec_jax.rank.completions import Completions

    dataset = line.dataset(line.target)
    index = BM25Index(dataset.texts)
    print(grounding.report(line.target, grounding.examine(index, dataset.texts)), flush=True)
    if index.without_words.size:
        print(f"  without a word: {', '.join(dataset.item_ids[index.without_words[:10]])}", flush=True)
    for name in line.decodes:
        folder = line.layout.completions(line.split, name)
        if not (folder / artifacts.MANIFEST).exists():
            print(f"completions {folder.name}: none yet", flush=True)
            continue
        artifacts.check_files(folder, artifacts.read_manifest(folder, kind="completions"))
        distinct, count = Completions(folder, dataset, ["texts"], missing="skip").distinct_texts()
        print(grounding.report_texts(folder.name, grounding.examine_texts(index, dataset.texts, distinct, count)))


def evaluate_files(line: Line, arguments: Sequence[str]) -> None:
    """Scores rankings made by others, `FILE` or `NAME=FILE`, beside those of the run that are there.

    The report is in `report-<names>` (with the split before the names where that is not test).
    """
    from calrec_jax.evaluate import foreign
    from calrec_jax.evaluate.run import evaluate

    files = foreign.parse_names(arguments)
    own = {name: line.layout.ranking(line.split, name) for name in line.rankings}
    made = {name: folder for name, folder in own.items() if (folder / artifacts.MANIFEST).exists()}
    if len(made) < len(own):
        print(f"calrec: not made yet, and left out: {', '.join(name for name in own if name not in made)}")
    out = line.layout.report(line.split)
    out = out.with_name("-".join([out.name, *files]))
    with line.step(f"evaluate {line.split} {' '.join(files)}", out):
        evaluate(out, line.dataset(line.target), made, split=line.split, files=files, run_dir=line.layout.root)
    print(f"Made:\n  {out / 'report.html'}")


def eval_tasks(line: Line, name: str | None = None) -> None:
    """Evaluates SeqIO tasks as the ranking `name` does it; None is the first one that ranks completions.

    What it decodes and its metrics lie in `eval_tasks/<split>-<name>/` of the run folder. The default task is the
    target's.
    """
    from calrec_jax.integrations.seqio_eval import eval_tasks as evaluate_tasks

    names = {ranking: decode for ranking, decode in line.rankings.items() if decode is not None}
    if not names or not line.stages:
        raise CalrecError("run.rankings names no decode, or run.stages is empty, so there is nothing to evaluate with")
    name = next(iter(names)) if name is None else name
    line.check_name(name, names, "run.rankings")
    target_first = dict.fromkeys([line.target, *line.categories])
    out = line.layout.eval_tasks(line.split, name)
    with line.step(f"eval_tasks {line.split}-{name}", out):
        evaluate_tasks(
            out,
            [line.layout.dataset(category) for category in target_first],
            line.layout.tokenizer,
            line.layout.stage(line.stages[-1]),
            split=line.split,
            decode_scope=names[name],
            rank_scope=name,
        )


def export(line: Line, format: str, stage: str | None = None, out: str | None = None) -> None:
    """Writes a stage, the last one by default, for serving or for T5X; see `calrec_jax.export.run.export`.

    Args:
      line: the run.
      format: "saved_model", "jax" or "t5x".
      stage: of `run.stages`.
      out: folder; None is `exports/<format>/` of the run folder.
    """
    from calrec_jax.export.card import Origin
    from calrec_jax.export.run import export as write_export

    if not line.stages:
        raise CalrecError("run.stages is empty, so there is no checkpoint to export")
    if stage is not None and stage not in line.stages:
        raise CalrecError(f"--stage={stage} is not in run.stages, which has {', '.join(line.stages)}")
    stages = line.stages[: line.stages.index(stage) + 1] if stage is not None else line.stages
    names = line.all_categories if "stage1" in stages else (line.target,)
    rankings = {
        name: (line.layout.ranking(line.split, name), line.layout.completions(line.split, decode))
        for name, decode in line.rankings.items()
        if decode is not None
    }
    origin = Origin(
        [line.layout.stage(name) for name in stages],
        [line.layout.dataset(name) for name in names],
        rankings,
        line.layout.report(line.split),
    )
    folder = pathlib.Path(out).expanduser() if out is not None else line.layout.export(format)
    with line.step(f"export {format}", folder):
        write_export(folder, format, origin, line.dataset(line.target), line.layout.tokenizer)
