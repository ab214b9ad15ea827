"""Attention of packed rows and of a decoding step.

Notable: masks come from segment ids and positions, never from a materialised [B, L, L] input; grouped queries are kept
grouped ([B, L, G, H/G, C]), so keys and values are never repeated; the N samples of a user attend to *one* copy of the
prefix's keys and values beside their own suffix. Softmax is in float32. `xla` is the only implementation so far.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NEGATIVE = -1e30  # finite: a row that is all padding stays free of NaN


def rope_angles(positions: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of rotary position embedding (Su et al., 2021, eq. 15), half-split layout.

    Args:
      positions: [...] int32.
      head_dim: C, even.
      base: wavelength base, e.g. 10,000.

    Returns:
      (sin, cos), each [..., C] float32: the C/2 angles, twice.
    """
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None] * jnp.tile(frequency, 2)
    return jnp.sin(angle), jnp.cos(angle)


def apply_rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates [..., heads, C] by angles [..., C] (shared by the heads).

    The half-turn (first, second) → (−second, first) is a product with a constant matrix: splitting and concatenating
    the halves took a tenth of a training step on CPU, where XLA does not vectorise a concatenation in the last axis.
    """
    half = x.shape[-1] // 2
    eye = np.eye(half, dtype=np.float32)
    zero = np.zeros_like(eye)
    half_turn = jnp.asarray(np.block([[zero, eye], [-eye, zero]]), x.dtype)
    sin, cos = sin[..., None, :].astype(x.dtype), cos[..., None, :].astype(x.dtype)
    return x * cos + (x @ half_turn) * sin


def packed_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, block: int
) -> jax.Array:
    """Causal attention inside each segment of packed rows.

    Queries go in blocks of `block` places, each against the keys up to its own end, so that about half of the causal
    square is never computed.

    Args:
      query: [B, L, H, C], scaled already.
      key: [B, L, G, C]; H is a multiple of G.
      value: [B, L, G, C].
      segment_ids: [B, L] int32; 0 is padding, whose outputs mean nothing.
      block: query places a block; L need not divide by it.

    Returns:
      [B, L, H, C].
    """
    batch, length, heads, width = query.shape
    groups = key.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, width)
    outputs = []
    for begin in range(0, length, block):
        end = min(begin + block, length)
        place = jnp.arange(begin, end)
        mask = (segment_ids[:, begin:end, None] == segment_ids[:, None, :end]) & (
            place[:, None] >= jnp.arange(end)[None, :]
        )
        scores = jnp.einsum(
            "blghc,bsgc->bghls", grouped[:, begin:end], key[:, :end], preferred_element_type=jnp.float32
        )
        scores = jnp.where(mask[:, None, None], scores, NEGATIVE)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        outputs.append(jnp.einsum("bghls,bsgc->blghc", weights, value[:, :end]))
    return jnp.concatenate(outputs, axis=1).reshape(batch, length, heads, width)


def decoding_layout(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A prefix's keys [B, G, C, L] and values [B, G, L, C] from [B, L, G, C] each.

    What a step multiplies by comes last, so that no step transposes the prefix again: on a CPU that halves a step's
    attention.
    """
    return key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)


class Cells(NamedTuple):
    """Where the rows of a step stand among the samples of B users, when they are not all of them in their order.

    Attributes:
      row_of: [B, N] int32, the row of each sample; any row where a sample is not being decoded.
      cell_of: [R] int32, `user · N + sample` of each row.
    """

    row_of: jax.Array
    cell_of: jax.Array


def shared_prefix_attention(
    query: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    prefix_mask: jax.Array,
    suffix: tuple[jax.Array, jax.Array],
    suffix_mask: jax.Array,
    cells: Cells | None = None,
) -> jax.Array:
    """Q tokens of each of R rows, samples of B users, over their user's one prefix and each row's own suffix.

    The two parts share one softmax: their scores are joined, their keys and values are not.

    Args:
      query: [R, Q, H, C], scaled already.
      prefix: keys [B, G, C, L] and values [B, G, L, C], see `decoding_layout`.
      prefix_mask: [B, L] bool, real places.
      suffix: keys and values [R, G, T, C].
      suffix_mask: [R, Q, T] bool, or what broadcasts to it: the places that a token attends to.
      cells: None where the rows are the users' samples, user by user.

    Returns:
      [R, Q, H, C].
    """
    batch = prefix_mask.shape[0]
    rows, places, heads, width = query.shape
    groups = suffix[0].shape[1]
    grouped = query.reshape(rows, places, groups, heads // groups, width)
    by_user = grouped.reshape(batch, -1, *grouped.shape[1:]) if cells is None else grouped[cells.row_of]
    # Samples, places and heads of a group are one matrix.
    shared = jnp.moveaxis(by_user, 3, 1).reshape(batch, groups, -1, width)
    before = jnp.einsum("bgqc,bgcl->bgql", shared, prefix[0], preferred_element_type=jnp.float32)
    before = jnp.where(prefix_mask[:, None, None, :], before, NEGATIVE)
    own = jnp.einsum("rqgmc,rgtc->rqgmt", grouped, suffix[0], preferred_element_type=jnp.float32)
    own = jnp.where(suffix_mask[:, :, None, None, :], own, NEGATIVE)

    def by_row(x: jax.Array) -> jax.Array:
        """[B, G, N·Q·H/G, X] → [R, Q, G, H/G, X]."""
        x = jnp.moveaxis(x.reshape(batch, groups, -1, places, heads // groups, x.shape[-1]), 1, 3)
        x = x.reshape(-1, *x.shape[2:])
        return x if cells is None else x[cells.cell_of]

    before_top, own_top = before.max(-1, keepdims=True), own.max(-1, keepdims=True)
    before, own = jnp.exp(before - before_top), jnp.exp(own - own_top)
    dtype = query.dtype
    mixed_before = by_row(jnp.einsum("bgql,bglc->bgqc", before.astype(dtype), prefix[1]))
    mixed_own = jnp.einsum("rqgmt,rgtc->rqgmc", own.astype(dtype), suffix[1])
    # The parts are joined by their log-sum-exp: each was scaled by its own maximum.
    before_top = by_row(before_top)
    top = jnp.maximum(before_top, own_top)
    scale_before, scale_own = jnp.exp(before_top - top), jnp.exp(own_top - top)
    total = scale_before * by_row(before.sum(-1, keepdims=True)) + scale_own * own.sum(-1, keepdims=True)
    mixed = (mixed_before * scale_before + mixed_own * scale_own) / total
    return mixed.astype(dtype).reshape(rows, places, heads, width)
