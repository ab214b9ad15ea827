"""A decoder's settings as the `config.json` of the family that it belongs to."""

from __future__ import annotations

from typing import Any

from calrec_jax.errors import CalrecError
from calrec_jax.models.config import TransformerConfig
from calrec_jax.pretrained.families import FAMILIES, KINDS, SIZES, Family


def family_of(config: TransformerConfig) -> Family:
    """The family that a decoder of these settings belongs to.

    Raises:
      CalrecError: there is none; the settings that keep it from the nearest one are named.
    """
    differences = {
        family.model_type: [f"{k}={getattr(config, k)!r} (it has {v!r})" for k, v in _wanted(family).items()
                            if getattr(config, k) != v]
        for family in FAMILIES.values()
    }  # fmt: skip
    nearest = min(differences, key=lambda name: len(differences[name]))
    if differences[nearest]:
        raise CalrecError(
            f"no family of open models has this decoder's settings; the nearest is {nearest}, from which it differs in "
            f"{', '.join(differences[nearest])}"
        )
    return FAMILIES[nearest]


def _wanted(family: Family) -> dict[str, Any]:
    """What a decoder of the family must have, and what it must leave at its default."""
    plain = {name: False for name in ("norm_one_plus", "post_norms", "qk_norm", "qkv_bias")}
    wanted: dict[str, Any] = {"scale_embeddings": True} | plain | dict(family.settings)
    if "query_pre_attn_scalar" not in family.defaults:
        wanted |= {"query_pre_attention_scalar": None, "attention_soft_cap": None, "logit_soft_cap": None}
    if family.model_type == "llama":
        wanted["attention_pattern"] = ("global",)
    if "rope_local_base_freq" not in family.defaults:
        wanted["local_rope_base"] = None
    return wanted


def to_hf(config: TransformerConfig, vocab_size: int, family: Family) -> dict[str, Any]:
    """A `config.json` of these settings, as transformers 4 and 5 read it; the inverse of `families.from_hf`."""
    c = config
    out: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    out |= {theirs: getattr(c, ours) for ours, theirs in SIZES.items()}
    out |= {
        "vocab_size": vocab_size,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_width,
        family.activation_field: family.activation,
        "rms_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tied_embeddings,
        "rope_theta": c.rope_base,
        "rope_scaling": _scaling_to_hf(c),
        "attention_bias": False,
        "max_position_embeddings": c.rope_original_length * max(1, round(c.rope_factor)),
    }
    if "query_pre_attn_scalar" in family.defaults:
        scalar = c.query_pre_attention_scalar or c.head_width
        out["query_pre_attn_scalar"] = (
            int(scalar) if scalar == int(scalar) else scalar
        )  # transformers 5 wants a whole one
        out["attn_logit_softcapping"], out["final_logit_softcapping"] = c.attention_soft_cap, c.logit_soft_cap
    if "rope_local_base_freq" in family.defaults:
        out["rope_local_base_freq"] = c.local_rope_base or c.rope_base
    if family.model_type != "llama":
        names = {ours: theirs for theirs, ours in KINDS.items()}
        out["layer_types"] = [names["local" if local else "global"] for local in c.local_layers]
        out["sliding_window"] = c.sliding_window
    if "use_sliding_window" in family.defaults:
        out["use_sliding_window"] = any(c.local_layers)
    return out


def _scaling_to_hf(c: TransformerConfig) -> dict[str, Any] | None:
    if c.rope_scaling == "none":
        return None
    if c.rope_scaling == "linear":
        return {"rope_type": "linear", "factor": c.rope_factor}
    return {
        "rope_type": "llama3",
        "factor": c.rope_factor,
        "low_freq_factor": c.rope_low_frequency,
        "high_freq_factor": c.rope_high_frequency,
        "original_max_position_embeddings": c.rope_original_length,
    }
