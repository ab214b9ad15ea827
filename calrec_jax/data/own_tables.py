"""One's own purchases and items: CSV, JSON lines or Parquet, by a mapping of columns.

The name of a file says its format (``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``, the texts also with ``.gz`` or
``.zst``). A CSV has a header; its separator is the one of comma, tab, semicolon and bar that gives the mapped columns,
and a record is what counts as a line, also where a quoted value holds newlines. Ids may be whole numbers. Times are
seconds since 1970, milli-, micro- or nanoseconds by their size, or ISO 8601 (UTC where no zone is given); fractions of
a second are cut off.
"""

import csv
import dataclasses
import datetime
import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import gin
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calrec_jax.data import amazon, clean, fields, lines, sources
from calrec_jax.data.quarantine import CHECK_EVERY, BadLineError, LineCounts, Quarantine
from calrec_jax.data.sources import Source
from calrec_jax.errors import CalrecError

_FORMATS = {
    "csv": "csv",
    "tsv": "csv",
    "txt": "csv",
    "json": "json",
    "jsonl": "json",
    "ndjson": "json",
    "parquet": "parquet",
    "pq": "parquet",
}
_PACKED = re.compile(r"\.(gz|zst|zstd)$")
_SEPARATORS = ",\t;|"
_BATCH_ROWS = 16_384
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_SECOND = datetime.timedelta(seconds=1)
_UNITS = ((10**17, 10**9), (10**14, 10**6), (10**11, 10**3))  # from this value on, so many a second
_SPLITS = {"train": "train", "valid": "validation", "validation": "validation", "dev": "validation", "test": "test"}

Records = Iterator[tuple[int, tuple]]
Record = Mapping[str, Any]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of one's own files hold what.

    Attributes:
      user_id: column of the purchases: who bought.
      item_id: the same: what was bought.
      timestamp: the same: when.
      text: the same: a review's text, by which near-duplicate reviews are found; None: there is none.
      split: the same: "train", "validation" (or "valid", "dev") or "test", where an official split is stated.
      metadata_item_id: column of the items: its id; None: named as in the purchases.
      attributes: attribute of the template to column of the items, where the two differ.
    """

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    text: str | None = None
    split: str | None = None
    metadata_item_id: str | None = None
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def of_purchases(self) -> tuple[str, ...]:
        """The columns that a file of purchases must have."""
        optional = [name for name in (self.text, self.split) if name is not None]
        return tuple(dict.fromkeys([self.user_id, self.item_id, self.timestamp, *optional]))

    def of_items(self, attributes: Iterable[str]) -> tuple[str, ...]:
        """The same of a file of items: its id first, then a column for each attribute."""
        own = self.item_id if self.metadata_item_id is None else self.metadata_item_id
        return (own, *[self.attributes.get(name, name) for name in attributes])


def read_purchases(source: Source, counts: list[LineCounts], bad_lines: Quarantine, columns: Columns) -> Records:
    """Yields (number, interaction) of usable records; the arguments are those of `lines.Reading`."""

    def parse(record: Record) -> amazon.Interaction:
        time = _seconds(record.get(columns.timestamp), columns.timestamp)
        text = record.get(columns.text) if columns.text is not None else None
        split = record.get(columns.split) if columns.split is not None else None
        return (
            _identifier(record, columns.user_id),
            _identifier(record, columns.item_id),
            time,
            fields.text_hash(text) if text is not None else None,
            _split(split, columns.split) if split not in (None, "") else None,
        )

    return _records(source, counts, bad_lines, columns.of_purchases, parse)


def read_items(
    source: Source, counts: list[LineCounts], bad_lines: Quarantine, columns: Columns, attributes: tuple[str, ...]
) -> Records:
    """Yields (number, (item_id, attribute, …)) of usable records."""
    item_id, *names = columns.of_items(attributes)

    def parse(record: Record) -> tuple:
        repaired: list[str] = []
        row = (_identifier(record, item_id), *[_attribute(record.get(name), name, repaired) for name in names])
        counts[-1].repaired.update(repaired)
        return row

    return _records(source, counts, bad_lines, (item_id, *names), parse)


def _records(
    source: Source,
    counts: list[LineCounts],
    bad_lines: Quarantine,
    names: tuple[str, ...],
    parse: Callable[[Record], tuple],
) -> Records:
    ending = _PACKED.sub("", source.name).rsplit(".", 1)[-1].lower()
    form = _FORMATS.get(ending)
    if form == "json":
        return lines.records(lines.Reading(source, counts, bad_lines, lambda line: parse(amazon.load_json(line))))
    if form is None:
        known = ", ".join(f".{name}" for name in _FORMATS)
        raise CalrecError(f"{source.path}: the end of its name says no format; one of {known}, texts also with .gz.")
    read = _csv_records if form == "csv" else _parquet_records
    return _parsed(read(source, counts[-1], bad_lines, names), source, counts, bad_lines, parse)


def _parsed(
    records: Iterator[tuple[int, Record]],
    source: Source,
    counts: list[LineCounts],
    bad_lines: Quarantine,
    parse: Callable[[Record], tuple],
) -> Records:
    mine = counts[-1]
    for number, record in records:
        if mine.lines % CHECK_EVERY == 0:
            bad_lines.check(source.path, counts, at_end=False)
        mine.lines += 1
        try:
            row = parse(record)
        except BadLineError as bad:
            bad_lines.put(mine, number, repr(dict(record)).encode("utf-8", "backslashreplace"), str(bad))
            continue
        yield number, row


def _csv_records(
    source: Source, counts: LineCounts, bad_lines: Quarantine, names: tuple[str, ...]
) -> Iterator[tuple[int, Record]]:
    """Yields (number of the first line, record) of a CSV; its own mistakes are counted and quarantined here."""
    text = _Text(source, counts, bad_lines)
    first = next(text, None)
    if first is None:
        return
    header, separator = _header(first, source, names)
    counts.lines += 1
    counts.dropped[amazon.HEADER_RULE] += 1
    reader = csv.reader(text, delimiter=separator, strict=True)
    while True:
        begin = text.number + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            counts.lines += 1
            bad_lines.put(counts, begin, text.last.encode(), f"not CSV ({error})")
            reader = csv.reader(text, delimiter=separator, strict=True)
            continue
        if not values:
            counts.lines += 1
            counts.dropped["blank line"] += 1
        elif len(values) != len(header):
            counts.lines += 1
            bad_lines.put(counts, begin, text.last.encode(), f"{len(values)} values for {len(header)} columns")
        else:
            yield begin, dict(zip(header, values, strict=True))


class _Text:
    """The lines of a file as text; what is too long or not UTF-8 is quarantined and left out.

    Attributes:
      number: of the last line that was given.
      last: that line.
    """

    def __init__(self, source: Source, counts: LineCounts, bad_lines: Quarantine):
        self.number, self.last = 0, ""
        self._counts, self._bad_lines = counts, bad_lines
        self._chunks = lines.chunks(source)
        self._lines: Iterator[tuple[int, bytes, bool]] = iter(())

    def __iter__(self) -> "_Text":
        return self

    def __next__(self) -> str:
        while True:
            for number, line, too_long in self._lines:
                self.number = number
                if too_long:
                    self._quarantine(line, f"longer than {lines.MAX_LINE_BYTES:,} bytes")
                    continue
                try:
                    self.last = line.decode("utf-8")
                except UnicodeDecodeError:
                    self._quarantine(line, "not UTF-8")
                    continue
                return self.last + "\n"
            chunk = next(self._chunks)
            numbered = zip(itertools.count(chunk.first), chunk.lines, strict=False)
            self._lines = iter([(number, line, chunk.too_long) for number, line in numbered])

    def _quarantine(self, line: bytes, reason: str) -> None:
        self._counts.lines += 1
        self._bad_lines.put(self._counts, self.number, line, reason)


def _header(line: str, source: Source, names: tuple[str, ...]) -> tuple[list[str], str]:
    """The columns and the separator."""
    readings = []
    for separator in _SEPARATORS:
        try:
            columns = [name.strip() for name in next(csv.reader([line], delimiter=separator, strict=True), [])]
        except csv.Error:
            continue
        readings.append((columns, separator))
        if set(names) <= set(columns):
            repeated = [name for name in columns if columns.count(name) > 1]
            if repeated:
                raise CalrecError(f"{source.path} has the column {repeated[0]!r} more than once.")
            return columns, separator
    raise _no_columns(source, names, max((columns for columns, _ in readings), key=len, default=[]))


def _parquet_records(
    source: Source, counts: LineCounts, bad_lines: Quarantine, names: tuple[str, ...]
) -> Iterator[tuple[int, Record]]:
    del counts, bad_lines
    number = 0
    with sources.opened(source) as raw:
        try:
            file = pq.ParquetFile(raw)
            if missing := set(names) - set(file.schema_arrow.names):
                del missing
                raise _no_columns(source, names, file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(dict.fromkeys(names))):
                plain = pa.RecordBatch.from_arrays([_plain(column) for column in batch.columns], batch.schema.names)
                for record in plain.to_pylist():
                    number += 1
                    yield number, record
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise CalrecError(f"{source.path} cannot be read as Parquet ({error}).") from error


def _plain(column: pa.Array) -> pa.Array:
    """Times and dates as seconds (UTC), categories and decimals as text."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return pc.cast(column, pa.timestamp("s"), safe=False).cast(pa.int64())
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode()
    if pa.types.is_decimal(column.type):
        return column.cast(pa.string())
    return column


def _no_columns(source: Source, names: tuple[str, ...], there: list[str]) -> CalrecError:
    missing = [name for name in names if name not in there]
    close = [match for name in missing for match in difflib.get_close_matches(name, there, n=1)]
    hint = f" Near them: {', '.join(close)}." if close else ""
    return CalrecError(
        f"{source.path} has no column {', '.join(missing)}; it has {', '.join(there)}.{hint} Columns.* says which "
        "column holds what, Template.attributes which attributes an item has."
    )


def _identifier(record: Record, name: str) -> str:
    value = record.get(name)
    if type(value) is float and value.is_integer():  # whole numbers of a column with gaps, as pandas writes them
        value = int(value)
    if type(value) is int:
        return str(value)
    return fields.identifier({name: value}, name)


def _seconds(value: Any, name: str) -> int:
    if type(value) is str:
        value = _parsed_time(value.strip(), name)
    if value is None:
        raise BadLineError(f"{name} is missing")
    if isinstance(value, datetime.datetime):
        return fields.seconds((value - _EPOCH) // _SECOND, name)[0]
    if type(value) not in (int, float) or not math.isfinite(value):
        raise BadLineError(f"{name} is neither a number nor a time in ISO 8601")
    per_second = next((per_second for begin, per_second in _UNITS if value >= begin), 1)
    return fields.seconds(math.floor(value) // per_second, name)[0]


def _parsed_time(text: str, name: str) -> Any:
    if not text:
        return None
    whole = fields.whole_number(text)
    if whole is not None and not (len(text) == 8 and 19000101 <= whole <= 21001231):  # 20180617 is a date
        return whole
    try:
        moment = datetime.datetime.fromisoformat(text)
        return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise BadLineError(f"{name} is neither a number nor a time in ISO 8601") from None


def _split(value: Any, name: str | None) -> str:
    if value not in _SPLITS:
        raise BadLineError(f"{name} is not one of {', '.join(_SPLITS)}")
    return _SPLITS[value]


def _attribute(value: Any, name: str, repaired: list[str]) -> str | None:
    """One line of text; numbers as they are written, the values of a list joined by commas."""
    if isinstance(value, list):
        value = ", ".join(str(part) for part in value if isinstance(part, str | int | float))
    if type(value) is float:
        value = None if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    elif type(value) in (int, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        repaired.append(f"{name} of a wrong type, made absent")
        return None
    cleaned = clean.clean_text(value)
    if cleaned is None:
        repaired.append(f"{name} without content, made absent")
    return cleaned
