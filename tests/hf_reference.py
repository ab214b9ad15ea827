"""What a Hugging Face folder computes, in NumPy float64: one sequence, layer by layer, head by head, key by key."""

import math

import numpy as np


def logits(config: dict, tensors: dict[str, np.ndarray], tokens) -> np.ndarray:
    """[L, V] after tokens [L]; `config` is config.json's contents and `tensors` have its names."""
    p = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    gemma = config["model_type"].startswith("gemma")
    embedding = p["model.embed_tokens.weight"]
    x = embedding[np.asarray(tokens)] * (math.sqrt(config["hidden_size"]) if gemma else 1.0)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        layer = {name.removeprefix(at): w for name, w in p.items() if name.startswith(at)}
        mixed = attention(config, layer, i, norm(config, x, layer["input_layernorm.weight"]))
        if gemma:
            mixed = norm(config, mixed, layer["post_attention_layernorm.weight"])
        x = x + mixed
        before = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        n = norm(config, x, layer[f"{before}.weight"])
        gate = n @ layer["mlp.gate_proj.weight"].T
        if gemma:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        out = (gate * (n @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
        if gemma:
            out = norm(config, out, layer["post_feedforward_layernorm.weight"])
        x = x + out
    scores = norm(config, x, p["model.norm.weight"]) @ p.get("lm_head.weight", embedding).T
    cap = config.get("final_logit_softcapping")
    return cap * np.tanh(scores / cap) if cap else scores


def norm(config, x, weight):
    scale = 1 + weight if config["model_type"].startswith("gemma") else weight
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * scale


def attention(config, layer, i, x):
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim", config["hidden_size"] // heads)
    local = is_local(config, i)
    scale = 1 / math.sqrt(config.get("query_pre_attn_scalar", width))
    cap = config.get("attn_logit_softcapping")
    q, k, v = (
        (x @ layer[f"self_attn.{n}_proj.weight"].T + layer.get(f"self_attn.{n}_proj.bias", 0.0)).reshape(
            len(x), -1, width
        )
        for n in "qkv"
    )
    if "self_attn.q_norm.weight" in layer:
        q = norm(config, q, layer["self_attn.q_norm.weight"])
        k = norm(config, k, layer["self_attn.k_norm.weight"])
    out = np.zeros((len(x), heads * width))
    for h in range(heads):
        g = h // (heads // groups)
        for t in range(len(x)):
            first = max(0, t - config["sliding_window"] + 1) if local else 0
            query = turn(config, q[t, h], t, local)
            scores = np.array([query @ turn(config, k[s, g], s, local) * scale for s in range(first, t + 1)])
            if cap:
                scores = cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            out[t, h * width : (h + 1) * width] = weights / weights.sum() @ v[first : t + 1, g]
    return out @ layer["self_attn.o_proj.weight"].T


def is_local(config, i):
    kind = config["model_type"]
    if kind == "gemma2":
        return i % 2 == 0
    if kind == "gemma3_text":
        return (i + 1) % config["sliding_window_pattern"] != 0
    return bool(config.get("use_sliding_window")) and i >= config["max_window_layers"]


def turn(config, vector, position, local):
    """Rotates the pairs (c, c + C/2) of a head's vector, one after the other."""
    width = len(vector)
    local_base = config.get("rope_local_base_freq")
    base = local_base if local and local_base else config["rope_theta"]
    scaling = None if local and local_base else config.get("rope_scaling")
    out = np.empty(width)
    for c in range(width // 2):
        frequency = scaled(base ** (-2 * c / width), scaling)
        a, b = vector[c], vector[c + width // 2]
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[c], out[c + width // 2] = a * cos - b * sin, b * cos + a * sin
    return out


def scaled(frequency, scaling):
    if not scaling:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    wavelength = 2 * math.pi / frequency
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / scaling["factor"]
    share = (original / wavelength - low) / (high - low)
    return (1 - share) * frequency / scaling["factor"] + share * frequency
