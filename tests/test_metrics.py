"""Metrics against their definitions, laws that hold for all of them, and two well-kept libraries."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.metrics import (
    TIES,
    TargetRanks,
    metric_names,
    per_user_metrics,
    ranking_metrics,
    target_ranks,
)

CUTOFFS, NDCG, MRR = (1, 2, 5, 10), (1, 5, 10), (1, 4, 10)
NAMES = metric_names(CUTOFFS, NDCG, MRR)


def at_rank(rank, depth):
    """Metrics of a target at a (possibly fractional) rank, from the definitions."""
    if rank > depth:
        return [0.0] * len(NAMES)
    recall = [float(rank <= k) for k in CUTOFFS]
    ndcg = [1 / math.log2(1 + rank) if rank <= k else 0.0 for k in NDCG]
    return [*recall, *ndcg, *(1 / rank if rank <= k else 0.0 for k in MRR), 1 / rank]


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
    values = per_user_metrics(TargetRanks(ranks.n_greater, ranks.n_equal, ranks.found, depth), ties, CUTOFFS, NDCG, MRR)
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
    by_ties = {ties: per_user_metrics(ranks, ties, CUTOFFS, NDCG, MRR) for ties in TIES}
    for values in by_ties.values():
        assert ((values >= 0) & (values <= 1)).all()
        np.testing.assert_array_equal(values[:, NAMES.index("recall@1")], values[:, NAMES.index("ndcg@1")])
        np.testing.assert_array_equal(values[:, NAMES.index("recall@1")], values[:, NAMES.index("mrr@1")])
        for prefix, cutoffs in (("recall", CUTOFFS), ("ndcg", NDCG), ("mrr", MRR)):
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


def strict_run(seed):
    """Targets and scores without ties; the lists of some users are cut, so that targets are missed."""
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(60.0), (50, 1)), axis=1)
    return rng.integers(0, 60, 50), scores, rng.integers(1, 61, 50)


def as_run(targets, scores, depths):
    """Relevance and run as both libraries take them: a dict a query, the best `depth` documents of each."""
    qrels = {f"q{user}": {f"d{target}": 1} for user, target in enumerate(targets)}
    run = {
        f"q{user}": {f"d{item}": float(row[item]) for item in np.argsort(-row)[:depth]}
        for user, (row, depth) in enumerate(zip(scores, depths, strict=True))
    }
    return qrels, run


def own_means(targets, scores, depths):
    ranks = target_ranks(targets, scores)
    found = ranks.n_greater < depths
    ranks = TargetRanks(np.where(found, ranks.n_greater, 0), np.where(found, ranks.n_equal, 0), found, scores.shape[1])
    names = metric_names((1, 5, 10, 50), (10, 50), (10,))
    return dict(
        zip(names, per_user_metrics(ranks, "mean_rank", (1, 5, 10, 50), (10, 50), (10,)).mean(axis=0), strict=True)
    )


def test_strict_scores_give_the_numbers_of_ir_measures():
    ir_measures = pytest.importorskip("ir_measures")
    from ir_measures import RR, R, nDCG

    case = strict_run(3)
    qrels, run = as_run(*case)
    named = {f"recall@{k}": R @ k for k in (1, 5, 10, 50)} | {f"ndcg@{k}": nDCG @ k for k in (10, 50)}
    named |= {"mrr": RR, "mrr@10": RR @ 10}
    theirs = ir_measures.calc_aggregate(named.values(), qrels, run)
    own = own_means(*case)
    assert 0 < own["mrr"] < 1
    for name, measure in named.items():
        assert theirs[measure] == pytest.approx(own[name], abs=1e-6), name


@pytest.mark.slow
def test_strict_scores_give_the_numbers_of_ranx():
    """Slow: it compiles for tens of seconds. It is in the extra `bench`, and the test is skipped where it is not."""
    ranx = pytest.importorskip("ranx")
    case = strict_run(4)
    qrels, run = as_run(*case)
    names = ["recall@1", "recall@5", "recall@10", "recall@50", "ndcg@10", "ndcg@50", "mrr@10", "mrr"]
    theirs = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), names)
    own = own_means(*case)
    for name in names:
        assert theirs[name] == pytest.approx(own[name], abs=1e-9), name


def test_bad_input_is_named():
    with pytest.raises(CalrecError, match="ties is 'luck'"):
        per_user_metrics(TargetRanks.misses(1, 1), "luck")
    with pytest.raises(CalrecError, match=r"cutoffs is \[0\]"):
        metric_names((0,))
    with pytest.raises(CalrecError, match=r"ndcg_cutoffs is \[5, 5\]"):
        metric_names((1,), (5, 5))
    with pytest.raises(CalrecError, match=r"mrr_cutoffs is \[2.5\]"):
        metric_names((1,), (5,), (2.5,))
    with pytest.raises(CalrecError, match=r"targets \(2,\) and scores \(1, 3\)"):
        ranking_metrics(np.zeros(2, int), np.zeros((1, 3)))
    with pytest.raises(CalrecError, match="hold NaN"):
        ranking_metrics(np.zeros(1, int), np.full((1, 3), np.nan))
