"""What becomes of raw lines: each is kept, dropped by a named rule, or quarantined with its reason."""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from calrec_jax.errors import CalrecError

_CLIP = 300
CHECK_EVERY = 100_000  # lines


@dataclasses.dataclass
class LineCounts:
    """What became of a file's lines: ``lines == kept + sum(dropped) + sum(quarantined)``.

    Attributes:
      file: name of the file, or of the first one and the number of the others.
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

    @property
    def bad(self) -> int:
        """Lines that were quarantined."""
        return sum(self.quarantined.values())

    def to_json(self) -> dict[str, Any]:
        """The counts as the data card holds them."""
        return {
            **dataclasses.asdict(self),
            **{k: dict(getattr(self, k)) for k in ("dropped", "quarantined", "repaired")},
        }

    @classmethod
    def total(cls, counts: Iterable["LineCounts"]) -> "LineCounts":
        """The sum over files."""
        counts = list(counts)
        others = f" and {len(counts) - 1} more" if len(counts) > 1 else ""
        whole = cls(f"{counts[0].file}{others}")
        for one in counts:
            whole.lines += one.lines
            whole.kept += one.kept
            for name in ("dropped", "quarantined", "repaired"):
                getattr(whole, name).update(getattr(one, name))
        return whole


class BadLineError(Exception):
    """A line that goes to quarantine; the message is the reason."""


class DroppedLineError(Exception):
    """A line that is no record and no mistake; the message is the rule that drops it."""


@dataclasses.dataclass
class Quarantine:
    """Where bad lines go, as JSON lines of file, line, reason and clipped text, and how many may.

    Attributes:
      path: the file.
      sink: the same, open to be written.
      max_bad_share: largest share of the lines of all files of a kind.
    """

    path: Path
    sink: IO[str]
    max_bad_share: float

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path, max_bad_share: float) -> Iterator["Quarantine"]:
        """Makes the file anew."""
        with open(path, "w", encoding="utf-8") as sink:
            yield cls(path, sink, max_bad_share)

    def put(self, counts: LineCounts, number: int, line: bytes, reason: str) -> None:
        """Counts and writes a bad line; `number` is its place in the file, from 1."""
        counts.quarantined[reason] += 1
        text = line[: 4 * _CLIP].decode("utf-8", "backslashreplace").rstrip("\r\n")[:_CLIP]
        row = {"file": counts.file, "line": number, "reason": reason, "text": text}
        self.sink.write(json.dumps(row, ensure_ascii=False) + "\n")

    def check(self, where: str, counts: Sequence[LineCounts], *, at_end: bool) -> None:
        """Raises a CalrecError when more of the lines read so far are bad than may be.

        Args:
          where: the files, for the message.
          counts: of each file that was begun.
          at_end: whether all was read; before that, fewer than `CHECK_EVERY` lines say too little of the rest.
        """
        lines, bad = sum(one.lines for one in counts), sum(one.bad for one in counts)
        if bad <= self.max_bad_share * lines or (not at_end and lines < CHECK_EVERY):
            return
        self.sink.flush()
        reasons = LineCounts.total(counts).quarantined.most_common(3)
        worst = ", ".join(f"{reason} ({count} lines)" for reason, count in reasons)
        of = "" if at_end else "the first "
        raise CalrecError(
            f"{where}: {bad} of {of}{lines} lines cannot be used, more than max_bad_share={self.max_bad_share:g} "
            f"allows. Worst: {worst}. The lines are in {self.path}. Mend the file, or set prepare.max_bad_share higher."
        )
