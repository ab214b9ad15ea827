"""Metrics against their definitions, laws that hold for all of them, and the bootstrap."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.bootstrap import intervals, resampled_means
from calrec_jax.evaluate.metrics import (
    TIES,
    TargetRanks,
    metric_names,
    per_user_metrics,
    ranking_metrics,
    target_ranks,
)

CUTOFFS, NDCG = (1, 2, 5, 10), (1, 5, 10)
NAMES = metric_names(CUTOFFS, NDCG)


def at_rank(rank, depth):
    """Metrics of a target at a (possibly fractional) rank, from the definitions."""
    if rank > depth:
        return [0.0] * len(NAMES)
    recall = [float(rank <= k) for k in CUTOFFS]
    return [*recall, *(1 / math.log2(1 + rank) if rank <= k else 0.0 for k in NDCG), 1 / rank]


def reference(target, scores, ties, depth):
    greater = sum(score > scores[target] for score in scores)
    equal = sum(score == scores[target] for score in scores) - 1
    places = range(greater + 1, greater + equal + 2)
    if ties == "expected":
        return np.mean([at_rank(place, depth) for place in places], axis=0)
    return at_rank({"optimistic": min, "pessimistic": max, "mean_rank": np.mean}[ties](places), depth)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("depth", [14, 6, 1])
def test_metrics_are_the_definitions(ties, depth):
    rng = np.random.default_rng(7)
    scores = rng.integers(0, 5, (40, 14)).astype(float)
    targets = rng.integers(0, 14, 40)
    ranks = target_ranks(targets, scores)
    values = per_user_metrics(TargetRanks(ranks.n_greater, ranks.n_equal, ranks.found, depth), ties, CUTOFFS, NDCG)
    expected = [reference(target, row, ties, depth) for target, row in zip(targets, scores, strict=True)]
    np.testing.assert_allclose(values, expected, atol=1e-12, err_msg="seed 7")


def test_a_second_key_decides_ties():
    primary = np.array([[1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    ranks = target_ranks(np.array([0, 2]), primary, np.array([[5.0, 7.0, 5.0, 0.0]]))
    assert ranks.n_greater.tolist() == [2, 1] and ranks.n_equal.tolist() == [1, 1]
    assert ranks.optimistic.tolist() == [3, 2] and ranks.pessimistic.tolist() == [4, 3]


def test_a_miss_is_zero_everywhere():
    ranks = TargetRanks.misses(3, 10)
    for ties in TIES:
        assert not per_user_metrics(ranks, ties).any()
    assert ranks.optimistic.tolist() == ranks.pessimistic.tolist() == [0, 0, 0]


SCORES = st.lists(st.lists(st.integers(0, 4), min_size=8, max_size=8), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(SCORES, st.randoms(use_true_random=False))
def test_laws(rows, random):
    scores = np.array(rows, float)
    targets = np.array([random.randrange(8) for _ in rows])
    ranks = target_ranks(targets, scores)
    by_ties = {ties: per_user_metrics(ranks, ties, CUTOFFS, NDCG) for ties in TIES}
    for values in by_ties.values():
        assert ((values >= 0) & (values <= 1)).all()
        np.testing.assert_array_equal(values[:, NAMES.index("recall@1")], values[:, NAMES.index("ndcg@1")])
        for prefix, cutoffs in (("recall", CUTOFFS), ("ndcg", NDCG)):
            columns = values[:, [NAMES.index(f"{prefix}@{k}") for k in cutoffs]]
            assert (np.diff(columns, axis=1) >= -1e-12).all()
        assert (values[:, NAMES.index("recall@10")] >= values[:, NAMES.index("ndcg@10")]).all()
    for between in ("expected", "mean_rank"):
        assert (by_ties["optimistic"] >= by_ties[between] - 1e-12).all()
        assert (by_ties[between] >= by_ties["pessimistic"] - 1e-12).all()


@settings(deadline=None, max_examples=40)
@given(SCORES, st.randoms(use_true_random=False))
def test_the_order_of_users_and_items_does_not_matter(rows, random):
    scores = np.array(rows, float)
    targets = np.array([random.randrange(8) for _ in rows])
    users, items = list(range(len(rows))), list(range(8))
    random.shuffle(users)
    random.shuffle(items)
    place = np.argsort(items)
    for ties in TIES:
        one = ranking_metrics(targets, scores, ties=ties)
        other = ranking_metrics(place[targets[users]], scores[users][:, items], ties=ties)
        assert one == pytest.approx(other, abs=1e-12)


def test_bad_input_is_named():
    with pytest.raises(CalrecError, match="ties is 'luck'"):
        per_user_metrics(TargetRanks.misses(1, 1), "luck")
    with pytest.raises(CalrecError, match=r"cutoffs is \[0\]"):
        metric_names((0,))
    with pytest.raises(CalrecError, match=r"ndcg_cutoffs is \[5, 5\]"):
        metric_names((1,), (5, 5))
    with pytest.raises(CalrecError, match=r"targets \(2,\) and scores \(1, 3\)"):
        ranking_metrics(np.zeros(2, int), np.zeros((1, 3)))
    with pytest.raises(CalrecError, match="hold NaN"):
        ranking_metrics(np.zeros(1, int), np.full((1, 3), np.nan))


def test_resampled_means_are_means_of_drawn_users():
    values = np.random.default_rng(0).random((50, 3))
    drawn = np.random.default_rng(5).integers(0, 50, (20, 50), dtype=np.int64)
    np.testing.assert_allclose(resampled_means(values, 20, 5), values[drawn].mean(axis=1), atol=1e-12)


def test_intervals_are_deterministic_and_near_the_normal_ones():
    values = (np.random.default_rng(1).random((2000, 2)) < [0.1, 0.5]).astype(float)
    bounds = intervals(values, resamples=2000, seed=3)
    np.testing.assert_array_equal(bounds, intervals(values, resamples=2000, seed=3))
    assert (bounds != intervals(values, resamples=2000, seed=4)).any()
    mean, error = values.mean(axis=0), values.std(axis=0) / math.sqrt(2000)
    np.testing.assert_allclose(bounds, np.stack([mean - 1.96 * error, mean + 1.96 * error], axis=1), atol=0.0015)


def test_metrics_of_rankings_share_the_resamples():
    values = np.random.default_rng(2).random((300, 1))
    means = resampled_means(np.concatenate([values, values - 0.25], axis=1), 50, 0)
    np.testing.assert_allclose(means[:, 0] - means[:, 1], 0.25, atol=1e-12)


def test_bad_bootstraps_are_named():
    with pytest.raises(CalrecError, match="resamples=0"):
        intervals(np.ones((3, 1)), resamples=0)
    with pytest.raises(CalrecError, match="0 users"):
        intervals(np.ones((0, 1)))
    with pytest.raises(CalrecError, match="interval level is 95"):
        intervals(np.ones((3, 1)), level=95)
