"""Memory of the next-item loss and its gradient: in chunks, as we have it, and with all logits at once.

    JAX_PLATFORMS=cpu python benchmarks/loss_memory.py

Compiled, not run: what XLA reserves beside the arguments and results.
"""

import jax
import jax.numpy as jnp

from calrec_jax.losses import LossConfig, weighted_token_loss

CASES = (  # rows, L, D, V, type
    (32, 256, 128, 8192, jnp.float32),
    (8, 1280, 512, 32768, jnp.float32),
    (2, 1280, 1152, 262144, jnp.bfloat16),
)


def plain(hidden, embedding, targets, weights, _):
    logits = jnp.einsum("bld,vd->blv", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked))


def main():
    chunk = LossConfig().chunk
    print(f"rows × tokens, D, V, type | chunks of {chunk} columns | all logits | ratio")
    for rows, length, width, vocab, kind in CASES:
        shapes = [((rows, length, width), kind), ((vocab, width), jnp.float32)]
        shapes += [((rows, length), jnp.int32), ((rows, length), jnp.float32)]
        arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        sizes = []
        for loss in (weighted_token_loss, plain):
            gradient = jax.jit(jax.value_and_grad(lambda *x, loss=loss: loss(*x, chunk), argnums=(0, 1)))
            sizes.append(gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 2**20)
        name = f"{rows} × {length}, {width}, {vocab:,}, {jnp.dtype(kind).name}"
        print(f"{name} | {sizes[0]:,.0f} MiB | {sizes[1]:,.0f} MiB | {sizes[1] / sizes[0]:.1f}")


if __name__ == "__main__":
    main()
