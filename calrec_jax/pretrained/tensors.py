"""Which tensor of a Hugging Face folder is which parameter of ours, and how it lies there.

Notable: theirs has a tensor a layer and keeps a linear map as [out, in]; ours is stacked over the layers, [in, out],
with heads an axis of their own. A `Leaf` knows both, so that import and export are one table read in two directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from calrec_jax.models.config import TransformerConfig

PREFIX = "model."
# Where the text model stands in folders of models of text and images, of two generations of transformers.
PREFIXES = (PREFIX, "language_model.model.", "model.language_model.")
HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter of ours and its tensor, or tensors, a layer each.

    Attributes:
      path: in the tree of parameters.
      name: of the tensor, behind the prefix; "{i}" stands for the layer.
      shape: of a layer of ours.
      hf_shape: of a tensor.
      layers: how many tensors are stacked; 0: it is one, and not of a layer.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    hf_shape: tuple[int, ...]
    layers: int = 0

    @property
    def turned(self) -> bool:
        """Whether it is a linear map, which theirs keeps as [out, in]."""
        return len(self.hf_shape) == 2 and self.layers > 0

    def names(self, prefix: str = PREFIX) -> list[str]:
        """The tensors in the order of the layers."""
        if self.name == HEAD:
            return [HEAD]
        return [prefix + self.name.format(i=i) for i in range(self.layers or 1)]

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """A view of a tensor in the shape of a layer of ours."""
        return (tensor.T if self.turned else tensor).reshape(self.shape)

    def theirs(self, layer: np.ndarray) -> np.ndarray:
        """The tensor of a layer of ours."""
        if not self.turned:
            return layer.reshape(self.hf_shape)
        return layer.reshape(self.hf_shape[::-1]).T

    def of(self, params: Any) -> Any:
        """The parameter in a tree."""
        for name in self.path:
            params = params[name]
        return params


def leaves(config: TransformerConfig, vocab_size: int) -> Iterator[Leaf]:
    """All parameters of a model, in the order of its layers' computation."""
    c = config
    d, h, g, w, f = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_width, c.mlp_dim
    yield Leaf(("embedding",), "embed_tokens.weight", (vocab_size, d), (vocab_size, d))

    def layer(ours: str, theirs: str, shape: tuple[int, ...], inputs: int | None = None, kind: str = "kernel") -> Leaf:
        size = math.prod(shape)
        hf_shape = (size,) if inputs is None else (size // inputs, inputs)
        return Leaf(("layers", ours, kind), f"layers.{{i}}.{theirs}", shape, hf_shape, c.num_layers)

    yield layer("attention_norm", "input_layernorm.weight", (d,), kind="scale")
    for ours, theirs, heads in (("query", "q", h), ("key", "k", g), ("value", "v", g)):
        yield layer(ours, f"self_attn.{theirs}_proj.weight", (d, heads, w), d)
        if c.qkv_bias:
            yield layer(ours, f"self_attn.{theirs}_proj.bias", (heads, w), kind="bias")
    if c.qk_norm:
        yield layer("query_norm", "self_attn.q_norm.weight", (w,), kind="scale")
        yield layer("key_norm", "self_attn.k_norm.weight", (w,), kind="scale")
    yield layer("output", "self_attn.o_proj.weight", (h, w, d), h * w)
    if c.post_norms:
        yield layer("attention_post_norm", "post_attention_layernorm.weight", (d,), kind="scale")
        yield layer("mlp_norm", "pre_feedforward_layernorm.weight", (d,), kind="scale")
    else:
        yield layer("mlp_norm", "post_attention_layernorm.weight", (d,), kind="scale")
    yield layer("gate", "mlp.gate_proj.weight", (d, f), d)
    yield layer("up", "mlp.up_proj.weight", (d, f), d)
    yield layer("down", "mlp.down_proj.weight", (f, d), f)
    if c.post_norms:
        yield layer("mlp_post_norm", "post_feedforward_layernorm.weight", (d,), kind="scale")
    yield Leaf(("final_norm", "scale"), "norm.weight", (d,), (d,))
    if not c.tied_embeddings:
        yield Leaf(("head",), HEAD, (vocab_size, d), (vocab_size, d))
