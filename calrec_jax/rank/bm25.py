"""BM25 of any text against the catalogue: a deterministic layer over bm25s.

Notable: one tokenizer serves the catalogue and the queries, and is saved with the index. The template's field words
(`Title:`, …) and its word for an absent value are taken out by their place in the sentence, so that the same words
in a title still count. The vocabulary is sorted (bm25s orders it by Python's string hash, which changes from process
to process), and a query without any known token scores zero on every item: everything ties, nothing is raised.

The scores are bm25s' own, bit for bit: its index is read as it is, and a compiled loop adds the same float32 numbers
in the same order as `bm25s.BM25.get_scores`.
"""

import dataclasses
import functools
import logging
import pathlib
import re
import unicodedata
from collections.abc import Sequence

import bm25s
import gin
import numpy as np

from calrec_jax import artifacts
from calrec_jax.compiled import compiled
from calrec_jax.data import templates
from calrec_jax.errors import CalrecError
from calrec_jax.rank import pruning

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it reports every index at DEBUG, whatever the root's level

_TOKEN = re.compile(r"\w+")
# NFKC would write these as letters and glue them to the word before: Gorilla™ → gorillatm.
_MARKS = str.maketrans({"™": " ", "℠": " "})
NORMALIZATIONS = ("nfkc", "lower")
KIND = "bm25_index"
_ROWS = ("most", "row_starts", "row_words", "row_data", "common_of", "common_scale", "common")  # beside bm25s' own
_MOST_WORST = 4096
_MOST_WORST_HELD = 1000  # 50 MB


@gin.configurable
@dataclasses.dataclass(frozen=True)
class BM25Tokenizer:
    """Splits a text into the words BM25 counts: runs of letters, digits and underscores, single characters included.

    Attributes:
      normalization: "nfkc" (compatibility forms folded, trade marks dropped, case folded) or "lower" (lower case
        only, the tokenization of published baselines).
      strip_accents: whether combining marks are removed (café → cafe).
      fields: the template's field words, those of `Template()` when None; each is dropped once, where it opens a
        sentence and a colon follows.
      absent: the template's word for an absent value, dropped where it is a field's whole value.

    Raises:
      CalrecError: `normalization` is not one of the above.
    """

    normalization: str = "nfkc"
    strip_accents: bool = False
    fields: tuple[str, ...] | None = None
    absent: str = templates.UNKNOWN

    def __post_init__(self) -> None:
        fields = templates.Template().field_names if self.fields is None else self.fields
        object.__setattr__(self, "fields", tuple(fields))  # gin and JSON give lists
        if self.normalization not in NORMALIZATIONS:
            raise CalrecError(
                f"BM25Tokenizer.normalization is {self.normalization!r}: choose one of {list(NORMALIZATIONS)}"
            )

    @functools.cached_property
    def _field(self) -> re.Pattern[str]:
        names = "|".join(map(re.escape, self.fields or ())) or r"(?!)"
        whole_value = rf"(?:{re.escape(self.absent)}(?=\.(?: (?:{names}):|\s*$)))?" if self.absent else ""
        return re.compile(rf"(?:^\s*|(?<=\. ))(?P<name>{names}): {whole_value}")

    def strip_fields(self, text: str) -> str:
        """The text without the template's own words: the first of each field word that opens a sentence."""
        seen: set[str] = set()

        def drop_first(match: re.Match[str]) -> str:
            if match["name"] in seen:
                return match[0]
            seen.add(match["name"])
            return ""

        return self._field.sub(drop_first, text)

    def __call__(self, text: str) -> list[str]:
        """The tokens of a text, in order, repeats kept; an empty list for a text without any."""
        text = self.strip_fields(text)
        if self.normalization == "nfkc":
            text = unicodedata.normalize("NFKC", text.translate(_MARKS)).casefold()
            text = unicodedata.normalize("NFKC", text)  # case folding may undo the composition
        else:
            text = text.lower()
        if self.strip_accents:
            decomposed = unicodedata.normalize("NFD", text)
            text = "".join(character for character in decomposed if not unicodedata.combining(character))
        return _TOKEN.findall(text)


@compiled
def _add_token_scores(data, indices, indptr, tokens, starts, scores):  # pragma: no cover (compiled)
    for row in range(len(starts) - 1):
        for position in range(starts[row], starts[row + 1]):
            token = tokens[position]
            for entry in range(indptr[token], indptr[token + 1]):
                scores[row, indices[entry]] += data[entry]


class BM25Index:
    """The catalogue's BM25 index.

    Attributes:
      tokenizer: what made the tokens of the catalogue and makes those of the queries.
      num_items: I, the number of indexed texts.
    """

    def __init__(self, texts: Sequence[str], tokenizer: BM25Tokenizer | None = None):
        """Indexes the catalogue's texts with bm25s' defaults (Lucene's BM25, k1 = 1.5, b = 0.75, float32).

        Args:
          texts: [I] texts; a text without tokens never matches.
          tokenizer: default `BM25Tokenizer()`.

        Raises:
          CalrecError: no text has a token.
        """
        tokenizer = tokenizer or BM25Tokenizer()
        tokens = [tokenizer(text) for text in texts]
        vocabulary = {token: row for row, token in enumerate(sorted({token for words in tokens for token in words}))}
        if not vocabulary:
            raise CalrecError(
                f"none of the {len(tokens)} texts of the catalogue has a word that BM25 could index; correct what "
                "Template.attributes and the columns of the items name, and prepare again"
            )
        ids = [[vocabulary[token] for token in words] for words in tokens]
        index = bm25s.BM25()
        index.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        self._adopt(index, tokenizer)

    def _adopt(self, index: bm25s.BM25, tokenizer: BM25Tokenizer) -> None:
        self.bm25s = index
        self.tokenizer = tokenizer
        self.num_items = int(index.scores["num_docs"])
        self._data = np.ascontiguousarray(index.scores["data"], np.float32)
        self._indices = np.ascontiguousarray(index.scores["indices"], np.int32)
        self._indptr = np.ascontiguousarray(index.scores["indptr"], np.int64)
        self._worst: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    @property
    def without_words(self) -> np.ndarray:
        """Items whose text has no token, ascending: no text finds them."""
        return np.flatnonzero(np.bincount(self._indices, minlength=self.num_items) == 0)

    def token_ids(self, text: str) -> list[int]:
        """The text's tokens as rows of the vocabulary; unknown tokens are left out, repeats are kept."""
        vocabulary = self.bm25s.vocab_dict
        return [vocabulary[token] for token in self.tokenizer(text) if token in vocabulary]

    def _words(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all texts, flat, and where each text's begin: int64."""
        ids = [self.token_ids(text) for text in texts]
        starts = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([len(row) for row in ids], out=starts[1:])
        return np.fromiter((token for row in ids for token in row), np.int64, starts[-1]), starts

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Scores each text against every item.

        Args:
          texts: [N] texts; one that is empty or shares no token with the catalogue scores zero everywhere.

        Returns:
          [N, I] float32, equal to `bm25s.BM25.get_scores` of the same tokens.
        """
        tokens, starts = self._words(texts)
        scores = np.zeros((len(texts), self.num_items), np.float32)
        _add_token_scores(self._data, self._indices, self._indptr, tokens, starts, scores)
        return scores

    @functools.cached_property
    def _postings(self) -> pruning.Postings:
        return pruning.Postings.of(self._data, self._indices, self._indptr, self.num_items)

    def best(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best items of each text, without scoring the whole catalogue, and exactly those that `scores` gives.

        Args:
          texts: [N].
          k: how many; 1 or more. A k above the number of matching items gives these.

        Returns:
          items: int32, for each text every item whose score is positive and not below its k-th best: best first, ties
          in the order of the catalogue, those with the k-th all there. A text that matches nothing has none. scores:
          float32, as `scores` has them. ends: [N + 1] int64, text n's items are `[ends[n], ends[n + 1])`.

        Raises:
          CalrecError: k is below 1.
        """
        if k < 1:
            raise CalrecError(f"the number of best items is {k}: it must be at least 1")
        words, starts = self._words(texts)
        return pruning.best_items(
            self._postings, words.astype(np.uint32), starts, min(k, self.num_items), k <= pruning.MOST_PRUNED
        )

    def lowest(self, texts: Sequence[str]) -> np.ndarray:
        """[N] float32: the least score that each text gives any item; above 0 where every item has one of its words."""
        least = np.empty(len(texts), np.float32)
        slot_of = np.full(len(self._indptr) - 1, -1, np.int32)
        for row, text in enumerate(texts):
            words = np.array(self.token_ids(text), np.uint32)
            items, bounds = self._worst_items(tuple(word for word in words.tolist() if word in self._everywhere))
            least[row] = pruning.lowest_score(self._postings, words, items, bounds, slot_of)
            if least[row] < 0:
                least[row] = self.scores([text])[0].min()
        return least

    @functools.cached_property
    def _everywhere(self) -> frozenset[int]:
        """The words that all items have."""
        return frozenset(np.flatnonzero(np.diff(self._indptr) == self.num_items).tolist())

    def _worst_items(self, everywhere: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Items that might have the least score, and bounds of it (`pruning.lowest_score`).

        Words that all items have, in the text's order, decide who is last; without any, items with few words are
        likely to score 0. A float32 sum of positive numbers never falls when numbers are put between, so the bounds
        hold to the last bit.
        """
        if everywhere not in self._worst:
            bounds = np.zeros(self.num_items, np.float32)
            for word in everywhere:
                own = slice(self._indptr[word], self._indptr[word + 1])
                bounds[self._indices[own]] += self._data[own]
            by = bounds if everywhere else np.diff(self._postings.row_starts.view(np.int64))
            some = np.argpartition(by, min(_MOST_WORST, self.num_items) - 1)[:_MOST_WORST]
            some = some[np.argsort(by[some], kind="stable")]
            if len(self._worst) == _MOST_WORST_HELD:
                self._worst.clear()
            self._worst[everywhere] = some, bounds[some]
        return self._worst[everywhere]

    def save(self, folder: pathlib.Path, dataset_hash: str) -> None:
        """Writes the index: bm25s' own files, the rows of items, the tokenizer's settings and a manifest.

        Args:
          folder: must not exist; it appears as a whole.
          dataset_hash: of the dataset whose texts are indexed.

        Raises:
          CalrecError: the folder exists or cannot be written.
        """
        settings = dataclasses.asdict(self.tokenizer)
        with artifacts.atomic_folder(folder) as temporary:
            self.bm25s.save(temporary, corpus=None, show_progress=False)
            for name in _ROWS:
                np.save(temporary / f"{name}.npy", getattr(self._postings, name))
            artifacts.write_json(temporary / "tokenizer.json", settings)
            artifacts.write_manifest(
                temporary,
                kind=KIND,
                made_from={"dataset": dataset_hash},
                settings=settings,
                items=self.num_items,
                files=artifacts.hash_files(sorted(path for path in temporary.iterdir())),
            )

    @classmethod
    def load(cls, folder: pathlib.Path, dataset_hash: str, *, check: bool = True) -> "BM25Index":
        """Reads what `save` wrote, memory-mapped, so that processes share one copy of all but the vocabulary.

        Args:
          folder: of the index.
          dataset_hash: of the dataset that is to be searched.
          check: whether to compare the files with the hashes in the manifest; one of several processes is enough.

        Raises:
          CalrecError: the folder holds no index, a damaged one (the file is named), or another dataset's.
        """
        folder = pathlib.Path(folder)
        manifest = artifacts.read_manifest(folder, kind=KIND)
        if manifest["made_from"].get("dataset") != dataset_hash:
            raise CalrecError(f"{folder} indexes another dataset than the one to search; delete it and make it again")
        if check:
            artifacts.check_files(folder, manifest)
        try:
            tokenizer = BM25Tokenizer(**artifacts.read_json(folder / "tokenizer.json"))
            index = bm25s.BM25.load(folder, load_corpus=False, mmap=True)
            rows = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ROWS}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CalrecError(f"{folder} is not a BM25 index ({error}); delete it and make it again") from error
        self = cls.__new__(cls)
        self._adopt(index, tokenizer)
        self._postings = pruning.Postings(self._data, self._indices, self._indptr, **rows).frozen()
        return self
