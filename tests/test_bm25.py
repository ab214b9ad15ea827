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
    index.save(tmp_path / "bm25")
    loaded = BM25Index.load(tmp_path / "bm25", mmap=mmap)
    assert loaded.tokenizer == index.tokenizer
    np.testing.assert_array_equal(loaded.scores(["cafe glue", "Title: 10."]), index.scores(["café glue", "Title: 10."]))


def test_a_damaged_index_is_named(tmp_path):
    BM25Index(TEXTS).save(tmp_path / "bm25")
    (tmp_path / "bm25" / "params.index.json").write_text("{")
    with pytest.raises(CalrecError, match="is not a BM25 index"):
        BM25Index.load(tmp_path / "bm25")
    with pytest.raises(CalrecError, match=r"tokenizer\.json does not exist"):
        BM25Index.load(tmp_path)


def test_the_vocabulary_is_sorted_so_that_the_index_does_not_depend_on_pythons_string_hash():
    vocabulary = BM25Index(TEXTS).bm25s.vocab_dict
    assert list(vocabulary) == sorted(vocabulary) and list(vocabulary.values()) == list(range(len(vocabulary)))
