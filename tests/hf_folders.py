"""Hugging Face folders of every family at small width, as transformers writes them, with random weights.

Nothing of ours is used here: names and shapes are written down as transformers has them.
"""

import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TITLES = [
    "Title: 3M 201 Masking Tape 1.88 in x 60 yd. Category: Tapes, Adhesives. Brand: 3M. Price: 7.49.",
    "Title: Crème brûlée torch, 2-pack – naïve “quotes”. Category: Kitchen. Brand: Ægir. Price: Unknown.",
    "Title: 鋼のワイヤー 10m ロープ. Category: 工具. Brand: 日本. Price: ¥1,200.",
    "Title: Ütü masası örtüsü 130×50 cm. Category: Ev. Brand: Şık. Price: 99,90.",
    "Title: Футболка хлопок 100% XL. Category: Одежда. Brand: Заря. Price: 1 299.",
    "Title: 🔧 Wrench set ⌀ 8–19 mm, 12 pcs 👩‍🔧. Category: Tools. Brand: O'Neil. Price: 34.00.",
    "Title: كابل نحاس 2.5 مم. Category: كهرباء. Brand: النور. Price: 45.",
    "This is the summary of a user's purchase history.\nThe first item bought is as follows.\n",
    "\nThe next item bought is as follows.\n",
    "don't we'll I'M  double  spaces\tand tabs   \n\n  lines ",
    "e\u0301 and é, ﬁ and fi, ½ ² ™ \u00a0 \u200d",
]
VOCAB = 512
_SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "initializer_range": 0.02,
}  # fmt: skip
_LLAMA3_ROPE = {
    "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}  # fmt: skip
# All the structure of the public sizes at small width: head widths that are not width / heads, windows shorter than the
# texts, patterns that do not divide the layers.
CONFIGS = {
    "gemma2": {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **_SIZES, "head_dim": 8,
        "num_hidden_layers": 3, "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 12, "sliding_window": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 6.0,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    },
    "gemma3": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], **_SIZES, "head_dim": 10,
        "num_hidden_layers": 5, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 12,
        "sliding_window": 6, "sliding_window_pattern": 3, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "bos_token_id": 2, "eos_token_id": [1, 106],
        "pad_token_id": 0,
    },
    "llama3": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], **_SIZES, "head_dim": 8, "num_hidden_layers": 2,
        "hidden_act": "silu", "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 500, "eos_token_id": [501, 502],
    },
    "llama3_untied": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], **_SIZES, "num_hidden_layers": 2,
        "hidden_act": "silu", "rope_theta": 500000.0, "rope_scaling": None, "tie_word_embeddings": False,
        "bos_token_id": 500, "eos_token_id": 501,
    },
    "smollm2": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], **_SIZES, "num_attention_heads": 6,
        "num_key_value_heads": 3, "num_hidden_layers": 3, "hidden_act": "silu", "rope_theta": 100000.0,
        "rope_interleaved": False, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    },
    "qwen2": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_SIZES, "num_hidden_layers": 2,
        "hidden_act": "silu", "rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 32,
        "max_window_layers": 1, "tie_word_embeddings": True, "bos_token_id": 500, "eos_token_id": 500,
    },
    "qwen2_windowed": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_SIZES, "num_hidden_layers": 3,
        "hidden_act": "silu", "rope_theta": 1000000.0, "use_sliding_window": True, "sliding_window": 6,
        "max_window_layers": 1, "tie_word_embeddings": False, "bos_token_id": 500, "eos_token_id": 500,
    },
    "qwen3": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **_SIZES, "head_dim": 8, "num_hidden_layers": 2,
        "hidden_act": "silu", "rope_theta": 1000000.0, "attention_bias": False, "tie_word_embeddings": True,
        "use_sliding_window": False, "bos_token_id": 500, "eos_token_id": 500,
    },
}  # fmt: skip
_LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPLIT = _LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor, as `config`'s architecture has them."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h, g = config["num_attention_heads"], config["num_key_value_heads"]
    c = config.get("head_dim", d // h)
    kind = config["model_type"]
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, rows in (("q", h * c), ("k", g * c), ("v", g * c)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, d)
            if kind == "qwen2":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{at}self_attn.o_proj.weight"] = (d, h * c)
        if kind in ("qwen3", "gemma3_text"):
            shapes[f"{at}self_attn.q_norm.weight"] = shapes[f"{at}self_attn.k_norm.weight"] = (c,)
        shapes[f"{at}mlp.gate_proj.weight"] = shapes[f"{at}mlp.up_proj.weight"] = (f, d)
        shapes[f"{at}mlp.down_proj.weight"] = (d, f)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if kind.startswith("gemma"):
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for norm in norms:
            shapes[f"{at}{norm}.weight"] = (d,)
    if not config.get("tie_word_embeddings", kind.startswith("gemma")):
        shapes["lm_head.weight"] = (v, d)
    return shapes


def random_tensors(config: dict, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """Weights large enough that every part of the model shows in the logits."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("norm.weight"):
            x = rng.normal(0.0 if config["model_type"].startswith("gemma") else 1.0, 0.3, shape)
        else:
            x = rng.normal(0, 0.5 if name.endswith("bias") else 1.5 * shape[-1] ** -0.5, shape)
        tensors[name] = x.astype(dtype)
    return tensors


def write_folder(
    folder: pathlib.Path, config: dict, seed: int = 0, dtype=np.float32, shards: int = 1, family: str = "llama3"
) -> dict[str, np.ndarray]:
    """Writes config.json, safetensors files and a tokenizer; returns the tensors."""
    folder.mkdir(parents=True)
    tensors = random_tensors(config, seed, dtype)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": np.dtype(dtype).name}))
    names = sorted(tensors)
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for s in range(shards):
            file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[s::shards]}
            safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= {name: file for name in part}
        size = sum(t.nbytes for t in tensors.values())
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
        )
    write_tokenizer(folder, family)
    return tensors


def write_tokenizer(folder: pathlib.Path, family: str) -> None:
    """A small tokenizer.json of the family's kind, and tokenizer_config.json."""
    made, special = (_gemma if family.startswith("gemma") else _byte_level)(family)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def _byte_level(family: str) -> tuple[tokenizers.Tokenizer, dict]:
    """BPE over bytes, with the splits of Llama 3, Qwen and SmolLM2."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=family.startswith("llama3")))
    split = _LLAMA_SPLIT if family.startswith("llama3") else _QWEN_SPLIT
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if family == "smollm2":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        pattern = tokenizers.Regex(split)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern, behavior="isolated", invert=False), bytes_of]
        )
    if family.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    first = family == "smollm2"
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>"] if first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TITLES * 3, trainer)
    if first:
        return tokenizer, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    assert tokenizer.get_vocab_size() == 500
    if family.startswith("qwen"):
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        return tokenizer, {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin = {"__type": "AddedToken", "content": "<|begin_of_text|>", "special": True}
    return tokenizer, {"bos_token": begin, "eos_token": "<|end_of_text|>"}


def _gemma(family: str) -> tuple[tokenizers.Tokenizer, dict]:
    """BPE over characters with byte fallback; a token beyond the embedding, as Gemma 3 has one for images."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    plain = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    plain.normalizer = normalizers.Replace(" ", "▁")
    plain.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous", invert=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[*special, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False,
        limit_alphabet=60,
    )  # fmt: skip
    plain.train_from_iterator(TITLES * 3, trainer)
    # Trained with the bytes as special tokens, which Gemma's are not: the model is made anew from its parts.
    state = json.loads(plain.to_str())
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab=state["model"]["vocab"], merges=[tuple(m) for m in state["model"]["merges"]], unk_token="<unk>",
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    made.normalizer, made.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(special)
    made.add_tokens([tokenizers.AddedToken("\n", normalized=False)])
    if family == "gemma3":
        while made.get_vocab_size() < VOCAB:
            made.add_tokens([f"<unused{made.get_vocab_size()}>"])
        made.add_special_tokens(["<image_soft_token>"])
    return made, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
