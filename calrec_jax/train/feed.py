"""Batches on their way to the devices: each process fills the rows of its own devices, ahead of the step.

Notable: which rows those are is read from the batch's sharding, so any mesh over any number of processes works; a row's
content depends on (seed, step, row) alone, so the batch is the same however many processes fill it.
"""

from __future__ import annotations

import collections
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from calrec_jax.data.packing import EXAMPLE_KEYS, POOL_KEYS, TOKEN_KEYS, Batch, PackedStream, Packing
from calrec_jax.train.step import batch_sharding

_AHEAD = 2  # batches filled while a step runs


def place(array: np.ndarray | Any, sharding: Sharding) -> jax.Array:
    """An array that every process holds whole, laid out over all devices."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def own_rows(sharding: NamedSharding, rows: int) -> list[tuple[int, int]]:
    """The ranges of a batch's rows that lie on this process's devices, ascending and without repeats."""
    return sorted({_range(index, rows) for index in sharding.addressable_devices_indices_map((rows,)).values()})


def _range(index: tuple[slice, ...] | None, rows: int) -> tuple[int, int]:
    """The first and last row, exclusive, of a shard's index."""
    return (index[0] if index else slice(None)).indices(rows)[:2]


def training_batch(
    stream: PackedStream, step: int, *, sample_forced_tokens: bool, seed: int, rows: tuple[int, int] | None = None
) -> Batch:
    """Rows of batch `step` of the stream, all by default; forced tokens sampled when asked.

    The draws are a function of seed, step and the row's place in the batch alone.
    """
    begin, end = rows or (0, stream.packing.batch_rows)
    batch = stream.batch(step, begin, end)
    if sample_forced_tokens:
        weights = batch["decoder_loss_weights"]
        generator = np.random.Generator(np.random.Philox(key=[seed, (1 << 41) + step]))
        draw = generator.random((stream.packing.batch_rows, weights.shape[1]), np.float32)[begin:end]
        batch["decoder_loss_weights"] = (draw < weights).astype(np.float32)
    return batch


def batch_shapes(packing: Packing) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch contract's shapes."""
    tokens, examples = (packing.batch_rows, packing.row_tokens), (packing.batch_rows, packing.row_examples)
    kinds: dict[str, Any] = {name: (tokens, np.int32) for name in (*TOKEN_KEYS, *POOL_KEYS)}
    kinds |= {name: (examples, np.int32) for name in EXAMPLE_KEYS}
    kinds |= {"decoder_loss_weights": (tokens, np.float32), "example_mask": (examples, np.float32)}
    return {name: jax.ShapeDtypeStruct(shape, kind) for name, (shape, kind) in kinds.items()}


class Feed:
    """The batches of a run from a step on, in order, as arrays over the whole mesh.

    Args:
      stream: of packed rows.
      mesh: of the run.
      sample_forced_tokens, seed: see `training_batch`.
    """

    def __init__(self, stream: PackedStream, mesh: Mesh, *, sample_forced_tokens: bool, seed: int):
        self._stream, self._sharding = stream, batch_sharding(mesh)
        self._sample, self._seed = sample_forced_tokens, seed
        self._parts: list[Batch] = []
        self._ranges = own_rows(self._sharding, stream.packing.batch_rows)

    def batches(self, begin: int, end: int) -> Generator[dict[str, jax.Array]]:
        """Batches [begin, end)."""
        with ThreadPoolExecutor(1, "feed") as pool:  # one thread: the stream keeps its place in the windows
            coming: collections.deque[Future[list[Batch]]] = collections.deque()
            try:
                for step in range(begin, end):
                    while len(coming) <= _AHEAD and step + len(coming) < end:
                        coming.append(pool.submit(self._fill, step + len(coming)))
                    self._parts = coming.popleft().result()
                    yield self._place(self._parts)
            finally:
                for future in coming:
                    future.cancel()

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Those of a batch, and where it lies."""
        shapes = batch_shapes(self._stream.packing)
        return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding) for k, x in shapes.items()}

    def host_rows(self) -> Batch:
        """This process's rows of the batch that was given last."""
        return {k: np.concatenate([part[k] for part in self._parts]) for k in self._parts[0]}

    def _fill(self, step: int) -> list[Batch]:
        return [
            training_batch(self._stream, step, sample_forced_tokens=self._sample, seed=self._seed, rows=rows)
            for rows in self._ranges
        ]

    def _place(self, parts: list[Batch]) -> dict[str, jax.Array]:
        part_of = {rows: part for rows, part in zip(self._ranges, parts, strict=True)}
        size = self._stream.packing.batch_rows

        def array(name: str) -> jax.Array:
            shape = (size, *parts[0][name].shape[1:])
            return jax.make_array_from_callback(shape, self._sharding, lambda index: part_of[_range(index, size)][name])

        return {name: array(name) for name in parts[0]}
