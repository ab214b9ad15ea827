"""How much a training step computes, by the model's sizes, and how much a chip can."""

from __future__ import annotations

import dataclasses

from calrec_jax.models import attention_kernels, packed_attention
from calrec_jax.models.packed_attention import first_key
from calrec_jax.models.transformer import TransformerConfig
from calrec_jax.train.batching import Batching


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's memory in GiB and its peak rate of bfloat16 products in TFLOP/s, as its maker states them."""

    hbm_gib: float
    peak_tflops: float


# By JAX's device_kind; cloud.google.com/tpu/docs/system-architecture-tpu-vm.
CHIPS = {
    "TPU v4": Chip(32, 275),
    "TPU v5 lite": Chip(16, 197),
    "TPU v5": Chip(95, 459),
    "TPU v6 lite": Chip(32, 918),
}


def step_flops(config: TransformerConfig, batching: Batching, *, splash: bool = False) -> float:
    """Operations of the products of one step over the whole batch, the vocabulary's left out.

    Forward, and twice that backward: projections, gated MLP, rotary half-turns, causal attention (two products, five
    backward), pooling (no gradient of its masks) and the contrastive scores. `remat="full"` computes a block once more
    but for its last product, and several micro-batches take one forward pass more.

    Args:
      config: of the model.
      batching: of the step.
      splash: attention by the kernel; otherwise in blocks, as `packed_attention` has them. Both compute scores anew in
        the backward pass.
    """
    c, rows, length, examples = config, batching.batch_rows, batching.row_tokens, batching.row_examples
    d, h, g, w, f = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_width, c.mlp_dim
    pair = 2 * h * w  # of one product of all heads
    attention = attention_kernels if splash else packed_attention
    forward, backward = attention.FORWARD_PRODUCTS, attention.BACKWARD_PRODUCTS
    pairs = sum(_pairs(length, window, c.attention_block, splash) for window in _windows(c, length, splash))
    per_token = 2 * d * w * (2 * h + 2 * g) + 6 * d * f + 2 * w * w * (h + g)
    layers = c.num_layers * rows
    once = layers * length * per_token + rows * forward * pair * pairs
    back = 2 * layers * length * per_token + rows * backward * pair * pairs
    pooling = 3 * 2 * rows * examples * length * d
    contrast = 2 * 2 * (rows * examples) ** 2 * d
    again = batching.micro_batches > 1
    recomputed = (once - layers * length * 2 * f * d) if c.remat == "full" else 0
    return (1 + again) * once + back + recomputed + (2 + again) * pooling + 3 * contrast


def _windows(c: TransformerConfig, length: int, splash: bool) -> list[int | None]:
    """Of each layer, the window that its attention is computed with; None where that is all causality allows."""
    # One scanned body for both kinds computes what global ones do; of the kernel, whose calls are counted by their name
    # alone, layers that differ count so, too (docs/performance.md).
    if (c.scan_layers or splash) and len({*c.local_layers}) > 1:
        return [None] * c.num_layers
    return [c.sliding_window if local and (c.sliding_window or 0) < length else None for local in c.local_layers]


def _pairs(length: int, window: int | None, block: int, splash: bool) -> int:
    """Pairs of places whose scores attention computes in a row."""
    if splash:
        return attention_kernels.visited_pairs(length, window)
    begins = range(0, length, block)
    return sum((min(b + block, length) - b) * (min(b + block, length) - first_key(b, window)) for b in begins)


def weight_flops(parameters: int, embedding: int, tokens: float, weighted: float) -> float:
    """Operations of the products with weights alone, forward and backward: a lower bound of what training has to do.

    Args:
      parameters: of the model in all, without a table that is only read.
      embedding: of them, those of the table of the logits, which is multiplied only where a token bears loss.
      tokens: real ones.
      weighted: those that bear loss.
    """
    return 6.0 * ((parameters - embedding) * tokens + embedding * weighted)
