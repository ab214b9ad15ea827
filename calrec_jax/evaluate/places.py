"""Where the targets stand in a ranking, seen four ways, and which items stand at its top.

A ranking is scored as it stands, with the user's last item left out, with the whole history left out, and with items of
equal text taken for one. Leaving out moves NDCG@10 by a third on some data, so it is a stated setting and every report
has all of it. The views are made from one ranking: what is left out has no place, and where the target itself is left
out (it was bought before), the user is a miss in that view.

Notable: what is asked of every ranking (`Targets`) is gathered once; a ranking then costs a few passes over each block
of scores. In lists that are cut at a depth, leaving out cannot bring up what lies beyond the cut: such a target stays a
miss.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from calrec_jax.compiled import compiled
from calrec_jax.data.dataset import Dataset
from calrec_jax.evaluate.metrics import TargetRanks
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Scores
from calrec_jax.rank.shards import RankedLists
from calrec_jax.rank.sources import Source

AS_IT_STANDS = "as_it_stands"
VIEWS = (AS_IT_STANDS, "last_left_out", "history_left_out", "equal_text")
TOP = 10  # items of each list that are kept: for coverage, diversity and the page
_SCORES_A_BLOCK = 2**21
_MASK_BYTES = 2**26


class _Flat(NamedTuple):
    """Items of each evaluated user, flat: those of user e are `[starts[e], starts[e+1])`."""

    starts: np.ndarray
    items: np.ndarray

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in `rows` and items, two flat arrays."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        places = np.repeat(np.arange(len(rows)), lengths)
        offsets = np.cumsum(lengths) - lengths
        return places, self.items[np.arange(lengths.sum()) + np.repeat(self.starts[rows] - offsets, lengths)]


class Targets:
    """What is asked of every ranking: the evaluated users, their targets, and what the views need.

    Attributes:
      dataset: evaluated.
      histories: of the split.
      users: [E] rows of the dataset, ascending: those who have a target in the split.
      items: [E] int32 item index of each one's target.
      num_items: I.
      in_history: [E] bool, the target was bought before.
      is_last: [E] bool, it is the last item of the history.
      twins: [E] int64, how many other items have the target's text.
    """

    def __init__(self, dataset: Dataset, histories: Histories, users: np.ndarray):
        """Gathers it for `users` ([E] rows of the dataset)."""
        self.dataset = dataset
        self.histories = histories
        self.users = np.asarray(users, np.int64)
        self.items = histories.targets[self.users]
        self.num_items = len(dataset.item_ids)
        self.row_of = np.full(len(dataset.user_ids), -1, np.int64)
        self.row_of[self.users] = np.arange(len(self.users))
        last = histories.last(self.users)
        self.is_last = last == self.items
        rows, bought = histories.of(self.users)
        self.in_history = np.bincount(rows, bought == self.items[rows], len(self.users)) > 0
        self._last = self._without_target(np.flatnonzero(last >= 0), last[last >= 0])
        self._history = self._without_target(rows, bought)

    def _without_target(self, rows: np.ndarray, items: np.ndarray) -> _Flat:
        """Each user's distinct items but the target."""
        pairs = np.unique(rows.astype(np.int64) * self.num_items + items)
        rows, items = pairs // self.num_items, (pairs % self.num_items).astype(np.int32)
        kept = items != self.items[rows]
        starts = np.searchsorted(rows[kept], np.arange(len(self.users) + 1))
        return _Flat(starts, items[kept])

    @functools.cached_property
    def _text_groups(self) -> tuple[np.ndarray, _Flat]:
        """[I] group of each item, and the items of each group: those with equal texts."""
        _, group = np.unique(np.array(self.dataset.texts, object).astype(str), return_inverse=True)
        by = np.argsort(group, kind="stable").astype(np.int32)
        return group, _Flat(np.searchsorted(group[by], np.arange(group.max(initial=-1) + 2)), by)

    @functools.cached_property
    def twins(self) -> np.ndarray:
        """[E] int64: how many other items have the target's text."""
        group, members = self._text_groups
        return np.diff(members.starts)[group[self.items]] - 1

    def left_out(self, view: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in `rows` and the items that a view leaves out of their lists, the targets excepted."""
        return (self._last if view == "last_left_out" else self._history).of(rows)

    def left_out_targets(self, view: str) -> np.ndarray:
        """[E] bool: users whose target itself is left out in this view."""
        return self.is_last if view == "last_left_out" else self.in_history

    def equal_text(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in `rows` and the items that have the target's text, the target among them."""
        group, members = self._text_groups
        return members.of(group[self.items[rows]])


@dataclasses.dataclass(frozen=True)
class Places:
    """Where E users' targets stand in one ranking.

    Attributes:
      views: name out of `VIEWS` to the ranks.
      listed: [E] bool, who has a list.
      top_items: [E, TOP] int32, the best items, tied ones in the list's order; −1 past the end, −2 no item
        of the catalogue.
      top_scores: [E, TOP] float32, NaN past the end.
      top_sources: [E, TOP] int16, the completion that gave the score, −1 none.
      lengths: [E] int64, items in each list.
    """

    views: dict[str, TargetRanks]
    listed: np.ndarray
    top_items: np.ndarray
    top_scores: np.ndarray
    top_sources: np.ndarray
    lengths: np.ndarray

    @classmethod
    def nowhere(cls, num_users: int, depth: int) -> "Places":
        """Of users none of whom has a list, to be filled in."""
        return cls(
            {view: TargetRanks.misses(num_users, depth) for view in VIEWS},
            np.zeros(num_users, bool),
            np.full((num_users, TOP), -1, np.int32),
            np.full((num_users, TOP), np.nan, np.float32),
            np.full((num_users, TOP), -1, np.int16),
            np.zeros(num_users, np.int64),
        )

    @property
    def ranks(self) -> TargetRanks:
        """Of the ranking as it stands."""
        return self.views[AS_IT_STANDS]

    def with_depth(self, depth: int) -> "Places":
        """The same, ranks beyond `depth` being misses."""
        views = {view: dataclasses.replace(ranks, depth=depth) for view, ranks in self.views.items()}
        return dataclasses.replace(self, views=views)

    def _fill(self, view: str, rows: np.ndarray, greater: np.ndarray, equal: np.ndarray, found: np.ndarray) -> None:
        ranks = self.views[view]
        ranks.n_greater[rows] = np.where(found, greater, 0)
        ranks.n_equal[rows] = np.where(found, equal, 0)
        ranks.found[rows] = found


def places_of_source(source: Source, targets: Targets) -> Places:
    """Scores the whole catalogue by a source, block by block."""
    places = Places.nowhere(len(targets.users), targets.num_items)
    block = max(1, _SCORES_A_BLOCK // targets.num_items)
    for at in range(0, len(targets.users), block):
        rows = np.arange(at, min(at + block, len(targets.users)))
        add_scores(places, targets, rows, source.scores(targets.users[rows]))
    return places


def add_scores(places: Places, targets: Targets, rows: np.ndarray, scores: Scores) -> None:
    """Fills in the places of `rows` ([B] of the evaluated users) from scores of the whole catalogue.

    Args:
      places: filled in.
      targets: what is asked.
      rows: [B].
      scores: of the B users, [B, I].
    """
    primary = scores.primary
    secondary = np.zeros((1, 1)) if scores.secondary is None else scores.secondary
    secondary = np.broadcast_to(secondary, primary.shape)
    by_row = np.arange(len(rows))
    greater, equal = _compare(primary, secondary, by_row, targets.items[rows])
    n_greater, n_equal = greater.sum(axis=1, dtype=np.int64), equal.sum(axis=1, dtype=np.int64) - 1
    found = np.ones(len(rows), bool)
    places._fill(AS_IT_STANDS, rows, n_greater, n_equal, found)
    for view in ("last_left_out", "history_left_out"):
        at, items = targets.left_out(view, rows)
        fewer_greater, fewer_equal = (np.bincount(at, flags[at, items], len(rows)) for flags in (greater, equal))
        found = ~targets.left_out_targets(view)[rows]
        places._fill(view, rows, n_greater - fewer_greater.astype(int), n_equal - fewer_equal.astype(int), found)
    places._fill("equal_text", rows, n_greater, n_equal, np.ones(len(rows), bool))
    twins = np.flatnonzero(targets.twins[rows] > 0)
    if len(twins):
        at, items = targets.equal_text(rows[twins])
        own = twins[at]
        best = items[_best_of_rows(at, primary[own, items], secondary[own, items])]
        greater, equal = _compare(primary, secondary, twins, best)
        members = np.bincount(at, equal[at, items], len(twins)).astype(int)
        places._fill(
            "equal_text", rows[twins], greater.sum(axis=1), equal.sum(axis=1) - members, np.ones(len(twins), bool)
        )
    places.listed[rows] = True
    places.lengths[rows] = targets.num_items
    depth = min(TOP, targets.num_items)
    top = np.empty((len(rows), depth), np.int32)
    _top(primary, np.zeros((1, primary.shape[1])) if scores.secondary is None else scores.secondary, top)
    places.top_items[rows, :depth] = top
    places.top_scores[rows, :depth] = np.take_along_axis(primary, top, axis=1)
    if scores.sources is not None:
        places.top_sources[rows, :depth] = np.take_along_axis(scores.sources, top, axis=1)


def _compare(
    primary: np.ndarray, secondary: np.ndarray, rows: np.ndarray, items: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[B, I] bool twice: which items stand before `items[b]` in row `rows[b]`, and which tie with it, itself too."""
    first, second = primary[rows], secondary[rows]
    own_first, own_second = primary[rows, items][:, None], secondary[rows, items][:, None]
    greater, equal = first > own_first, first == own_first
    greater |= equal & (second > own_second)
    equal &= second == own_second
    return greater, equal


def _best_of_rows(at: np.ndarray, primary: np.ndarray, secondary: np.ndarray) -> np.ndarray:
    """Of flat entries whose rows are `at` (ascending, none empty), the index of each row's best."""
    by = np.lexsort((-secondary, -primary, at))
    return by[np.flatnonzero(np.diff(at[by], prepend=-1))]


@compiled
def _top(primary, secondary, top):  # pragma: no cover (compiled)
    num_rows, num_items = primary.shape
    depth = top.shape[1]
    for row in range(num_rows):
        first = primary[row]
        second = secondary[row if secondary.shape[0] > 1 else 0]
        filled = 0
        for item in range(num_items):
            place = filled
            while place > 0:
                before = top[row, place - 1]
                if first[before] > first[item] or (first[before] == first[item] and second[before] >= second[item]):
                    break
                place -= 1
            if place >= depth:
                continue
            filled = min(filled + 1, depth)
            for move in range(filled - 1, place, -1):
                top[row, move] = top[row, move - 1]
            top[row, place] = item


def places_of_lists(blocks: Iterable[RankedLists], targets: Targets, depth: int | None = None) -> Places:
    """Reads the places from ranked lists.

    A target beyond a list's end is a miss, even where the last score of the list goes on beyond it.

    Args:
      blocks: of lists; those of users who are not evaluated are passed over.
      targets: what is asked.
      depth: of the lists; None: their greatest length.
    """
    places = Places.nowhere(len(targets.users), depth or 1)
    longest = 1
    for lists in blocks:
        rows = targets.row_of[lists.users]
        if (rows < 0).any():
            lists, rows = lists.take(np.flatnonzero(rows >= 0)), rows[rows >= 0]
        chunk = max(1, _MASK_BYTES // max(targets.num_items, 8 * lists.items.shape[1]))
        for at in range(0, len(rows), chunk):
            part = np.arange(at, min(at + chunk, len(rows)))
            _add_lists(places, targets, rows[part], lists.take(part))
        longest = max(longest, int(lists.lengths.max(initial=1)))
    return places.with_depth(depth or longest)


def _add_lists(places: Places, targets: Targets, rows: np.ndarray, lists: RankedLists) -> None:
    """Fills in the places of `rows` from their lists."""
    own = _scores_of(lists, *_one_each(targets.items[rows]), len(rows))
    found = ~np.isnan(own)
    last = lists.scores[np.arange(len(rows)), np.maximum(lists.lengths - 1, 0)]
    greater, equal = lists.scores > own[:, None], lists.scores == own[:, None]
    n_greater = greater.sum(axis=1)
    n_equal = equal.sum(axis=1) - 1 + np.where(last == own, lists.ties_beyond_depth, 0)
    places._fill(AS_IT_STANDS, rows, n_greater, n_equal, found)
    for view in ("last_left_out", "history_left_out"):
        member = _members(lists.items, *targets.left_out(view, rows), targets.num_items)
        fewer_greater, fewer_equal = ((member & flags).sum(axis=1) for flags in (greater, equal))
        kept = found & ~targets.left_out_targets(view)[rows]
        places._fill(view, rows, n_greater - fewer_greater, n_equal - fewer_equal, kept)
    places._fill("equal_text", rows, n_greater, n_equal, found)
    twins = np.flatnonzero(targets.twins[rows] > 0)
    if len(twins):
        some, at_twins = lists.take(twins), rows[twins]
        member = _members(some.items, *targets.equal_text(at_twins), targets.num_items)
        best = np.where(member, some.scores, -np.inf).max(axis=1, initial=-np.inf)
        found = np.asarray(member.any(axis=1))
        equal = ((some.scores == best[:, None]) & ~member).sum(axis=1)
        equal = equal + np.where(last[twins] == best, some.ties_beyond_depth, 0)
        places._fill("equal_text", at_twins, (some.scores > best[:, None]).sum(axis=1), equal, found)
    places.listed[rows] = lists.lengths > 0
    places.lengths[rows] = lists.lengths
    width = min(TOP, lists.items.shape[1])
    places.top_items[rows, :width] = lists.items[:, :width]
    places.top_scores[rows, :width] = lists.scores[:, :width]
    places.top_sources[rows, :width] = lists.sources[:, :width]


def _one_each(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(items)), items


def _scores_of(lists: RankedLists, at: np.ndarray, items: np.ndarray, num_rows: int) -> np.ndarray:
    """[B] the score of each row's item, NaN where its list does not have it."""
    wanted = np.full(num_rows, -3)
    wanted[at] = items
    is_wanted = lists.items == wanted[:, None]
    place = is_wanted.argmax(axis=1)
    return np.where(is_wanted.any(axis=1), lists.scores[np.arange(num_rows), place], np.nan)


def _members(listed: np.ndarray, at: np.ndarray, items: np.ndarray, num_items: int) -> np.ndarray:
    """[B, depth] bool: which listed items are among the flat `items` of their row."""
    mask = np.zeros((len(listed), num_items + 2), bool)  # the two last columns: listed items that are −1 or −2
    mask[at, items] = True
    return np.take_along_axis(mask, listed.astype(np.int64) % (num_items + 2), axis=1)


def top_of(places: Places, rows: np.ndarray | Sequence[int], k: int) -> np.ndarray:
    """[rows, k] the first items of lists; −1 and −2 as in `Places.top_items`.

    Raises:
      ValueError: `k` is more than are kept.
    """
    if not 1 <= k <= TOP:
        raise ValueError(f"k={k}: {TOP} items of a list are kept")
    return places.top_items[np.asarray(rows), :k]
