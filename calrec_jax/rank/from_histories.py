"""Sources that need histories alone, by name: baselines of every report, and sources to rank, fill and fuse with."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from calrec_jax.rank import counts, history_texts, item_models
from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.sources import Source

FROM_HISTORIES = (
    "popularity",
    "recent_popularity",
    "last_item",
    "transitions",
    "bm25_last",
    "bm25_history",
    "blend",
    "item_knn",
    "ease",
)
_CONFIGS: dict[str, Callable[[], Any]] = {
    "recent_popularity": counts.RecentPopularityConfig,
    "bm25_history": history_texts.BM25OfHistoryConfig,
    "item_knn": item_models.ItemKNNConfig,
    "ease": item_models.EASEConfig,
}


def source_settings(name: str) -> dict[str, Any]:
    """The settings that gin gives a source, for a manifest; empty for one that has none."""
    return dataclasses.asdict(_CONFIGS[name]()) if name in _CONFIGS else {}


def from_histories(name: str, histories: Histories, texts: Sequence[str], index: Callable[[], BM25Index]) -> Source:
    """One of `FROM_HISTORIES`.

    Args:
      name: of the source.
      histories: of the split.
      texts: [I] what BM25 reads.
      index: called for the BM25 index of `texts` where it is needed.

    Raises:
      CalrecError: a setting of the source is not valid, or the catalogue is too large for it.
    """
    if name == "bm25_last":
        return history_texts.BM25OfLast(histories, index(), texts)
    if name == "bm25_history":
        return history_texts.BM25OfHistory(histories, index(), texts, history_texts.BM25OfHistoryConfig())
    if name == "blend":
        return history_texts.Blend(histories, history_texts.BM25OfLast(histories, index(), texts))
    if name == "recent_popularity":
        return counts.RecentPopularity(histories, counts.RecentPopularityConfig())
    if name == "item_knn":
        return item_models.ItemKNN(histories, item_models.ItemKNNConfig())
    if name == "ease":
        return item_models.EASE(histories, item_models.EASEConfig())
    plain: dict[str, Callable[[Histories], Source]] = {
        "popularity": counts.Popularity,
        "last_item": counts.LastItem,
        "transitions": counts.FirstOrderTransitions,
    }
    return plain[name](histories)
