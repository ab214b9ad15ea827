"""Rotary embeddings and the attention of a decoding step; that of packed rows is in `packed_attention`.

Notable: grouped queries are kept grouped ([B, L, G, H/G, C]), so keys and values are never repeated; the N samples of a
user attend to *one* copy of the prefix's keys and values beside their own suffix. Softmax is in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from calrec_jax.models.config import TransformerConfig

NEGATIVE = -1e30  # finite: a row that is all padding stays free of NaN


class RopeScaling(NamedTuple):
    """How frequencies are scaled for texts longer than a model was first trained on; see `TransformerConfig`."""

    kind: str
    factor: float
    low: float
    high: float
    original_length: int

    @classmethod
    def of(cls, config: TransformerConfig) -> RopeScaling | None:
        """What the settings of a model say; None where nothing is scaled."""
        c = config
        if c.rope_scaling == "none":
            return None
        return cls(c.rope_scaling, c.rope_factor, c.rope_low_frequency, c.rope_high_frequency, c.rope_original_length)

    def __call__(self, frequency: jax.Array) -> jax.Array:
        """Scales frequencies [C/2] in radians a token."""
        if self.kind == "linear":
            return frequency / self.factor
        turns = self.original_length * frequency / (2 * np.pi)  # of the original length
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return kept * frequency + (1 - kept) * frequency / self.factor


def rope_angles(
    positions: jax.Array, head_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of rotary position embedding (Su et al., 2021, eq. 15), half-split layout.

    Args:
      positions: [...] int32.
      head_dim: C, even.
      base: wavelength base, e.g. 10,000.
      scaling: of the frequencies, or None.

    Returns:
      (sin, cos), each [..., C] float32: the C/2 angles, twice.
    """
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequency = scaling(frequency)
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


def soft_capped(x: jax.Array, cap: float | None) -> jax.Array:
    """Cap · tanh(x / cap) (Gemma 2, section 2); `x` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


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


def local_masks(
    prefix_mask: jax.Array,
    suffix_mask: jax.Array,
    positions: jax.Array,
    at: jax.Array | None,
    places: int,
    cells: Cells | None,
    window: int,
) -> tuple[jax.Array, jax.Array]:
    """The two masks of `shared_prefix_attention` in a local layer; the arguments are those of `Transformer.decode`.

    Args:
      prefix_mask: [B, L] bool.
      suffix_mask: [R, Q, T] bool, or what broadcasts to it.
      positions: [R, Q] int32.
      at: where the tokens at hand stand in the suffix; None: behind it.
      places: T, those of the tokens at hand among them.
      cells: which samples the rows are.
      window: places that are attended to.

    Returns:
      [B, N, Q, L] bool and [R, Q, T] bool.
    """
    users, (rows, tokens) = prefix_mask.shape[0], positions.shape  # not len(): an export's batch is symbolic
    by_user = positions.reshape(users, -1, tokens) if cells is None else positions[cells.row_of]
    near = by_user[..., None] - jnp.arange(prefix_mask.shape[1]) < window
    place, own = jnp.arange(places), jnp.arange(tokens)[:, None]
    if at is not None:
        lag = jnp.broadcast_to((at + own - place) % places, (rows, tokens, places))
    else:
        user = jnp.arange(rows) // (rows // users) if cells is None else cells.cell_of // by_user.shape[1]
        before = positions[:, :, None] - prefix_mask.sum(-1)[user][:, None, None] - place
        lag = jnp.where(place < places - tokens, before, own - (place - (places - tokens)))
    return prefix_mask[:, None, None] & near, suffix_mask & (lag < window)


def shared_prefix_attention(
    query: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    prefix_mask: jax.Array,
    suffix: tuple[jax.Array, jax.Array],
    suffix_mask: jax.Array,
    cells: Cells | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Q tokens of each of R rows, samples of B users, over their user's one prefix and each row's own suffix.

    The two parts share one softmax: their scores are joined, their keys and values are not.

    Args:
      query: [R, Q, H, C], scaled already.
      prefix: keys [B, G, C, L] and values [B, G, L, C], see `decoding_layout`.
      prefix_mask: [B, L] bool, real places; or [B, N, Q, L], those that each token attends to.
      suffix: keys and values [R, G, T, C].
      suffix_mask: [R, Q, T] bool, or what broadcasts to it: the places that a token attends to.
      cells: None where the rows are the users' samples, user by user.
      soft_cap: of the scores.

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
    before = jnp.where(_by_query(prefix_mask, heads // groups), soft_capped(before, soft_cap), NEGATIVE)
    own = jnp.einsum("rqgmc,rgtc->rqgmt", grouped, suffix[0], preferred_element_type=jnp.float32)
    own = jnp.where(suffix_mask[:, :, None, None, :], soft_capped(own, soft_cap), NEGATIVE)

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


def _by_query(prefix_mask: jax.Array, heads: int) -> jax.Array:
    """[B, L] → [B, 1, 1, L]; [B, N, Q, L] → [B, 1, N·Q·heads, L], as `shared_prefix_attention` lays its queries out."""
    if prefix_mask.ndim == 2:
        return prefix_mask[:, None, None, :]
    users, length = prefix_mask.shape[0], prefix_mask.shape[-1]
    return jnp.repeat(prefix_mask.reshape(users, -1, length), heads, axis=1)[:, None]
