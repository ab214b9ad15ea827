"""`eval_tasks`: seqio.Evaluator gives the numbers of `calrec evaluate`, for the same checkpoint, seed and settings."""

import gin
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import seqio
from decoding_reference import tiny_model, write_stage

from calrec_jax import artifacts, tasks
from calrec_jax.decode.run import decode
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.metrics import metric_names
from calrec_jax.evaluate.run import evaluate
from calrec_jax.features import CalrecFeatureConverter
from calrec_jax.integrations.seqio_eval import eval_tasks
from calrec_jax.rank.run import rank
from calrec_jax.tasks.metrics import RankingMetrics, Target

MAX_TARGET = 24
BINDINGS = [
    "sample/decode.num_samples = 3",
    "sample/decode.seed = 7",
    "sample/decode.batch_users = 8",
    "sample/decode.shard_users = 16",
    "other/decode.num_samples = 3",
    "other/decode.seed = 8",
    "other/decode.batch_users = 8",
    "other/decode.shard_users = 16",
    "beam/decode.batch_users = 8",
    "beam/decode.mode = 'constrained_beam'",
    "beam/decode.num_beams = 4",
    "beam/decode.with_embeddings = False",
    "plain/rank.epsilon = 0.01",
    "items/rank.source = 'constrained'",
    "items/rank.fill = 'transitions'",
    "items/rank.leave_out_history = 'last'",
]


@pytest.fixture(scope="module", autouse=True)
def bindings(registries):
    gin.clear_config()
    gin.parse_config(BINDINGS)
    yield
    gin.clear_config()


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Each program is compiled once for all tests, which decode the same users again and again."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def checkpoint(small_run, tmp_path_factory):
    """A stage with random parameters."""
    model, params = tiny_model(small_run.tokenizer.vocab_size)
    return write_stage(tmp_path_factory.mktemp("stage"), small_run, model, params, max_target_tokens=MAX_TARGET)


@pytest.fixture(scope="module")
def arguments(small_run, checkpoint):
    return {"datasets": small_run.folders, "tokenizer": small_run.tokenizer_folder, "checkpoint": checkpoint}


def by_the_line(small_run, checkpoint, out, split, decode_scope, rank_scope):
    """The row of `calrec evaluate` after the verbs `decode` and `rank`; and the completions' folder."""
    dataset = small_run.datasets[0]
    with gin.config_scope(decode_scope):
        decode(out / "completions", dataset, small_run.tokenizer, checkpoint, split=split)
    with gin.config_scope(rank_scope):
        rank(out / "ranking", dataset, out / "completions", split=split)
    report = evaluate(out / "report", dataset, {"calrec": out / "ranking"}, split=split, resamples=10)
    return next(row["metrics"] for row in report["rows"] if row["name"] == "calrec"), out / "completions"


def read_completions(folder):
    rows = [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row.pop("user_id"): row for row in rows}


def test_equal_to_calrec_evaluate(small_run, checkpoint, arguments, tmp_path, capsys):
    """Samples, both tasks of a mixture, and a second run."""
    scopes = {"decode_scope": "sample", "rank_scope": "plain"}
    found = eval_tasks(tmp_path / "eval", **arguments, **scopes, task="calrec_mixture")
    expected, completions = by_the_line(small_run, checkpoint, tmp_path, "test", **scopes)
    assert list(found["tasks"]) == ["calrec_Office", "calrec_Tools"]
    assert [result["users"] for result in found["tasks"].values()] == [17, 23]
    assert (found["task"], found["split"]) == ("calrec_mixture", "test")
    result = found["tasks"]["calrec_Tools"]
    assert result["metrics"] == expected and result["dataset"] == "Tools"
    assert 0 < expected["mrr"] < 1 and expected["recall@1"] < expected["recall@10"]
    mine = tmp_path / "eval" / "completions" / "test-calrec_Tools"
    assert read_completions(mine) == read_completions(completions), "the same texts, scores and embeddings"
    assert result["made_from"]["completions"] == artifacts.read_manifest(mine, kind="completions")["hash"]
    printed = capsys.readouterr().out
    assert "calrec_Tools" in printed and f"{expected['ndcg@10']:.4f}" in printed
    assert found == artifacts.read_json(tmp_path / "eval" / "metrics.json")
    assert eval_tasks(tmp_path / "eval", **arguments, **scopes, task="calrec_mixture") == found
    assert capsys.readouterr().out.count("is done already, skipped") == 2
    with pytest.raises(CalrecError, match="seed"):  # other completions lie there
        eval_tasks(tmp_path / "eval", **arguments, decode_scope="other", rank_scope="plain")


def test_equal_where_decoding_is_constrained(small_run, checkpoint, arguments, tmp_path):
    scopes = {"decode_scope": "beam", "rank_scope": "items"}
    found = eval_tasks(tmp_path / "eval", **arguments, split="validation", **scopes)
    expected, _ = by_the_line(small_run, checkpoint, tmp_path, "validation", **scopes)
    assert found["task"] == "calrec_Tools" and list(found["tasks"]) == ["calrec_Tools"]
    assert found["tasks"]["calrec_Tools"]["metrics"] == expected


def test_the_first_users_alone(small_run, arguments, tmp_path):
    found = eval_tasks(tmp_path, **arguments, decode_scope="sample", num_examples=5)
    assert found["tasks"]["calrec_Tools"]["users"] == 5
    decoded = read_completions(tmp_path / "completions" / "test-calrec_Tools")
    assert sorted(decoded) == list(small_run.datasets[0].user_ids[:5])


def test_mistakes_are_named(small_run, arguments, tmp_path):
    with pytest.raises(CalrecError, match="split='train': must be one of"):
        eval_tasks(tmp_path, **arguments, split="train")
    with pytest.raises(CalrecError, match="task='calrec_Nothing' is not registered; there are calrec_"):
        eval_tasks(tmp_path, **arguments, task="calrec_Nothing")
    with pytest.raises(CalrecError, match="no trained stage there"):
        eval_tasks(tmp_path, **arguments | {"checkpoint": tmp_path})
    with gin.config_scope("broken"):
        gin.bind_parameter("broken/rank.epsilon", -1.0)
    with pytest.raises(CalrecError, match="epsilon is -1"):  # raised inside seqio.Evaluator
        eval_tasks(tmp_path, **arguments, decode_scope="sample", rank_scope="broken", num_examples=3)


def test_other_peoples_predictions_are_ranked(small_run, arguments):
    """The metric takes plain texts, so any `predict_fn` can be evaluated; perfect ones get a perfect score."""
    name = tasks.register_dataset(small_run.folders[1], small_run.tokenizer_folder, max_target_tokens=MAX_TARGET)
    dataset = small_run.datasets[1]
    evaluator = seqio.Evaluator(
        name, CalrecFeatureConverter(pack=False), eval_split="test", async_compute_metrics=False
    )
    vocabulary = seqio.get_mixture_or_task(name).output_features["targets"].vocabulary

    def first_and_target(ds):
        """Tokens [N, T] a user, as decoders of other frameworks give them."""
        found = []
        for index, row in ds.as_numpy_iterator():
            target = row["decoder_target_tokens"][row["decoder_loss_weights"] > 0]
            found.append((index, np.stack([np.pad(target, (0, MAX_TARGET - len(target)))] * 2)))
        return found[::-1]

    future, _ = evaluator.evaluate(compute_metrics=True, predict_fn=first_and_target)
    metrics = future.result()[name]
    assert list(metrics) == metric_names()
    targets = [dataset.texts[dataset.target(user, "test")] for user in range(17)]
    twins = np.array([dataset.texts.count(text) for text in targets])
    cut = np.array([len(vocabulary.encode(text)) >= MAX_TARGET for text in targets])
    assert metrics["recall@1"] == pytest.approx(np.mean(twins == 1)), "only equal texts tie"
    assert cut.any() and metrics["recall@5"] == 1.0


def test_texts_without_scores_and_misses(small_run, arguments):
    name = tasks.register_dataset(small_run.folders[0], small_run.tokenizer_folder, max_target_tokens=MAX_TARGET)
    dataset = small_run.datasets[0]
    metric = RankingMetrics(tasks.task_source(name))
    targets = [Target(user, dataset.target(user, "test"), "test") for user in (4, 2, 9)]
    texts = [dataset.texts[target.item] for target in targets]
    whole = metric(targets, texts)
    assert metric(targets, [[text] for text in texts]) == whole
    assert metric(targets, [texts[0], texts[1], {"texts": []}])["mrr"] < whole["mrr"]
    with pytest.raises(CalrecError, match="none of the 3 predictions has a text"):
        metric(targets, [[], [], []])
    with pytest.raises(CalrecError, match="not a text, a list of texts or a row"):
        metric(targets, [[1, 2], "x", "y"])
    with pytest.raises(CalrecError, match="of the splits"):
        metric([*targets[:2], Target(9, targets[2].item, "validation")], texts)
    with pytest.raises(CalrecError, match="1 targets are not the test purchases"):
        metric([*targets[:2], Target(9, targets[2].item + 1, "test")], texts)
