"""The dataset artefact: a category's catalogue and its users' purchase sequences, as flat arrays.

Sequences are held as one array of item indices with offsets (CSR), so that nothing loops over users. An item's index is
its row in `items.parquet`, which is sorted by `item_id`. How a split was made is `prepare`'s (`splits.py`); here it is
three positions in a user's sequence: where training ends, and the targets of validation and test, −1 where there is
none. With leave-last-out every user has both: the last purchase and the one before.

Notable: a dataset is named by the values in its tables, not by the bytes of its files, so it has the same hash whatever
engine, machine or version of Parquet made it. Both tables are written and read a group of rows at a time.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calrec_jax import artifacts
from calrec_jax.data import templates
from calrec_jax.data.tables import ContentDigest, Rows
from calrec_jax.errors import CalrecError

ITEMS_FILE = "items.parquet"
SEQUENCES_FILE = "sequences.parquet"
CARD_FILE = "data_card.json"
QUARANTINE_FILE = "quarantine.jsonl"
SPLITS = ("validation", "test")
_AGAIN = "Delete the folder and run `calrec prepare` again."


def items_schema(attributes: Sequence[str]) -> pa.Schema:
    """Columns of `items.parquet` for these attributes."""
    return pa.schema([(name, pa.string()) for name in ("item_id", *attributes, "text")])


ITEMS_SCHEMA = items_schema(templates.ATTRIBUTES)
SEQUENCES_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("timestamps", pa.list_(pa.int64())),
        ("valid_position", pa.int32()),
        ("test_position", pa.int32()),
        ("train_end", pa.int32()),
    ]
)
_USERS = 1 << 14  # of a row group
_ITEMS = 1 << 14
_GROUPS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A category in memory. I items, U users.

    Attributes:
      name: of the category.
      hash: of the manifest; names this dataset in whatever is made from it.
      template: fingerprint of the template that wrote `texts`.
      item_ids: [I] object (str), ascending.
      texts: [I] item texts.
      attributes: name to the values of all items ([I] each), None where absent: of the Amazon dumps title, category,
        brand and price, of one's own tables what the template names.
      user_ids: [U] object (str), ascending.
      offsets: [U+1] int64; user u's purchases are ``[offsets[u], offsets[u+1])`` of `items` and `timestamps`.
      items: [interactions] int32 item index, oldest first within a user.
      timestamps: [interactions] int64, seconds.
      valid_position: [U] int32, position of the validation target in the user's sequence; −1: the user has none.
      test_position: [U] int32, position of the test target; −1: the user has none.
      train_end: [U] int32; training sees the purchases before this position.
      card: the data card: sources, rules with counts, statistics.
    """

    name: str
    hash: str
    template: str
    item_ids: np.ndarray
    texts: list[str]
    attributes: dict[str, list[str | None]]
    user_ids: np.ndarray
    offsets: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    valid_position: np.ndarray
    test_position: np.ndarray
    train_end: np.ndarray
    card: dict[str, Any]

    def target_positions(self, split: str) -> np.ndarray:
        """[U] int32, position of each user's target in the sequence, −1 where the user has none.

        Raises:
          CalrecError: if `split` is neither "validation" nor "test".
        """
        if split not in SPLITS:
            raise CalrecError(f"split={split!r}: one of {list(SPLITS)}.")
        return self.valid_position if split == "validation" else self.test_position

    def history_lengths(self, split: str) -> np.ndarray:
        """[U] int64, purchases before each user's target; without one, all that belong to the time before the split.

        What is counted over histories (popularity, transitions) so counts everyone, and nothing of the split's time.
        """
        positions = self.target_positions(split)
        before = self.train_end if split == "validation" else np.diff(self.offsets)
        return np.where(positions >= 0, positions, before).astype(np.int64)

    def users_with(self, split: str) -> np.ndarray:
        """Rows of the users of a split, ascending: those with a target; for "train", with two training purchases."""
        if split == "train":
            return np.flatnonzero(self.train_end >= 2)
        return np.flatnonzero(self.target_positions(split) >= 0)

    def history(self, user: int, split: str) -> np.ndarray:
        """Item indices before the split's target (see `history_lengths` for users without one), oldest first."""
        begin, position = self.offsets[user], int(self.target_positions(split)[user])
        if position < 0:
            position = int(self.train_end[user]) if split == "validation" else int(self.offsets[user + 1] - begin)
        return self.items[begin : begin + position]

    def target(self, user: int, split: str) -> int:
        """Item index of the split's target.

        Raises:
          CalrecError: the user has none.
        """
        position = int(self.target_positions(split)[user])
        if position < 0:
            raise CalrecError(f"user {self.user_ids[user]!r} of {self.name} has no {split} target; see users_with.")
        return int(self.items[self.offsets[user] + position])

    def train_items(self, user: int) -> np.ndarray:
        """Item indices that training may see."""
        return self.items[self.offsets[user] : self.offsets[user] + self.train_end[user]]

    @classmethod
    def load(cls, folder: str | Path) -> "Dataset":
        """Reads a dataset folder.

        Raises:
          CalrecError: if the folder is missing, not a complete dataset, or its files do not agree.
        """
        folder = Path(folder)
        manifest = artifacts.read_manifest(folder, kind="dataset")
        content = manifest.get("content", {})
        path = folder / ITEMS_FILE
        items = pa.concat_tables(_groups(path, None, content))
        ids = items["item_id"].to_pylist()
        if None in ids or any(first >= second for first, second in itertools.pairwise(ids)):
            raise CalrecError(f"{path}: item_id must be ascending, without repeats. {_AGAIN}")
        return cls(
            name=manifest["name"],
            hash=manifest["hash"],
            template=manifest["made_from"]["template"],
            item_ids=np.array(ids, dtype=object),
            texts=items["text"].to_pylist(),
            attributes={name: items[name].to_pylist() for name in _attributes(items)},
            card=artifacts.read_json(folder / CARD_FILE),
            **_sequence_arrays(folder / SEQUENCES_FILE, items["item_id"].combine_chunks(), content),
        )


def _attributes(items: pa.Table | pa.Schema) -> list[str]:
    names = items.names if isinstance(items, pa.Schema) else items.column_names
    return [name for name in names if name not in ("item_id", "text")]


def _groups(path: Path, schema: pa.Schema | None, content: Mapping[str, str]) -> Iterator[pa.Table]:
    """The row groups of a Parquet file whose columns must be the schema's, and whose values the manifest's.

    Without a schema it is that of items: every column besides `item_id` and `text` is an attribute.
    """
    if not path.is_file():
        raise CalrecError(f"{path} is missing. {_AGAIN}")
    try:
        with pq.ParquetFile(path) as file:
            schema = schema or items_schema(_attributes(file.schema_arrow))
            missing = [name for name in schema.names if name not in file.schema_arrow.names]
            if missing:
                raise CalrecError(f"{path} lacks the columns {missing}. {_AGAIN}")
            digest = ContentDigest(schema)
            for group in range(file.num_row_groups):
                rows = _typed(path, file.read_row_group(group), schema)
                digest.update(rows)
                yield rows
            if not file.num_row_groups:
                yield schema.empty_table()
    except (pa.ArrowInvalid, OSError) as error:
        raise CalrecError(f"{path} cannot be read as Parquet ({error}). {_AGAIN}") from error
    if content.get(path.name) != digest.hexdigest():
        raise CalrecError(f"{path} does not hold what its manifest names. {_AGAIN}")


def _typed(path: Path, table: pa.Table, schema: pa.Schema) -> pa.Table:
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise CalrecError(f"{path} has columns of other types than {schema.names} need: {error}.") from error


def _sequence_arrays(path: Path, item_ids: pa.Array, content: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Reads the list columns into flat arrays and checks them against the catalogue, a group of users at a time."""
    groups = _groups(path, SEQUENCES_SCHEMA, content)
    # Several at once: the catalogue is hashed anew for each part.
    together = iter(lambda: list(itertools.islice(groups, _GROUPS_AT_ONCE)), [])
    parts = [_group_arrays(path, pa.concat_tables(part), item_ids) for part in together]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    user_ids, lengths = arrays["user_ids"], arrays.pop("lengths")
    if (user_ids[1:] <= user_ids[:-1]).any():
        raise CalrecError(f"{path}: user_id must be ascending, without repeats. {_AGAIN}")
    return {**arrays, "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)}


def _group_arrays(path: Path, sequences: pa.Table, catalogue: pa.Array) -> dict[str, np.ndarray]:
    for name in sequences.column_names:
        if sequences[name].null_count:
            raise CalrecError(f"{path}: column {name} has {sequences[name].null_count} nulls. {_AGAIN}")
    item_ids = sequences["item_ids"].combine_chunks()
    timestamps = sequences["timestamps"].combine_chunks()
    lengths = pc.list_value_length(item_ids).to_numpy(zero_copy_only=False)
    if not np.array_equal(lengths, pc.list_value_length(timestamps).to_numpy(zero_copy_only=False)):
        raise CalrecError(f"{path}: item_ids and timestamps differ in length for some user. {_AGAIN}")
    flat = item_ids.flatten()
    if flat.null_count or timestamps.flatten().null_count:
        raise CalrecError(f"{path}: a purchase without an item or a time. {_AGAIN}")
    index = pc.index_in(flat, value_set=catalogue)
    if index.null_count:
        unknown = flat.filter(pc.is_null(index))[0].as_py()
        raise CalrecError(
            f"{path} names item {unknown!r}, which is not in {ITEMS_FILE} ({index.null_count} such purchases): "
            f"the two files belong to different datasets. {_AGAIN}"
        )
    positions = {
        name: sequences[name].to_numpy().astype(np.int32) for name in ("valid_position", "test_position", "train_end")
    }
    _check_positions(path, sequences["user_id"], lengths, **positions)
    return {
        "user_ids": sequences["user_id"].to_numpy(),
        "lengths": lengths,
        "items": index.to_numpy(zero_copy_only=False).astype(np.int32),
        "timestamps": timestamps.flatten().to_numpy(zero_copy_only=False).astype(np.int64),
        **positions,
    }


def _check_positions(
    path: Path,
    user_ids: pa.ChunkedArray,
    lengths: np.ndarray,
    valid_position: np.ndarray,
    test_position: np.ndarray,
    train_end: np.ndarray,
) -> None:
    has_valid, has_test = valid_position >= 0, test_position >= 0
    wrong = (valid_position < -1) | (test_position < -1) | (train_end < 0) | (train_end > lengths)
    wrong |= has_valid & (valid_position != train_end)
    wrong |= has_test & ((test_position < train_end) | (test_position >= lengths))
    wrong |= has_valid & has_test & (test_position <= valid_position)
    wrong |= has_valid & (valid_position >= lengths)
    if wrong.any():
        user = user_ids[int(np.flatnonzero(wrong)[0])].as_py()
        raise CalrecError(
            f"{path}: valid_position, test_position and train_end of user {user!r} are not 0 <= train_end = valid < "
            f"test < length, where there are targets ({int(wrong.sum())} such users). {_AGAIN}"
        )


def sequence_groups(users: Rows, purchases: Rows) -> Iterator[pa.Table]:
    """Rows of `SEQUENCES_SCHEMA` from flat rows, a group of users at a time.

    Args:
      users: by id, with columns user_id, length and the positions.
      purchases: item_id, timestamp, by user and in the user's order.
    """
    for group in users.groups(_USERS):
        lengths = group["length"].to_numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        rows = purchases.take(int(lengths.sum()))
        columns = {
            "user_id": group["user_id"],
            "item_ids": pa.ListArray.from_arrays(offsets, rows["item_id"].combine_chunks().cast(pa.string())),
            "timestamps": pa.ListArray.from_arrays(offsets, rows["timestamp"].combine_chunks()),
            **{name: group[name] for name in ("valid_position", "test_position", "train_end")},
        }
        yield pa.table(columns)


def save_dataset(
    folder: str | Path,
    *,
    name: str,
    items: pa.Table | Rows,
    sequences: pa.Table | Iterable[pa.Table],
    template: templates.Template,
    card: Mapping[str, Any],
    made_from: Mapping[str, str],
    settings: Mapping[str, Any],
    split: Mapping[str, Any] | None = None,
    quarantine: Path | None = None,
) -> Dataset:
    """Writes a dataset folder as a whole, then reads it back.

    Args:
      folder: to make; must not exist yet.
      name: of the category.
      items: item_id and the attributes, the template's among them: a table in any row order, or `Rows` by item_id. The
        texts are written here.
      sequences: columns of `SEQUENCES_SCHEMA`: a table in any row order, or tables by user_id. Where `train_end` is
        null, training ends at the validation target.
      template: writes the item texts.
      card: the data card; `content` is added.
      made_from: role to hash; the template's is added.
      settings: of the step that made it.
      split: its kind, times and counts, for the manifest; None is leave-last-out.
      quarantine: the file of bad lines to keep beside the tables; none writes an empty one.
    """
    if isinstance(items, pa.Table):
        items = items.select(["item_id", *_attributes(items)]).sort_by("item_id")
        schema, item_groups = items.schema, _cut(items, _ITEMS)
    else:
        schema, item_groups = items.schema, items.groups(_ITEMS)
    if isinstance(sequences, pa.Table):
        sequences = _cut(sequences.sort_by("user_id"), _USERS)
    with artifacts.atomic_folder(folder) as temporary:
        schema = items_schema(_attributes(schema))
        content = {
            ITEMS_FILE: _write(temporary / ITEMS_FILE, schema, (_with_texts(part, template) for part in item_groups)),
            SEQUENCES_FILE: _write(temporary / SEQUENCES_FILE, SEQUENCES_SCHEMA, map(_with_train_end, sequences)),
        }
        artifacts.write_json(temporary / CARD_FILE, {**card, "content": content})
        if quarantine is None:
            (temporary / QUARANTINE_FILE).touch()
        else:
            shutil.copyfile(quarantine, temporary / QUARANTINE_FILE)
        artifacts.write_manifest(
            temporary,
            kind="dataset",
            made_from={**made_from, "template": template.fingerprint},
            settings=dict(settings),
            name=name,
            split=dict(split) if split is not None else {"kind": "leave_last_out"},
            content=content,
        )
    return Dataset.load(folder)


def _cut(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    return (table.slice(begin, rows) for begin in range(0, max(1, table.num_rows), rows))


def _with_texts(items: pa.Table, template: templates.Template) -> pa.Table:
    texts = pa.array([template.item_text(row) for row in items.to_pylist()], pa.string())
    return items.append_column("text", texts)


def _with_train_end(sequences: pa.Table) -> pa.Table:
    valid = sequences["valid_position"]
    end = pc.coalesce(sequences["train_end"], valid) if "train_end" in sequences.column_names else valid
    others = [name for name in sequences.column_names if name != "train_end"]
    return sequences.select(others).append_column("train_end", end)


def _write(path: Path, schema: pa.Schema, groups: Iterable[pa.Table]) -> str:
    """Writes each table as a row group; returns the digest of the values."""
    digest = ContentDigest(schema)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in groups:
            rows = group.select(schema.names).cast(schema).combine_chunks()
            digest.update(rows)
            writer.write_table(rows, row_group_size=max(1, rows.num_rows))
    return digest.hexdigest()
