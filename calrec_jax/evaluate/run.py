"""The verb `evaluate`: rankings and baselines in, `metrics.json`, `per_user.parquet` and the report out.

Notable: every user of the split counts in every row; one without a list, or whose target lies beyond its depth, is a
miss. Ranks come from the scores over the whole catalogue, never from the order of tied items. All rows share the
bootstrap's resamples.
"""

import dataclasses
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
from calrec_jax.evaluate.metrics import CUTOFFS, NDCG_CUTOFFS, TIES, TargetRanks, metric_names, target_ranks
from calrec_jax.evaluate.summary import ORACLE, Row, print_table, summarise
from calrec_jax.rank.histories import Histories
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
    baselines: Sequence[str] = BASELINES,
    bm25_text: str = "reference",
    cutoffs: Sequence[int] = CUTOFFS,
    ndcg_cutoffs: Sequence[int] = NDCG_CUTOFFS,
    ties: str = "mean_rank",
    users: str = "all",
    oracle: pathlib.Path | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    completions: Mapping[str, pathlib.Path] | None = None,
    training: Mapping[str, pathlib.Path] | None = None,
) -> dict[str, Any]:
    """Scores rankings beside baselines and writes the report, unless that is done; prints the table in any case.

    Args:
      out: the report's folder.
      dataset: evaluated.
      rankings: name of a row to the folder of its ranking.
      split: "validation" or "test".
      baselines: rows without training; names out of `baselines.BASELINES`.
      bm25_text: what BM25 reads in them, "reference" or "ranking" (see `baselines`).
      cutoffs: of Recall.
      ndcg_cutoffs: of NDCG.
      ties: which of `metrics.TIES` the table shows; `metrics.json` has all.
      users: "all" of the split, or those "ranked" by every ranking (for trials on a part of the users).
      oracle: the shop's own probabilities of the test purchases; adds the ceiling as a row.
      resamples: of the bootstrap.
      level: coverage of the intervals.
      seed: of the bootstrap.
      completions: name to folder, for the report; None: those in the run folder that a ranking was made from.
      training: stage to folder, for the report; None: those in the run folder.

    Returns:
      What `metrics.json` holds.

    Raises:
      CalrecError: a setting is not valid, a ranking is missing, broken, or of another dataset or split, a file that
        is read was changed after it was written, or `out` holds a report made otherwise.
    """
    from calrec_jax.evaluate.report import write_report

    out = pathlib.Path(out)
    metric_names(cutoffs, ndcg_cutoffs)
    if ties not in TIES or users not in USERS:
        raise CalrecError(f"evaluate.ties is {ties!r} (one of {list(TIES)}), users is {users!r} (one of {list(USERS)})")
    manifests = {name: _ranking_manifest(folder, dataset, split) for name, folder in rankings.items()}
    made_from = {"dataset": dataset.hash, **{f"ranking {name}": made["hash"] for name, made in manifests.items()}}
    if oracle is not None:
        made_from[ORACLE] = artifacts.hash_file(oracle)
    settings = {
        "split": split,
        "baselines": list(baselines),
        "bm25_text": bm25_text,
        "cutoffs": list(cutoffs),
        "ndcg_cutoffs": list(ndcg_cutoffs),
        "ties": ties,
        "users": users,
        "resamples": resamples,
        "level": level,
        "seed": seed,
        **baseline_rankings.baseline_settings(baselines),
    }
    if artifacts.is_done(out, kind=KIND, made_from=made_from, settings=settings):
        artifacts.check_files(out, artifacts.read_manifest(out, kind=KIND))
        metrics = artifacts.read_json(out / "metrics.json")
        print_table(metrics)
        return metrics
    _check_names([*baselines, *rankings, *([ORACLE] if oracle is not None else [])])
    if completions is None:
        completions = _completions_of(manifests, out.parent)
    for name, folder in rankings.items():
        artifacts.check_files(folder, manifests[name])
    for folder in completions.values():
        artifacts.check_files(folder, artifacts.read_manifest(folder, kind="completions"))
    histories = Histories(dataset, split)
    everyone = np.ones(len(dataset.user_ids), bool)
    rows = [
        Row(name, "baseline", baseline_rankings.source_ranks(source, histories), everyone)
        for name, source in baseline_rankings.baseline_sources(baselines, dataset, histories, bm25_text).items()
    ]
    rows += [_ranking_row(name, folder, manifests[name], dataset, histories) for name, folder in rankings.items()]
    if oracle is not None:
        rows.append(_oracle_row(oracle, dataset, histories, split))
    metrics, per_user = summarise(rows, settings, dataset)
    metrics["made_from"] = made_from
    out.mkdir(parents=True, exist_ok=True)
    with artifacts.atomic_file(out / "per_user.parquet") as temporary:
        pq.write_table(per_user, temporary, compression="zstd")
    artifacts.write_json(out / "metrics.json", metrics)
    report = write_report(
        out,
        dataset=dataset,
        metrics=metrics,
        rankings=rankings,
        completions=completions,
        training=_training_of(out.parent) if training is None else training,
    )
    # The page shows the seconds of the steps, so this manifest's hash is another in each run; nothing is made from it.
    files = artifacts.hash_files([out / "metrics.json", out / "per_user.parquet", report])
    artifacts.write_manifest(out, kind=KIND, made_from=made_from, settings=settings, files=files)
    print_table(metrics)
    return metrics


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


def ranking_ranks(
    folder: pathlib.Path, dataset: Dataset, histories: Histories, depth: int | None = None
) -> tuple[TargetRanks, np.ndarray]:
    """Ranks of the targets in a ranking's shards.

    A target beyond a list's end is a miss, even where the last score of the list goes on beyond it.

    Args:
      folder: of the ranking.
      dataset: it ranks.
      histories: of the evaluated split.
      depth: of the lists; None: their greatest length.

    Returns:
      The ranks of all U users, and [U] bool: who has a list.

    Raises:
      CalrecError: the shards are missing or broken, or name users or items that the dataset does not have.
    """
    reader = RankingReader(folder, dataset)
    ranks = TargetRanks.misses(len(dataset.user_ids), depth or 1)
    listed = np.zeros(len(dataset.user_ids), bool)
    longest = 1
    for lists in reader.blocks():
        rows = np.arange(len(lists.users))
        is_target = lists.items == histories.targets[lists.users][:, None]
        own = lists.scores[rows, is_target.argmax(axis=1)][:, None]
        last = lists.scores[rows, np.maximum(lists.lengths - 1, 0)]
        equal = (lists.scores == own).sum(axis=1) - 1 + np.where(last == own[:, 0], lists.ties_beyond_depth, 0)
        found = is_target.any(axis=1)
        ranks.n_greater[lists.users] = np.where(found, (lists.scores > own).sum(axis=1), 0)
        ranks.n_equal[lists.users] = np.where(found, equal, 0)
        ranks.found[lists.users] = found
        listed[lists.users] = True
        longest = max(longest, int(lists.lengths.max(initial=1)))
    return dataclasses.replace(ranks, depth=depth or longest), listed


def _ranking_row(
    name: str, folder: pathlib.Path, manifest: Mapping[str, Any], dataset: Dataset, histories: Histories
) -> Row:
    kind = "baseline" if manifest["settings"].get("source") in BASELINE_SOURCES else "calrec"
    return Row(name, kind, *ranking_ranks(folder, dataset, histories, manifest.get("list_depth")))


def _oracle_row(path: pathlib.Path, dataset: Dataset, histories: Histories, split: str) -> Row:
    """The ceiling: the shop's own probabilities as a ranking. Items that it does not name have probability 0."""
    from calrec_jax.data.shop import load_oracle

    if split != "test":
        raise CalrecError(f"the oracle {path} knows the test purchases, and {split!r} is evaluated; leave it out")
    oracle = load_oracle(path)
    row_of = {str(user): row for row, user in enumerate(oracle.user_ids)}
    column_of = {str(item): column for column, item in enumerate(oracle.item_ids)}
    rows = np.array([row_of.get(str(user), -1) for user in dataset.user_ids])
    columns = np.array([column_of.get(str(item), -1) for item in dataset.item_ids])
    if (rows < 0).any():
        first = dataset.user_ids[np.flatnonzero(rows < 0)[0]]
        raise CalrecError(
            f"{path} lacks {(rows < 0).sum()} users of {dataset.name}, {first!r} first: it is another shop's"
        )
    ranks = TargetRanks.misses(len(rows), len(columns))
    for at in range(0, len(rows), 512):
        users = np.arange(at, min(at + 512, len(rows)))
        probabilities = np.where(columns >= 0, np.asarray(oracle.probabilities)[rows[users]][:, columns], 0.0)
        part = target_ranks(histories.targets[users], probabilities)
        ranks.n_greater[users], ranks.n_equal[users], ranks.found[users] = part.n_greater, part.n_equal, part.found
    return Row(ORACLE, ORACLE, ranks, np.ones(len(rows), bool))


def _completions_of(manifests: Mapping[str, dict[str, Any]], run_dir: pathlib.Path) -> dict[str, pathlib.Path]:
    """The completions in the run folder that the rankings were made from."""
    wanted = {manifest["made_from"].get("completions") for manifest in manifests.values()} - {None}
    folders = sorted(path.parent for path in (run_dir / "completions").glob("*/manifest.json"))
    return {
        folder.name: folder for folder in folders if artifacts.read_json(folder / "manifest.json")["hash"] in wanted
    }


def _training_of(run_dir: pathlib.Path) -> dict[str, pathlib.Path]:
    return {stage: run_dir / stage for stage in ("stage1", "stage2") if (run_dir / stage / "metrics.jsonl").exists()}
