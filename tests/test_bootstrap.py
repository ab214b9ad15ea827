"""Intervals, paired tests and Holm's correction: against drawing users one by one, closed forms, and laws."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.errors import CalrecError
from calrec_jax.evaluate import bootstrap
from calrec_jax.evaluate.bootstrap import holm, intervals, paired, resampled_means, sign_flip_p


def drawn_one_by_one(values, users, resamples, seed):
    """Means over users drawn with replacement, each with all of their rows."""
    rng = np.random.default_rng(seed)
    rows = [values[users == user] for user in np.unique(users)]
    return np.array(
        [np.concatenate([rows[k] for k in rng.integers(0, len(rows), len(rows))]).mean() for _ in range(resamples)]
    )


@pytest.mark.parametrize("several", [False, True])
def test_resamples_have_the_distribution_of_users_drawn_one_by_one(several):
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(80), rng.integers(1, 5, 80)) if several else np.arange(80)
    effects = rng.random(80)  # rows of a user are alike, so that forgetting who is whose would narrow the interval
    values = np.round((effects[users] + 0.1 * rng.random(len(users))) * 4) / 4
    own = resampled_means(values, 6000, 1, users if several else None)
    slow = drawn_one_by_one(values, users, 6000, 2)
    assert own.mean() == pytest.approx(slow.mean(), abs=4 * slow.std() / math.sqrt(6000))
    assert own.std() == pytest.approx(slow.std(), rel=0.05)
    quantiles = [0.025, 0.25, 0.75, 0.975]
    np.testing.assert_allclose(np.quantile(own, quantiles), np.quantile(slow, quantiles), atol=0.15 * slow.std())
    if several:
        assert own.std() > 1.3 * resampled_means(values, 6000, 1).std()


def test_a_user_given_row_by_row_is_one_user():
    values = np.random.default_rng(3).random(60)
    np.testing.assert_array_equal(resampled_means(values, 50, 0, np.arange(60)[::-1]), resampled_means(values, 50, 0))
    one = resampled_means(values, 50, 0, np.zeros(60))  # all rows are one user's: every resample is that user
    np.testing.assert_allclose(one, values.mean(), atol=1e-12)


def test_many_distinct_values_are_grouped_and_lose_next_to_nothing():
    rng = np.random.default_rng(5)
    ranks = np.minimum((rng.pareto(0.4, 200_000) * 3).astype(int) + 1, 20_000)
    values = 1.0 / ranks
    assert len(np.unique(values)) > 2 * bootstrap.MOST_DISTINCT
    found = bootstrap._distinct(values, None)
    assert len(found.sums) <= bootstrap.MOST_DISTINCT
    assert found.sums @ found.counts == pytest.approx(values.sum(), rel=1e-12)
    variance = found.counts @ (found.sums - values.mean()) ** 2 / len(values)
    assert math.sqrt(variance) == pytest.approx(values.std(), rel=1e-3)
    assert resampled_means(values, 4000, 0).std() == pytest.approx(values.std() / math.sqrt(len(values)), rel=0.05)


def test_intervals_are_deterministic_and_near_the_normal_ones():
    values = (np.random.default_rng(1).random((2000, 2)) < [0.1, 0.5]).astype(float)
    bounds = intervals(values, resamples=4000, seed=3)
    np.testing.assert_array_equal(bounds, intervals(values, resamples=4000, seed=3))
    assert (bounds != intervals(values, resamples=4000, seed=4)).any()
    mean, error = values.mean(axis=0), values.std(axis=0) / math.sqrt(2000)
    np.testing.assert_allclose(bounds, np.stack([mean - 1.96 * error, mean + 1.96 * error], axis=1), atol=0.0015)


def exact_p(differences):
    """All 2^U sign patterns."""
    signs = np.array(list(itertools.product([-1, 1], repeat=len(differences))))
    return np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_sign_flips_give_the_exact_p_value(seed):
    rng = np.random.default_rng(seed)
    differences = np.round(rng.normal(0.3, 1.0, 12) * 2) / 2
    assert sign_flip_p(differences, resamples=40_000, seed=seed) == pytest.approx(exact_p(differences), abs=0.01)


def test_no_difference_and_a_sure_one():
    assert sign_flip_p(np.zeros(5), resamples=10) == 1.0
    assert sign_flip_p(np.ones(100), resamples=999) == 1 / 1000
    assert sign_flip_p(np.tile([1.0, -1.0], 50), resamples=999) == 1.0


def test_p_values_are_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(9)
    found = [sign_flip_p(rng.choice([-0.5, 0.0, 0.25, 1.0, -1.0, 0.5, -0.25], 200), resamples=400, seed=k)
             for k in range(300)]  # fmt: skip
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


def test_users_rows_are_flipped_together():
    """Ten rows of one user are one observation, not ten."""
    rng = np.random.default_rng(2)
    users = np.repeat(np.arange(30), 10)
    a = rng.normal(0.2, 1, 30)[users]
    alone, together = paired(a, np.zeros(300)), paired(a, np.zeros(300), users=users)
    assert alone.difference == together.difference == pytest.approx(a.mean())
    assert together.p > alone.p
    assert np.diff(together.interval) > 2 * np.diff(alone.interval)


def test_paired_intervals_are_narrower_than_those_of_independent_rankings():
    rng = np.random.default_rng(4)
    b = rng.random(500)
    a = b + np.round(rng.normal(0.02, 0.05, 500), 2)
    found = paired(a, b, resamples=4000)
    assert found.difference == pytest.approx((a - b).mean())
    assert found.interval[0] < found.difference < found.interval[1]
    error = (a - b).std() / math.sqrt(500)
    np.testing.assert_allclose(found.interval, found.difference + np.array([-1.96, 1.96]) * error, atol=0.1 * error)
    assert np.ptp(found.interval) < 0.3 * np.ptp(intervals(a[:, None], resamples=4000)[0])


def test_holm_is_the_worked_example():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]).tolist() == [] and holm([0.7]).tolist() == [0.7]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12))
def test_holm_rejects_what_stepping_down_rejects(p_values):
    adjusted = holm(p_values)
    assert (adjusted >= np.array(p_values) - 1e-15).all() and (adjusted <= 1).all()
    level = 0.05
    rejected, order = set(), sorted(range(len(p_values)), key=lambda k: p_values[k])
    for step, k in enumerate(order):
        if p_values[k] * (len(p_values) - step) > level:
            break
        rejected.add(k)
    assert {k for k, p in enumerate(adjusted) if p <= level} == rejected


def test_bad_bootstraps_are_named():
    with pytest.raises(CalrecError, match="resamples=0"):
        intervals(np.ones((3, 1)), resamples=0)
    with pytest.raises(CalrecError, match="0 users"):
        intervals(np.ones((0, 1)))
    with pytest.raises(CalrecError, match="interval level is 95"):
        intervals(np.ones((3, 1)), level=95)
    with pytest.raises(CalrecError, match="0 users"):
        sign_flip_p(np.ones(0))
