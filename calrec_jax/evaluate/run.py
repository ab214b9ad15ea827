"""The verb `evaluate`: rankings and baselines in, `metrics.json`, `per_user.parquet` and the report out.

Notable: every user of the split counts in every row; one without a list, or whose target lies beyond its depth, is a
miss. Ranks come from the scores over the whole catalogue, never from the order of tied items.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import numpy as np
import pyarrow.parquet as pq

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate import baselines as baseline_rankings
from calrec_jax.evaluate import bootstrap
from calrec_jax.evaluate.beyond import Catalogue
from calrec_jax.evaluate.foreign import ForeignRanking, print_findings, read_ranking
from calrec_jax.evaluate.generation import read_generation, split_errors, summarise_generation
from calrec_jax.evaluate.metrics import CUTOFFS, MRR_CUTOFFS, NDCG_CUTOFFS, TIES, metric_names
from calrec_jax.evaluate.places import (
    TOP,
    Places,
    Targets,
    add_scores,
    places_of_lists,
    places_of_source,
)
from calrec_jax.evaluate.slices import make_slices
from calrec_jax.evaluate.summary import BASELINE, CALREC, ORACLE, OTHER, Row, Summary
from calrec_jax.evaluate.terminal import print_table
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Scores
from calrec_jax.rank.run import BASELINES as BASELINE_SOURCES
from calrec_jax.rank.run import KIND as RANKING
from calrec_jax.rank.shards import RankingReader

KIND = "report"
BASELINES = ("popularity", "last_item", "transitions", "bm25_last")
USERS = ("all", "ranked")


@gin.configurable
def evaluate(
    out: pathlib.Path,
    dataset: Dataset,
    rankings: Mapping[str, pathlib.Path],
    *,
    split: str = "test",
    files: Mapping[str, pathlib.Path] | None = None,
    baselines: Sequence[str] = BASELINES,
    bm25_text: str = "reference",
    cutoffs: Sequence[int] = CUTOFFS,
    ndcg_cutoffs: Sequence[int] = NDCG_CUTOFFS,
    mrr_cutoffs: Sequence[int] = MRR_CUTOFFS,
    beyond_cutoff: int = TOP,
    ties: str = "mean_rank",
    users: str = "all",
    oracle: pathlib.Path | None = None,
    resamples: int = bootstrap.RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
    shown_users: int = 200,
    completions: Mapping[str, pathlib.Path] | None = None,
    training: Mapping[str, pathlib.Path] | None = None,
    run_dir: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Scores rankings beside baselines and writes the report, unless that is done; prints the table in any case.

    Args:
      out: the report's folder.
      dataset: evaluated.
      rankings: name of a row to the folder of its ranking.
      split: "validation" or "test".
      files: name of a row to a ranking made by others (see `foreign`).
      baselines: rows without training; names out of `baselines.BASELINES`.
      bm25_text: what BM25 reads in them, "reference" or "ranking" (see `baselines`).
      cutoffs: of Recall.
      ndcg_cutoffs: of NDCG.
      mrr_cutoffs: of MRR, beside the whole lists.
      beyond_cutoff: of coverage, popularity, novelty and diversity (see `beyond`).
      ties: which of `metrics.TIES` the table shows; `metrics.json` has all.
      users: "all" of the split, or those "ranked" by every ranking (for trials on a part of the users).
      oracle: the shop's own probabilities of the test purchases; adds the ceiling as a row.
      resamples: of bootstrap and paired tests.
      level: coverage of the intervals.
      seed: of the resamples, and of the users that the page shows.
      shown_users: how many single users the page shows, at most.
      completions: name to folder, for the report; None: those in the run folder that a ranking was made from.
      training: stage to folder, for the report; None: those in the run folder.
      run_dir: the run folder; None: the folder above `out`.

    Returns:
      What `metrics.json` holds.

    Raises:
      CalrecError: a setting is not valid, a ranking is missing, broken, or of another dataset or split, a file that
        is read was changed after it was written, or `out` holds a report made otherwise.
    """
    from calrec_jax.evaluate.report import write_report

    out = pathlib.Path(out)
    run_dir = out.parent if run_dir is None else pathlib.Path(run_dir)
    files = dict(files or {})
    metric_names(cutoffs, ndcg_cutoffs, mrr_cutoffs)
    _check_settings(ties, users, beyond_cutoff, shown_users)
    bootstrap.check_level(level)
    manifests = {name: _ranking_manifest(folder, dataset, split) for name, folder in rankings.items()}
    made_from = {"dataset": dataset.hash, **{f"ranking {name}": made["hash"] for name, made in manifests.items()}}
    made_from |= {f"file {name}": artifacts.hash_file(path) for name, path in files.items()}
    if oracle is not None:
        made_from[ORACLE] = artifacts.hash_file(oracle)
    settings = {
        "split": split,
        "baselines": list(baselines),
        "bm25_text": bm25_text,
        "cutoffs": list(cutoffs),
        "ndcg_cutoffs": list(ndcg_cutoffs),
        "mrr_cutoffs": list(mrr_cutoffs),
        "beyond_cutoff": beyond_cutoff,
        "ties": ties,
        "users": users,
        "resamples": resamples,
        "level": level,
        "seed": seed,
        "shown_users": shown_users,
        **baseline_rankings.baseline_settings(baselines),
    }
    if artifacts.is_done(out, kind=KIND, made_from=made_from, settings=settings):
        artifacts.check_files(out, artifacts.read_manifest(out, kind=KIND))
        metrics = artifacts.read_json(out / "metrics.json")
        print_table(metrics)
        return metrics
    _check_names([*baselines, *rankings, *files, *([ORACLE] if oracle is not None else [])])
    if completions is None:
        completions = _completions_of(manifests, run_dir)
    for name, folder in rankings.items():
        artifacts.check_files(folder, manifests[name])
    for folder in completions.values():
        artifacts.check_files(folder, artifacts.read_manifest(folder, kind="completions"))
    targets = _targets(dataset, split)
    rows = [
        Row(name, BASELINE, places_of_source(source, targets))
        for name, source in baseline_rankings.baseline_sources(baselines, dataset, targets.histories, bm25_text).items()
    ]
    rows += [_ranking_row(name, folder, manifests[name], targets) for name, folder in rankings.items()]
    others = {name: read_ranking(name, path, targets) for name, path in files.items()}
    rows += [_file_row(ranking, targets) for ranking in others.values()]
    if oracle is not None:
        rows.append(_oracle_row(oracle, targets, split))
    summary = Summary(rows, targets, settings)
    metrics = summary.metrics(make_slices(targets), Catalogue(dataset))
    metrics["generation"] = _generation(completions, manifests, summary)
    metrics["made_from"] = made_from
    out.mkdir(parents=True, exist_ok=True)
    with artifacts.atomic_file(out / "per_user.parquet") as temporary:
        pq.write_table(summary.per_user(), temporary, compression="zstd")
    artifacts.write_json(out / "metrics.json", metrics)
    report = write_report(
        out,
        dataset=dataset,
        metrics=metrics,
        rankings={**rankings, **others},
        completions=completions,
        training=training_of(run_dir) if training is None else training,
        run_dir=run_dir,
        users=shown_users,
        seed=seed,
    )
    # The page shows the seconds of the steps, so this manifest's hash is another in each run; nothing is made from it.
    written = artifacts.hash_files([out / "metrics.json", out / "per_user.parquet", report])
    artifacts.write_manifest(out, kind=KIND, made_from=made_from, settings=settings, files=written)
    print_table(metrics)
    return metrics


def _check_settings(ties: str, users: str, beyond_cutoff: int, shown_users: int) -> None:
    if ties not in TIES or users not in USERS:
        raise CalrecError(f"evaluate.ties is {ties!r} (one of {list(TIES)}), users is {users!r} (one of {list(USERS)})")
    if not 1 <= beyond_cutoff <= TOP:
        raise CalrecError(f"evaluate.beyond_cutoff is {beyond_cutoff}: it can be 1 to {TOP}")
    if shown_users < 1:
        raise CalrecError(f"evaluate.shown_users is {shown_users}: the page shows at least one user")


def _targets(dataset: Dataset, split: str) -> Targets:
    """What is asked of every ranking: the targets of all users who have one in the split."""
    histories = Histories(dataset, split)
    return Targets(dataset, histories, dataset.users_with(split))


def _ranking_manifest(folder: pathlib.Path, dataset: Dataset, split: str) -> dict[str, Any]:
    manifest = artifacts.read_manifest(folder, kind=RANKING)
    if manifest["made_from"].get("dataset") != dataset.hash:
        raise CalrecError(f"{folder} ranks another dataset than {dataset.name} as it is now; rank this one")
    if manifest["settings"].get("split", split) != split:
        raise CalrecError(
            f"{folder} ranks for the split {manifest['settings']['split']!r}, not {split!r}; correct the path"
        )
    return manifest


def _check_names(names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise CalrecError(f"the report would have several rows named {repeated}; name the rankings otherwise")
    if not names:
        raise CalrecError("nothing to evaluate: give rankings or evaluate.baselines")


def ranking_places(folder: pathlib.Path, targets: Targets, depth: int | None = None) -> Places:
    """Places of the targets in a ranking's shards.

    A target beyond a list's end is a miss, even where the last score of the list goes on beyond it.

    Args:
      folder: of the ranking.
      targets: what is asked.
      depth: of the lists; None: their greatest length.

    Raises:
      CalrecError: the shards are missing or broken, or name users or items that the dataset does not have.
    """
    return places_of_lists(RankingReader(folder, targets.dataset).blocks(), targets, depth)


def _ranking_row(name: str, folder: pathlib.Path, manifest: Mapping[str, Any], targets: Targets) -> Row:
    settings = manifest["settings"]
    kind = BASELINE if settings.get("source") in BASELINE_SOURCES else CALREC
    facts = {"leave_out_history": settings.get("leave_out_history", "none")}
    return Row(name, kind, ranking_places(folder, targets, manifest.get("list_depth")), facts)


def _file_row(ranking: ForeignRanking, targets: Targets) -> Row:
    print_findings(ranking)
    places = places_of_lists(ranking.blocks(), targets, ranking.depth)
    return Row(ranking.name, OTHER, places, {"file": ranking.path.name, "findings": ranking.findings})


def _oracle_row(path: pathlib.Path, targets: Targets, split: str) -> Row:
    """The ceiling: the shop's own probabilities as a ranking. Items that it does not name have probability 0."""
    from calrec_jax.data.shop import load_oracle

    if split != "test":
        raise CalrecError(f"the oracle {path} knows the test purchases, and {split!r} is evaluated; leave it out")
    oracle = load_oracle(path)
    dataset = targets.dataset
    row_of = {str(user): row for row, user in enumerate(oracle.user_ids)}
    column_of = {str(item): column for column, item in enumerate(oracle.item_ids)}
    rows = np.array([row_of.get(str(user), -1) for user in dataset.user_ids[targets.users]])
    columns = np.array([column_of.get(str(item), -1) for item in dataset.item_ids])
    if (rows < 0).any():
        first = dataset.user_ids[targets.users[np.flatnonzero(rows < 0)[0]]]
        raise CalrecError(
            f"{path} lacks {(rows < 0).sum()} users of {dataset.name}, {first!r} first: it is another shop's"
        )
    places = Places.nowhere(len(rows), len(columns))
    for at in range(0, len(rows), 512):
        some = np.arange(at, min(at + 512, len(rows)))
        probabilities = np.where(columns >= 0, np.asarray(oracle.probabilities)[rows[some]][:, columns], 0.0)
        add_scores(places, targets, some, Scores(probabilities.astype(np.float64)))
    return Row(ORACLE, ORACLE, places)


def _generation(
    completions: Mapping[str, pathlib.Path], manifests: Mapping[str, Mapping[str, Any]], summary: Summary
) -> list[dict[str, Any]]:
    """Health of each decode, and for the rankings made from it where errors come from."""
    found = []
    for name, folder in completions.items():
        own = artifacts.read_manifest(folder, kind="completions")["hash"]
        made = read_generation(folder, summary.targets)
        errors = {
            row.name: split_errors(made, row.places.ranks, summary.population)
            for row in summary.rows
            if row.name in manifests and manifests[row.name]["made_from"].get("completions") == own
        }
        found.append({"name": name, **summarise_generation(made, summary.population), "errors": errors})
    return found


def _completions_of(manifests: Mapping[str, dict[str, Any]], run_dir: pathlib.Path) -> dict[str, pathlib.Path]:
    """The completions in the run folder that the rankings were made from."""
    wanted = {manifest["made_from"].get("completions") for manifest in manifests.values()} - {None}
    folders = sorted(path.parent for path in (run_dir / "completions").glob("*/manifest.json"))
    return {
        folder.name: folder for folder in folders if artifacts.read_json(folder / "manifest.json")["hash"] in wanted
    }


def training_of(run_dir: pathlib.Path) -> dict[str, pathlib.Path]:
    """Folders of the stages in a run folder that left curves, by name."""
    return {stage: run_dir / stage for stage in ("stage1", "stage2") if (run_dir / stage / "metrics.jsonl").exists()}
