"""Tables larger than memory: rows of Parquet files so many at a time, and a hash of values rather than of bytes."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calrec_jax import artifacts

_BATCH = 1 << 16  # rows


class Rows:
    """Rows of Parquet files in their order, taken so many at a time."""

    def __init__(self, paths: list[Path]):
        self.schema = pq.read_schema(paths[0])
        self._batches = (batch for path in paths for batch in _batches(path))
        self._left: list[pa.RecordBatch] = []

    def take(self, count: int) -> pa.Table:
        """The next `count` rows, or as many as are left."""
        taken, missing = [], count
        while missing:
            batch = self._left.pop() if self._left else next(self._batches, None)
            if batch is None:
                break
            taken.append(batch.slice(0, missing))
            if batch.num_rows > missing:
                self._left.append(batch.slice(missing))
            missing -= taken[-1].num_rows
        return pa.Table.from_batches(taken, self.schema)

    def groups(self, count: int) -> Iterator[pa.Table]:
        """All rows, `count` at a time."""
        while (rows := self.take(count)).num_rows:
            yield rows


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(_BATCH)


class ContentDigest:
    """The sha256 of a table's values, fed a part at a time; it does not depend on how the parts are cut or stored."""

    def __init__(self, schema: pa.Schema):
        self._digests = {name: [hashlib.sha256() for _ in range(6)] for name in schema.names}
        self._types = {name: _type_name(schema.field(name).type) for name in schema.names}

    def update(self, table: pa.Table) -> None:
        """Adds rows."""
        for name, digests in self._digests.items():
            for chunk in table[name].chunks:
                _digest_array(chunk, digests)

    def hexdigest(self) -> str:
        """The digest of the columns' names, types and values."""
        columns = {name: [digest.hexdigest() for digest in digests] for name, digests in self._digests.items()}
        return artifacts.hash_json({"columns": columns, "types": self._types, "order": list(columns)})


def _type_name(type_: pa.DataType) -> str:
    """Without what a list calls its elements, which depends on who wrote it."""
    return f"list<{_type_name(type_.value_type)}>" if pa.types.is_list(type_) else str(type_)


def _digest_array(array: pa.Array, digests: Sequence[Any]) -> None:
    """Which values are null, the length of each, and the values end to end; of a list, its elements by the others."""
    digests[0].update(pc.is_null(array).cast(pa.uint8()).to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_list(array.type):
        digests[1].update(_lengths(array))
        _digest_array(array.flatten(), digests[2:])
    elif pa.types.is_string(array.type):
        digests[1].update(_lengths(array))
        # Concatenating drops what a slice leaves out of view; nulls have no bytes.
        values = pa.concat_arrays([array.drop_null()])
        offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset : values.offset + len(values) + 1]
        data = values.buffers()[2]
        digests[2].update(memoryview(data)[offsets[0] : offsets[-1]] if data is not None and len(offsets) else b"")
    else:
        digests[1].update(array.fill_null(0).to_numpy(zero_copy_only=False).astype("<i8").tobytes())


def _lengths(array: pa.Array) -> bytes:
    lengths = pc.list_value_length(array) if pa.types.is_list(array.type) else pc.binary_length(array)
    return lengths.fill_null(0).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
