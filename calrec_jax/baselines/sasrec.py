"""SASRec: a causal transformer over item ids, with softmax over the whole catalogue.

Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018. Trained with cross-entropy over all items, not
with sampled negatives (Klenitskiy and Vasilev, "Turning Dross Into Gold Loss", RecSys 2023), it is a far stronger
baseline than as it was published. Notable: users are packed side by side into rows; one embedding serves input and
output.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp

from calrec_jax.errors import CalrecError

_MASKED = -1e9


@gin.configurable
@dataclasses.dataclass(frozen=True)
class SASRecConfig:
    """Sizes of the model.

    Attributes:
      width: D.
      layers: attention and feed-forward blocks.
      heads: H; divides `width`.
      mlp_width: F of the feed-forward part.
      positions: whether a learned vector for the distance to the sequence's end is added to each item.
      dropout_rate: of the embeddings, of both parts of a block, and of what they add.
      max_items: latest items of a sequence that are read.
    """

    width: int = 128
    layers: int = 1
    heads: int = 2
    mlp_width: int = 128
    positions: bool = False
    dropout_rate: float = 0.5
    max_items: int = 50

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "mlp_width", "max_items"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise CalrecError(f"SASRecConfig.{name}={getattr(self, name)!r}: must be a whole number of at least 1")
        if self.width % self.heads:
            raise CalrecError(f"SASRecConfig.width={self.width}: must divide by SASRecConfig.heads={self.heads}")
        if not 0 <= self.dropout_rate < 1:
            raise CalrecError(f"SASRecConfig.dropout_rate={self.dropout_rate}: must be at least 0 and below 1")


class SASRec(nn.Module):
    """The model; parameters are float32.

    Attributes:
      config: sizes.
      num_items: I.
    """

    config: SASRecConfig
    num_items: int

    @nn.compact
    def __call__(
        self, items: jax.Array, segments: jax.Array, from_end: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Hidden states [B, L, D] of packed rows; the scores of all items are `hidden · embedding`.

        Args:
          items: [B, L] int32.
          segments: [B, L] int32, 0 where nothing is; items see the earlier ones of their segment and themselves.
          from_end: [B, L] int32, inputs of the sequence after this one.
          deterministic: no dropout; otherwise the rng "dropout" is needed.
        """
        config = self.config

        def dropout(x: jax.Array) -> jax.Array:
            return nn.Dropout(config.dropout_rate)(x, deterministic=deterministic)

        embedding = self.param("embedding", nn.initializers.normal(0.02), (self.num_items, config.width))
        x = embedding[items]
        if config.positions:
            places = self.param("positions", nn.initializers.normal(0.02), (config.max_items, config.width))
            x = x + places[from_end]
        x = dropout(x)
        causal = jnp.tril(jnp.ones((items.shape[1], items.shape[1]), bool))
        seen = (segments[:, :, None] == segments[:, None, :]) & causal
        for layer in range(config.layers):
            normed = nn.LayerNorm(name=f"attention_norm_{layer}")(x)
            x = x + dropout(_Attention(config.heads, name=f"attention_{layer}")(normed, seen))
            normed = nn.LayerNorm(name=f"mlp_norm_{layer}")(x)
            inner = dropout(nn.relu(nn.Dense(config.mlp_width, name=f"mlp_in_{layer}")(normed)))
            x = x + dropout(nn.Dense(config.width, name=f"mlp_out_{layer}")(inner))
        return nn.LayerNorm(name="final_norm")(x)


class _Attention(nn.Module):
    """Attention of H heads over [B, L, D] under a mask [B, L (query), L (key)]."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
        width = x.shape[-1]
        query, key, value = (
            nn.Dense(width, name=name)(x).reshape(*x.shape[:2], self.heads, width // self.heads)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("blhc,bmhc->bhlm", query, key) / jnp.sqrt(width // self.heads)
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, _MASKED))
        joined = jnp.einsum("bhlm,bmhc->blhc", weights, value).reshape(x.shape)
        return nn.Dense(width, name="out")(joined)


def cross_entropy(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, segments: jax.Array) -> jax.Array:
    """Mean of −log softmax(hidden · embedding)[target] over the places where something is.

    Args:
      hidden: [B, L, D].
      embedding: [I, D].
      targets: [B, L] int32.
      segments: [B, L] int32, 0 where nothing is.
    """
    logits = jnp.einsum("bld,id->bli", hidden, embedding)
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    weights = (segments > 0).astype(losses.dtype)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1.0)
