"""What histories say by counting: popularity, recent popularity, the last item again, what followed it.

Notable: no model and no text; everything is counted over the histories of the evaluated split. Ties by popularity.
"""

import dataclasses

import gin
import numpy as np

from calrec_jax.compiled import compiled
from calrec_jax.errors import CalrecError
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Scores

_SECONDS_A_DAY = 86_400


class Popularity:
    """How often an item is in the histories."""

    def __init__(self, histories: Histories):
        self.histories = histories

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        return Scores(np.tile(self.histories.popularity, (len(users), 1)))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class RecentPopularityConfig:
    """What counts as recent.

    Attributes:
      window_days: length of the window that ends with the last purchase of a user's history.
    """

    window_days: float = 30.0

    def __post_init__(self) -> None:
        if not self.window_days > 0:
            raise CalrecError(f"RecentPopularityConfig.window_days={self.window_days}: must be above 0")


class RecentPopularity:
    """How often an item was bought in the days up to the last purchase of the user's history, by anyone.

    Nothing after that moment counts: purchases at time t with last − window < t ≤ last. Ties by popularity.
    """

    def __init__(self, histories: Histories, config: RecentPopularityConfig):
        self.histories = histories
        by = np.argsort(histories.timestamps, kind="stable")
        self._times, self._items = histories.timestamps[by], histories.items[by]
        self._window = config.window_days * _SECONDS_A_DAY

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`; a user without a history has no moment, so that popularity decides alone."""
        last = self.histories.last_timestamps(users)
        begins = np.searchsorted(self._times, last - self._window, side="right")
        ends = np.searchsorted(self._times, last, side="right")
        empty = self.histories.lengths[users] == 0
        begins[empty] = ends[empty] = 0
        primary = np.zeros((len(users), self.histories.num_items))
        _count_windows(self._items, np.argsort(ends, kind="stable"), begins, ends, primary)
        return Scores(primary, self.histories.popularity[None])


@compiled
def _count_windows(items, rows, begins, ends, counts):  # pragma: no cover (compiled)
    """Slides one window over the sorted purchases: `rows` in the order of their ends, all equally long in time."""
    window = np.zeros(counts.shape[1])
    begin, end = 0, 0
    for row in rows:
        while end < ends[row]:
            window[items[end]] += 1
            end += 1
        while begin < begins[row]:
            window[items[begin]] -= 1
            begin += 1
        counts[row] = window


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
