"""Atomic files and folders, hashes and manifests."""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def write(folder, **changes):
    arguments = {"kind": "dataset", "made_from": {"reviews": "aa"}, "settings": {"min_length": 3}, **changes}
    return artifacts.write_manifest(folder, **arguments)


def test_atomic_file_replaces_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "a" / "x.txt"
    with artifacts.atomic_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
        assert temporary.name.endswith("x.txt")
    assert path.read_text() == "one"
    with pytest.raises(KeyboardInterrupt), artifacts.atomic_file(path) as temporary:
        temporary.write_text("two")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert [child.name for child in path.parent.iterdir()] == ["x.txt"]


def test_atomic_folder(tmp_path):
    path = tmp_path / "artefact"
    with pytest.raises(ZeroDivisionError), artifacts.atomic_folder(path) as temporary:
        (temporary / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with artifacts.atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "whole").write_text("x")
        write(temporary)
    assert (path / "sub" / "whole").read_text() == "x"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CalrecError, match=r"artefact exists already; delete it"), artifacts.atomic_folder(path):
        pass


def test_files_are_flushed_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    artifacts.write_json(tmp_path / "x.json", 1)
    assert calls == ["fsync", "replace", "fsync"]  # the data, the name, the folder that holds the name


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("x: No space left on device (28)")]
)
@pytest.mark.parametrize("manager", [artifacts.atomic_file, artifacts.atomic_folder])
def test_no_space_left_names_the_folder(tmp_path, error, manager):
    path = tmp_path / "run" / "thing"
    with pytest.raises(CalrecError, match=f"no space left to write in {path.parent}; free some"), manager(path):
        raise error
    assert list(path.parent.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_no_space_left_for_real(tmp_path):
    with (
        pytest.raises(CalrecError, match="no space left to write in"),
        artifacts.atomic_file(tmp_path / "x"),
        open("/dev/full", "w") as full,
    ):
        full.write("x" * 100_000)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalrecError, match=f"cannot write in {tmp_path}/file/run"):
        artifacts.write_json(tmp_path / "file" / "run" / "x.json", 1)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError), artifacts.disk_errors(tmp_path):
        raise KeyError("x")
    with pytest.raises(CalrecError, match="mine"), artifacts.disk_errors(tmp_path):
        raise CalrecError("mine: no space left on device")


def test_what_a_killed_process_left_is_removed_and_never_trusted(tmp_path):
    code = """
        import os, signal, sys
        from calrec_jax import artifacts
        with artifacts.atomic_folder(sys.argv[1]) as folder:
            artifacts.write_manifest(folder, kind="dataset", made_from={}, settings={})
            os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "artefact"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1  # the half-written sibling
    assert not artifacts.is_done(path, kind="dataset", made_from={}, settings={})
    with artifacts.atomic_folder(path) as temporary:
        (temporary / "x").write_text("x")
    assert list(tmp_path.iterdir()) == [path]


def test_the_sibling_of_a_live_process_is_left_alone(tmp_path):
    import socket

    other = tmp_path / f".tmp-{socket.gethostname()}-{os.getppid()}-x"
    other.write_text("being written")
    artifacts.write_json(tmp_path / "x", 1)
    assert other.read_text() == "being written"


def test_hash_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert artifacts.hash_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(CalrecError, match=r"missing does not exist; run the step"):
        artifacts.hash_file(tmp_path / "missing")
    with pytest.raises(CalrecError, match=r"cannot read .*Is a directory"):
        artifacts.hash_file(tmp_path)


@settings(max_examples=60, deadline=None)
@given(JSON)
def test_a_value_keeps_its_hash_when_written_and_read(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "law.json"
    artifacts.write_json(path, value)
    back = artifacts.read_json(path)
    assert back == value
    assert artifacts.hash_json(back) == artifacts.hash_json(value)


def test_hash_json_sees_meaning_and_not_form():
    @dataclasses.dataclass
    class Setting:
        rate: float

    plain = {"b": [1, 2], "a": {"rate": 0.5}, "p": "x/y", "n": [1.0, 2.0]}
    rich = {"a": Setting(0.5), "b": (1, np.int32(2)), "p": pathlib.Path("x/y"), "n": np.array([1.0, 2.0])}
    assert artifacts.hash_json(plain) == artifacts.hash_json(rich)
    assert artifacts.hash_json({"a": 1}) != artifacts.hash_json({"a": 2})
    assert artifacts.hash_json(1) != artifacts.hash_json("1")
    with pytest.raises(ValueError, match="Out of range"):
        artifacts.hash_json(float("nan"))


@pytest.mark.parametrize("content", ["", "{", '{"a": 1', "\x00", "[" * 100_000])
def test_a_damaged_json_file_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(CalrecError, match=rf"{path} is not JSON"):
        artifacts.read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalrecError, match=rf"{path} is not JSON"):
        artifacts.read_json(path)


def test_manifest_read_back(tmp_path):
    digest = write(tmp_path, settings={"cut": (1, 2)}, users=5)
    manifest = artifacts.read_manifest(tmp_path, kind="dataset")
    assert manifest == {
        "kind": "dataset",
        "made_from": {"reviews": "aa"},
        "settings": {"cut": [1, 2]},
        "users": 5,
        "hash": digest,
        "gin": manifest["gin"],
    }
    assert digest == artifacts.hash_json({name: manifest[name] for name in ("kind", "made_from", "settings", "users")})
    assert artifacts.is_done(tmp_path, kind="dataset", made_from={"reviews": "aa"}, settings={"cut": (1, 2)})


def test_manifest_has_the_operative_gin_config(tmp_path):
    import gin

    gin.clear_config()
    try:
        gin.parse_config("hash_probe.rate = 7")
        _hash_probe()
        first = write(tmp_path)
        assert "hash_probe.rate = 7" in artifacts.read_manifest(tmp_path, kind="dataset")["gin"]
    finally:
        gin.clear_config()
    assert write(tmp_path) == first, "the gin text is kept, but what names the artefact is what its step was given"


def _make_probe():
    import gin

    @gin.configurable("hash_probe")
    def probe(rate=1):
        return rate

    return probe


_hash_probe = _make_probe()


def test_a_fact_may_not_take_a_reserved_name(tmp_path):
    with pytest.raises(ValueError, match="gin"):
        write(tmp_path, gin="x")


def test_reading_a_manifest_that_is_not_there(tmp_path):
    with pytest.raises(CalrecError, match=r"dataset .*nowhere does not exist; run the step"):
        artifacts.read_manifest(tmp_path / "nowhere", kind="dataset")
    with pytest.raises(CalrecError, match=r"exists but is not complete; run the step"):
        artifacts.read_manifest(tmp_path, kind="dataset")


def test_reading_a_manifest_of_another_kind_or_form(tmp_path):
    write(tmp_path)
    with pytest.raises(CalrecError, match=r"holds a dataset, and a tokenizer is wanted"):
        artifacts.read_manifest(tmp_path, kind="tokenizer")
    path = tmp_path / artifacts.MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "settings": {"min_length": 4}}))
    with pytest.raises(CalrecError, match=r"was changed after it was written"):
        artifacts.read_manifest(tmp_path, kind="dataset")
    path.write_text("[]")
    with pytest.raises(CalrecError, match=r"is not a manifest; delete"):
        artifacts.read_manifest(tmp_path, kind="dataset")


def test_is_done_names_each_difference_and_the_way_out(tmp_path):
    write(tmp_path, made_from={"reviews": "aa", "metadata": "bb"}, settings={"min_length": 3, "layout": "2018"})
    with pytest.raises(CalrecError) as caught:
        artifacts.is_done(
            tmp_path,
            kind="dataset",
            made_from={"reviews": "aa", "metadata": "cc"},
            settings={"min_length": 5, "new": True},
        )
    message = str(caught.value)
    for part in (
        f"{tmp_path} holds a dataset that is not the one asked for",
        'made from another metadata (there "bb", asked for "cc")',
        "setting min_length (there 3, asked for 5)",
        'setting layout (there "2018", asked for none)',
        "setting new (there none, asked for true)",
        "Choose another --run_dir, or delete",
    ):
        assert part in message
    assert "reviews" not in message


def test_is_done_is_false_when_half_written(tmp_path):
    (tmp_path / "items.parquet").write_text("half")
    assert not artifacts.is_done(tmp_path, kind="dataset", made_from={}, settings={})
    assert not artifacts.is_done(tmp_path / "nowhere", kind="dataset", made_from={}, settings={})


@given(
    st.dictionaries(st.sampled_from(["part-00000.parquet", "part-00001.parquet", "a.json"]), st.binary(), min_size=1)
)
@settings(deadline=None, max_examples=30)
def test_files_as_hashed_are_those_of_the_manifest(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("files")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    write(folder, files=artifacts.hash_files(folder.iterdir()))
    (folder / "notes.txt").write_text("not read by any step")
    artifacts.check_files(folder, artifacts.read_manifest(folder, kind="dataset"))


def test_files_that_are_not_those_of_the_manifest_are_all_named(tmp_path):
    for number in range(3):
        (tmp_path / f"part-0000{number}.parquet").write_text(str(number))
    write(tmp_path, files=artifacts.hash_files(tmp_path.iterdir()))
    manifest = artifacts.read_manifest(tmp_path, kind="dataset")
    (tmp_path / "part-00000.parquet").write_text("9")
    (tmp_path / "part-00001.parquet").unlink()
    (tmp_path / "part-00003.parquet").write_text("3")
    with pytest.raises(CalrecError) as caught:
        artifacts.check_files(tmp_path, manifest)
    assert str(caught.value) == (
        f"the files in {tmp_path} are not those of its manifest: part-00001.parquet is missing, part-00003.parquet "
        "does not belong to it, part-00000.parquet was changed after it was written; "
        f"delete {tmp_path} (and what was made from it) and run the step that makes it again"
    )
    with pytest.raises(CalrecError, match="names no files, so they cannot be checked; delete"):
        artifacts.check_files(tmp_path, {**manifest, "files": {}})
