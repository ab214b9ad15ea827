"""The grounding doctor, and items without words in a ranking."""

import dataclasses

import pytest
from ranking_data import completion_rows, make_dataset, write_completions

from calrec_jax import artifacts
from calrec_jax.rank import doctor
from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.run import rank
from calrec_jax.rank.shards import RankingReader

#         the same text twice  the same words    no word  alone     "glue" finds the shorter one first
TEXTS = ["red saw", "red saw", "a b", "b a", "...", "lamp 3 x", "glue glue glue", "glue tape"]


def test_the_findings_are_those_of_an_obvious_count():
    index = BM25Index(TEXTS)
    found = doctor.examine(index, TEXTS)
    scores = index.scores(TEXTS)
    first = [{item for item in range(8) if row[item] == row.max() > 0} for row in scores]
    searched = [item for item in range(8) if item != 4]
    assert (found.items, found.without_words, found.same_text, found.same_words) == (8, 1, 2, 4)
    assert found.alone == sum(first[item] == {item} for item in searched) / 7
    assert found.tied == sum(item in first[item] and len(first[item]) > 1 for item in searched) / 7
    assert found.behind == pytest.approx(1 - found.alone - found.tied)
    assert found.recall_at_1 == pytest.approx(sum((item in first[item]) / len(first[item]) for item in searched) / 7)
    assert found.tied == 4 / 7
    assert "1 without a word" in doctor.report("Tools", found) and "2 share their text" in doctor.report("Tools", found)


def test_completions_are_counted():
    index = BM25Index(TEXTS)
    found = doctor.examine_texts(index, TEXTS, ["red saw", "zzz", "", "lamp", "glue tape"], 9)
    assert found == doctor.TextHealth(9, 5, exact=2 / 5, no_match=2 / 5, tied=1 / 5)
    assert "9 texts, 5 distinct" in doctor.report_texts("test-sample", found)


def test_a_catalogue_of_one_text_repeated_finds_nothing_alone():
    found = doctor.examine(BM25Index(["red saw"] * 3), ["red saw"] * 3)
    assert (found.alone, found.tied, found.recall_at_1) == (0.0, 1.0, pytest.approx(1 / 3))


def test_items_without_words_are_named_and_go_to_the_bottom(tmp_path, capsys):
    dataset = make_dataset(tmp_path / "dataset")
    dataset = dataclasses.replace(
        dataset, texts=["..." if row == 2 else text for row, text in enumerate(dataset.texts)]
    )
    completions = write_completions(tmp_path / "completions", dataset, completion_rows(dataset))
    out = rank(tmp_path / "ranking", dataset, completions)
    assert "1 items have no word in their text, 'i002' first" in capsys.readouterr().out
    assert artifacts.read_manifest(out, kind="ranking")["items_without_words"] == ["i002"]
    for lists in RankingReader(out, dataset).blocks():
        assert (lists.items[:, -1] == 2).all() and (lists.scores[:, -1] == float("-inf")).all()
