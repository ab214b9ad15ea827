"""Mean-pooled towers over packed rows (CALRec, Li et al. 2024, section "Training objective")."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mean_pool(hidden: jax.Array, pool: jax.Array, row_examples: int) -> jax.Array:
    """Mean of the hidden states that belong to each example of a packed row.

    Args:
      hidden: [B, L, D].
      pool: [B, L] int32; k = example k of the row (1-based), 0 none.
      row_examples: K.

    Returns:
      [B, K, D] float32; zeros where an example has no places.
    """
    member = (pool[:, None, :] == jnp.arange(1, row_examples + 1)[None, :, None]).astype(jnp.float32)
    total = jnp.einsum("bkl,bld->bkd", member, hidden.astype(jnp.float32))
    return total / jnp.maximum(member.sum(-1, keepdims=True), 1.0)


def unit(vectors: jax.Array) -> jax.Array:
    """L2-normalised over the last axis, so that a dot product is the cosine.

    Zeros stay zeros, with a finite gradient.
    """
    square = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
