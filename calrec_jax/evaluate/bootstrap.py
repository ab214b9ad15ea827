"""Confidence intervals by the bootstrap over users (percentile method).

Notable: the resamples are exact (users drawn with replacement), drawn in blocks and shared by all metrics and rankings,
so differences between rankings are paired. A resample is a vector of counts and its means one matrix product.
"""

import numpy as np

from calrec_jax.errors import CalrecError

_DRAWS_A_BLOCK = 2**21


def resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of the columns over resampled users.

    Args:
      values: [U, M] float64, a row a user.
      resamples: how many.
      seed: of the draws; the same seed and U draw the same users.

    Returns:
      [resamples, M] float64.

    Raises:
      CalrecError: no users, or fewer than one resample.
    """
    num_users = len(values)
    if num_users < 1 or resamples < 1:
        raise CalrecError(f"a bootstrap needs users and resamples; there are {num_users} users, resamples={resamples}")
    generator = np.random.default_rng(seed)
    block = max(1, _DRAWS_A_BLOCK // num_users)
    means = np.empty((resamples, values.shape[1]))
    for at in range(0, resamples, block):
        rows = min(block, resamples - at)
        drawn = generator.integers(0, num_users, (rows, num_users), dtype=np.int64)
        drawn += (np.arange(rows) * num_users)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num_users).reshape(rows, num_users)
        means[at : at + rows] = counts.astype(np.float64) @ values / num_users
    return means


def intervals(values: np.ndarray, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> np.ndarray:
    """Bootstrap intervals of the means of the columns.

    Args:
      values: [U, M] float64, a row a user.
      resamples: how many times users are drawn.
      seed: of the draws.
      level: coverage.

    Returns:
      [M, 2]: the (1−level)/2 and (1+level)/2 quantiles of the resampled means.

    Raises:
      CalrecError: no users, no resamples, or `level` not between 0 and 1.
    """
    if not 0 < level < 1:
        raise CalrecError(f"interval level is {level}: it must lie between 0 and 1")
    means = resampled_means(values, resamples, seed)
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T
