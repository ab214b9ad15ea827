"""Lines of raw files in bounded memory, numbered from 1; what is longer than it may be is cut and skipped."""

import dataclasses
from collections.abc import Callable, Iterator

from calrec_jax.data import quarantine as quarantine_lib
from calrec_jax.data import sources
from calrec_jax.data.quarantine import BadLineError, DroppedLineError, LineCounts, Quarantine

MAX_LINE_BYTES = 8 << 20  # the longest lines of the Amazon dumps' metadata have less than a tenth of it
_BOM = b"\xef\xbb\xbf"
_KEEP = 2048  # bytes of a line that is too long; the quarantine shows fewer


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Lines that stand together.

    Attributes:
      first: number of the first one.
      data: the lines, each with a newline, the file's last one too.
      too_long: this is one line, and only its beginning.
    """

    first: int
    data: bytes
    too_long: bool = False

    @property
    def lines(self) -> list[bytes]:
        """The lines without their newlines."""
        return self.data[:-1].split(b"\n")


def chunks(source: sources.Source, max_bytes: int = MAX_LINE_BYTES) -> Iterator[Chunk]:
    """The lines of a file, a block of it at a time, without a byte order mark.

    Args:
      source: the file.
      max_bytes: longest line, newline not counted; of a longer one only the beginning is kept in memory.

    Raises:
      CalrecError: as `sources.blocks`.
    """
    number, rest, skipping = 1, b"", False
    for index, block in enumerate(sources.blocks(source)):
        if index == 0:
            block = block.removeprefix(_BOM)
        if skipping:
            end = block.find(b"\n")
            if end < 0:
                continue
            block, skipping = block[end + 1 :], False
        end = block.rfind(b"\n") + 1
        if end:
            data, rest = b"".join((rest, memoryview(block)[:end])), block[end:]
            yield from _by_length(number, data, max_bytes)
            number += data.count(b"\n")
        else:
            rest += block
        if len(rest) > max_bytes:
            yield Chunk(number, rest[:_KEEP] + b"\n", too_long=True)
            number, rest, skipping = number + 1, b"", True
    if rest:
        yield Chunk(number, rest + b"\n")


def _by_length(first: int, data: bytes, max_bytes: int) -> Iterator[Chunk]:
    chunk = Chunk(first, data)
    if len(data) <= max_bytes or max(map(len, chunk.lines)) <= max_bytes:
        yield chunk
        return
    for number, line in enumerate(chunk.lines, first):
        too_long = len(line) > max_bytes
        yield Chunk(number, (line[:_KEEP] if too_long else line) + b"\n", too_long)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A file on its way to rows: what parses its lines, and where those go that give none.

    Attributes:
      source: the file.
      counts: of the files of this kind so far, this one last; its lines are counted here, kept ones by the caller.
      bad_lines: gets the lines for which `parse` raises a `BadLineError`, and those that are too long.
      parse: a line to a row; a `DroppedLineError` counts the line as dropped by that rule.
      max_bytes: longest line.
    """

    source: sources.Source
    counts: list[LineCounts]
    bad_lines: Quarantine
    parse: Callable[[bytes], tuple]
    max_bytes: int = MAX_LINE_BYTES

    def count(self, lines: int) -> None:
        """Counts so many lines more.

        Raises:
          CalrecError: if too many lines are bad, at every multiple of `quarantine.CHECK_EVERY`.
        """
        mine, every = self.counts[-1], quarantine_lib.CHECK_EVERY
        end = mine.lines + lines
        for multiple in range(-(-mine.lines // every) * every, end, every):
            mine.lines = multiple
            self.bad_lines.check(self.source.path, self.counts, at_end=False)
        mine.lines = end

    def row(self, number: int, line: bytes, too_long: bool) -> tuple | None:
        """A line's row, or None for one that is dropped or quarantined."""
        mine = self.counts[-1]
        if too_long:
            self.bad_lines.put(mine, number, line, f"longer than {self.max_bytes:,} bytes")
            return None
        if not line or line.isspace():
            mine.dropped["blank line"] += 1
            return None
        try:
            return self.parse(line)
        except DroppedLineError as dropped:
            mine.dropped[str(dropped)] += 1
        except BadLineError as bad:
            self.bad_lines.put(mine, number, line, str(bad))
        return None


def records(reading: Reading) -> Iterator[tuple[int, tuple]]:
    """Yields (line number, row) of usable lines.

    Raises:
      CalrecError: as `sources.blocks` and `Reading.count`.
    """
    for chunk in chunks(reading.source, reading.max_bytes):
        for number, line in enumerate(chunk.lines, chunk.first):
            reading.count(1)
            row = reading.row(number, line, chunk.too_long)
            if row is not None:
                yield number, row
