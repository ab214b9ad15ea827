"""The verb `download`: a category's raw files from the public sources, resumed, checked and recorded.

A file arrives as `NAME.part` beside its name and gets the name when it is whole: as many bytes as the server said, and
a gzip whose checksum is right. `NAME.download.json` then says where it came from, and its sha256, which the next call
checks. What stalls, is cut off or answers 429 or 5xx is tried again, from the byte where it stopped, at growing
intervals (the server's own, where it states one); what is not there is sought at the next mirror.
"""

import dataclasses
import datetime
import email.utils
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import requests
import urllib3

from calrec_jax import __version__, artifacts
from calrec_jax.data import sources
from calrec_jax.data.published import RELEASES
from calrec_jax.errors import CalrecError

_BLOCK = 1 << 20
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_CLOSED = (401, 402, 403, 407, 451)
_MOST_WAIT = 120.0  # seconds; a server that asks for more is left for later
_EVERY = 2.0  # seconds between two lines of progress


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Attributes:
      tries: rounds over all mirrors without a new byte before it is given up.
      timeout: seconds without an answer or a byte.
      wait: seconds before the second round; doubled each time, with up to a quarter of chance.
      sleep: what waits; a test's own.
    """

    tries: int = 6
    timeout: float = 60.0
    wait: float = 2.0
    sleep: Callable[[float], None] = time.sleep


class _AgainError(Exception):
    """Worth another try; `after` is how many seconds the server asks for."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


class _GoneError(Exception):
    """This mirror does not have the file."""


def download(
    data_dir: str | Path,
    layout: str,
    categories: Sequence[str],
    *,
    subset: str | None = None,
    mirrors: Sequence[str] | None = None,
    patience: Patience | None = None,
) -> list[Path]:
    """Fetches the raw files of categories under the names that `prepare.layout` expects.

    Args:
      data_dir: folder for them.
      layout: "2014", "2018" or "2023".
      categories: names as the release writes them, such as "Gift_Cards".
      subset: "5core", "full", "ratings" or "benchmark" (2023's official split); None: the 5-core reviews, where the
        release has them, else all.
      mirrors: URLs in place of the release's own.
      patience: how long to try.

    Returns:
      The files, metadata last of each category.

    Raises:
      CalrecError: if a name is wrong, no mirror has a file or gives it whole, or a file that was there has changed.
    """
    if layout not in RELEASES:
        raise CalrecError(f"--layout={layout}: one of {', '.join(RELEASES)}.")
    release = RELEASES[layout]
    subset = subset or next(iter(release.reviews))
    if subset not in release.reviews:
        raise CalrecError(f"--subset={subset}: the release of {layout} has {', '.join(release.reviews)}.")
    for category in categories:
        if not category.replace("_", "").isalnum() or not category.isascii():
            raise CalrecError(f"--category={category}: a name as the release writes it, such as Gift_Cards.")
    print(f"calrec: Amazon Reviews {layout}; terms of use and what to cite: {release.page}", flush=True)
    folder, files = Path(data_dir).expanduser(), []
    with requests.Session() as session:
        session.headers.update({"User-Agent": f"calrec_jax/{__version__}", "Accept-Encoding": "identity"})
        for category in categories:
            for path in (*release.reviews[subset], release.metadata):
                filled = path.replace("{category}", category)
                urls = [f"{mirror.rstrip('/')}/{filled}" for mirror in mirrors or release.mirrors]
                fetch = _Fetch(session, folder / filled.rsplit("/", 1)[-1], urls, release.page, patience or Patience())
                files.append(fetch.run())
    return files


class _Fetch:
    """One file."""

    def __init__(self, session: requests.Session, path: Path, urls: list[str], page: str, patience: Patience):
        self._session, self._path, self._urls, self._page, self._patience = session, path, urls, page, patience
        self._part = path.with_name(f"{path.name}.part")
        self._begun = path.with_name(f"{path.name}.part.json")  # what the part is a part of
        self._sidecar = path.with_name(path.name + sources.SIDECAR_SUFFIX)

    def run(self) -> Path:
        if self._path.exists():
            self._check_there()
            return self._path
        with artifacts.disk_errors(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._try_all()
        return self._path

    def _check_there(self) -> None:
        if not self._sidecar.exists():
            print(f"calrec: {self._path} is there, and not from `calrec download`: left alone", flush=True)
            return
        record = artifacts.read_json(self._sidecar)
        if record.get("sha256") != artifacts.hash_file(self._path):
            raise CalrecError(
                f"{self._path} is not what was downloaded ({self._sidecar.name} says which checksum it had). Delete it "
                "to download it again, or delete the record to keep it."
            )
        print(f"calrec: {self._path} is there, its checksum is right", flush=True)

    def _try_all(self) -> None:
        gone: dict[str, str] = {}
        failures, most = 0, self._size()
        urls = self._begun_first()
        while True:
            reason, after = "", 0.0
            for url in [url for url in urls if url not in gone]:
                try:
                    self._finish(url, self._transfer(url))
                    return
                except _GoneError as error:
                    gone[url] = str(error)
                except _AgainError as error:
                    reason, after = f"{url}: {error}", max(after, error.after)
                    if self._size() > most:  # it came closer: the same mirror first
                        break
            if len(gone) == len(urls):
                raise CalrecError(self._nowhere(gone))
            failures = 0 if self._size() > most else failures + 1
            most = max(most, self._size())
            if failures >= self._patience.tries or after > _MOST_WAIT:
                when = f" The server asks to come back in {after:.0f} s." if after > _MOST_WAIT else ""
                raise CalrecError(f"{reason}, tried {failures or 1} times.{when} Run the same command again to go on.")
            wait = max(after, self._patience.wait * 2 ** max(0, failures - 1) * random.uniform(1.0, 1.25))
            print(f"calrec: {reason}; again in {wait:.1f} s", flush=True)
            self._patience.sleep(wait)
            urls = self._begun_first()

    def _nowhere(self, gone: dict[str, str]) -> str:
        tried = "; ".join(f"{url}: {reason}" for url, reason in gone.items())
        return (
            f"{self._path.name} cannot be downloaded ({tried}). If a licence has to be accepted or a form filled, "
            f"do so at {self._page} and put the file into {self._path.parent}; else correct the category's name."
        )

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _begun_first(self) -> list[str]:
        begun = self._begun_record().get("url")
        return sorted(self._urls, key=lambda url: url != begun)

    def _begun_record(self) -> dict[str, Any]:
        try:
            record = artifacts.read_json(self._begun)
            return record if isinstance(record, dict) else {}
        except CalrecError:
            return {}

    def _transfer(self, url: str) -> dict[str, Any]:
        """Appends what is missing to the part; returns what the server says about the file."""
        begun = self._begun_record()
        have = self._size() if begun.get("url") == url and begun.get("validator") else 0
        headers = {"Range": f"bytes={have}-", "If-Range": begun["validator"]} if have else {}
        try:
            timeout = self._patience.timeout
            with self._session.get(url, headers=headers, stream=True, timeout=timeout) as response:
                if response.status_code == 416 and have:
                    self._forget()
                    raise _AgainError("the part does not fit the file, begun anew")
                self._check_status(response)
                have, total = _place(response, have)
                record = self._record(url, response, total)
                artifacts.write_json(self._begun, record)
                self._append(response, have, total)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _AgainError(_short(error)) from error
        return record

    def _check_status(self, response: requests.Response) -> None:
        status = response.status_code
        if status in _AGAIN:
            raise _AgainError(f"answered {status}", _retry_after(response))
        if status in _CLOSED:
            raise _GoneError(f"answered {status}: not open to everybody")
        if status not in (200, 206):
            raise _GoneError(f"answered {status}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise _GoneError("answered with a web page")

    def _record(self, url: str, response: requests.Response, total: int | None) -> dict[str, Any]:
        headers = response.headers
        etag = headers.get("ETag")
        strong = etag if etag and not etag.startswith("W/") else None
        return {"url": url, "validator": strong or headers.get("Last-Modified"), "bytes": total}

    def _append(self, response: requests.Response, have: int, total: int | None) -> None:
        with open(self._part, "r+b" if have else "wb") as part:
            part.seek(have)
            part.truncate()
            said = time.monotonic()
            # What has come is written at once, so that a stall loses nothing.
            while block := response.raw.read1(_BLOCK, decode_content=False):
                part.write(block)
                have += len(block)
                if time.monotonic() - said > _EVERY:
                    said = time.monotonic()
                    of = f" of {total / 1e6:,.1f}" if total else ""
                    print(f"calrec: {self._path.name}: {have / 1e6:,.1f}{of} MB", flush=True)
        if total is not None and have != total:
            raise _AgainError(f"cut off after {have:,} of {total:,} bytes")

    def _finish(self, url: str, record: dict[str, Any]) -> None:
        """Checks the part, records it, and gives it its name."""
        if not self._size():
            raise _GoneError("gave nothing")
        (part,) = sources.find(self._part)
        if self._path.suffix == ".gz" and (reason := _damage(part)):
            self._forget()
            raise _GoneError(reason)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        facts = {"url": url, "sha256": part.sha256, "bytes": part.size, "downloaded": now}
        artifacts.write_json(self._sidecar, {**facts, "validator": record["validator"]})
        os.replace(self._part, self._path)
        self._begun.unlink(missing_ok=True)
        print(f"calrec: {self._path}: {part.size / 1e6:,.1f} MB, sha256 {part.sha256}", flush=True)

    def _forget(self) -> None:
        self._part.unlink(missing_ok=True)
        self._begun.unlink(missing_ok=True)


def _damage(part: sources.Source) -> str | None:
    """What is wrong with a gzip, if something is: its checksums are in it."""
    with open(part.path, "rb") as file:
        begin = file.read(256)
    if not begin.startswith(b"\x1f\x8b"):
        return "gave a web page" if begin.lstrip().startswith(b"<") else "gave something else than gzip"
    try:
        for _ in sources.blocks(part):
            pass
    except CalrecError:
        return "gave a damaged gzip"
    return None


def _place(response: requests.Response, have: int) -> tuple[int, int | None]:
    """From which byte the answer goes on, and the size of the whole file where the server says it."""
    length = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        stated = response.headers.get("Content-Range", "")  # bytes 100-999/1000
        parts = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", stated)
        if parts is None or int(parts[1]) != have:
            raise _AgainError(f"answered with another range ({stated or 'not stated'})")
        return have, int(parts[2]) if parts[2] != "*" else None
    return 0, int(length) if length.isdigit() else None  # the whole file, whatever was asked for


def _retry_after(response: requests.Response) -> float:
    """Seconds, of a number or a date."""
    stated = response.headers.get("Retry-After", "")
    if stated.isdigit():
        return float(stated)
    try:
        moment = email.utils.parsedate_to_datetime(stated)
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())


def _short(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:157]}…"
