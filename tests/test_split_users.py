"""Users without a target in a split are not in it, from examples to the report; categories are kept apart."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranking_data import completion_rows, make_dataset, write_completions

from calrec_jax.data.dataset import save_dataset
from calrec_jax.data.examples import build_examples, tokenise_catalogue
from calrec_jax.data.templates import Template
from calrec_jax.decode.prompts import build_prompts
from calrec_jax.decode.run import _chosen
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.run import evaluate
from calrec_jax.evaluate.showcase import all_targets, draw_users
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.run import rank


def resaved(folder, dataset, name="Tools", **positions):
    """The dataset with other positions."""
    columns = {key: getattr(dataset, key) for key in ("valid_position", "test_position", "train_end")} | positions
    bounds = list(zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True))
    sequences = {
        "user_id": dataset.user_ids.tolist(),
        "item_ids": [dataset.item_ids[dataset.items[a:b]].tolist() for a, b in bounds],
        "timestamps": [dataset.timestamps[a:b].tolist() for a, b in bounds],
        **columns,
    }
    return save_dataset(
        folder,
        name=name,
        items=pa.table({"item_id": dataset.item_ids.tolist(), **dataset.attributes}),
        sequences=pa.table(sequences),
        template=Template(),
        card={},
        made_from={},
        settings={},
    )


@pytest.fixture
def mixed(tmp_path):
    """Every third user has no test target, every third no validation target, the rest both."""
    whole = make_dataset(tmp_path / "whole", num_users=30)
    lengths = np.diff(whole.offsets).astype(np.int32)
    kind = np.arange(30) % 3
    return resaved(
        tmp_path / "mixed",
        whole,
        test_position=np.where(kind == 0, -1, lengths - 1).astype(np.int32),
        valid_position=np.where(kind == 1, -1, lengths - 2).astype(np.int32),
        train_end=(lengths - 2).astype(np.int32),
    )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_examples_prompts_and_histories(mixed, small_run, split):
    there = [u for u in range(30) if u % 3 != (0 if split == "test" else 1)]
    assert mixed.users_with(split).tolist() == there
    catalogue = tokenise_catalogue([mixed], small_run.tokenizer)
    examples = build_examples([mixed], catalogue, split=split, max_history_tokens=900)
    assert examples.user.tolist() == [u for u in there if len(mixed.history(u, split))]
    for user, end in zip(examples.user.tolist(), examples.end.tolist(), strict=True):
        assert examples.items[end - 1] == mixed.target(user, split)
    prompts = build_prompts(mixed, catalogue, split=split, max_history_tokens=900)
    own = np.isin(np.arange(30), there)
    assert ((prompts.end - prompts.start)[own] == mixed.history_lengths(split)[own]).all()
    assert _chosen(mixed.users_with(split), 7, 0).tolist() == sorted(set(_chosen(np.array(there), 7, 0)))
    histories = Histories(mixed, split)
    counts = np.zeros(len(mixed.item_ids))
    for user in range(30):
        np.add.at(counts, mixed.history(user, split), 1)
    assert histories.popularity.tolist() == counts.tolist()
    assert (histories.targets >= 0).tolist() == own.tolist()
    assert np.array_equal(histories.targets, all_targets(mixed, split))
    assert set(draw_users(mixed, split, None, 9, 0)) <= set(there)


def test_training_ends_at_train_end(mixed, small_run):
    catalogue = tokenise_catalogue([mixed], small_run.tokenizer)
    examples = build_examples([mixed], catalogue, split="train", max_history_tokens=900)
    assert examples.user.tolist() == mixed.users_with("train").tolist()
    assert (examples.end - mixed.offsets[examples.user] == mixed.train_end[examples.user]).all()


def test_who_is_not_in_the_split_is_no_miss(tmp_path, mixed):
    there = mixed.user_ids[mixed.users_with("test")].tolist()
    rows = [row for row in completion_rows(mixed) if row["user_id"] in there]
    completions = write_completions(tmp_path / "completions", mixed, rows)
    ranking = rank(tmp_path / "rankings" / "test-calrec", mixed, completions)
    popularity = rank(tmp_path / "rankings" / "test-popular", mixed, None, source="popularity")
    for folder in (ranking, popularity):
        tables = [pq.read_table(path, columns=["user_id"]) for path in sorted(folder.glob("part-*.parquet"))]
        assert sorted(pa.concat_tables(tables)["user_id"].to_pylist()) == there
    metrics = evaluate(tmp_path / "report", mixed, {"calrec": ranking, "popular": popularity}, resamples=20)
    assert metrics["users"] == 20 == json.loads((tmp_path / "report" / "metrics.json").read_text())["users"]
    rows = {row["name"]: row for row in metrics["rows"]}
    assert all(row["users_without_ranking"] == 0 for row in rows.values())
    assert rows["popular"]["metrics"] == rows["popularity"]["metrics"]
    per_user = pq.read_table(tmp_path / "report" / "per_user.parquet")
    assert set(per_user["user_id"].to_pylist()) == set(there)
    lacking = write_completions(tmp_path / "lacking", mixed, completion_rows(mixed)[4:5])
    with pytest.raises(CalrecError, match=r"lacks completions of 19 of the 20 users"):
        rank(tmp_path / "rankings" / "test-x", mixed, lacking)


def test_shared_users_and_items_are_kept_apart_by_category(tmp_path, small_run):
    first = make_dataset(tmp_path / "a", name="A")
    second = resaved(tmp_path / "b", first, name="B")
    assert first.user_ids.tolist() == second.user_ids.tolist() and first.item_ids.tolist() == second.item_ids.tolist()
    catalogue = tokenise_catalogue([first, second], small_run.tokenizer)
    examples = build_examples([first, second], catalogue, split="test", max_history_tokens=900)
    targets = examples.items[examples.end - 1]
    half = len(examples) // 2
    assert examples.group.tolist() == [0] * half + [1] * half
    assert not set(examples.user[:half]) & set(examples.user[half:])
    assert not set(targets[:half]) & set(targets[half:])
    # The same text is the same target, whatever category names it: as a negative it is masked in both.
    assert catalogue.text_ids[targets[:half]].tolist() == catalogue.text_ids[targets[half:]].tolist()
    texts = [*first.texts, *second.texts]
    same = np.equal.outer(catalogue.text_ids, catalogue.text_ids)
    assert (same == np.array([[a == b for b in texts] for a in texts])).all()
