"""Which implementation packed attention takes: XLA's products, or JAX's splash attention kernel on a TPU.

Notable: the kernel never writes scores to memory and skips blocks of keys that causality or a window rules out (Dao et
al., 2022, arXiv 2205.14135, as `jax.experimental.pallas.ops.tpu.splash_attention` has it). The partitioner cannot split
a kernel, so over a mesh each device runs it on its own rows and heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec

from calrec_jax.errors import CalrecError
from calrec_jax.models import packed_attention as by_products

IMPLEMENTATIONS = ("auto", "xla", "splash")
_LANES = 128  # a TPU's vectors have as many; the kernel's blocks are multiples
_LARGEST_BLOCK = 512  # places; its scores and masks have to lie in a core's own memory


@dataclasses.dataclass(frozen=True)
class Scope:
    """What a layer attends to, beside its own segment.

    Attributes:
      window: places before and with a token's own that it sees; None: all.
      soft_cap: scores become cap · tanh(score / cap); None: as they are.
    """

    window: int | None = None
    soft_cap: float | None = None


def takes_splash(setting: str, rows: NamedSharding | None, length: int) -> bool:
    """Whether packed rows of `length` tokens run by the kernel.

    Args:
      setting: "xla"; "splash", on any platform (off a TPU it is interpreted, for tests); or "auto", the kernel where
        the device is a TPU and blocks divide the length.
      rows: where rows lie; its mesh says what devices they are. None: JAX's default device.
      length: L.

    Raises:
      CalrecError: "splash" is asked for, and no block divides the length.
    """
    fits = length % _LANES == 0
    if setting == "splash" and not fits:
        raise CalrecError(
            f"TransformerConfig.attention='splash': rows of {length} tokens do not divide by {_LANES}; set "
            "Batching.row_tokens to a multiple, or attention='xla'"
        )
    return setting == "splash" or (setting == "auto" and fits and _platform(rows) == "tpu")


def _platform(rows: NamedSharding | None) -> str:
    return jax.default_backend() if rows is None else rows.mesh.devices.flat[0].platform


def packed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    block: int,
    *,
    window: int | None = None,
    local: bool | jax.Array = False,
    soft_cap: float | None = None,
    setting: str,
    rows: NamedSharding | None = None,
) -> jax.Array:
    """`packed_attention.packed_attention` by the implementation that `takes_splash` says; its arguments and result."""
    length = query.shape[1]
    if window is not None and window >= length:
        window, local = None, False  # it sees the whole row
    if not takes_splash(setting, rows, length):
        return by_products.packed_attention(
            query, key, value, segment_ids, block, window=window, local=local, soft_cap=soft_cap
        )
    run = [functools.partial(splash_attention, scope=Scope(near, soft_cap), rows=rows) for near in (None, window)]
    if isinstance(local, bool):
        return run[local](query, key, value, segment_ids)
    return jax.lax.cond(local, run[1], run[0], query, key, value, segment_ids)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    scope: Scope = Scope(),
    rows: NamedSharding | None = None,
) -> jax.Array:
    """Causal attention inside each segment of packed rows, by the kernel.

    Args:
      query: [B, L, H, C], scaled already; L divides by 128.
      key: [B, L, G, C]; H is a multiple of G.
      value: [B, L, G, C].
      segment_ids: [B, L] int32; 0 is padding, whose outputs mean nothing.
      scope: window and soft cap.
      rows: where rows lie on a mesh; heads are split over its axis "model", where they divide.

    Returns:
      [B, L, H, C].
    """
    interpret = _platform(rows) != "tpu"
    local = functools.partial(_rows_of_a_device, scope=scope, interpret=interpret)
    if rows is None or rows.mesh.size == 1:
        return local(query, key, value, segment_ids)
    key, value, split = _heads_over("model", rows, query, key, value)
    by_row, by_head = PartitionSpec(*rows.spec), PartitionSpec(*rows.spec, None, split)
    over = jax.shard_map(
        local,
        mesh=rows.mesh,
        in_specs=(by_head, by_head, by_head, by_row),
        out_specs=by_head,
        check_vma=False,  # a kernel does not say over which axes its results differ
    )
    return over(query, key, value, segment_ids)


def _heads_over(
    axis: str, rows: NamedSharding, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, str | None]:
    """Keys and values repeated as often as the axis needs to split them with their queries; None: no head is split."""
    parts, heads, groups = rows.mesh.shape[axis], query.shape[2], key.shape[2]
    joint = math.lcm(parts, groups)
    if heads % joint:
        return key, value, None
    key, value = (x if joint == groups else jnp.repeat(x, joint // groups, axis=2) for x in (key, value))
    return key, value, axis


def _rows_of_a_device(query, key, value, segment_ids, *, scope: Scope, interpret: bool):
    """The kernel over each row; shapes as in `splash_attention`, of one device."""
    kernel = _kernel(query.shape[1], query.shape[2], scope, interpret)

    def one(query, key, value, segments):
        by_head = (x.swapaxes(0, 1) for x in (query, key, value))
        return kernel(*by_head, splash.SegmentIds(segments, segments)).swapaxes(0, 1)

    return jax.vmap(one)(query, key, value, segment_ids)


def _kernel(length: int, heads: int, scope: Scope, interpret: bool):
    """The kernel for rows of a length."""
    block = block_of(length)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    square = (length, length)
    mask: masks.Mask = masks.CausalMask(square)
    if scope.window is not None:
        mask = masks.LocalMask(square, (scope.window - 1, 0), 0)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        attn_logits_soft_cap=scope.soft_cap,
        interpret=interpret,
    )


def block_of(length: int) -> int:
    """Places of a block of queries, and of keys: the largest multiple of 128 up to 512 that divides the length."""
    return max(size for size in range(_LANES, _LARGEST_BLOCK + 1, _LANES) if length % size == 0)


def visited_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key place in the blocks that the kernel visits, of L² in all."""
    block = block_of(length)
    seen = [
        1
        for begin in range(0, length, block)
        for key in range(0, begin + block, block)
        if window is None or key + block > begin + 1 - window
    ]
    return len(seen) * block * block


# Products [places, C] × [places] of a pair of places: scores and values; scores, their gradient, those of keys and
# values; scores, their gradient, that of queries.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 7


def kernel_flops(name: str, operands: list[tuple[int, ...]], window: int | None = None) -> float:
    """Operations of a kernel of a compiled step, by its name there and its operands' shapes; 0 for any other call.

    `window` is that of every layer; None also where layers differ, which then count as those that see whole rows.

    The first operand of at least three dimensions that ends in [L, C] places is the query, [..., H, L, C].
    """
    products = next((count for start, count in _PRODUCTS.items() if name.startswith(start)), 0)
    if not products:
        return 0.0
    *rows_and_heads, length, width = next(shape for shape in operands if len(shape) >= 3 and shape[-2] % _LANES == 0)
    return 2.0 * products * math.prod(rows_and_heads) * width * visited_pairs(length, window)
