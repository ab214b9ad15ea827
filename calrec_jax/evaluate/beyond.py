"""What lists say beyond hits: catalogue coverage, popularity bias, novelty, diversity within a list.

All are over the first k items of the lists of users who have one; tied items stand in the list's order.

- coverage: share of the catalogue that stands in at least one list (M. Ge et al., RecSys 2010: catalogue coverage).
- popularity: mean of how often a listed item was bought in training (average recommendation popularity, H. Yin et al.,
  Challenging the long tail recommendation, VLDB 2012), and its ratio to the same mean over the training
  purchases (popularity lift, H. Abdollahpouri et al., 2020): above 1 the lists are more popular than what users buy.
- novelty: mean of −log2(n_i / U), n_i the users who bought item i in training, at least 1, U all users (mean inverse
  user frequency: T. Zhou et al., PNAS 2010; P. Castells et al., 2011).
- diversity: mean over pairs of a list's items of 1 − J, J the Jaccard index of the words of their texts (intra-list
  diversity: B. Smyth, P. McClave, ICCBR 2001; C.-N. Ziegler et al., WWW 2005).
"""

import functools

import numpy as np

from calrec_jax.compiled import compiled
from calrec_jax.data.dataset import Dataset
from calrec_jax.evaluate.places import Places, top_of
from calrec_jax.evaluate.slices import training_purchases
from calrec_jax.rank.bm25 import BM25Tokenizer


class Catalogue:
    """What the numbers need of a dataset, gathered once for all rankings.

    Attributes:
      counts: [I] int64, purchases of each item in training.
      users: [I] int64, users who bought it in training.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        num_items = len(dataset.item_ids)
        buyers, items = training_purchases(dataset)
        self.counts = np.bincount(items, minlength=num_items)
        pairs = np.unique(buyers * num_items + items)
        self.users = np.bincount(pairs % num_items, minlength=num_items)

    @functools.cached_property
    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct words of each item's text, ascending numbers, flat: starts [I+1] and words."""
        tokenizer = BM25Tokenizer()
        numbers: dict[str, int] = {}
        rows = [
            sorted({numbers.setdefault(word, len(numbers)) for word in tokenizer(text)}) for text in self._dataset.texts
        ]
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        return starts, np.fromiter((word for row in rows for word in row), np.int64, starts[-1])


def beyond_hits(places: Places, rows: np.ndarray, catalogue: Catalogue, k: int) -> dict[str, float | None]:
    """The numbers of one ranking.

    Args:
      places: of the ranking.
      rows: of the evaluated users, those who count.
      catalogue: of the dataset.
      k: items of a list that are looked at, at most `places.TOP`.

    Returns:
      "coverage", "popularity", "popularity_lift", "novelty", "diversity"; None where no list has what it needs.
    """
    top = top_of(places, rows[places.listed[rows]], k)
    items = top[top >= 0]
    if not len(items):
        return dict.fromkeys(("coverage", "popularity", "popularity_lift", "novelty", "diversity"))
    counts = catalogue.counts.astype(np.float64)
    usual = float(counts @ counts / counts.sum()) if counts.any() else 0.0
    popularity = float(counts[items].mean())
    num_users = max(1, len(catalogue._dataset.user_ids))
    novelty = -np.log2(np.maximum(catalogue.users[items], 1) / num_users)
    return {
        "coverage": len(np.unique(items)) / len(counts),
        "popularity": popularity,
        "popularity_lift": popularity / usual if usual else None,
        "novelty": float(novelty.mean()),
        "diversity": _diversity(top, catalogue),
    }


def _diversity(top: np.ndarray, catalogue: Catalogue) -> float | None:
    """Mean over lists of two items or more of the mean distance of their pairs."""
    per_list = np.empty(len(top))
    _mean_distances(np.ascontiguousarray(top), *catalogue.words, per_list)
    known = ~np.isnan(per_list)
    return float(per_list[known].mean()) if known.any() else None


@compiled
def _mean_distances(top, starts, words, out):  # pragma: no cover (compiled)
    for row in range(len(top)):
        total = 0.0
        pairs = 0
        for one in range(top.shape[1]):
            for two in range(one):
                first, second = top[row, one], top[row, two]
                if first < 0 or second < 0:
                    continue
                a, b = starts[first], starts[second]
                both = 0
                while a < starts[first + 1] and b < starts[second + 1]:
                    if words[a] == words[b]:
                        both += 1
                        a += 1
                        b += 1
                    elif words[a] < words[b]:
                        a += 1
                    else:
                        b += 1
                either = starts[first + 1] - starts[first] + starts[second + 1] - starts[second] - both
                total += 1.0 - both / either if either else 0.0
                pairs += 1
        out[row] = total / pairs if pairs else np.nan
