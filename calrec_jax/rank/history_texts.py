"""What the texts of a history say by BM25 alone, and blended with transitions."""

import dataclasses
from collections.abc import Sequence

import gin
import numpy as np
import scipy.sparse

from calrec_jax.errors import CalrecError
from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Scores


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


@gin.configurable
@dataclasses.dataclass(frozen=True)
class BM25OfHistoryConfig:
    """How much older items count.

    Attributes:
      decay: weight of an item's text against that of the item after it; 1: all alike.
    """

    decay: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise CalrecError(f"BM25OfHistoryConfig.decay={self.decay}: must be above 0 and at most 1")


class BM25OfHistory:
    """Σ_d decay^d · BM25 of the item d purchases before the last one, over the whole history; ties by popularity.

    BM25 adds over a query's words, so with decay 1 this is BM25 of all the history's texts as one query.
    """

    def __init__(self, histories: Histories, index: BM25Index, texts: Sequence[str], config: BM25OfHistoryConfig):
        self.histories = histories
        self.index = index
        self.texts = texts
        self.config = config

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        rows, items = self.histories.of(users)
        distinct, columns = np.unique(items, return_inverse=True)
        weights = self.config.decay ** self.histories.backs(users).astype(np.float64)
        scored = self.index.scores([self.texts[item] for item in distinct]).astype(np.float64)
        # Sparse, since a dense product may add up equal columns in different orders, and equal texts must tie.
        primary = scipy.sparse.csr_array((weights, (rows, columns)), (len(users), len(distinct))) @ scored
        return Scores(np.asarray(primary), self.histories.popularity[None])


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
