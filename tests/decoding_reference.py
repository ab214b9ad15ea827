"""A tiny model and slow, obvious references for the decoding tests."""

import flax.linen as nn
import jax
import numpy as np

from calrec_jax.models.transformer import Transformer, TransformerConfig

EOS = 1


def tiny_model(vocab_size: int, seed: int = 0, **sizes) -> tuple[Transformer, dict]:
    """A model whose next-token distributions are far from flat, and its parameters."""
    config = TransformerConfig(**{"embed_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 24} | sizes)
    model = Transformer(config, vocab_size)
    row = np.ones((1, 4), np.int32)
    params = nn.meta.unbox(model.init(jax.random.key(seed), row, row, row))["params"]
    params["embedding"] = params["embedding"] * 3.0
    return model, params


def log_distributions(model: Transformer, params: dict, tokens: list[int]) -> np.ndarray:
    """[len, V] float64 next-token log-probabilities after each token, by a plain forward pass over one row."""
    row = np.asarray(tokens, np.int32)[None]
    place = np.arange(len(tokens), dtype=np.int32)[None]
    logits = np.asarray(model.apply({"params": params}, row, place, np.ones_like(row)), np.float64)[0]
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def teacher_forced(model: Transformer, params: dict, prompt: list[int], completion: list[int]) -> float:
    """log P(completion | prompt)."""
    table = log_distributions(model, params, [*prompt, *completion])[len(prompt) - 1 : -1]
    return float(table[np.arange(len(completion)), completion].sum())


def padded(prompts: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """[B, L] tokens and [B] lengths."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts])
