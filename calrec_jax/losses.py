"""The training objective of CALRec (Li et al., RecSys 2024): L = (1 − α − β)·L_NIG + α·L_TT + β·L_UT.

Notable: next-item generation never materialises the logits of a batch. Places that bear loss are moved to the front and
run through the vocabulary in chunks, as many as they fill; the same pass makes the gradient (a custom VJP), so logits
are computed once and only where a token is weighted. All functions are pure and work on a whole, possibly sharded,
batch: in-batch negatives are global. Over a mesh each device runs the chunks of its own rows, and the gradients of the
embedding are summed once, behind the last chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from calrec_jax.errors import CalrecError
from calrec_jax.models.attention import soft_capped
from calrec_jax.models.towers import mean_pool, unit

DIRECTIONS = ("item_to_context", "context_to_item", "symmetric")
NEGATIVE = -1e30
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and choices of the objective.

    Attributes:
      alpha: weight of L_TT, the target in context against the target alone.
      beta: weight of L_UT, the user against the target alone; L_NIG gets 1 − α − β.
      temperature: τ of both InfoNCE terms.
      direction: "item_to_context" (anchor v_T against the batch's context vectors), "context_to_item", or "symmetric"
        (their mean).
      mask_same: leave out negatives of the same user, item or text.
      normalise: L_NIG divides by the sum of weights over "tokens", or is a mean over "examples" of each one's weighted
        mean.
      chunk: places whose logits exist at once, a row of the batch: B · chunk of a device's B rows.
    """

    alpha: float = 0.125
    beta: float = 0.025
    temperature: float = 0.5
    direction: str = "item_to_context"
    mask_same: bool = True
    normalise: str = "tokens"
    chunk: int = 64

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise CalrecError(f"LossConfig.direction={self.direction!r}: must be one of {DIRECTIONS}")
        if self.normalise not in ("tokens", "examples"):
            raise CalrecError(f"LossConfig.normalise={self.normalise!r}: must be 'tokens' or 'examples'")
        if self.temperature <= 0:
            raise CalrecError(f"LossConfig.temperature={self.temperature}: must be above 0")
        if self.alpha < 0 or self.alpha + abs(self.beta) > 1:
            raise CalrecError(
                f"LossConfig.alpha={self.alpha}, beta={self.beta}: need alpha >= 0 and alpha + |beta| <= 1"
            )
        if self.chunk < 1:
            raise CalrecError(f"LossConfig.chunk={self.chunk}: must be at least 1")

    @property
    def generation(self) -> float:
        """Weight of L_NIG."""
        return 1 - self.alpha - self.beta


def _gather_weighted(hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int):
    """Moves each row's weighted places to its front; pads columns to a multiple of `chunk`."""
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    extra = -hidden.shape[1] % chunk
    order = jnp.pad(order, ((0, 0), (0, extra)), constant_values=0)
    real = jnp.arange(order.shape[1])[None, :] < jnp.sum(weights != 0, axis=1, keepdims=True)
    taken = jnp.where(real, jnp.take_along_axis(weights, order, axis=1), 0.0)
    chunks = (jnp.max(jnp.sum(weights != 0, axis=1)) + chunk - 1) // chunk
    return order, jnp.take_along_axis(targets, order, axis=1), taken, chunks


def _columns(array: jax.Array, index: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, index * chunk, chunk, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def weighted_token_loss(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    soft_cap: float | None = None,
    rows: NamedSharding | None = None,
) -> jax.Array:
    """Σ weight · −log softmax(hidden · embeddingᵀ)[target].

    Args:
      hidden: [B, L, D].
      embedding: [V, D] float32.
      targets: [B, L] int32.
      weights: [B, L] float32, at least 0; places of weight 0 cost nothing.
      chunk: columns at once; with `rows`, B · chunk places of whichever of a device's B rows.
      soft_cap: of the logits, which become cap · tanh(logit / cap).
      rows: where the rows lie on a mesh; None: on one device, or wherever the partitioner finds them.

    Returns:
      Scalar float32. Differentiable in `hidden` and `embedding`.
    """
    return _by_device(_token_loss, rows, 1)(hidden, embedding, targets, weights, chunk, soft_cap)


def _by_device(function, rows: NamedSharding | None, results: int):
    """`function`, of the arguments of `weighted_token_loss`, on each device's own rows; its sums are over all of them.

    Left to the partitioner, the loop over chunks sums the table's gradient over all devices at every turn. The mesh's
    other axes, over which the table may be split, stay the partitioner's.
    """
    if rows is None:
        return function
    if rows.mesh.size == 1:
        return _as_one_row(function)
    axes, spec = rows.spec[0], PartitionSpec(rows.spec[0])
    names = {axes} if isinstance(axes, str) else set(axes)

    def local(hidden, embedding, targets, weights, chunk, soft_cap):
        found = _as_one_row(function)(hidden, embedding, targets, weights, chunk, soft_cap)
        if results == 1:
            return jax.lax.psum(found, axes)
        total, d_hidden, d_embedding = found
        return jax.lax.psum(total, axes), d_hidden, jax.lax.psum(d_embedding, axes)

    def over(hidden, embedding, targets, weights, chunk, soft_cap):
        return jax.shard_map(
            functools.partial(local, chunk=chunk, soft_cap=soft_cap),
            mesh=rows.mesh,
            in_specs=(spec, PartitionSpec(), spec, spec),
            out_specs=PartitionSpec() if results == 1 else (PartitionSpec(), spec, PartitionSpec()),
            axis_names=names,
            check_vma=False,  # the loops' starts are the same everywhere, what they carry is not
        )(hidden, embedding, targets, weights)

    return over


def _as_one_row(function):
    """`function` of a device's rows as if they were one: as many chunks as all fill, not as the fullest row needs."""

    def over(hidden, embedding, targets, weights, chunk, soft_cap):
        rows, width = hidden.shape[0], hidden.shape[-1]
        one = hidden.reshape(1, -1, width), embedding, targets.reshape(1, -1), weights.reshape(1, -1)
        found = function(*one, chunk * rows, soft_cap)
        return (found[0], found[1].reshape(hidden.shape), found[2]) if isinstance(found, tuple) else found

    return over


def _token_loss(hidden, embedding, targets, weights, chunk, soft_cap):
    order, taken_targets, taken_weights, chunks = _gather_weighted(hidden, targets, weights, chunk)

    def body(index, total):
        h = jnp.take_along_axis(hidden, _columns(order, index, chunk)[..., None], axis=1)
        logits = jnp.einsum("bcd,vd->bcv", h, embedding.astype(h.dtype), preferred_element_type=jnp.float32)
        logits = soft_capped(logits, soft_cap)
        picked = jnp.take_along_axis(logits, _columns(taken_targets, index, chunk)[..., None], axis=-1)[..., 0]
        return total + jnp.sum(_columns(taken_weights, index, chunk) * (jax.nn.logsumexp(logits, axis=-1) - picked))

    return jax.lax.fori_loop(0, chunks, body, jnp.zeros((), jnp.float32))


def _token_loss_and_gradients(hidden, embedding, targets, weights, chunk, soft_cap):
    order, taken_targets, taken_weights, chunks = _gather_weighted(hidden, targets, weights, chunk)
    table = embedding.astype(hidden.dtype)
    turned = table.T
    width = hidden.shape[-1]

    def body(index, carry):
        total, d_taken, d_embedding = carry
        h = jnp.take_along_axis(hidden, _columns(order, index, chunk)[..., None], axis=1)
        h2 = h.reshape(-1, width)
        target = _columns(taken_targets, index, chunk).reshape(-1)
        weight = _columns(taken_weights, index, chunk).reshape(-1)
        # [V, places]: in this orientation all three products read their operands as they lie; the other one copies a
        # transposed [places, V] for the table's gradient, which took as long as the products themselves on CPU.
        logits = jnp.einsum("vd,nd->vn", table, h2, preferred_element_type=jnp.float32)
        logits = soft_capped(logits, soft_cap)
        top = logits.max(0)
        shifted = jnp.exp(logits - top)  # once: the normaliser and the gradient both need it
        normaliser = shifted.sum(0)
        rows = jnp.take(table, target, axis=0).astype(jnp.float32)  # as rounded as the logits are
        picked = soft_capped(jnp.sum(h2.astype(jnp.float32) * rows, axis=-1), soft_cap)
        total += jnp.sum(weight * (jnp.log(normaliser) + top - picked))
        d_logits = (shifted * (weight / normaliser) * _cap_slope(logits, soft_cap)).astype(h.dtype)
        d_picked = weight * _cap_slope(picked, soft_cap)
        # The −1 at the target is applied as rows of the table and of h: no one-hot of width V.
        d_h = jnp.einsum("dv,vn->dn", turned, d_logits, preferred_element_type=jnp.float32).T
        d_h -= d_picked[:, None] * rows
        d_embedding += jnp.einsum("vn,nd->vd", d_logits, h2, preferred_element_type=jnp.float32)
        d_embedding = d_embedding.at[target].add(-d_picked[:, None] * h2.astype(jnp.float32))
        d_taken = jax.lax.dynamic_update_slice_in_dim(d_taken, d_h.reshape(h.shape), index * chunk, axis=1)
        return total, d_taken, d_embedding

    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((*order.shape, width), jnp.float32),
        jnp.zeros(embedding.shape, jnp.float32),
    )
    total, d_taken, d_embedding = jax.lax.fori_loop(0, chunks, body, start)
    # Back to the places the columns came from: `order` is a permutation of a row, so its inverse is a gather.
    inverse = jnp.argsort(order[:, : hidden.shape[1]], axis=1)
    d_hidden = jnp.take_along_axis(d_taken, inverse[..., None], axis=1).astype(hidden.dtype)
    return total, d_hidden, d_embedding


def _cap_slope(capped: jax.Array, cap: float | None) -> jax.Array | float:
    """The slope of cap · tanh(x / cap), from its value."""
    return 1.0 if cap is None else 1 - jnp.square(capped / cap)


def _weighted_token_loss_forward(hidden, embedding, targets, weights, chunk, soft_cap, rows):
    run = _by_device(_token_loss_and_gradients, rows, 3)
    total, *gradients = run(hidden, embedding, targets, weights, chunk, soft_cap)
    return total, gradients


def _weighted_token_loss_backward(chunk, soft_cap, rows, residual, cotangent):
    d_hidden, d_embedding = residual
    return (cotangent * d_hidden).astype(d_hidden.dtype), cotangent * d_embedding, None, None


weighted_token_loss.defvjp(_weighted_token_loss_forward, _weighted_token_loss_backward)


def example_normalised_weights(weights: jax.Array, segment_ids: jax.Array, row_examples: int) -> jax.Array:
    """Scales token weights so that each example's sum to 1 (examples without loss stay 0).

    Args:
      weights: [B, L] float32.
      segment_ids: [B, L] int32; example k (0-based) is segments 2k+1 and 2k+2.
      row_examples: K.

    Returns:
      [B, L] float32.
    """
    example = (segment_ids + 1) // 2
    member = (example[:, None, :] == jnp.arange(1, row_examples + 1)[None, :, None]).astype(jnp.float32)
    total = jnp.einsum("bkl,bl->bk", member, weights)
    return weights * jnp.einsum("bkl,bk->bl", member, 1.0 / jnp.where(total > 0, total, 1.0))


def info_nce(
    anchors: jax.Array, candidates: jax.Array, mask: jax.Array, excluded: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """InfoNCE with in-batch negatives (van den Oord et al., 2018), cosine similarity.

    Args:
      anchors: [E, D] unit vectors.
      candidates: [E, D] unit vectors; row e's positive is candidate e.
      mask: [E] float32, 1 for real examples.
      excluded: [E, E] bool, pairs that are no negatives; the diagonal is ignored.
      temperature: τ.

    Returns:
      (sum over real anchors of −log softmax, sum over real anchors of "the positive is the top candidate").
    """
    scores = anchors @ candidates.T / temperature
    diagonal = jnp.eye(len(scores), dtype=bool)
    allowed = (mask[None, :] > 0) & (~excluded | diagonal)
    scores = jnp.where(allowed, scores, NEGATIVE)
    positive = jnp.diagonal(scores)
    losses = jax.nn.logsumexp(scores, axis=1) - positive
    return jnp.sum(losses * mask), jnp.sum((positive >= scores.max(1)) * mask)


def _contrast(item: jax.Array, context: jax.Array, mask: jax.Array, excluded: jax.Array, config: LossConfig):
    if config.direction == "item_to_context":
        return info_nce(item, context, mask, excluded, config.temperature)
    if config.direction == "context_to_item":
        return info_nce(context, item, mask, excluded, config.temperature)
    one = info_nce(item, context, mask, excluded, config.temperature)
    other = info_nce(context, item, mask, excluded, config.temperature)
    return (one[0] + other[0]) / 2, (one[1] + other[1]) / 2


class Pooled(NamedTuple):
    """Unit vectors of the towers of all E = B·K places for examples, [E, D] float32 each.

    Attributes:
      user: v_U, over the history.
      target: v_T|U, over the target in its context.
      item: v_T, over the target alone.
    """

    user: jax.Array
    target: jax.Array
    item: jax.Array


def pooled_towers(hidden: jax.Array, batch: Batch) -> Pooled:
    """The three towers of each example of packed rows [B, L, D]."""
    row_examples = batch["example_mask"].shape[1]
    pools = (batch[f"{name}_pool"] for name in Pooled._fields)
    return Pooled(*(unit(mean_pool(hidden, pool, row_examples)).reshape(-1, hidden.shape[-1]) for pool in pools))


def generation_weights(batch: Batch, config: LossConfig) -> jax.Array:
    """[B, L] float32 weights of the tokens in L_NIG, before the division by their sum over the whole batch."""
    weights = batch["decoder_loss_weights"]
    if config.normalise == "tokens":
        return weights
    return example_normalised_weights(weights, batch["decoder_segment_ids"], batch["example_mask"].shape[1])


def contrastive_loss(pooled: Pooled, batch: Batch, config: LossConfig) -> tuple[jax.Array, Metrics]:
    """α·L_TT + β·L_UT over all examples of the batch, each the other's negatives.

    Args:
      pooled: of the batch's examples, row by row.
      batch: `example_mask` and the ids of user, item and text are read.
      config: weights and choices.

    Returns:
      (scalar, metrics as `calrec_loss` has them).
    """
    mask = batch["example_mask"].reshape(-1)
    excluded = jnp.zeros((len(mask), len(mask)), bool)
    if config.mask_same:
        for key in ("target_user", "target_item", "target_text"):
            ids = batch[key].reshape(-1)
            excluded |= ids[:, None] == ids[None, :]
    target_target, tt_hits = _contrast(pooled.item, pooled.target, mask, excluded, config)
    user_target, ut_hits = _contrast(pooled.item, pooled.user, mask, excluded, config)
    count = jnp.sum(mask)
    loss = config.alpha * mean_of(target_target, count) + config.beta * mean_of(user_target, count)
    return loss, _with_weights(
        loss_target_target=(target_target, count),
        loss_user_target=(user_target, count),
        accuracy_target_target=(tt_hits, count),
        accuracy_user_target=(ut_hits, count),
    )


def calrec_loss(
    hidden: jax.Array,
    embedding: jax.Array,
    batch: Batch,
    config: LossConfig,
    soft_cap: float | None = None,
    rows: NamedSharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """The whole objective over one packed batch.

    Args:
      hidden: [B, L, D] of `Transformer.activations`.
      embedding: [V, D] table of the logits; see `transformer.vocabulary_table`.
      batch: the batch contract of docs/architecture.md.
      config: weights and choices.
      soft_cap: of the logits; the model's.
      rows: where the rows lie on a mesh, see `weighted_token_loss`.

    Returns:
      (scalar loss, metrics as pairs of float32 sums "<name>" and "<name>_weight", to be divided only when reported).
    """
    weights = generation_weights(batch, config)
    weight_sum = jnp.sum(weights)
    targets = batch["decoder_target_tokens"]
    generation = weighted_token_loss(hidden, embedding, targets, weights, config.chunk, soft_cap, rows)
    contrastive, metrics = contrastive_loss(pooled_towers(hidden, batch), batch, config)
    loss = config.generation * mean_of(generation, weight_sum) + contrastive
    return loss, metrics | loss_metrics(loss, generation, weight_sum)


def loss_metrics(loss: jax.Array, generation: jax.Array, weight_sum: jax.Array) -> Metrics:
    """The metrics of the whole objective and of its first term."""
    return _with_weights(loss=(loss, jnp.ones((), jnp.float32)), loss_next_item=(generation, weight_sum))


def mean_of(total: jax.Array, weight: jax.Array) -> jax.Array:
    """`total` by its weight; 0 where nothing has weight."""
    return total / jnp.maximum(weight, 1e-9)


def _with_weights(**metrics: tuple[jax.Array, jax.Array]) -> Metrics:
    return {k: v for name, (total, w) in metrics.items() for k, v in ((name, total), (f"{name}_weight", w))}
