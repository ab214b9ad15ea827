"""The grounding doctor: how well BM25 can find items at all, whatever a model writes.

Notable: it needs a dataset alone. An item that its own text does not find cannot be found by a perfect completion, so
the share of items that are found is a ceiling of Recall@1. With completions it also says how many of their texts match
nothing, or several items alike.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from calrec_jax.rank.bm25 import BM25Index

_TEXTS_A_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Grounding:
    """What self-retrieval says of a catalogue of I items; shares are of the items that have a word.

    Attributes:
      items: I.
      without_words: items whose text has no word, which BM25 cannot find.
      same_text: items that share their text with another.
      same_words: items whose text has the same words, in any order, as another's: BM25 cannot tell them apart.
      alone: share of items that their own text finds before all others.
      tied: share that is found first together with others.
      behind: share before which another item is found.
      recall_at_1: expected Recall@1 of perfect completions, ties broken at random.
    """

    items: int
    without_words: int
    same_text: int
    same_words: int
    alone: float
    tied: float
    behind: float
    recall_at_1: float


@dataclasses.dataclass(frozen=True)
class TextHealth:
    """What BM25 makes of completions; shares are of the distinct texts.

    Attributes:
      texts: completions. distinct: different ones among them.
      exact: share that is an item's text to the letter.
      no_match: share without a word of the catalogue.
      tied: share whose best match is several items with the same score.
    """

    texts: int
    distinct: int
    exact: float
    no_match: float
    tied: float


def _first_choices(index: BM25Index, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """The best items of each text: all that tie, none where nothing matches."""
    for at in range(0, len(texts), _TEXTS_A_BLOCK):
        items, _, ends = index.best(texts[at : at + _TEXTS_A_BLOCK], 1)
        yield from np.split(items, ends[1:-1])


def _shared(keys: Sequence[object]) -> int:
    """How many have a key that another has, too."""
    return sum(count for count in collections.Counter(keys).values() if count > 1)


def examine(index: BM25Index, texts: Sequence[str]) -> Grounding:
    """Looks every item up by its own text ([I] texts, those of the index)."""
    words = [tuple(sorted(index.token_ids(text))) for text in texts]
    alone = tied = 0
    expected = 0.0
    for item, first in enumerate(_first_choices(index, texts)):
        if item in first:
            alone += len(first) == 1
            tied += len(first) > 1
            expected += 1.0 / len(first)
    searched = sum(map(bool, words))
    return Grounding(
        items=len(texts),
        without_words=len(texts) - searched,
        same_text=_shared(texts),
        same_words=_shared([row for row in words if row]),
        alone=alone / searched,
        tied=tied / searched,
        behind=(searched - alone - tied) / searched,
        recall_at_1=expected / searched,
    )


def examine_texts(index: BM25Index, catalogue: Sequence[str], distinct: Sequence[str], texts: int) -> TextHealth:
    """Looks completions up.

    Args:
      index: over the catalogue.
      catalogue: [I] texts of the items.
      distinct: the different completions.
      texts: how many completions there are with repeats.
    """
    known = set(catalogue)
    sizes = np.array([len(first) for first in _first_choices(index, distinct)])
    count = max(1, len(distinct))
    return TextHealth(
        texts=texts,
        distinct=len(distinct),
        exact=sum(text in known for text in distinct) / count,
        no_match=float((sizes == 0).sum()) / count,
        tied=float((sizes > 1).sum()) / count,
    )


def report(name: str, found: Grounding) -> str:
    """The findings on a catalogue, in words."""
    return "\n".join(
        [
            f"{name}: {found.items:,} items",
            f"  {found.without_words:,} without a word in their text: BM25 never finds them",
            f"  {found.same_text:,} share their text with another item, {found.same_words:,} all of their words",
            f"  own text finds the item alone at the top {found.alone:.2%}, tied with others {found.tied:.2%}, "
            f"behind another {found.behind:.2%}",
            f"  ceiling of Recall@1 for perfect completions, ties at random: {found.recall_at_1:.4f}",
        ]
    )


def report_texts(name: str, found: TextHealth) -> str:
    """The findings on completions, in words."""
    return (
        f"completions {name}: {found.texts:,} texts, {found.distinct:,} distinct; of these {found.exact:.2%} are an "
        f"item's text, {found.no_match:.2%} match nothing, {found.tied:.2%} match several items best"
    )
