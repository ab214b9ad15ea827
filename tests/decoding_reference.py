"""A tiny model and slow, obvious references for the decoding tests."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax import artifacts
from calrec_jax.decode.prefix import Batch
from calrec_jax.decode.prompts import user_keys
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.train import checkpoints as ckpt

EOS = 1
_LENGTH = 48  # one program for all references


def tiny_model(vocab_size: int, seed: int = 0, eos_scale: float = 2.0, **sizes) -> tuple[Transformer, dict]:
    """A model whose next-token distributions are far from flat, and its parameters."""
    small = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 24}
    config = TransformerConfig(**small | sizes)
    model = Transformer(config, vocab_size)
    row = np.ones((1, 4), np.int32)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(seed), row, row, row))["params"]
    # Tied embeddings make a fresh model repeat its last token; blocks this loud leave that behind.
    params["layers"]["output"]["kernel"] *= 20.0
    params["layers"]["down"]["kernel"] *= 20.0
    params["embedding"] = params["embedding"].at[EOS].multiply(eos_scale) * 2.0
    return model, params


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, params: dict, row: jax.Array, real: jax.Array) -> jax.Array:
    return model.apply({"params": params}, row, jnp.arange(_LENGTH)[None], real)


def log_distributions(model: Transformer, params: dict, tokens: list[int]) -> np.ndarray:
    """[len, V] float64 next-token log-probabilities after each token, by a plain forward pass over one row."""
    row, lengths = padded([tokens], _LENGTH)
    real = (np.arange(_LENGTH) < lengths[:, None]).astype(np.int32)
    logits = np.asarray(_logits(model, params, row, real), np.float64)[0, : len(tokens)]
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


def batch_of(prompts: list[list[int]], length: int, users: list[str] | None = None, seed: int = 3) -> Batch:
    """Prompts as a decoder takes them, filled up to `length`; the users' streams are those of `seed`."""
    tokens, lengths = padded(prompts, length)
    names = users or [str(i) for i in range(len(prompts))]
    return Batch(tokens, lengths.astype(np.int32), user_keys(names, seed), np.arange(len(prompts)))


def write_stage(stage, small_run, model: Transformer, params: dict, *, max_target_tokens: int = 24, made_from=None):
    """A finished stage with these parameters, as `train` leaves one."""
    with ckpt.manager(stage) as checkpoints:
        ckpt.save(checkpoints, 0, {"params": params}, 1.0)
        checkpoints.wait_until_finished()
    facts = {
        "tokenizer": small_run.tokenizer.fingerprint,
        "template": small_run.datasets[0].template,
        "datasets": [dataset.hash for dataset in small_run.datasets],
        "vocab_size": small_run.tokenizer.vocab_size,
        "max_history_tokens": 64,  # prompts of one length to compile for
        "max_target_tokens": max_target_tokens,
        "row_tokens": 128,
    }
    ckpt.write_facts(stage, model.config, facts)
    outcome = {"best_step": 0, "last_step": 0, "best_validation_loss": 1.0}
    artifacts.write_manifest(stage, kind="checkpoint", made_from=made_from or {}, settings={}, **outcome)
    return stage
