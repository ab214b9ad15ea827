"""What README tells a reader to do with their own data: the files as shown there, the run file as shown there."""

import json
import pathlib
import re

import gin
import numpy as np
import pytest

from calrec_jax import artifacts, cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(begins):
    """The code block that holds a line which begins so."""
    (found,) = [
        code
        for code in re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
        if re.search(f"^{begins}", code, re.MULTILINE)
    ]
    return found


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with what the reader of that page would have: files with the fields shown there, and no others."""
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for line in block("data/").splitlines():
        name, example = line.split(maxsplit=1)
        shown = json.loads(example)
        if "reviewerID" in shown:
            rows = [
                {
                    **shown,
                    "reviewerID": f"u{user}",
                    "asin": f"B{item:02}",
                    "unixReviewTime": shown["unixReviewTime"] + day * 86_400,
                }
                for user in range(20)
                for day, item in enumerate(rng.permutation(30)[:6])
            ]
        else:
            rows = [{**shown, "asin": f"B{item:02}", "title": f"{shown['title']} {item}"} for item in range(30)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toys.gin").write_text(block('include "runs/quickstart.gin"'))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    gin.clear_config()


def test_the_page_about_ones_own_data(reader, capsys):
    flags = re.search(r"^calrec run (--gin_file=toys.gin .*)$", README, re.MULTILINE).group(1).split()
    for verb in ("prepare", "vocab"):
        extra = ["--gin.vocab.vocab_size=400"] if verb == "vocab" else []
        assert cli.main([verb, *flags, *extra]) == 0, capsys.readouterr().err
    run = reader / "runs" / "toys"
    manifest = artifacts.read_manifest(run / "datasets" / "Toys", kind="dataset")
    assert manifest["settings"]["name"] == "Toys"
    assert (run / "datasets" / "Toys" / "data_card.json").exists()
    artifacts.read_manifest(run / "tokenizer", kind="tokenizer")


def test_the_bindings_that_are_shown_are_settings(reader):
    from calrec_jax import config

    for flag in re.findall(r"`--gin\.(\S+=\S+)`", README):
        if not flag.startswith("NAME="):
            config.load(["toys.gin"], [flag, "RUN_DIR='x'"])


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    for link in links:
        if "://" not in link:
            assert (ROOT / link).exists(), link
