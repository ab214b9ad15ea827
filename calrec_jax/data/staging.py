"""What the readers made, kept: a category is read once, however often its rules change.

An entry is a folder `<key>/` with `interactions/`, `items/`, `quarantine.jsonl` and `manifest.json`; the key is the
hash of the raw files' contents and of the reader's settings, so what other paths, names or runs have read is found,
too. The folder of entries is bounded: the least recently used go first, none of the last hour.
"""

import collections
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calrec_jax import __version__, artifacts
from calrec_jax.data import readers
from calrec_jax.data.quarantine import LineCounts
from calrec_jax.data.sources import Source

KIND = "staged"
QUARANTINE_FILE = "quarantine.jsonl"
_IN_USE = 3600  # seconds


def read_or_reuse(
    cache: Path,
    files: Mapping[str, Sequence[Source]],
    settings: Mapping[str, Any],
    *,
    quarantine: Path,
    limit_bytes: int,
    threads: int | None = None,
) -> tuple[readers.RawCategory, bool]:
    """Reads a category into the cache, or takes it from there.

    Args:
      cache: folder of entries.
      files: "reviews" and "metadata", as `sources.find` gives them.
      settings: keyword arguments of `readers.read` (layout, attributes, max_bad_share).
      quarantine: file of bad lines, written in both cases.
      limit_bytes: what all entries may take together.
      threads: that scan; they change nothing of what is read.

    Returns:
      The category, and whether it was there.

    Raises:
      CalrecError: as `readers.read`.
    """
    # A name says the format of a table, and the official split of a benchmark's file.
    made_from = {role: [[source.name, source.sha256] for source in found] for role, found in files.items()}
    request = {"made_from": made_from, "settings": dict(settings), "version": __version__}
    entry = cache / artifacts.hash_json(request)
    reused = _is_whole(entry)
    if reused:
        shutil.copyfile(entry / QUARANTINE_FILE, quarantine)
        os.utime(entry / artifacts.MANIFEST)
    else:
        shutil.rmtree(entry, ignore_errors=True)
        _read(entry, files, request, quarantine, threads)
        _prune(cache, entry, limit_bytes)
    manifest = artifacts.read_manifest(entry, kind=KIND)
    counts = {
        role: tuple(_line_counts(row, source) for row, source in zip(manifest[role], found, strict=True))
        for role, found in files.items()
    }
    raw = readers.RawCategory(
        interactions=entry / readers.INTERACTIONS_FOLDER,
        items=entry / readers.ITEMS_FOLDER,
        attributes=tuple(manifest["attributes"]),
        review_sources=tuple(files["reviews"]),
        metadata_sources=tuple(files["metadata"]),
        review_counts=counts["reviews"],
        metadata_counts=counts["metadata"],
    )
    return raw, reused


def _line_counts(row: Mapping[str, Any], source: Source) -> LineCounts:
    counters = {name: collections.Counter(row[name]) for name in ("dropped", "quarantined", "repaired")}
    return LineCounts(source.name, row["lines"], row["kept"], **counters)


def _read(
    entry: Path,
    files: Mapping[str, Sequence[Source]],
    request: Mapping[str, Any],
    quarantine: Path,
    threads: int | None,
) -> None:
    with artifacts.atomic_folder(entry) as temporary:
        raw = readers.read(
            temporary,
            files["reviews"],
            files["metadata"],
            quarantine=quarantine,
            threads=threads,
            **request["settings"],
        )
        shutil.copyfile(quarantine, temporary / QUARANTINE_FILE)
        artifacts.write_manifest(
            temporary,
            kind=KIND,
            made_from=request["made_from"],
            settings=request["settings"],
            attributes=raw.attributes,
            reviews=[counts.to_json() for counts in raw.review_counts],
            metadata=[counts.to_json() for counts in raw.metadata_counts],
            files=_hashes(temporary),
        )


def _hashes(entry: Path) -> dict[str, str]:
    paths = sorted(path for path in entry.rglob("*") if path.is_file() and path.name != artifacts.MANIFEST)
    return {path.relative_to(entry).as_posix(): artifacts.hash_file(path) for path in paths}


def _is_whole(entry: Path) -> bool:
    """Whether the entry is complete and as it was written; one that is not is made anew."""
    if not (entry / artifacts.MANIFEST).exists():
        return False
    return artifacts.read_manifest(entry, kind=KIND)["files"] == _hashes(entry)


def _prune(cache: Path, keep: Path, limit_bytes: int) -> None:
    entries = [path.parent for path in cache.glob(f"*/{artifacts.MANIFEST}") if path.parent != keep]
    used = {entry: (entry / artifacts.MANIFEST).stat().st_mtime for entry in entries}
    sizes = {entry: _size(entry) for entry in [*entries, keep]}
    for entry in sorted(entries, key=used.__getitem__):
        if sum(sizes.values()) <= limit_bytes:
            break
        if time.time() - used[entry] > _IN_USE:
            shutil.rmtree(entry, ignore_errors=True)
            del sizes[entry]


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
