"""Lines of raw files in bounded memory, numbered from 1; what is longer than it may be is cut and skipped."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

from calrec_jax.data import quarantine as quarantine_lib
from calrec_jax.data import sources
from calrec_jax.data.quarantine import BadLineError, DroppedLineError, LineCounts, Quarantine

MAX_LINE_BYTES = 8 << 20  # the longest lines of the Amazon dumps' metadata have less than a tenth of it
_BOM = b"\xef\xbb\xbf"
_KEEP = 2048  # bytes of a line that is too long; the quarantine shows fewer

Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Lines that stand together.

    Attributes:
      first: number of the first one.
      lines: without their newlines.
      too_long: this is one line, and only its beginning.
    """

    first: int
    lines: list[bytes]
    too_long: bool = False


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
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        yield from _by_length(number, lines, max_bytes)
        number += len(lines)
        if len(rest) > max_bytes:
            yield Chunk(number, [rest[:_KEEP]], too_long=True)
            number, rest, skipping = number + 1, b"", True
    if rest:
        yield Chunk(number, [rest])


def _by_length(first: int, lines: list[bytes], max_bytes: int) -> Iterator[Chunk]:
    if not lines:
        return
    if max(map(len, lines)) <= max_bytes:
        yield Chunk(first, lines)
        return
    for number, line in enumerate(lines, first):
        too_long = len(line) > max_bytes
        yield Chunk(number, [line[:_KEEP] if too_long else line], too_long)


def records(
    source: sources.Source,
    counts: list[LineCounts],
    bad_lines: Quarantine,
    parse: Callable[[bytes], Row],
    max_bytes: int = MAX_LINE_BYTES,
) -> Iterator[tuple[int, Row]]:
    """Yields (line number, parsed line) of usable lines.

    Args:
      source: the file.
      counts: of the files of this kind so far, this one last; its lines are counted here, kept ones by the caller.
      bad_lines: gets the lines for which `parse` raises a `BadLineError`, and those that are too long.
      parse: a line to a row; a `DroppedLineError` counts the line as dropped by that rule.
      max_bytes: longest line.

    Raises:
      CalrecError: as `sources.blocks`; if too many lines are bad, at every multiple of `quarantine.CHECK_EVERY`.
    """
    mine = counts[-1]
    for chunk in chunks(source, max_bytes):
        for number, line in enumerate(chunk.lines, chunk.first):
            if mine.lines % quarantine_lib.CHECK_EVERY == 0:
                bad_lines.check(source.path, counts, at_end=False)
            mine.lines += 1
            if chunk.too_long:
                bad_lines.put(mine, number, line, f"longer than {max_bytes:,} bytes")
                continue
            if not line or line.isspace():
                mine.dropped["blank line"] += 1
                continue
            try:
                row = parse(line)
            except DroppedLineError as dropped:
                mine.dropped[str(dropped)] += 1
                continue
            except BadLineError as bad:
                bad_lines.put(mine, number, line, str(bad))
                continue
            yield number, row
