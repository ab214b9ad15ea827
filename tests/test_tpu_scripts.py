"""The scripts for TPUs, without gcloud or xpk: what they would run, and what they do with what those answer."""

import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "tpu_scripts"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh") if path.name != "common.sh")
NAMED = {
    "create.sh": ["--tpu=t", "--zone=z", "--type=v5litepod-16", "--version=v2"],
    "setup.sh": ["--tpu=t", "--zone=z"],
    "launch.sh": ["--tpu=t", "--zone=z"],
    "watch.sh": ["--tpu=t", "--zone=z", "--type=v5litepod-16", "--version=v2", "--seconds=0"],
    "delete.sh": ["--tpu=t", "--zone=z"],
    "gke.sh": ["--cluster=c", "--zone=z", "--project=p"],
}


def run(script, *arguments, path=None):
    environment = {"PATH": path or "/usr/bin:/bin"}
    return subprocess.run(
        ["bash", str(FOLDER / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
    )


def printed(script, *arguments):
    """The commands of a dry run, split into their words."""
    done = run(script, *NAMED[script], "--dry_run", *arguments)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_all_scripts_are_known_here():
    assert sorted(NAMED) == SCRIPTS


def test_create_asks_for_one_slice_or_several():
    (create, _) = printed("create.sh", "--project=p")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "t"]
    assert create[6:] == [
        "--node-id=t", "--accelerator-type=v5litepod-16", "--runtime-version=v2", "--zone=z", "--project=p"
    ]  # fmt: skip
    (create, describe) = printed("create.sh", "--slices=3", "--tier=spot")
    assert create[6:8] == ["--node-count=3", "--node-prefix=t"] and "--spot" in create
    assert describe[3:6] == ["queued-resources", "describe", "t"]


def test_setup_copies_and_installs_on_all_hosts_of_all_slices():
    archive, *each = printed("setup.sh", "--slices=2", "--nfs=10.0.0.2:/runs")
    assert archive[0] == "git" and archive[-1] == "HEAD"
    assert [words[4:6] for words in each[::2]] == [["scp", archive[5].removeprefix("--output=")]] * 2
    assert [words[5] for words in each[1::2]] == ["t-0", "t-1"]
    assert all("--worker=all" in words for words in each)
    install = each[1][-1]
    assert "-e '.[tpu,gcs]'" in install and "mount -t nfs -o lookupcache=positive 10.0.0.2:/runs /mnt/runs" in install
    assert "mount" not in printed("setup.sh")[-1][-1]


def test_launch_prints_the_command_for_every_host():
    (words,) = printed("launch.sh", "--project=p", "--", "calrec", "train", "--gin.NAME='a b'")
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t"]
    assert words[6:9] == ["--zone=z", "--project=p", "--worker=all"]
    assert words[9].startswith("--command=cd calrec_jax && calrec train ") and len(words) == 10
    both = printed("launch.sh", "--slices=2", "--worker=0", "--", "true")
    assert [words[5] for words in both] == ["t-0", "t-1"] and all("--worker=0" in words for words in both)


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


def test_every_host_gets_the_arguments_as_they_were_given(tmp_path):
    executable(
        tmp_path / "gcloud",
        '#!/bin/bash\nfor word; do case $word in --command=*) HOME=/ bash -c "${word#--command=}";; esac; done\n',
    )
    arguments = ["a b", "it's", '"$HOME"', "*", "x;y"]
    done = run(
        "launch.sh", "--tpu=t", "--zone=z", "--dir=/", "--env=GREETING=good day", "--", "bash", "-c",
        'pwd; echo "$GREETING"; printf "%s\\n" "$@"', "bash", *arguments, path=f"{tmp_path}:/usr/bin:/bin",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["/", "good day", *arguments]


def test_launch_fails_when_one_slice_does_and_waits_for_the_others(tmp_path):
    executable(tmp_path / "gcloud", '#!/bin/bash\n[ "$5" = t-0 ] && exit 3\nsleep 0.3; echo "$5 is done"\n')
    done = run("launch.sh", *NAMED["launch.sh"], "--slices=2", "--", "true", path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 3 and done.stdout == "t-1 is done\n"


CLOUD = """#!/bin/bash
# A cloud that takes the TPU away while the command runs for the first time; the command fails once more, then succeeds.
cd "$(dirname "$0")"
echo "$3 $4" >> calls
case "$4" in
  describe) cat state 2>/dev/null || exit 1 ;;
  create) echo ACTIVE > state ;;
  delete) rm state ;;
  ssh)
    case "${*: -1}" in *apt-get*) exit 0 ;; esac
    echo x >> tries
    case $(wc -l < tries) in 1) echo SUSPENDED > state; exit 255 ;; 2) exit 1 ;; *) echo trained ;; esac ;;
esac
"""


def test_watch_brings_back_what_was_taken_away_and_resumes(tmp_path):
    executable(tmp_path / "gcloud", CLOUD)
    done = run("watch.sh", *NAMED["watch.sh"], "--", "calrec", "train", path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained"
    assert "watch.sh: t is MISSING" in done.stdout and "watch.sh: t is SUSPENDED" in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    asked = [call for call in calls if call.split()[0] == "queued-resources" and call.split()[1] != "describe"]
    assert asked == ["queued-resources create", "queued-resources delete", "queued-resources create"]
    assert len((tmp_path / "tries").read_text().splitlines()) == 3
    assert calls.count("tpu-vm scp") == 2, "set up again on the new slice"


def test_watch_gives_up(tmp_path):
    executable(tmp_path / "gcloud", '#!/bin/bash\n[ "$4" = describe ] && echo ACTIVE\n[ "$4" != ssh ]\n')
    done = run("watch.sh", *NAMED["watch.sh"], "--tries=2", "--", "calrec", path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 1 and "the command did not succeed in 2 tries" in done.stderr


def test_create_says_when_the_cloud_refuses(tmp_path):
    executable(tmp_path / "gcloud", '#!/bin/bash\n[ "$4" != describe ] || echo FAILED\n')
    done = run("create.sh", *NAMED["create.sh"], path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 1 and "t is FAILED; delete.sh it, and ask again" in done.stderr


def test_watch_prints_all_it_may_do():
    words = [" ".join(line[3:6]) for line in printed("watch.sh", "--slices=2", "--nfs=h:/s", "--", "calrec")]
    assert words[:4] == [f"queued-resources {verb} t" for verb in ("describe", "delete", "create", "describe")]
    assert words[5:] == ["tpu-vm scp " + words[5].split()[-1], "tpu-vm ssh t-0", *words[7:9], *words[9:]]
    assert words[-2:] == ["tpu-vm ssh t-0", "tpu-vm ssh t-1"]


def test_gke_creates_launches_watches_and_deletes_by_xpk():
    where = ["--cluster=c", "--zone=z", "--project=p"]
    (create,) = printed("gke.sh", "--do=create", "--slices=2", "--spot=true")
    assert create == ["xpk", "cluster", "create", *where, "--tpu-type=v5litepod-16", "--num-slices=2", "--spot"]
    (launch,) = printed("gke.sh", "--do=launch", "--workload=w", "--", "calrec", "train", "--run_dir=a b")
    assert launch[:7] == ["xpk", "workload", "create", *where, "--workload=w"] and "--max-restarts=50" in launch
    assert launch[-1].endswith(r"&& calrec train --run_dir=a\ b")
    (watch,) = printed("gke.sh", "--do=watch", "--workload=w")
    assert watch == ["xpk", "workload", "list", *where, "--wait-for-job-completion=w"]
    assert printed("gke.sh", "--do=stop") == [["xpk", "workload", "delete", *where, "--workload=calrec"]]
    assert printed("gke.sh", "--do=delete") == [["xpk", "cluster", "delete", *where]]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("launch.sh", ["--zone=z", "--", "x"], "--tpu=… is missing"),
        ("launch.sh", ["--tpu=t", "--", "x"], "--zone=… is missing"),
        ("launch.sh", ["--tpu=t", "--zone=z"], "no command: write it after --"),
        ("launch.sh", ["--tpu=t", "--zoone=z", "--", "x"], "unknown argument --zoone=z"),
        ("watch.sh", NAMED["watch.sh"], "no command: write it after --"),
        ("create.sh", [*NAMED["create.sh"], "--tier=cheap"], "--tier=cheap: on_demand, spot or guaranteed"),
        ("create.sh", ["--tpu=t", "--zone=z"], "--type=… is missing"),
        ("gke.sh", [*NAMED["gke.sh"], "--do=dance"], "--do=dance: create, launch, watch, stop or delete"),
        ("gke.sh", [*NAMED["gke.sh"], "--do=launch"], "no command: write it after --"),
        ("delete.sh", ["t"], "unknown argument t"),
    ],
)
def test_mistakes(script, arguments, message):
    done = run(script, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{script}: error: ") and message in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_they_are_short_careful_and_say_how_they_are_used(script):
    lines = (FOLDER / script).read_text().splitlines()
    assert len(lines) < 60 and "set -euo pipefail" in lines
    done = run(script, "--help")
    assert done.returncode == 0 and f"tpu_scripts/{script}" in done.stdout and "--dry_run" in done.stdout
    assert "set -euo" not in done.stdout


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent)) or "shellcheck"
    done = subprocess.run(
        [program, "-x", *(path.name for path in FOLDER.glob("*.sh"))],
        capture_output=True, text=True, check=False, cwd=FOLDER,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
