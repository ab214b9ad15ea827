"""Families of open models: a `config.json` as settings of the one decoder; `to_hf.py` is the way back.

Notable: a field that would change what the model computes, and that the decoder does not have, is an error that names
it; nothing is passed over in silence. Both forms of the files are read: that of transformers 4 (`rope_theta`,
`rope_scaling`) and that of 5 (`rope_parameters`). Sources: the `configuration_*.py` files of transformers, whose
defaults stand for fields that a file leaves out, and the models' reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from calrec_jax.errors import CalrecError
from calrec_jax.models.config import TransformerConfig

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """What all models of a `model_type` share.

    Attributes:
      model_type: in `config.json`.
      architecture: class of transformers.
      title: for people.
      settings: of the decoder, the same for all sizes.
      activation: name of the activation in `config.json`.
      activation_field: where it stands.
      defaults: of fields that a file may leave out.
    """

    model_type: str
    architecture: str
    title: str
    settings: Mapping[str, Any]
    activation: str
    activation_field: str
    defaults: Mapping[str, Any]


_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
_PLAIN = {"activation": "silu", "scale_embeddings": False}
_GEMMA = {"activation": "gelu", "norm_one_plus": True, "post_norms": True}
_GEMMA_DEFAULTS = {
    **_COMMON, "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "tie_word_embeddings": True,
}  # fmt: skip
_WINDOWS = {"use_sliding_window": False, "max_window_layers": 28}
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", "Llama 3 and SmolLM2", _PLAIN, "silu", "hidden_act", _COMMON),
        Family(
            "qwen2", "Qwen2ForCausalLM", "Qwen 2.5", {**_PLAIN, "qkv_bias": True}, "silu", "hidden_act",
            {**_COMMON, **_WINDOWS},
        ),
        Family(
            "qwen3", "Qwen3ForCausalLM", "Qwen 3", {**_PLAIN, "qk_norm": True}, "silu", "hidden_act",
            {**_COMMON, **_WINDOWS, "head_dim": 128},
        ),
        Family(
            "gemma2", "Gemma2ForCausalLM", "Gemma 2", _GEMMA, "gelu_pytorch_tanh", "hidden_activation",
            {**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        Family(
            "gemma3_text", "Gemma3ForCausalLM", "Gemma 3", {**_GEMMA, "qk_norm": True}, "gelu_pytorch_tanh",
            "hidden_activation",
            {
                **_GEMMA_DEFAULTS, "vocab_size": 262_208, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
                "sliding_window_pattern": 6,
            },
        ),
    )
}  # fmt: skip
# What the decoder does not have: fields, and the values with which they change nothing.
_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),  # of the output projection, too
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "use_bidirectional_attention": (False, None),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
    "is_encoder_decoder": (False, None),
    "auto_map": (None,),
}
_REASONS = {
    "auto_map": "it names code in the folder, which is never run",
    "quantization_config": "quantised weights are not read; take the model's unquantised folder",
}
SIZES = {
    "embed_dim": "hidden_size", "mlp_dim": "intermediate_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}  # fmt: skip
KINDS = {"sliding_attention": "local", "full_attention": "global"}


@dataclasses.dataclass(frozen=True)
class Described:
    """What a `config.json` says.

    Attributes:
      family: of the model.
      config: the decoder's settings.
      vocab_size: rows of the embedding.
      text_config: the fields of the text model; those of the whole file but for models of text and images.
    """

    family: Family
    config: TransformerConfig
    vocab_size: int
    text_config: dict[str, Any]


def from_hf(config: Json, where: str) -> Described:
    """The decoder's settings of a `config.json`.

    Args:
      config: the file's contents.
      where: the file, for messages.

    Raises:
      CalrecError: another architecture, or a field that the decoder has no setting for; the field is named.
    """
    text = dict(config)
    if config.get("model_type") == "gemma3":  # text and images; the text model stands inside
        if not isinstance(config.get("text_config"), Mapping):
            raise CalrecError(f"{where}: text_config is missing; a gemma3 file has the text model's sizes there")
        text = {"model_type": "gemma3_text"} | dict(config["text_config"])
        for name in ("auto_map", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id"):
            if config.get(name) is not None:  # these may stand outside
                text.setdefault(name, config[name])
    family = FAMILIES.get(str(text.get("model_type")))
    if family is None:
        known = ", ".join(f"{f.model_type} ({f.title})" for f in FAMILIES.values())
        raise CalrecError(
            f"{where}: model_type={text.get('model_type')!r} is not supported; these are: {known}, gemma3"
        )
    fields = _Fields({**family.defaults, **text}, where)
    fields.check(family)
    sizes = {ours: fields.integer(theirs) for ours, theirs in SIZES.items()}
    kv_heads = fields.integer("num_key_value_heads", sizes["num_heads"])
    head_dim = fields.integer("head_dim", sizes["embed_dim"] // sizes["num_heads"])
    settings: dict[str, Any] = {**family.settings, **sizes, "num_kv_heads": kv_heads, "head_dim": head_dim}
    settings["norm_epsilon"] = fields.number("rms_norm_eps")
    settings["tied_embeddings"] = bool(fields.values.get("tie_word_embeddings", False))
    if "query_pre_attn_scalar" in family.defaults:
        settings["query_pre_attention_scalar"] = fields.number("query_pre_attn_scalar")
        settings["attention_soft_cap"] = fields.optional("attn_logit_softcapping")
        settings["logit_soft_cap"] = fields.optional("final_logit_softcapping")
    settings |= _layers(fields, family, sizes["num_layers"])
    settings |= _rope(fields, "local" in settings["attention_pattern"])
    try:
        made = TransformerConfig.of(**settings)
    except CalrecError as error:
        raise CalrecError(f"{where}: {error}") from error
    return Described(family, made, fields.integer("vocab_size"), text)


class _Fields:
    """Fields of a file, with errors that name them."""

    def __init__(self, values: Json, where: str):
        self.values, self.where = values, where

    def check(self, family: Family) -> None:
        """Raises a `CalrecError` for what the decoder does not compute."""
        for name, allowed in _MUST_BE.items():
            value = self.values.get(name)
            if value not in allowed:
                reason = _REASONS.get(name, "the decoder has no such setting")
                raise CalrecError(f"{self.where}: {name}={value!r} is not supported: {reason}")
        names = dict.fromkeys((family.activation_field, "hidden_act"))
        given = next((self.values[name] for name in names if self.values.get(name)), family.activation)
        if given != family.activation:
            raise CalrecError(
                f"{self.where}: {family.activation_field}={given!r} is not supported; {family.title} has "
                f"{family.activation!r}"
            )

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CalrecError(f"{self.where}: {name}={value!r}: must be a positive whole number")
        return value

    def number(self, name: str) -> float:
        """A positive number."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise CalrecError(f"{self.where}: {name}={value!r}: must be a number above 0")
        return float(value)

    def optional(self, name: str) -> float | None:
        """A positive number, or None."""
        return None if self.values.get(name) is None else self.number(name)


def _layers(fields: _Fields, family: Family, count: int) -> dict[str, Any]:
    """Kinds of the layers, and the window."""
    values = fields.values
    windowed = "sliding_window" in family.defaults or bool(values.get("use_sliding_window"))
    types = values.get("layer_types")
    if types is None and "sliding_window_pattern" in family.defaults:
        every = fields.integer("sliding_window_pattern")
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    elif types is None and "sliding_window" in family.defaults:
        types = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    elif types is None and windowed:
        first = fields.integer("max_window_layers")
        types = ["full_attention" if i < first else "sliding_attention" for i in range(count)]
    elif types is None:
        types = ["full_attention"] * count
    unknown = [t for t in types if t not in KINDS]
    if len(types) != count or unknown:
        strange = f", one of them {unknown[0]!r}" if unknown else ""
        raise CalrecError(
            f"{fields.where}: layer_types has {len(types)} entries{strange}: must be {count}, each one of {[*KINDS]}"
        )
    pattern = shortest_period([KINDS[t] for t in types])
    return {
        "attention_pattern": pattern,
        "sliding_window": fields.integer("sliding_window") if "local" in pattern else None,
    }


def shortest_period(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern whose repetition gives `kinds`."""
    for size in range(1, len(kinds)):
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds)):
            return tuple(kinds[:size])
    return tuple(kinds)


def _rope(fields: _Fields, has_local: bool) -> dict[str, Any]:
    """Bases and scaling of the rotary embedding."""
    values = fields.values
    parameters = values.get("rope_parameters") or {}
    theta, local_theta = values["rope_theta"], values.get("rope_local_base_freq")
    scaling = values.get("rope_scaling")
    if "full_attention" in parameters or "sliding_attention" in parameters:
        whole, local = parameters.get("full_attention") or {}, parameters.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise CalrecError(
                f"{fields.where}: rope_parameters.sliding_attention.rope_type={local['rope_type']!r} is not supported; "
                "only 'default' is"
            )
        theta, local_theta = whole.get("rope_theta", theta), local.get("rope_theta", local_theta)
        scaling = whole or scaling
    elif parameters:
        theta, scaling = parameters.get("rope_theta", theta), parameters
    settings: dict[str, Any] = {"rope_base": float(theta)}
    if has_local and local_theta is not None and float(local_theta) != float(theta):
        settings["local_rope_base"] = float(local_theta)
    return settings | _scaling(dict(scaling or {}), fields, has_local)


def _scaling(scaling: dict[str, Any], fields: _Fields, has_local: bool) -> dict[str, Any]:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    own = _Fields(scaling, f"{fields.where}: rope_scaling")
    if kind == "default":
        return {}
    if kind not in ("linear", "llama3"):
        raise CalrecError(
            f"{fields.where}: rope_scaling of rope_type={kind!r} is not supported; 'default', 'linear' and 'llama3' are"
        )
    if has_local and "rope_local_base_freq" not in fields.values:
        raise CalrecError(
            f"{fields.where}: rope_scaling of rope_type={kind!r} in a model with sliding windows and one rope_theta is "
            "not supported: the decoder scales no local layers"
        )
    settings = {"rope_scaling": kind, "rope_factor": own.number("factor")}
    if kind == "llama3":
        settings |= {
            "rope_low_frequency": own.number("low_freq_factor"),
            "rope_high_frequency": own.number("high_freq_factor"),
            "rope_original_length": own.integer("original_max_position_embeddings"),
        }
    return settings
