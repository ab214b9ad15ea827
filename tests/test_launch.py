"""The launcher of TPU VMs, without gcloud: what it would run."""

import pathlib
import shlex
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "tpu_scripts" / "launch.sh"


def launch(*arguments, path=None):
    environment = {"PATH": path or "/usr/bin:/bin"}
    return subprocess.run(
        ["bash", str(LAUNCH), *arguments], capture_output=True, text=True, check=False, env=environment
    )


def test_dry_run_prints_the_command_for_every_host():
    done = launch(
        "--tpu=v5e", "--zone=us-west4-a", "--project=p", "--dry_run", "--", "calrec", "train", "--gin.NAME='a b'"
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "v5e"]
    assert words[6:9] == ["--zone=us-west4-a", "--project=p", "--worker=all"]
    assert words[9].startswith("--command=cd calrec_jax && calrec train ") and len(words) == 10


def test_every_host_gets_the_arguments_as_they_were_given(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        '#!/bin/bash\nfor word; do case $word in --command=*) HOME=/ bash -c "${word#--command=}";; esac; done\n'
    )
    gcloud.chmod(0o755)
    arguments = ["a b", "it's", '"$HOME"', "*", "x;y"]
    done = launch(
        "--tpu=t",
        "--zone=z",
        "--dir=/",
        "--env=GREETING=good day",
        "--",
        "bash",
        "-c",
        'pwd; echo "$GREETING"; printf "%s\\n" "$@"',
        "bash",
        *arguments,
        path=f"{tmp_path}:/usr/bin:/bin",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["/", "good day", *arguments]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zone=z", "--", "x"], "--tpu=NAME is missing"),
        (["--tpu=t", "--", "x"], "--zone=ZONE is missing"),
        (["--tpu=t", "--zone=z"], "no command: write it after --"),
        (["--tpu=t", "--zoone=z", "--", "x"], "unknown argument --zoone=z"),
    ],
)
def test_mistakes(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("launch.sh: error: ") and message in done.stderr


def test_it_is_short_careful_and_says_how_it_is_used():
    lines = LAUNCH.read_text().splitlines()
    assert len(lines) < 60
    assert "set -euo pipefail" in lines
    done = launch("--help")
    assert done.returncode == 0 and "--dry_run" in done.stdout and "set -euo" not in done.stdout
