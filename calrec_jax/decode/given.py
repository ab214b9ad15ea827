"""Files that a decode is given beside its inputs: items to leave out, and candidates to score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.decode.scoring import Candidates
from calrec_jax.errors import CalrecError

LEAVE_OUT = ("none", "last", "all")


def history(dataset: Dataset, split: str, leave_out: str) -> Candidates | None:
    """The items of each user's history that `decode.leave_out_history` names: "none", the "last" or "all" of them."""
    if leave_out == "none":
        return None
    start = dataset.offsets[:-1]
    end = start + dataset.history_lengths(split)
    return Candidates(dataset.items, np.maximum(start, end - 1) if leave_out == "last" else start, end)


def items_left_out(path: Path, dataset: Dataset) -> np.ndarray:
    """[I] bool, the items that a file names in its column `item_id`.

    Args:
      path: a Parquet or CSV file.
      dataset: whose items; others in the file are counted in a line that is printed.

    Raises:
      CalrecError: the file cannot be read or has no such column.
    """
    ids = _read(path, ["item_id"])["item_id"].combine_chunks().cast(pa.string()).unique()
    rows = pc.index_in(ids, value_set=pa.array(dataset.item_ids, pa.string()))
    if rows.null_count:
        first = ids.filter(pc.is_null(rows))[0].as_py()
        print(f"decode: {path} names {rows.null_count:,} items that the catalogue does not have, {first!r} first")
    out = np.zeros(len(dataset.item_ids), bool)
    out[rows.drop_null().to_numpy()] = True
    return out


def without_words(dataset: Dataset) -> np.ndarray:
    """[I] bool, the items whose text has no word beside the template's own; a line that is printed names them."""
    from calrec_jax.rank.bm25 import BM25Tokenizer  # bm25s: other modes do without

    words = BM25Tokenizer()
    empty = {text for text in set(dataset.texts) if not words(text)}
    out = np.fromiter((text in empty for text in dataset.texts), bool, len(dataset.texts))
    if out.any():
        first = dataset.item_ids[np.argmax(out)]
        print(f"decode: {out.sum():,} items have no word in their text, {first!r} first; they are left out")
    return out


def candidates(path: Path, dataset: Dataset, most: int) -> tuple[Candidates, str]:
    """The first `most` items of each user in a folder of rankings or a Parquet file with `user_id` and `item_ids`.

    Returns:
      The candidates, and a hash of where they come from.

    Raises:
      CalrecError: what cannot be read or does not belong to the dataset, a user who is unknown, missing or twice there,
        an unknown item.
    """
    if path.is_dir():
        manifest = artifacts.read_manifest(path, kind="ranking")
        artifacts.check_files(path, manifest)
        if manifest["made_from"].get("dataset") != dataset.hash:
            raise CalrecError(f"{path} ranks the items of another dataset than {dataset.name!r}; rank again")
        paths, digest = sorted(path.glob(artifacts.SHARDS)), manifest["hash"]
    else:
        paths, digest = [path], artifacts.hash_file(path)
    users, items, counts = [], [], []
    user_ids, item_ids = (pa.array(x, pa.string()) for x in (dataset.user_ids, dataset.item_ids))
    for part in paths:
        table = _read(part, ["user_id", "item_ids"])
        users.append(_rows(part, "user", table["user_id"].combine_chunks(), user_ids))
        lists = pc.list_slice(table["item_ids"].combine_chunks(), 0, most)
        counts.append(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False))
        items.append(_rows(part, "item", pc.list_flatten(lists), item_ids))
    user, count = np.concatenate(users), np.concatenate(counts).astype(np.int64)
    seen = np.bincount(user, minlength=len(dataset.user_ids))
    if (seen != 1).any():
        first = int(np.flatnonzero(seen != 1)[0])
        state = "more than once" if seen[first] else "not at all"
        raise CalrecError(
            f"{path} has user {dataset.user_ids[first]!r} {state}; each user of {dataset.name!r} must be there once, "
            "with an empty list where there is nothing to score"
        )
    start, end = np.zeros(len(seen), np.int64), np.zeros(len(seen), np.int64)
    end[user] = np.cumsum(count)
    start[user] = np.cumsum(count) - count
    return Candidates(np.concatenate(items).astype(np.int32), start, end), digest


def _rows(path: Path, what: str, ids: pa.Array, known: pa.Array) -> np.ndarray:
    rows = pc.index_in(ids.cast(pa.string()), value_set=known)
    if rows.null_count:
        unknown = ids.filter(pc.is_null(rows))[0].as_py()
        raise CalrecError(f"{path} names {what} {unknown!r}, which the dataset does not have; correct the file")
    return rows.to_numpy(zero_copy_only=False)


def _read(path: Path, columns: list[str]) -> pa.Table:
    if not path.is_file():
        raise CalrecError(f"{path} does not exist; correct the path")
    try:
        if path.suffix == ".csv":
            as_text = pa.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()))
            table = pa.csv.read_csv(path, convert_options=as_text)
        else:
            table = pq.read_table(path, columns=[c for c in columns if c in pq.read_schema(path).names])
    except (pa.ArrowInvalid, OSError) as error:
        raise CalrecError(
            f"{path} cannot be read as {'CSV' if path.suffix == '.csv' else 'Parquet'} ({error})"
        ) from error
    absent = [name for name in columns if name not in table.column_names]
    if absent:
        raise CalrecError(f"{path} lacks the columns {absent}; it has {table.column_names}")
    return table
