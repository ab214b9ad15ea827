"""Weights of a fusion, fitted on the rankings of the validation split.

Notable: what is maximised is the metric itself, NDCG@10 over all users with ties by mean rank, by a search over one
weight after another: it is a step function of the weights, so it has no gradient, and the same rankings give the same
weights. Only items among the first places of some ranking compete with the target, which keeps memory small; the
items left out are behind in every ranking.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from calrec_jax.compiled import compiled
from calrec_jax.rank.shards import RankingReader
from calrec_jax.rank.sources import RECIPROCAL_RANK_OFFSET

FIRST_PLACES = 100
_FACTORS = (0.0, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
_MOST_ROUNDS = 20
_USERS_A_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Items that compete for the first places of each user; the target is the first of a user's.

    Attributes:
      starts: [U + 1] int64 offsets into `gains`.
      gains: [candidates, R] float64, 1 / (60 + rank) of the item in each ranking, 0 where it is not listed.
    """

    starts: np.ndarray
    gains: np.ndarray


def gather(
    readers: Mapping[str, RankingReader], users: np.ndarray, targets: np.ndarray, first_places: int = FIRST_PLACES
) -> Candidates:
    """Reads the candidates of users.

    Args:
      readers: name of a ranking to its shards; each must list every one of the users.
      users: [U] rows of the dataset.
      targets: [U] the item to predict.
      first_places: of each ranking whose items compete.

    Raises:
      CalrecError: a ranking lacks a user, or is broken.
    """
    blocks, counts = [], []
    for at in range(0, len(targets), _USERS_A_BLOCK):
        lists = [reader.rows(users[at : at + _USERS_A_BLOCK]) for reader in readers.values()]
        ranks = [one.mean_ranks() for one in lists]
        for row, target in enumerate(targets[at : at + _USERS_A_BLOCK]):
            first = [one.items[row, :first_places] for one in lists]
            others = np.setdiff1d(np.concatenate(first), [-1, target])
            items = np.concatenate([[target], others])
            gains = np.zeros((len(items), len(lists)))
            for column, (one, rank) in enumerate(zip(lists, ranks, strict=True)):
                listed = (one.items[row] >= 0) & (one.scores[row] > -np.inf)
                by = np.argsort(one.items[row][listed])
                own = one.items[row][listed][by]
                places = np.minimum(np.searchsorted(own, items), max(0, len(own) - 1))
                if len(own):
                    gain = 1.0 / (RECIPROCAL_RANK_OFFSET + rank[row][listed][by])
                    gains[:, column] = np.where(own[places] == items, gain[places], 0.0)
            blocks.append(gains)
            counts.append(len(items))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Candidates(starts, np.concatenate(blocks) if blocks else np.zeros((0, len(readers))))


@compiled
def _ndcg(starts, gains, weights, cutoff):  # pragma: no cover (compiled)
    total = 0.0
    for user in range(len(starts) - 1):
        own = 0.0
        greater = 0
        equal = 0
        for row in range(starts[user], starts[user + 1]):
            score = 0.0
            for column in range(len(weights)):
                score += weights[column] * gains[row, column]
            if row == starts[user]:
                own = score
            elif score > own:
                greater += 1
            elif score == own:
                equal += 1
        rank = 1.0 + greater + 0.5 * equal
        if own > 0.0 and rank <= cutoff:
            total += 1.0 / np.log2(1.0 + rank)
    return total / max(1, len(starts) - 1)


def ndcg(candidates: Candidates, weights: np.ndarray, cutoff: int = 10) -> float:
    """NDCG at `cutoff` of the fusion with these weights ([R]), mean over users, ties by mean rank.

    A target that no ranking lists counts as a miss.
    """
    return float(_ndcg(candidates.starts, candidates.gains, np.asarray(weights, np.float64), cutoff))


def fit(candidates: Candidates, given: np.ndarray) -> tuple[np.ndarray, float]:
    """The weights with the best NDCG@10 that the search finds, and that NDCG@10.

    From the given weights, and from each ranking alone with a quarter of its weight on the others, one weight after
    another is multiplied by the factor that helps most, until none does. The weights sum to 1. Of equal results the
    first is kept, so that given weights that cannot be bettered stay.

    Args:
      candidates: of the validation users.
      given: [R] weights to begin with, not negative, not all zero.
    """
    size = len(given)
    begins = [np.asarray(given, np.float64), *(np.where(np.arange(size) == one, 1.0, 0.25) for one in range(size))]
    best, best_value = begins[0], -1.0
    for begin in begins:
        weights, value = _climb(candidates, begin / begin.sum())
        if value > best_value:
            best, best_value = weights, value
    return best / best.sum(), best_value


def _climb(candidates: Candidates, weights: np.ndarray) -> tuple[np.ndarray, float]:
    value = ndcg(candidates, weights)
    for _ in range(_MOST_ROUNDS):
        before = value
        for column in range(len(weights)):
            for factor in _FACTORS:
                tried = weights.copy()
                # From zero, a weight comes back as a share of the others.
                tried[column] = factor * (weights[column] or 0.25 * weights.mean())
                if tried.sum() == 0:
                    continue
                gained = ndcg(candidates, tried)
                if gained > value:
                    weights, value = tried, gained
        if value == before:
            break
    return weights, value
