"""Exports: loaded in a fresh process without this package, they give what our own rooms give."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from decoding_reference import teacher_forced, tiny_model, write_stage

from calrec_jax import artifacts
from calrec_jax.data.examples import tokenise_catalogue
from calrec_jax.decode import shards
from calrec_jax.decode.embeddings import item_embeddings
from calrec_jax.decode.prefix import Batch, Compiled
from calrec_jax.decode.prompts import build_prompts, user_keys
from calrec_jax.decode.run import history_budget
from calrec_jax.decode.sampling import Sampler
from calrec_jax.decode.scoring import Candidates, Scorer, Tower
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.run import evaluate
from calrec_jax.export.card import Origin
from calrec_jax.export.functions import Lengths, make_functions
from calrec_jax.export.run import export
from calrec_jax.models.transformer import Transformer
from calrec_jax.rank.run import rank
from calrec_jax.train.checkpoints import load_checkpoint, read_facts

pytest.importorskip("orbax.export", reason="the extra [export] is not installed")

MAX_TARGET, SAMPLES, NEW_TOKENS = 24, 3, 10
SETTINGS = {"num_samples": SAMPLES, "max_new_tokens": NEW_TOKENS, "temperature": 0.7, "top_k": 50}


@pytest.fixture(scope="module")
def model(small_run):
    return tiny_model(small_run.tokenizer.vocab_size)


@pytest.fixture(scope="module")
def stage(small_run, model, tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("stage"), small_run, *model, max_target_tokens=MAX_TARGET)


@pytest.fixture(scope="module")
def asked(small_run, model, stage):
    """What callers give, and what our own rooms answer."""
    dataset = small_run.datasets[0]
    catalogue = tokenise_catalogue([dataset], small_run.tokenizer, max_target_tokens=MAX_TARGET)
    budget = history_budget(load_checkpoint(stage)[2], catalogue)
    prompts = build_prompts(dataset, catalogue, split="test", max_history_tokens=budget)
    users = np.arange(5)
    lengths, tokens = prompts.lengths[users].astype(np.int32), prompts.tokens(users, budget)
    assert prompts.dropped_items and len(set(lengths)) > 2, "the fixture must trim histories, and not all alike"
    batch = Batch(tokens, lengths, user_keys(dataset.user_ids[users], 3), users)
    items = np.random.default_rng(0).integers(0, len(dataset.texts), (5, 4)).astype(np.int32)
    items[0, 0] = 3  # the long text, which is cut
    counts = catalogue.lengths[items].astype(np.int32)
    texts = np.zeros((*items.shape, MAX_TARGET - 1), np.int32)
    for place, item in np.ndenumerate(items):
        texts[place][: counts[place]] = catalogue.item(item)
    return {
        "catalogue": catalogue,
        "items": items,
        "batch": batch,
        "histories": [[dataset.texts[i] for i in dataset.history(user, "test")] for user in users],
        "inputs": {
            "tokens": tokens,
            "lengths": lengths,
            "keys": batch.keys,
            "candidates": texts,
            "candidate_lengths": counts,
            "item_tokens": texts[:, 0],
            "item_lengths": counts[:, 0],
        },
        "expected": expected(model, batch, catalogue, items),
    }


def expected(model, batch, catalogue, items):
    """By the decoders of the line."""
    offsets = np.arange(len(items) + 1, dtype=np.int64) * items.shape[1]
    scorer = Scorer(
        *model,
        catalogue=catalogue,
        candidates=Candidates(items.reshape(-1), offsets[:-1], offsets[1:]),
        batch_users=5,
    )
    scored = scorer(batch)
    scores = np.zeros(items.shape, np.float32)
    for user, row in enumerate(scored.items):
        for item, score in zip(row, scored.log_probs[user], strict=True):
            scores[user, items[user] == item] = score
    sampler = Sampler(*model, eos_id=1, batch_users=5, **SETTINGS)
    drawn = sampler(batch)
    return {
        "user_embedding": Tower(*model, batch_users=5)(batch).user_embedding,
        "item_embedding": item_embeddings(*model, catalogue, Compiled())[items[:, 0]],
        "candidate_log_probs": scores,
        "completions": drawn.tokens,
        "completion_lengths": drawn.num_tokens,
        "log_probs": drawn.log_probs,
        "finished": drawn.finished,
    }


def assert_as_expected(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        if array.dtype == np.float32:
            np.testing.assert_allclose(found[name], array, atol=1e-4, rtol=0, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def run_alone(script, folder, inputs, tmp_path, banned):
    """Runs a script in a process that cannot import this package; gives the arrays that it saves."""
    np.savez(tmp_path / "inputs.npz", **inputs)
    head = f"""
        import os, sys
        for name in {banned!r}: sys.modules[name] = None  # an import of it fails
        import numpy as np
        given = dict(np.load("inputs.npz", allow_pickle=False))
        folder = {str(folder)!r}
    """
    tail = f"""
        for name in {banned!r}:
            try: __import__(name)
            except ImportError: continue
            raise AssertionError(name + " was imported")
        assert not [name for name in sys.modules if name.split(".")[0] == "calrec_jax" and sys.modules[name]]
        np.savez("outputs.npz", **outputs)
    """
    code = "\n".join(textwrap.dedent(part) for part in (head, script, tail))
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(tmp_path / "outputs.npz", allow_pickle=False))


CALLS = """
    prompts = {k: given[k] for k in ("tokens", "lengths")}
    candidates = {k: given[k] for k in ("candidates", "candidate_lengths")}
    def answers(part):
        user = call("user", **{k: v[part] for k, v in prompts.items()})
        item = call("item", tokens=given["item_tokens"][part], lengths=given["item_lengths"][part])
        score = call("score", **{k: v[part] for k, v in (prompts | candidates).items()})
        sample = call("sample", keys=given["keys"][part], **{k: v[part] for k, v in prompts.items()})
        return user | item | {"candidate_log_probs": score["log_probs"]} | sample
    # Two sizes of a batch, one program.
    parts = [answers(slice(0, 3)), answers(slice(3, 5))]
    outputs = {k: np.concatenate([np.asarray(part[k]) for part in parts]) for k in parts[0]}
"""
JAX_ALONE = (
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import pathlib, jax, safetensors.numpy
    folder = pathlib.Path(folder)
    params = safetensors.numpy.load_file(folder / "params.safetensors")
    programs = {}
    def call(name, **arrays):
        if name not in programs:
            blob = bytearray((folder / f"{name}.jax_export").read_bytes())
            programs[name] = jax.jit(jax.export.deserialize(blob).call)
        return programs[name](params, arrays)
"""
    + CALLS
)
TENSORFLOW_ALONE = (
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf
    signatures = tf.saved_model.load(folder).signatures
    def call(name, **arrays):
        return {k: v.numpy() for k, v in signatures[name](**{k: tf.constant(v) for k, v in arrays.items()}).items()}
"""
    + CALLS
)


def make(out, small_run, stage, format, **settings):
    return export(
        out,
        format,
        Origin([stage], small_run.folders),
        small_run.datasets[0],
        small_run.tokenizer_folder,
        **{**SETTINGS, "platforms": ("cpu",), **settings},
    )


def test_scores_are_those_of_teacher_forcing(model, asked):
    """Against a plain forward pass over one row at a time; an empty text is EOS alone."""
    rng = np.random.default_rng(1)
    prompts, texts = [rng.integers(3, 300, n).tolist() for n in (3, 9, 6)], [[5, 7, 200], [], [9]]
    score = make_functions(
        model[0], Lengths(12, 4, 5), start_id=0, eos_id=1, num_samples=1, temperature=1.0
    )["score"]  # fmt: skip
    tokens, candidates = np.zeros((3, 12), np.int32), np.zeros((3, 3, 4), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        for column, text in enumerate(texts):
            candidates[row, column, : len(text)] = text
    given = {
        "tokens": tokens,
        "lengths": np.array([3, 9, 6], np.int32),
        "candidates": candidates,
        "candidate_lengths": np.broadcast_to(np.array([3, 0, 1], np.int32), (3, 3)),
    }
    found = np.asarray(score.call(model[1], given)["log_probs"])
    wanted = [[teacher_forced(*model, prompt, [*text, 1]) for text in texts] for prompt in prompts]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_an_items_vector_has_the_tokenizers_own_start(model, asked):
    """As imported tokenizers have one other than 0."""
    catalogue = dataclasses.replace(asked["catalogue"], start_id=2)
    item = make_functions(
        model[0], Lengths(4, MAX_TARGET - 1, 4), start_id=2, eos_id=1, num_samples=1, temperature=1.0
    )["item"]  # fmt: skip
    given = {"tokens": asked["inputs"]["item_tokens"], "lengths": asked["inputs"]["item_lengths"]}
    found = item.call(model[1], given)["item_embedding"]
    wanted = item_embeddings(*model, catalogue, Compiled())[asked["items"][:, 0]]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert not np.allclose(found, asked["expected"]["item_embedding"], atol=1e-2), "the start token must matter"


def test_a_model_with_windows_soft_caps_and_a_head_of_its_own(small_run, asked, tmp_path):
    """Open models' settings, with a symbolic batch; exported although it was trained by another attention."""
    sizes = {"attention_pattern": ("local", "global"), "sliding_window": 5, "attention_soft_cap": 4.0,
             "logit_soft_cap": 20.0, "tied_embeddings": False, "attention": "splash"}  # fmt: skip
    made = tiny_model(small_run.tokenizer.vocab_size, **sizes)
    stage = write_stage(tmp_path / "stage", small_run, *made, max_target_tokens=MAX_TARGET)
    assert read_facts(stage)[0].attention == "splash" and load_checkpoint(stage)[0].attention == "auto"
    out = make(tmp_path / "out", small_run, stage, "jax")
    params = safetensors.numpy.load_file(out / "params.safetensors")
    plain = Transformer(dataclasses.replace(made[0].config, attention="xla"), made[0].vocab_size)
    wanted = expected((plain, made[1]), asked["batch"], asked["catalogue"], asked["items"])
    for name, result, ours in (
        ("user", "user_embedding", "user_embedding"),
        ("score", "log_probs", "candidate_log_probs"),
        ("sample", "completions", "completions"),
    ):
        program = jax.export.deserialize(bytearray((out / f"{name}.jax_export").read_bytes()))
        taken = {key: asked["inputs"][key] for key in ("tokens", "lengths")}
        if name == "score":
            taken |= {key: asked["inputs"][key] for key in ("candidates", "candidate_lengths")}
        if name == "sample":
            taken["keys"] = asked["inputs"]["keys"]
        np.testing.assert_allclose(program.call(params, taken)[result], wanted[ours], atol=1e-4, err_msg=name)


def test_samples_whole_and_ended_at_once(model):
    """N texts of one token, and texts that never end: the edges of the loop."""
    tokens, lengths = np.full((2, 4), 7, np.int32), np.array([4, 2], np.int32)
    keys = user_keys(["a", "b"], 0)
    for limit, eos in ((1, 1), (6, -1)):
        functions = make_functions(
            model[0], Lengths(4, 4, limit), start_id=0, eos_id=eos, num_samples=5, temperature=0.5
        )
        found = functions["sample"].call(model[1], {"tokens": tokens, "lengths": lengths, "keys": keys})
        sampler = Sampler(*model, eos_id=eos, num_samples=5, temperature=0.5, max_new_tokens=limit, batch_users=2)
        wanted = sampler(Batch(tokens, lengths, keys, np.arange(2)))
        np.testing.assert_array_equal(found["completions"], wanted.tokens)
        np.testing.assert_array_equal(found["finished"], wanted.finished)
        np.testing.assert_array_equal(found["completion_lengths"], wanted.num_tokens)
        np.testing.assert_allclose(found["log_probs"], wanted.log_probs, atol=1e-4)
        assert limit == 1 or (found["completion_lengths"] == limit).all()


def test_jax_without_this_package(small_run, stage, asked, tmp_path):
    out = make(tmp_path / "out", small_run, stage, "jax", platforms=("cpu", "cuda", "tpu"))
    banned = ["calrec_jax", "flax", "orbax", "tensorflow", "gin"]
    assert_as_expected(run_alone(JAX_ALONE, out, asked["inputs"], tmp_path, banned), asked["expected"])
    manifest = artifacts.read_manifest(out, kind="export")
    artifacts.check_files(out, manifest)
    assert manifest["functions"]["score"]["inputs"]["candidates"] == {"dtype": "int32", "shape": ["B", "N", 23]}
    assert manifest["made_from"]["checkpoint"] == load_checkpoint(stage)[2]["hash"]
    assert (out / "tokenizer" / "sentencepiece.model").read_bytes() == small_run.tokenizer.model


def test_saved_model_without_this_package_and_without_jax(small_run, stage, asked, tmp_path):
    out = make(tmp_path / "out", small_run, stage, "saved_model", platforms=("cpu", "cuda", "tpu"))
    banned = ["calrec_jax", "jax", "flax", "orbax", "seqio", "tensorflow_text"]
    other_lengths = """
    row = given["lengths"].argmin()
    length = given["lengths"][row]
    assert length < given["tokens"].shape[1]
    short = call("user", tokens=given["tokens"][row : row + 1, :length], lengths=[length])["user_embedding"]
    np.testing.assert_allclose(short[0], outputs["user_embedding"][row], atol=1e-6)  # filled up in the graph
    try:
        call("user", tokens=np.zeros((1, 500), np.int32), lengths=np.ones(1, np.int32))
    except tf.errors.InvalidArgumentError as error:
        assert "at most" in str(error) and "places are known" in str(error), error
    else:
        raise AssertionError("a prompt that is too long was taken")
    """
    script = "\n".join(textwrap.dedent(part) for part in (TENSORFLOW_ALONE, other_lengths))
    assert_as_expected(run_alone(script, out, asked["inputs"], tmp_path, banned), asked["expected"])


TEXTS_ALONE = """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf, tensorflow_text
    signatures = tf.saved_model.load(folder).signatures
    def call(name, **arrays):
        answer = signatures[name + "_text"](**{k: tf.constant(v) for k, v in arrays.items()})
        return {k: v.numpy() for k, v in answer.items()}
    histories = [[text for text in row] for row in given["histories"].tolist()]
    user = call("user", histories=histories)
    item = call("item", texts=[row[0] for row in given["texts"].tolist()])
    score = call("score", histories=histories, candidates=given["texts"].tolist())
    sample = call("sample", histories=histories, keys=given["keys"])
    texts = sample.pop("texts")
    outputs = user | item | {"candidate_log_probs": score["log_probs"]} | sample
    outputs["texts"] = texts.astype(bytes)
"""


def test_texts_in_and_out(small_run, stage, asked, tmp_path):
    """Histories as texts give what their token ids give: odd characters, cut items and trimmed histories included."""
    out = make(tmp_path / "out", small_run, stage, "saved_model", text_inputs=True)
    histories = asked["histories"]
    longest = max(map(len, histories))
    dataset = small_run.datasets[0]
    assert any("▁" in text for row in histories for text in row)
    inputs = {
        "histories": np.array([row + [""] * (longest - len(row)) for row in histories]),
        "texts": np.array([[dataset.texts[i] for i in row] for row in asked["items"]]),
        "keys": asked["inputs"]["keys"],
    }
    found = run_alone(TEXTS_ALONE, out, inputs, tmp_path, ["calrec_jax", "jax", "seqio"])
    texts = found.pop("texts")
    assert_as_expected(found, asked["expected"])
    drawn = asked["expected"]
    for user, sample in np.ndindex(texts.shape):
        ids = drawn["completions"][user, sample][: drawn["completion_lengths"][user, sample]]
        assert texts[user, sample].decode(errors="replace") == small_run.tokenizer.decode(ids[ids != 1])


def test_an_export_is_whole_or_not_there(small_run, stage, tmp_path, monkeypatch):
    out = tmp_path / "exports" / "jax"
    with pytest.raises(CalrecError, match="began with another model|trained from scratch"):
        make(out, small_run, stage, "jax", functions=("user",), base_model="x", base_licence="y")
    from calrec_jax.export import jax_format

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax_format.safetensors.numpy, "save_file", fails)
    with pytest.raises(CalrecError, match="no space left"):
        make(out, small_run, stage, "jax", functions=("user",))
    assert not out.exists() and not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob(".tmp-*"))
    out.mkdir(parents=True)
    with pytest.raises(CalrecError, match=f"{re.escape(str(out))} exists already; delete it .* --out"):
        make(out, small_run, stage, "jax")
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"functions": ("user", "rank")}, "export.functions=.*must be some of"),
        ({"functions": ()}, "export.functions"),
        ({"platforms": ("gpu",)}, "export.platforms=.*'cuda'"),
        ({"temperature": 0}, "export.temperature=0: must be above 0"),
        ({"top_p": 1.5}, "export.top_p=1.5: must be above 0 and at most 1"),
        ({"num_samples": 0}, "export.num_samples=0: must be a positive"),
        ({"prompt_tokens": 20}, "export.prompt_tokens=20: a prompt with the longest item takes"),
        ({"prompt_tokens": 2000}, "trained on at most 64"),
        ({"text_inputs": True}, "only --format=saved_model has text inputs"),
    ],
)
def test_settings_that_are_refused(small_run, stage, tmp_path, settings, message):
    with pytest.raises(CalrecError, match=message):
        make(tmp_path / "out", small_run, stage, "jax", **settings)
    assert not (tmp_path / "out").exists()


def test_the_parts_must_belong_together(small_run, stage, tmp_path):
    other = dataclasses.replace(small_run.datasets[0], template="0" * 64)
    with pytest.raises(CalrecError, match="another template"):
        export(tmp_path / "out", "jax", Origin([stage]), other, small_run.tokenizer_folder)
    with pytest.raises(CalrecError, match="--format=onnx: must be one of saved_model, jax, t5x"):
        export(tmp_path / "out", "onnx", Origin([stage]), small_run.datasets[0], small_run.tokenizer_folder)


def completions_of(folder, dataset, checkpoint):
    """A decode of the test split whose every text is the user's target."""
    rows = [
        {"user_id": dataset.user_ids[u], "texts": [dataset.texts[dataset.target(u, "test")]], "log_probs": [-1.0],
         "num_tokens": [5], "finished": [True], "item_ids": None, "user_embedding": None}
        for u in dataset.users_with("test")
    ]  # fmt: skip
    shard = shards.shard_path(folder, 0)
    shards.write_shard(shard, pa.Table.from_pylist(rows, schema=shards.SCHEMA), "")
    artifacts.write_manifest(
        folder,
        kind="completions",
        made_from={"dataset": dataset.hash, "checkpoint": checkpoint, "tokenizer": ""},
        settings={"split": "test"},
        files=artifacts.hash_files([shard]),
    )
    return folder


def test_the_card_tells_of_this_checkpoint_alone(small_run, stage, tmp_path):
    """A ranking of another checkpoint in the same report stays out of it."""
    dataset, digest = small_run.datasets[0], load_checkpoint(stage)[2]["hash"]
    rankings = {}
    for name, checkpoint in (("own", digest), ("other", "1" * 64)):
        completions = completions_of(tmp_path / f"completions-{name}", dataset, checkpoint)
        ranking = rank(tmp_path / f"ranking-{name}", dataset, completions, split="test") or tmp_path / f"ranking-{name}"
        rankings[name] = (pathlib.Path(ranking), completions)
    report = tmp_path / "report"
    evaluate(report, dataset, {name: folders[0] for name, folders in rankings.items()}, split="test", resamples=10)
    origin = Origin([stage], small_run.folders, rankings, report)
    out = export(
        tmp_path / "out", "jax", origin, dataset, small_run.tokenizer_folder, functions=("user",), licence="apache-2.0"
    )
    card = json.loads((out / "model_card.json").read_text())
    assert [row["name"] for row in card["metrics"]["rows"]] == ["own"]
    measured = json.loads((report / "metrics.json").read_text())
    row = next(row for row in measured["rows"] if row["name"] == "own")
    assert card["metrics"]["rows"][0]["metrics"] == row["metrics"]
    assert card["hashes"] == {
        "checkpoint": digest,
        "tokenizer": small_run.tokenizer.fingerprint,
        "template": dataset.template,
        "datasets": [each.hash for each in small_run.datasets],
    }
    assert card["base_model"] is None and card["licence"] == "apache-2.0"
    assert card["parameters"] == sum(x.size for x in _leaves(load_checkpoint(stage)[1]))
    page = (out / "README.md").read_text()
    for part in (
        "license: apache-2.0",
        "there is no base model",
        f"{row['metrics']['ndcg@10']:.4f}",
        digest,
        "popularity",
    ):
        assert part in page, part
    assert [data["hash"] for data in card["data"]] == [each.hash for each in small_run.datasets]


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_a_base_models_licence_goes_along(small_run, model, tmp_path):
    began = write_stage(tmp_path / "stage", small_run, *model, made_from={"checkpoint": "ab" * 32})
    with pytest.raises(CalrecError, match=r"began with another model \(abababab\).*export.base_licence"):
        make(tmp_path / "out", small_run, began, "jax", functions=("item",))
    out = make(
        tmp_path / "out", small_run, began, "jax", functions=("item",), base_model="Tiny 1", base_licence="MIT"
    )  # fmt: skip
    card = json.loads((out / "model_card.json").read_text())
    assert card["base_model"] == {"name": "Tiny 1", "licence": "MIT", "checkpoint": "ab" * 32}
    assert "Its base model is Tiny 1, licence: MIT." in (out / "README.md").read_text()
