"""Where scores of items come from: the user tower, constrained completions, other rankings, and what wraps a source.

Notable: each source answers `scores(users)` with a `Scores` block over the whole catalogue. Those made from histories
alone are in `from_histories.py`, quasi-round-robin over free completions in `round_robin.py`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Ordered, Scores, dense_ranks, order
from calrec_jax.rank.shards import RankingReader

UNLISTED = -1e9  # below any sum of log-probabilities
RECIPROCAL_RANK_OFFSET = 60.0  # Cormack, Clarke and Büttcher, SIGIR 2009
ITEMS_A_BLOCK = 2**16  # of vectors that are multiplied at once
LEAVE_OUT = ("none", "last", "all")


def is_short(depth: int, num_items: int) -> bool:
    """Whether the catalogue is so much longer than a list that the list is better made without scoring all of it."""
    return depth * 4 <= num_items


class Source(Protocol):
    """Scores items for users."""

    def scores(self, users: np.ndarray) -> Scores:
        """Scores every item for each of `users` ([B] int, rows of the dataset)."""
        ...


class LeftOut:
    """Another source, with items tied at the bottom: the last one of the user's history or all of it, or some of all.

    A source that has a method `first(users, depth, rows, items)` makes short lists itself, without scores of the whole
    catalogue (`is_short` says which lists are).
    """

    def __init__(self, source: Source, histories: Histories, which: str, everyone: np.ndarray | None = None):
        """Keeps the source.

        Args:
          source: what ranks the others.
          histories: of the users.
          which: items of a user's history that are left out, one of `LEAVE_OUT`.
          everyone: items that are left out for all users.
        """
        self.source = source
        self.histories = histories
        self.which = which
        self.everyone = np.zeros(0, np.int64) if everyone is None else everyone

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        rows, items = self._items(users)
        scores = self.source.scores(users)
        return scores.leave_out(rows, items) if len(rows) else scores

    def lists(self, users: np.ndarray, depth: int) -> Ordered:
        """Ranked lists of `users` ([B] rows of the dataset)."""
        if self.makes_short_lists(depth):
            return self.source.first(users, depth, *self._items(users))  # type: ignore[attr-defined]
        return order(self.scores(users), depth)

    def makes_short_lists(self, depth: int) -> bool:
        """Whether lists are made without a matrix of users × items."""
        return hasattr(self.source, "first") and is_short(depth, self.histories.num_items)

    def _items(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in `users`, ascending, and the items they leave out."""
        rows, items = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if self.which == "last":
            last = self.histories.last(users)
            rows = np.flatnonzero(last >= 0)
            items = last[rows]
        elif self.which == "all":
            rows, items = self.histories.of(users)
        if len(self.everyone):
            rows = np.concatenate([rows, np.repeat(np.arange(len(users)), len(self.everyone))])
            items = np.concatenate([items, np.tile(self.everyone, len(users))])
            by = np.argsort(rows, kind="stable")
            rows, items = rows[by], items[by]
        return rows, items


class Tower:
    """The product of the user's vector with every item's."""

    def __init__(self, users: np.ndarray, items: np.ndarray, popularity: np.ndarray | None = None):
        """Keeps the vectors of all users [U, D] and items [I, D], and [I] what decides ties (None: they stay)."""
        self.users = users
        self.items = items
        self.popularity = popularity

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        secondary = None if self.popularity is None else self.popularity[None]
        return Scores(self._products(users, slice(None)).astype(np.float64), secondary)

    def _products(self, users: np.ndarray, block: slice) -> np.ndarray:
        # Rounded from float64, so that items with equal vectors tie whatever order the product is summed in.
        return (self.users[users].astype(np.float64) @ self.items[block].astype(np.float64).T).astype(np.float32)

    def first(self, users: np.ndarray, depth: int, rows: np.ndarray, items: np.ndarray) -> Ordered:
        """See `LeftOut`: the catalogue is multiplied block by block, and of each user the best so far are kept."""
        num_items = len(self.items)
        limits = np.full(len(users), -np.inf, np.float32)
        kept: list[list[np.ndarray]] = [[] for _ in users]
        values: list[list[np.ndarray]] = [[] for _ in users]
        waiting = np.zeros(len(users), np.int64)
        for begin in range(0, num_items, ITEMS_A_BLOCK):
            products = self._products(users, slice(begin, begin + ITEMS_A_BLOCK))
            here = (items >= begin) & (items < begin + ITEMS_A_BLOCK)
            products[rows[here], items[here] - begin] = -np.inf
            for row, own in enumerate(products):
                some = np.flatnonzero(own >= limits[row])
                kept[row].append(some + begin)
                values[row].append(own[some])
                waiting[row] += len(some)
                last = begin + ITEMS_A_BLOCK >= num_items
                if waiting[row] >= 4 * depth or last:
                    both, scores = np.concatenate(kept[row]), np.concatenate(values[row])
                    if len(scores) > depth:
                        limits[row] = np.partition(scores, len(scores) - depth)[len(scores) - depth]
                        both, scores = both[scores >= limits[row]], scores[scores >= limits[row]]
                    kept[row], values[row], waiting[row] = [both], [scores], len(both)
        lists = [self._list(kept[row][0], values[row][0], depth) for row in range(len(users))]
        return Ordered(*(np.concatenate(parts) for parts in zip(*lists, strict=True)))

    def _list(self, items: np.ndarray, values: np.ndarray, depth: int) -> Ordered:
        left_out = values == -np.inf  # tied with each other, whatever their popularity
        secondary = None if self.popularity is None else np.where(left_out, 0.0, self.popularity[items])[None]
        lists = order(Scores(values.astype(np.float64)[None], secondary), depth)
        return lists._replace(items=items[lists.items].astype(np.int32))


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
