"""Shards of completions: Parquet files that are whole or absent and say which request they answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError

ITEM_EMBEDDINGS_FILE = "item_embeddings.parquet"
_REQUEST = b"calrec.request"
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("texts", pa.list_(pa.string())),
        ("log_probs", pa.list_(pa.float32())),
        ("num_tokens", pa.list_(pa.int32())),
        ("finished", pa.list_(pa.bool_())),
        ("item_ids", pa.list_(pa.string())),
        ("user_embedding", pa.list_(pa.float32())),
    ]
)


def shard_path(folder: Path, index: int) -> Path:
    """Where shard `index` is."""
    return folder / f"part-{index:05d}.parquet"


def completions_table(
    user_ids: Sequence[str],
    counts: np.ndarray | None,
    columns: dict[str, pa.Array],
    embeddings: np.ndarray | None,
) -> pa.Table:
    """Rows of `SCHEMA`.

    Args:
      user_ids: [B].
      counts: [B] completions of each user; None where nothing is completed.
      columns: flat values of texts, log_probs, num_tokens and finished, and item_ids where completions are items.
      embeddings: [B, D] or None.
    """
    arrays = {"user_id": pa.array(user_ids, pa.string())}
    if counts is not None:
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        arrays |= {name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()}
    if embeddings is not None:
        ends = np.arange(len(embeddings) + 1) * embeddings.shape[1]
        arrays["user_embedding"] = pa.ListArray.from_arrays(
            pa.array(ends, pa.int32()), pa.array(embeddings.reshape(-1))
        )
    return pa.table([arrays.get(field.name, pa.nulls(len(user_ids), field.type)) for field in SCHEMA], schema=SCHEMA)


def write_shard(path: Path, table: pa.Table, request: str) -> None:
    """Writes a table whole, marked with the hash of the request it answers."""
    with artifacts.atomic_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata({_REQUEST: request.encode()}), temporary, compression="zstd")


def is_written(path: Path, request: str, rows: int) -> bool:
    """Whether a whole shard of this request and size is there."""
    if not path.exists():
        return False
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError):
        return False
    return metadata.num_rows == rows and (metadata.metadata or {}).get(_REQUEST) == request.encode()


def write_item_embeddings(folder: Path, item_ids: Sequence[str], vectors: np.ndarray, request: str) -> Path:
    """Writes v_T of every catalogue item, [I, D], beside the shards; returns where."""
    ends = np.arange(len(vectors) + 1) * vectors.shape[1]
    embedding = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(vectors.reshape(-1)))
    table = pa.table({"item_id": pa.array(item_ids, pa.string()), "embedding": embedding})
    write_shard(folder / ITEM_EMBEDDINGS_FILE, table, request)
    return folder / ITEM_EMBEDDINGS_FILE


def claim(folder: Path, made_from: dict[str, str], settings: dict) -> str:
    """Writes the folder's request, or checks it against the one that began it.

    Returns:
      The request's hash, which every shard carries.

    Raises:
      CalrecError: the folder was begun with other inputs or settings; each difference is named.
    """
    path = folder / "request.json"
    request = {"made_from": made_from, "settings": settings}
    if path.exists():
        old = artifacts.read_json(path)
        if not isinstance(old, dict) or set(old) != set(request):
            raise CalrecError(f"{path}: not the request of a decode; delete {folder} and run `calrec decode` again")
        differences = artifacts.request_differences(old["made_from"], old["settings"], made_from, settings)
        if differences:
            raise CalrecError(
                f"{folder}: holds half of other completions ({'; '.join(differences)}); go back to those settings to "
                "resume them, delete the folder to decode again, or choose another --run_dir"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(path, request)
    return artifacts.hash_json(request)
