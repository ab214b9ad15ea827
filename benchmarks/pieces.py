"""CPU time of the pieces of one layer, forward and backward, at the shapes of the packaged runs.

    JAX_PLATFORMS=cpu taskset -c 0 python benchmarks/pieces.py

CPU time on one core changes little with what else runs, so pieces can be compared on a busy machine.
"""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from calrec_jax.models import attention
from calrec_jax.models.packed_attention import packed_attention

B, L, H, C, D, F = 32, 256, 4, 32, 128, 352


def report(name, function, *inputs):
    """Least CPU seconds of four calls of the gradient of a scalar of `function`."""
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), tuple(range(len(inputs)))))
    jax.block_until_ready(gradient(*inputs))
    seconds = []
    for _ in range(4):
        begin = time.process_time()
        jax.block_until_ready(gradient(*inputs))
        seconds.append(time.process_time() - begin)
    print(f"{name:<44}{1e3 * min(seconds):7.1f} ms", flush=True)


def main():
    key = jax.random.key(0)
    heads = [jax.random.normal(jax.random.fold_in(key, i), (B, L, H, C)) for i in range(3)]
    x, wide = jax.random.normal(key, (B, L, D)), jax.random.normal(key, (D, F))
    segments = jnp.repeat(jnp.arange(1, 3)[None], B, 0).repeat(L // 2, 1)
    sin, cos = attention.rope_angles(jnp.broadcast_to(jnp.arange(L), (B, L)), C, 1e4)
    for block in (256, 128, 64):
        report(
            f"attention, query blocks of {block}",
            lambda q, k, v, block=block: packed_attention(q, k, v, segments, block),
            *heads,
        )
    report("rotary embedding of queries", lambda q: attention.apply_rope(q, sin, cos), heads[0])
    report("MLP", lambda x, a, b, c: (nn.gelu(x @ a) * (x @ b)) @ c, x, wide, 2 * wide, wide.T)
    report("projection to heads", lambda x, w: jnp.einsum("bld,dhc->blhc", x, w), x, jax.random.normal(key, (D, H, C)))
    report(
        "projection from heads",
        lambda q, w: jnp.einsum("blhc,hcd->bld", q, w),
        heads[0],
        jax.random.normal(key, (H, C, D)),
    )
    report("RMSNorm", lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)), x)


if __name__ == "__main__":
    main()
