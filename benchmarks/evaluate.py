"""Seconds of the evaluator's statistics over many users.

python benchmarks/evaluate.py [--users 1000000] [--items 100000] [--resamples 10000]

Ranks are drawn from a heavy-tailed law; two rankings are compared whose ranks are correlated. Each line: the metric,
its distinct values, those of the paired difference, seconds of the bootstrap interval, seconds of interval and
sign-flip test of the difference.
"""

import argparse
import time

import numpy as np

from calrec_jax.evaluate import bootstrap
from calrec_jax.evaluate.metrics import TargetRanks, metric_names, per_user_metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--resamples", type=int, default=10_000)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    first = np.minimum((rng.pareto(0.35, arguments.users) * 5).astype(np.int64), arguments.items - 1)
    second = np.minimum((first * rng.lognormal(0.1, 1, arguments.users)).astype(np.int64), arguments.items - 1)
    everybody, nobody = np.ones(arguments.users, bool), np.zeros(arguments.users, np.int64)
    begin = time.perf_counter()
    values = [
        per_user_metrics(TargetRanks(r, nobody, everybody, arguments.items), "mean_rank") for r in (first, second)
    ]
    print(f"{arguments.users:,} users, {arguments.items:,} items, {arguments.resamples:,} resamples")
    print(f"metrics of two rankings: {time.perf_counter() - begin:.2f} s")
    total = 0.0
    for column, name in enumerate(metric_names()):
        a, b = (each[:, column] for each in values)
        begin = time.perf_counter()
        bootstrap.intervals(a[:, None], resamples=arguments.resamples)
        middle = time.perf_counter()
        bootstrap.paired(a, b, resamples=arguments.resamples)
        end = time.perf_counter()
        total += end - begin
        distinct = len(np.unique(a)), len(np.unique(np.round(a - b, 12)))
        print(f"{name:10} {distinct[0]:8,} {distinct[1]:8,} {middle - begin:8.2f} s {end - middle:8.2f} s")
    print(f"all metrics: {total:.1f} s")


if __name__ == "__main__":
    main()
