"""The command: help, exit statuses, messages, and what it sets before it computes."""

import os
import subprocess
import sys
import textwrap

import pytest

from calrec_jax import __version__, allocator, cli, verbs
from calrec_jax.errors import CalrecError
from calrec_jax.hosts import Hosts

VERBS = (
    "prepare", "vocab", "train", "decode", "rank", "baselines", "doctor", "evaluate", "compare", "eval_tasks", "run",
    "download", "synth", "compile", "import_hf", "export_hf", "quickstart",
)  # fmt: skip


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "calrec_jax", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_names_every_verb():
    done = run("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert f"\n    {verb}" in done.stdout


def test_help_imports_nothing_heavy():
    code = """
        import sys
        from calrec_jax import cli
        try:
            cli.main(["run", "--help"])
        except SystemExit:
            pass
        heavy = {"jax", "numpy", "pyarrow", "ibis", "tensorflow", "seqio", "gin", "flax", "numba", "rich"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    example = out.split("example:\n")[1].strip()
    assert example.startswith(f"calrec {verb}")
    words = [
        word.split("=")[0] for word in example.split()[2:] if word.startswith("--") and not word.startswith("--gin.")
    ]
    for word in words:
        assert f"{word} " in out, f"{example}: {word} is not an option"


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"calrec {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--gin_file is missing, for example: calrec train --gin_file=runs/"),
        (["run", "--gin_file=nothing.gin"], "nothing.gin is not there"),
        (["run", "--gin.RUN_DIR"], "--gin.RUN_DIR has no value; write --gin.NAME=value"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("calrec_jax.config.MODULES", ())
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("calrec: error: ") and message in error
    assert error.count("\n") == 1


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--stagee=stage1"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --stagee=stage1" in capsys.readouterr().err


def test_bindings_are_taken_out_of_the_arguments():
    arguments = verbs.parse(["run", "--gin.A=1", "--gin_file=x.gin", "--gin.stage1/train.steps=2", "--gin_file=y.gin"])
    assert arguments.bindings == ["A=1", "stage1/train.steps=2"]
    assert arguments.gin_file == ["x.gin", "y.gin"]


@pytest.mark.parametrize("verb", ["train", "decode", "run"])
def test_verbs_of_several_hosts_are_told_which_one_this_is(verb):
    named = ["--coordinator_address=a:1", "--process_count=3", "--process_index=2", "--heartbeat_seconds=7"]
    assert cli._hosts(verbs.parse([verb, *named])) == Hosts("a:1", 3, 2, heartbeat_seconds=7)
    assert cli._hosts(verbs.parse([verb, "--multihost"])).several and not cli._hosts(verbs.parse([verb])).several
    assert not cli._hosts(verbs.parse(["rank"])).several


def test_a_window_of_steps_is_two_numbers(capsys):
    assert verbs.parse(["train", "--profile_steps=20:25"]).profile_steps == (20, 25)
    with pytest.raises(SystemExit):
        verbs.parse(["train", "--profile_steps=20"])
    assert "'20' is not FIRST:LAST" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "calrec: interrupted; running the same command again resumes"),
        (CalrecError("reviews.json.gz is empty"), 1, "calrec: error: reviews.json.gz is empty"),
    ],
)
def test_exit_status(error, status, message, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["run"]) == status
    assert message in capsys.readouterr().err


def test_a_mistake_of_ours_is_told_to_the_other_hosts(capsys, monkeypatch):
    def fail(*_):
        raise ValueError("odd")

    left = []
    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr("calrec_jax.hosts.joined", lambda: True)
    monkeypatch.setattr("calrec_jax.hosts.leave", lambda *reason: left.append(reason))
    with pytest.raises(ValueError, match="odd"):
        cli.main(["run"])
    assert left == [(1, "ValueError: odd")] and "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_a_mistake_that_can_be_mended(tmp_path, capsys, monkeypatch):
    class FullDisk:
        run_dir = str(tmp_path / "run")

        def check(self, config):
            pass

        def run(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "_line", lambda loaded: FullDisk())
    monkeypatch.setattr("calrec_jax.config.load", lambda *_, **__: None)
    assert cli.main(["run", "--gin_file=x.gin"]) == 1
    assert f"calrec: error: no space left to write in {tmp_path}/run; free some" in capsys.readouterr().err


SCRIPT = """
    import os, sys
    sys.argv = ["calrec", {verb!r}]
    print(*(os.environ.get(name) for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")), sys.flags.dev_mode)
    sys.stdout.flush()
    from calrec_jax.cli import main
    sys.exit(main())
"""
AS_IT_WAS, SET = "None None True", "1 glibc.malloc.hugetlb=1 True"


@pytest.mark.skipif(not allocator.has_glibc(), reason="the allocator's settings are glibc's")
@pytest.mark.parametrize(
    ("verb", "environment", "expected"),
    [
        ("train", {}, [AS_IT_WAS, SET]),
        ("train", {"CALREC_ALLOCATOR": "0"}, [AS_IT_WAS]),
        ("train", {"MALLOC_ARENA_MAX": "4"}, ["4 None True", "4 glibc.malloc.hugetlb=1 True"]),
        ("eval_tasks", {}, [AS_IT_WAS, SET]),
        ("prepare", {}, [AS_IT_WAS]),
    ],
)
def test_computing_verbs_start_once_more_with_the_allocator_set(tmp_path, verb, environment, expected):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(verb=verb)))
    names = (*allocator.SETTINGS, allocator.SWITCH)
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-X", "dev", str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, **environment},
    )
    assert done.stdout.splitlines() == expected, done.stderr
    assert done.returncode == 1 and "--gin_file is missing" in done.stderr, "it still runs the verb"


def test_import_and_export_by_the_command(tmp_path, capsys):
    import hf_folders

    hf_folders.write_folder(tmp_path / "hf", hf_folders.CONFIGS["smollm2"], family="smollm2")
    assert cli.main(["import_hf", str(tmp_path / "hf"), f"--out={tmp_path / 'in'}", "--mesh_shape=1,1,1,1"]) == 0
    assert cli.main(["export_hf", str(tmp_path / "in"), f"--out={tmp_path / 'out'}", "--dtype=bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "import_hf: Llama 3 and SmolLM2, 26,280 parameters" in out and "GiB of bfloat16" in out
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert cli.main(["import_hf", str(tmp_path / "none"), f"--out={tmp_path / 'in2'}"]) == 1
    assert "config.json is missing" in capsys.readouterr().err
