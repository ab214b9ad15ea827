"""The whole line for real, on a small shop: interrupted, resumed, skipped, and refusing what does not fit together."""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import gin
import pyarrow.parquet
import pytest
from test_hosts import free_address

from calrec_jax import artifacts, cli

SMALL = [
    "--gin.Shop.users=150",
    "--gin.Shop.items=120",
    "--gin.vocab.vocab_size=600",
    "--gin.stage1/train.num_steps=4",
    "--gin.stage1/train.eval_every=4",
    "--gin.stage2/train.num_steps=4",
    "--gin.stage2/train.eval_every=4",
    "--gin.train.eval_users=16",
    "--gin.TransformerConfig.embed_dim=32",
    "--gin.TransformerConfig.num_layers=1",
    "--gin.TransformerConfig.mlp_dim=64",
    "--gin.Batching.row_tokens=256",
    "--gin.Batching.batch_rows=4",
    "--gin.Batching.max_history_tokens=128",
    "--gin.Batching.max_target_tokens=48",
    "--gin.decode.num_samples=4",
    "--gin.decode.shard_users=64",
]


def calrec(verb, folder, *flags):
    """The exit status of a verb, run in this process."""
    try:
        return cli.main([verb, f"--run_dir={folder}", *SMALL, *flags])
    finally:
        gin.clear_config()


# A shell's background jobs, and so their children, ignore Ctrl-C.
_LISTENING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("calrec_jax", run_name="__main__")
"""


def interrupt_when(line_begins, folder):
    """Starts the quickstart, presses Ctrl-C when a line that begins so is printed, and gives exit status and errors."""
    process = subprocess.Popen(
        [sys.executable, "-c", _LISTENING, "quickstart", f"--run_dir={folder}", *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for line in process.stdout:
        if line.startswith(line_begins):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was interrupted while it trained, and then run again; with what it printed the second time."""
    folder = tmp_path_factory.mktemp("line") / "run"
    status, errors = interrupt_when("train: stage1", folder)
    assert status == 130, errors
    assert "calrec: interrupted; running the same command again resumes" in errors
    with (folder.parent / "printed").open("w+") as printed:
        with contextlib.redirect_stdout(printed):
            assert calrec("quickstart", folder) == 0
        printed.seek(0)
        return folder, printed.read()


def test_what_was_done_is_skipped_and_the_rest_is_made(run):
    folder, printed = run
    for step in ("shop", "prepare Home_and_Kitchen", "prepare Office_Products", "vocab"):
        assert f"calrec: {step} was done already, skipped" in printed
    for step in ("train stage1", "train stage2", "decode test-sample", "rank test-calrec", "evaluate test"):
        assert f"calrec: {step} took " in printed
    for path in ("datasets", "tokenizer", "stage1", "stage2", "completions", "rankings", "report/report.html"):
        assert f"  {folder / path}\n" in printed
    assert f"--run_dir={folder} --split=validation" in printed


def test_the_report_compares_with_baselines_and_the_oracle(run):
    folder, printed = run
    report = artifacts.read_json(folder / "report" / "metrics.json")
    kinds = {row["name"]: row["kind"] for row in report["rows"]}
    assert list(kinds.values()).count("baseline") >= 4
    assert kinds["calrec"] == "calrec" and "oracle" in kinds.values()
    scores = {row["name"]: row["metrics"]["ndcg@10"] for row in report["rows"]}
    oracle = next(name for name, kind in kinds.items() if kind == "oracle")
    assert scores[oracle] == max(scores.values()), scores
    assert report["users"] == 150 and report["dataset"] == "Office_Products"
    for name in kinds:
        assert name in printed


def test_every_user_is_ranked_and_every_artefact_says_what_it_is_made_from(run):
    folder, _ = run
    shards = sorted((folder / "rankings" / "test-calrec").glob("part-*.parquet"))
    users = [user for shard in shards for user in pyarrow.parquet.read_table(shard)["user_id"].to_pylist()]
    assert len(users) == len(set(users)) == 150
    dataset = artifacts.read_manifest(folder / "datasets" / "Office_Products", kind="dataset")
    ranking = artifacts.read_manifest(folder / "rankings" / "test-calrec", kind="ranking")
    assert ranking["made_from"]["dataset"] == dataset["hash"]
    assert ranking["made_from"]["completions"] == manifest(folder / "completions" / "test-sample")["hash"]
    # The first process was interrupted in stage I, and did no more than it needed for that.
    for name in ("raw", "datasets/Home_and_Kitchen", "datasets/Office_Products", "tokenizer"):
        assert (
            "Shop.users = 150" in manifest(folder / name)["gin"] and "embed_dim" not in manifest(folder / name)["gin"]
        )
    for name in ("stage1", "stage2", "completions/test-sample", "rankings/test-calrec", "report"):
        assert "stage1/TransformerConfig.embed_dim = 32" in manifest(folder / name)["gin"], name
    for name in ("completions/test-sample", "rankings/test-calrec", "report"):
        artifacts.check_files(folder / name, manifest(folder / name))
    seconds = {step["step"]: step["seconds"] for step in artifacts.read_json(folder / "timing.json")["steps"]}
    page = (folder / "report" / "report.html").read_text()
    for step in [name for name in seconds if not name.startswith("eval")]:  # those come after the page
        assert json.dumps({"step": step, "seconds": seconds[step]}, separators=(",", ":"))[:-1] in page
    assert not [path for path in folder.rglob(".tmp-*")]


def manifest(folder):
    return artifacts.read_json(folder / artifacts.MANIFEST)


def test_again_everything_is_skipped(run, capsys):
    folder, _ = run
    before = digests(folder)
    assert calrec("quickstart", folder) == 0
    printed = capsys.readouterr().out
    assert printed.count("was done already, skipped") == 9 and " took " not in printed
    assert digests(folder) == before


@pytest.mark.parametrize(
    ("verb", "flags", "messages"),
    [
        ("rank", ["--gin.rank.epsilon=0.5"], ["test-calrec holds a ranking", "setting epsilon", "asked for 0.5"]),
        ("vocab", ["--gin.vocab.vocab_size=500"], ["tokenizer holds a tokenizer", "there 600, asked for 500"]),
        ("prepare", ["--gin.prepare.min_length=4"], ["Home_and_Kitchen holds a dataset", "setting min_length"]),
        ("vocab", ["--gin.Template.attributes=('title',)"], ["'Home_and_Kitchen' was made with another template"]),
        ("train", ["--gin.OptimizerConfig.learning_rate=0.1"], ["stage1 holds a", "learning_rate"]),
        ("quickstart", ["--gin.Shop.seed=1"], ["raw holds a shop that is not the one asked for", "seed"]),
        ("rank", ["--gin.rank.epsilom=0.5"], ["rank has no setting epsilom; did you mean epsilon?"]),
        ("rank", ["--gin.sampel/rank.epsilon=0.5"], ["nothing uses the scope sampel/; did you mean sample?"]),
        ("rank", ["--gin.rank.split='validation'"], ["rank.split has no effect"]),
        ("rank", ["--name=nothing"], ["--name=nothing is not in run.rankings, which has calrec"]),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(run, capsys, verb, flags, messages):
    folder, _ = run
    before = digests(folder)
    files = [] if verb == "quickstart" else ["--gin_file=runs/quickstart.gin"]
    assert calrec(verb, folder, *files, *flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("calrec: error: ")
    for message in messages:
        assert message in error
    if "holds a" in error:
        assert "Choose another --run_dir, or delete" in error
    assert digests(folder) == before, "nothing was touched"


def test_a_step_before_its_inputs(tmp_path, capsys):
    for verb, missing in (
        ("vocab", "datasets/"),
        ("train", "datasets/"),
        ("decode", "datasets/"),
        ("evaluate", "datasets/"),
    ):
        assert calrec(verb, tmp_path / "run", "--gin_file=runs/quickstart.gin") == 1
        error = capsys.readouterr().err
        assert f"{tmp_path}/run/{missing}" in error and "does not exist; run the step that makes it" in error


def test_prepare_without_raw_files(tmp_path, capsys):
    assert calrec("prepare", tmp_path / "run", "--gin_file=runs/quickstart.gin") == 1
    assert "Home_and_Kitchen_5.json.gz" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "a mistake leaves nothing behind"


def test_seqio_gives_the_same_numbers(run, capsys):
    folder, _ = run
    assert calrec("eval_tasks", folder, "--gin_file=runs/quickstart.gin") == 0, capsys.readouterr().err
    found = artifacts.read_json(folder / "eval_tasks" / "test-calrec" / "metrics.json")
    (result,) = found["tasks"].values()
    rows = artifacts.read_json(folder / "report" / "metrics.json")["rows"]
    (expected,) = (row["metrics"] for row in rows if row["name"] == "calrec")
    assert result["users"] == 150
    for name in ("recall@1", "recall@10", "ndcg@10", "mrr"):
        assert result["metrics"][name] == pytest.approx(expected[name], abs=1e-12), name


def run_on_two(folder, raw, *flags):
    """`calrec run` started twice, as on two hosts that share `folder`; (printed, errors, status) of each."""
    shop = [flag for flag in SMALL if "Shop" not in flag]
    command = [sys.executable, "-m", "calrec_jax", "run", "--gin_file=runs/quickstart.gin", f"--run_dir={folder}"]
    command += [*shop, f"--gin.DATA_DIR='{raw}'", *flags]
    command += [f"--coordinator_address={free_address()}", "--process_count=2", "--heartbeat_seconds=20"]
    processes = [
        subprocess.Popen(
            [*command, f"--process_index={index}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    try:
        return [(*process.communicate(timeout=400), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_one_command_on_two_hosts_makes_what_one_host_does(run, tmp_path):
    alone, _ = run
    both = tmp_path / "run"
    baseline = ["--gin.run.baselines=('sasrec',)", "--gin.sasrec.num_epochs=2"]
    (first, errors, status), (second, other_errors, other_status) = run_on_two(both, alone / "raw", *baseline)
    assert (status, other_status) == (0, 0), errors + other_errors
    for step in ("prepare Home_and_Kitchen", "vocab", "rank calrec", "baseline sasrec", "evaluate"):
        assert f"calrec: process 0 does {step}; waiting for it" in second
    assert "Made:" in first and "Made:" not in second
    assert "decode: 86 users in" in first and "decode: 64 users in" in second, "shards are shared out"
    for stage in ("stage1", "stage2"):
        losses = [manifest(folder / stage)["best_validation_loss"] for folder in (alone, both)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name in ("datasets/Office_Products", "tokenizer"):
        assert manifest(both / name)["hash"] == manifest(alone / name)["hash"]
    rows = [
        {row["name"]: row["metrics"] for row in artifacts.read_json(folder / "report" / "metrics.json")["rows"]}
        for folder in (alone, both)
    ]
    assert rows[1].pop("sasrec")["recall@50"] > 0
    assert rows[1] == rows[0]

    (both / "completions" / "test-sample" / "manifest.json").unlink()
    (both / "completions" / "test-sample" / "part-00001.parquet").unlink()
    hashes = digests(both, "*.parquet")
    (first, errors, status), (second, other_errors, other_status) = run_on_two(both, alone / "raw", *baseline)
    assert (status, other_status) == (0, 0), errors + other_errors
    assert first.count("was done already, skipped") == 9 and "calrec: decode test-sample took" in first
    assert "decode: 64 users in" in second and "users in" not in first
    assert digests(both, "*.parquet").items() > hashes.items()
    artifacts.check_files(both / "completions" / "test-sample", manifest(both / "completions" / "test-sample"))


def test_an_error_on_the_first_host_is_heard_by_the_other(tmp_path):
    (_, error, status), (printed, other_error, other_status) = run_on_two(tmp_path / "run", tmp_path / "nowhere")
    assert (status, other_status) == (1, 1)
    missing = f"{tmp_path}/nowhere/Home_and_Kitchen_5.json.gz does not exist"
    assert f"calrec: error: {missing}" in error
    assert "process 0 does prepare Home_and_Kitchen; waiting for it" in printed
    assert f"calrec: error: process 0 failed, and this one ends with it: {missing}" in other_error
    assert "did not join" not in other_error


def digests(folder: pathlib.Path, pattern="*"):
    """Name to hash of every file, but the times."""
    files = [path for path in sorted(folder.rglob(pattern)) if path.is_file() and path.name != "timing.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        assert calrec("quickstart", tmp_path / name) == 0
    for pattern in ("datasets/**/*.parquet", "rankings/**/*.parquet", "metrics.json"):
        one, two = digests(tmp_path / "one", pattern), digests(tmp_path / "two", pattern)
        assert one and one == two, pattern
