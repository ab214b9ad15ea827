"""Recall, NDCG and MRR of one target a user, from the place of its score in the whole catalogue.

Notable: a metric is a function of two numbers a user, how many items score higher than the target (`n_greater`) and
how many others score the same (`n_equal`); what a tie is worth is a choice that is made here, four ways, and never by
the order of a list. With one relevant item, Recall@k is the share of users whose target is among the first k (the hit
rate), NDCG@k is 1/log2(1 + rank) up to k, MRR is 1/rank, MRR@k the same up to k. A user without a rank (no ranking, or
the target beyond its depth) is a miss: 0 in every metric. Where lists are cut, "mrr" is MRR at that depth, and what is
printed says so.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calrec_jax.errors import CalrecError

TIES = ("optimistic", "pessimistic", "expected", "mean_rank")
CUTOFFS = (1, 5, 10, 50)
NDCG_CUTOFFS = (10, 50)
MRR_CUTOFFS: tuple[int, ...] = ()  # beside the whole list


@dataclasses.dataclass(frozen=True)
class TargetRanks:
    """Where the targets of U users stand.

    Attributes:
      n_greater: [U] int64, items that score higher than the target.
      n_equal: [U] int64, other items that score the same.
      found: [U] bool, False for a miss (the other two are then 0).
      depth: ranks beyond it count as misses; the catalogue's size where it was ranked whole.
    """

    n_greater: np.ndarray
    n_equal: np.ndarray
    found: np.ndarray
    depth: int

    @classmethod
    def misses(cls, num_users: int, depth: int) -> "TargetRanks":
        """Ranks of users of whom none is found, to be filled in."""
        return cls(np.zeros(num_users, np.int64), np.zeros(num_users, np.int64), np.zeros(num_users, bool), depth)

    @property
    def optimistic(self) -> np.ndarray:
        """[U] int64: rank if the target comes first among its ties; 0 for a miss."""
        return np.where(self.found, 1 + self.n_greater, 0)

    @property
    def pessimistic(self) -> np.ndarray:
        """[U] int64: rank if the target comes last among its ties; 0 for a miss."""
        return np.where(self.found, 1 + self.n_greater + self.n_equal, 0)


def target_ranks(targets: np.ndarray, primary: np.ndarray, secondary: np.ndarray | None = None) -> TargetRanks:
    """Ranks of the targets in scores of the whole catalogue.

    Args:
      targets: [B] item indices.
      primary: [B, I] scores, greater is better.
      secondary: [B, I] or [1, I], decides between equal primaries.
    """
    rows = np.arange(len(targets))
    own = primary[rows, targets][:, None]
    greater, equal = primary > own, primary == own
    if secondary is not None:
        secondary = np.broadcast_to(secondary, primary.shape)
        own = secondary[rows, targets][:, None]
        greater |= equal & (secondary > own)
        equal &= secondary == own
    return TargetRanks(
        greater.sum(axis=1, dtype=np.int64),
        equal.sum(axis=1, dtype=np.int64) - 1,
        np.ones(len(targets), bool),
        primary.shape[1],
    )


def metric_names(
    cutoffs: Sequence[int] = CUTOFFS,
    ndcg_cutoffs: Sequence[int] = NDCG_CUTOFFS,
    mrr_cutoffs: Sequence[int] = MRR_CUTOFFS,
) -> list[str]:
    """Names of the metrics, as in `metrics.json`: "recall@k" …, "ndcg@k" …, "mrr@k" …, "mrr".

    Raises:
      CalrecError: a cut-off is not a whole number from 1 on, or stands there twice.
    """
    for setting, values in (("cutoffs", cutoffs), ("ndcg_cutoffs", ndcg_cutoffs), ("mrr_cutoffs", mrr_cutoffs)):
        whole = all(isinstance(cutoff, int) and not isinstance(cutoff, bool) and cutoff >= 1 for cutoff in values)
        if not whole or len(set(values)) != len(values):
            raise CalrecError(f"{setting} is {list(values)}: they must be different whole numbers from 1 on")
    families = (("recall", cutoffs), ("ndcg", ndcg_cutoffs), ("mrr", mrr_cutoffs))
    return [*(f"{family}@{k}" for family, values in families for k in values), "mrr"]


def headline(names: Sequence[str]) -> str:
    """The metric that stands for the others where one must: NDCG@10, else the first NDCG, else MRR."""
    if "ndcg@10" in names:
        return "ndcg@10"
    return next((name for name in names if name.startswith("ndcg@")), "mrr")


def per_user_metrics(
    ranks: TargetRanks,
    ties: str,
    cutoffs: Sequence[int] = CUTOFFS,
    ndcg_cutoffs: Sequence[int] = NDCG_CUTOFFS,
    mrr_cutoffs: Sequence[int] = MRR_CUTOFFS,
) -> np.ndarray:
    """Every metric of every user.

    Args:
      ranks: of U users.
      ties: "optimistic" (the target first among its ties), "pessimistic" (last), "expected" (the average of the metric
        over the places of the tie) or "mean_rank" (the metric at the mean of those places).
      cutoffs: of Recall.
      ndcg_cutoffs: of NDCG.
      mrr_cutoffs: of MRR, beside the whole list.

    Returns:
      [U, M] float64, columns as `metric_names` names them.

    Raises:
      CalrecError: `ties` is unknown, or a cut-off is not valid.
    """
    metric_names(cutoffs, ndcg_cutoffs, mrr_cutoffs)
    if ties not in TIES:
        raise CalrecError(f"ties is {ties!r}: choose one of {list(TIES)}")
    if ties == "expected":
        values = _expected(ranks, cutoffs, ndcg_cutoffs, mrr_cutoffs)
    else:
        share = {"optimistic": 0.0, "pessimistic": 1.0, "mean_rank": 0.5}[ties]
        rank = 1.0 + ranks.n_greater + share * ranks.n_equal
        values = _at_rank(rank, ranks.depth, cutoffs, ndcg_cutoffs, mrr_cutoffs)
    return np.where(ranks.found[:, None], values, 0.0)


def _at_rank(
    rank: np.ndarray, depth: int, cutoffs: Sequence[int], ndcg_cutoffs: Sequence[int], mrr_cutoffs: Sequence[int]
) -> np.ndarray:
    columns = [rank <= min(k, depth) for k in cutoffs]
    gain = 1.0 / np.log2(1.0 + rank)
    columns += [np.where(rank <= min(k, depth), gain, 0.0) for k in ndcg_cutoffs]
    columns += [np.where(rank <= min(k, depth), 1.0 / rank, 0.0) for k in (*mrr_cutoffs, depth)]
    return np.stack(columns, axis=1).astype(np.float64)


def _expected(
    ranks: TargetRanks, cutoffs: Sequence[int], ndcg_cutoffs: Sequence[int], mrr_cutoffs: Sequence[int]
) -> np.ndarray:
    """Means over the places n_greater+1 … n_greater+n_equal+1, as differences of prefix sums."""
    positions = np.arange(1, ranks.depth + 1, dtype=np.float64)
    begin = ranks.n_greater
    width = ranks.n_equal + 1

    def mean(gains: np.ndarray, cutoff: int) -> np.ndarray:
        cutoff = min(cutoff, ranks.depth)
        sums = np.concatenate([[0.0], np.cumsum(gains[:cutoff])])
        return (sums[np.minimum(begin + width, cutoff)] - sums[np.minimum(begin, cutoff)]) / width

    columns = [mean(np.ones_like(positions), k) for k in cutoffs]
    columns += [mean(1.0 / np.log2(1.0 + positions), k) for k in ndcg_cutoffs]
    columns += [mean(1.0 / positions, k) for k in (*mrr_cutoffs, ranks.depth)]
    return np.stack(columns, axis=1)


def ranking_metrics(
    targets: np.ndarray,
    scores: np.ndarray,
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    ndcg_cutoffs: Sequence[int] = NDCG_CUTOFFS,
    mrr_cutoffs: Sequence[int] = MRR_CUTOFFS,
    ties: str = "mean_rank",
) -> dict[str, float]:
    """Means of the metrics over users, for SeqIO metric functions and notebooks.

    Equal to `calrec evaluate` of a ranking whose `scores` are those of its shards (`rank.ordering.written_scores`).

    Args:
      targets: [U] item indices.
      scores: [U, I], greater is better; equal means tied.
      cutoffs: of Recall.
      ndcg_cutoffs: of NDCG.
      mrr_cutoffs: of MRR, beside the whole catalogue.
      ties: see `per_user_metrics`.

    Returns:
      metric name to mean.

    Raises:
      CalrecError: shapes do not agree, a score is NaN, or a setting is not valid.
    """
    targets, scores = np.asarray(targets), np.asarray(scores)
    if scores.ndim != 2 or targets.shape != scores.shape[:1] or not len(targets):
        raise CalrecError(f"targets {targets.shape} and scores {scores.shape} must be [U] and [U, I] with U > 0")
    if np.isnan(scores).any():
        raise CalrecError("scores hold NaN; a ranking needs numbers that compare")
    values = per_user_metrics(target_ranks(targets, scores), ties, cutoffs, ndcg_cutoffs, mrr_cutoffs)
    means = values.mean(axis=0)
    return dict(zip(metric_names(cutoffs, ndcg_cutoffs, mrr_cutoffs), map(float, means), strict=True))
