"""What README tells a reader to do with their own data: the files as shown there, the run file as shown there."""

import datetime
import pathlib
import re

import gin
import numpy as np
import pytest

from calrec_jax import artifacts, cli
from calrec_jax.data.dataset import Dataset

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
    """A folder with what the reader of that page would have: files with the columns shown there, and no others."""
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    shown = re.findall(r"^(data/\S+) +(\S.*)\n +(\S.*)$", block("data/"), re.MULTILINE)
    (purchases, header, row), (products, product_header, product) = shown
    user, item, time = row.split(",")
    begin = datetime.datetime.fromisoformat(time)
    rows = [
        f"{user}{number},B{bought:02},{(begin + datetime.timedelta(days=day)).isoformat()}"
        for number in range(20)
        for day, bought in enumerate(rng.permutation(30)[:6])
    ]
    (tmp_path / purchases).write_text("\n".join([header, row, *rows]) + "\n")
    items = [product.replace(item, f"B{number:02}").replace("red", rng.choice(["red", "blue"])) for number in range(30)]
    (tmp_path / products).write_text("\n".join([product_header, *items]) + "\n")
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
    dataset = Dataset.load(run / "datasets" / "Toys")
    assert re.fullmatch(r"Title: Wooden train, large\. Colour: (red|blue)\. Price: 9\.99\.", dataset.texts[1])
    assert len(dataset.user_ids) == 20  # the one shown bought once
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
