"""Health of generation, from the completions alone: what the model wrote before anything ranked it.

Notable: a hit needs two things, that some completion is the target's text (else the error is the generation's) and that
the ranking puts it first (else it is the ranking's). `split_errors` counts the four cases.

A text counts as the target's, or as one of the catalogue, where it is equal up to space at its ends; where decoding is
constrained, the item decides. "No match" is a text that shares no word with the catalogue, as BM25 counts words: it
contributes nothing to a ranking. The margin is the log-probability (nats) of the most probable distinct text over the
next one's.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from calrec_jax.evaluate.metrics import TargetRanks
from calrec_jax.evaluate.places import Targets
from calrec_jax.rank.bm25 import BM25Tokenizer
from calrec_jax.rank.completions import Completions

HIT = 10


@dataclasses.dataclass(frozen=True)
class Generation:
    """What is known of each evaluated user's completions.

    Attributes:
      decoded: [E] bool, who has completions.
      completions: [E] int64, how many.
      distinct: [E] int64, distinct texts.
      in_catalogue: [E] int64, completions that are texts of the catalogue.
      no_match: [E] int64, completions that share no word with the catalogue.
      finished: [E] int64, completions that ended before the limit.
      margins: [E] float64, NaN where there are not two distinct texts.
      reached: [E] bool, whether a completion is the target.
    """

    decoded: np.ndarray
    completions: np.ndarray
    distinct: np.ndarray
    in_catalogue: np.ndarray
    no_match: np.ndarray
    finished: np.ndarray
    margins: np.ndarray
    reached: np.ndarray


def read_generation(folder: pathlib.Path, targets: Targets) -> Generation:
    """Reads the completions of a folder.

    Raises:
      CalrecError: no shards, a column is missing or null, or users are unknown or there twice.
    """
    loaded = Completions(folder, targets.dataset, ("texts", "log_probs", "finished", "item_ids"), "skip")
    flat, lengths = loaded.lists("texts")
    owners = np.repeat(targets.row_of[loaded.users], lengths)
    kept = owners >= 0
    coded = flat.dictionary_encode()
    texts, codes = coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False)[kept]
    log_probs = loaded.numbers("log_probs", lengths)[kept].astype(np.float64)
    finished = loaded.numbers("finished", lengths)[kept].astype(bool)
    owners = owners[kept]

    catalogue = {text.strip(): row for row, text in reversed(list(enumerate(targets.dataset.texts)))}
    text_of_item = np.array([catalogue[text.strip()] for text in targets.dataset.texts])
    known = np.array([catalogue.get(text.strip(), -1) for text in texts], np.int64)
    tokenizer = BM25Tokenizer()
    words = {word for text in targets.dataset.texts for word in tokenizer(text)}
    matches = np.array(
        [row >= 0 or not words.isdisjoint(tokenizer(text)) for text, row in zip(texts, known, strict=True)], bool
    )

    def per_user(flags: np.ndarray) -> np.ndarray:
        return np.bincount(owners, flags, len(targets.users)).astype(np.int64)

    wanted = text_of_item[targets.items]
    reached = known[codes] == wanted[owners]
    if loaded.has("item_ids"):  # constrained: the item is what was decoded
        own = loaded.lists("item_ids")[0].to_numpy(zero_copy_only=False)[kept]
        reached = own == targets.dataset.item_ids[targets.items][owners]
    decoded = np.zeros(len(targets.users), bool)
    rows = targets.row_of[loaded.users]
    decoded[rows[rows >= 0]] = True
    distinct, margins = _distinct_and_margins(owners, codes, log_probs, len(targets.users))
    return Generation(
        decoded=decoded,
        completions=per_user(np.ones(len(owners))),
        distinct=distinct,
        in_catalogue=per_user(known[codes] >= 0),
        no_match=per_user(~matches[codes]),
        finished=per_user(finished),
        margins=margins,
        reached=per_user(reached) > 0,
    )


def _distinct_and_margins(
    owners: np.ndarray, codes: np.ndarray, log_probs: np.ndarray, num_users: int
) -> tuple[np.ndarray, np.ndarray]:
    by = np.lexsort((-log_probs, codes, owners))
    first = np.ones(len(by), bool)
    first[1:] = (owners[by][1:] != owners[by][:-1]) | (codes[by][1:] != codes[by][:-1])
    by = by[first]  # each user's distinct texts, with their best log-probability
    distinct = np.bincount(owners[by], minlength=num_users)
    by = by[np.lexsort((-log_probs[by], owners[by]))]
    starts = np.cumsum(distinct) - distinct
    margins = np.full(num_users, np.nan)
    two = np.flatnonzero(distinct >= 2)
    margins[two] = log_probs[by[starts[two]]] - log_probs[by[starts[two] + 1]]
    return distinct, margins


def summarise_generation(found: Generation, rows: np.ndarray) -> dict[str, Any]:
    """What `metrics.json` says of one decode, over the evaluated users `rows`.

    Shares are of all completions, `reached` is a share of all these users: one without completions is not reached.
    """
    total = int(found.completions[rows].sum())
    decoded = rows[found.decoded[rows]]
    margins = found.margins[rows][~np.isnan(found.margins[rows])]

    def share(values: np.ndarray) -> float | None:
        return float(values[rows].sum() / total) if total else None

    return {
        "users": len(rows),
        "users_without_completions": len(rows) - len(decoded),
        "completions_a_user": float(found.completions[decoded].mean()) if len(decoded) else None,
        "distinct_texts_a_user": float(found.distinct[decoded].mean()) if len(decoded) else None,
        "catalogue_share": share(found.in_catalogue),
        "no_match_share": share(found.no_match),
        "finished_share": share(found.finished),
        "margin_median": float(np.median(margins)) if len(margins) else None,
        "margin_quartiles": np.quantile(margins, [0.25, 0.75]).tolist() if len(margins) else None,
        "reached": float(found.reached[rows].mean()) if len(rows) else None,
    }


def split_errors(found: Generation, ranks: TargetRanks, rows: np.ndarray) -> dict[str, int]:
    """Users by whether a completion is the target and whether the ranking has it among the first ten (mean rank)."""
    place = 1 + ranks.n_greater[rows] + ranks.n_equal[rows] / 2
    hit = ranks.found[rows] & (place <= min(HIT, ranks.depth))
    reached = found.reached[rows]
    return {
        "reached_hit": int((reached & hit).sum()),
        "reached_miss": int((reached & ~hit).sum()),
        "not_reached_hit": int((~reached & hit).sum()),
        "not_reached_miss": int((~reached & ~hit).sum()),
    }
