"""Files and folders that are either whole or absent, and the manifests that say what they were made from.

Notable: everything is written to a temporary sibling, flushed to the disk and renamed, so a crash, a full disk or
Ctrl-C leaves nothing that a later run would trust. `manifest.json` is written last and marks an artefact complete; its
hash covers its kind, its inputs (by hash), its settings and its facts, and names it for what is made from it.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from calrec_jax.errors import CalrecError

MANIFEST = "manifest.json"
SHARDS = "part-*.parquet"
_UNHASHED = ("hash", "gin")
_RESERVED = ("kind", "made_from", "settings", *_UNHASHED)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def disk_errors(folder: str | os.PathLike) -> Iterator[None]:
    """Turns a full disk, or a folder that may not be written, into a `CalrecError` that names `folder`.

    Writers that are not ours (Parquet, DuckDB, orbax) report a full disk in their own exceptions, so the
    system's words are looked for.
    """
    try:
        yield
    except CalrecError:
        raise
    except OSError as error:
        if error.errno in _NO_SPACE or _says_no_space(error):
            raise _no_space(folder, error) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise CalrecError(
                f"cannot write in {folder}: {error.strerror}; mend that, or choose another --run_dir"
            ) from error
        raise
    except Exception as error:
        if _says_no_space(error):
            raise _no_space(folder, error) from error
        raise


def _says_no_space(error: Exception) -> bool:
    return "no space left on device" in str(error).lower()


def _no_space(folder: str | os.PathLike, error: Exception) -> CalrecError:
    quota = isinstance(error, OSError) and error.errno in (errno.EDQUOT, errno.EFBIG)
    reason = (
        f"the limit on file sizes or the quota is reached in {folder}"
        if quota
        else f"no space left to write in {folder}"
    )
    return CalrecError(f"{reason}; free some, or choose another --run_dir, then run the same command again")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling to write to; it replaces `path` when the block ends well, and is removed otherwise.

    The sibling's name ends in the name of `path`, since some writers choose a format by the suffix, and starts with a
    dot, so that no pattern such as `part-*.parquet` finds it.

    Raises:
      CalrecError: no space is left, or the folder cannot be written.
    """
    path = pathlib.Path(path)
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_sibling(path)
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        _fsync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a new, empty temporary sibling folder; it becomes `path` if the block ends well, else is removed.

    Raises:
      CalrecError: `path` exists already, no space is left, or the parent folder cannot be written.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise CalrecError(f"{path} exists already; delete it to make it again, or choose another --run_dir")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_sibling(path)
        temporary.mkdir()
        try:
            yield temporary
            for folder, _, files in os.walk(temporary):
                for name in files:
                    _fsync(pathlib.Path(folder) / name)
                _fsync(pathlib.Path(folder))
            os.rename(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        _fsync(path.parent)


@contextlib.contextmanager
def scratch_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a new, empty folder beside `path` for what is needed on the way to it; it is removed in any case.

    What killed processes left for the same `path` is removed first.

    Raises:
      CalrecError: no space is left, or the parent folder cannot be written.
    """
    path = pathlib.Path(path)
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_sibling(path.with_name(path.name + ".scratch"))
        temporary.mkdir()
        try:
            yield temporary
        finally:
            _remove(temporary)


def _temporary_sibling(path: pathlib.Path) -> pathlib.Path:
    """A free name beside `path`; what killed processes of this host left there for the same `path` is removed first."""
    mine = f".tmp-{socket.gethostname()}-"
    for left in path.parent.glob(f"{mine}*-{path.name}"):
        pid = left.name.removeprefix(mine).split("-", 1)[0]
        if (
            left.name == f"{mine}{pid}-{path.name}"
            and pid.isdigit()
            and (int(pid) == os.getpid() or not _is_alive(int(pid)))
        ):
            _remove(left)
    return path.parent / f"{mine}{os.getpid()}-{path.name}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: pathlib.Path) -> None:
    """Flushes a file, or the names in a folder, to the disk: a rename may otherwise outlive the data it points to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def hash_file(path: str | os.PathLike) -> str:
    """The sha256 of a file's bytes, in hex.

    Raises:
      CalrecError: the file is missing, is a folder, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _cannot_read(path, error) from error


def hash_json(value: Any) -> str:
    """The sha256, in hex, of a value's canonical JSON.

    Keys are sorted, no spaces; tuples and NumPy arrays count as lists, dataclasses as objects, paths as strings.
    """
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """`value` in what JSON has, so that a value equals itself after it was written and read."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, without importing NumPy
        return _plain(value.tolist())
    return value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a value as JSON: atomic, indented, sorted keys.

    Raises:
      CalrecError: no space is left, or the folder cannot be written.
    """
    text = json.dumps(_plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file.

    Raises:
      CalrecError: the file is missing, cannot be read, or is not JSON; the message names it.
    """
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CalrecError(f"{path} is not JSON ({error}); delete it and run the step that makes it again") from error


def _cannot_read(path: str | os.PathLike, error: OSError) -> CalrecError:
    if error.errno == errno.ENOENT:
        return CalrecError(f"{path} does not exist; run the step that makes it, or correct the path")
    return CalrecError(f"cannot read {path}: {error.strerror}")


def write_manifest(
    folder: str | os.PathLike, *, kind: str, made_from: Mapping[str, str], settings: Mapping[str, Any], **facts: Any
) -> str:
    """Writes `folder/manifest.json`, which marks the artefact complete: call it after everything else was written.

    Args:
      folder: the artefact's folder.
      kind: what the artefact is, e.g. "dataset".
      made_from: role ("dataset", "tokenizer", …) to the hash of each input.
      settings: the step's own arguments; what JSON can hold, dataclasses, tuples, paths and NumPy values.
      **facts: what is worth keeping beside them (counts, hashes of the files written); they enter the hash, so no
        clock times.

    Returns:
      The hash of kind, made_from, settings and facts.

    Raises:
      CalrecError: no space is left, or the folder cannot be written.
    """
    taken = [name for name in facts if name in _RESERVED]
    if taken:
        raise ValueError(f"facts may not be named {taken}")
    import gin

    manifest = {"kind": kind, "made_from": made_from, "settings": settings, **facts}
    digest = hash_json(manifest)
    write_json(pathlib.Path(folder) / MANIFEST, {**manifest, "hash": digest, "gin": gin.operative_config_str()})
    return digest


def read_manifest(folder: str | os.PathLike, *, kind: str) -> dict[str, Any]:
    """The manifest of a complete artefact: "kind", "hash", "made_from", "settings", "gin" and the facts.

    Raises:
      CalrecError: there is none (the step did not finish), it is of another kind, or it was changed afterwards.
    """
    path = pathlib.Path(folder) / MANIFEST
    if not path.exists():
        state = "exists but is not complete" if path.parent.exists() else "does not exist"
        raise CalrecError(f"{kind} {folder} {state}; run the step that makes it (again)")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not set(_RESERVED) <= set(manifest):
        raise CalrecError(f"{path} is not a manifest; delete {folder} and run the step that makes it again")
    if manifest["kind"] != kind:
        raise CalrecError(f"{folder} holds a {manifest['kind']}, and a {kind} is wanted; correct the path")
    if manifest["hash"] != hash_json({name: value for name, value in manifest.items() if name not in _UNHASHED}):
        raise CalrecError(
            f"{path} was changed after it was written; delete {folder} and run the step that makes it again"
        )
    return manifest


def hash_files(paths: Iterable[str | os.PathLike]) -> dict[str, str]:
    """Name to hash of each file: the fact `files` of a manifest, which `check_files` reads.

    Raises:
      CalrecError: a file is missing or cannot be read.
    """
    return {pathlib.Path(path).name: hash_file(path) for path in paths}


def check_files(folder: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
    """Checks that an artefact's files are those that its manifest names in `files`, by their hashes.

    Args:
      folder: the artefact's folder.
      manifest: as `read_manifest` gives it.

    Raises:
      CalrecError: a file is missing or was changed, a shard (`SHARDS`, which readers take all of) is there that the
        manifest does not name, or the manifest names no files; the message names all such files.
    """
    folder = pathlib.Path(folder)
    again = f"delete {folder} (and what was made from it) and run the step that makes it again"
    hashes = manifest.get("files")
    if not isinstance(hashes, dict) or not hashes:
        raise CalrecError(f"{folder / MANIFEST} names no files, so they cannot be checked; {again}")
    wrong = [f"{name} is missing" for name in sorted(hashes) if not (folder / name).is_file()]
    wrong += [f"{path.name} does not belong to it" for path in sorted(folder.glob(SHARDS)) if path.name not in hashes]
    wrong += [
        f"{name} was changed after it was written"
        for name, digest in sorted(hashes.items())
        if (folder / name).is_file() and hash_file(folder / name) != digest
    ]
    if wrong:
        raise CalrecError(f"the files in {folder} are not those of its manifest: {', '.join(wrong)}; {again}")


def is_done(folder: str | os.PathLike, *, kind: str, made_from: Mapping[str, str], settings: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the complete artefact of these inputs and settings, so that the step can be skipped.

    Returns:
      True when complete and the same; False when there is no manifest (absent or half-written).

    Raises:
      CalrecError: a complete artefact is there that was made from something else; each difference is named.
    """
    if not (pathlib.Path(folder) / MANIFEST).exists():
        return False
    manifest = read_manifest(folder, kind=kind)
    differences = request_differences(manifest["made_from"], manifest["settings"], made_from, settings)
    if differences:
        raise CalrecError(
            f"{folder} holds a {kind} that is not the one asked for: {'; '.join(differences)}. "
            f"Choose another --run_dir, or delete {folder} (and what was made from it) and run the same command again"
        )
    return True


def request_differences(
    made_from: Mapping[str, str],
    settings: Mapping[str, Any],
    asked_made_from: Mapping[str, str],
    asked_settings: Mapping[str, Any],
) -> list[str]:
    """In words, each input and each setting in which what is there differs from what is asked for."""
    return [
        *_differences("made from another", _plain(made_from), _plain(asked_made_from)),
        *_differences("setting", _plain(settings), _plain(asked_settings)),
    ]


def _differences(what: str, there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    names = sorted(name for name in {*there, *asked} if there.get(name, _ABSENT) != asked.get(name, _ABSENT))
    return [f"{what} {name} (there {_short(there, name)}, asked for {_short(asked, name)})" for name in names]


_ABSENT = object()


def _short(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "none"
    text = json.dumps(values[name], ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
