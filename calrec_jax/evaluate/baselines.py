r"""Rankings that need no training: what a model has to beat, scored block by block.

Notable: they are sources of `calrec_jax.rank.sources`, counted over the histories of the evaluated split. BM25 is
bm25s' default; the "reference" text is what published numbers on the public cuts were made with (present values of the
attributes, lower case, `\w+`), "ranking" is the text and the tokenizer of the project's own ranking step.
"""

import functools
from collections.abc import Mapping, Sequence

from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.metrics import TargetRanks, target_ranks
from calrec_jax.rank.bm25 import BM25Index, BM25Tokenizer
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.run import FROM_HISTORIES, from_histories
from calrec_jax.rank.sources import LastItemRemoved, Source

REMOVED = "_removed"
BASELINES = (*FROM_HISTORIES, *(name + REMOVED for name in FROM_HISTORIES))
BM25_TEXTS = ("reference", "ranking")
_SCORES_A_BLOCK = 2**21


def baseline_sources(
    names: Sequence[str], dataset: Dataset, histories: Histories, bm25_text: str = "reference"
) -> Mapping[str, Source]:
    """Makes the named baselines.

    Args:
      names: out of `BASELINES`; "…_removed" has the user's last item at the bottom.
      dataset: whose catalogue they rank.
      histories: of the split.
      bm25_text: "reference" or "ranking", see above.

    Raises:
      CalrecError: a name or `bm25_text` is unknown.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown or len(set(names)) != len(names):
        raise CalrecError(f"evaluate.baselines is {list(names)}: choose from {list(BASELINES)}, each at most once")
    if bm25_text not in BM25_TEXTS:
        raise CalrecError(f"evaluate.bm25_text is {bm25_text!r}: choose one of {list(BM25_TEXTS)}")

    texts = dataset.texts
    tokenizer = BM25Tokenizer()
    if bm25_text == "reference":
        rows = zip(*dataset.attributes.values(), strict=True)
        texts = [" ".join(value for value in row if value) for row in rows]
        tokenizer = BM25Tokenizer("lower", strip_accents=False, fields=())

    @functools.cache
    def index() -> BM25Index:
        return BM25Index(texts, tokenizer)

    def make(name: str) -> Source:
        source = from_histories(name.removesuffix(REMOVED), histories, texts, index)
        return LastItemRemoved(source, histories) if name.endswith(REMOVED) else source

    return {name: make(name) for name in names}


def source_ranks(source: Source, histories: Histories) -> TargetRanks:
    """Ranks of the targets in a source's scores of the whole catalogue, block by block."""
    everyone = histories.users
    ranks = TargetRanks.misses(len(histories.targets), histories.num_items)
    block = max(1, _SCORES_A_BLOCK // histories.num_items)
    for at in range(0, len(everyone), block):
        users = everyone[at : at + block]
        scores = source.scores(users)
        part = target_ranks(histories.targets[users], scores.primary, scores.secondary)
        ranks.n_greater[users] = part.n_greater
        ranks.n_equal[users] = part.n_equal
        ranks.found[users] = part.found
    return ranks
