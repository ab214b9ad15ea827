"""The dataset artefact: a category's catalogue and its users' purchase sequences, as flat arrays.

Sequences are held as one array of item indices with offsets (CSR), so that nothing loops over users. An item's index is
its row in `items.parquet`, which is sorted by `item_id`. Splits are leave-last-out: the target of ``test`` is the last
purchase, that of ``validation`` the one before; training sees what comes before the validation target.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calrec_jax import artifacts
from calrec_jax.data import templates
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
    ]
)


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
      valid_position: [U] int32, position of the validation target in the user's sequence.
      test_position: [U] int32, position of the test target.
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
    card: dict[str, Any]

    def _position(self, user: int, split: str) -> int:
        if split not in SPLITS:
            raise CalrecError(f"split={split!r}: one of {list(SPLITS)}.")
        return int((self.valid_position if split == "validation" else self.test_position)[user])

    def history(self, user: int, split: str) -> np.ndarray:
        """Item indices before the split's target, oldest first."""
        begin = self.offsets[user]
        return self.items[begin : begin + self._position(user, split)]

    def target(self, user: int, split: str) -> int:
        """Item index of the split's target."""
        return int(self.items[self.offsets[user] + self._position(user, split)])

    def train_items(self, user: int) -> np.ndarray:
        """Item indices that training may see: all before the validation target."""
        return self.history(user, "validation")

    @classmethod
    def load(cls, folder: str | Path) -> "Dataset":
        """Reads a dataset folder.

        Raises:
          CalrecError: if the folder is missing, not a complete dataset, or its files do not agree.
        """
        folder = Path(folder)
        manifest = artifacts.read_manifest(folder, kind="dataset")
        items = _read_items(folder / ITEMS_FILE, manifest["files"])
        sequences = _read_table(folder / SEQUENCES_FILE, SEQUENCES_SCHEMA, manifest["files"])
        ids = items["item_id"].to_pylist()
        if None in ids or any(first >= second for first, second in itertools.pairwise(ids)):
            raise CalrecError(f"{folder / ITEMS_FILE}: item_id must be ascending, without repeats. {_AGAIN}")
        arrays = _sequence_arrays(folder, items, sequences)
        return cls(
            name=manifest["name"],
            hash=manifest["hash"],
            template=manifest["made_from"]["template"],
            item_ids=np.array(ids, dtype=object),
            texts=items["text"].to_pylist(),
            attributes={name: items[name].to_pylist() for name in _attributes(items)},
            card=artifacts.read_json(folder / CARD_FILE),
            **arrays,
        )


def _objects(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), dtype=object)


def _read_table(path: Path, schema: pa.Schema, hashes: Mapping[str, str]) -> pa.Table:
    """Reads a Parquet file whose columns must be the schema's and whose bytes must be the manifest's."""
    return _typed(path, _read_checked(path, hashes), schema)


def _read_items(path: Path, hashes: Mapping[str, str]) -> pa.Table:
    """The catalogue; every column besides `item_id` and `text` is an attribute."""
    table = _read_checked(path, hashes)
    return _typed(path, table, items_schema(_attributes(table)))


def _attributes(items: pa.Table) -> list[str]:
    return [name for name in items.column_names if name not in ("item_id", "text")]


def _read_checked(path: Path, hashes: Mapping[str, str]) -> pa.Table:
    if not path.is_file():
        raise CalrecError(f"{path} is missing. {_AGAIN}")
    if hashes.get(path.name) != artifacts.hash_file(path):
        raise CalrecError(f"{path} is not the file its manifest names. {_AGAIN}")
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CalrecError(f"{path} cannot be read as Parquet ({error}). {_AGAIN}") from error


def _typed(path: Path, table: pa.Table, schema: pa.Schema) -> pa.Table:
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise CalrecError(f"{path} lacks the columns {missing}. {_AGAIN}")
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise CalrecError(f"{path} has columns of other types than {schema.names} need: {error}.") from error


def _sequence_arrays(folder: Path, items: pa.Table, sequences: pa.Table) -> dict[str, np.ndarray]:
    """Turns the list columns into flat arrays and checks them against the catalogue."""
    path = folder / SEQUENCES_FILE
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
    index = pc.index_in(flat, value_set=items["item_id"].combine_chunks())
    if index.null_count:
        unknown = flat.filter(pc.is_null(index))[0].as_py()
        raise CalrecError(
            f"{path} names item {unknown!r}, which is not in {ITEMS_FILE} ({index.null_count} such purchases): "
            f"the two files belong to different datasets. {_AGAIN}"
        )
    valid = sequences["valid_position"].to_numpy().astype(np.int32)
    test = sequences["test_position"].to_numpy().astype(np.int32)
    wrong = np.flatnonzero((valid < 0) | (test <= valid) | (test >= lengths))
    if wrong.size:
        user = sequences["user_id"][int(wrong[0])].as_py()
        raise CalrecError(
            f"{path}: valid_position and test_position of user {user!r} are not 0 <= valid < test < length "
            f"({wrong.size} such users). {_AGAIN}"
        )
    return {
        "user_ids": _objects(sequences["user_id"]),
        "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        "items": index.to_numpy(zero_copy_only=False).astype(np.int32),
        "timestamps": timestamps.flatten().to_numpy(zero_copy_only=False).astype(np.int64),
        "valid_position": valid,
        "test_position": test,
    }


def save_dataset(
    folder: str | Path,
    *,
    name: str,
    items: pa.Table,
    sequences: pa.Table,
    template: templates.Template,
    card: Mapping[str, Any],
    made_from: Mapping[str, str],
    settings: Mapping[str, Any],
    quarantine: Path | None = None,
) -> Dataset:
    """Writes a dataset folder as a whole, then reads it back.

    Args:
      folder: to make; must not exist yet.
      name: of the category.
      items: item_id and the attributes, the template's among them, in any row order; the texts are written here.
      sequences: columns of `SEQUENCES_SCHEMA` in any row order.
      template: writes the item texts.
      card: the data card.
      made_from: role to hash; the template's is added.
      settings: of the step that made it.
      quarantine: the file of bad lines to keep beside the tables; none writes an empty one.
    """
    items = items.select(["item_id", *_attributes(items)]).sort_by("item_id")
    texts = pa.array([template.item_text(row) for row in items.to_pylist()], pa.string())
    items = items.append_column("text", texts).cast(items_schema(_attributes(items)))
    sequences = sequences.select(SEQUENCES_SCHEMA.names).cast(SEQUENCES_SCHEMA).sort_by("user_id")
    with artifacts.atomic_folder(folder) as temporary:
        temporary = Path(temporary)
        pq.write_table(items, temporary / ITEMS_FILE, compression="zstd")
        pq.write_table(sequences, temporary / SEQUENCES_FILE, compression="zstd")
        artifacts.write_json(temporary / CARD_FILE, dict(card))
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
            files={file: artifacts.hash_file(temporary / file) for file in (ITEMS_FILE, SEQUENCES_FILE)},
        )
    return Dataset.load(folder)
