"""The loss of a whole batch and its gradients, in one piece or in micro-batches, with the same result.

Notable: a sum over tokens accumulates over micro-batches; a contrastive loss does not, since each example is every
other one's negative. So the towers of all micro-batches are pooled first, the loss and its gradient are taken at those
vectors, and a second pass pulls that gradient through each micro-batch beside next-item generation's (GradCache, Gao et
al. 2021, arXiv 2101.06983): one forward pass more, and memory for one micro-batch's activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from calrec_jax import losses
from calrec_jax.losses import LossConfig, Metrics, Pooled
from calrec_jax.models.transformer import Transformer, vocabulary_table
from calrec_jax.train.lora import join

Batch = dict[str, jax.Array]
ROWS = ("replica", "data", "fsdp")  # mesh axes that a batch's rows are split over
Gradients = Callable[[Any, Batch, jax.Array, Any], tuple[Metrics, Any]]


def activations(model: Transformer, params: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """[B, L, D] hidden states of a batch; with dropout when `rng` is given."""
    hidden = model.apply(
        {"params": params},
        batch["decoder_input_tokens"],
        batch["decoder_positions"],
        batch["decoder_segment_ids"],
        method="activations",
        deterministic=rng is None,
        rngs={} if rng is None else {"dropout": rng},
    )
    return cast(jax.Array, hidden)  # flax's type leaves room for mutated variables beside it


def over(model: Transformer, mesh: Mesh) -> Transformer:
    """The model told where the rows of a batch lie on the mesh, and with it on what kind of device."""
    return model.clone(rows=NamedSharding(mesh, PartitionSpec(ROWS)))


def make_gradients(model: Transformer, config: LossConfig, seed: int, mesh: Mesh, micro_batches: int = 1) -> Gradients:
    """Builds `gradients(params, batch, step, frozen) -> (metrics, gradients)`, to be jitted over `mesh`.

    `frozen` are parameters beside `params` that have no gradient (`lora.join`), or None.

    Args:
      model: the decoder.
      config: of the loss.
      seed: of dropout; each step and micro-batch has its own stream.
      mesh: over whose axes `ROWS` the batch lies.
      micro_batches: M; 1 is the plain gradient. Without dropout every M gives the same up to rounding.
    """
    dropout, soft_cap = model.config.dropout_rate > 0, model.config.logit_soft_cap
    model = over(model, mesh)

    def rng(step: jax.Array) -> jax.Array | None:
        return jax.random.fold_in(jax.random.key(seed, impl="rbg"), step) if dropout else None

    def whole(params: Any, batch: Batch, step: jax.Array, frozen: Any = None) -> tuple[Metrics, Any]:
        def loss(params: Any) -> tuple[jax.Array, Metrics]:
            params = join(frozen, params)
            hidden = activations(model, params, batch, rng(step))
            return losses.calrec_loss(hidden, vocabulary_table(params), batch, config, soft_cap, model.rows)

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return metrics, grads

    def accumulated(params: Any, batch: Batch, step: jax.Array, frozen: Any = None) -> tuple[Metrics, Any]:
        parts = {name: _split(x, micro_batches, mesh) for name, x in batch.items()}
        index, row_examples = jnp.arange(micro_batches), batch["example_mask"].shape[1]
        weight_sum = jnp.sum(losses.generation_weights(batch, config))

        def hidden_of(params: Any, part: Batch, index: jax.Array) -> jax.Array:
            key = rng(step)
            return activations(model, params, part, None if key is None else jax.random.fold_in(key, index))

        def pool(_, inputs: tuple[Batch, jax.Array]) -> tuple[None, Pooled]:
            return None, losses.pooled_towers(hidden_of(join(frozen, params), *inputs), inputs[0])

        def surrogate(params: Any, part: Batch, index: jax.Array, d_pooled: Pooled) -> tuple[jax.Array, jax.Array]:
            """Has the gradient that the whole loss has through this micro-batch; and its sum of L_NIG."""
            params = join(frozen, params)
            hidden = hidden_of(params, part, index)
            weights = losses.generation_weights(part, config)
            targets = part["decoder_target_tokens"]
            total = losses.weighted_token_loss(
                hidden, vocabulary_table(params), targets, weights, config.chunk, soft_cap, model.rows
            )
            pulled = jax.tree.map(jnp.vdot, d_pooled, losses.pooled_towers(hidden, part))
            return config.generation * losses.mean_of(total, weight_sum) + sum(pulled), total

        def accumulate(carry: tuple[Any, jax.Array], inputs: tuple[Batch, jax.Array, Pooled]):
            (_, total), grads = jax.value_and_grad(surrogate, has_aux=True)(params, *inputs)
            return jax.tree.map(jnp.add, carry, (grads, total)), None

        _, pooled_parts = jax.lax.scan(pool, None, (parts, index))
        (contrastive, metrics), d_pooled = jax.value_and_grad(losses.contrastive_loss, has_aux=True)(
            jax.tree.map(lambda x: _join(x, row_examples), pooled_parts), batch, config
        )
        zero = jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32)
        d_parts = jax.tree.map(lambda x: _split(x, micro_batches, mesh, row_examples), d_pooled)
        (grads, generation), _ = jax.lax.scan(accumulate, zero, (parts, index, d_parts))
        loss = config.generation * losses.mean_of(generation, weight_sum) + contrastive
        return metrics | losses.loss_metrics(loss, generation, weight_sum), grads

    return whole if micro_batches == 1 else accumulated


def _split(x: jax.Array, parts: int, mesh: Mesh, inner: int = 1) -> jax.Array:
    """[B·inner, ...] → [M, B/M·inner, ...], rows m, m + M, … in part m: no row leaves its device."""
    split = x.reshape(-1, parts, inner, *x.shape[1:]).swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])
    return jax.lax.with_sharding_constraint(split, NamedSharding(mesh, PartitionSpec(None, ROWS)))


def _join(x: jax.Array, inner: int) -> jax.Array:
    """The inverse of `_split`."""
    parts = len(x)
    return x.reshape(parts, -1, inner, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
