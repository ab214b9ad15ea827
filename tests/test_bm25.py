"""The BM25 layer: its tokens, bm25s' own scores bit for bit, empty queries, and the index on disk."""

import mmap

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.data.templates import Template
from calrec_jax.errors import CalrecError
from calrec_jax.rank import pruning
from calrec_jax.rank.bm25 import BM25Index, BM25Tokenizer

TEXTS = [
    Template().item_text({"title": "Brand New Title: A 5 x 10 cm Mask", "category": "Price Tags", "brand": "Category"}),
    Template().item_text({"title": "Wire rope, 10 m", "brand": "Unknown Pleasures"}),
    Template().item_text({"title": "Gorilla™ Glue Straße ﬁx", "category": "Glue", "brand": "Café", "price": "$3.50"}),
    Template().item_text({}),
]


def test_field_words_go_by_their_place_and_the_same_words_in_values_stay():
    tokenizer = BM25Tokenizer()
    assert tokenizer(TEXTS[0]) == [
        "brand",
        "new",
        "title",
        "a",
        "5",
        "x",
        "10",
        "cm",
        "mask",
        "price",
        "tags",
        "category",
    ]
    assert tokenizer(TEXTS[1]) == ["wire", "rope", "10", "m", "unknown", "pleasures"]
    assert tokenizer(TEXTS[2]) == ["gorilla", "glue", "strasse", "fix", "glue", "café", "3", "50"]
    assert tokenizer(TEXTS[3]) == []
    assert tokenizer("title category brand price unknown") == ["title", "category", "brand", "price", "unknown"]


def test_only_the_first_field_word_of_a_name_is_the_templates():
    assert BM25Tokenizer()("Title: Box. Brand: Acme. Brand: B.") == ["box", "acme", "brand", "b"]


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),
    [
        (BM25Tokenizer(), "café 5 ½".replace("½", "1 2").split()),
        (BM25Tokenizer(strip_accents=True), ["cafe", "5", "1", "2"]),
        (BM25Tokenizer("lower"), ["café", "５", "½"]),
    ],
    ids=["nfkc", "strip_accents", "lower"],
)
def test_normalizations(tokenizer, tokens):
    assert tokenizer("CAFÉ ５ ½") == tokens


def test_a_wrong_normalization_is_named():
    with pytest.raises(CalrecError, match="normalization is 'nfd'"):
        BM25Tokenizer("nfd")


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=60))
def test_tokens_are_the_same_when_made_again_and_have_no_space(text):
    tokenizer = BM25Tokenizer()
    tokens = tokenizer(text)
    assert tokenizer(" ".join(["", *tokens])) == tokens
    assert all(token and not token.isspace() for token in tokens)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_bm25s_bit_for_bit(seed):
    rng = np.random.default_rng(seed)
    words = [f"w{number}" for number in range(40)]
    texts = [" ".join(rng.choice(words[:30], rng.integers(0, 12))) for _ in range(50)]
    queries = [" ".join(rng.choice(words, rng.integers(1, 15))) for _ in range(30)]
    index = BM25Index(texts)
    theirs = bm25s.BM25()
    theirs.index([text.split() for text in texts], show_progress=False)
    expected = np.stack([theirs.get_scores(query.split()) for query in queries])
    np.testing.assert_array_equal(index.scores(queries), expected)
    own = np.stack([index.bm25s.get_scores(query.split()) for query in queries])
    np.testing.assert_array_equal(index.scores(queries), own)


def test_empty_and_unmatched_queries_score_zero_everywhere():
    index = BM25Index(TEXTS)
    scores = index.scores(["", "zzz", "...", TEXTS[3]])
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, np.zeros((4, 4)))
    assert index.scores([]).shape == (0, 4)


def test_a_catalogue_without_words_is_refused():
    with pytest.raises(CalrecError, match="none of the 2 texts"):
        BM25Index([TEXTS[3], ""])


def test_a_saved_index_gives_the_same_scores_with_its_own_tokenizer(tmp_path):
    index = BM25Index(TEXTS, BM25Tokenizer(strip_accents=True))
    index.save(tmp_path / "bm25", "d")
    loaded = BM25Index.load(tmp_path / "bm25", "d")
    assert loaded.tokenizer == index.tokenizer
    np.testing.assert_array_equal(loaded.scores(["cafe glue", "Title: 10."]), index.scores(["café glue", "Title: 10."]))
    for own, theirs in zip(loaded.best(["cafe glue"], 2), index.best(["café glue"], 2), strict=True):
        np.testing.assert_array_equal(own, theirs)
    for name in ("data", "items", "starts", "row_starts", "row_words", "row_data", "common"):
        owner = getattr(loaded._postings, name)
        while isinstance(owner, np.ndarray) and owner.base is not None:
            owner = owner.base
        assert isinstance(owner, mmap.mmap), name  # shared, not copied


def test_a_damaged_index_is_named(tmp_path):
    BM25Index(TEXTS).save(tmp_path / "bm25", "d")
    with pytest.raises(CalrecError, match="indexes another dataset"):
        BM25Index.load(tmp_path / "bm25", "e")
    path = tmp_path / "bm25" / "row_data.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CalrecError, match=r"row_data\.npy"):
        BM25Index.load(tmp_path / "bm25", "d")
    path.unlink()
    with pytest.raises(CalrecError, match=r"row_data\.npy"):
        BM25Index.load(tmp_path / "bm25", "d", check=False)
    with pytest.raises(CalrecError, match="bm25_index .* is not complete"):
        BM25Index.load(tmp_path, "d")


def expected_best(scores, k):
    """By sorting all scores: positive ones that are not below the k-th, ties in the order of the catalogue."""
    limit = np.sort(scores)[::-1][min(k, len(scores)) - 1]
    items = np.flatnonzero((scores > 0) & (scores >= limit))
    items = items[np.argsort(-scores[items], kind="stable")]
    return items, scores[items]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 400), st.booleans())
def test_the_best_items_are_those_of_all_scores(seed, num_items, k, everywhere):
    rng = np.random.default_rng(seed)
    words = np.array([f"w{number}" for number in range(rng.integers(2, 120))])
    share = (np.arange(len(words)) + 1.0) ** -rng.uniform(0, 2)
    share /= share.sum()
    first = ["all all"] if everywhere else []
    texts = [" ".join([*first, *rng.choice(words, rng.integers(0, 12), p=share)]) for _ in range(num_items)]
    texts[0] = "w0"
    queries = [" ".join(rng.choice([*words, "all", "new"], rng.integers(0, 20))) for _ in range(20)] + ["all", ""]
    index = BM25Index(texts)
    scores = index.scores(queries)
    tokens, starts = index._words(queries)
    for pruned in (True, False):
        items, values, ends = pruning.best_items(
            index._postings, tokens.astype(np.uint32), starts, min(k, num_items), pruned
        )
        for row, own in enumerate(scores):
            expected, theirs = expected_best(own, k)
            np.testing.assert_array_equal(items[ends[row] : ends[row + 1]], expected)
            np.testing.assert_array_equal(values[ends[row] : ends[row + 1]], theirs)
    np.testing.assert_array_equal(index.lowest(queries), scores.min(axis=1))


@pytest.mark.parametrize("k", [1, 10, 500])
def test_the_best_items_of_a_catalogue_with_frequent_words(k):
    """Large enough that words are left unread, items dropped by their bytes and leaders scored between."""
    rng = np.random.default_rng(k)
    texts = ["all " + " ".join(f"w{int(x)}" for x in rng.zipf(1.3, 12) % 5000) for _ in range(20_000)]
    for row in range(0, 20_000, 50):
        texts[row] = texts[row + 1]  # ties
    queries = [f"{texts[a]} {texts[b]}" for a, b in rng.integers(0, len(texts), (40, 2))]
    index = BM25Index(texts)
    items, values, ends = index.best(queries, k)
    for row, own in enumerate(index.scores(queries)):
        expected, theirs = expected_best(own, k)
        np.testing.assert_array_equal(items[ends[row] : ends[row + 1]], expected)
        np.testing.assert_array_equal(values[ends[row] : ends[row + 1]], theirs)
    np.testing.assert_array_equal(index.lowest(queries), index.scores(queries).min(axis=1))


def test_no_best_item_is_an_error():
    with pytest.raises(CalrecError, match="must be at least 1"):
        BM25Index(TEXTS).best(["glue"], 0)


def test_the_vocabulary_is_sorted_so_that_the_index_does_not_depend_on_pythons_string_hash():
    vocabulary = BM25Index(TEXTS).bm25s.vocab_dict
    assert list(vocabulary) == sorted(vocabulary) and list(vocabulary.values()) == list(range(len(vocabulary)))
