"""Sizes and choices of a decoder: what tells the families of open models apart, as settings of one.

Notable: the defaults are the decoder that this project trains from scratch. What was added later for open models is
left out of what an artefact says of its model where it has its default, so that older artefacts stay what they were.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import gin
import jax

from calrec_jax.errors import CalrecError
from calrec_jax.models import attention_kernels

ACTIVATIONS = {"gelu": nn.gelu, "silu": nn.silu}  # nn.gelu is the tanh approximation
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
LAYER_KINDS = ("global", "local")
ROPE_SCALINGS = ("none", "linear", "llama3")
_FIRST_RUNTIME = ("dropout_rate", "dtype", "remat", "scan_layers", "attention_block")
_RUNTIME = (*_FIRST_RUNTIME, "attention")
_FIRST = (
    "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "activation", "rope_base",
    "norm_epsilon", *_FIRST_RUNTIME,
)  # fmt: skip


@gin.configurable(module="calrec_jax.models.transformer")
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
      activation: "gelu" (GeGLU, the tanh approximation) or "silu" (SwiGLU).
      dropout_rate: on the embeddings and on what each block adds to the residual stream, in training only.
      rope_base: wavelength base of the rotary embedding.
      norm_epsilon: of RMSNorm.
      dtype: of activations and matrix products; parameters, softmax, norms and losses stay float32.
      remat: "none", "dots" (keep matrix products) or "full" (recompute a block in the backward pass).
      scan_layers: one traced block for all layers. False unrolls: slower to compile, faster for small models on CPU.
      attention_block: query places that attend together; see `packed_attention`.
      attention: of packed rows, "xla", "splash" (a kernel of TPUs), or "auto": the kernel on a TPU where rows divide
        by 128 tokens.
      tied_embeddings: whether logits are products with the embedding; else with a table of their own.
      scale_embeddings: whether embeddings are multiplied by √D when they are read.
      norm_one_plus: RMSNorm multiplies by 1 + scale rather than by scale (Gemma).
      post_norms: norms of what attention and MLP give, too, before it is added to the residual stream (Gemma 2 and 3).
      qk_norm: RMSNorm of each head's query and key, before the rotary embedding (Gemma 3, Qwen 3).
      qkv_bias: biases of query, key and value (Qwen 2.5).
      query_pre_attention_scalar: queries are divided by its root; None is C.
      attention_soft_cap: scores s become cap · tanh(s / cap); None is off (Gemma 2).
      logit_soft_cap: the same of the logits.
      attention_pattern: kinds of the layers, repeated over their number: "global" attends to all tokens before, "local"
        to the last `sliding_window`, the token itself among them.
      sliding_window: tokens; needed where a layer is local.
      local_rope_base: of local layers; None is `rope_base`. Their rotary embedding is never scaled.
      rope_scaling: "none"; "linear" (Chen et al., 2023), all frequencies divided by `rope_factor`; or "llama3", those
        of wavelengths beyond `rope_original_length` / `rope_low_frequency` divided, those below
        `rope_original_length` / `rope_high_frequency` kept, and a mixture between.
      rope_factor: of either scaling.
      rope_low_frequency: of "llama3".
      rope_high_frequency: of "llama3".
      rope_original_length: tokens the model was first trained on; of "llama3".
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
    tied_embeddings: bool = True
    scale_embeddings: bool = True
    norm_one_plus: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    query_pre_attention_scalar: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    attention_pattern: tuple[str, ...] = ("global",)
    sliding_window: int | None = None
    local_rope_base: float | None = None
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    rope_original_length: int = 8192

    def __post_init__(self):
        object.__setattr__(self, "attention_pattern", tuple(self.attention_pattern))  # JSON and gin give lists, too
        self._check_sizes()
        self._check_choices()
        self._check_positions()

    def _check_sizes(self) -> None:
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

    def _check_choices(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise CalrecError(f"activation={self.activation!r}: must be one of {sorted(ACTIVATIONS)}")
        if self.remat not in ("none", *REMAT_POLICIES):
            raise CalrecError(f"remat={self.remat!r}: must be one of {['none', *sorted(REMAT_POLICIES)]}")
        if self.attention not in attention_kernels.IMPLEMENTATIONS:
            raise CalrecError(f"attention={self.attention!r}: must be one of {attention_kernels.IMPLEMENTATIONS}")
        if self.dtype not in ("float32", "bfloat16"):
            raise CalrecError(f"dtype={self.dtype!r}: must be 'float32' or 'bfloat16'")
        for name in ("query_pre_attention_scalar", "attention_soft_cap", "logit_soft_cap", "local_rope_base"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise CalrecError(f"TransformerConfig.{name}={value}: must be above 0, or None")

    def _check_positions(self) -> None:
        unknown = sorted({*self.attention_pattern} - {*LAYER_KINDS})
        if unknown or not self.attention_pattern:
            raise CalrecError(
                f"TransformerConfig.attention_pattern={self.attention_pattern}: must be kinds of layers, each one of "
                f"{list(LAYER_KINDS)}"
            )
        if "local" in self.attention_pattern and (self.sliding_window is None or self.sliding_window < 1):
            raise CalrecError(
                f"TransformerConfig.sliding_window={self.sliding_window}: attention_pattern has local layers, which "
                "need a window of at least 1 token"
            )
        if self.rope_scaling not in ROPE_SCALINGS:
            raise CalrecError(f"rope_scaling={self.rope_scaling!r}: must be one of {list(ROPE_SCALINGS)}")
        if self.rope_scaling != "none" and self.rope_factor <= 0:
            raise CalrecError(f"TransformerConfig.rope_factor={self.rope_factor}: must be above 0")
        if self.rope_scaling == "llama3" and not 0 < self.rope_low_frequency < self.rope_high_frequency:
            raise CalrecError(
                f"TransformerConfig.rope_low_frequency={self.rope_low_frequency}: must be above 0 and below "
                f"rope_high_frequency={self.rope_high_frequency}"
            )

    @property
    def head_width(self) -> int:
        """C."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by."""
        return float(self.query_pre_attention_scalar or self.head_width) ** -0.5

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Of each layer, whether it attends to the sliding window alone."""
        kinds = self.attention_pattern
        return tuple(kinds[i % len(kinds)] == "local" for i in range(self.num_layers))

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be restored: all that shapes parameters or the function they compute.

        A setting that is None because it follows from another has its value here.
        """
        followed = {
            "head_dim": self.head_width,
            "query_pre_attention_scalar": self.query_pre_attention_scalar or self.head_width,
            "local_rope_base": self.local_rope_base or self.rope_base,
        }
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _RUNTIME} | followed

    def described(self) -> dict[str, Any]:
        """All settings as artefacts keep them: those that came later only where they are not at their default."""
        defaults = self.defaults()
        return {k: v for k, v in dataclasses.asdict(self).items() if k in _FIRST or v != defaults[k]}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Each setting's default, whatever gin has bound."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    @classmethod
    def of(cls, **settings: Any) -> TransformerConfig:
        """These settings, and the defaults for the others, whatever gin has bound."""
        return cls(**{**cls.defaults(), **settings})

    @classmethod
    def from_described(cls, values: Any) -> TransformerConfig | None:
        """The inverse of `described`; None where `values` are not such settings."""
        if not isinstance(values, dict) or not {*_FIRST} <= {*values} <= {*cls.defaults()}:
            return None
        return cls.of(**values)
