"""Metrics, bootstrap intervals, baselines and the report."""
