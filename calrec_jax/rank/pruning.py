"""The best items of a text by BM25, exactly, without scoring the whole catalogue.

A text's common words match millions of items and decide little. So its words are read rarest first, adding up partial
scores, until the words left over could not lift an unseen item to the k-th best score found so far (MaxScore: Turtle
and Flood, "Query evaluation: strategies and optimizations", 1995). Seen items whose partial score and bound fall short
are dropped; the others are scored exactly, from their own row of words, and only those scores are ever returned.

Notable: everything is exact. An exact score adds the float32 numbers of bm25s in the order of the text's words, so it
is `bm25s.BM25.get_scores` bit for bit; bounds carry a margin for rounding; and what is dropped scores *less* than the
k-th best, so ties with it are all found. Which of the commonest words an item has is kept as bits, since the bound of
a word that the item lacks is zero.
"""

from typing import NamedTuple

import numpy as np

from calrec_jax.compiled import compiled

COMMON_WORDS = 256  # whose presence is kept as bits, 32 bytes an item: one cache line
_FIRST_REFINEMENT = 256  # postings read before scores are first made exact, to know a k-th best


class Postings(NamedTuple):
    """A BM25 index by word and by item; all arrays contiguous and not writeable.

    data: [postings] float32, scores of a word in an item, by word. items: [postings] int32, which item, ascending.
    starts: [words + 1] int64. most: [words] float32, each word's greatest score. row_starts: [I + 1] int64.
    row_words: [postings] int32, the words of each item. row_data: [postings] float32, their scores.
    bit_of: [words] int16, place of a common word, −1 for the others. bits: [I, COMMON_WORDS / 64] uint64.
    """

    data: np.ndarray
    items: np.ndarray
    starts: np.ndarray
    most: np.ndarray
    row_starts: np.ndarray
    row_words: np.ndarray
    row_data: np.ndarray
    bit_of: np.ndarray
    bits: np.ndarray

    @classmethod
    def of(cls, data: np.ndarray, items: np.ndarray, starts: np.ndarray, num_items: int) -> "Postings":
        """Makes the other arrays from those of bm25s (compressed sparse columns)."""
        most = np.zeros(len(starts) - 1, np.float32)
        row_starts = np.zeros(num_items + 1, np.int64)
        np.cumsum(np.bincount(items, minlength=num_items), out=row_starts[1:])
        row_words = np.empty(len(items), np.int32)
        row_data = np.empty(len(items), np.float32)
        counts = np.diff(starts)
        common = np.argsort(-counts, kind="stable")[:COMMON_WORDS]
        bit_of = np.full(len(counts), -1, np.int16)
        bit_of[common] = np.arange(len(common))
        bits = np.zeros((num_items, COMMON_WORDS // 64), np.uint64)
        _by_item(data, items, starts, row_starts[:-1].copy(), bit_of, most, row_words, row_data, bits)
        return cls(data, items, starts, most, row_starts, row_words, row_data, bit_of, bits).frozen()

    def frozen(self) -> "Postings":
        """The same arrays, not writeable: memory-mapped or not, the loops are compiled once."""
        arrays = [np.ascontiguousarray(array) for array in self]
        for array in arrays:
            array.flags.writeable = False
        return Postings(*arrays)


@compiled
def _by_item(data, items, starts, ends, bit_of, most, row_words, row_data, bits):  # pragma: no cover (compiled)
    for word in range(len(starts) - 1):
        place = bit_of[word]
        for entry in range(starts[word], starts[word + 1]):
            item = items[entry]
            row_words[ends[item]] = word
            row_data[ends[item]] = data[entry]
            ends[item] += 1
            most[word] = max(most[word], data[entry])
            if place >= 0:
                bits[item, place >> 6] |= np.uint64(1) << np.uint64(place & 63)


@compiled
def _exact(row_starts, row_words, row_data, item, slot_of, places, values):  # pragma: no cover (compiled)
    """The item's score; `places` are the text's words as slots, in order, `values` zeros for the slots."""
    for entry in range(row_starts[item], row_starts[item + 1]):
        slot = slot_of[row_words[entry]]
        if slot >= 0:
            values[slot] = row_data[entry]
    score = np.float32(0.0)
    for slot in places:
        score += values[slot]
    for slot in places:
        values[slot] = np.float32(0.0)
    return score


@compiled
def _push(heap, size, value):  # pragma: no cover (compiled)
    """Keeps the greatest values of a min-heap; returns its new size."""
    if size < len(heap):
        at = size
        while at > 0 and heap[(at - 1) >> 1] > value:
            heap[at] = heap[(at - 1) >> 1]
            at = (at - 1) >> 1
        heap[at] = value
        return size + 1
    if value <= heap[0]:
        return size
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value
    return size


@compiled
def _sorted(items, scores):  # pragma: no cover (compiled)
    """Best first; equal scores in the order of the catalogue."""
    by = np.argsort(items)
    by = by[np.argsort(-scores[by], kind="mergesort")]
    return items[by], scores[by]


@compiled
def _best_of(postings, words, k, slot_of, partial, touched):  # pragma: no cover (compiled)
    """Every item that scores at least the k-th best, best first; fewer than k where fewer match."""
    # Taken out of the tuple once: in a loop, each access would count a reference.
    data, posted, post_starts, most, row_starts, row_words, row_data, bit_of, bits = postings
    num_words = len(words)
    margin = 1.0 + 4.0 * num_words * 2.0**-24  # sums of float32 in two orders differ by less
    terms = np.empty(num_words, np.int32)
    repeats = np.zeros(num_words, np.float32)
    places = np.empty(num_words, np.int32)
    values = np.zeros(num_words, np.float32)
    distinct = 0
    for at in range(num_words):
        word = words[at]
        if slot_of[word] < 0:
            slot_of[word] = distinct
            terms[distinct] = word
            distinct += 1
        places[at] = slot_of[word]
        repeats[places[at]] += 1
    lengths = np.empty(distinct, np.int64)
    for slot in range(distinct):
        lengths[slot] = post_starts[terms[slot] + 1] - post_starts[terms[slot]]
    rarest_first = np.argsort(lengths, kind="mergesort")
    bounds = np.empty(distinct)
    rest = np.zeros(distinct + 1)
    for at in range(distinct - 1, -1, -1):
        slot = rarest_first[at]
        bounds[at] = repeats[slot] * np.float64(most[terms[slot]]) * margin
        rest[at] = rest[at + 1] + bounds[at]

    heap = np.empty(k, np.float32)
    size = 0
    found_items = np.empty(max(4 * k, 256), np.int32)
    found_scores = np.empty(max(4 * k, 256), np.float32)
    num_found = 0
    num_touched = 0
    num_read = 0
    refine_at = _FIRST_REFINEMENT
    leaders = np.empty(2 * k, np.float32)
    at = 0
    while True:
        # An unseen item can only have the words still to be read.
        done = at == distinct or (size == k and rest[at] < heap[0])
        if done or num_read >= refine_at:
            # Score the leaders so far exactly: the k-th best rises, and with it what can be dropped.
            refine_at = 4 * num_read
            num_leaders = 0
            for place in range(num_touched):
                num_leaders = _push(leaders, num_leaders, partial[touched[place]])
            room = num_leaders
            for place in range(num_touched):
                item = touched[place]
                if num_leaders > 0 and partial[item] >= leaders[0] and room > 0 and partial[item] > 0:
                    room -= 1
                    score = _exact(row_starts, row_words, row_data, item, slot_of, places, values)
                    partial[item] = -np.inf
                    size = _push(heap, size, score)
                    if num_found == len(found_items):
                        found_items = np.concatenate((found_items, np.empty_like(found_items)))
                        found_scores = np.concatenate((found_scores, np.empty_like(found_scores)))
                    found_items[num_found] = item
                    found_scores[num_found] = score
                    num_found += 1
        if done:
            break
        if size == k and rest[at] < heap[0]:
            break
        slot = rarest_first[at]
        word = terms[slot]
        for entry in range(post_starts[word], post_starts[word + 1]):
            item = posted[entry]
            before = partial[item]
            touched[num_touched] = item  # without a branch, which would be guessed wrongly half of the time
            num_touched += before == 0.0
            partial[item] = before + repeats[slot] * data[entry]
        num_read += lengths[slot]
        at += 1

    # What the words that were not read could add: of common words only where the item has them.
    loose = 0.0
    num_common = 0
    common_at = np.empty(distinct - at, np.int64)
    common_shift = np.empty(distinct - at, np.uint64)
    common_bound = np.empty(distinct - at)
    for left in range(at, distinct):
        place = bit_of[terms[rarest_first[left]]]
        if place < 0:
            loose += bounds[left]
        else:
            common_at[num_common] = place >> 6
            common_shift[num_common] = np.uint64(place & 63)
            common_bound[num_common] = bounds[left]
            num_common += 1
    for place in range(num_touched):
        item = touched[place]
        bound = partial[item] * margin
        partial[item] = 0.0
        if size == k and bound + rest[at] < heap[0]:
            continue
        if bound < 0.0:  # scored already
            continue
        bound += loose
        for common in range(num_common):
            has = (bits[item, common_at[common]] >> common_shift[common]) & np.uint64(1)
            bound += common_bound[common] * np.float64(has)
        if size == k and bound < heap[0]:
            continue
        score = _exact(row_starts, row_words, row_data, item, slot_of, places, values)
        size = _push(heap, size, score)
        if num_found == len(found_items):
            found_items = np.concatenate((found_items, np.empty_like(found_items)))
            found_scores = np.concatenate((found_scores, np.empty_like(found_scores)))
        found_items[num_found] = item
        found_scores[num_found] = score
        num_found += 1
    for slot in range(distinct):
        slot_of[terms[slot]] = -1
    found_items, found_scores = found_items[:num_found], found_scores[:num_found]
    if size == k:
        kept = found_scores >= heap[0]
        found_items, found_scores = found_items[kept], found_scores[kept]
    return _sorted(found_items, found_scores)


@compiled
def best_items(postings, words, starts, k):  # pragma: no cover (compiled)
    """The best items of each text.

    Args:
      postings: the index.
      words: int32, the words of all texts in order, rows of the vocabulary, repeats kept.
      starts: [N + 1] int64 offsets into `words`.
      k: at least 1.

    Returns:
      items: int32, for each text every item whose score is positive and at least its k-th best, best first, ties in
      the order of the catalogue; fewer than k where fewer match. scores: float32, theirs. ends: [N + 1] int64.
    """
    num_items = len(postings.row_starts) - 1
    slot_of = np.full(len(postings.starts) - 1, -1, np.int32)
    partial = np.zeros(num_items, np.float32)
    touched = np.empty(num_items + 1, np.int32)
    ends = np.zeros(len(starts), np.int64)
    items = np.empty(max(1, k) * len(starts), np.int32)
    scores = np.empty(len(items), np.float32)
    for text in range(len(starts) - 1):
        own_items, own_scores = _best_of(postings, words[starts[text] : starts[text + 1]], k, slot_of, partial, touched)
        begin = ends[text]
        end = begin + len(own_items)
        while end > len(items):
            items = np.concatenate((items, np.empty_like(items)))
            scores = np.concatenate((scores, np.empty_like(scores)))
        items[begin:end] = own_items
        scores[begin:end] = own_scores
        ends[text + 1] = end
    return items[: ends[-1]], scores[: ends[-1]], ends
