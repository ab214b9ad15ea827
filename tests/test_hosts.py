"""Several real processes on this machine: the one-process result, and clear ends when one is missing or dies."""

import json
import os
import signal
import socket
import subprocess
import sys

import gin
import jax
import numpy as np
import pytest
from test_train import SETTINGS

from calrec_jax import hosts
from calrec_jax.errors import CalrecError, Stopped
from calrec_jax.hosts import Hosts
from calrec_jax.train import checkpoints as ckpt
from calrec_jax.train import feed
from calrec_jax.train.loop import train

PLAIN = SETTINGS + "\nTransformerConfig.dropout_rate = 0.0\n"
SCRIPT = """
import json, os, pathlib, sys
from calrec_jax import hosts
spec = json.loads(sys.argv[1])
run = hosts.Hosts(spec["address"], spec["count"], spec["index"], join_seconds=60, heartbeat_seconds=10)
status = hosts.supervise(run)
if status is not None:
    sys.exit(status)
run.join()
import gin
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train import feed
from calrec_jax.train.loop import train
gin.parse_config(spec["settings"])
real = feed.training_batch
def training_batch(stream, step, **options):
    if step == spec.get("die_at") and spec["index"] == spec["count"] - 1:
        os._exit(9)
    if step == spec.get("stop_at"):
        os._exit(7)
    return real(stream, step, **options)
feed.training_batch = training_batch
try:
    start = spec.get("init_from") and pathlib.Path(spec["init_from"])
    datasets = [Dataset.load(f) for f in spec["datasets"]]
    train(spec["out"], datasets, Tokenizer.load(spec["tokenizer"]), init_from=start)
except CalrecError as error:
    print("CalrecError:", error, flush=True)
    os._exit(1)
"""


def free_address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def run_processes(small_run, out, count, settings=PLAIN, **spec):
    spec |= {
        "out": str(out), "settings": settings,
        "datasets": [str(f) for f in small_run.folders], "tokenizer": str(small_run.tokenizer_folder),
    }  # fmt: skip
    return run_script(SCRIPT, count, **spec)


def run_script(script, count, **spec):
    """(what it printed, exit status) of each of `count` processes."""
    spec |= {"count": count, "address": free_address()}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(spec | {"index": index})],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    try:
        return [(process.communicate(timeout=240)[0], process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def alone(small_run, tmp_path_factory):
    """The stage, trained by one process."""
    gin.clear_config()
    gin.parse_config(PLAIN)
    try:
        return train(tmp_path_factory.mktemp("alone") / "stage1", small_run.datasets, small_run.tokenizer)
    finally:
        gin.clear_config()


def assert_close(stage, other):
    one, two = (ckpt.load_checkpoint(folder, "latest") for folder in (stage, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one[1], two[1])
    losses = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (stage, other)]
    assert [row["step"] for row in losses[0]] == [row["step"] for row in losses[1]]
    for row, same in zip(*losses, strict=True):
        assert row["loss"] == pytest.approx(same["loss"], abs=1e-5)
        assert row.get("tokens") == same.get("tokens"), "all hosts' tokens are counted"


@pytest.mark.parametrize(("count", "more"), [(2, ""), (4, "train.mesh_shape = (1, 2, 2, 1)")])
def test_several_processes_train_what_one_does(small_run, alone, tmp_path, count, more):
    results = run_processes(small_run, tmp_path / "stage1", count, PLAIN + more)
    assert [status for _, status in results] == [0] * count, "\n".join(output for output, _ in results)
    for index, (output, _) in enumerate(results):
        assert f"process {index} of {count}" in output
        assert ("train: step 6/6" in output) == (index == 0), "one process writes the log"
    assert_close(tmp_path / "stage1", alone)


@pytest.mark.parametrize("more", ["", pytest.param("LoraConfig.rank = 2", marks=pytest.mark.slow)], ids=["all", "lora"])
def test_several_processes_start_from_a_checkpoint_as_one_does(small_run, alone, tmp_path, more):
    """Each reads the parameters of the start for its own part of the mesh; the base of adapters, too."""
    settings = f"{PLAIN}train.num_steps = 3\n{more}\n"
    spread = "train.mesh_shape = (1, 1, 2, 1)"
    results = run_processes(small_run, tmp_path / "two", 2, settings + spread, init_from=str(alone))
    assert [status for _, status in results] == [0, 0], "\n".join(output for output, _ in results)
    gin.clear_config()
    gin.parse_config(settings)
    one = train(tmp_path / "one", small_run.datasets, small_run.tokenizer, init_from=alone)
    assert_close(tmp_path / "two", one)
    first, scratch = (json.loads((f / "metrics.jsonl").read_text().splitlines()[0]) for f in (one, alone))
    assert first["step"] == scratch["step"] and first["loss_next_item"] < scratch["loss_next_item"]


def test_two_hosts_become_one(small_run, alone, tmp_path):
    results = run_processes(small_run, tmp_path / "stage1", 2, stop_at=5)
    assert [status for _, status in results] == [7, 7]
    gin.clear_config()
    gin.parse_config(PLAIN)
    train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    gin.clear_config()
    assert_close(tmp_path / "stage1", alone)


def test_a_process_that_dies_ends_the_others_with_the_reason(small_run, tmp_path):
    (first, status), (_, dead) = run_processes(small_run, tmp_path / "stage1", 2, die_at=5)
    assert dead == 9 and status == 1, first
    # Whichever notices first: a collective without its other side, or the heartbeat, at which JAX aborts the process.
    assert "another process is gone" in first or "--heartbeat_seconds=10" in first, first
    assert "resumes from its last checkpoint" in first


WAITING = """
import json, os, sys
from calrec_jax import hosts
from calrec_jax.errors import CalrecError
spec = json.loads(sys.argv[1])
run = hosts.Hosts(spec["address"], spec["count"], spec["index"], join_seconds=60, heartbeat_seconds=5)
status = hosts.supervise(run)
if status is not None:
    sys.exit(status)
run.join()
def work():
    print("worked", flush=True)
    if spec["end"] == "die":
        os._exit(9)
    if spec["end"] == "fail":
        raise CalrecError("disk.txt: is missing")
    return "the result"
try:
    name = "other work" if spec["end"] == "differ" and spec["index"] == 2 else "work"
    hosts.first_alone(name, work)
    print("agreed", hosts.all_agree(spec["index"] != 1), hosts.all_agree(True), hosts.is_first(), flush=True)
    hosts.barrier("end")
except CalrecError as error:
    print("CalrecError:", error, flush=True)
    hosts.leave(1, str(error))
"""


def test_the_first_works_alone_and_the_others_wait_for_it():
    outputs = [output for output, status in run_script(WAITING, 3, end="well") if status == 0]
    assert [output.count("worked") for output in outputs] == [1, 0, 0]
    assert [output.splitlines()[-1] for output in outputs] == [
        f"agreed False True {first}" for first in (True, False, False)
    ]
    assert all("process 0 does work; waiting for it" in output for output in outputs[1:])


@pytest.mark.parametrize(
    ("end", "statuses", "messages"),
    [
        (
            "fail",
            [1, 1, 1],
            ["CalrecError: disk.txt: is missing", *["process 0 failed, and this one ends with it"] * 2],
        ),
        ("die", [9, 1, 1], ["worked", *["its own log says why. Start the same command on all hosts again"] * 2]),
        (
            "differ",
            [1, 1, 1],
            ["process 0 is at 'work' and another one at 'other work'", *["CalrecError: process "] * 2],
        ),
    ],
)
def test_what_ends_the_first_ends_those_that_wait(end, statuses, messages):
    results = run_script(WAITING, 3, end=end)
    for (output, status), wanted, message in zip(results, statuses, messages, strict=True):
        assert status == wanted and message in output, results
    if end == "fail":
        assert all("disk.txt: is missing" in output and "did not join" not in output for output, _ in results)


def test_hosts_that_were_not_joined_are_named(monkeypatch):
    assert hosts.processes() == (0, 1)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(CalrecError, match="one of 4 hosts, and they were not joined: start .* with --multihost"):
        hosts.processes()
    with pytest.raises(CalrecError, match="were not joined"):
        train("nowhere", [], None, num_steps=1)


def test_a_process_that_never_joins_is_waited_for_and_then_named(tmp_path):
    flags = [f"--coordinator_address={free_address()}", "--process_count=2", "--process_index=0", "--join_seconds=2"]
    command = [sys.executable, "-m", "calrec_jax", "train", "--gin_file=runs/quickstart.gin", f"--run_dir={tmp_path}"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "calrec: process 0 of 2, waiting up to 2 s for the others" in done.stdout
    assert "another process did not join within --join_seconds=2" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator_address": "a:1"}, "--coordinator_address, --process_count and --process_index go together"),
        ({"coordinator_address": "a:1", "process_count": 2, "process_index": 2}, "--process_index=2: must be from 0"),
        ({"detect": True, "process_count": 2}, "--multihost finds the processes itself"),
        ({"join_seconds": 0}, "--join_seconds=0: must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_named(flags, message):
    with pytest.raises(CalrecError, match=message):
        Hosts(**flags)


def test_sigterm_saves_and_the_same_command_ends_at_the_same_bits(small_run, tmp_path, monkeypatch, alone):
    gin.clear_config()
    gin.parse_config(PLAIN + "\ntrain.checkpoint_every = 0\n")
    real = feed.training_batch

    def signalled(stream, step, **options):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(stream, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(feed, "training_batch", signalled)
        with pytest.raises(Stopped, match="is saved at step [1-5], and the same command resumes it"):
            train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    gin.clear_config()
    params = [ckpt.load_checkpoint(stage, "latest")[1] for stage in (tmp_path / "stage1", alone)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), *params)
