"""Quasi-round-robin BM25 and the order of a ranking, against slow and obvious references in float64."""

import math

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_data import completion_rows, make_dataset

from calrec_jax.errors import CalrecError
from calrec_jax.rank.bm25 import BM25Index, BM25Tokenizer
from calrec_jax.rank.ordering import Scores, dense_ranks, order, written_scores
from calrec_jax.rank.round_robin import RoundRobin, round_robin_scores
from calrec_jax.rank.user_texts import UserTexts


def reference(catalogue, texts, log_probs, num_tokens, epsilon, score):
    """Paper, section "Inference", steps 1 to 4, for one user: the score and the first-choice count of each item."""
    tokenizer = BM25Tokenizer()
    index = bm25s.BM25()
    index.index([tokenizer(text) for text in catalogue], show_progress=False)
    values = [p / n if score == "mean" else p for p, n in zip(log_probs, num_tokens, strict=True)]
    best = {}
    for text, value in zip(texts, values, strict=True):
        best[text] = max(value, best.get(text, -math.inf))
    item_scores, counts = np.zeros(len(catalogue)), np.zeros(len(catalogue))
    for text, value in best.items():
        tokens = [token for token in tokenizer(text) if token in index.vocab_dict]
        if not tokens:
            continue
        b = index.get_scores(tokens).astype(np.float64)
        if b.max() == b.min():
            continue
        b = (b - b.min()) / (b.max() - b.min())
        item_scores = np.maximum(item_scores, math.exp(epsilon * value) * b)
        counts += b == 1.0
    return item_scores, counts


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", num_users=20)


def columns(rows):
    return tuple([row[name] for row in rows] for name in ("texts", "log_probs", "num_tokens"))


@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("epsilon", [1 / 5000, 0.3, 0.0])
def test_scores_are_the_references(dataset, score, epsilon):
    texts, log_probs, num_tokens = columns(completion_rows(dataset, num_texts=9, seed=3))
    index = BM25Index(dataset.texts)
    scores = round_robin_scores(index, texts, log_probs, num_tokens, epsilon=epsilon, score=score)
    for user in range(len(texts)):
        expected, counts = reference(dataset.texts, texts[user], log_probs[user], num_tokens[user], epsilon, score)
        np.testing.assert_allclose(scores.primary[user], expected, rtol=1e-12, atol=0, err_msg=f"user {user}")
        np.testing.assert_array_equal(scores.secondary[user], counts, err_msg=f"user {user}")
        by = sorted(range(len(expected)), key=lambda item: (-scores.primary[user, item], -counts[item], item))
        assert order(scores).items[user].tolist() == by


def test_sources_name_the_completion_that_gave_the_score(dataset):
    texts, log_probs, num_tokens = columns(completion_rows(dataset, num_texts=9, seed=4))
    index = BM25Index(dataset.texts)
    scores = round_robin_scores(index, texts, log_probs, num_tokens, epsilon=0.1)
    for user in range(len(texts)):
        alone = [
            reference(dataset.texts, [text], [p], [1], 0.1, "sum")[0]
            for text, p in zip(texts[user], log_probs[user], strict=True)
        ]
        for item, source in enumerate(scores.sources[user]):
            if source < 0:
                assert scores.primary[user, item] == 0
            else:
                assert alone[source][item] == pytest.approx(scores.primary[user, item], rel=1e-12)


def test_repeated_texts_count_once_with_their_best_score(dataset):
    text, other = dataset.texts[0], dataset.texts[7]
    own = UserTexts.of([[text, other, text, text], []], [[-9.0, -5.0, -1.0, -4.0], []])
    assert [own.texts[code] for code in own.codes] == [text, other]
    assert own.scores.tolist() == [-1.0, -5.0] and own.completions.tolist() == [2, 1]
    assert own.starts.tolist() == [0, 2, 2]


def test_texts_that_match_nothing_leave_all_items_tied(dataset):
    scores = round_robin_scores(BM25Index(dataset.texts), [["zzz", ""], []], [[-1.0, -2.0], []])
    assert not scores.primary.any() and (scores.sources == -1).all()
    lists = order(scores, 5)
    assert lists.items.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert (lists.scores == 0).all() and lists.ties_beyond_depth.tolist() == [len(dataset.texts) - 5] * 2


@pytest.mark.parametrize("bank_bytes", [0, 4 * 17 * 12, 2**20], ids=["one user at a time", "evicting", "all fit"])
def test_a_small_bank_gives_the_same_scores(dataset, bank_bytes):
    texts, log_probs, _ = columns(completion_rows(dataset, num_texts=7, seed=5))
    index = BM25Index(dataset.texts)
    expected = round_robin_scores(index, texts, log_probs)
    own = UserTexts.of(texts, log_probs)
    ranked = RoundRobin(index, own, bank_bytes=bank_bytes)
    blocks = [ranked.scores(np.arange(at, min(at + 3, len(texts)))) for at in range(0, len(texts), 3)]
    np.testing.assert_array_equal(np.concatenate([block.primary for block in blocks]), expected.primary)
    np.testing.assert_array_equal(np.concatenate([block.sources for block in blocks]), expected.sources)
    if bank_bytes == 2**20:
        assert ranked.bank.num_scored == len(own.texts) < len(own.codes)


def test_bad_settings_and_log_probs_are_named(dataset):
    index = BM25Index(dataset.texts)
    with pytest.raises(CalrecError, match="score is 'product'"):
        round_robin_scores(index, [["a"]], [[-1.0]], score="product")
    with pytest.raises(CalrecError, match="no num_tokens"):
        round_robin_scores(index, [["a"]], [[-1.0]], score="mean")
    with pytest.raises(CalrecError, match="1 log_probs of the completions are NaN"):
        round_robin_scores(index, [["a", "b"]], [[-1.0, math.nan]])
    with pytest.raises(CalrecError, match=r"epsilon is -1\.0"):
        round_robin_scores(index, [["a"]], [[-1.0]], epsilon=-1.0)


KEYS = st.lists(
    st.tuples(
        st.sampled_from([-np.inf, -1e9, -1.0, 0.0, 1e-300, 0.5, 0.5 + 1e-12, 1.0]), st.sampled_from([0.0, 1.0, 2.0])
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=200)
@given(KEYS, st.integers(1, 12))
def test_an_order_follows_both_keys_and_equal_float32_means_tied(keys, depth):
    keys = [(first, 0.0 if first == -np.inf else second) for first, second in keys]
    primary, secondary = (np.array(column)[None] for column in zip(*keys, strict=True))
    lists = order(Scores(primary, secondary), depth)
    by = sorted(range(len(keys)), key=lambda item: (-keys[item][0], -keys[item][1], item))
    assert lists.items[0].tolist() == by[:depth]
    written = written_scores(Scores(primary, secondary))[0]
    for a in range(len(keys)):
        for b in range(len(keys)):
            assert (written[a] > written[b]) == (keys[a] > keys[b])
    cut = by[:depth][-1]
    assert lists.ties_beyond_depth[0] == sum(keys[item] == keys[cut] for item in by[depth:])
    ranks = dense_ranks(Scores(primary, secondary))[0]
    assert all((ranks[a] > ranks[b]) == (keys[a] > keys[b]) for a in range(len(keys)) for b in range(len(keys)))
    normal = np.abs(written[np.isfinite(written) & (written != 0)])
    assert (normal >= np.finfo(np.float32).tiny).all()


def test_scores_that_are_not_numbers_have_no_order():
    with pytest.raises(ValueError, match="NaN"):
        order(Scores(np.array([[0.0, np.nan]])))


def test_items_left_out_are_tied_at_the_bottom():
    scores = Scores(np.array([[3.0, 2.0, 1.0]]), np.array([[0.0, 1.0, 2.0]]), np.array([[0, 1, 2]], np.int16))
    lists = order(scores.leave_out(np.array([0, 0]), np.array([0, 1])))
    assert lists.items.tolist() == [[2, 0, 1]] and lists.sources.tolist() == [[2, -1, -1]]
    assert lists.scores.tolist() == [[1.0, -np.inf, -np.inf]]
