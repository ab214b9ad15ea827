"""The feature converter: its rows are the trainer's, bit for bit, for the same examples in the same window."""

import dataclasses

import numpy as np
import pytest
import seqio
import tensorflow as tf

from calrec_jax import tasks
from calrec_jax.data.examples import build_examples, tokenise_catalogue
from calrec_jax.data.packing import PackedStream, Packing, fill_rows
from calrec_jax.errors import CalrecError
from calrec_jax.features import KEYS, CalrecFeatureConverter, Ragged, Window

MAX_TARGET = 24
LENGTHS = {"inputs": 90, "targets": MAX_TARGET}
ROW_TOKENS = LENGTHS["inputs"] + 2 * MAX_TARGET


@pytest.fixture(scope="module")
def names(small_run, registries):
    return [
        tasks.register_dataset(folder, small_run.tokenizer_folder, max_target_tokens=MAX_TARGET)
        for folder in small_run.folders
    ]


@pytest.fixture(scope="module")
def by_user(names):
    """The tasks' training examples by the user's number, and what they are to tf.data."""
    found = {}
    for name in names:
        ds = seqio.get_mixture_or_task(name).get_dataset(LENGTHS, split="train", shuffle=False)
        found |= {int(example["target_user"]): example for example in ds.as_numpy_iterator()}
    return found, ds.element_spec


def trainers(small_run, packing, *, forced_token_weight=1.0, row_tokens=None, seed=5):
    catalogue = tokenise_catalogue(
        small_run.datasets,
        small_run.tokenizer,
        max_target_tokens=MAX_TARGET,
        forced_token_weight=forced_token_weight,
    )
    examples = build_examples(
        small_run.datasets, catalogue, split="train", max_history_tokens=LENGTHS["inputs"], row_tokens=row_tokens
    )
    return PackedStream(examples, packing, seed=seed, mixture_exponent=0.3)


def assert_equal_rows(found, expected, what):
    rows = {key: np.stack([row[key] for row in found]) for key in KEYS}
    assert set(rows) == set(expected)
    for key in KEYS:
        assert rows[key].dtype == expected[key].dtype, key
        np.testing.assert_array_equal(rows[key], expected[key], err_msg=f"{what}: {key}")


@pytest.mark.parametrize(
    "next_item_loss, weight, row_tokens",
    [("last", 1.0, None), ("all", 1.0, None), ("all", 0.125, None), ("all", 0.125, 100)],
)
def test_rows_are_the_trainers(small_run, names, by_user, next_item_loss, weight, row_tokens):
    space = tasks.task_source(names[0]).space
    packing = Packing(row_tokens or ROW_TOKENS, 4, 1, next_item_loss=next_item_loss, window=16)
    stream = trainers(small_run, packing, forced_token_weight=weight, row_tokens=row_tokens)
    windows = [stream.window_examples(window) for window in range(3)]
    converter = CalrecFeatureConverter(
        row_tokens=row_tokens,
        row_examples=4,
        next_item_loss=next_item_loss,
        window=16,
        seed=stream.seed,
        catalogue=space.catalogue(weight) if weight < 1 else None,
    )
    users = stream.examples.user[np.concatenate(windows)].tolist()
    examples, spec = by_user
    ds = tf.data.Dataset.from_generator(lambda: (examples[user] for user in users), output_signature=spec)
    found = list(converter(ds, LENGTHS).as_numpy_iterator())
    expected = fill_rows(stream.examples, stream.rows(0, len(found)), packing)
    assert_equal_rows(found, expected, f"seed {stream.seed}")
    assert expected["decoder_loss_weights"].min() == 0 and len(np.unique(expected["decoder_loss_weights"])) == (
        2 if weight == 1 else 3
    )
    assert sum(row["example_mask"].sum() for row in found) == len(users), "each example is in one row"


@pytest.mark.parametrize("split", ["train", "test"])
def test_unpacked_is_one_example_a_row(small_run, names, split):
    catalogue = tokenise_catalogue(small_run.datasets, small_run.tokenizer, max_target_tokens=MAX_TARGET)
    examples = build_examples(small_run.datasets, catalogue, split=split, max_history_tokens=LENGTHS["inputs"])
    first = np.flatnonzero(examples.group == 0)
    expected = fill_rows(examples, [np.array([e]) for e in first], Packing(ROW_TOKENS, 1, 1))
    converter = CalrecFeatureConverter(pack=False, window=7)
    found = seqio.get_dataset(names[0], LENGTHS, converter, split, verbose=False)
    assert_equal_rows(list(found.as_numpy_iterator()), expected, split)
    prompts = [row["decoder_input_tokens"][row["user_pool"] > 0] for row in found.as_numpy_iterator()]
    plain = seqio.get_mixture_or_task(names[0]).get_dataset(LENGTHS, split=split, shuffle=False)
    for prompt, example in zip(prompts, plain.as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(prompt, example["inputs"])


def test_a_mixture_through_seqio(names):
    tasks.register_mixture("calrec_both", names)
    converter = CalrecFeatureConverter(row_examples=3, window=32)

    def first_batch():
        kwargs = {"shuffle": True, "seed": 1, "num_epochs": None, "batch_size": 4, "verbose": False}
        return next(iter(seqio.get_dataset("calrec_both", LENGTHS, converter, "train", **kwargs)))

    batch = first_batch()
    per_example = ("example_mask", "target_user", "target_item", "target_text")
    for key in KEYS:
        assert batch[key].shape == (4, 3 if key in per_example else ROW_TOKENS), key
    users = batch["target_user"].numpy()[batch["example_mask"].numpy() > 0]
    assert (users < 23).any() and (users >= 23).any()
    for key, value in first_batch().items():
        np.testing.assert_array_equal(batch[key], value, err_msg=key)


def test_lengths_and_settings():
    assert CalrecFeatureConverter().get_model_feature_lengths(LENGTHS)["decoder_positions"] == ROW_TOKENS
    lengths = CalrecFeatureConverter(row_tokens=300, row_examples=5).get_model_feature_lengths(LENGTHS)
    assert (lengths["user_pool"], lengths["target_item"]) == (300, 5)
    assert CalrecFeatureConverter(pack=False, row_examples=5).get_model_feature_lengths(LENGTHS)["example_mask"] == 1
    with pytest.raises(CalrecError, match="next_item_loss='first'"):
        CalrecFeatureConverter(next_item_loss="first")
    with pytest.raises(CalrecError, match="window=0"):
        CalrecFeatureConverter(window=0)
    with pytest.raises(CalrecError, match="row_tokens=0"):
        CalrecFeatureConverter(row_tokens=0)


def test_a_mixture_that_drops_features_is_an_error(names, by_user):
    seqio.MixtureRegistry.add("plain", names, default_rate=1.0)
    with pytest.raises(CalrecError, match="no feature 'segment_lengths'.*register_mixture"):
        seqio.get_dataset("plain", LENGTHS, CalrecFeatureConverter(), "train", verbose=False)
    spec = by_user[1] | {"items": tf.TensorSpec([None], tf.int64)}
    wrong = tf.data.Dataset.from_generator(lambda: iter(()), output_signature=spec)
    with pytest.raises(CalrecError, match="feature 'items' is int64 of rank 1, not int32 of rank 1"):
        CalrecFeatureConverter()(wrong, LENGTHS)


def small_window():
    """Two examples: histories of one and of no items."""
    return Window(
        inputs=Ragged(np.array([10, 11, 20, 21, 12, 10, 11], np.int32), np.array([0, 5, 7])),
        targets=Ragged(np.array([30, 1, 31, 32, 1], np.int32), np.array([0, 2, 5])),
        segment_lengths=Ragged(np.array([1, 1, 2, 1, 1, 1], np.int32), np.array([0, 4, 6])),
        items=Ragged(np.array([5, 6, 7], np.int32), np.array([0, 2, 3])),
        target_user=np.array([3, 4], np.int32),
        target_text=np.array([8, 9], np.int32),
    )


def test_a_window_is_an_example_set_of_its_own_items():
    examples = small_window().examples()
    catalogue = examples.catalogue
    assert [catalogue.item(i).tolist() for i in range(3)] == [[20, 21], [30], [31, 32]]
    assert (catalogue.intro.tolist(), catalogue.first.tolist(), catalogue.next.tolist()) == ([10], [11], [12])
    assert (examples.start.tolist(), examples.end.tolist(), examples.user.tolist()) == ([0, 2], [2, 3], [3, 4])
    assert catalogue.text_ids.tolist() == [0, 8, 9] and catalogue.token_weights.tolist() == [1.0] * 8
    assert examples.joint_lengths.tolist() == [7, 5] and examples.alone_lengths.tolist() == [2, 3]


def test_a_window_that_does_not_hold_together_is_an_error():
    window = small_window()
    cut = dataclasses.replace(window, targets=Ragged(np.array([30, 1, 31, 32, 33], np.int32), window.targets.splits))
    with pytest.raises(CalrecError, match="targets do not end in EOS"):
        cut.examples()
    shorter = dataclasses.replace(window, inputs=Ragged(window.inputs.values[:-1], np.array([0, 5, 6])))
    with pytest.raises(CalrecError, match="trim histories by whole items"):
        shorter.examples()
    other = window.inputs.values.copy()
    other[-1] = 99
    with pytest.raises(CalrecError, match="different templates"):
        dataclasses.replace(window, inputs=Ragged(other, window.inputs.splits)).examples()
    catalogue = dataclasses.replace(window.examples().catalogue, offsets=np.arange(10))
    with pytest.raises(CalrecError, match="the converter's catalogue is not the tasks'"):
        window.examples(catalogue)


def test_unpacked_rows_know_their_number(names):
    """T5X's eval.py asks for it; packed rows cannot know it."""
    ds = seqio.get_mixture_or_task(names[0]).get_dataset(LENGTHS, split="test", shuffle=False)
    rows = CalrecFeatureConverter(pack=False, window=7)(ds, LENGTHS)
    assert len(rows) == 23 == len(list(rows))
    assert int(CalrecFeatureConverter(pack=True)(ds, LENGTHS).cardinality()) == tf.data.UNKNOWN_CARDINALITY
    assert int(CalrecFeatureConverter(pack=False)(ds.repeat(), LENGTHS).cardinality()) < 0
