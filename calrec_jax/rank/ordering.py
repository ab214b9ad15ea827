"""From scores to ranked lists: one order, the same everywhere.

Notable: an item's place is decided by two keys, `primary` and then `secondary`; items equal in both are tied and stand
in the catalogue's order. What is written is one float32 a ranked item, so that equal numbers mean tied and nothing
else: where the two keys differ but float32 could not tell, the lower one gets the next smaller float32.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from calrec_jax.compiled import compiled

_SELECT_FIRST = 4  # lists this many times shorter than the catalogue are selected before they are sorted
_TINY = np.float32(np.finfo(np.float32).tiny)  # below it lie the subnormals, which some libraries take for zero


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a block of users over the whole catalogue; greater is better.

    Attributes:
      primary: [B, I] float64; −inf for an item that is left out of the ranking (it goes to the bottom).
      secondary: [B, I] or [1, I] float64, decides between equal primaries; None: they are tied.
      sources: [B, I] int16, what gave the primary (−1 none); None: not kept.
    """

    primary: np.ndarray
    secondary: np.ndarray | None = None
    sources: np.ndarray | None = None

    def leave_out(self, rows: np.ndarray, items: np.ndarray) -> "Scores":
        """The same with item `items[j]` of row `rows[j]` tied at the bottom, for every j."""
        primary = self.primary.copy()
        primary[rows, items] = -np.inf
        secondary = self.secondary
        if secondary is not None:
            secondary = np.broadcast_to(secondary, primary.shape).copy()
            secondary[rows, items] = 0.0
        sources = self.sources
        if sources is not None:
            sources = sources.copy()
            sources[rows, items] = -1
        return Scores(primary, secondary, sources)


class Ordered(NamedTuple):
    """Ranked lists of a block of users, cut at a depth.

    items: [B, depth] int32, best first. scores: [B, depth] float32, descending, equal means tied.
    sources: [B, depth] int16. ties_beyond_depth: [B] int32, items past the depth tied with the last one.
    """

    items: np.ndarray
    scores: np.ndarray
    sources: np.ndarray
    ties_beyond_depth: np.ndarray


@compiled
def _order(primary, secondary, items, scores):  # pragma: no cover (compiled)
    num_rows, num_items = primary.shape
    for row in range(num_rows):
        first = primary[row]
        second = secondary[row if secondary.shape[0] > 1 else 0]
        by = np.argsort(-first, kind="mergesort")  # stable: ties keep the catalogue's order
        previous = np.float32(np.inf)
        start = 0
        while start < num_items:
            end = start + 1
            while end < num_items and first[by[end]] == first[by[start]]:
                end += 1
            if end - start > 1:
                run = by[start:end].copy()
                by[start:end] = run[np.argsort(-second[run], kind="mergesort")]
            for place in range(start, end):
                if place == start or second[by[place]] != second[by[place - 1]]:
                    value = np.float32(first[by[place]])
                    if value >= previous:
                        value = np.nextafter(previous, np.float32(-np.inf))
                        if np.abs(value) < _TINY:
                            value = np.float32(0.0) if previous > 0 else -_TINY
                    previous = value
                items[row, place] = by[place]
                scores[row, place] = previous
            start = end


def _sorted(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """All items of each row, best first, and their float32 scores: both [B, I]."""
    primary = np.ascontiguousarray(scores.primary, np.float64)
    secondary = np.zeros((1, primary.shape[1])) if scores.secondary is None else scores.secondary
    secondary = np.ascontiguousarray(secondary, np.float64)
    if np.isnan(primary).any() or np.isnan(secondary).any():
        raise ValueError("scores hold NaN, which has no place in an order")
    items = np.empty(primary.shape, np.int32)
    written = np.empty(primary.shape, np.float32)
    _order(primary, secondary, items, written)
    return items, written


def order(scores: Scores, depth: int | None = None) -> Ordered:
    """Ranks the items of each row and cuts the lists at a depth.

    Args:
      scores: of B users over I items.
      depth: length of the lists; None or more than I: the whole catalogue.
    """
    num_items = scores.primary.shape[1]
    depth = min(depth or num_items, num_items)
    if depth * _SELECT_FIRST <= num_items and len(scores.primary):
        return _order_of_the_first(scores, depth)
    items, written = _sorted(scores)
    sources = np.full((len(items), depth), -1, np.int16)
    if scores.sources is not None:
        sources = np.take_along_axis(scores.sources, items[:, :depth], axis=1).astype(np.int16)
    beyond = (written[:, depth:] == written[:, depth - 1 : depth]).sum(axis=1, dtype=np.int32)
    return Ordered(items[:, :depth], written[:, :depth], sources, beyond)


def _order_of_the_first(scores: Scores, depth: int) -> Ordered:
    """`order` that sorts only what is not below the place at the depth; the same, since a list depends on no more."""
    lists = []
    for row, primary in enumerate(scores.primary):
        limit = np.partition(primary, len(primary) - depth)[len(primary) - depth]
        if np.isnan(primary).any():
            raise ValueError("scores hold NaN, which has no place in an order")
        kept = np.flatnonzero(primary >= limit)
        secondary = scores.secondary
        if secondary is not None:
            secondary = secondary[row if len(secondary) > 1 else 0, kept][None]
        items, written = _sorted(Scores(primary[kept][None], secondary))
        first = kept[items[0, :depth]]
        sources = np.full(depth, -1, np.int16) if scores.sources is None else scores.sources[row, first]
        beyond = np.int32((written[0, depth:] == written[0, depth - 1]).sum())
        lists.append((first.astype(np.int32), written[0, :depth], sources.astype(np.int16), beyond))
    return Ordered(*(np.stack(parts) for parts in zip(*lists, strict=True)))


def written_scores(scores: Scores) -> np.ndarray:
    """The float32 scores as a ranking's shards hold them, by item: [B, I]; metrics of it equal the ranking's."""
    items, written = _sorted(scores)
    by_item = np.empty_like(written)
    np.put_along_axis(by_item, items, written, axis=1)
    return by_item


def dense_ranks(scores: Scores) -> np.ndarray:
    """Integers that order as `scores` does, tied items alike, greater is better: [B, I] float64, exact."""
    items, written = _sorted(scores)
    groups = np.zeros(items.shape)
    np.cumsum(written[:, 1:] != written[:, :-1], axis=1, out=groups[:, 1:])
    ranks = np.empty_like(groups)
    np.put_along_axis(ranks, items, items.shape[1] - groups, axis=1)
    return ranks
