"""Draws from softmax(logits / temperature), whole or cut to its top-k or top-p tokens.

Notable: a draw is an inverse CDF in two levels (sums of 64 columns of the vocabulary, then inside one column), which
needs one random number where the Gumbel trick needs V. What top-k and top-p keep is found by bisection over the bits of
the weights, exactly and without sorting the vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_COLUMNS = 64
_LARGEST_POWER = 8


def draw(
    logits: jax.Array, uniforms: jax.Array, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draws by inverse CDF.

    The vocabulary is laid out as a table of 64 columns; a uniform number first finds its column, then a token of it.

    Args:
      logits: [V] float32.
      uniforms: [N] in [0, 1).
      temperature: positive.
      top_k: only the k most probable tokens are drawn, those that tie with the last of them, too.
      top_p: only the fewest most probable tokens that together have at least this probability at `temperature`, after
        `top_k`; those that tie with the last of them, too (Holtzman et al., 2020).

    Returns:
      tokens [N] int32 and their log-probabilities [N] at temperature 1, over the whole vocabulary.
    """
    top = logits.max()
    table = jnp.pad(logits, (0, -logits.size % _COLUMNS), constant_values=-jnp.inf).reshape(-1, _COLUMNS)
    at_one = jnp.exp(table - top)
    log_total = jnp.log(at_one.sum())
    power = round(1 / temperature)
    if power <= _LARGEST_POWER and power * temperature == 1:
        weights = jax.lax.integer_pow(at_one, power)  # an exponential is most of what a draw costs
    else:
        weights = jnp.exp((table - top) / temperature)
    if top_k is not None:
        weights = jnp.where(weights >= _least_kept(weights, jnp.ones_like(weights), top_k), weights, 0)
    if top_p is not None:
        weights = jnp.where(weights >= _least_kept(weights, weights, top_p * weights.sum()), weights, 0)
    by_column = weights.sum(0)
    cumulative = jnp.cumsum(by_column)
    targets = uniforms * cumulative[-1]
    column = jax.vmap(_first_above, (None, None, 0))(cumulative, by_column, targets)
    inside = jnp.take(table, column, axis=1).T
    if top_k is None and top_p is None:
        own = jnp.exp((inside - top) / temperature)  # made again for the few, so that all weights need not be kept
    else:
        own = jnp.take(weights, column, axis=1).T
    rest = targets - (cumulative - by_column)[column]
    row = jax.vmap(_first_above)(jnp.cumsum(own, axis=-1), own, rest)
    log_probs = jnp.take_along_axis(inside, row[:, None], axis=1)[:, 0] - top - log_total
    return row * _COLUMNS + column, log_probs


def _first_above(cumulative: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """First index whose cumulative weight exceeds the target; rounding can never choose a weight of 0."""
    above = (cumulative > target) & (weights > 0)
    return jnp.where(above.any(), jnp.argmax(above), jnp.argmax(weights)).astype(jnp.int32)


def _least_kept(weights: jax.Array, amounts: jax.Array, wanted: jax.Array | float) -> jax.Array:
    """The greatest w for which the amounts of all weights ≥ w add up to `wanted`; 0 where none does.

    Weights lie in [0, 1], where floats compare as their bits do.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.where(bits >= middle, amounts, 0).sum() >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    above_one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1
    least, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), above_one))
    return jax.lax.bitcast_convert_type(least, jnp.float32)
