"""Rankings made by others: Parquet, JSON lines or TREC run files, read as they are and checked against the dataset.

A file has a row a user (`user_id`, `item_ids` best first, and `scores` if there are any) or a row an entry (`user_id`,
`item_id`, `score`); a TREC run has lines `user Q0 item rank score tag`. Where there are scores they decide, and equal
ones are ties; without them the order does. Names ending in `.gz` are read through gzip.

Notable: nothing that is wrong with a file helps it, and nothing is dropped in silence. Whatever cannot be matched is
counted and shown with examples (`ForeignRanking.findings`), every user of the split stays in the denominator, and a
wrong entry keeps its place, so that what stands below does not move up:

- a user who is not in the dataset, or has no target in this split, is passed over; one of the split without a list is a
  miss;
- an item that is not in the catalogue is nobody's target; of an item that a list repeats, the best place counts;
- an entry whose score is not a number stands before all others of its list, and is nobody's target.
"""

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.places import Targets
from calrec_jax.rank.shards import RankedLists

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".trec": "trec", ".run": "trec", ".txt": "trec"}
EXAMPLES = 5
_NOT_AN_ITEM = -2
_USERS_A_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class ForeignRanking:
    """A ranking made by others, in the dataset's numbers.

    Attributes:
      name: of its row.
      path: of the file.
      hash: of its bytes.
      depth: its longest list.
      findings: what could not be matched: {"what", "count", "examples"}, nothing of what did not occur.
    """

    name: str
    path: pathlib.Path
    hash: str
    depth: int
    findings: list[dict[str, Any]]
    _users: np.ndarray
    _starts: np.ndarray
    _items: np.ndarray
    _scores: np.ndarray

    def blocks(self) -> Iterator[RankedLists]:
        """The lists of evaluated users."""
        for at in range(0, len(self._users), _USERS_A_BLOCK):
            starts = self._starts[at : at + _USERS_A_BLOCK + 1]
            lengths = np.diff(starts)
            inside = np.arange(lengths.max(initial=1))[None] < lengths[:, None]
            items = np.full(inside.shape, -1, np.int32)
            items[inside] = self._items[starts[0] : starts[-1]]
            scores = np.full(inside.shape, np.nan)  # float64, as the file has them: float32 would make ties
            scores[inside] = self._scores[starts[0] : starts[-1]]
            users = self._users[at : at + _USERS_A_BLOCK]
            no_ties, no_sources = np.zeros(len(users), np.int32), np.full(items.shape, -1, np.int16)
            yield RankedLists(users, items, scores, lengths, no_ties, no_sources)


@dataclasses.dataclass(frozen=True)
class _Entries:
    """The file's entries, flat, in its order: user and item ids, scores (NaN allowed), and claimed ranks of TREC."""

    users: pa.Array
    items: pa.Array
    scores: np.ndarray
    empty: list[str]
    ranks: np.ndarray | None = None


def parse_names(arguments: Sequence[str]) -> dict[str, pathlib.Path]:
    """Row name to file of `--rankings` arguments, each `FILE` or `NAME=FILE`; the file's stem names it otherwise.

    Raises:
      CalrecError: two have one name.
    """
    files: dict[str, pathlib.Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or pathlib.Path(argument).exists():
            path = argument
            name = pathlib.Path(path).name.removesuffix(".gz")
            name = name.removesuffix(pathlib.Path(name).suffix)
        if name in files:
            raise CalrecError(
                f"--rankings: two files would be the row {name!r}; name one, as in --rankings=other={path}"
            )
        files[name] = pathlib.Path(path).expanduser()
    return files


def read_ranking(name: str, path: pathlib.Path, targets: Targets) -> ForeignRanking:
    """Reads a file and matches it with the dataset.

    Raises:
      CalrecError: the file is missing, of no known kind, broken (file and line are named), ranks a user in two rows, or
        nothing in it is known to the dataset.
    """
    path = pathlib.Path(path)
    digest = artifacts.hash_file(path)
    suffix = pathlib.Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in KINDS:
        raise CalrecError(
            f"{path}: rankings are read from files whose names end in {', '.join(KINDS)} (or .gz after it)"
        )
    entries = {"parquet": _parquet, "jsonl": _jsonl, "trec": _trec}[KINDS[suffix]](path)
    return _match(name, path, digest, entries, targets)


def _match(name: str, path: pathlib.Path, digest: str, entries: _Entries, targets: Targets) -> ForeignRanking:
    dataset = targets.dataset
    users = pc.index_in(entries.users, value_set=pa.array(dataset.user_ids, pa.string())).fill_null(-1).to_numpy()
    items = pc.index_in(entries.items, value_set=pa.array(dataset.item_ids, pa.string())).fill_null(-1).to_numpy()
    for what, found, own in (("user", users, dataset.user_ids), ("item", items, dataset.item_ids)):
        if len(found) and (found < 0).all():
            theirs = (entries.users if what == "user" else entries.items)[0].as_py()
            raise CalrecError(
                f"{path}: no {what} of it is in the dataset {dataset.name}: it has {what}s like {theirs!r}, the "
                f"dataset like {str(own[0])!r}; rank this dataset, with its ids"
            )
    findings = _Findings()
    findings.add("users who are not in the dataset", _distinct(entries.users, users < 0))
    in_split = np.append(targets.row_of, -1)[users] >= 0  # the −1 of an unknown user finds the appended one
    findings.add("users without a target in this split", _distinct(entries.users, (users >= 0) & ~in_split))
    findings.add("items that are not in the catalogue", _distinct(entries.items, in_split & (items < 0)))

    kept = np.flatnonzero(in_split)
    rows, items, scores = users[kept].astype(np.int64), items[kept], entries.scores[kept]
    nan = np.isnan(scores)
    findings.add_rows("entries whose score is not a number", dataset.user_ids, rows[nan])
    items = np.where((items < 0) | nan, _NOT_AN_ITEM, items)
    by = np.lexsort((np.arange(len(rows)), np.where(nan, -np.inf, -scores), rows))
    rows, items, scores = rows[by], items[by], np.where(nan, np.inf, scores)[by]
    if entries.ranks is not None:
        ranks = entries.ranks[kept][by]
        against = (rows[1:] == rows[:-1]) & (ranks[1:] < ranks[:-1]) & (scores[1:] != scores[:-1])
        findings.add_rows("entries whose rank is not in the order of the scores", dataset.user_ids, rows[1:][against])
    repeated = _repeats(rows, items)
    findings.add_rows("repeats of an item in one list", dataset.user_ids, rows[repeated])
    items[repeated] = _NOT_AN_ITEM

    listed, starts = np.unique(rows, return_index=True)
    empty = [user for user in entries.empty if user in set(dataset.user_ids)]
    findings.add("lists without an entry", empty)
    findings.add_rows("users of the split without a list, who are misses", dataset.user_ids,
                      np.setdiff1d(targets.users, listed))  # fmt: skip
    named = np.zeros(targets.num_items, bool)
    named[items[items >= 0]] = True
    findings.add(
        "targets that no list of the file names", sorted(set(dataset.item_ids[targets.items[~named[targets.items]]]))
    )
    starts = np.append(starts, len(rows))
    depth = int(np.diff(starts).max(initial=1))
    return ForeignRanking(name, path, digest, depth, findings.rows, listed, starts, items.astype(np.int32), scores)


def _repeats(rows: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Places of all but the first of an item's entries in one list."""
    by = np.lexsort((np.arange(len(rows)), items, rows))
    again = (rows[by][1:] == rows[by][:-1]) & (items[by][1:] == items[by][:-1]) & (items[by][1:] >= 0)
    return np.sort(by[1:][again])


class _Findings:
    """Gathers what could not be matched."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, found: Sequence[str]) -> None:
        if len(found):
            self.rows.append({"what": what, "count": len(found), "examples": [str(each) for each in found[:EXAMPLES]]})

    def add_rows(self, what: str, user_ids: np.ndarray, users: np.ndarray) -> None:
        """The same of entries, with their users as examples."""
        if len(users):
            _, first = np.unique(users, return_index=True)
            examples = [str(user_ids[user]) for user in users[np.sort(first)[:EXAMPLES]]]
            self.rows.append({"what": what, "count": len(users), "examples": examples})


def _distinct(ids: pa.Array, chosen: np.ndarray) -> list[str]:
    return pc.unique(ids.filter(pa.array(chosen))).to_pylist()


def print_findings(ranking: ForeignRanking) -> None:
    """Says on the terminal what could not be matched."""
    print(f"calrec: {ranking.path}: lists of {len(ranking._users):,} users, at most {ranking.depth:,} items long")
    for finding in ranking.findings:
        more = ", …" if finding["count"] > len(finding["examples"]) else ""
        print(f"  {finding['count']:,} {finding['what']}: {', '.join(finding['examples'])}{more}")


# The three kinds of file.


def _parquet(path: pathlib.Path) -> _Entries:
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise CalrecError(f"{path} cannot be read as Parquet ({error})") from error
    names = set(table.column_names)
    if {"user_id", "item_ids"} <= names:
        return _nested(path, [table[name].combine_chunks() for name in ("user_id", "item_ids")],
                       table["scores"].combine_chunks() if "scores" in names else None)  # fmt: skip
    if {"user_id", "item_id", "score"} <= names:
        users, items = (_strings(path, table[name].combine_chunks(), name) for name in ("user_id", "item_id"))
        return _Entries(users, items, _numbers(path, table["score"].combine_chunks()), [])
    raise CalrecError(
        f"{path} has the columns {sorted(names)}: a ranking has user_id, item_ids (and scores), or "
        "user_id, item_id, score"
    )


def _nested(path: pathlib.Path, columns: Sequence[pa.Array], scores: pa.Array | None) -> _Entries:
    users, lists = _strings(path, columns[0], "user_id"), columns[1]
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        raise CalrecError(f"{path}: item_ids is {lists.type}, not a list a user")
    counts = pc.value_counts(users)
    twice = [row["values"].as_py() for row in counts if row["counts"].as_py() > 1]
    if twice:
        raise CalrecError(
            f"{path} has {len(twice)} users in more than one row, user {twice[0]!r} first; keep one list each"
        )
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    values = -places.astype(np.float64)
    if scores is not None:
        if not np.array_equal(pc.list_value_length(scores).fill_null(0).to_numpy(), lengths):
            raise CalrecError(f"{path}: item_ids and scores differ in length for some user")
        values = _numbers(path, scores.flatten())
    owners = np.repeat(np.arange(len(lengths)), lengths)
    empty = users.filter(pa.array(lengths == 0)).to_pylist()
    return _Entries(users.take(pa.array(owners)), _strings(path, lists.flatten(), "item_ids"), values, empty)


def _strings(path: pathlib.Path, column: pa.Array, name: str) -> pa.Array:
    if column.null_count:
        raise CalrecError(f"{path}: {name} is null in {column.null_count} places")
    if pa.types.is_floating(column.type):
        raise CalrecError(f"{path}: {name} holds numbers with a fraction; ids are strings or whole numbers")
    return column.cast(pa.string())


def _numbers(path: pathlib.Path, column: pa.Array) -> np.ndarray:
    try:
        return column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False).astype(np.float64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise CalrecError(f"{path}: the scores are not numbers ({error})") from error


def _open(path: pathlib.Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CalrecError(f"{path} cannot be read ({error})") from error


def _jsonl(path: pathlib.Path) -> _Entries:
    users: list[str] = []
    items: list[str] = []
    scores: list[float] = []
    empty: list[str] = []
    whole: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            user = _identifier(row["user_id"])
            if "item_ids" in row:
                if user in whole:
                    raise CalrecError(
                        f"{path}, line {number}: user {user!r} has a list in line {whole[user]} already; "
                        "keep one list each"
                    )
                whole[user] = number
                entries = [_identifier(item) for item in row["item_ids"]]
                given = row.get("scores")
                values = (
                    [-float(place) for place in range(len(entries))]
                    if given is None
                    else [_score(each) for each in given]
                )
                if len(values) != len(entries):
                    raise ValueError(f"{len(entries)} item_ids and {len(values)} scores")
                if not entries:
                    empty.append(user)
            else:
                entries, values = [_identifier(row["item_id"])], [_score(row["score"])]
        except (ValueError, KeyError, TypeError) as error:
            raise CalrecError(
                f"{path}, line {number}: not a row of a ranking ({type(error).__name__}: {error}); a line is "
                '{"user_id": …, "item_ids": […], "scores": […]} or {"user_id": …, "item_id": …, "score": …}'
            ) from error
        users += [user] * len(entries)
        items += entries
        scores += values
    return _Entries(pa.array(users, pa.string()), pa.array(items, pa.string()), np.array(scores, np.float64), empty)


def _identifier(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"{value!r} is not an id")
    return str(value)


def _score(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _trec(path: pathlib.Path) -> _Entries:
    users: list[str] = []
    items: list[str] = []
    ranks: list[float] = []
    scores: list[float] = []
    for number, line in _lines(path):
        fields = line.split()
        try:
            user, _, item, rank, score, _ = fields
            ranks.append(float(rank))
            scores.append(float(score))
        except ValueError as error:
            raise CalrecError(
                f"{path}, line {number}: not a line of a TREC run, `user Q0 item rank score tag` ({error})"
            ) from error
        users.append(user)
        items.append(item)
    values = np.array(scores, np.float64)
    return _Entries(pa.array(users, pa.string()), pa.array(items, pa.string()), values, [], np.array(ranks, np.float64))
