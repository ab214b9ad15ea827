"""Readers of raw purchase logs: each line is kept, dropped by a named rule, or quarantined with its reason.

The 2018 layout is that of the Amazon Reviews dumps: JSON lines, gzipped or plain, of reviews (``reviewerID``,
``asin``, ``unixReviewTime``) and of metadata (``asin``, ``title``, ``category``, ``main_cat``, ``brand``, ``price``).
Whether a file is gzipped is read from its first bytes. A line that cannot be used goes to the quarantine file; when
more than a stated share of a file's lines does, reading stops: at its end, or before that when the share is exceeded
by all lines up to a multiple of 100,000. What is relational (repeated purchases, order, lengths) comes later, in
`prepare.py`.

Times are seconds since 1970. A value from 10^11 on counts as milliseconds (as seconds it would be after the year 5000)
and is divided; what is negative or after the year 2100 is quarantined.
"""

import collections
import dataclasses
import difflib
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from calrec_jax.data import clean, templates
from calrec_jax.errors import CalrecError

INTERACTIONS_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()), ("line", pa.int64())]
)
ITEMS_SCHEMA = pa.schema([(name, pa.string()) for name in ("item_id", *templates.ATTRIBUTES)])

_MILLISECONDS_FROM = 10**11
_END_OF_TIME = 4_102_444_800  # 2100-01-01
_CLIP = 300
_CHECK_EVERY = 100_000  # lines; fewer say too little of the rest
_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass
class FileReport:
    """What became of a file's lines: ``lines == kept + sum(dropped) + sum(quarantined)``.

    Attributes:
      file: name of the file.
      lines: lines read.
      kept: lines that gave a row.
      dropped: rule to number of lines.
      quarantined: reason to number of lines.
      repaired: kept rows of which a field was mended or became absent, by what was done.
    """

    file: str
    lines: int = 0
    kept: int = 0
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    quarantined: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    repaired: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def to_json(self) -> dict[str, Any]:
        """The report as the data card holds it."""
        return {
            **dataclasses.asdict(self),
            **{k: dict(getattr(self, k)) for k in ("dropped", "quarantined", "repaired")},
        }


@dataclasses.dataclass(frozen=True)
class RawCategory:
    """A category as read.

    Attributes:
      interactions: columns of `INTERACTIONS_SCHEMA`; `line` is the position in the reviews file, from 1.
      items: columns of `ITEMS_SCHEMA`, an item once.
      reviews: what became of the reviews' lines.
      metadata: what became of the metadata's lines.
    """

    interactions: pa.Table
    items: pa.Table
    reviews: FileReport
    metadata: FileReport


@dataclasses.dataclass(frozen=True)
class _Quarantine:
    """Where bad lines go, and how many may.

    Attributes:
      path: the file.
      sink: the same, open to be written.
      max_bad_share: largest share of a file's lines.
    """

    path: Path
    sink: IO[str]
    max_bad_share: float

    def put(self, report: FileReport, number: int, line: bytes, reason: str) -> None:
        """Counts and writes a bad line."""
        report.quarantined[reason] += 1
        text = line[: 4 * _CLIP].decode("utf-8", "backslashreplace").rstrip("\r\n")[:_CLIP]
        row = {"file": report.file, "line": number, "reason": reason, "text": text}
        self.sink.write(json.dumps(row, ensure_ascii=False) + "\n")

    def check(self, path: Path, report: FileReport, *, of: str = "") -> None:
        """Raises a CalrecError when more of the lines read so far are bad than may be."""
        bad = sum(report.quarantined.values())
        if bad <= self.max_bad_share * report.lines:
            return
        self.sink.flush()
        worst = ", ".join(f"{reason} ({count} lines)" for reason, count in report.quarantined.most_common(3))
        raise CalrecError(
            f"{path}: {bad} of {of}{report.lines} lines cannot be used, more than max_bad_share={self.max_bad_share:g} "
            f"allows. Worst: {worst}. The lines are in {self.path}. Mend the file, or set prepare.max_bad_share higher."
        )


class _BadLineError(Exception):
    """A line that goes to quarantine; the message is the reason."""


def read_2018(reviews: Path, metadata: Path, quarantine: Path, max_bad_share: float) -> RawCategory:
    """Reads a category of the 2018 layout.

    Args:
      reviews: ``X.json.gz`` or ``X_5.json.gz``, or the same unzipped.
      metadata: ``meta_X.json.gz``, or the same unzipped.
      quarantine: file to write bad lines to, as JSON lines of file, line, reason, text.
      max_bad_share: largest share of a file's lines, in [0, 1], that may be quarantined.

    Raises:
      CalrecError: if a file is missing, empty, not a file, broken gzip, or has too many bad lines.
    """
    for path in (reviews, metadata):  # before minutes are spent on the other
        check_file(path)
    with open(quarantine, "w", encoding="utf-8") as sink:
        review_report, metadata_report = FileReport(reviews.name), FileReport(metadata.name)
        bad_lines = _Quarantine(quarantine, sink, max_bad_share)
        interactions = _read_reviews(reviews, review_report, bad_lines)
        items = _read_metadata(metadata, metadata_report, bad_lines)
    return RawCategory(interactions, items, review_report, metadata_report)


LAYOUTS: dict[str, Callable[[Path, Path, Path, float], RawCategory]] = {"2018": read_2018}


def _read_reviews(path: Path, report: FileReport, bad_lines: _Quarantine) -> pa.Table:
    users: list[str] = []
    items: list[str] = []
    times: list[int] = []
    lines: list[int] = []
    for number, record in _records(path, report, bad_lines, _review):
        user, item, time, milliseconds = record
        users.append(user)
        items.append(item)
        times.append(time)
        lines.append(number)
        report.kept += 1
        if milliseconds:
            report.repaired["time in milliseconds, divided by 1000"] += 1
    return pa.table([users, items, times, lines], schema=INTERACTIONS_SCHEMA)


def _review(record: dict[str, Any]) -> tuple[str, str, int, bool]:
    time, milliseconds = _time(record, "unixReviewTime")
    return _identifier(record, "reviewerID"), _identifier(record, "asin"), time, milliseconds


def _read_metadata(path: Path, report: FileReport, bad_lines: _Quarantine) -> pa.Table:
    """An item's first row with a title wins, else its first row; the others are dropped as repeats."""
    rows: dict[str, dict[str, str | None]] = {}
    repairs: dict[str, list[str]] = {}
    for _, (row, repaired) in _records(path, report, bad_lines, _item):
        item_id = row["item_id"]
        there = rows.get(item_id)
        if there is not None:
            report.dropped["item repeated in the metadata"] += 1
            if there["title"] or not row["title"]:
                continue
        rows[item_id] = row
        repairs[item_id] = repaired
    report.kept = len(rows)
    report.repaired.update(repair for repaired in repairs.values() for repair in repaired)
    return pa.Table.from_pylist(list(rows.values()), ITEMS_SCHEMA)


def _item(record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    repaired: list[str] = []

    def attribute(field: str, cleaner: Callable[[str], str | None], numbers: bool = False) -> str | None:
        value = record.get(field)
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not isinstance(value, str):
            repaired.append(f"{field} of a wrong type, made absent")
            return None
        cleaned = cleaner(value)
        if cleaned is None:
            repaired.append(f"{field} without content, made absent")
        return cleaned

    levels = record.get("category")
    if isinstance(levels, str):
        levels = [levels]
    if levels is not None and not isinstance(levels, list):
        repaired.append("category of a wrong type, made absent")
        levels = []
    levels = [level for level in levels or [] if isinstance(level, str)]
    category = clean.clean_category(levels)
    if category is None:
        category = attribute("main_cat", lambda main: clean.clean_category([], main))
        if category is not None:
            repaired.append("category taken from main_cat")
    row = {
        "item_id": _identifier(record, "asin"),
        "title": attribute("title", clean.clean_text),
        "category": category,
        "brand": attribute("brand", clean.clean_brand),
        "price": attribute("price", clean.clean_price, numbers=True),
    }
    return row, repaired


def _identifier(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None:
        raise _BadLineError(f"{field} is missing")
    if not isinstance(value, str):
        raise _BadLineError(f"{field} is not a string")
    value = value.strip()
    if not value:
        raise _BadLineError(f"{field} is empty")
    if not value.isprintable():
        raise _BadLineError(f"{field} has characters that do not print")
    return value


def _time(record: dict[str, Any], field: str) -> tuple[int, bool]:
    """The time in seconds, and whether the value was in milliseconds."""
    value = record.get(field)
    if value is None:
        raise _BadLineError(f"{field} is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _BadLineError(f"{field} is not a whole number")
    if value < 0:
        raise _BadLineError(f"{field} is negative")
    milliseconds = value >= _MILLISECONDS_FROM
    seconds = value // 1000 if milliseconds else value
    if seconds >= _END_OF_TIME:
        raise _BadLineError(f"{field} is after the year 2100")
    return seconds, milliseconds


def _records(
    path: Path, report: FileReport, bad_lines: _Quarantine, parse: Callable[[dict[str, Any]], Any]
) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, parsed record) of usable lines; counts all lines, quarantines the bad ones."""
    usable = False
    for number, line in enumerate(_lines(path), start=1):
        if report.lines and report.lines % _CHECK_EVERY == 0:
            bad_lines.check(path, report, of="the first ")
        report.lines += 1
        if not line.strip():
            report.dropped["blank line"] += 1
            continue
        try:
            parsed = parse(_load(line))
        except _BadLineError as bad:
            bad_lines.put(report, number, line, str(bad))
            continue
        usable = True
        yield number, parsed
    if not report.lines:
        raise CalrecError(f"{path} is empty. Download it again, or name another file.")
    bad_lines.check(path, report)
    if not usable:
        raise CalrecError(f"{path} has no usable line.")


def _load(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _BadLineError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise _BadLineError("not JSON") from None
    if not isinstance(record, dict):
        raise _BadLineError("not a JSON object")
    return record


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a plain or gzipped file, without a byte order mark."""
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if zipped else raw):
                yield line.removeprefix(_BOM) if number == 0 else line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CalrecError(f"{path} is truncated or damaged gzip ({error}). Download it again.") from error
    except OSError as error:
        raise CalrecError(f"{path} cannot be read: {error.strerror or error}.") from error


def check_file(path: Path) -> None:
    """Raises a CalrecError if the path is missing (naming close ones), a folder, or empty."""
    if path.is_dir():
        raise CalrecError(f"{path} is a folder; name the file itself, such as {path / 'X_5.json.gz'}.")
    if not path.exists():
        there = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, there, n=3)
        hint = f" Near it: {', '.join(close)}." if close else ""
        raise CalrecError(f"{path} does not exist.{hint}")
    if not path.stat().st_size:
        raise CalrecError(f"{path} is empty. Download it again, or name another file.")
