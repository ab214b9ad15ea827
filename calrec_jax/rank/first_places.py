"""Quasi-round-robin to a depth, from the best items of each text: lists much shorter than the catalogue.

An item's score is the best over a user's texts. An item that stands below place d of every text has d items before it,
so the first d places are among the first d of each text, ties included; nothing else has to be scored. What comes out
is what `order(RoundRobin.scores(...), depth)` gives, bit for bit.

Notable: a user with fewer matches than the list has places, or with more items left out than there is room for, is
ranked the long way.
"""

from typing import NamedTuple

import numpy as np

from calrec_jax.compiled import compiled
from calrec_jax.rank.ordering import Ordered, Scores, order
from calrec_jax.rank.round_robin import SCALINGS, RoundRobin, above, span_of

SPARE_PLACES = 64  # for items of a user that are left out
_MOST_HELD = 2**26  # items of texts that wait to be used again


class _Matches(NamedTuple):
    """A text's best items: [m] int32 and their float32 scores, best first, and the least score of all items."""

    items: np.ndarray
    scores: np.ndarray
    lowest: np.float32


class FirstPlaces:
    """A source that ranks users to a depth.

    Attributes:
      num_scored: how many texts were looked up so far; each distinct one once, while what waits fits in memory.
      num_long: how many users were ranked the long way.
    """

    def __init__(self, round_robin: RoundRobin):
        self._round_robin = round_robin
        self._depth = 0
        self._texts = round_robin.user_texts
        self._index = round_robin.bank.index
        self._held: dict[int, _Matches] = {}
        self._uses_left = np.bincount(self._texts.codes, minlength=len(self._texts.texts))
        self.num_scored = 0
        self.num_long = 0

    def scores(self, users: np.ndarray) -> Scores:
        """See `sources.Source`."""
        return self._round_robin.scores(users)

    def first(self, users: np.ndarray, depth: int, rows: np.ndarray, items: np.ndarray) -> Ordered:
        """Ranks a block of users (see `sources.LeftOut`).

        Args:
          users: [B] rows of the user texts; ask for each user once, or texts are looked up again.
          depth: of the lists, always the same.
          rows: of items that are left out, places in `users`, ascending.
          items: of the same, which.
        """
        if depth != self._depth:
            self._depth, self._held = depth, {}
        own = [self._texts.of_user(user) for user in users]
        codes = np.unique(np.concatenate([self._texts.codes[flat] for flat in own] or [np.zeros(0, np.int32)]))
        self._look_up(codes)
        begins = np.searchsorted(rows, np.arange(len(users) + 1))
        lists = [
            self._first_of(user, flat, items[begins[place] : begins[place + 1]])
            for place, (user, flat) in enumerate(zip(users, own, strict=True))
        ]
        for flat in own:
            self._uses_left[self._texts.codes[flat]] -= 1
        for code in codes[self._uses_left[codes] <= 0].tolist():
            del self._held[code]
        return Ordered(*(np.concatenate(parts) for parts in zip(*lists, strict=True)))

    def _look_up(self, codes: np.ndarray) -> None:
        if sum(len(found.items) for found in self._held.values()) > _MOST_HELD:
            self._held = {code: self._held[code] for code in codes.tolist() if code in self._held}
        new = [code for code in codes.tolist() if code not in self._held]
        texts = [self._texts.texts[code] for code in new]
        items, scores, ends = self._index.best(texts, min(self._depth + SPARE_PLACES, self._index.num_items))
        lowest = self._index.lowest(texts) if self._round_robin.config.scaling == "min_max" else np.zeros(len(new))
        for row, code in enumerate(new):
            own = slice(ends[row], ends[row + 1])
            self._held[code] = self._matches(texts[row], items[own].copy(), scores[own].copy(), lowest[row])
        self.num_scored += len(new)

    def _matches(self, text: str, items: np.ndarray, scores: np.ndarray, lowest: np.float32) -> _Matches:
        exact = self._round_robin.exact.items(text) if self._round_robin.exact is not None else items[:0]
        if len(exact):  # a score that nothing else has
            rest = ~np.isin(items, exact)
            best = above(scores.max(initial=0))
            items = np.concatenate([exact, items[rest]])
            scores = np.concatenate([np.full(len(exact), best, np.float32), scores[rest]])
            if len(exact) == self._index.num_items:
                lowest = best
        return _Matches(items, scores, lowest)

    def _first_of(self, user: int, flat: slice, left_out: np.ndarray) -> Ordered:
        """The list of one user: arrays of [1, depth]."""
        found = [self._held[code] for code in self._texts.codes[flat].tolist()]
        lengths = np.array([len(one.items) for one in found], np.int64)
        if lengths.sum():
            starts = np.concatenate([[0], np.cumsum(lengths)])
            candidates, best, first_choices, sources = _merge(
                np.concatenate([one.items for one in found]),
                np.concatenate([one.scores for one in found]),
                starts,
                np.array([one.lowest for one in found], np.float32),
                SCALINGS.index(self._round_robin.config.scaling),
                self._round_robin.weights(flat),
                self._round_robin.first_choice_counts(flat),
                self._texts.completions[flat],
            )
            kept = ~np.isin(candidates, left_out)
            if (~kept).sum() <= SPARE_PLACES and (best[kept] > 0).sum() >= self._depth:
                second = first_choices[kept][None] if self._round_robin.config.ties == "first_choices" else None
                lists = order(Scores(best[kept][None], second, sources[kept][None]), self._depth)
                return lists._replace(items=candidates[kept][lists.items])
        self.num_long += 1
        scores = self._round_robin.scores(np.array([user]))
        return order(scores.leave_out(np.zeros(len(left_out), np.int64), left_out), self._depth)


@compiled
def _merge(items, scores, starts, lowest, scaling, weights, counts, completions):  # pragma: no cover (compiled)
    """Scores of the items of a user's texts, each once and ascending: items, primary, secondary and sources."""
    values, firsts, texts = np.zeros(len(items)), np.zeros(len(items)), np.empty(len(items), np.int16)
    for text in range(len(weights)):
        begin, end = starts[text], starts[text + 1]
        if begin == end:
            continue
        base, span = span_of(scaling, lowest[text], scores[begin])
        if span <= 0.0:
            continue
        for place in range(begin, end):
            values[place] = weights[text] * ((np.float64(scores[place]) - base) / span)
            firsts[place] = counts[text] if scores[place] == scores[begin] else 0.0
            texts[place] = completions[text]
    by = np.argsort(items, kind="mergesort")  # of an item, texts in their order
    found, size = np.empty(len(items), np.int32), 0
    best, first_choices, sources = np.zeros(len(items)), np.zeros(len(items)), np.full(len(items), -1, np.int16)
    for place in by:
        if size == 0 or items[place] != found[size - 1]:
            found[size] = items[place]
            size += 1
        if values[place] > best[size - 1]:
            best[size - 1] = values[place]
            sources[size - 1] = texts[place]
        first_choices[size - 1] += firsts[place]
    return found[:size], best[:size], first_choices[:size], sources[:size]
