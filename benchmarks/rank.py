"""Ranking speed: strings a second a core, exact top 10, over catalogues of several sizes.

    python benchmarks/rank.py --items 4385 100000 1000000 --strings 10000

Each string's ten best items by `BM25Index.best` (pruned), by adding up every posting (all scores), by plain bm25s with
its numba backend and, up to 5,000 items, by rank_bm25 where it is installed. Times are CPU time of this process on one
thread, tokenisation apart. Every pruned result is compared with all scores: items, ties and scores. The catalogue and
the strings are made by benchmarks/catalogue.py. A million items need some 3 GB and minutes to index.
"""

import argparse
import os
import time

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
from catalogue import make_catalogue, make_strings

from calrec_jax.rank.bm25 import BM25Index

K = 10


def timed(function, *inputs):
    """CPU seconds of a call, and what it returns; call it once before, so that it is compiled."""
    begin = time.process_time()
    made = function(*inputs)
    return time.process_time() - begin, made


def all_scores(index, texts):
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
    return sum(
        not (
            np.array_equal(items[ends[row] : ends[row + 1]], own_items)
            and np.array_equal(scores[ends[row] : ends[row + 1]], own_scores)
        )
        for row, (own_items, own_scores) in enumerate(expected)
    )


def plain_bm25s(index, tokens):
    """bm25s' own retrieval of strings that have at least one word it knows."""
    return index.bm25s.retrieve(
        tokens, k=K, backend_selection="numba", n_threads=1, show_progress=False, return_as="tuple"
    )


def rank_bm25_seconds(index, texts, tokens):
    """Seconds a string of rank_bm25, or None where it is not installed."""
    try:
        from rank_bm25 import BM25Okapi
    except ImportError:
        return None
    other = BM25Okapi([index.tokenizer(text) for text in texts])
    seconds, _ = timed(lambda: [np.argsort(-other.get_scores(words))[:K] for words in tokens])
    return seconds / len(tokens)


def measure(num_items, num_strings):
    texts = make_catalogue(num_items)
    strings = make_strings(texts, num_strings)
    seconds, index = timed(BM25Index, texts)
    print(f"{num_items:,} items, {num_strings:,} strings; indexed in {seconds:.0f} s")
    seconds, tokens = timed(lambda: [index.tokenizer(text) for text in strings])
    print(f"  tokenise     {seconds / num_strings * 1e6:9.1f} µs a string")
    tokens_s = seconds
    index.best(strings[:1], K)
    seconds, pruned = timed(index.best, strings, K)
    rows = {"pruned": (seconds - tokens_s) / num_strings}
    all_scores(index, strings[:1])
    seconds, expected = timed(all_scores, index, strings)
    rows["all scores"] = (seconds - tokens_s) / num_strings
    known = [words for words in tokens if any(word in index.bm25s.vocab_dict for word in words)]
    plain_bm25s(index, known[:1])
    rows["bm25s"] = timed(plain_bm25s, index, known)[0] / len(known)
    if num_items <= 5000:
        other = rank_bm25_seconds(index, texts, known[:500])
        if other is not None:
            rows["rank_bm25"] = other
    for name, each in rows.items():
        print(f"  {name:12s} {each * 1e6:9.1f} µs a string, {1 / each:9.0f} strings/s a core")
    print(f"  {differing(pruned, expected)} of {num_strings:,} pruned results differ from all scores", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, nargs="+", default=[4385, 100_000, 1_000_000])
    parser.add_argument("--strings", type=int, default=10_000)
    arguments = parser.parse_args()
    for num_items in arguments.items:
        measure(num_items, arguments.strings)


if __name__ == "__main__":
    main()
