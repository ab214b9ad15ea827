"""Ranking speed: strings a second a core over catalogues of several sizes, beside bm25s and rank_bm25.

    python benchmarks/rank.py --items 4385 100000 1000000 --strings 10000

`pruned` is `BM25Index.best` with k = 10, `all postings` the scores of all items and a selection of the best ten,
`bm25s` its own retrieval with the numba backend, `rank_bm25` (extra `bench`) up to 100,000 items, where a string takes
it over half a second. All have the same tokens, and tokenising is a row of its own. Every pruned result is compared
with all postings: items, scores, order of ties. `first 1,000` is quasi-round-robin for users of 32 strings each, to the
depth that rankings of large catalogues have. Times are of the process on one thread. Catalogue and strings are made by
benchmarks/catalogue.py; a million items take some 3 GB and a minute to index.
"""

import argparse
import os
import pathlib
import resource
import tempfile
import time

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
from catalogue import make_catalogue, make_strings

from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.first_places import FirstPlaces
from calrec_jax.rank.round_robin import RoundRobin
from calrec_jax.rank.sources import Tower
from calrec_jax.rank.user_texts import UserTexts

K, DEPTH, A_USER = 10, 1000, 32
BLOCK = 500  # strings at a time
MOST_RANK_BM25 = 100_000


def timed(function, *inputs):
    """Processor seconds of a call, and what it returns; call it once before, so that it is compiled."""
    begin = time.process_time()
    made = function(*inputs)
    return time.process_time() - begin, made


def all_postings(index, texts):
    """The best items of each text from the scores of all items: [(items, scores)], ties with the last included."""
    best = []
    for text in texts:
        scores = index.scores([text])[0]
        limit = np.partition(scores, -K)[-K]
        items = np.flatnonzero((scores >= limit) & (scores > 0))
        items = items[np.argsort(-scores[items], kind="stable")]
        best.append((items, scores[items]))
    return best


def differing(pruned, expected):
    """How many texts have another result."""
    items, scores, ends = pruned
    own = [slice(ends[row], ends[row + 1]) for row in range(len(expected))]
    return sum(
        not (np.array_equal(items[at], theirs[0]) and np.array_equal(scores[at], theirs[1]))
        for at, theirs in zip(own, expected, strict=True)
    )


def plain_bm25s(index, tokens):
    """bm25s' own retrieval of strings that have at least one word it knows."""
    return index.bm25s.retrieve(
        tokens, k=K, backend_selection="numba", n_threads=1, show_progress=False, return_as="tuple"
    )


def rank_bm25_seconds(texts, tokens):
    """Seconds a string of rank_bm25, or None where it is not installed."""
    try:
        from rank_bm25 import BM25Okapi
    except ImportError:
        return None
    other = BM25Okapi(texts)
    return timed(lambda: [np.argpartition(-other.get_scores(words), K)[:K] for words in tokens])[0] / len(tokens)


def rank_users(index, strings):
    """Processor seconds a string and a user of quasi-round-robin to `DEPTH`, and how many were ranked the long way."""
    users = len(strings) // A_USER
    nested = [strings[row * A_USER : (row + 1) * A_USER] for row in range(users)]
    own = UserTexts.of(nested, (-np.random.default_rng(0).exponential(30, (users, A_USER))).tolist())
    none = np.zeros(0, np.int64)
    FirstPlaces(RoundRobin(index, own)).first(np.arange(1), DEPTH, none, none)
    ranker = FirstPlaces(RoundRobin(index, own))
    seconds, _ = timed(ranker.first, np.arange(users), DEPTH, none, none)
    return seconds / len(own.texts), seconds / users, ranker.num_long


def tower_users(num_items, users=256, size=128):
    """Seconds by the clock a user of a tower's lists to `DEPTH`; products run on all cores."""
    rng = np.random.default_rng(0)
    items = rng.standard_normal((num_items, size), np.float32)
    tower = Tower(rng.standard_normal((users, size), np.float32), items)
    none = np.zeros(0, np.int64)
    tower.first(np.arange(2), DEPTH, none, none)
    begin = time.perf_counter()
    tower.first(np.arange(users), DEPTH, none, none)
    return (time.perf_counter() - begin) / users


def measure(num_items, num_strings):
    texts = make_catalogue(num_items)
    strings = make_strings(texts, num_strings)
    seconds, index = timed(BM25Index, texts)
    rows, _ = timed(lambda: index._postings)
    print(f"{num_items:,} items, {num_strings:,} strings; indexed in {seconds:.1f} s, rows of items {rows:.1f} s")
    tokens = [index.tokenizer(text) for text in strings]
    words, _ = timed(index._words, strings)  # tokens as numbers, which is what `best` and `scores` begin with
    figures = {"tokenise": words / num_strings}
    index.best(strings[:1], K)
    seconds, pruned = timed(index.best, strings, K)
    figures["pruned"] = (seconds - words) / num_strings
    all_postings(index, strings[:1])
    some = strings[: min(num_strings, 1000)]
    figures["all postings"] = (timed(all_postings, index, some)[0]) / len(some) - figures["tokenise"]
    known = [words for words in tokens if any(word in index.bm25s.vocab_dict for word in words)][:1000]
    plain_bm25s(index, known[:1])
    figures["bm25s"] = timed(plain_bm25s, index, known)[0] / len(known)
    if num_items <= MOST_RANK_BM25:
        other = rank_bm25_seconds([index.tokenizer(text) for text in texts], known[: 500 if num_items < 10_000 else 10])
        figures |= {} if other is None else {"rank_bm25": other}
    for name, each in figures.items():
        print(f"  {name:12s} {each * 1e6:9.1f} µs a string, {1 / each:9.0f} strings/s a core", flush=True)
    if num_items >= 4 * DEPTH:
        a_string, a_user, long = rank_users(index, strings[: min(num_strings, 1600)])
        print(
            f"  first {DEPTH:,}  {a_string * 1e6:9.1f} µs a string, {a_user * 1e3:.1f} ms a user, {long} the long way"
        )
        seconds = tower_users(num_items)
        print(f"  tower, lists of {DEPTH:,}: {seconds * 1e3:.1f} ms a user by the clock")
    expected = (all_postings(index, strings[at : at + BLOCK]) for at in range(0, num_strings, BLOCK))
    differ = differing(pruned, [one for block in expected for one in block])
    print(f"  {differ} of {num_strings:,} pruned results differ from all postings", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "index")
        saving, _ = timed(index.save, path, "benchmark")
        loading, _ = timed(BM25Index.load, path, "benchmark")
        size = sum(file.stat().st_size for file in path.iterdir())
        print(
            f"  index of {size / 2**20:.0f} MiB on disk, saved in {saving:.1f} s, loaded and checked in {loading:.1f} s"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, nargs="+", default=[4385, 100_000, 1_000_000])
    parser.add_argument("--strings", type=int, default=10_000)
    arguments = parser.parse_args()
    for num_items in arguments.items:
        measure(num_items, arguments.strings)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
