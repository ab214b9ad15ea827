"""Uncertainty over users: bootstrap intervals, paired sign-flip tests, Holm's correction.

Notable: a metric takes few distinct values, so a resample of users is a multinomial draw of how often each value
occurs, exactly what drawing users one by one would give; the cost follows the number of distinct values and not that
of users (`benchmarks/evaluate.py`). Users are what is drawn: several rows of one user are added up first and stay
together. Where a metric has more than `MOST_DISTINCT` values (MRR over a large catalogue), values are grouped into as
many bins of equal width, each replaced by its mean: means stay exact, and standard errors of the ranking metrics lose
less than one part in a thousand.

Sources: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993 (percentile intervals); M. Smucker, J. Allan,
B. Carterette, A comparison of statistical significance tests for information retrieval evaluation, CIKM 2007 (paired
randomisation); S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Stat. 6, 1979.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calrec_jax.errors import CalrecError

MOST_DISTINCT = 256
RESAMPLES = 10_000
_DRAWS_A_BLOCK = 2**22


@dataclasses.dataclass(frozen=True)
class _Distinct:
    """The distinct per-user values: their sums over a user's rows, the users' numbers of rows, how many users each."""

    sums: np.ndarray
    rows: np.ndarray
    counts: np.ndarray


def _distinct(values: np.ndarray, users: np.ndarray | None) -> _Distinct:
    """Groups users whose rows add up to the same; the most frequent first, which makes drawing fast."""
    sizes = np.ones(1)
    if users is None:
        sums, counts = np.unique(values, return_counts=True)
        sizes = np.ones(len(sums))
    else:
        _, rows = np.unique(users, return_inverse=True)
        pairs = np.stack([np.bincount(rows, values), np.bincount(rows).astype(np.float64)], axis=1)
        pairs, counts = np.unique(pairs, axis=0, return_counts=True)
        sums, sizes = pairs[:, 0], pairs[:, 1]
    if len(sums) > MOST_DISTINCT:
        sums, sizes, counts = _binned(sums, sizes, counts)
    by = np.argsort(-counts, kind="stable")
    return _Distinct(sums[by], sizes[by], counts[by])


def _binned(sums: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bins of equal width of `sums`, for each number of rows its own, replaced by their means."""
    span = max(float(np.ptp(sums)), np.finfo(np.float64).tiny)
    bins = np.minimum(((sums - sums.min()) / span * MOST_DISTINCT).astype(np.int64), MOST_DISTINCT - 1)
    _, group = np.unique(np.stack([sizes, bins], axis=1), axis=0, return_inverse=True)
    group = group.ravel()
    together = np.bincount(group, counts)
    return (
        np.bincount(group, sums * counts) / together,
        np.bincount(group, sizes * counts) / together,
        together.astype(np.int64),
    )


def _check(num_rows: int, resamples: int) -> None:
    if num_rows < 1 or resamples < 1:
        raise CalrecError(f"a bootstrap needs users and resamples; there are {num_rows} users, resamples={resamples}")


def resampled_means(values: np.ndarray, resamples: int, seed: int, users: np.ndarray | None = None) -> np.ndarray:
    """Means of one metric over resampled users.

    Args:
      values: [rows] float64, a row an evaluated target.
      resamples: how many.
      seed: of the draws.
      users: [rows] whose row it is; None: each its own.

    Returns:
      [resamples] float64.

    Raises:
      CalrecError: no rows, or fewer than one resample.
    """
    _check(len(values), resamples)
    found = _distinct(np.asarray(values, np.float64), users)
    num_users = int(found.counts.sum())
    generator = np.random.default_rng(seed)
    block = max(1, _DRAWS_A_BLOCK // len(found.counts))
    means = np.empty(resamples)
    for at in range(0, resamples, block):
        size = min(block, resamples - at)
        drawn = generator.multinomial(num_users, found.counts / num_users, size).astype(np.float64)
        means[at : at + size] = (drawn @ found.sums) / (drawn @ found.rows)
    return means


def intervals(
    values: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
    users: np.ndarray | None = None,
) -> np.ndarray:
    """Bootstrap intervals of the means of the columns (percentile method).

    Args:
      values: [rows, M] float64.
      resamples: how many times users are drawn.
      seed: of the draws.
      level: coverage.
      users: [rows] whose row it is; None: each its own.

    Returns:
      [M, 2]: the (1−level)/2 and (1+level)/2 quantiles of the resampled means.

    Raises:
      CalrecError: no rows, no resamples, or `level` not between 0 and 1.
    """
    check_level(level)
    _check(len(values), resamples)
    bounds = [(1 - level) / 2, (1 + level) / 2]
    columns = [np.quantile(resampled_means(column, resamples, seed, users), bounds) for column in values.T]
    return np.array(columns).reshape(-1, 2)


def check_level(level: float) -> None:
    """Raises a `CalrecError` unless 0 < level < 1."""
    if not 0 < level < 1:
        raise CalrecError(f"interval level is {level}: it must lie between 0 and 1")


def sign_flip_p(differences: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of a paired randomisation test: under no difference each user's has either sign.

    Flips are drawn by distinct size of the difference, as binomial counts. The observed one counts as a draw, so the
    smallest value is 1/(resamples + 1).

    Args:
      differences: [U] float64, of the users' sums or means.
      resamples: how many.
      seed: of the draws.

    Raises:
      CalrecError: no users, or fewer than one resample.
    """
    _check(len(differences), resamples)
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    sizes, counts = sizes[sizes > 0], counts[sizes > 0]
    if not len(sizes):
        return 1.0
    if len(sizes) > MOST_DISTINCT:
        sizes, _, counts = _binned(sizes, np.ones(len(sizes)), counts)
    observed = abs(float(np.sum(differences)))
    tolerance = 1e-9 * max(1.0, float(sizes @ counts))  # sums of the same numbers in another order
    generator = np.random.default_rng(seed)
    block = max(1, _DRAWS_A_BLOCK // len(sizes))
    as_large = 0
    for at in range(0, resamples, block):
        positive = generator.binomial(counts, 0.5, (min(block, resamples - at), len(counts)))
        as_large += int((np.abs((2.0 * positive - counts) @ sizes) >= observed - tolerance).sum())
    return (1 + as_large) / (resamples + 1)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment of p-values: [K] float64, each at least its p-value and at most 1."""
    values = np.asarray(p_values, np.float64)
    by = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[by] * np.arange(len(by), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[by] = np.minimum(steps, 1.0)
    return adjusted


@dataclasses.dataclass(frozen=True)
class Paired:
    """The difference of two rankings over the same users.

    Attributes:
      difference: mean of a − b.
      interval: its bootstrap interval over users.
      p: of the sign-flip test, not corrected.
    """

    difference: float
    interval: tuple[float, float]
    p: float


def paired(
    a: np.ndarray,
    b: np.ndarray,
    *,
    users: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Paired:
    """Compares two rankings' values of one metric, row by row.

    Args:
      a: [rows] float64.
      b: as `a`, of the same targets.
      users: [rows] whose row it is; None: each its own. A user's rows are flipped and drawn together.
      resamples: of the interval and of the test.
      seed: of both.
      level: coverage of the interval.

    Raises:
      CalrecError: no rows, no resamples, or `level` not between 0 and 1.
    """
    check_level(level)
    # Equal values may differ in their last bits (NDCG computed along other ways); rounded, they are one value.
    difference = np.round(np.asarray(a, np.float64) - np.asarray(b, np.float64), 12)
    means = resampled_means(difference, resamples, seed, users)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    by_user = difference
    if users is not None:
        by_user = np.asarray(np.bincount(np.unique(users, return_inverse=True)[1], difference), np.float64)
    p = sign_flip_p(by_user, resamples=resamples, seed=seed)
    return Paired(float(difference.mean()), (float(low), float(high)), p)
