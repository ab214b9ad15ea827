"""The closing line and the exit status of .ci/run, with a `make` that pretends; and which Python the Makefile takes."""

import os
import pathlib
import subprocess
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def executable(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("lint", "tests", "closing", "broken"),
    [
        ("true", "echo '==== 12 passed in 3.45s ===='", "12 passed, 0 failed", False),
        ("true", "echo '== 12 passed, 1 skipped, 3 warnings in 63.45s (0:01:03) =='", "12 passed, 0 failed", False),
        ("true", "echo '== 2 failed, 10 passed, 1 error in 3.45s =='; false", "10 passed, 3 failed", True),
        ("false", "echo '== 12 passed in 3.45s =='", "12 passed, 1 failed", True),
        ("true", "echo 'no network'; false", "0 passed, 1 failed", True),
        ("true", "echo 'coverage too low'; echo '== 12 passed in 1.00s =='; false", "12 passed, 1 failed", True),
        ("false", "false", "0 passed, 2 failed", True),
        ("true", "echo '== no tests ran in 0.01s =='", "0 passed, 1 failed", True),
    ],
)  # fmt: skip
def test_ci_closes_with_a_count(tmp_path, lint, tests, closing, broken):
    executable(tmp_path / ".ci" / "run", (ROOT / ".ci" / "run").read_text())
    executable(tmp_path / "bin" / "make", f"#!/bin/bash\ncase $1 in lint) {lint};; test) {tests};; esac\n")
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == closing
    assert (done.returncode != 0) == broken


def make(tmp_path, *names, **environment):
    """What `make quickstart` would run with only these Pythons on the path."""
    path = f"{tmp_path}/bin"
    real = subprocess.run(["which", "make"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "empty").mkdir()
    for name in ("Makefile", "setup.py", "constraints.txt"):
        (tmp_path / "empty" / name).symlink_to(ROOT / name)
    for name, works in names:
        version = name.removeprefix("python3.")
        code = f"#!/bin/bash\n[ {int(works)} = 1 ] && [ {version} -ge 11 ] && [ {version} -le 13 ]\n"
        executable(tmp_path / "bin" / name, code)
    command = [real, "--dry-run", "quickstart"]
    return subprocess.run(
        command, cwd=tmp_path / "empty", capture_output=True, text=True, check=False, env={"PATH": path, **environment}
    )


def test_the_newest_python_that_runs_is_taken(tmp_path):
    done = make(tmp_path, ("python3.13", False), ("python3.12", True), ("python3.11", True))
    assert "python3.12 -m venv .venv" in done.stdout.splitlines(), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any("pip install" in line and "-c constraints.txt" in line and line.endswith("-e .") for line in lines)
    assert lines[-1] == ".venv/bin/calrec quickstart"


def test_a_python_can_be_named(tmp_path):
    done = make(tmp_path, ("python3.12", True), PYTHON="/opt/python")
    assert "/opt/python -m venv .venv" in done.stdout.splitlines()
