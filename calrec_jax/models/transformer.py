"""The decoder-only language model: RoPE, RMSNorm, grouped queries, gated MLP, tied embeddings.

`hidden = model.apply(params, ..., method="activations")` is apart from `logits(hidden)`, so that pooling and both
losses share one pass and the loss decides how much of the vocabulary is ever materialised. Keys and values are explicit
results of `prefill` and explicit arguments of `decode`. Layers are scanned; parameters carry T5X's logical axis names.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from calrec_jax.errors import CalrecError
from calrec_jax.models import attention, attention_kernels

ACTIVATIONS = {"gelu": nn.gelu, "silu": nn.silu}
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
KeyValues = tuple[tuple[jax.Array, jax.Array], ...]  # a pair a layer


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of a decoder.

    Attributes:
      embed_dim: D.
      num_layers: number of blocks.
      num_heads: H.
      num_kv_heads: G; H must be a multiple.
      head_dim: C; None is D / H.
      mlp_dim: F, of each of the gate and the value.
      activation: "gelu" (GeGLU) or "silu" (SwiGLU).
      dropout_rate: on the embeddings and on what each block adds to the residual stream, in training only.
      rope_base: wavelength base of the rotary embedding.
      norm_epsilon: of RMSNorm.
      dtype: of activations and matrix products; parameters, softmax, norms and losses stay float32.
      remat: "none", "dots" (keep matrix products) or "full" (recompute a block in the backward pass).
      scan_layers: one traced block for all layers. False unrolls: slower to compile, faster for small models on CPU.
      attention_block: query places that attend together; see `attention.packed_attention`.
      attention: of packed rows, "xla", "splash" (a kernel of TPUs), or "auto": the kernel on a TPU where rows divide
        by 128 tokens.
    """

    embed_dim: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int | None = None
    mlp_dim: int = 352
    activation: str = "gelu"
    dropout_rate: float = 0.0
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    attention_block: int = 128
    attention: str = "auto"

    def __post_init__(self):
        for name in ("embed_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim", "attention_block"):
            if getattr(self, name) < 1:
                raise CalrecError(f"TransformerConfig.{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.dropout_rate < 1:
            raise CalrecError(f"TransformerConfig.dropout_rate={self.dropout_rate}: must be at least 0 and below 1")
        if self.num_heads % self.num_kv_heads:
            raise CalrecError(f"num_heads={self.num_heads}: must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise CalrecError(f"embed_dim={self.embed_dim}: must divide by num_heads={self.num_heads}, or set head_dim")
        if self.head_width % 2:
            raise CalrecError(f"head_dim={self.head_width}: rotary embeddings need an even head_dim")
        if self.activation not in ACTIVATIONS:
            raise CalrecError(f"activation={self.activation!r}: must be one of {sorted(ACTIVATIONS)}")
        if self.remat not in ("none", *REMAT_POLICIES):
            raise CalrecError(f"remat={self.remat!r}: must be one of {['none', *sorted(REMAT_POLICIES)]}")
        if self.attention not in attention_kernels.IMPLEMENTATIONS:
            raise CalrecError(f"attention={self.attention!r}: must be one of {attention_kernels.IMPLEMENTATIONS}")
        if self.dtype not in ("float32", "bfloat16"):
            raise CalrecError(f"dtype={self.dtype!r}: must be 'float32' or 'bfloat16'")

    @property
    def head_width(self) -> int:
        """C."""
        return self.head_dim or self.embed_dim // self.num_heads

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be restored: all that shapes parameters or the function they compute."""
        runtime = ("dropout_rate", "dtype", "remat", "scan_layers", "attention_block", "attention")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in runtime}


def _partitioned(init: nn.initializers.Initializer, axes: tuple[str, ...]) -> Callable[..., jax.Array]:
    """An initialiser whose parameter carries logical axis names.

    `Module.param` hands the array out without its box; the types of flax do not say so.
    """
    return cast(Callable[..., jax.Array], nn.with_logical_partitioning(init, axes))


def _placed(x: jax.Array, rows: NamedSharding | None, split: int | None = None) -> jax.Array:
    """`x` with its rows where `rows` has them and, where it divides, dimension `split` over the mesh's axis "model".

    Nothing else is split. Where `rows` is None or one device, `x` as it comes.
    """
    if rows is None or rows.mesh.size == 1:
        return x
    if split is None or x.shape[split] % rows.mesh.shape["model"]:
        return jax.lax.with_sharding_constraint(x, rows)
    between = [None] * (split - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, PartitionSpec(*rows.spec, *between, "model")))


class RMSNorm(nn.Module):
    """x / rms(x) · scale (Zhang & Sennrich, 2019), in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [..., D] over its last axis, in the type of `x`."""
        scale = self.param("scale", _partitioned(nn.initializers.ones, ("embed",)), (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (normed * scale).astype(x.dtype)


class Einsum(nn.Module):
    """A weight and the einsum that applies it."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        """Multiplies `x` by the weight, its second operand, as `equation` says; in the type of `x`."""
        init = nn.initializers.normal(self.scale / math.sqrt(self.fan_in))
        kernel = self.param("kernel", _partitioned(init, self.axes), self.shape, jnp.float32)
        return jnp.einsum(equation, x, kernel.astype(x.dtype))


class Block(nn.Module):
    """Pre-norm attention and gated MLP; `rows` as in `Transformer`."""

    config: TransformerConfig
    rows: NamedSharding | None = None

    def setup(self):
        """The projections, the two norms and the dropout."""
        c = self.config
        d, h, g, w, f = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_width, c.mlp_dim
        residual = 1.0 / math.sqrt(2 * c.num_layers)  # keeps the residual stream's variance flat in depth (GPT-2)
        self.attention_norm, self.mlp_norm = RMSNorm(c.norm_epsilon), RMSNorm(c.norm_epsilon)
        self.query = Einsum((d, h, w), ("embed", "heads", "kv"), d)
        # Each its own product: slices of a joint one cost a padded copy each in the backward pass.
        self.key = Einsum((d, g, w), ("embed", "heads", "kv"), d)
        self.value = Einsum((d, g, w), ("embed", "heads", "kv"), d)
        self.output = Einsum((h, w, d), ("heads", "kv", "embed"), h * w, residual)
        self.gate = Einsum((d, f), ("embed", "mlp"), d)
        self.up = Einsum((d, f), ("embed", "mlp"), d)
        self.down = Einsum((f, d), ("mlp", "embed"), f, residual)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(self, x: jax.Array, cache: Any, context: dict[str, Any], deterministic: bool, keep_kv: bool):
        """Runs the block over packed rows, or over the next tokens of R rows that have a prefix.

        Args:
          x: [B, L, D], or [R, Q, D] of a step.
          cache: None, or the layer's (prefix, suffix) keys and values of a step; see `Transformer.decode`.
          context: what all layers share: "sin", "cos", and "segment_ids", or what `Transformer.decode` is given.
          deterministic: False switches dropout on.
          keep_kv: whether a packed row's keys and values are wanted.

        Returns:
          (like `x`, keys and values: of the row, the suffix with this step written, or None).
        """
        normed = self.attention_norm(x)
        query = self.query("...d,dhc->...hc", normed) * self.config.head_width**-0.5
        key, value = self.key("...d,dgc->...gc", normed), self.value("...d,dgc->...gc", normed)
        query, key, value = (_placed(x, self.rows, split=2) for x in (query, key, value))
        query = attention.apply_rope(query, context["sin"], context["cos"])
        key = attention.apply_rope(key, context["sin"], context["cos"])
        kv: Any = None
        if cache is None:
            mixed = attention_kernels.packed_attention(
                query, key, value, context["segment_ids"], self.config.attention_block,
                setting=self._attention(keep_kv), rows=self.rows,
            )  # fmt: skip
            kv = attention.decoding_layout(key, value) if keep_kv else None
        else:
            prefix, suffix = cache
            new = key.swapaxes(1, 2), value.swapaxes(1, 2)
            if context["at"] is None:
                kv = tuple(jnp.concatenate(pair, axis=2) for pair in zip(suffix, new, strict=True))
            else:
                at = context["at"]
                kv = tuple(
                    jax.lax.dynamic_update_slice_in_dim(old, x, at, 2) for old, x in zip(suffix, new, strict=True)
                )
            mixed = attention.shared_prefix_attention(
                query, prefix, context["prefix_mask"], kv, context["suffix_mask"], context["cells"]
            )
        x = _placed(x + self.dropout(self.output("...hc,hcd->...d", mixed), deterministic=deterministic), self.rows)
        normed = self.mlp_norm(x)
        gate, up = (_placed(part("...d,df->...f", normed), self.rows, split=2) for part in (self.gate, self.up))
        hidden = ACTIVATIONS[self.config.activation](gate) * up
        x = x + self.dropout(self.down("...f,fd->...d", hidden), deterministic=deterministic)
        return _placed(x, self.rows), kv

    def _attention(self, keep_kv: bool) -> str:
        """Only training's rows are of the length that was asked for; prompts and an initialisation's row are not."""
        setting = self.config.attention
        if setting != "splash":
            return setting
        return "xla" if self.is_initializing() else "auto" if keep_kv else setting


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
        """The tied embedding, the scanned blocks and the final norm."""
        c = self.config
        init = _partitioned(nn.initializers.normal(1.0 / math.sqrt(c.embed_dim)), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, c.embed_dim), jnp.float32)
        self.embedding_dropout = nn.Dropout(c.dropout_rate)
        block: Any = Block
        if c.remat != "none":
            # static_argnums counts self; deterministic and keep_kv are Python values.
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False, static_argnums=(4, 5))
        self.layers = nn.scan(
            block,
            length=c.num_layers,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.rows)
        self.final_norm = RMSNorm(c.norm_epsilon)

    def _embed(self, tokens: jax.Array, deterministic: bool) -> jax.Array:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype) * math.sqrt(self.config.embed_dim)
        return self.embedding_dropout(_placed(x, self.rows), deterministic=deterministic)

    def _run(self, x: jax.Array, cache: Any, context: dict[str, Any], deterministic: bool, keep_kv: bool):
        """Runs all blocks; keys and values come and go as one pair a layer (None where they are not kept)."""
        if self.is_initializing() or (self.config.scan_layers and cache is None):
            x, stacked = self.layers(x, None, context, deterministic, keep_kv)
            kv = tuple(jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(self.config.num_layers))
            return self.final_norm(x), kv
        kvs = []
        for i, layer in enumerate(self._unrolled(deterministic)):
            x, kv = layer(x, None if cache is None else (cache[0][i], cache[1][i]), context, deterministic, keep_kv)
            kvs.append(kv)
        return self.final_norm(x), tuple(kvs)

    def _unrolled(self, deterministic: bool) -> list[Callable[..., Any]]:
        """The blocks one by one, over slices of the stacked parameters: a checkpoint does not know how it was run.

        A decoding step is never scanned: a scan would copy every layer's whole cache at each step. Nor is a small model
        on CPU, where the loop keeps XLA from fusing across its body (measured: 1.6 to 3 times slower a training step).
        """
        stacked = nn.meta.unbox(self.layers.variables["params"])
        block = Block(self.config, self.rows, parent=None)
        layers: list[Callable[..., Any]] = []
        for i in range(self.config.num_layers):
            params = jax.tree.map(lambda a, i=i: a[i], stacked)
            rngs = {} if deterministic else {"dropout": self.make_rng("dropout")}

            def run(params, rngs, *arguments):
                return block.apply({"params": params}, *arguments, rngs=rngs)

            if self.config.remat != "none":
                # Arguments count from run's first; deterministic and keep_kv are Python values.
                run = jax.checkpoint(run, policy=REMAT_POLICIES[self.config.remat], static_argnums=(5, 6))
            layers.append(functools.partial(run, params, rngs))
        return layers

    def _context(self, positions: jax.Array) -> dict[str, Any]:
        sin, cos = attention.rope_angles(positions, self.config.head_width, self.config.rope_base)
        return {"sin": sin, "cos": cos}

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
          prefix: what `prefill` gave, per layer keys [B, G, C, L] and values [B, G, L, C].
          prefix_mask: [B, L] bool.
          suffix: per layer keys and values [R, G, T, C]; see `empty_suffix`.
          suffix_mask: [R, Q, T] bool, or what broadcasts to it: the places of the suffix, these tokens' own among them,
            that each token attends to (T + Q places where `at` is None).
          cells: which samples of which users the rows are; None: all N of each of the B users, in order.

        Returns:
          hidden [R, Q, D] and the suffix with these tokens written.
        """
        context = self._context(positions)
        context |= {"prefix_mask": prefix_mask, "at": at, "suffix_mask": suffix_mask, "cells": cells}
        return self._run(self._embed(tokens, True), (prefix, suffix), context, True, True)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] → [..., V] float32 by the tied embedding."""
        return jnp.einsum(
            "...d,vd->...v", hidden, self.embedding.astype(hidden.dtype), preferred_element_type=jnp.float32
        )

    def logits_of(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        """[..., D] and [..., W] int32 → [..., W] float32, the logits of these tokens alone."""
        rows = self.embedding[tokens].astype(hidden.dtype)
        return jnp.einsum("...d,...wd->...w", hidden, rows, preferred_element_type=jnp.float32)

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Logits of every place, [B, L, V]; for initialisation and small uses."""
        return self.logits(self.activations(tokens, positions, segment_ids))


def empty_suffix(config: TransformerConfig, rows: int, length: int) -> KeyValues:
    """Zeroed suffix: per layer keys and values [R, G, T, C]."""
    shape = (rows, config.num_kv_heads, length, config.head_width)
    return tuple((jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.num_layers))
