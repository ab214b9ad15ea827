"""SASRec: packing, the model against NumPy, the loss, exact resume, what it learns, its ranking, and every refusal."""

import dataclasses
import json

import gin
import jax
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calrec_jax import artifacts
from calrec_jax.baselines import train as training
from calrec_jax.baselines.sasrec import SASRec, SASRecConfig, cross_entropy
from calrec_jax.baselines.sequences import Sequences, place
from calrec_jax.baselines.train import last_hidden, load_sasrec, train_sasrec
from calrec_jax.data.dataset import save_dataset
from calrec_jax.data.templates import Template
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.run import evaluate
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.run import rank
from calrec_jax.rank.shards import RankingReader

SMALL = """
SASRecConfig:
  width = 16
  mlp_width = 16
  max_items = 12
  dropout_rate = 0.1
"""
SETTINGS = {"batch_rows": 2, "row_items": 16, "learning_rate": 1e-2, "weight_decay": 0.01}


@pytest.fixture(autouse=True)
def small():
    gin.parse_config(SMALL)
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Users who walk around a ring of ten items, so that the next item is known; one history of length 1, one long."""
    rng = np.random.default_rng(0)
    lengths = [3, 40, *rng.integers(3, 12, 38)]
    starts = rng.integers(0, 10, len(lengths))
    walks = [[(start + step) % 10 for step in range(length)] for start, length in zip(starts, lengths, strict=True)]
    return save_dataset(
        tmp_path_factory.mktemp("data") / "dataset",
        name="Ring",
        items=pa.table(
            {"item_id": [f"i{n}" for n in range(10)]}
            | {name: [f"{name} {n}" for n in range(10)] for name in ("title", "category", "brand", "price")}
        ),
        sequences=pa.table(
            {
                "user_id": [f"u{n:02}" for n in range(len(walks))],
                "item_ids": [[f"i{n}" for n in walk] for walk in walks],
                "timestamps": [list(range(len(walk))) for walk in walks],
                "valid_position": pa.array([len(walk) - 2 for walk in walks], pa.int32()),
                "test_position": pa.array([len(walk) - 1 for walk in walks], pa.int32()),
            }
        ),
        template=Template(),
        card={},
        made_from={},
        settings={},
    )


def sequences_of(dataset, split="validation"):
    return Sequences(dataset.items, dataset.offsets[:-1], Histories(dataset, split).lengths)


def test_sequences_are_placed_in_order_without_overlap():
    rows, columns = place(np.array([3, 4, 2, 5, 5, 1]), 8)
    assert rows.tolist() == [0, 0, 1, 1, 2, 2] and columns.tolist() == [0, 3, 0, 2, 0, 5]


@pytest.mark.parametrize("with_targets", [True, False])
def test_a_row_holds_its_sequences(dataset, with_targets):
    sequences = sequences_of(dataset).cut(7)
    users = np.random.default_rng(1).permutation(len(sequences.lengths))
    batch = sequences.pack(users, 8, 4, with_targets=with_targets)
    assert len(batch["items"]) % 4 == 0 and all(value.dtype == np.int32 for value in batch.values())
    found = []
    for row in range(len(batch["items"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            at = np.flatnonzero(batch["segments"][row] == segment)
            assert (np.diff(at) == 1).all()
            assert batch["from_end"][row, at].tolist() == list(range(len(at)))[::-1]
            items = batch["items"][row, at].tolist()
            found.append([*items, batch["targets"][row, at[-1]]] if with_targets else items)
            if with_targets:
                assert batch["targets"][row, at].tolist() == found[-1][1:]
    expected = [dataset.history(user, "validation")[-7:].tolist() for user in users]
    assert found == [history for history in expected if len(history) > with_targets]


def numpy_hidden(params, config, items):
    """Hidden states [L, D] of one sequence, written out."""
    params = jax.tree.map(lambda value: np.asarray(value, np.float64), params)

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    x = params["embedding"][items]
    if config.positions:
        x = x + params["positions"][len(items) - 1 - np.arange(len(items))]
    for layer in range(config.layers):
        weights, normed = params[f"attention_{layer}"], norm(x, params[f"attention_norm_{layer}"])
        query, key, value = (dense(normed, weights[name]) for name in ("query", "key", "value"))
        width = config.width // config.heads
        joined = np.zeros_like(x)
        for head in range(config.heads):
            part = slice(head * width, (head + 1) * width)
            for at in range(len(items)):
                scores = key[: at + 1, part] @ query[at, part] / np.sqrt(width)
                shares = np.exp(scores - scores.max())
                joined[at, part] = shares / shares.sum() @ value[: at + 1, part]
        x = x + dense(joined, weights["out"])
        inner = np.maximum(dense(norm(x, params[f"mlp_norm_{layer}"]), params[f"mlp_in_{layer}"]), 0)
        x = x + dense(inner, params[f"mlp_out_{layer}"])
    return norm(x, params["final_norm"])


@pytest.mark.parametrize("config", [SASRecConfig(8, 1, 2, 12), SASRecConfig(8, 2, 1, 6, positions=True)])
def test_the_packed_model_is_the_written_out_one(dataset, config):
    config = dataclasses.replace(config, max_items=6)
    model = SASRec(config, 10)
    params = training.init_state(model, optax.sgd(1.0), 0).params
    params = jax.tree.map(lambda value: value + 0.3 * jax.random.normal(jax.random.key(1), value.shape), params)
    hidden = last_hidden(model, params, sequences_of(dataset, "test"), 16)
    for user in range(len(hidden)):
        expected = numpy_hidden(params, config, dataset.history(user, "test")[-6:])[-1]
        np.testing.assert_allclose(hidden[user], expected, atol=2e-5)


def test_cross_entropy_is_the_mean_over_real_places():
    rng = np.random.default_rng(0)
    hidden, embedding = rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4))
    targets, segments = rng.integers(0, 5, (2, 3)), np.array([[1, 1, 2], [1, 0, 0]])
    losses = []
    for row, column in zip(*np.nonzero(segments), strict=True):
        logits = embedding @ hidden[row, column]
        losses.append(np.log(np.exp(logits).sum()) - logits[targets[row, column]])
    assert float(cross_entropy(hidden, embedding, targets, segments)) == pytest.approx(np.mean(losses), rel=1e-5)


def test_it_learns_the_ring_and_ranks_by_it(tmp_path, dataset):
    folder = train_sasrec(tmp_path / "baselines" / "sasrec", dataset, num_epochs=12, patience=0, **SETTINGS)
    manifest = artifacts.read_manifest(folder, kind="baseline")
    assert manifest["validation_ndcg@10"] > 0.95 and manifest["last_epoch"] == 12
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {row["epoch"]: row["ndcg@10"] for row in rows if row["split"] == "validation"}
    assert list(values) == list(range(1, 13))
    assert values[manifest["best_epoch"]] == max(values.values()) == pytest.approx(manifest["validation_ndcg@10"])

    out = rank(tmp_path / "rankings" / "test-sasrec", dataset, None, source="sasrec", baseline=folder)
    users = np.arange(len(dataset.user_ids))
    lists = RankingReader(out, dataset).rows(users)
    hidden, embeddings = load_sasrec(folder, dataset, "test")
    written = np.full((len(users), 10), np.nan)
    np.put_along_axis(written, lists.items, lists.scores, axis=1)
    np.testing.assert_allclose(written, hidden @ embeddings.T, atol=1e-4)
    made_from = artifacts.read_manifest(out, kind="ranking")["made_from"]
    assert made_from == {"dataset": dataset.hash, "baseline": manifest["hash"]}
    row = evaluate(tmp_path / "report", dataset, {"sasrec": out}, baselines=(), resamples=10)["rows"][0]
    assert row["kind"] == "baseline" and row["metrics"]["recall@1"] > 0.9

    out = rank(
        tmp_path / "new", dataset, None, split="validation", source="sasrec", baseline=folder, leave_out_history="all"
    )
    for row in pq.read_table(out / "part-00000.parquet").to_pylist():
        history = dataset.history(list(dataset.user_ids).index(row["user_id"]), "validation")
        gone = {item for item, score in zip(row["item_ids"], row["scores"], strict=True) if score == -np.inf}
        assert gone == set(dataset.item_ids[history])


def test_an_interrupted_training_ends_as_one_left_alone(tmp_path, dataset, monkeypatch, capsys):
    whole = train_sasrec(tmp_path / "whole", dataset, num_epochs=4, **SETTINGS)
    validate, calls = training._validate, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr(training, "_validate", killed)
    with pytest.raises(KeyboardInterrupt):
        train_sasrec(tmp_path / "cut", dataset, num_epochs=4, **SETTINGS)
    monkeypatch.setattr(training, "_validate", validate)
    cut = train_sasrec(tmp_path / "cut", dataset, num_epochs=4, **SETTINGS)
    assert "resuming" in capsys.readouterr().out
    for one, other in zip(load_sasrec(whole, dataset, "test"), load_sasrec(cut, dataset, "test"), strict=True):
        np.testing.assert_array_equal(one, other)
    logs = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (whole, cut)]
    for one, other in zip(*logs, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    hashes = {artifacts.read_manifest(folder, kind="baseline")["hash"] for folder in (whole, cut)}
    assert len(hashes) == 1
    train_sasrec(cut, dataset, num_epochs=4, **SETTINGS)
    assert "is done already, skipped" in capsys.readouterr().out


def test_it_stops_when_patience_runs_out_and_keeps_the_best_epoch(tmp_path, dataset, monkeypatch):
    values = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    kept = []
    monkeypatch.setattr(training, "_validate", lambda hidden, *_: kept.append(hidden) or next(values))
    folder = train_sasrec(tmp_path / "sasrec", dataset, num_epochs=9, patience=2, **SETTINGS)
    manifest = artifacts.read_manifest(folder, kind="baseline")
    assert (manifest["best_epoch"], manifest["last_epoch"]) == (2, 4)
    assert manifest["validation_ndcg@10"] == pytest.approx(0.3)
    np.testing.assert_array_equal(load_sasrec(folder, dataset, "validation")[0], kept[1])


def test_training_does_not_see_the_targets(tmp_path, dataset):
    """Other validation and test targets, same parameters."""
    items = dataset.items.copy()
    ends = dataset.offsets[1:]
    items[ends - 1], items[ends - 2] = 0, 1
    other = dataclasses.replace(dataset, items=items)
    settings = {"num_epochs": 2, "patience": 0, **SETTINGS}
    models = [train_sasrec(tmp_path / name, data, **settings) for name, data in (("one", dataset), ("two", other))]
    last = []
    for folder in models:
        with training.ckpt.manager(folder, read_only=True) as checkpoints:
            model = SASRec(SASRecConfig(), 10)
            like = training.init_state(model, optax.adamw(1.0, mask=training._decayed), 0)
            last.append(training.ckpt.restore(checkpoints, 2, like).params)
    jax.tree.map(np.testing.assert_array_equal, *last)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_epochs": 0}, "sasrec.num_epochs=0: must be a whole number of at least 1"),
        ({"batch_rows": 0}, "sasrec.batch_rows=0"),
        ({"row_items": 11}, "sasrec.row_items=11: must be at least SASRecConfig.max_items=12"),
        ({"learning_rate": 0.0}, "sasrec.learning_rate=0.0"),
    ],
)
def test_bad_settings(tmp_path, dataset, settings, message):
    with pytest.raises(CalrecError) as caught:
        train_sasrec(tmp_path / "sasrec", dataset, **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"width": 10, "heads": 4}, "SASRecConfig.width=10: must divide by SASRecConfig.heads=4"),
        ({"layers": 0}, "SASRecConfig.layers=0"),
        ({"dropout_rate": 1.0}, "SASRecConfig.dropout_rate=1.0: must be at least 0 and below 1"),
    ],
)
def test_bad_sizes(settings, message):
    with pytest.raises(CalrecError) as caught:
        SASRecConfig(**settings)
    assert message in str(caught.value)


def test_refusals(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(training, "_validate", lambda *_: 0.5)
    folder = train_sasrec(tmp_path / "sasrec", dataset, num_epochs=1, **SETTINGS)
    with pytest.raises(CalrecError, match="setting seed"):
        train_sasrec(folder, dataset, num_epochs=1, seed=1, **SETTINGS)
    other = dataclasses.replace(dataset, hash="another")
    with pytest.raises(CalrecError, match="was trained on another dataset than Ring"):
        load_sasrec(folder, other, "test")
    with pytest.raises(CalrecError, match="name it in run.baselines"):
        rank(tmp_path / "ranking", dataset, None, source="sasrec")
    (folder / "manifest.json").unlink()
    with pytest.raises(CalrecError, match="begun otherwise.*seed"):
        train_sasrec(folder, dataset, num_epochs=1, seed=1, **SETTINGS)
    short = dataclasses.replace(dataset, valid_position=np.minimum(dataset.valid_position, 1))
    with pytest.raises(CalrecError, match="no user has two items"):
        train_sasrec(tmp_path / "short", short, num_epochs=1, **SETTINGS)
    with pytest.raises(CalrecError, match=r"the loss is not finite in epoch 1; lower sasrec\.learning_rate"):
        train_sasrec(tmp_path / "wild", dataset, num_epochs=3, **(SETTINGS | {"learning_rate": 1e38}))
