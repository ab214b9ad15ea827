"""Where scores of items come from: histories, the user tower, constrained completions, other rankings.

Notable: each source answers `scores(users)` with a `Scores` block over the whole catalogue. Those made from histories
need no model: they are the baselines of every report, and sources to fuse with. Quasi-round-robin over free
completions is in `round_robin.py`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Scores, dense_ranks
from calrec_jax.rank.shards import RankingReader

UNLISTED = -1e9  # below any sum of log-probabilities
RECIPROCAL_RANK_OFFSET = 60.0  # Cormack, Clarke and Büttcher, SIGIR 2009


class Source(Protocol):
    """Scores items for users."""

    def scores(self, users: np.ndarray) -> Scores:
        """Scores every item for each of `users` ([B] int, rows of the dataset)."""
        ...


class Popularity:
    """How often an item is in the histories."""

    def __init__(self, histories: Histories):
        self.histories = histories

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        return Scores(np.tile(self.histories.popularity, (len(users), 1)))


class LastItem:
    """The last item again; the rest by popularity."""

    def __init__(self, histories: Histories):
        self.histories = histories

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        primary = np.zeros((len(users), self.histories.num_items))
        last = self.histories.last(users)
        known = np.flatnonzero(last >= 0)
        primary[known, last[known]] = 1.0
        return Scores(primary, self.histories.popularity[None])


class FirstOrderTransitions:
    """How often an item followed the user's last one; ties by popularity."""

    def __init__(self, histories: Histories):
        self.histories = histories

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        primary = np.zeros((len(users), self.histories.num_items))
        self.histories.transitions.add(primary, self.histories.last(users), np.ones(len(users)))
        return Scores(primary, self.histories.popularity[None])


class BM25OfLast:
    """BM25 of the last item's text against the catalogue; ties by popularity."""

    def __init__(self, histories: Histories, index: BM25Index, texts: Sequence[str]):
        self.histories = histories
        self.index = index
        self.texts = texts

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        last, rows = np.unique(self.histories.last(users), return_inverse=True)
        scored = self.index.scores([self.texts[item] if item >= 0 else "" for item in last])
        return Scores(scored[rows].astype(np.float64), self.histories.popularity[None])


class Blend:
    """Text and transitions without training: what to beat.

    0.5 · BM25 of the last item (scaled by its maximum) + Σ_d decay^d · c/(z+1) over the last items, d = 0 the last: c
    how often an item followed that one, z all transitions from it. Ties by popularity.
    """

    def __init__(
        self,
        histories: Histories,
        bm25: BM25OfLast,
        *,
        bm25_weight: float = 0.5,
        num_last: int = 10,
        decay: float = 0.8,
    ):
        self.histories = histories
        self.bm25 = bm25
        self.bm25_weight = bm25_weight
        self.num_last = num_last
        self.decay = decay

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        primary = self.bm25.scores(users).primary
        highest = primary.max(axis=1, keepdims=True)
        primary = self.bm25_weight * np.divide(primary, highest, out=np.zeros_like(primary), where=highest > 0)
        transitions = self.histories.transitions
        for back in range(self.num_last):
            items = self.histories.last(users, back)
            transitions.add(primary, items, self.decay**back / (transitions.totals[items] + 1.0))
        return Scores(primary, self.histories.popularity[None])


class LastItemRemoved:
    """Another source, with the user's last item at the bottom."""

    def __init__(self, source: Source, histories: Histories):
        self.source = source
        self.histories = histories

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        last = self.histories.last(users)
        known = np.flatnonzero(last >= 0)
        return self.source.scores(users).leave_out(known, last[known])


class Tower:
    """Cosine of the user's vector with every item's (both of length 1)."""

    def __init__(self, users: np.ndarray, items: np.ndarray):
        """Keeps the vectors of all users [U, D] and items [I, D]."""
        self.users = users
        self.items = items.astype(np.float64)

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        # Rounded from float64, so that items with equal vectors tie whatever order the product is summed in.
        cosines = (self.users[users].astype(np.float64) @ self.items.T).astype(np.float32)
        return Scores(cosines.astype(np.float64))


class Constrained:
    """Items a constrained decode gave, by log-probability; all others tied behind them."""

    def __init__(self, starts: np.ndarray, items: np.ndarray, log_probs: np.ndarray, num_items: int):
        """Keeps flat arrays: user u's items are `[starts[u], starts[u+1])` of `items` and `log_probs`."""
        self.starts = starts
        self.items = items
        self.log_probs = log_probs
        self.num_items = num_items

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`; of an item given twice the better counts."""
        primary = np.full((len(users), self.num_items), UNLISTED)
        sources = np.full(primary.shape, -1, np.int16)
        lengths = self.starts[users + 1] - self.starts[users]
        rows = np.repeat(np.arange(len(users)), lengths)
        places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        flat = places + self.starts[users][rows]
        by = np.lexsort((-places, self.log_probs[flat]))  # the best is written last
        rows, flat, places = rows[by], flat[by], places[by]
        primary[rows, self.items[flat]] = self.log_probs[flat]
        sources[rows, self.items[flat]] = places
        return Scores(primary, None, sources)


class Fusion:
    """Weighted reciprocal ranks of other rankings: Σ_r w_r / (60 + rank_r), tied items by their mean rank."""

    def __init__(self, rankings: Sequence[tuple[RankingReader, float]], num_items: int):
        self.rankings = rankings
        self.num_items = num_items

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`; an item that a ranking does not list gets nothing from it."""
        primary = np.zeros((len(users), self.num_items))
        for reader, weight in self.rankings:
            lists = reader.rows(users)
            listed = (lists.items >= 0) & (lists.scores > -np.inf)
            rows, places = np.nonzero(listed)
            gains = weight / (RECIPROCAL_RANK_OFFSET + lists.mean_ranks())
            primary[rows, lists.items[rows, places]] += gains[rows, places]
        return Scores(primary)


class Filled:
    """A source whose ties are decided by another's scores, after its own second key."""

    def __init__(self, source: Source, fill: Source):
        self.source = source
        self.fill = fill

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        scores = self.source.scores(users)
        keys = dense_ranks(self.fill.scores(users))
        if scores.secondary is not None:
            own = dense_ranks(Scores(np.broadcast_to(scores.secondary, keys.shape)))
            keys += own * (keys.shape[1] + 1)
        return Scores(scores.primary, keys, scores.sources)
