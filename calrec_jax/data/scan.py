"""Reviews in JSON lines, many lines at a time: a compiled loop reads what is plain, the exact parser all other lines.

Notable: no object is made of a line that the loop accepts (`review_loop.py`), and threads scan several blocks at once.
A line that it does not accept, good or bad, goes to `amazon.review_parser`, which alone decides what becomes of it and
is what the loop is tested against; so where the loop stops is a matter of speed and never of what is read.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from calrec_jax.data import fields, lines, review_loop


@dataclasses.dataclass(frozen=True)
class _Scanned:
    """What the loop made of a chunk.

    Attributes:
      chunk: the chunk.
      begins: [lines + 1] int64, where each line begins in its bytes.
      left: [left] int64, places of the lines that are left to the exact parser, ascending.
      rows: the others' rows; `line` is their number.
      milliseconds: how many of their times are in milliseconds.
    """

    chunk: lines.Chunk
    begins: np.ndarray
    left: np.ndarray
    rows: pa.RecordBatch
    milliseconds: int


def batches(
    reading: lines.Reading, wanted: tuple[str, ...], schema: pa.Schema, *, milliseconds: bool, threads: int
) -> Iterator[pa.RecordBatch]:
    """Yields the usable reviews of a file of JSON lines, in its order.

    Args:
      reading: the file, its exact parser, and where what is no review goes.
      wanted: names of a review's user, item, time, text and summary.
      schema: of the rows: user_id, item_id, timestamp, text_hash, split, line (its number in the file).
      milliseconds: times are stated in milliseconds, so that dividing them is no repair.
      threads: so many chunks are scanned at once; as many more wait for it.

    Raises:
      CalrecError: as `lines.records`.
    """
    names = [name.encode() for name in wanted]
    ends = np.cumsum([len(name) for name in names])
    joined = np.frombuffer(b"".join(names), np.uint8)
    with concurrent.futures.ThreadPoolExecutor(threads, "calrec-scan") as pool:
        ahead: collections.deque[concurrent.futures.Future[_Scanned]] = collections.deque()
        try:
            for chunk in lines.chunks(reading.source, reading.max_bytes):
                ahead.append(pool.submit(_scanned, chunk, joined, ends, schema))
                if len(ahead) > 8 * threads:
                    yield _completed(ahead.popleft().result(), reading, schema, milliseconds)
            while ahead:
                yield _completed(ahead.popleft().result(), reading, schema, milliseconds)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _scanned(chunk: lines.Chunk, names: np.ndarray, ends: np.ndarray, schema: pa.Schema) -> _Scanned:
    count = chunk.data.count(b"\n")
    data = np.frombuffer(chunk.data, np.uint8)
    begins, times = np.empty(count + 1, np.int64), np.zeros(count, np.int64)
    accepted, found = np.zeros(count, np.bool_), np.zeros((count, 2, 2), np.int64)
    hashes = np.zeros((count, 2), np.int64)
    review_loop.scan(data, names, ends, begins, accepted, found, times, hashes)
    in_milliseconds = times >= fields.MILLISECONDS_FROM
    seconds = np.where(in_milliseconds, times // 1000, times)
    accepted &= (seconds < fields.END_OF_TIME) & (not chunk.too_long)
    numbers = np.flatnonzero(accepted)
    columns = {
        "user_id": _strings(data, found[numbers, review_loop.USER]),
        "item_id": _strings(data, found[numbers, review_loop.ITEM]),
        "timestamp": seconds[numbers],
        "text_hash": pa.array(hashes[numbers, 0], mask=hashes[numbers, 1] == 0),
        "split": pa.nulls(len(numbers), pa.string()),
        "line": chunk.first + numbers,
    }
    rows = pa.record_batch([columns[name] for name in schema.names], schema=schema)
    return _Scanned(chunk, begins, np.flatnonzero(~accepted), rows, int(in_milliseconds[numbers].sum()))


def _strings(data: np.ndarray, spans: np.ndarray) -> pa.Array:
    """The strings of spans ([n, 2]) of ASCII bytes."""
    offsets = np.zeros(len(spans) + 1, np.int32)
    np.cumsum(spans[:, 1] - spans[:, 0], out=offsets[1:])
    out = np.empty(offsets[-1], np.uint8)
    review_loop.copy(data, spans, out)
    return pa.StringArray.from_buffers(len(spans), pa.py_buffer(offsets), pa.py_buffer(out))


def _completed(scanned: _Scanned, reading: lines.Reading, schema: pa.Schema, milliseconds: bool) -> pa.RecordBatch:
    """Counts a chunk's lines and adds the rows of those that the loop left."""
    chunk, begins = scanned.chunk, scanned.begins
    if scanned.milliseconds and not milliseconds:
        reading.counts[-1].repaired[fields.MILLISECONDS_REPAIR] += scanned.milliseconds
    others: list[tuple[Any, ...]] = []
    counted = 0
    for place in scanned.left.tolist():
        reading.count(place + 1 - counted)
        counted = place + 1
        line = chunk.data[begins[place] : begins[place + 1] - 1]
        row = reading.row(chunk.first + place, line, chunk.too_long)
        if row is not None:
            others.append((*row, chunk.first + place))
    reading.count(len(begins) - 1 - counted)
    if not others:
        return scanned.rows
    values = zip(*others, strict=True)
    more = pa.record_batch([pa.array(column, field.type) for column, field in zip(values, schema, strict=True)], schema)
    rows = pa.Table.from_batches([scanned.rows, more])
    (batch,) = rows.sort_by("line").combine_chunks().to_batches()
    return batch
