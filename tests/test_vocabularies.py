"""The SeqIO vocabulary: the tokenizer's ids in Python and in TensorFlow."""

import copy
import pickle

import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calrec_jax.data import templates
from calrec_jax.errors import CalrecError
from calrec_jax.vocabularies import CalrecVocabulary

PIECES = ["▁", " ", "\n", "\0", "<unk>", "</s>", "<0x41>", "Title: ", templates.INTRO, templates.NEXT]
ANY_TEXT = st.lists(st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(PIECES)).map("".join)


@pytest.fixture(scope="module")
def vocabulary(small_run):
    return CalrecVocabulary(small_run.tokenizer_folder)


@given(st.lists(ANY_TEXT, min_size=1, max_size=5))
@example(["", "a▁b▁", "▁▁", "▁"])
@settings(deadline=None, max_examples=60)
def test_the_same_ids_everywhere(small_run, vocabulary, texts):
    expected = small_run.tokenizer.encode_many(texts)
    assert [vocabulary.encode(text) for text in texts] == expected
    ragged = vocabulary.encode_tf(tf.constant(texts))
    assert (ragged.dtype, ragged.to_list()) == (tf.int32, expected)
    assert vocabulary.encode_tf(tf.constant(texts[0])).numpy().tolist() == expected[0]
    assert [vocabulary.decode(ids) for ids in expected] == texts
    decoded = [vocabulary.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() for ids in expected]
    assert decoded == texts


def test_encodes_inside_tf_data(small_run, vocabulary):
    texts = [text for dataset in small_run.datasets for text in dataset.texts]
    dataset = tf.data.Dataset.from_tensor_slices(texts).map(vocabulary.encode_tf)
    assert [ids.tolist() for ids in dataset.as_numpy_iterator()] == small_run.tokenizer.encode_many(texts)
    rows = tf.data.Dataset.from_tensors(tf.constant(texts)).map(vocabulary.encode_tf)
    assert next(iter(rows)).to_list() == small_run.tokenizer.encode_many(texts)


def test_special_ids_are_the_tokenizers(small_run, vocabulary):
    tokenizer = small_run.tokenizer
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (tokenizer.pad_id, tokenizer.eos_id, 2)
    assert vocabulary.bos_id is None and vocabulary.extra_ids == 0
    assert vocabulary.vocab_size == tokenizer.vocab_size
    ids = tokenizer.encode("blue rope")
    assert vocabulary.decode([*ids, 1, *ids, 0, 0]) == "blue rope"  # nothing after EOS
    assert vocabulary.decode([0, *ids, 0]) == "blue rope"
    assert vocabulary.decode([2, tokenizer.vocab_size]) == "��" == tokenizer.decode([2, 2])


def test_equality_and_copies(small_run, vocabulary, tmp_path):
    vocabulary.encode_tf(tf.constant("▁"))  # fills what is made on demand
    assert vocabulary == CalrecVocabulary(small_run.tokenizer_folder)
    for other in (copy.deepcopy(vocabulary), pickle.loads(pickle.dumps(vocabulary))):
        assert other == vocabulary
        assert other.encode("a▁b") == vocabulary.encode("a▁b") == other.encode_tf(tf.constant("a▁b")).numpy().tolist()
    moved = tmp_path / "tokenizer"
    moved.mkdir()
    for file in small_run.tokenizer_folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert CalrecVocabulary(moved) == vocabulary, "the same model in another folder"
    assert str(small_run.tokenizer_folder) in str(vocabulary)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(CalrecError, match=f"{tmp_path}.*tokenizer|tokenizer {tmp_path}"):
        CalrecVocabulary(tmp_path)
