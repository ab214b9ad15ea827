"""Where scores of items come from: the user tower, constrained completions, other rankings, and what wraps a source.

Notable: each source answers `scores(users)` with a `Scores` block over the whole catalogue. Those made from histories
alone are in `from_histories.py`, quasi-round-robin over free completions in `round_robin.py`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Scores, dense_ranks
from calrec_jax.rank.shards import RankingReader

UNLISTED = -1e9  # below any sum of log-probabilities
RECIPROCAL_RANK_OFFSET = 60.0  # Cormack, Clarke and Büttcher, SIGIR 2009
LEAVE_OUT = ("none", "last", "all")


class Source(Protocol):
    """Scores items for users."""

    def scores(self, users: np.ndarray) -> Scores:
        """Scores every item for each of `users` ([B] int, rows of the dataset)."""
        ...


class LeftOut:
    """Another source, with the last item of the user's history, or all of it, tied at the bottom."""

    def __init__(self, source: Source, histories: Histories, which: str):
        """`which` is one of `LEAVE_OUT`."""
        self.source = source
        self.histories = histories
        self.which = which

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        scores = self.source.scores(users)
        if self.which == "last":
            last = self.histories.last(users)
            known = np.flatnonzero(last >= 0)
            return scores.leave_out(known, last[known])
        return scores.leave_out(*self.histories.of(users)) if self.which == "all" else scores


class Tower:
    """The product of the user's vector with every item's."""

    def __init__(self, users: np.ndarray, items: np.ndarray, popularity: np.ndarray | None = None):
        """Keeps the vectors of all users [U, D] and items [I, D], and [I] what decides ties (None: they stay)."""
        self.users = users
        self.items = items.astype(np.float64)
        self.popularity = popularity

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        # Rounded from float64, so that items with equal vectors tie whatever order the product is summed in.
        products = (self.users[users].astype(np.float64) @ self.items.T).astype(np.float32)
        return Scores(products.astype(np.float64), None if self.popularity is None else self.popularity[None])


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
