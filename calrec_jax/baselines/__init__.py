"""Baselines that are trained: SASRec. Those that are only counted are sources of `calrec_jax.rank`."""
