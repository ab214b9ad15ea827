"""The verb `decode`: prompts, shards, what belongs together, restart; and the towers against the training batch."""

import dataclasses
import pickle
import signal
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from decoding_reference import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from calrec_jax import artifacts
from calrec_jax.data.examples import build_examples, tokenise_catalogue
from calrec_jax.data.packing import Packing, fill_rows
from calrec_jax.decode import prompts as prompting
from calrec_jax.decode import run, shards
from calrec_jax.decode.run import decode
from calrec_jax.decode.writer import Writer
from calrec_jax.errors import CalrecError
from calrec_jax.models.towers import mean_pool, unit
from calrec_jax.rank.completions import Completions

MAX_TARGET, MAX_HISTORY = 24, 90
SETTINGS = {"num_samples": 3, "max_new_tokens": 8, "temperature": 0.7, "batch_users": 8, "shard_users": 10}


@pytest.fixture(scope="module")
def stage(small_run):
    """What `load_checkpoint` gives of a stage with random parameters."""
    model, params = tiny_model(small_run.tokenizer.vocab_size, num_layers=1)
    facts = {
        "tokenizer": small_run.tokenizer.fingerprint,
        "template": small_run.datasets[0].template,
        "datasets": [],
        "vocab_size": small_run.tokenizer.vocab_size,
        "max_history_tokens": MAX_HISTORY,
        "max_target_tokens": MAX_TARGET,
        "hash": "0" * 64,
    }
    return model, params, facts


@pytest.fixture(autouse=True)
def loads(stage, monkeypatch):
    model, params, facts = stage
    monkeypatch.setattr(run, "load_checkpoint", lambda folder: (model.config, params, dict(facts)))


@pytest.fixture(scope="module")
def dataset(small_run):
    """One where items 1 and 2 have equal texts."""
    whole = small_run.datasets[0]
    return dataclasses.replace(whole, texts=[whole.texts[1] if i == 2 else t for i, t in enumerate(whole.texts)])


@pytest.fixture(scope="module")
def catalogue(small_run, dataset):
    return tokenise_catalogue([dataset], small_run.tokenizer, max_target_tokens=MAX_TARGET)


@pytest.fixture(scope="module")
def decoded():
    """Batches of users and what the decoder gave for each, while `sampled` was made."""
    return []


@pytest.fixture(scope="module")
def sampled(dataset, small_run, stage, decoded, tmp_path_factory):
    """One decode of all users, with embeddings."""
    real = Writer.complete

    def recorded(self, batch, *said):
        decoded.append((batch, real(self, batch, *said)))
        return decoded[-1][1]

    out = tmp_path_factory.mktemp("completions") / "test-sample"
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "load_checkpoint", lambda folder: (stage[0].config, stage[1], dict(stage[2])))
    patch.setattr(Writer, "complete", recorded)
    decode(out, dataset, small_run.tokenizer, "stage", **SETTINGS)
    patch.undo()
    return out


def rows_of(folder) -> dict[str, dict]:
    tables = [pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    assert all(table.schema.equals(shards.SCHEMA) for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    assert len({row["user_id"] for row in rows}) == len(rows)
    return {row["user_id"]: row for row in rows}


def packed(dataset, catalogue, split):
    """Each example of a split alone in a row of the training batch, and the examples."""
    examples = build_examples([dataset], catalogue, split=split, max_history_tokens=MAX_HISTORY)
    packing = Packing(row_tokens=int(examples.lengths.max()), row_examples=1, batch_rows=len(examples))
    return fill_rows(examples, [np.array([e]) for e in range(len(examples))], packing), examples


@pytest.mark.parametrize("split", ["validation", "test"])
def test_prompts_are_the_ids_of_the_training_examples(dataset, catalogue, split):
    prompts = prompting.build_prompts(dataset, catalogue, split=split, max_history_tokens=MAX_HISTORY)
    batch, examples = packed(dataset, catalogue, split)
    tokens = prompts.tokens(np.arange(len(dataset.user_ids)), 128)
    targets = catalogue.lengths[examples.items[examples.end - 1]]
    for e, user in enumerate(examples.user):
        length = examples.joint_lengths[e] - targets[e]
        assert prompts.lengths[user] == length <= MAX_HISTORY
        assert tokens[user, :length].tolist() == batch["decoder_input_tokens"][e, :length].tolist()
        assert not tokens[user, length:].any()
    assert prompts.dropped_items > 0, "the case must hold a history that is cut"


def test_a_user_without_history_has_a_prompt(dataset, catalogue):
    first = dataset.valid_position.copy()
    first[4] = 0
    dataset = dataclasses.replace(dataset, valid_position=first)
    prompts = prompting.build_prompts(dataset, catalogue, split="validation", max_history_tokens=MAX_HISTORY)
    frame = [catalogue.start_id, *catalogue.intro, *catalogue.first]
    assert prompts.lengths[4] == len(frame)
    assert prompts.tokens(np.array([4]), 64)[0, : len(frame)].tolist() == frame


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_buckets_bound_padding_and_groups_hold_one_bucket(lengths):
    lengths = np.sort(np.array(lengths))
    buckets = prompting.bucket_lengths(lengths)
    assert (buckets >= lengths).all()
    assert (buckets - lengths < np.maximum(64, lengths / 2)).all()
    groups = prompting.groups(np.arange(len(lengths)), buckets)
    assert np.concatenate(groups).tolist() == list(range(len(lengths)))
    assert all(len(set(buckets[g])) == 1 for g in groups) and len(groups) == len(set(buckets))


def test_rows_of_the_contract(dataset, small_run, sampled, decoded):
    tokenizer = small_run.tokenizer
    rows = rows_of(sampled)
    assert sorted(rows) == dataset.user_ids.tolist()
    seen = 0
    for batch, completed in decoded:
        for place, user in enumerate(batch):
            row = rows[dataset.user_ids[user]]
            assert row["item_ids"] is None
            assert row["log_probs"] == completed.log_probs[place].tolist()
            assert row["num_tokens"] == completed.num_tokens[place].tolist()
            assert row["finished"] == completed.finished[place].tolist()
            for n, text in enumerate(row["texts"]):
                tokens = completed.tokens[place, n, : completed.num_tokens[place, n]].tolist()
                assert (tokens[-1] == tokenizer.eos_id) == completed.finished[place, n]
                assert text == tokenizer.decode([t for t in tokens if t != tokenizer.eos_id])
                seen += 1
    assert seen == 23 * 3
    manifest = artifacts.read_manifest(sampled, kind="completions")
    assert manifest["users"] == 23
    assert manifest["made_from"] == {
        "dataset": dataset.hash,
        "tokenizer": tokenizer.fingerprint,
        "checkpoint": "0" * 64,
    }
    assert manifest["settings"]["num_samples"] == 3 and "num_beams" not in manifest["settings"]
    assert set(manifest["files"]) == {path.name for path in sampled.glob("*.parquet")}
    timing = artifacts.read_json(sampled / "timing.json")
    assert timing["users"] == 23 and 0 < timing["compile_seconds"] < timing["seconds"]
    assert timing["tokens"] == sum(sum(row["num_tokens"]) for row in rows.values())


def test_towers_equal_those_of_the_training_batch(dataset, stage, catalogue, sampled):
    model, params, _ = stage
    batch, examples = packed(dataset, catalogue, "test")
    names = ("decoder_input_tokens", "decoder_positions", "decoder_segment_ids")
    hidden = jax.jit(lambda *x: model.apply({"params": params}, *x, method="activations"))(*(batch[n] for n in names))
    users = np.asarray(unit(mean_pool(hidden, batch["user_pool"], 1)))[:, 0]
    items = np.asarray(unit(mean_pool(hidden, batch["item_pool"], 1)))[:, 0]
    rows = rows_of(sampled)
    table = pq.read_table(sampled / shards.ITEM_EMBEDDINGS_FILE)
    assert table["item_id"].to_pylist() == dataset.item_ids.tolist()
    found = np.array(table["embedding"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    for e, user in enumerate(examples.user):
        np.testing.assert_allclose(rows[dataset.user_ids[user]]["user_embedding"], users[e], atol=1e-5)
        np.testing.assert_allclose(found[examples.items[examples.end[e] - 1]], items[e], atol=1e-5)
    assert np.array_equal(found[1], found[2]), "items 1 and 2 have the same text"


def test_done_is_skipped_and_other_settings_are_refused(dataset, small_run, sampled, capsys):
    before = artifacts.hash_file(sampled / "part-00000.parquet")
    decode(sampled, dataset, small_run.tokenizer, "stage", **SETTINGS)
    assert "is done already, skipped" in capsys.readouterr().out
    with pytest.raises(CalrecError, match=r"temperature \(there 0.7, asked for 0.5\)"):
        decode(sampled, dataset, small_run.tokenizer, "stage", **SETTINGS | {"temperature": 0.5})
    assert artifacts.hash_file(sampled / "part-00000.parquet") == before


def test_interrupted_resumed_and_byte_identical(dataset, small_run, sampled, tmp_path, monkeypatch, capsys):
    tokenizer = small_run.tokenizer
    out, calls = tmp_path / "half", []
    settings = SETTINGS
    real = Writer.complete

    def interrupted(self, batch, *said):
        calls.append(len(batch))
        if sum(calls) > 15:
            raise KeyboardInterrupt
        return real(self, batch, *said)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "complete", interrupted)
        decode(out, dataset, tokenizer, "stage", **settings)
    assert sorted(p.name for p in out.iterdir()) == ["part-00000.parquet", "request.json"]
    with pytest.raises(CalrecError, match=r"holds half of other completions \(setting seed"):
        decode(out, dataset, tokenizer, "stage", **settings, seed=1)
    # A whole shard of another request is not trusted; that of this one is not made again.
    first = (out / "part-00000.parquet").stat().st_mtime_ns
    table = pq.read_table(sampled / "part-00001.parquet")
    shards.write_shard(out / "part-00001.parquet", table.slice(0, 10), "another request")
    capsys.readouterr()
    decode(out, dataset, tokenizer, "stage", **settings)
    assert "10 users were there already" in capsys.readouterr().out
    assert (out / "part-00000.parquet").stat().st_mtime_ns == first
    for path in sampled.glob("*.parquet"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_texts_depend_on_no_batch_or_shard_and_max_users_is_a_subset(dataset, small_run, sampled, tmp_path):
    whole = rows_of(sampled)
    other = SETTINGS | {"batch_users": 5, "shard_users": 1000, "max_users": 9, "with_embeddings": False}
    decode(tmp_path / "other", dataset, small_run.tokenizer, "stage", **other)
    rows = rows_of(tmp_path / "other")
    assert len(rows) == 9
    assert not (tmp_path / "other" / shards.ITEM_EMBEDDINGS_FILE).exists()
    for user, row in rows.items():
        assert row["texts"] == whole[user]["texts"]
        assert row["user_embedding"] is None
        np.testing.assert_allclose(row["log_probs"], whole[user]["log_probs"], atol=1e-4)


@pytest.mark.parametrize("renormalise", [True, False])
def test_constrained_completions_are_items(dataset, small_run, tmp_path, renormalise):
    out = tmp_path / "beam"
    decode(
        out, dataset, small_run.tokenizer, "stage", mode="constrained_beam", num_beams=16, renormalise=renormalise,
        batch_users=23, with_embeddings=False,
    )  # fmt: skip
    rows = rows_of(out)
    assert sorted(rows) == dataset.user_ids.tolist()
    for row in rows.values():
        assert sorted(row["item_ids"]) == dataset.item_ids.tolist(), "as many beams as items: all of them"
        assert row["texts"] == [dataset.texts[dataset.item_ids.tolist().index(item)] for item in row["item_ids"]]
        assert row["log_probs"] == sorted(row["log_probs"], reverse=True)
        assert all(row["finished"]) and min(row["num_tokens"]) > 1
        twins = [row["item_ids"].index(item) for item in ("Tools001", "Tools002")]
        assert dataset.texts[1] == dataset.texts[2]
        assert twins[1] == twins[0] + 1 and row["log_probs"][twins[0]] == row["log_probs"][twins[1]]
        if renormalise:
            distinct = [s for item, s in zip(row["item_ids"], row["log_probs"], strict=True) if item != "Tools002"]
            np.testing.assert_allclose(np.exp(distinct).sum(), 1, atol=1e-4)


def test_items_out_of_stock_and_histories_are_left_out(dataset, small_run, tmp_path):
    stock = tmp_path / "stock.csv"
    stock.write_text(f"item_id\n{dataset.item_ids[5]}\n{dataset.item_ids[1]}\n")
    out = tmp_path / "beam"
    settings = {"mode": "constrained_beam", "num_beams": 32, "batch_users": 23, "with_embeddings": False}
    asked = settings | {"leave_out_history": "all", "leave_out_items": str(stock)}
    decode(out, dataset, small_run.tokenizer, "stage", **asked)
    rows = rows_of(out)
    for user, user_id in enumerate(dataset.user_ids):
        history = set(dataset.history(user, "test").tolist())
        expected = [item for i, item in enumerate(dataset.item_ids) if i not in history | {1, 5}]
        assert sorted(rows[user_id]["item_ids"]) == expected
    assert artifacts.read_manifest(out, kind="completions")["made_from"]["leave_out_items"] == artifacts.hash_file(
        stock
    )
    stock.write_text("item_id\n" + "\n".join(dataset.item_ids) + "\n")
    with pytest.raises(CalrecError, match="catalogue has no items that are not left out and have a text"):
        decode(tmp_path / "none", dataset, small_run.tokenizer, "stage", **asked)


def test_items_without_words_are_named_and_no_constrained_completion(dataset, small_run, tmp_path, capsys):
    texts = ["Title: Unknown." if row in (3, 7) else text for row, text in enumerate(dataset.texts)]
    settings = {"mode": "constrained_beam", "num_beams": 32, "batch_users": 23, "with_embeddings": False}
    partly = dataclasses.replace(dataset, texts=texts, hash="8" * 64)
    decode(tmp_path / "beam", partly, small_run.tokenizer, "stage", **settings)
    assert "decode: 2 items have no word in their text, 'Tools003' first; they are left out" in capsys.readouterr().out
    expected = [item for row, item in enumerate(dataset.item_ids) if row not in (3, 7)]
    assert all(sorted(row["item_ids"]) == expected for row in rows_of(tmp_path / "beam").values())
    nothing = dataclasses.replace(dataset, texts=["Title: Unknown."] * 12, hash="7" * 64)
    with pytest.raises(CalrecError, match="catalogue has no items that are not left out and have a text"):
        decode(tmp_path / "none", nothing, small_run.tokenizer, "stage", **settings)


def test_a_catalogue_the_model_never_saw_needs_no_training(dataset, small_run, catalogue, tmp_path):
    """New items for the same users: the beam gives all of them, with the model's own scores of their texts."""
    texts = [f"{text} Second edition." for text in dataset.texts]
    new = dataclasses.replace(dataset, texts=texts, hash="9" * 64)
    settings = {"batch_users": 23, "with_embeddings": False}
    beam = {"mode": "constrained_beam", "num_beams": 32, "renormalise": False} | settings
    decode(tmp_path / "beam", new, small_run.tokenizer, "stage", **beam)
    found = rows_of(tmp_path / "beam")
    every = {"user_id": dataset.user_ids.tolist(), "item_ids": [dataset.item_ids.tolist()] * len(dataset.user_ids)}
    pq.write_table(pa.table(every), tmp_path / "all.parquet")
    score = {"mode": "score", "candidates": str(tmp_path / "all.parquet")} | settings
    decode(tmp_path / "score", new, small_run.tokenizer, "stage", **score)
    scored = rows_of(tmp_path / "score")
    for user, row in found.items():
        assert sorted(row["item_ids"]) == dataset.item_ids.tolist()
        assert set(row["texts"]) == set(texts)
        exact = dict(zip(scored[user]["item_ids"], scored[user]["log_probs"], strict=True))
        np.testing.assert_allclose(row["log_probs"], [exact[item] for item in row["item_ids"]], atol=1e-4)
        assert scored[user]["log_probs"] == sorted(scored[user]["log_probs"], reverse=True)
    ranked = Completions(tmp_path / "score", new, ["item_ids", "log_probs"]).constrained()
    assert ranked is not None


def test_the_tower_alone(dataset, small_run, sampled, tmp_path):
    decode(tmp_path / "tower", dataset, small_run.tokenizer, "stage", mode="tower", batch_users=8)
    rows, whole = rows_of(tmp_path / "tower"), rows_of(sampled)
    for user, row in whole.items():
        assert rows[user]["texts"] is None and rows[user]["log_probs"] is None
        np.testing.assert_allclose(rows[user]["user_embedding"], row["user_embedding"], atol=1e-5)
    assert Completions(tmp_path / "tower", dataset, ["user_embedding"]).tower() is not None


@pytest.mark.parametrize("mode", ["beam", "stochastic_beam"])
def test_beams_write_the_contract(dataset, small_run, tmp_path, mode):
    settings = {"num_beams": 4, "num_samples": 4, "max_new_tokens": 6, "batch_users": 23, "with_embeddings": False}
    decode(tmp_path / mode, dataset, small_run.tokenizer, "stage", mode=mode, **settings)
    for row in rows_of(tmp_path / mode).values():
        assert len(row["texts"]) == len(row["log_probs"]) == 4 and row["item_ids"] is None
        assert mode != "beam" or row["log_probs"] == sorted(row["log_probs"], reverse=True)


def test_processes_share_the_shards(dataset, small_run, sampled, tmp_path, monkeypatch, capsys):
    out = tmp_path / "shared"
    shards_of = {"process_count": 2, **SETTINGS}
    decode(out, dataset, small_run.tokenizer, "stage", process_index=1, **shards_of)
    assert sorted(p.name for p in out.glob("*.parquet")) == ["item_embeddings.parquet", "part-00001.parquet"]
    assert "others have 2 files left to write, part-00000.parquet first" in capsys.readouterr().out
    assert not (out / "manifest.json").exists()
    monkeypatch.setenv("CALREC_PROCESS_INDEX", "0")
    monkeypatch.setenv("CALREC_PROCESS_COUNT", "2")
    decode(out, dataset, small_run.tokenizer, "stage", **SETTINGS)
    manifests = [artifacts.read_manifest(folder, kind="completions") for folder in (out, sampled)]
    assert manifests[0]["hash"] == manifests[1]["hash"], "as one process would have made it, byte for byte"
    assert {p.name for p in out.glob("timing*")} == {"timing.json", "timing-00001.json"}
    monkeypatch.setenv("CALREC_PROCESS_INDEX", "2")
    with pytest.raises(CalrecError, match="decode.process_index=2 of decode.process_count=2"):
        decode(out, dataset, small_run.tokenizer, "stage", **SETTINGS)
    monkeypatch.setenv("CALREC_PROCESS_INDEX", "two")
    with pytest.raises(CalrecError, match="CALREC_PROCESS_INDEX='two' in the environment"):
        decode(out, dataset, small_run.tokenizer, "stage", **SETTINGS)


_KILLED = """
import dataclasses, os, pickle, signal, sys
from calrec_jax.decode import run, shards
dataset, tokenizer, stage, settings, out, dies = pickle.load(open(sys.argv[1], "rb"))
run.load_checkpoint = lambda folder: (stage[0].config, stage[1], dict(stage[2]))
real, calls = shards.pq.write_table, []
def write(table, path, **options):
    real(table, path, **options)
    calls.append(path)
    if dies and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # the second shard is written, and not yet in its place
shards.pq.write_table = write
run.decode(out, dataset, tokenizer, "stage", **settings)
"""


def test_kill_nine_loses_the_shard_in_work_alone(dataset, small_run, stage, sampled, tmp_path):
    out, work = tmp_path / "killed", tmp_path / "work.pkl"
    for dies in (True, False):
        work.write_bytes(pickle.dumps((dataset, small_run.tokenizer, jax.device_get(stage), SETTINGS, out, dies)))
        done = subprocess.run([sys.executable, "-c", _KILLED, str(work)], capture_output=True, text=True, check=False)
        assert done.returncode == (-signal.SIGKILL if dies else 0), done.stderr
        if dies:
            assert sorted(p.name for p in out.glob("part-*")) == ["part-00000.parquet"]
            first = (out / "part-00000.parquet").stat().st_mtime_ns
    assert "10 users were there already" in done.stdout
    assert (out / "part-00000.parquet").stat().st_mtime_ns == first
    assert not list(out.glob(".tmp-*")), "what the killed process left is gone"
    for path in sampled.glob("*.parquet"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"split": "train"}, r"split='train': must be one of"),
        ({"mode": "greedy"}, r"decode.mode='greedy': must be one of"),
        ({"temperature": 0.0}, r"decode.temperature=0.0: must be a positive number"),
        ({"temperature": float("nan")}, r"decode.temperature=nan: must be a positive number"),
        ({"num_samples": 2.5}, r"decode.num_samples=2.5: must be a positive whole number"),
        ({"mode": "constrained_beam", "num_beams": 0}, r"decode.num_beams=0: must be a positive whole number"),
        ({"num_samples": 32_768}, r"decode.num_samples=32768: must be at most 32,767, .* that a ranking can name"),
        ({"mode": "beam", "num_beams": 10**6}, r"decode.num_beams=1000000: must be at most 32,767"),
        ({"max_users": -1}, r"decode.max_users=-1"),
        ({"top_k": 0}, r"decode.top_k=0: must be a positive whole number"),
        ({"top_p": 1.5}, r"decode.top_p=1.5: must be at most 1"),
        ({"live_share": 0.0}, r"decode.live_share=0.0: must be a positive number"),
        (
            {"mode": "constrained_beam", "leave_out_history": "first"},
            r"decode.leave_out_history='first': must be one of",
        ),
        ({"mode": "score"}, r"decode.candidates is not set"),
        ({"mode": "tower", "with_embeddings": False}, r"mode 'tower' makes nothing else"),
        ({"process_index": 1}, r"decode.process_index=1 of decode.process_count=None: both must be set"),
        ({"seed": -1}, r"decode.seed=-1: must be a whole number"),
    ],
)
def test_bad_settings_are_named(dataset, small_run, tmp_path, settings, message):
    with pytest.raises(CalrecError, match=message):
        decode(tmp_path / "out", dataset, small_run.tokenizer, "stage", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [MemoryError("no 85 GiB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no 85 GiB")],
    ids=["host", "XLA"],
)
def test_memory_that_is_too_small_is_named(dataset, small_run, tmp_path, monkeypatch, error):
    def too_much(*_):
        raise error

    monkeypatch.setattr(Writer, "complete", too_much)
    message = r"does not fit into memory \(.*no 85 GiB\); lower one of decode.batch_users=8, decode.num_samples=3"
    with pytest.raises(CalrecError, match=message):
        decode(tmp_path / "out", dataset, small_run.tokenizer, "stage", **SETTINGS)
    assert not list((tmp_path / "out").glob("part-*"))


def test_what_does_not_belong_together_is_refused(dataset, small_run, stage, tmp_path, monkeypatch):
    for name, message in (("tokenizer", "another tokenizer"), ("template", "another template than dataset 'Tools'")):
        facts = stage[2] | {name: "f" * 64}
        monkeypatch.setattr(run, "load_checkpoint", lambda folder, facts=facts: (stage[0].config, stage[1], facts))
        with pytest.raises(CalrecError, match=message):
            decode(tmp_path / "out", dataset, small_run.tokenizer, "stage")
    (tmp_path / "odd").mkdir()
    artifacts.write_json(tmp_path / "odd" / "request.json", [1])
    with pytest.raises(CalrecError, match="not the request of a decode"):
        shards.claim(tmp_path / "odd", {}, {})


def test_a_prompt_stays_within_the_positions_of_training(catalogue):
    longest = int(catalogue.lengths.max())
    assert run.history_budget({"max_history_tokens": 90}, catalogue) == 90
    assert run.history_budget({"max_history_tokens": 90, "row_tokens": 400}, catalogue) == 90
    assert run.history_budget({"max_history_tokens": 90, "row_tokens": 100}, catalogue) == 100 - longest - 1
