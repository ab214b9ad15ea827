r"""Rankings made from histories alone: what a model has to beat.

Notable: they are sources of `calrec_jax.rank.from_histories`, counted over the histories of the evaluated split. BM25
is bm25s' default; the "reference" text is what published numbers on the public cuts were made with (present values of
the attributes, lower case, `\w+`), "title" the same of titles alone, "ranking" the text and the tokenizer of the
project's own ranking step.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from calrec_jax.baselines import SUFFIXES, split_name
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.rank.bm25 import BM25Index, BM25Tokenizer
from calrec_jax.rank.from_histories import FROM_HISTORIES, from_histories, source_settings
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.sources import LeftOut, Source

BASELINES = tuple(name + suffix for suffix in SUFFIXES for name in FROM_HISTORIES)
BM25_TEXTS = ("reference", "title", "ranking")


def baseline_settings(names: Sequence[str]) -> dict[str, Any]:
    """The settings that gin gives the named baselines, for a manifest; a baseline without any is left out."""
    plain = dict.fromkeys(split_name(name)[0] for name in names)
    return {name: own for name in plain if (own := source_settings(name))}


def baseline_sources(
    names: Sequence[str], dataset: Dataset, histories: Histories, bm25_text: str = "reference"
) -> Mapping[str, Source]:
    """Makes the named baselines.

    Args:
      names: out of `BASELINES`; "…_removed" has the user's last item at the bottom, "…_new" the whole history.
      dataset: whose catalogue they rank.
      histories: of the split.
      bm25_text: "reference", "title" or "ranking", see above.

    Raises:
      CalrecError: a name or `bm25_text` is unknown, or a baseline's setting is not valid for this catalogue.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown or len(set(names)) != len(names):
        raise CalrecError(
            f"evaluate.baselines is {list(names)}: choose from {list(FROM_HISTORIES)}, each at most once, and "
            "once more with _removed (the last item left out of the ranking) and with _new (the whole history left out)"
        )
    if bm25_text not in BM25_TEXTS:
        raise CalrecError(f"evaluate.bm25_text is {bm25_text!r}: choose one of {list(BM25_TEXTS)}")

    texts = dataset.texts
    tokenizer = BM25Tokenizer()
    if bm25_text != "ranking":
        columns = [dataset.attributes["title"]] if bm25_text == "title" else dataset.attributes.values()
        texts = [" ".join(value for value in row if value) for row in zip(*columns, strict=True)]
        tokenizer = BM25Tokenizer("lower", strip_accents=False, fields=())

    @functools.cache
    def index() -> BM25Index:
        return BM25Index(texts, tokenizer)

    @functools.cache  # a baseline is counted once, whatever is left out of its ranking
    def counted(name: str) -> Source:
        return from_histories(name, histories, texts, index)

    return {name: LeftOut(counted(split_name(name)[0]), histories, split_name(name)[1]) for name in names}
