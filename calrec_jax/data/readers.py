"""Raw purchase logs to staged Parquet files, in bounded memory: each line is kept, dropped by a rule, or quarantined.

A layout says what the files of a category look like: those of the Amazon Reviews dumps, or one's own tables. Whatever
it is, the staged files are the same, and what is relational (repeated purchases and items, order, lengths, splits)
comes later, in `prepare.py`. A line that cannot be used goes to the quarantine file; when more than a stated share of
the lines does, reading stops: at the end, or before that when the share is exceeded after a multiple of 100,000.

Times are seconds since 1970. A value from 10^11 on counts as milliseconds (as seconds it would be after the year 5000)
and is divided; what is negative or after the year 2100 is quarantined.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calrec_jax.data import amazon, lines, own_tables, templates
from calrec_jax.data.own_tables import Columns
from calrec_jax.data.quarantine import LineCounts, Quarantine
from calrec_jax.data.sources import Source
from calrec_jax.errors import CalrecError

INTERACTIONS_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("text_hash", pa.int64()),
        ("split", pa.string()),
        ("line", pa.int64()),
    ]
)
INTERACTIONS_FOLDER = "interactions"
ITEMS_FOLDER = "items"
FILE_BITS = 40  # a row's `line` is its file's place << FILE_BITS | its line number
_ROW_GROUP = 65_536  # rows
_REPEATED = ["item_id", "split", "category", "brand", "price"]  # columns worth a dictionary
_MOST_THREADS = 8


@dataclasses.dataclass(frozen=True)
class RawCategory:
    """A category as read: staged files, and what became of the lines.

    Attributes:
      interactions: folder of ``part-*.parquet`` with the columns of `INTERACTIONS_SCHEMA`: `user_id`, `item_id`,
        `timestamp` (seconds), `text_hash` (64 bits of the review's folded words, null where there are none), `split`
        ("train", "validation" or "test" where the files state an official split, else null), `line` (a total reading
        order over all files: place of the file << 40 | line number from 1).
      items: folder of ``part-*.parquet`` with the columns of `items_schema(attributes)`: every usable row of the
        metadata, so that an item may have several. The rule for those is `prepare`'s: the row with the fewest absent
        attributes is taken, of several the first by `line`.
      attributes: the item's attributes, in column order.
      review_sources, metadata_sources: the files, in reading order.
      review_counts, metadata_counts: what became of the lines of each of them.
    """

    interactions: Path
    items: Path
    attributes: tuple[str, ...]
    review_sources: tuple[Source, ...]
    metadata_sources: tuple[Source, ...]
    review_counts: tuple[LineCounts, ...]
    metadata_counts: tuple[LineCounts, ...]

    @property
    def reviews(self) -> LineCounts:
        """What became of the lines of all files of reviews."""
        return LineCounts.total(self.review_counts)

    @property
    def metadata(self) -> LineCounts:
        """What became of the lines of all files of metadata."""
        return LineCounts.total(self.metadata_counts)


Batches = Iterator[pa.RecordBatch]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the files of a category look.

    Attributes:
      reviews: default file name of reviews, ``{category}`` for the category's name.
      metadata: the same of metadata.
      attributes: of its items: those always staged.
      more_attributes: further ones that a template may name; None: any.
      read_reviews: (file, counts of the files so far, quarantine, columns, threads) to rows of `INTERACTIONS_SCHEMA` of
        the usable lines, `line` being the line's number.
      read_metadata: the same with attribute names instead of threads, to rows of `items_schema`.
    """

    reviews: str
    metadata: str
    attributes: tuple[str, ...]
    more_attributes: tuple[str, ...] | None
    read_reviews: Callable[[Source, list[LineCounts], Quarantine, Columns, int], Batches]
    read_metadata: Callable[[Source, list[LineCounts], Quarantine, Columns, tuple[str, ...]], Batches]

    def all_attributes(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """What is staged for a template's attributes.

        Raises:
          CalrecError: if one is none of the layout's.
        """
        if self.more_attributes is not None:
            known = [*self.attributes, *self.more_attributes]
            if unknown := [name for name in wanted if name not in known]:
                raise CalrecError(
                    f"Template.attributes has {unknown}, and the items of this layout have {known} alone."
                )
        return tuple(dict.fromkeys([*self.attributes, *wanted]))


def wanted(release: amazon.Release) -> tuple[str, str, str, str, str]:
    """Names of the fields that `scan` takes, in its order."""
    return release.user, release.item, release.time, release.text, release.summary


def _amazon(name: str, reviews: str, metadata: str) -> Layout:
    release = amazon.RELEASES[name]

    def read_reviews(
        source: Source, counts: list[LineCounts], bad_lines: Quarantine, _: Columns, threads: int
    ) -> Batches:
        parse = amazon.review_parser(release, source.name, counts[-1])
        reading = lines.Reading(source, counts, bad_lines, parse)
        if amazon.is_csv(source.name):
            return _batches(lines.records(reading), INTERACTIONS_SCHEMA)
        from calrec_jax.data import scan  # loads a compiler

        return scan.batches(
            reading, wanted(release), INTERACTIONS_SCHEMA, milliseconds=release.milliseconds, threads=threads
        )

    def read_metadata(
        source: Source, counts: list[LineCounts], bad_lines: Quarantine, _: Columns, attributes: tuple[str, ...]
    ) -> Batches:
        reading = lines.Reading(source, counts, bad_lines, amazon.item_parser(release, attributes, counts[-1]))
        return _batches(lines.records(reading), items_schema(attributes))

    more = tuple(name for name in amazon.ATTRIBUTES if name not in templates.ATTRIBUTES)
    return Layout(reviews, metadata, templates.ATTRIBUTES, more, read_reviews, read_metadata)


def _read_own_purchases(
    source: Source, counts: list[LineCounts], bad_lines: Quarantine, columns: Columns, _: int
) -> Batches:
    return _batches(own_tables.read_purchases(source, counts, bad_lines, columns), INTERACTIONS_SCHEMA)


def _read_own_items(
    source: Source, counts: list[LineCounts], bad_lines: Quarantine, columns: Columns, attributes: tuple[str, ...]
) -> Batches:
    return _batches(own_tables.read_items(source, counts, bad_lines, columns, attributes), items_schema(attributes))


LAYOUTS: dict[str, Layout] = {
    "2014": _amazon("2014", "reviews_{category}_5.json.gz", "meta_{category}.json.gz"),
    "2018": _amazon("2018", "{category}_5.json.gz", "meta_{category}.json.gz"),
    "2023": _amazon("2023", "{category}.jsonl.gz", "meta_{category}.jsonl.gz"),
    "tables": Layout("{category}_purchases.*", "{category}_items.*", (), None, _read_own_purchases, _read_own_items),
}


def items_schema(attributes: Sequence[str]) -> pa.Schema:
    """Columns of the staged items: `item_id`, the attributes (string, null when absent), `line`."""
    return pa.schema([*((name, pa.string()) for name in ("item_id", *attributes)), ("line", pa.int64())])


def read(
    out: str | Path,
    reviews: Sequence[Source],
    metadata: Sequence[Source],
    *,
    layout: str = "2018",
    attributes: Sequence[str] = templates.ATTRIBUTES,
    columns: Columns | Mapping[str, Any] | None = None,
    quarantine: str | Path,
    max_bad_share: float = 0.01,
    threads: int | None = None,
) -> RawCategory:
    """Reads a category into staged files.

    Args:
      out: folder for `interactions/` and `items/`; made if it is not there, and whole only when this returns.
      reviews: files of purchases, as `sources.find` gives them.
      metadata: files of items.
      layout: one of `LAYOUTS`.
      attributes: the template's; the four of the Amazon layouts are staged whatever it names.
      columns: of the layout "tables", also as a dict of its fields; None: what gin has bound.
      quarantine: file to write bad lines to, as JSON lines of file, line, reason, text.
      max_bad_share: largest share of the lines of either kind of files, in [0, 1], that may be quarantined.
      threads: that scan reviews; None: as many as there are cores, at most 8.

    Raises:
      CalrecError: if an attribute is unknown to the layout, or a file cannot be read, is damaged, has no usable line,
        or too many bad ones.
    """
    out, how = Path(out), LAYOUTS[layout]
    names = how.all_attributes(attributes)
    mapped = columns if isinstance(columns, Columns) else Columns(**(columns or {}))
    workers = min(_MOST_THREADS, threads or os.cpu_count() or 1)

    def read_reviews(source: Source, counts: list[LineCounts], bad_lines: Quarantine) -> Batches:
        return how.read_reviews(source, counts, bad_lines, mapped, workers)

    def read_metadata(source: Source, counts: list[LineCounts], bad_lines: Quarantine) -> Batches:
        return how.read_metadata(source, counts, bad_lines, mapped, names)

    with Quarantine.opened(Path(quarantine), max_bad_share) as bad_lines:
        review_counts = _stage(out / INTERACTIONS_FOLDER, INTERACTIONS_SCHEMA, reviews, read_reviews, bad_lines)
        metadata_counts = _stage(out / ITEMS_FOLDER, items_schema(names), metadata, read_metadata, bad_lines)
    return RawCategory(
        out / INTERACTIONS_FOLDER,
        out / ITEMS_FOLDER,
        names,
        tuple(reviews),
        tuple(metadata),
        review_counts,
        metadata_counts,
    )


def _stage(
    folder: Path,
    schema: pa.Schema,
    files: Sequence[Source],
    read_file: Callable[[Source, list[LineCounts], Quarantine], Batches],
    bad_lines: Quarantine,
) -> tuple[LineCounts, ...]:
    """Writes the usable lines of files of one kind, a Parquet file each; the row's order over all files comes last."""
    folder.mkdir(parents=True)
    where = files[0].path if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"
    counts: list[LineCounts] = []
    for place, source in enumerate(files):
        bad_lines.check(where, counts, at_end=False)
        counts.append(LineCounts(source.name))
        path = folder / f"part-{place:05}.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=_REPEATED) as writer:
            for table in _row_groups(read_file(source, counts, bad_lines), schema):
                numbers = table["line"] if not place else pc.add(table["line"], place << FILE_BITS)
                writer.write_table(table.set_column(len(schema) - 1, "line", numbers))
                counts[-1].kept += table.num_rows
    whole = LineCounts.total(counts)
    if not whole.lines:
        raise CalrecError(f"{where} is empty. Download it again, or name another file.")
    bad_lines.check(where, counts, at_end=True)
    if not whole.kept:
        raise CalrecError(f"{where} has no usable line.")
    return tuple(counts)


def _row_groups(batches: Batches, schema: pa.Schema) -> Iterator[pa.Table]:
    """Batches together until they are as many rows as a row group should have."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(one.num_rows for one in waiting) >= _ROW_GROUP:
            yield pa.Table.from_batches(waiting, schema)
            waiting.clear()
    if waiting:
        yield pa.Table.from_batches(waiting, schema)


def _batches(records: Iterator[tuple[int, tuple]], schema: pa.Schema) -> Batches:
    while rows := list(itertools.islice(records, _ROW_GROUP)):
        numbers, values = zip(*rows, strict=True)
        columns = [*zip(*values, strict=True), numbers]
        yield pa.record_batch(
            [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema
        )
