"""Scores of given candidates against teacher forcing, and the files that candidates and exclusions come from."""

import types

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from decoding_reference import EOS, batch_of, teacher_forced, tiny_model
from test_constrained import catalogue_of

from calrec_jax import artifacts
from calrec_jax.decode import given
from calrec_jax.decode.scoring import Candidates, Scorer, Tower
from calrec_jax.errors import CalrecError

PROMPTS = [[0, 5, 9, 3, 30, 7], [0, 8, 2], [0, 4, 4, 4, 4, 4, 33]]
ITEMS = [[20], [20, 21], [], list(range(2, 22)), [12, 13, 14], [12, 13, 14]]


def test_scores_equal_teacher_forcing_best_first():
    model, params = tiny_model(40, seed=5)
    flat = np.array([3, 0, 2, 4, 5, 1, 0], np.int32)
    candidates = Candidates(flat, np.array([0, 5, 5]), np.array([5, 5, 7]))
    scorer = Scorer(model, params, catalogue=catalogue_of(ITEMS), candidates=candidates, batch_users=2)
    found = scorer(batch_of(PROMPTS, 10))
    for row, own in enumerate(([3, 0, 2, 4, 5], [], [1, 0])):
        exact = {i: teacher_forced(model, params, PROMPTS[row], [*ITEMS[i], EOS]) for i in own}
        order = sorted(own, key=lambda i: -exact[i])  # 4 and 5 have one text, and stay in their order
        assert found.items[row].tolist() == order + [-1] * (5 - len(own))
        np.testing.assert_allclose(found.log_probs[row, : len(own)], [exact[i] for i in order], atol=1e-4)
        assert found.num_tokens[row, : len(own)].tolist() == [len(ITEMS[i]) + 1 for i in order]
        assert np.isinf(found.log_probs[row, len(own) :]).all()
    tower = Tower(model, params, batch_users=2)(batch_of(PROMPTS, 16))
    np.testing.assert_allclose(tower.user_embedding, found.user_embedding, atol=1e-6)
    assert tower.num_tokens.shape == (3, 0)


def test_nobody_has_candidates():
    none = Candidates(np.zeros(0, np.int32), np.zeros(3, np.int64), np.zeros(3, np.int64))
    with pytest.raises(CalrecError, match="no user has any candidate"):
        Scorer(*tiny_model(40), catalogue=catalogue_of(ITEMS), candidates=none, batch_users=2)


DATASET = types.SimpleNamespace(
    name="shop",
    hash="d" * 64,
    user_ids=np.array(["a", "b", "c"], object),
    item_ids=np.array(["007", "8", "9"], object),
    offsets=np.array([0, 3, 5, 9]),
    items=np.array([0, 1, 2, 2, 1, 0, 0, 2, 1], np.int32),
    history_lengths=lambda split: {"test": np.array([2, 1, 3]), "validation": np.array([1, 0, 2])}[split],
)


def of(candidates: Candidates) -> list[list[int]]:
    return [candidates.items[a:b].tolist() for a, b in zip(candidates.start, candidates.end, strict=True)]


def test_histories_left_out():
    assert given.history(DATASET, "test", "none") is None
    assert of(given.history(DATASET, "test", "all")) == [[0, 1], [2], [0, 0, 2]]
    assert of(given.history(DATASET, "validation", "all")) == [[0], [], [0, 0]]
    assert of(given.history(DATASET, "test", "last")) == [[1], [2], [2]]
    assert of(given.history(DATASET, "validation", "last")) == [[0], [], [0]]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_items_left_out_by_a_file(tmp_path, kind, capsys):
    table = pa.table({"item_id": ["007", "9", "gone", "9"], "why": ["x", "y", "z", "y"]})
    path = tmp_path / f"stock.{kind}"
    (pyarrow.csv.write_csv if kind == "csv" else pq.write_table)(table, path)
    assert given.items_left_out(path, DATASET).tolist() == [True, False, True]
    assert "names 1 items that the catalogue does not have, 'gone' first" in capsys.readouterr().out


def test_candidates_of_a_file_and_of_rankings(tmp_path):
    rows = {"user_id": ["c", "a", "b"], "item_ids": [["9", "007", "8"], [], None]}
    path = tmp_path / "candidates.parquet"
    pq.write_table(pa.table(rows), path)
    found, digest = given.candidates(path, DATASET, 2)
    assert of(found) == [[], [], [2, 0]] and digest == artifacts.hash_file(path)
    ranking = tmp_path / "ranking"
    ranking.mkdir()
    for part, rows in enumerate(([["a", ["8"]]], [["c", ["9", "8"]], ["b", ["007"]]])):
        columns = {"user_id": [row[0] for row in rows], "item_ids": [row[1] for row in rows]}
        pq.write_table(pa.table(columns), ranking / f"part-{part:05d}.parquet")
    files = artifacts.hash_files(sorted(ranking.glob("*.parquet")))
    made_from = {"dataset": DATASET.hash}
    digest = artifacts.write_manifest(ranking, kind="ranking", made_from=made_from, settings={}, files=files)
    found, hashed = given.candidates(ranking, DATASET, 5)
    assert of(found) == [[1], [0], [2, 1]] and hashed == digest
    other = types.SimpleNamespace(**vars(DATASET) | {"hash": "e" * 64})
    with pytest.raises(CalrecError, match="ranks the items of another dataset than 'shop'"):
        given.candidates(ranking, other, 5)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": ["a", "b", "x"], "item_ids": [["8"]] * 3}, "names user 'x', which the dataset does not have"),
        (
            {"user_id": ["a", "b", "c"], "item_ids": [["8", "80"]] * 3},
            "names item '80', which the dataset does not have",
        ),
        ({"user_id": ["a", "b", "b"], "item_ids": [["8"]] * 3}, "has user 'b' more than once"),
        ({"user_id": ["a", "b"], "item_ids": [["8"]] * 2}, "has user 'c' not at all"),
        ({"user_id": ["a", "b", "c"]}, r"lacks the columns \['item_ids'\]"),
    ],
)
def test_bad_candidates_are_named(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    with pytest.raises(CalrecError, match=message):
        given.candidates(tmp_path / "bad.parquet", DATASET, 5)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(CalrecError, match="none.csv does not exist"):
        given.items_left_out(tmp_path / "none.csv", DATASET)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(CalrecError, match="text.parquet cannot be read as Parquet"):
        given.items_left_out(tmp_path / "text.parquet", DATASET)
    (tmp_path / "other.csv").write_text("sku\n1\n")
    with pytest.raises(CalrecError, match=r"lacks the columns \['item_id'\]; it has \['sku'\]"):
        given.items_left_out(tmp_path / "other.csv", DATASET)
