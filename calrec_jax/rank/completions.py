"""Completions as the ranking reads them: Parquet shards in the order of a dataset's users.

Notable: only the columns a source needs are read, and texts stay in Arrow until they are dictionary-encoded, so that
the same text of many users is one string.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.rank.sources import Constrained, Tower
from calrec_jax.rank.user_texts import UserTexts, check_count

MISSING = ("error", "skip")


class Completions:
    """The completions of a dataset's users.

    Attributes:
      folder: they are in.
      users: rows of the dataset that have completions, ascending.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        dataset: Dataset,
        columns: Sequence[str],
        missing: str = "error",
        split: str = "test",
    ):
        """Reads columns of the shards.

        Args:
          folder: of the completions.
          dataset: they were made from.
          columns: to read beside `user_id`.
          missing: what to do about users of the split without completions: "error" or "skip".
          split: "validation" or "test".

        Raises:
          CalrecError: no shards, a column is absent or null, a user is unknown, twice there or (as asked) missing.
        """
        if missing not in MISSING:
            raise CalrecError(f"missing is {missing!r}: choose one of {list(MISSING)}")
        self.folder = pathlib.Path(folder)
        self._dataset = dataset
        table = self._read(["user_id", *columns])
        ids = table["user_id"].combine_chunks()
        rows = pc.index_in(ids, value_set=pa.array(dataset.user_ids, pa.string()))
        if rows.null_count:
            unknown = ids.filter(pc.is_null(rows))[0].as_py()
            raise CalrecError(f"{folder} has completions of user {unknown!r}, who is not in the dataset {dataset.name}")
        places = rows.to_numpy(zero_copy_only=False)
        by = np.argsort(places, kind="stable")
        self.users = places[by].astype(np.int64)
        repeated = np.flatnonzero(self.users[1:] == self.users[:-1])
        if repeated.size:
            raise CalrecError(f"{folder} has user {dataset.user_ids[self.users[repeated[0]]]!r} more than once")
        wanted = dataset.users_with(split)
        absent = np.setdiff1d(wanted, self.users)
        if absent.size and missing == "error":
            raise CalrecError(
                f"{folder} lacks completions of {absent.size} of the {len(wanted)} users, user "
                f"{dataset.user_ids[absent[0]]!r} first; decode them, or rank the others alone with rank.missing='skip'"
            )
        self._table = table.take(by).combine_chunks()

    def _read(self, columns: list[str]) -> pa.Table:
        paths = sorted(self.folder.glob(artifacts.SHARDS))
        if not paths:
            raise CalrecError(f"{self.folder} has no part-*.parquet; run `calrec decode` again")
        tables = []
        for path in paths:
            try:
                file = pq.ParquetFile(path)
                absent = [name for name in columns if name not in file.schema_arrow.names]
                if absent:
                    raise CalrecError(f"{path} lacks the columns {absent}; decode again")
                tables.append(file.read(columns=columns))
            except (pa.ArrowInvalid, OSError) as error:
                raise CalrecError(f"{path} cannot be read as Parquet ({error}); decode again") from error
        return pa.concat_tables(tables, promote_options="permissive")

    def has(self, column: str) -> bool:
        """Whether every user has a value in a column that was read (`item_ids` is null in a free decode)."""
        return len(self._table) > 0 and self._table[column].null_count == 0

    def lists(self, column: str, hint: str = "decode again") -> tuple[pa.Array, np.ndarray]:
        """The flat values of a list column and each user's number of them."""
        values = self._table[column].combine_chunks()
        if values.null_count or pa.types.is_null(values.type):
            raise CalrecError(f"{self.folder}: {column} is null for {values.null_count} of {len(values)} users; {hint}")
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False).astype(np.int64)
        flat = values.flatten()
        if flat.null_count:
            raise CalrecError(f"{self.folder}: {column} holds {flat.null_count} nulls; {hint}")
        return flat, lengths

    def numbers(self, column: str, lengths: np.ndarray) -> np.ndarray:
        """A list column of numbers with as many of them as `lengths` says."""
        flat, own = self.lists(column)
        if not np.array_equal(own, lengths):
            first = self._dataset.user_ids[self.users[np.flatnonzero(own != lengths)[0]]]
            raise CalrecError(f"{self.folder}: user {first!r} has {column} of another length than texts; decode again")
        return flat.to_numpy(zero_copy_only=False)

    def user_texts(self, score: str) -> UserTexts:
        """The distinct texts of all `users`, with `score` ("sum" or "mean") of their log-probabilities."""
        flat, lengths = self.lists("texts")
        coded = flat.dictionary_encode()
        return UserTexts.from_flat(
            coded.dictionary.to_pylist(),
            coded.indices.to_numpy(zero_copy_only=False),
            lengths,
            self.numbers("log_probs", lengths),
            self.numbers("num_tokens", lengths) if score == "mean" else None,
            score,
        )

    def distinct_texts(self) -> tuple[list[str], int]:
        """The different texts of all `users`, and how many there are with repeats."""
        flat, _ = self.lists("texts")
        return pc.unique(flat).to_pylist(), len(flat)

    def constrained(self) -> Constrained:
        """The items of a constrained decode."""
        hint = "only a constrained decode has them: set source='completions', or decode constrained"
        flat, lengths = self.lists("item_ids", hint)
        items = pc.index_in(flat, value_set=pa.array(self._dataset.item_ids, pa.string()))
        if items.null_count:
            unknown = flat.filter(pc.is_null(items))[0].as_py()
            raise CalrecError(f"{self.folder} names item {unknown!r}, which is not in the catalogue of the dataset")
        check_count(lengths, "decode.num_beams")
        starts = np.concatenate([[0], np.cumsum(lengths)])
        log_probs = self.numbers("log_probs", lengths).astype(np.float64)
        if not np.isfinite(log_probs).all():
            raise CalrecError(f"{self.folder}: log_probs hold NaN or infinite values; decode again")
        return Constrained(starts, items.to_numpy(zero_copy_only=False), log_probs, len(self._dataset.item_ids))

    def tower(self) -> Tower:
        """The users' vectors and those of the whole catalogue."""
        hint = "only a decode that writes embeddings has them"
        flat, lengths = self.lists("user_embedding", hint)
        path = self.folder / "item_embeddings.parquet"
        if not path.exists():
            raise CalrecError(f"{path} does not exist; {hint}")
        try:
            table = pq.read_table(path, columns=["item_id", "embedding"])
        except (pa.ArrowInvalid, OSError) as error:
            raise CalrecError(f"{path} cannot be read ({error}); decode again") from error
        vectors = table["embedding"].combine_chunks()
        at = pc.index_in(pa.array(self._dataset.item_ids, pa.string()), value_set=table["item_id"].combine_chunks())
        if at.null_count:
            raise CalrecError(f"{path} lacks {at.null_count} items of the dataset's catalogue; decode again")
        size = len(vectors.flatten()) // max(1, len(vectors))
        same = np.unique(np.append(lengths, pc.list_value_length(vectors).to_numpy(zero_copy_only=False)))
        if not np.array_equal(same, [size]):
            raise CalrecError(f"{self.folder}: the embeddings have {same.tolist()} numbers, not one size; decode again")
        items = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
        users = flat.to_numpy(zero_copy_only=False).reshape(-1, size)
        if not (np.isfinite(items).all() and np.isfinite(users).all()):
            raise CalrecError(f"{self.folder}: the embeddings hold NaN or infinite values; decode again")
        return Tower(users, items[at.to_numpy(zero_copy_only=False)])
