"""The decoder-only language model: RoPE, RMSNorm, grouped queries, gated MLP; what open models add is settings.

`hidden = model.apply(params, ..., method="activations")` is apart from `logits(hidden)`, so that pooling and both
losses share one pass and the loss decides how much of the vocabulary is ever materialised. Keys and values are explicit
results of `prefill` and explicit arguments of `decode`. Layers are scanned; parameters carry T5X's logical axis names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from calrec_jax.models import attention
from calrec_jax.models.config import REMAT_POLICIES, TransformerConfig
from calrec_jax.models.layers import Block, RMSNorm, partitioned, placed

__all__ = ["KeyValues", "Transformer", "TransformerConfig", "empty_suffix", "vocabulary_table"]

KeyValues = tuple[tuple[jax.Array, jax.Array], ...]  # a pair a layer


class Transformer(nn.Module):
    """The language model.

    Attributes:
      config: sizes.
      vocab_size: V.
      rows: where the rows of activations lie, when it trains over a mesh. Left to itself the partitioner splits
        activations along D, as it finds the weights, and sums them over all devices in every layer; told where the
        rows are, it gathers the weights instead (docs/performance.md has what that saves).
    """

    config: TransformerConfig
    vocab_size: int
    rows: NamedSharding | None = None

    def setup(self):
        """The embedding, the table of the logits where it is another one, the scanned blocks and the final norm."""
        c = self.config
        init = partitioned(nn.initializers.normal(1.0 / math.sqrt(c.embed_dim)), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, c.embed_dim), jnp.float32)
        if not c.tied_embeddings:
            self.head = self.param("head", init, (self.vocab_size, c.embed_dim), jnp.float32)
        self.embedding_dropout = nn.Dropout(c.dropout_rate)
        block: Any = Block
        if c.remat != "none":
            # static_argnums counts self; deterministic and keep_kv are Python values.
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False, static_argnums=(5, 6))
        self._local = jnp.array(c.local_layers) if len({*c.local_layers}) > 1 else None
        self.layers = nn.scan(
            block,
            length=c.num_layers,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.rows, None if self._local is not None else c.local_layers[0])
        self.final_norm = RMSNorm(c.norm_epsilon, c.norm_one_plus)

    def _embed(self, tokens: jax.Array, deterministic: bool) -> jax.Array:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.embed_dim)
        return self.embedding_dropout(placed(x, self.rows), deterministic=deterministic)

    def _run(self, x: jax.Array, cache: Any, context: dict[str, Any], deterministic: bool, keep_kv: bool):
        """Runs all blocks; keys and values come and go as one pair a layer (None where they are not kept)."""
        if self.is_initializing() or (self.config.scan_layers and cache is None):
            x, stacked = self.layers(x, None, self._local, context, deterministic, keep_kv)
            kv = tuple(jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(self.config.num_layers))
            return self.final_norm(x), kv
        kvs = []
        for i, layer in enumerate(self._unrolled(deterministic)):
            own = None if cache is None else (cache[0][i], cache[1][i])
            x, kv = layer(x, own, None, context, deterministic, keep_kv)
            kvs.append(kv)
        return self.final_norm(x), tuple(kvs)

    def _unrolled(self, deterministic: bool) -> list[Callable[..., Any]]:
        """The blocks one by one, over slices of the stacked parameters: a checkpoint does not know how it was run.

        A decoding step is never scanned: a scan would copy every layer's whole cache at each step. Nor is a small model
        on CPU, where the loop keeps XLA from fusing across its body (measured: 1.6 to 3 times slower a training step).
        """
        stacked = nn.meta.unbox(self.layers.variables["params"])
        layers: list[Callable[..., Any]] = []
        for i in range(self.config.num_layers):
            params = jax.tree.map(lambda a, i=i: a[i], stacked)
            rngs = {} if deterministic else {"dropout": self.make_rng("dropout")}
            block = Block(self.config, self.rows, self.config.local_layers[i], parent=None)

            def run(params, rngs, *arguments, block=block):
                return block.apply({"params": params}, *arguments, rngs=rngs)

            if self.config.remat != "none":
                # Arguments count from run's first; deterministic and keep_kv are Python values.
                run = jax.checkpoint(run, policy=REMAT_POLICIES[self.config.remat], static_argnums=(6, 7))
            layers.append(functools.partial(run, params, rngs))
        return layers

    def _context(self, positions: jax.Array) -> dict[str, Any]:
        """The angles of each kind of layer; "local" is None where they are those of the others."""
        c = self.config
        angles = attention.rope_angles(positions, c.head_width, c.rope_base, attention.RopeScaling.of(c))
        local_base = c.local_rope_base or c.rope_base
        if not any(c.local_layers) or (local_base == c.rope_base and c.rope_scaling == "none"):
            return {"global": angles, "local": None}
        return {"global": angles, "local": attention.rope_angles(positions, c.head_width, local_base)}

    def activations(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        """Last-layer hidden states after the final norm.

        Args:
          tokens: [B, L] int32 of packed rows.
          positions: [B, L] int32, each place's in its segment.
          segment_ids: [B, L] int32; 0 is padding.
          deterministic: False switches dropout on (needs the "dropout" rng).

        Returns:
          [B, L, D] in `config.dtype`.
        """
        context = self._context(positions) | {"segment_ids": segment_ids}
        return self._run(self._embed(tokens, deterministic), None, context, deterministic, False)[0]

    def prefill(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, KeyValues]:
        """`activations`, and each layer's keys [B, G, C, L] and values [B, G, L, C]: the prefix that `decode` reads."""
        context = self._context(positions) | {"segment_ids": segment_ids}
        return self._run(self._embed(tokens, True), None, context, True, True)

    def decode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        at: jax.Array | None,
        prefix: KeyValues,
        prefix_mask: jax.Array,
        suffix: KeyValues,
        suffix_mask: jax.Array,
        cells: attention.Cells | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """The next Q tokens of R rows, each over its user's prefix and its own suffix.

        Args:
          tokens: [R, Q] int32, the tokens to read.
          positions: [R, Q] int32, their positions in the joint segment.
          at: scalar int32, where in the suffix their keys and values go; None puts them behind it.
          prefix: what `prefill` gave, per layer keys [B, G, C, L] and values [B, G, L, C]; place p has position p.
          prefix_mask: [B, L] bool, the first places of each user.
          suffix: per layer keys and values [R, G, T, C]; see `empty_suffix`.
          suffix_mask: [R, Q, T] bool, or what broadcasts to it: the places of the suffix, these tokens' own among them,
            that each token attends to (T + Q places where `at` is None). For sliding windows: where `at` is given the
            suffix is a ring, whose place before `at` holds the token before; where it is None, place t < T holds the
            token of position length of the prompt + t.
          cells: which samples of which users the rows are; None: all N of each of the B users, in order.

        Returns:
          hidden [R, Q, D] and the suffix with these tokens written.
        """
        context = self._context(positions)
        masks = {"global": (prefix_mask, suffix_mask)}
        if any(self.config.local_layers):
            places = suffix[0][0].shape[2] + (tokens.shape[1] if at is None else 0)
            masks["local"] = attention.local_masks(
                prefix_mask, suffix_mask, positions, at, places, cells, cast(int, self.config.sliding_window)
            )
        context |= {"masks": masks, "at": at, "cells": cells}
        return self._run(self._embed(tokens, True), (prefix, suffix), context, True, True)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] → [..., V] float32."""
        table = self._table().astype(hidden.dtype)
        return self._capped(jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32))

    def logits_of(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        """[..., D] and [..., W] int32 → [..., W] float32, the logits of these tokens alone."""
        rows = self._table()[tokens].astype(hidden.dtype)
        return self._capped(jnp.einsum("...d,...wd->...w", hidden, rows, preferred_element_type=jnp.float32))

    def _table(self) -> jax.Array:
        return self.embedding if self.config.tied_embeddings else self.head

    def _capped(self, logits: jax.Array) -> jax.Array:
        return attention.soft_capped(logits, self.config.logit_soft_cap)

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Logits of every place, [B, L, V]; for initialisation and small uses."""
        return self.logits(self.activations(tokens, positions, segment_ids))


def vocabulary_table(params: Any) -> jax.Array:
    """The [V, D] table whose products with hidden states are the logits, of a model's parameters."""
    return params["head"] if "head" in params else params["embedding"]


def empty_suffix(config: TransformerConfig, rows: int, length: int) -> KeyValues:
    """Zeroed suffix: per layer keys and values [R, G, T, C]."""
    shape = (rows, config.num_kv_heads, length, config.head_width)
    return tuple((jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.num_layers))
