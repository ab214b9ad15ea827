"""SeqIO tasks and mixtures: examples equal to those of the trainer, and what users of SeqIO do with them."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import seqio
import tensorflow as tf

from calrec_jax import tasks
from calrec_jax.data.dataset import SEQUENCES_SCHEMA, save_dataset
from calrec_jax.data.examples import build_examples, tokenise_catalogue
from calrec_jax.data.templates import ATTRIBUTES, Template
from calrec_jax.errors import CalrecError

MAX_TARGET = 24
LENGTHS = {"inputs": 90, "targets": MAX_TARGET}


@pytest.fixture(scope="module")
def names(small_run, registries):
    return [
        tasks.register_dataset(folder, small_run.tokenizer_folder, max_target_tokens=MAX_TARGET)
        for folder in small_run.folders
    ]


def catalogue_of(small_run):
    return tokenise_catalogue(small_run.datasets, small_run.tokenizer, max_target_tokens=MAX_TARGET)


def read(name, split, **kwargs):
    kwargs = {"sequence_length": LENGTHS, "shuffle": False, **kwargs}
    return list(seqio.get_mixture_or_task(name).get_dataset(split=split, **kwargs).as_numpy_iterator())


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_examples_are_the_trainers(small_run, names, split):
    catalogue = catalogue_of(small_run)
    expected = build_examples(small_run.datasets, catalogue, split=split, max_history_tokens=LENGTHS["inputs"])
    assert catalogue.cut and expected.dropped_items, "the fixture must cut items and histories"
    found = [example for name in names for example in read(name, split)]
    assert len(found) == len(expected)
    for e, example in enumerate(found):
        items = expected.items[expected.start[e] : expected.end[e]]
        segments = [catalogue.intro, catalogue.first]
        for item in items[:-1]:
            segments += [catalogue.item(item), catalogue.next]
        assert example["inputs"].tolist() == np.concatenate(segments).tolist(), f"{split}, example {e}"
        assert example["segment_lengths"].tolist() == [len(segment) for segment in segments]
        assert example["targets"].tolist() == [*catalogue.item(items[-1]).tolist(), catalogue.eos_id]
        assert example["items"].tolist() == items.tolist()
        assert example["target_user"] == expected.user[e]
        assert example["target_text"] == catalogue.text_ids[items[-1]]


def test_texts_ride_along(small_run, names):
    dataset = small_run.datasets[1]
    history = [dataset.texts[item] for item in dataset.history(4, "test")]
    example = read(names[1], "test", sequence_length=None)[4]
    assert example["inputs_pretokenized"].decode() == Template().prompt(history)
    assert example["targets_pretokenized"].decode() == dataset.texts[dataset.target(4, "test")]
    assert example["user_id"].decode() == dataset.user_ids[4]
    assert len(example["items"]) == len(history) + 1, "nothing is trimmed without a length"


def test_a_task_is_what_seqio_expects(small_run, names):
    task = seqio.get_mixture_or_task(names[0])
    assert names == ["calrec_Tools", "calrec_Office"]
    assert task.splits == ("train", "validation", "test") and list(task.output_features) == ["inputs", "targets"]
    assert task.output_features["targets"].vocabulary.vocab_size == small_run.tokenizer.vocab_size
    assert task.num_input_examples("test") == len(small_run.datasets[0].user_ids) == len(read(names[0], "test"))
    assert task.num_input_examples("train") == len(read(names[0], "train"))
    converted = seqio.get_dataset(names[0], LENGTHS, seqio.PrefixLMFeatureConverter(pack=True), "train", verbose=False)
    assert next(iter(converted))["decoder_input_tokens"].shape == [LENGTHS["inputs"] + LENGTHS["targets"]]


def test_order_shuffling_and_shards(names):
    assert [example["target_user"] for example in read(names[0], "test")] == list(range(23))
    source = tasks.task_source(names[0])

    def users(shuffle=False, **kwargs):
        return [int(example["target_user"]) for example in source.get_dataset("test", shuffle, **kwargs)]

    shuffled = users(shuffle=True, seed=3)
    assert sorted(shuffled) == users() == list(range(23)) != shuffled
    assert shuffled == users(shuffle=True, seed=3) != users(shuffle=True, seed=4)
    parts = [users(shard_info=seqio.ShardInfo(index, 3)) for index in range(3)]
    assert sorted(user for part in parts for user in part) == users()
    assert sorted(map(len, parts)) == [7, 8, 8]


def test_mixture_rates_and_numbers(small_run, names):
    assert tasks.register_mixture("calrec_both", names, exponent=0.3) == "calrec_both"
    mixture = seqio.get_mixture_or_task("calrec_both")
    rates = [mixture.get_rate(seqio.TaskRegistry.get(name)) for name in names]
    np.testing.assert_allclose(rates, [23**0.3, 17**0.3], rtol=1e-12)
    ds = mixture.get_dataset(LENGTHS, split="train", shuffle=True, seed=0).take(600)
    found = list(ds.as_numpy_iterator())
    first = np.mean([example["target_user"] < 23 for example in found])
    assert abs(first - 23**0.3 / (23**0.3 + 17**0.3)) < 0.06, "seed 0"
    assert {"segment_lengths", "items", "target_user", "target_text"} <= set(found[0])
    texts = {}
    for example in found:  # equal numbers mean equal texts, over both datasets
        tokens = tuple(example["targets"])
        assert texts.setdefault(int(example["target_text"]), tokens) == tokens
    assert len(set(texts.values())) == len(texts)


def test_the_tasks_can_be_cached(names, tmp_path):
    """What `seqio_cache_tasks` does, without Beam: the steps before the placeholder, written and read back."""
    task = seqio.TaskRegistry.get(names[0])
    folder = tmp_path / names[0]
    folder.mkdir()
    ds = task.preprocess_precache(task.source.get_dataset("train", shuffle=False))
    written = list(ds.as_numpy_iterator())
    assert max(len(example["inputs"]) for example in written) > LENGTHS["inputs"], "trimming comes after the cache"
    shards = task.source.list_shards("train")
    size = sum(
        len(list(task.source.get_dataset("train", shuffle=False, shard_info=seqio.ShardInfo(i, len(shards)))))
        for i in range(len(shards))
    )
    assert size == len(written)
    with tf.io.TFRecordWriter(str(folder / "train.tfrecord-00000-of-00001")) as writer:
        for example in written:
            writer.write(seqio.utils.dict_to_tfexample(example).SerializeToString())
    features = {
        name: {"shape": spec.shape.as_list(), "dtype": spec.dtype.name} for name, spec in ds.element_spec.items()
    }
    info = {"num_shards": 1, "features": features, "seqio_version": seqio.__version__}
    (folder / "info.train.json").write_text(json.dumps(info))
    (folder / "stats.train.json").write_text(json.dumps({"examples": len(written)}))
    (folder / "COMPLETED").write_text("")
    seqio.set_global_cache_dirs([str(tmp_path)])
    try:
        cached = read(names[0], "train", use_cached=True)
    finally:
        seqio.set_global_cache_dirs([])
    for one, other in zip(read(names[0], "train"), cached, strict=True):
        assert set(one) == set(other)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
            assert np.asarray(one[key]).dtype == np.asarray(other[key]).dtype, key


def test_registering_again(small_run, names):
    again = tasks.register_dataset(small_run.folders[0], small_run.tokenizer_folder, max_target_tokens=MAX_TARGET)
    assert again == names[0]
    assert read(again, "test")[0]["target_user"] == 0 and read(names[1], "test")[0]["target_user"] == 23
    with pytest.raises(CalrecError, match="another task is registered as calrec_Tools"):
        tasks.register_dataset(small_run.folders[0], small_run.tokenizer_folder, max_target_tokens=20)
    with pytest.raises(CalrecError, match="another task is registered as calrec_Tools"):
        tasks.register_dataset(small_run.folders[1], small_run.tokenizer_folder, name="Tools")
    other = tasks.register_dataset(
        small_run.folders[0], small_run.tokenizer_folder, name="a b/c", max_target_tokens=MAX_TARGET
    )
    assert other == "calrec_a_b_c" and read(other, "test")[0]["target_user"] == 0, "the same dataset, the same numbers"


def test_mistakes_are_named(small_run, names, tmp_path):
    with pytest.raises(CalrecError, match="dataset .* does not exist"):
        tasks.register_dataset(tmp_path / "none", small_run.tokenizer_folder)
    with pytest.raises(CalrecError, match="max_target_tokens=1"):
        tasks.register_dataset(small_run.folders[0], small_run.tokenizer_folder, max_target_tokens=1)
    with pytest.raises(CalrecError, match=r"sequence_length\['targets'\]=20: .* up to 24"):
        read(names[0], "test", sequence_length={"inputs": 90, "targets": 20})
    with pytest.raises(tf.errors.InvalidArgumentError, match="inputs.*=9: the prompt.*newest item need"):
        read(names[0], "test", sequence_length={"inputs": 9, "targets": MAX_TARGET})
    with pytest.raises(CalrecError, match="split='dev': Tools has train, validation, test"):
        tasks.task_source(names[0]).users("dev")
    with pytest.raises(CalrecError, match="no task 'calrec_nobody' is registered"):
        tasks.register_mixture("m", ["calrec_nobody"])
    with pytest.raises(CalrecError, match="no task given"):
        tasks.register_mixture("m", [])
    with pytest.raises(CalrecError, match="calrec_Tools is registered already"):
        tasks.register_mixture("calrec_Tools", names)
    other_template = tmp_path / "titles"
    save_dataset(
        other_template,
        name="Titles",
        items=pa.table({name: ["a"] for name in ("item_id", *ATTRIBUTES)}),
        sequences=pa.Table.from_pylist([], SEQUENCES_SCHEMA),
        template=Template(attributes=("title",)),
        card={},
        made_from={},
        settings={},
    )
    with pytest.raises(CalrecError, match="titles was made with another template than .*tokenizer"):
        tasks.register_dataset(other_template, small_run.tokenizer_folder)
    shorter = tasks.register_dataset(small_run.folders[1], small_run.tokenizer_folder, name="s", max_target_tokens=20)
    with pytest.raises(CalrecError, match="different tokenizers or max_target_tokens"):
        tasks.register_mixture("m", [names[0], shorter])


def test_every_dataset_of_a_run_is_registered(small_run, registries, tmp_path, monkeypatch):
    """Three tasks a dataset and the mixture of stage I, by a function and by a module's import."""
    kept = dict(seqio.TaskRegistry._REGISTRY), dict(seqio.MixtureRegistry._REGISTRY)
    for known in (seqio.TaskRegistry._REGISTRY, seqio.MixtureRegistry._REGISTRY):
        known.clear()
    try:
        with pytest.raises(CalrecError, match="has no datasets; run `calrec prepare`"):
            tasks.register_run(tmp_path)
        (tmp_path / "datasets").mkdir()
        for folder in small_run.folders:
            (tmp_path / "datasets" / folder.name).symlink_to(folder)
        (tmp_path / "tokenizer").symlink_to(small_run.tokenizer_folder)
        (tmp_path / "stage1").mkdir()
        (tmp_path / "stage1" / "model.json").write_text(json.dumps({"max_target_tokens": MAX_TARGET}))
        monkeypatch.setenv("CALREC_RUN_DIR", str(tmp_path))
        module = importlib.import_module("calrec_jax.tasks.run_folder")
        importlib.reload(module)
        assert module.NAMES == ["calrec_Office", "calrec_Tools"] == tasks.register_run(tmp_path)
        train, evaluation = (seqio.TaskRegistry.get(f"calrec_Tools_{kind}") for kind in ("train", "eval"))
        assert train.splits == ("train", "validation") and evaluation.splits == ("validation", "test")
        assert not train.metric_fns and len(evaluation.metric_fns) == 1
        whole = read("calrec_Tools", "validation")
        for name in ("calrec_Tools_train", "calrec_Tools_eval"):
            for one, other in zip(whole, read(name, "validation"), strict=True):
                np.testing.assert_equal(one, other)
        assert max(len(example["targets"]) for example in whole) == MAX_TARGET, "the stage's limit"
        mixture = seqio.MixtureRegistry.get("calrec_stage1")
        assert sorted(task.name for task in mixture.tasks) == ["calrec_Office_train", "calrec_Tools_train"]
        np.testing.assert_allclose(mixture.get_rate(train), 23**0.3)
        (tmp_path / "stage2").mkdir()
        (tmp_path / "stage2" / "model.json").write_text(json.dumps({"max_target_tokens": 20}))
        with pytest.raises(CalrecError, match=r"its stages have max_target_tokens \[20, 24\]"):
            tasks.register_run(tmp_path)
        monkeypatch.delenv("CALREC_RUN_DIR")
        with pytest.raises(CalrecError, match="CALREC_RUN_DIR is not set"):
            importlib.reload(module)
    finally:
        for known, before in zip((seqio.TaskRegistry._REGISTRY, seqio.MixtureRegistry._REGISTRY), kept, strict=True):
            known.clear()
            known.update(before)


def test_seqio_cache_tasks_with_beam(small_run, names, tmp_path):
    """SeqIO's own command in a process of its own, then the task read from what it wrote."""
    pytest.importorskip("apache_beam", reason="the extra [beam] is not installed")
    run = tmp_path / "run"
    (run / "datasets").mkdir(parents=True)
    (run / "datasets" / "Tools").symlink_to(small_run.folders[0])
    (run / "tokenizer").symlink_to(small_run.tokenizer_folder)
    (run / "stage1").mkdir()
    (run / "stage1" / "model.json").write_text(json.dumps({"max_target_tokens": MAX_TARGET}))
    command = [
        sys.executable, "-m", "seqio.scripts.cache_tasks_main", "--module_import=calrec_jax.tasks.run_folder",
        "--tasks=calrec_Tools_eval", f"--output_cache_dir={tmp_path / 'cache'}", "--min_shards=2",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"CALREC_RUN_DIR": str(run)}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seqio.set_global_cache_dirs([str(tmp_path / "cache")])
    try:
        cached = read(f"{names[0]}_eval", "test", use_cached=True)
    finally:
        seqio.set_global_cache_dirs([])
    fresh = {int(example["target_user"]): example for example in read(f"{names[0]}_eval", "test")}
    assert len(cached) == len(fresh), "Beam shuffles, and loses nothing"
    for example in cached:
        np.testing.assert_equal(example, fresh[int(example["target_user"])])
