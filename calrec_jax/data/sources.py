"""Where raw data is: files, folders of shards and URLs, gzip, zstd or plain.

Local paths are opened directly; a path with a protocol (``gs://bucket/X.json.gz``) by fsspec, whose package for that
protocol may have to be installed. How a file is compressed is read from its first bytes, never from its name.
"""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
from isal import igzip, isal_zlib

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError

SIDECAR_SUFFIX = ".download.json"  # what `calrec download` writes beside a file
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_BLOCK = 1 << 20
_DAMAGED = (EOFError, cast(type[Exception], isal_zlib.error))  # what igzip raises besides OSError


@dataclasses.dataclass(frozen=True)
class Source:
    """A raw file.

    Attributes:
      path: local path or URL.
      name: the last part of it, as counts and the quarantine file say it.
      size: bytes, compressed as it is.
      sha256: of those bytes, hex.
    """

    path: str
    name: str
    size: int
    sha256: str


def find(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[Source, ...]:
    """The files that a path names, in reading order, hashed.

    Args:
      paths: one or several of: a file; a folder, which stands for its files by name (hidden ones, those that begin
        with ``_``, empty ones and `calrec download`'s own left out); a pattern with ``*``, ``?`` or ``[…]``; any
        of them as a URL.

    Raises:
      CalrecError: if one names no file (close names are given), a file named itself is empty, a file is named
        twice, or a URL cannot be opened.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise CalrecError("No raw file is named: set the run's reviews and metadata.")
    found = [file for path in given for file in _expand(os.fspath(path))]
    for file in found:
        if found.count(file) > 1:
            raise CalrecError(f"{file} is named twice.")
    return tuple(_source(file) for file in found)


def in_folder(
    folder: str | os.PathLike, names: str | os.PathLike | Sequence[str | os.PathLike], category: str
) -> list[str]:
    """Paths of files named relative to a folder, or a URL; ``{category}`` in a name stands for the category's."""
    given = [names] if isinstance(names, str | os.PathLike) else list(names)
    filled = [os.fspath(name).replace("{category}", category) for name in given]
    begin = os.fspath(folder)
    return [
        name if is_url(name) else f"{begin.rstrip('/')}/{name}" if is_url(begin) else os.path.join(begin, name)
        for name in filled
    ]


def combined_hash(sources: Sequence[Source]) -> str:
    """What names the contents of several files, by name and in their order; of one file its own sha256."""
    if len(sources) == 1:
        return sources[0].sha256
    return artifacts.hash_json([[source.name, source.sha256] for source in sources])


def blocks(source: Source, size: int = _BLOCK) -> Iterator[bytes]:
    """The file's bytes, decompressed, about `size` at a time; a thread reads one block ahead.

    Raises:
      CalrecError: if the file cannot be opened or read, or is truncated or damaged.
    """
    with _reading(source):
        raw = _open(source.path)
    with raw, concurrent.futures.ThreadPoolExecutor(1, "calrec-read") as thread:
        with _reading(source):
            magic = raw.read(4)
            raw.seek(0)
            codec = next((name for begin, name in _MAGIC.items() if magic.startswith(begin)), None)
            stream = _decompressed(raw, codec)
        ahead = thread.submit(stream.read, size)
        while True:
            with _reading(source):
                block = ahead.result()
            if not block:
                return
            ahead = thread.submit(stream.read, size)
            yield block


@contextlib.contextmanager
def opened(source: Source) -> Iterator[IO[bytes]]:
    """The file as it is, compressed or not, to be read at any place (Parquet)."""
    with _reading(source):
        raw = _open(source.path)
    with raw:
        yield raw


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Turns what goes wrong with a file into a CalrecError."""
    try:
        yield
    except (OSError, *_DAMAGED) as error:
        if isinstance(error, OSError) and error.errno is not None:  # decompressors set none
            raise _cannot_read(source.path, error) from error
        raise CalrecError(f"{source.path} is truncated or damaged ({error}). Download it again.") from error


def _decompressed(raw: IO[bytes], codec: str | None) -> Any:
    if codec == "gzip":
        return igzip.IGzipFile(fileobj=raw, mode="rb")
    return pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec) if codec else raw


def is_url(path: str) -> bool:
    """Whether a path is fsspec's to open."""
    return bool(_URL.match(path))


def _cannot_read(path: str, error: OSError) -> CalrecError:
    return CalrecError(f"{path} cannot be read: {error.strerror or error}.")


def _open(path: str) -> IO[bytes]:
    if is_url(path):
        return _filesystem(path).open(path, "rb")
    return open(path, "rb")


def _filesystem(path: str) -> Any:
    import fsspec

    protocol = path.split("://")[0]
    try:
        return fsspec.core.url_to_fs(path)[0]
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        way = f"pip install -e '.[{extra}]'" if extra else "install the package that fsspec names"
        raise CalrecError(f"{path}: {error}. To read {protocol}:// URLs: {way}.") from error
    except ValueError as error:
        raise CalrecError(f"{path}: {error}.") from error


def _source(path: str) -> Source:
    digest, size = hashlib.sha256(), 0
    try:
        with _open(path) as raw:
            while block := raw.read(_BLOCK):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise _cannot_read(path, error) from error
    return Source(path, path.rstrip("/").rsplit("/", 1)[-1], size, digest.hexdigest())


def _expand(path: str) -> list[str]:
    if is_url(path):
        return _expand_url(path)
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if _is_data(name))
        files = [file for name in names if os.path.isfile(file := os.path.join(path, name)) and os.path.getsize(file)]
        if not files:
            raise CalrecError(f"{path} is a folder without a file that is not empty.")
        return files
    if os.path.exists(path):
        if not os.path.getsize(path):
            raise CalrecError(f"{path} is empty. Download it again, or name another file.")
        return [path]
    files = sorted(file for file in glob.glob(path) if os.path.isfile(file) and _is_data(os.path.basename(file)))
    if not files:
        raise CalrecError(f"{path} does not exist.{_near(Path(path))}")
    return files


def _expand_url(path: str) -> list[str]:
    filesystem = _filesystem(path)
    try:
        if filesystem.isdir(path):
            path = f"{path.rstrip('/')}/*"
        files = sorted(filesystem.glob(path)) if glob.has_magic(path) else [path]
        infos = [filesystem.info(file) for file in files]
    except OSError as error:
        raise _cannot_read(path, error) from error
    names = [info["name"] for info in infos if info["type"] == "file" and _is_data(info["name"].rsplit("/", 1)[-1])]
    if not names:
        raise CalrecError(f"{path} does not exist.")
    return [filesystem.unstrip_protocol(name) for name in names]


def _is_data(name: str) -> bool:
    return not name.startswith((".", "_")) and not name.endswith((SIDECAR_SUFFIX, ".part", ".part.json"))


def _near(path: Path) -> str:
    there = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, there, n=3)
    return f" Near it: {', '.join(close)}." if close else ""
