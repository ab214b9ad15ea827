"""The best items of a text by BM25, exactly, without adding up every posting.

A text's common words match most of the catalogue and decide little. So its words are read rarest first, adding up
partial scores, until the words left over could not lift an unseen item to the k-th best score found so far (MaxScore:
Turtle and Flood, "Query evaluation: strategies and optimizations", 1995). A few more words are then read for seen items
alone, as long as that is cheaper than looking at each item that is still possible; those left are bounded by what they
hold of the commonest words, a byte a word, and the few that pass are scored from their own row of words.

Notable: everything is exact. An exact score adds the float32 numbers of bm25s in the order of the text's words, so it
is `bm25s.BM25.get_scores` bit for bit; bounds carry a margin for rounding; and what is dropped scores *less* than the
k-th best, so ties with it are all found. Loops have no branch that depends on an item where that can be had: a branch
guessed wrongly costs more than reading ten postings. Indices are unsigned, since numba tests signed ones.
"""

from typing import NamedTuple

import numpy as np

from calrec_jax.compiled import compiled

COMMON_WORDS = 64  # whose scores are kept by item, in a byte each: one cache line an item
MOST_PRUNED = 64  # from a larger k on, all words that matter are read: pruning has too little to drop
_LOOK = 40.0 / 0.8  # looking at an item costs as much as reading so many postings
_NEGLIGIBLE = 1e-3  # share of a text's greatest score


class Postings(NamedTuple):
    """A BM25 index by word and by item; all arrays contiguous and not writeable.

    Attributes:
      data: [postings] float32, scores of a word in an item, by word; all above 0.
      items: [postings] uint32, which item, ascending within a word.
      starts: [words + 1] uint64 offsets into them.
      most: [words] float32, each word's greatest score.
      row_starts: [I + 1] uint64 offsets into the rows.
      row_words: [postings] uint32, the words of each item.
      row_data: [postings] float32, their scores.
      common_of: [words] int32, column of a common word, −1 for the others.
      common_scale: [COMMON_WORDS] float64, what 1 stands for in a column.
      common: [I, COMMON_WORDS] uint8, the items' scores of the commonest words, rounded up.
    """

    data: np.ndarray
    items: np.ndarray
    starts: np.ndarray
    most: np.ndarray
    row_starts: np.ndarray
    row_words: np.ndarray
    row_data: np.ndarray
    common_of: np.ndarray
    common_scale: np.ndarray
    common: np.ndarray

    @classmethod
    def of(cls, data: np.ndarray, items: np.ndarray, starts: np.ndarray, num_items: int) -> "Postings":
        """Makes the other arrays from those of bm25s (compressed sparse columns)."""
        counts = np.diff(starts)
        most = np.zeros(len(counts), np.float32)
        row_starts = np.zeros(num_items + 1, np.int64)
        np.cumsum(np.bincount(items, minlength=num_items), out=row_starts[1:])
        row_words, row_data = np.empty(len(items), np.uint32), np.empty(len(items), np.float32)
        commonest = np.argsort(-counts, kind="stable")[:COMMON_WORDS]
        common_of = np.full(len(counts), -1, np.int32)
        common_of[commonest] = np.arange(len(commonest))
        np.maximum.at(most, np.repeat(np.arange(len(counts)), counts), data)
        scale = np.ones(COMMON_WORDS)
        scale[: len(commonest)] = most[commonest] / 255.0 * (1 + 1e-6)  # so that 255 is never too little
        common = np.zeros((num_items, COMMON_WORDS), np.uint8)
        _by_item(data, items, starts, row_starts[:-1].copy(), common_of, scale, row_words, row_data, common)
        return cls(data, items, starts, most, row_starts, row_words, row_data, common_of, scale, common).frozen()

    def frozen(self) -> "Postings":
        """The same with indices unsigned and nothing writeable: memory-mapped or not, the loops are compiled once."""
        unsigned = {"items": np.uint32, "starts": np.uint64, "row_starts": np.uint64}
        arrays = [
            np.ascontiguousarray(array).view(unsigned.get(name, array.dtype)) for name, array in self._asdict().items()
        ]
        for array in arrays:
            array.flags.writeable = False
        return Postings(*arrays)


@compiled
def _by_item(data, items, starts, ends, common_of, scale, row_words, row_data, common):  # pragma: no cover (compiled)
    for word in range(len(starts) - 1):
        column = common_of[word]
        for entry in range(starts[word], starts[word + 1]):
            item = items[entry]
            row_words[ends[item]] = word
            row_data[ends[item]] = data[entry]
            ends[item] += 1
            if column >= 0:
                common[item, column] = np.uint8(min(255.0, np.ceil(np.float64(data[entry]) / scale[column])))


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
def _push(heap, items, size, value, item):  # pragma: no cover (compiled)
    """Keeps the greatest values of a min-heap, and their items; returns its new size."""
    if size < len(heap):
        at = size
        while at > 0 and heap[(at - 1) >> 1] > value:
            heap[at], items[at] = heap[(at - 1) >> 1], items[(at - 1) >> 1]
            at = (at - 1) >> 1
        heap[at], items[at] = value, item
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
        heap[at], items[at] = heap[child], items[child]
        at = child
    heap[at], items[at] = value, item
    return size


@compiled
def _prepare(words, starts, most, slot_of, terms, repeats, places):  # pragma: no cover (compiled)
    """The text's distinct words, rarest first, and what those from each place on can add at most.

    Fills slot_of (word to slot), terms (slot to word), repeats (slot to how often), places (the text as slots).
    """
    distinct = 0
    for at in range(len(words)):
        word = words[at]
        if slot_of[word] < 0:
            slot_of[word] = distinct
            terms[distinct] = word
            distinct += 1
        places[at] = slot_of[word]
        repeats[places[at]] += np.float32(1.0)
    lengths = np.empty(distinct, np.int64)
    for slot in range(distinct):
        lengths[slot] = starts[terms[slot] + 1] - starts[terms[slot]]
    rarest_first = np.argsort(lengths, kind="mergesort")
    rest = np.zeros(distinct + 1)
    for at in range(distinct - 1, -1, -1):
        slot = rarest_first[at]
        rest[at] = rest[at + 1] + repeats[slot] * np.float64(most[terms[slot]])
    return rarest_first, lengths, rest * _margin(len(words))


@compiled
def _margin(num_words):  # pragma: no cover (compiled)
    """Sums of float32 in two orders differ by less than this factor."""
    return 1.0 + 4.0 * num_words * 2.0**-24


@compiled
def _pruned(postings, words, k, slot_of, partial, touched, found_items, found_scores):  # pragma: no cover (compiled)
    """Fills in every item that scores at least the k-th best, and perhaps others; returns how many, and the k-th best.

    `partial` ([I] zeros) and `slot_of` ([words] −1) are left as they were. One function, since its parts share all of
    its state.
    """
    # Taken out of the tuple once: in a loop, each access would count a reference.
    data, posted, starts, most, row_starts, row_words, row_data, common_of, common_scale, common = postings
    margin = _margin(len(words))
    terms, repeats = np.empty(len(words), np.uint32), np.zeros(len(words), np.float32)
    places, values = np.empty(len(words), np.int64), np.zeros(len(words), np.float32)
    rarest_first, lengths, rest = _prepare(words, starts, most, slot_of, terms, repeats, places)
    distinct = len(lengths)
    best, best_items, size = np.empty(k, np.float32), np.empty(k, np.uint32), 0
    # Items with high partial scores are scored exactly now and then: the k-th best rises, and with it what is dropped.
    leaders = np.empty(max(32, k), np.float32)
    leading, num_leaders, floor = np.empty(len(leaders), np.uint32), 0, np.float32(0.0)
    num_found, num_touched, num_read, next_look, at = 0, 0, 0, max(512, 2 * k), 0
    while True:
        done = at == distinct or (size == k and rest[at] < best[0])  # an unseen item has only the words still to come
        if done or num_read >= next_look:
            next_look = 8 * num_read
            for leader in range(num_leaders):
                item = leading[leader]
                if partial[item] == -np.inf:
                    continue  # scored already, or there twice
                score = _exact(row_starts, row_words, row_data, item, slot_of, places, values)
                partial[item] = -np.inf
                size = _push(best, best_items, size, score, item)
                found_items[num_found], found_scores[num_found] = item, score
                num_found += 1
            if num_leaders == len(leaders):
                floor = leaders[0]
            num_leaders = 0
            done = at == distinct or (size == k and rest[at] < best[0])
        if done:
            break
        word, factor = terms[rarest_first[at]], repeats[rarest_first[at]]
        for entry in range(starts[word], starts[word + 1]):
            item = posted[entry]
            before = partial[item]
            touched[num_touched] = item
            num_touched += before == np.float32(0.0)
            after = before + factor * data[entry]
            partial[item] = after
            if after > floor:  # seldom
                num_leaders = _push(leaders, leading, num_leaders, after, item)
                if num_leaders == len(leaders):
                    floor = leaders[0]
        num_read += lengths[rarest_first[at]]
        at += 1

    limit = np.float64(best[0]) if size == k else -1.0
    step = max(1, num_touched >> 9)  # a sample tells how many are still possible
    while at < distinct and limit > 0:
        possible = 0
        for place in range(0, num_touched, step):
            possible += partial[touched[place]] * margin + rest[at] >= limit
        if possible * step * _LOOK < lengths[rarest_first[at]]:
            break
        word, factor = terms[rarest_first[at]], repeats[rarest_first[at]]
        for entry in range(starts[word], starts[word + 1]):
            item = posted[entry]
            before = partial[item]
            partial[item] = before + factor * data[entry] * np.float32(before != np.float32(0.0))
        at += 1

    num_possible = 0
    for place in range(num_touched):
        item = touched[place]
        value = partial[item]
        touched[num_possible] = item
        keep = value * margin + rest[at] >= limit  # not what was scored: that is −inf
        num_possible += keep
        partial[item] = value if keep else np.float32(0.0)

    uncommon, num_common = 0.0, 0
    columns, worth = np.empty(distinct - at, np.int64), np.empty(distinct - at)
    for left in range(at, distinct):
        slot = rarest_first[left]
        if common_of[terms[slot]] < 0:
            uncommon += repeats[slot] * np.float64(most[terms[slot]]) * margin
        else:
            columns[num_common] = common_of[terms[slot]]
            worth[num_common] = repeats[slot] * common_scale[columns[num_common]] * margin
            num_common += 1
    for place in range(num_possible):
        item = touched[place]
        bound = partial[item] * margin + uncommon
        partial[item] = np.float32(0.0)
        for column in range(num_common):
            bound += worth[column] * common[item, columns[column]]
        if bound < limit:
            continue
        score = _exact(row_starts, row_words, row_data, item, slot_of, places, values)
        size = _push(best, best_items, size, score, item)
        if size == k:
            limit = np.float64(best[0])
        found_items[num_found], found_scores[num_found] = item, score
        num_found += 1
    for slot in range(distinct):
        slot_of[terms[slot]] = -1
    return num_found, best[0] if size == k else np.float32(0.0)


@compiled
def _summed(postings, words, k, slot_of, partial, found_items, found_scores):  # pragma: no cover (compiled)
    """As `_pruned`, by reading all words but those that add next to nothing, and then every item's sum."""
    data, posted, starts, most, row_starts, row_words, row_data = postings[:7]
    margin = _margin(len(words))
    terms, repeats = np.empty(len(words), np.uint32), np.zeros(len(words), np.float32)
    places, values = np.empty(len(words), np.int64), np.zeros(len(words), np.float32)
    rarest_first, _, rest = _prepare(words, starts, most, slot_of, terms, repeats, places)
    distinct, at, num_found = len(rest) - 1, 0, 0
    sums = np.empty(8 * k, np.float32)
    enough = _NEGLIGIBLE * rest[0]
    while True:
        while at < distinct and rest[at] > enough:
            word, factor = terms[rarest_first[at]], repeats[rarest_first[at]]
            for entry in range(starts[word], starts[word + 1]):
                partial[posted[entry]] += factor * data[entry]
            at += 1
        num_sums, floor, lowest = 0, np.float32(0.0), 0.0
        num_found = 0
        for item in range(len(partial)):
            value = partial[item]
            if value > lowest:  # could be among the best: seldom, once k are found
                found_items[num_found], found_scores[num_found] = item, value
                num_found += 1
                if value > floor:
                    sums[num_sums] = value
                    num_sums += 1
                    if num_sums == len(sums):
                        sums[:k] = np.partition(sums, len(sums) - k)[len(sums) - k :]
                        num_sums = k
                        floor = sums[0]
                        lowest = max(0.0, (floor / margin - rest[at]) / margin) * (1.0 - 1e-6)
        if num_sums >= k:
            floor = np.partition(sums[:num_sums], num_sums - k)[num_sums - k]
            lowest = (floor / margin - rest[at]) / margin * (1.0 - 1e-6)
        if at == distinct or (num_sums >= k and lowest > 0.0):
            break
        enough = 0.0  # too few without the words that were left out, so that all have to be read
    partial[:] = np.float32(0.0)
    kept = 0
    for place in range(num_found):
        item = found_items[place]
        if found_scores[place] >= lowest:
            found_items[kept] = item
            found_scores[kept] = _exact(row_starts, row_words, row_data, item, slot_of, places, values)
            kept += 1
    for slot in range(distinct):
        slot_of[terms[slot]] = -1
    if kept < k:
        return kept, np.float32(0.0)
    return kept, np.partition(found_scores[:kept], kept - k)[kept - k]


@compiled
def best_items(postings, words, starts, k, pruned):  # pragma: no cover (compiled)
    """The best items of each text.

    Args:
      postings: the index.
      words: uint32, the words of all texts in order, rows of the vocabulary, repeats kept.
      starts: [N + 1] int64 offsets into `words`.
      k: at least 1.
      pruned: which of the two ways; the result is the same.

    Returns:
      items: int32, for each text every item whose score is positive and at least its k-th best, best first, ties in
      the order of the catalogue; fewer than k where fewer match. scores: float32, theirs. ends: [N + 1] int64.
    """
    num_items = len(postings.row_starts) - 1
    slot_of = np.full(len(postings.starts) - 1, -1, np.int32)
    partial = np.zeros(num_items, np.float32)
    touched = np.empty(num_items + 1, np.uint32)
    found_items, found_scores = np.empty(num_items + 1, np.uint32), np.empty(num_items + 1, np.float32)
    ends = np.zeros(len(starts), np.int64)
    items, scores = np.empty((k + 8) * len(starts), np.int32), np.empty((k + 8) * len(starts), np.float32)
    for text in range(len(starts) - 1):
        own = words[starts[text] : starts[text + 1]]
        if pruned:
            count, limit = _pruned(postings, own, k, slot_of, partial, touched, found_items, found_scores)
        else:
            count, limit = _summed(postings, own, k, slot_of, partial, found_items, found_scores)
        kept = np.flatnonzero(found_scores[:count] >= limit)
        some, values = found_items[kept], found_scores[kept]
        by = np.argsort(some)
        by = by[np.argsort(-values[by], kind="mergesort")]
        begin, end = ends[text], ends[text] + len(by)
        while end > len(items):
            items = np.concatenate((items, np.empty_like(items)))
            scores = np.concatenate((scores, np.empty_like(scores)))
        items[begin:end] = some[by]
        scores[begin:end] = values[by]
        ends[text + 1] = end
    return items[: ends[-1]], scores[: ends[-1]], ends


@compiled
def lowest_score(postings, words, items, bounds, slot_of):  # pragma: no cover (compiled)
    """The least score that a text gives any item, or −1 where `items` do not tell.

    Args:
      postings: the index.
      words: uint32, of one text.
      items: int64, by ascending bound.
      bounds: float32, no item from this place on scores less, nor one that is not among them.
      slot_of: [words] int32 of −1; left as it was.
    """
    _, _, starts, most, row_starts, row_words, row_data = postings[:7]
    terms, repeats = np.empty(len(words), np.uint32), np.zeros(len(words), np.float32)
    places, values = np.empty(len(words), np.int64), np.zeros(len(words), np.float32)
    _prepare(words, starts, most, slot_of, terms, repeats, places)
    lowest = np.float32(np.inf)
    told = False
    for place in range(len(items)):
        if lowest <= bounds[place]:
            told = True
            break
        score = _exact(row_starts, row_words, row_data, items[place], slot_of, places, values)
        lowest = min(lowest, score)
    told = told or lowest <= bounds[-1] or len(items) == len(row_starts) - 1
    for word in words:
        slot_of[word] = -1
    return lowest if told else np.float32(-1.0)
