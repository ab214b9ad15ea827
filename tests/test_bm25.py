"""The BM25 layer: its tokens, bm25s' own scores bit for bit, empty queries, and the index on disk."""

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.data.templates import Template
from calrec_jax.errors import CalrecError
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


@pytest.mark.parametrize("mmap", [True, False])
def test_a_saved_index_gives_the_same_scores_with_its_own_tokenizer(tmp_path, mmap):
    index = BM25Index(TEXTS, BM25Tokenizer(strip_accents=True))
    index.save(tmp_path / "bm25", "hash")
    loaded = BM25Index.load(tmp_path / "bm25", "hash", mmap=mmap)
    assert loaded.tokenizer == index.tokenizer
    np.testing.assert_array_equal(loaded.scores(["cafe glue", "Title: 10."]), index.scores(["café glue", "Title: 10."]))
    for one, other in zip(loaded.best(["cafe glue 10"], 2), index.best(["cafe glue 10"], 2), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_damaged_or_foreign_index_is_named_with_the_way_out(tmp_path):
    BM25Index(TEXTS).save(tmp_path / "bm25", "hash")
    with pytest.raises(CalrecError, match="bm25 indexes another dataset than the one to search; delete it"):
        BM25Index.load(tmp_path / "bm25", "other")
    (tmp_path / "bm25" / "indices.csc.index.npy").write_bytes(b"junk")
    with pytest.raises(CalrecError, match=r"indices\.csc\.index\.npy was changed after it was written; delete"):
        BM25Index.load(tmp_path / "bm25", "hash")
    with pytest.raises(CalrecError, match="exists but is not complete; run the step that makes it"):
        BM25Index.load(tmp_path, "hash")


def reference_best(scores, k):
    """Positive scores not below the k-th best: best first, then by place."""
    limit = np.sort(scores)[::-1][min(k, len(scores)) - 1]
    chosen = [item for item in range(len(scores)) if scores[item] > 0 and scores[item] >= limit]
    return sorted(chosen, key=lambda item: (-scores[item], item))


@pytest.mark.parametrize("k", [1, 3, 10, 400])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_items_are_those_of_all_scores_bit_for_bit(seed, k):
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, 331)  # more words than the common ones whose presence is kept as bits
    words = np.array([f"w{number}" for number in range(330)])
    drawn = [rng.choice(words, rng.integers(0, 16), p=weights / weights.sum()) for _ in range(300)]
    texts = ["root " * (seed > 0) + " ".join(row) for row in drawn]
    queries = [" ".join([*rng.choice(texts, 2), *rng.choice(words, 2)]) for _ in range(40)] + ["", "zzz", "root root"]
    index = BM25Index([*texts, "w0"])
    items, scores, ends = index.best(queries, k)
    expected = index.scores(queries)
    for row in range(len(queries)):
        own = slice(ends[row], ends[row + 1])
        assert items[own].tolist() == reference_best(expected[row], k), queries[row]
        np.testing.assert_array_equal(scores[own], expected[row][items[own]])


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.sampled_from("abcdefg"), max_size=6), min_size=1, max_size=12).filter(lambda rows: any(rows)),
    st.lists(st.sampled_from("abcdefgz"), max_size=12),
    st.integers(1, 15),
)
def test_the_best_items_hold_every_tie_of_the_last(texts, query, k):
    index = BM25Index([" ".join(row) for row in texts])
    items, _, ends = index.best([" ".join(query)], k)
    assert ends.tolist() == [0, len(items)]
    assert items.tolist() == reference_best(index.scores([" ".join(query)])[0], k)


def test_a_number_of_best_items_below_one_is_refused():
    with pytest.raises(CalrecError, match="the number of best items is 0"):
        BM25Index(TEXTS).best(["glue"], 0)


def test_the_vocabulary_is_sorted_so_that_the_index_does_not_depend_on_pythons_string_hash():
    vocabulary = BM25Index(TEXTS).bm25s.vocab_dict
    assert list(vocabulary) == sorted(vocabulary) and list(vocabulary.values()) == list(range(len(vocabulary)))
