"""Rankings on disk: Parquet shards, a row a user, written and read block by block.

Notable: whole-catalogue lists are large (users × items), so item ids are dictionary-encoded, scores split by bytes and
all of it compressed with zstd; a reader holds one row group at a time and checks what it reads, since rankings made
by others are evaluated, too.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.rank.ordering import Ordered

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("sources", pa.list_(pa.int16())),
        ("ties_beyond_depth", pa.int32()),
    ]
)
USERS_A_SHARD = 2048
_ITEMS = "item_ids.list.element"


class RankingWriter:
    """Writes blocks of ranked users to one shard: a row group a block."""

    def __init__(self, folder: pathlib.Path, dataset: Dataset, shard: int = 0):
        self._path = folder / f"part-{shard:05d}.parquet"
        self._user_ids = dataset.user_ids
        self._item_ids = pa.array(dataset.item_ids, pa.string())
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "RankingWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, users: np.ndarray, lists: Ordered) -> None:
        """Appends the lists of `users` (rows of the dataset)."""
        depth = lists.items.shape[1]
        offsets = pa.array(np.arange(len(users) + 1, dtype=np.int32) * depth)
        items = pa.DictionaryArray.from_arrays(pa.array(lists.items.ravel()), self._item_ids)
        columns = [
            pa.array(self._user_ids[users], pa.string()),
            pa.ListArray.from_arrays(offsets, items),
            pa.ListArray.from_arrays(offsets, pa.array(lists.scores.ravel())),
            pa.ListArray.from_arrays(offsets, pa.array(lists.sources.ravel())),
            pa.array(lists.ties_beyond_depth),
        ]
        table = pa.table(columns, names=SCHEMA.names)
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path,
                table.schema,
                compression="zstd",
                compression_level=3,
                use_dictionary=[_ITEMS, "sources.list.element"],
                use_byte_stream_split=["scores.list.element"],
                store_schema=False,  # a plain list<string> for every reader
                dictionary_pagesize_limit=2**24,
            )
        self._writer.write_table(table, row_group_size=max(1, len(users)))


@dataclasses.dataclass(frozen=True)
class RankedLists:
    """Ranked lists as read back, padded to the longest.

    Attributes:
      users: [B] rows of the dataset.
      items: [B, depth] int32, −1 past the end of a list.
      scores: [B, depth] float32, NaN past the end of a list.
      lengths: [B] int64.
      ties_beyond_depth: [B] int32.
      sources: [B, depth] int16, the completion that gave the score; −1 none, and past the end of a list.
    """

    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    ties_beyond_depth: np.ndarray
    sources: np.ndarray

    def take(self, rows: np.ndarray) -> "RankedLists":
        """These rows alone."""
        return RankedLists(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    def mean_ranks(self) -> np.ndarray:
        """[B, depth] float64: rank of each place, 1 the best; tied places, beyond the depth too, share the mean."""
        places = np.arange(self.scores.shape[1])
        starts = np.ones(self.scores.shape, bool)
        starts[:, 1:] = self.scores[:, 1:] != self.scores[:, :-1]
        first = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
        ends = np.ones(self.scores.shape, bool)
        ends[:, :-1] = starts[:, 1:]
        last = np.minimum.accumulate(np.where(ends, places, places[-1])[:, ::-1], axis=1)[:, ::-1]
        beyond = np.where(last == self.lengths[:, None] - 1, self.ties_beyond_depth[:, None], 0)
        return 1.0 + (first + last + beyond) / 2


def _pad(lists: list[RankedLists]) -> RankedLists:
    """Joins blocks of different depths."""
    depth = max(block.items.shape[1] for block in lists)

    def widen(array: np.ndarray, value: float) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, depth - array.shape[1])), constant_values=value)

    return RankedLists(
        users=np.concatenate([block.users for block in lists]),
        items=np.concatenate([widen(block.items, -1) for block in lists]),
        scores=np.concatenate([widen(block.scores, np.nan) for block in lists]),
        lengths=np.concatenate([block.lengths for block in lists]),
        ties_beyond_depth=np.concatenate([block.ties_beyond_depth for block in lists]),
        sources=np.concatenate([widen(block.sources, -1) for block in lists]),
    )


class RankingReader:
    """Reads a ranking's shards against a dataset.

    Attributes:
      folder: of the ranking.
      users: rows of the dataset that have a list, in the shards' order.
    """

    def __init__(self, folder: pathlib.Path, dataset: Dataset):
        """Reads which users are where.

        Raises:
          CalrecError: no shards, one that is no Parquet file or lacks a column, a user who is unknown or there twice.
        """
        self.folder = pathlib.Path(folder)
        self._dataset = dataset
        self._item_ids = pa.array(dataset.item_ids, pa.string())
        paths = sorted(self.folder.glob(artifacts.SHARDS))
        if not paths:
            raise CalrecError(f"{folder} has no part-*.parquet; run `calrec rank` again")
        self._files = [self._open(path) for path in paths]
        self._groups = [
            (file, group) for file in range(len(paths)) for group in range(self._files[file].num_row_groups)
        ]
        ids = [self._files[file].read_row_group(group, columns=["user_id"])["user_id"] for file, group in self._groups]
        sizes = [len(column) for column in ids]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        joined = pa.concat_arrays([chunk for column in ids for chunk in column.chunks] or [pa.array([], pa.string())])
        rows = pc.index_in(joined, value_set=pa.array(dataset.user_ids, pa.string()))
        if rows.null_count:
            unknown = joined.filter(pc.is_null(rows))[0].as_py()
            raise CalrecError(f"{folder} ranks user {unknown!r}, who is not in the dataset {dataset.name}")
        self.users = rows.to_numpy(zero_copy_only=False).astype(np.int64)
        values, counts = np.unique(self.users, return_counts=True)
        if (counts > 1).any():
            raise CalrecError(f"{folder} ranks user {dataset.user_ids[values[counts > 1][0]]!r} more than once")
        self._place = np.full(len(dataset.user_ids), -1, np.int64)
        self._place[self.users] = np.arange(len(self.users))
        self._last: tuple[int, RankedLists] | None = None

    def _open(self, path: pathlib.Path) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(path, read_dictionary=[_ITEMS])
        except (pa.ArrowInvalid, OSError) as error:
            raise CalrecError(f"{path} cannot be read as Parquet ({error}); rank again") from error
        missing = [name for name in ("user_id", "item_ids", "scores") if name not in file.schema_arrow.names]
        if missing:
            raise CalrecError(f"{path} lacks the columns {missing}; a ranking has {SCHEMA.names}")
        return file

    def blocks(self) -> Iterator[RankedLists]:
        """All lists, a row group at a time."""
        for group in range(len(self._groups)):
            yield self._read(group)

    def rows(self, users: np.ndarray) -> RankedLists:
        """The lists of `users`, in that order.

        Raises:
          CalrecError: a user has none.
        """
        places = self._place[users]
        if (places < 0).any():
            absent = np.flatnonzero(places < 0)
            first = self._dataset.user_ids[users[absent[0]]]
            raise CalrecError(f"{self.folder} has no list of {len(absent)} users, user {first!r} first; rank them, too")
        groups = np.searchsorted(self._starts, places, side="right") - 1
        lists = _pad([self._read(group) for group in np.unique(groups)])
        by = np.argsort(lists.users)
        return lists.take(by[np.searchsorted(lists.users[by], users)])

    def _read(self, number: int) -> RankedLists:
        if self._last is None or self._last[0] != number:
            self._last = (number, self._read_group(number))
        return self._last[1]

    def _read_group(self, number: int) -> RankedLists:
        file, group = self._groups[number]
        table = self._files[file].read_row_group(group).combine_chunks()
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        lengths = pc.list_value_length(columns["item_ids"]).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        score_lengths = pc.list_value_length(columns["scores"]).fill_null(0).to_numpy(zero_copy_only=False)
        if not np.array_equal(lengths, score_lengths):
            raise CalrecError(f"{self.folder}: item_ids and scores differ in length for some user")
        codes = self._codes(columns["item_ids"].flatten())
        values = columns["scores"].flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        inside = np.arange(lengths.max(initial=1))[None] < lengths[:, None]
        items = np.full(inside.shape, -1, np.int32)
        items[inside] = codes
        scores = np.full(inside.shape, np.nan, np.float32)
        scores[inside] = values
        beyond = np.zeros(len(lengths), np.int32)
        if "ties_beyond_depth" in columns:
            beyond = columns["ties_beyond_depth"].fill_null(0).to_numpy(zero_copy_only=False).astype(np.int32)
        sources = np.full(inside.shape, -1, np.int16)
        if "sources" in columns:
            own = columns["sources"].flatten().fill_null(-1).to_numpy(zero_copy_only=False)
            if len(own) == len(values):
                sources[inside] = own
        users = self.users[self._starts[number] : self._starts[number + 1]]
        self._check(users, items, scores, inside)
        return RankedLists(users, items, scores, lengths, beyond, sources)

    def _codes(self, flat: pa.Array) -> np.ndarray:
        """Item indices of a flat array of item ids."""
        if not pa.types.is_dictionary(flat.type):
            flat = flat.dictionary_encode()
        known = pc.index_in(flat.dictionary.cast(pa.string()), value_set=self._item_ids)
        used = pc.take(known, flat.indices)
        if used.null_count:
            strange = pc.filter(flat, pc.is_null(used))[0].as_py()
            raise CalrecError(f"{self.folder} ranks item {strange!r}, which is not in the catalogue of the dataset")
        return used.to_numpy(zero_copy_only=False)

    def _check(self, users: np.ndarray, items: np.ndarray, scores: np.ndarray, inside: np.ndarray) -> None:
        by_item = np.sort(items, axis=1)
        twice = ((by_item[:, 1:] == by_item[:, :-1]) & (by_item[:, 1:] >= 0)).any(axis=1)
        rising = ~(scores[:, 1:] <= scores[:, :-1]) & inside[:, 1:]
        wrong = twice | rising.any(axis=1) | (np.isnan(scores) & inside).any(axis=1)
        if wrong.any():
            user = self._dataset.user_ids[users[np.flatnonzero(wrong)[0]]]
            reason = "names an item twice" if twice[np.flatnonzero(wrong)[0]] else "has scores that are not descending"
            raise CalrecError(f"{self.folder}: the list of user {user!r} {reason} ({int(wrong.sum())} such users)")
