"""What the purchases before a split's target say: last items, popularity, who bought what, what follows what.

Notable: for `test` the histories hold the validation item; nothing from a target on is ever read. Whole arrays, no loop
over users.
"""

import functools

import numpy as np
import scipy.sparse

from calrec_jax.data.dataset import SPLITS, Dataset
from calrec_jax.errors import CalrecError


class Histories:
    """The histories of all users at a split; what is counted over them has those of users without a target, too.

    Attributes:
      num_items: I.
      users: rows of the users who have a target, ascending.
      lengths: [U] int64, purchases in each history (0 is possible).
      targets: [U] int32, the item to predict; −1: the user has no target in this split.
    """

    def __init__(self, dataset: Dataset, split: str):
        """Raises a `CalrecError` if `split` is unknown."""
        if split not in SPLITS:
            raise CalrecError(f"split is {split!r}: choose one of {list(SPLITS)}")
        self.num_items = len(dataset.item_ids)
        self.users = dataset.users_with(split)
        self.lengths = dataset.history_lengths(split)
        self._items = dataset.items
        self._timestamps = dataset.timestamps
        self._begins = dataset.offsets[:-1]
        self._ends = self._begins + self.lengths
        self.targets = np.full(len(self.lengths), -1, np.int32)
        self.targets[self.users] = dataset.items[self._ends[self.users]]

    @functools.cached_property
    def _users(self) -> np.ndarray:
        """[purchases in histories] the user of each."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @functools.cached_property
    def items(self) -> np.ndarray:
        """[purchases in histories] int32, users one after the other, oldest first."""
        return self._items[self._flat]

    @functools.cached_property
    def timestamps(self) -> np.ndarray:
        """[purchases in histories] int64, seconds; as `items`."""
        return self._timestamps[self._flat]

    @functools.cached_property
    def _flat(self) -> np.ndarray:
        offsets = np.cumsum(self.lengths) - self.lengths
        return np.arange(self.lengths.sum()) + np.repeat(self._begins - offsets, self.lengths)

    def last(self, users: np.ndarray, back: int = 0) -> np.ndarray:
        """[B] int32: the last item of each user's history, or the one `back` purchases before it; −1 where none is."""
        at = self._ends[users] - 1 - back
        return np.where(at >= self._begins[users], self._items[np.maximum(at, 0)], -1)

    def last_timestamps(self, users: np.ndarray) -> np.ndarray:
        """[B] int64: when the last item of each user's history was bought; of no meaning where the history is empty."""
        return self._timestamps[np.maximum(self._ends[users] - 1, 0)]

    def of(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows into `users`, and the items of their histories: two flat arrays."""
        lengths = self.lengths[users]
        rows = np.repeat(np.arange(len(users)), lengths)
        offsets = np.cumsum(lengths) - lengths
        return rows, self._items[np.arange(lengths.sum()) + np.repeat(self._begins[users] - offsets, lengths)]

    def backs(self, users: np.ndarray) -> np.ndarray:
        """How many purchases of the history come after each item that `of` gives: a flat array."""
        lengths = self.lengths[users]
        return np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(lengths.sum())

    def distinct(self, users: np.ndarray, decay: float) -> scipy.sparse.csr_array:
        """[B, I] float64: decay^(purchases after the item's latest one), 0 where the item is not in the history."""
        rows, items = self.of(users)
        backs = self.backs(users)[::-1]
        codes, latest = np.unique((rows.astype(np.int64) * self.num_items + items)[::-1], return_index=True)
        weights = decay ** backs[latest].astype(np.float64)
        places = codes // self.num_items, codes % self.num_items
        return scipy.sparse.csr_array((weights, places), (len(users), self.num_items))

    @functools.cached_property
    def popularity(self) -> np.ndarray:
        """[I] float64: how often each item is in the histories."""
        return np.bincount(self.items, minlength=self.num_items).astype(np.float64)

    @functools.cached_property
    def transitions(self) -> "Transitions":
        """How often an item follows another, consecutively, in the histories."""
        follows = self._users[1:] == self._users[:-1]
        pairs = self.items[:-1][follows].astype(np.int64) * self.num_items + self.items[1:][follows]
        return Transitions(pairs, self.num_items)


class Transitions:
    """Counts of item pairs, sparse by rows.

    Attributes:
      totals: [I] float64, all transitions from each item.
    """

    def __init__(self, pairs: np.ndarray, num_items: int):
        """Counts `pairs`, int64 codes first·I + second."""
        codes, counts = np.unique(pairs, return_counts=True)
        firsts = codes // num_items
        self._next = codes % num_items
        self._counts = counts.astype(np.float64)
        self._begins = np.searchsorted(firsts, np.arange(num_items + 1))
        self.totals = np.bincount(firsts, self._counts, num_items)

    def add(self, scores: np.ndarray, items: np.ndarray, factors: np.ndarray) -> None:
        """Adds `factors[row]` · counts from `items[row]` to `scores[row]`; an item of −1 adds nothing.

        Args:
          scores: [B, I] float64, changed in place.
          items: [B] items the transitions start from.
          factors: [B] float64.
        """
        known = np.flatnonzero(items >= 0)
        begins, ends = self._begins[items[known]], self._begins[items[known] + 1]
        lengths = ends - begins
        flat = np.arange(lengths.sum()) + np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
        rows = np.repeat(known, lengths)
        scores[rows, self._next[flat]] += factors[rows] * self._counts[flat]  # no pair twice in a row
