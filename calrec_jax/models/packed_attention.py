"""Causal attention inside each segment of packed rows, with a gradient of its own, as products that XLA runs.

Notable: scores lie with keys before queries, [..., S, M], so that a softmax reduces over columns and all products of
both passes read their operands as they lie: what autodiff makes of the plain form transposes every score. Masks are
added, one float for all heads and layers, and not selected. The backward pass computes scores anew from each query's
log-sum-exp (Dao et al., 2022, arXiv 2205.14135, section 3.1), so none are kept. Together that halves the time of
attention on CPU (docs/performance.md). Long rows hold many short segments: the device looks at the longest one of a
batch, and keys further back than that are left out, by steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from calrec_jax.models.attention import NEGATIVE, soft_capped

# Products [places, C] × [places] of a pair of places: scores and values; scores, the gradients of the softmax, of
# values, keys and queries.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
_LONG = 1024  # places of a row from which its longest segment is looked at


class _Scope(NamedTuple):
    """What is known when a layer is traced.

    Attributes:
      block: query places that attend together.
      window: places that a local layer attends to; None: there are no local layers.
      local: whether this one is; None: the device knows.
      soft_cap: of the scores.
      lookback: places before a block that its queries attend to; None: all.
    """

    block: int
    window: int | None
    local: bool | None
    soft_cap: float | None
    lookback: int | None = None


def packed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    block: int,
    *,
    window: int | None = None,
    local: bool | jax.Array = False,
    soft_cap: float | None = None,
) -> jax.Array:
    """Causal attention inside each segment of packed rows.

    Queries go in blocks of `block` places, each against the keys up to its own end, so that about half of the causal
    square is never computed; nor are keys before the window of a whole block, where it is known to be local. Softmax is
    in float32.

    Args:
      query: [B, L, H, C], scaled already.
      key: [B, L, G, C]; H is a multiple of G.
      value: [B, L, G, C].
      segment_ids: [B, L] int32; 0 is padding, whose outputs mean nothing.
      block: query places a block; L need not divide by it.
      window: places that a local layer attends to, its own among them. A segment's places follow each other.
      local: whether it is one; a scalar of the device where layers of both kinds are scanned.
      soft_cap: of the scores.

    Returns:
      [B, L, H, C]. Differentiable, once and in reverse, in `query`, `key` and `value`.
    """
    if isinstance(local, bool):
        return _attend(query, key, value, segment_ids, None, _Scope(block, window, local, soft_cap))
    return _attend(query, key, value, segment_ids, local, _Scope(block, window, None, soft_cap))


def first_key(begin: int, window: int | None, lookback: int | None = None) -> int:
    """The first place that a block of queries from place `begin` on attends to, with a window known beforehand."""
    return max(0, 0 if window is None else begin + 1 - window, 0 if lookback is None else begin - lookback)


def lookbacks(length: int, block: int) -> tuple[int, ...]:
    """Steps, in places, that attention in rows of a length distinguishes; beyond the last it is all of a row."""
    if length < _LONG:
        return ()
    return tuple(-(-length // (part * block)) * block for part in (8, 3))


def farthest(segment_ids: jax.Array) -> jax.Array:
    """How far behind the first place of its segment [B, L] any place of a segment is; a scalar."""
    place = jnp.arange(segment_ids.shape[1])
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    return jnp.max(jnp.where(segment_ids > 0, place - first, 0))


def _by_lookback(function, segment_ids: jax.Array, scope: _Scope, *arguments):
    """`function(scope, *arguments)` with the nearest lookback that leaves out no key of these segments."""
    steps = lookbacks(segment_ids.shape[1], scope.block)
    if not steps:
        return function(scope, *arguments)
    far = farthest(segment_ids)
    index = sum((far > step).astype(jnp.int32) for step in steps)
    branches = [functools.partial(function, scope._replace(lookback=step)) for step in (*steps, None)]
    return jax.lax.switch(index, branches, *arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, segment_ids, local, scope):
    return _forward(query, key, value, segment_ids, local, scope)[0]


def _forward(query, key, value, segment_ids, local, scope):
    inputs = query, key, value, segment_ids, local
    output, normaliser = _by_lookback(_output, segment_ids, scope, *inputs)
    return output, (*inputs, output, normaliser)


def _output(scope, query, key, value, segment_ids, local):
    """(what attention gives, [B, G, H/G, L] log-sum-exp of each query's scores)."""
    keys, turned_values, queries = _by_group(key), _turned(value), _by_group(query, key.shape[2])
    outputs, normalisers = [], []
    for begin, end, first in _blocks(query.shape[1], scope):
        mask = _added_mask(segment_ids, begin, end, first, local, scope)
        scores, _ = _scores(keys[:, :, first:end], queries[..., begin:end, :], mask, scope.soft_cap)
        top = scores.max(2, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(2)
        mixed = jnp.einsum(
            "bgcs,bgsm->bgcm", turned_values[..., first:end], _flat(weights, value.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        mixed = mixed.reshape(*mixed.shape[:3], *total.shape[2:]) / total[:, :, None]
        outputs.append(mixed.astype(value.dtype).transpose(0, 4, 1, 3, 2))
        normalisers.append(top[:, :, 0] + jnp.log(total))
    return jnp.concatenate(outputs, axis=1).reshape(query.shape), jnp.concatenate(normalisers, axis=-1)


def _backward(scope, residual, d_output):
    return *_by_lookback(_gradients, residual[3], scope, d_output, *residual), None, None


def _gradients(scope, d_output, query, key, value, segment_ids, local, output, normaliser):
    """Of query, key and value."""
    groups, length = key.shape[2], query.shape[1]
    keys, turned_keys, values = _by_group(key), _turned(key), _by_group(value)
    queries, d_outputs = _by_group(query, groups), _by_group(d_output, groups)
    # Σ weight · its gradient of a query is the product of the output and its gradient.
    dot = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), axis=-1)
    dot = dot.reshape(*dot.shape[:2], groups, -1).transpose(0, 2, 3, 1)
    d_queries = []
    d_keys = d_values = jnp.zeros((), jnp.float32)
    for begin, end, first in _blocks(length, scope):
        mask = _added_mask(segment_ids, begin, end, first, local, scope)
        block, d_block = (_rows(x[..., begin:end, :]) for x in (queries, d_outputs))
        scores, slope = _scores(keys[:, :, first:end], queries[..., begin:end, :], mask, scope.soft_cap)
        weights = jnp.exp(scores - normaliser[:, :, None, :, begin:end])
        d_weights = _product(values[:, :, first:end], d_block).reshape(weights.shape)
        d_scores = _flat(weights * (d_weights - dot[:, :, None, :, begin:end]) * slope, query.dtype)
        rest = [(0, 0), (0, 0), (first, length - end), (0, 0)]
        d_values += jnp.pad(_mixture(_flat(weights, value.dtype), d_block), rest)
        d_keys += jnp.pad(_mixture(d_scores, block), rest)
        d_query = jnp.einsum(
            "bgcs,bgsm->bgcm", turned_keys[..., first:end], d_scores, preferred_element_type=jnp.float32
        )
        d_query = d_query.reshape(*d_query.shape[:3], -1, end - begin).astype(query.dtype)
        d_queries.append(d_query.transpose(0, 4, 1, 3, 2))
    d_key, d_value = (x.astype(key.dtype).transpose(0, 2, 1, 3) for x in (d_keys, d_values))
    return jnp.concatenate(d_queries, axis=1).reshape(query.shape), d_key, d_value


_attend.defvjp(_forward, _backward)


def _blocks(length: int, scope: _Scope) -> Iterator[tuple[int, int, int]]:
    """(first place, place behind the last, first key) of each block of queries."""
    for begin in range(0, length, scope.block):
        first = first_key(begin, scope.window if scope.local else None, scope.lookback)
        yield begin, min(begin + scope.block, length), first


def _added_mask(segment_ids, begin, end, first, local, scope) -> jax.Array:
    """[B, S, M'] float32 of a block's M' places: 0 where they attend to a key, else `NEGATIVE`."""
    lag = jnp.arange(begin, end)[None, :] - jnp.arange(first, end)[:, None]
    near = lag >= 0
    if scope.window is not None and scope.local is not False:
        near &= (lag < scope.window) | (False if scope.local else ~local)
    return jnp.where((segment_ids[:, first:end, None] == segment_ids[:, None, begin:end]) & near, 0.0, NEGATIVE)


def _scores(keys, queries, mask, soft_cap) -> tuple[jax.Array, jax.Array | float]:
    """Masked scores [B, G, S, H/G, M'] of queries [B, G, H/G, M', C], and their slope under the soft cap."""
    scores = _product(keys, _rows(queries)).reshape(*keys.shape[:3], *queries.shape[2:4])
    scores = soft_capped(scores, soft_cap)
    slope = 1.0 if soft_cap is None else 1 - jnp.square(scores / soft_cap)
    return scores + mask[:, None, :, None], slope


def _by_group(x: jax.Array, groups: int | None = None) -> jax.Array:
    """[B, L, G, C] → [B, G, L, C]; with `groups`, [B, L, H, C] → [B, G, H/G, L, C]."""
    if groups is None:
        return x.transpose(0, 2, 1, 3)
    return x.reshape(*x.shape[:2], groups, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)


def _turned(x: jax.Array) -> jax.Array:
    """[B, L, G, C] → [B, G, C, L]."""
    return x.transpose(0, 2, 3, 1)


def _rows(x: jax.Array) -> jax.Array:
    """[B, G, H/G, M', C] → [B, G, M, C]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _flat(x: jax.Array, dtype) -> jax.Array:
    """[B, G, S, H/G, M'] → [B, G, S, M], for a product."""
    return x.reshape(*x.shape[:3], -1).astype(dtype)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """[B, G, S, C] and [B, G, M, C] → [B, G, S, M] float32."""
    return jnp.einsum("bgsc,bgmc->bgsm", x, y, preferred_element_type=jnp.float32)


def _mixture(weights: jax.Array, x: jax.Array) -> jax.Array:
    """[B, G, S, M] and [B, G, M, C] → [B, G, S, C] float32."""
    return jnp.einsum("bgsm,bgmc->bgsc", weights, x, preferred_element_type=jnp.float32)
