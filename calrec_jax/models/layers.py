"""What blocks are made of: RMSNorm, products with a weight, the block itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from calrec_jax.models import attention, attention_kernels
from calrec_jax.models.config import ACTIVATIONS, TransformerConfig


def partitioned(init: nn.initializers.Initializer, axes: tuple[str, ...]) -> Callable[..., jax.Array]:
    """An initialiser whose parameter carries logical axis names.

    `Module.param` hands the array out without its box; the types of flax do not say so.
    """
    return cast(Callable[..., jax.Array], nn.with_logical_partitioning(init, axes))


def placed(x: jax.Array, rows: NamedSharding | None, split: int | None = None) -> jax.Array:
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
    """x / rms(x) · scale (Zhang & Sennrich, 2019), in float32; with `one_plus`, · (1 + scale)."""

    epsilon: float
    one_plus: bool = False
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [..., D] over its last axis, in the type of `x`."""
        init = nn.initializers.zeros if self.one_plus else nn.initializers.ones
        scale = self.param("scale", partitioned(init, (self.axis,)), (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (normed * (1 + scale if self.one_plus else scale)).astype(x.dtype)


class Linear(nn.Module):
    """A weight, and perhaps a bias: the last axes of an array against the first ones of the weight.

    Attributes:
      shape: of the weight.
      axes: their logical names.
      contracted: how many axes are summed over.
      scale: of the weight's initial values, beside 1 / √(their fan-in).
      bias: whether there is one.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    contracted: int = 1
    scale: float = 1.0
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies `x` by the weight, in the type of `x`."""
        n = self.contracted
        init = nn.initializers.normal(self.scale / math.sqrt(math.prod(self.shape[:n])))
        kernel = self.param("kernel", partitioned(init, self.axes), self.shape, jnp.float32)
        # qwix finds the kernels that get adapters, and those that have some, by their call of dot_general.
        plain = self.is_initializing() or self.has_variable("params", "kernel_lora_a")
        y = (_dot if plain else _dot_by_size)(x, kernel.astype(x.dtype), n).astype(x.dtype)  # adapters are float32
        if self.bias:
            init = partitioned(nn.initializers.zeros, self.axes[n:])
            y += self.param("bias", init, self.shape[n:], jnp.float32).astype(x.dtype)
        return y


def _dot(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    """The last n axes of `x` against the first n of `kernel`."""
    return jax.lax.dot_general(x, kernel, ((tuple(range(x.ndim - n, x.ndim)), tuple(range(n))), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot_by_size(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    """`_dot`, whose kernel's gradient turns the smaller of its two operands.

    On a CPU the first operand of a sum over places is copied turned. Autodiff has the output's gradient first, which is
    wide for the gate: an MLP's step takes a third less the other way round (docs/performance.md).
    """
    return _dot(x, kernel, n)


def _dot_forward(x, kernel, n):
    return _dot(x, kernel, n), (x, kernel)


def _dot_backward(n, residual, d_y):
    x, kernel = residual
    outputs = kernel.ndim - n
    last = tuple(range(d_y.ndim - outputs, d_y.ndim)), tuple(range(n, kernel.ndim))
    d_x = jax.lax.dot_general(d_y, kernel, (last, ((), ())))
    places = (tuple(range(x.ndim - n)),) * 2
    if math.prod(kernel.shape[:n]) <= math.prod(kernel.shape[n:]):
        return d_x, jax.lax.dot_general(x, d_y, (places, ((), ())))
    turned = jax.lax.dot_general(d_y, x, (places, ((), ())))
    return d_x, turned.transpose(*range(outputs, kernel.ndim), *range(outputs))


_dot_by_size.defvjp(_dot_forward, _dot_backward)


class Block(nn.Module):
    """Pre-norm attention and gated MLP.

    Attributes:
      config: sizes and choices.
      rows: as in `Transformer`.
      local: whether the layer attends to the sliding window alone; None: the layer is told when it is called, as the
        scan over layers of both kinds does.
    """

    config: TransformerConfig
    rows: NamedSharding | None = None
    local: bool | None = False

    def setup(self):
        """The projections, the norms and the dropout."""
        c = self.config
        d, h, g, w, f = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_width, c.mlp_dim
        residual = 1.0 / math.sqrt(2 * c.num_layers)  # keeps the residual stream's variance flat in depth (GPT-2)
        self.attention_norm, self.mlp_norm = self._norm(), self._norm()
        if c.post_norms:
            self.attention_post_norm, self.mlp_post_norm = self._norm(), self._norm()
        if c.qk_norm:
            self.query_norm, self.key_norm = self._norm("kv"), self._norm("kv")
        self.query = Linear((d, h, w), ("embed", "heads", "kv"), bias=c.qkv_bias)
        # Each its own product: slices of a joint one cost a padded copy each in the backward pass.
        self.key = Linear((d, g, w), ("embed", "heads", "kv"), bias=c.qkv_bias)
        self.value = Linear((d, g, w), ("embed", "heads", "kv"), bias=c.qkv_bias)
        self.output = Linear((h, w, d), ("heads", "kv", "embed"), 2, residual)
        self.gate = Linear((d, f), ("embed", "mlp"))
        self.up = Linear((d, f), ("embed", "mlp"))
        self.down = Linear((f, d), ("mlp", "embed"), 1, residual)
        self.dropout = nn.Dropout(c.dropout_rate)

    def _norm(self, axis: str = "embed") -> RMSNorm:
        return RMSNorm(self.config.norm_epsilon, self.config.norm_one_plus, axis)

    def __call__(
        self, x: jax.Array, cache: Any, local: Any, context: dict[str, Any], deterministic: bool, keep_kv: bool
    ):
        """Runs the block over packed rows, or over the next tokens of R rows that have a prefix.

        Args:
          x: [B, L, D], or [R, Q, D] of a step.
          cache: None, or the layer's (prefix, suffix) keys and values of a step; see `Transformer.decode`.
          local: scalar bool where the attribute `local` is None, else None.
          context: what all layers share: angles of both kinds of layers ("global" and "local", None where they are
            equal: (sin, cos)), and "segment_ids", or what `Transformer.decode` is given and the masks of both kinds.
          deterministic: False switches dropout on.
          keep_kv: whether a packed row's keys and values are wanted.

        Returns:
          (like `x`, keys and values: of the row, the suffix with this step written, or None).
        """
        c = self.config
        local = self.local if self.local is not None else local
        query, key, value = self._heads(self.attention_norm(x), context, local)
        kv: Any = None
        if cache is None:
            mixed = attention_kernels.packed_attention(
                query, key, value, context["segment_ids"], c.attention_block,
                window=c.sliding_window, local=local, soft_cap=c.attention_soft_cap,
                setting=self._attention(keep_kv), rows=self.rows,
            )  # fmt: skip
            kv = attention.decoding_layout(key, value) if keep_kv else None
        else:
            prefix, suffix = cache
            kv = _appended(suffix, (key.swapaxes(1, 2), value.swapaxes(1, 2)), context["at"])
            prefix_mask, suffix_mask = context["masks"]["local" if local else "global"]
            mixed = attention.shared_prefix_attention(
                query, prefix, prefix_mask, kv, suffix_mask, context["cells"], soft_cap=c.attention_soft_cap
            )
        out = self.output(mixed)
        if c.post_norms:
            out = self.attention_post_norm(out)
        x = placed(x + self.dropout(out, deterministic=deterministic), self.rows)
        normed = self.mlp_norm(x)
        gate, up = (placed(part(normed), self.rows, split=2) for part in (self.gate, self.up))
        out = self.down(ACTIVATIONS[c.activation](gate) * up)
        if c.post_norms:
            out = self.mlp_post_norm(out)
        return placed(x + self.dropout(out, deterministic=deterministic), self.rows), kv

    def _attention(self, keep_kv: bool) -> str:
        """Only training's rows are of the length that was asked for; prompts and an initialisation's row are not."""
        setting = self.config.attention
        if setting != "splash":
            return setting
        return "xla" if self.is_initializing() else "auto" if keep_kv else setting

    def _heads(self, normed: jax.Array, context: dict[str, Any], local: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query [..., H, C], scaled, and key and value [..., G, C]; the first two turned by their positions."""
        query, key, value = (placed(part(normed), self.rows, split=2) for part in (self.query, self.key, self.value))
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        sin, cos = angles_of(context, local)
        query = query * self.config.query_scale
        return attention.apply_rope(query, sin, cos), attention.apply_rope(key, sin, cos), value


def angles_of(context: dict[str, Any], local: Any) -> tuple[jax.Array, jax.Array]:
    """(sin, cos) of a layer; `local` is a bool, or a scalar that is known on the device alone."""
    if context["local"] is None or local is False:
        return context["global"]
    if local is True:
        return context["local"]
    sin, cos = (jnp.where(local, a, b) for a, b in zip(context["local"], context["global"], strict=True))
    return sin, cos


def _appended(suffix: Any, new: Any, at: jax.Array | None) -> tuple[jax.Array, ...]:
    """Keys and values [R, G, T, C] of the suffix with those of a step, at place `at` or behind the last."""
    if at is None:
        return tuple(jnp.concatenate(pair, axis=2) for pair in zip(suffix, new, strict=True))
    return tuple(jax.lax.dynamic_update_slice_in_dim(old, x, at, 2) for old, x in zip(suffix, new, strict=True))
