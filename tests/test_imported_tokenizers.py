"""Tokenizers of open models: ids of the original library in Python and in tf.data, special ids, bytes, SeqIO."""

import io
import json
import shutil
import subprocess
import sys

import hf_folders
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calrec_jax.data.examples import tokenise_catalogue
from calrec_jax.errors import CalrecError
from calrec_jax.pretrained import tokenizer as imported
from calrec_jax.pretrained.families import from_hf
from calrec_jax.pretrained.tokenizer import adopt_tokenizer
from calrec_jax.tokenizer import Tokenizer

FAMILIES = ("gemma2", "gemma3", "llama3", "qwen3", "smollm2")
# Of each family: what begins a segment, ends an item, and pads.
SPECIAL = {
    "gemma2": ("<bos>", "<eos>", "<pad>"),
    "gemma3": ("<bos>", "<eos>", "<pad>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>"),
    "qwen3": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "smollm2": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each family a Hugging Face folder's tokenizer, and the tokenizer folder made of it."""
    root, made = tmp_path_factory.mktemp("tokenizers"), {}
    for name in FAMILIES:
        (root / name).mkdir()
        hf_folders.write_tokenizer(root / name, name)
        described = from_hf(hf_folders.CONFIGS[name], "config.json")
        imported.from_hf(root / name, described).write(root / f"{name}-ours")
        made[name] = root / name, root / f"{name}-ours"
    return made


def original(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_texts_are_the_librarys_and_special_ids_the_familys(folders, name):
    theirs, ours = original(folders[name][0]), Tokenizer.load(folders[name][1])
    got = ours.encode_many(hf_folders.TITLES)
    assert got == [theirs.encode(text, add_special_tokens=False).ids for text in hf_folders.TITLES]
    assert sum(len({*row}) > 5 for row in got) > 5, "not all one token"
    assert [ours.decode(row) for row in got] == [theirs.decode(row, skip_special_tokens=False) for row in got]
    assert (ours.start_id, ours.eos_id, ours.pad_id) == tuple(theirs.token_to_id(token) for token in SPECIAL[name])
    assert ours.decode([ours.start_id, *got[0], ours.eos_id, ours.pad_id]) == ours.decode(got[0])
    assert ours.vocab_size == hf_folders.VOCAB


@pytest.mark.parametrize("name", ["gemma3", "llama3", "smollm2"])
def test_texts_come_back(folders, name):
    """But for U+2581 under Gemma, which is its sign for a space; Qwen folds to NFC, as its folder says."""
    ours = Tokenizer.load(folders[name][1])

    @given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=30))
    @example("\0\n a  b\t")
    @example("👩‍🔧 鋼 é")
    @settings(deadline=None, max_examples=150)
    def check(text):
        assert ours.decode(ours.encode(text)) == text

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_cannot_bring_control_tokens(folders, name):
    theirs, ours = original(folders[name][0]), Tokenizer.load(folders[name][1])
    for token in SPECIAL[name]:
        text = f"Title: {token} tape"
        assert theirs.token_to_id(token) in theirs.encode(text, add_special_tokens=False).ids
        ids = ours.encode(text)
        assert theirs.token_to_id(token) not in ids
        assert ours.decode(ids) == text


def test_ids_that_no_token_has_and_bytes_that_are_no_text_give_the_replacement(folders):
    ours = Tokenizer.load(folders["llama3"][1])
    a = ours.encode("a")
    assert ours.vocab_size == 512 and original(folders["llama3"][0]).get_vocab_size() == 503
    assert ours.decode([*a, 510, 511, *a]) == "a\ufffd\ufffda"
    first = ours.encode("鋼")[0]
    assert "\ufffd" in ours.decode([first, *a]) or ours.decode([first]) == "鋼"
    with pytest.raises(CalrecError, match="Token id 512 is not in the vocabulary of 512"):
        ours.decode([512])
    with pytest.raises(CalrecError, match="lone surrogate"):
        ours.encode("a\ud800")


def test_a_changed_folder_is_named(folders, tmp_path):
    shutil.copytree(folders["qwen3"][1], tmp_path / "base" / "tokenizer")
    adopt_tokenizer(tmp_path / "tokenizer", tmp_path / "base")
    assert Tokenizer.load(tmp_path / "tokenizer").fingerprint == Tokenizer.load(folders["qwen3"][1]).fingerprint
    adopt_tokenizer(tmp_path / "tokenizer", tmp_path / "base")  # again: it is there
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(CalrecError, match=r"tokenizer\.json was changed after it was written"):
        Tokenizer.load(tmp_path / "tokenizer")
    with pytest.raises(CalrecError, match="there is no tokenizer in or beside it"):
        adopt_tokenizer(tmp_path / "other", tmp_path / "nothing" / "nowhere")


def test_another_tokenizer_is_not_overwritten(folders, tmp_path):
    for name in ("gemma3", "qwen3"):
        shutil.copytree(folders[name][1], tmp_path / name / "tokenizer")
    adopt_tokenizer(tmp_path / "run", tmp_path / "gemma3")
    with pytest.raises(CalrecError, match="holds another tokenizer .* than run.init_from="):
        adopt_tokenizer(tmp_path / "run", tmp_path / "qwen3")


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    """A tokenizer.model with Gemma's special ids and byte fallback."""
    folder, model = tmp_path_factory.mktemp("sp"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(hf_folders.TITLES * 3), model_writer=model, model_type="bpe", vocab_size=420,
        hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2, character_coverage=0.98,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    config = hf_folders.CONFIGS["gemma2"] | {"vocab_size": size + 3}
    imported.from_hf(folder, from_hf(config, "config.json")).write(folder / "ours")
    return folder


def test_a_sentencepiece_model_keeps_its_own_ids(sentencepiece_folder):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    ours = Tokenizer.load(sentencepiece_folder / "ours")
    assert ours.encode_many(hf_folders.TITLES) == [theirs.encode(text) for text in hf_folders.TITLES]
    assert (ours.start_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (2, 1, 0, theirs.vocab_size() + 3)
    for text in hf_folders.TITLES:
        assert ours.decode([2, *ours.encode(text), 1, 0]) == text
    assert ours.decode([*ours.encode("a"), ours.vocab_size - 1]) == "a\ufffd"


@pytest.mark.parametrize("name", [*FAMILIES, "sentencepiece"])
def test_ids_inside_tf_data_are_those_of_python(folders, sentencepiece_folder, name):
    import tensorflow as tf

    from calrec_jax.vocabularies import load_vocabulary

    folder = sentencepiece_folder / "ours" if name == "sentencepiece" else folders[name][1]
    vocabulary, tokenizer = load_vocabulary(folder), Tokenizer.load(folder)
    expected = tokenizer.encode_many(hf_folders.TITLES)
    rows = tf.data.Dataset.from_tensor_slices(hf_folders.TITLES).map(vocabulary.encode_tf).as_numpy_iterator()
    assert [row.tolist() for row in rows] == expected
    batches = tf.data.Dataset.from_tensor_slices(hf_folders.TITLES).batch(4).map(vocabulary.encode_tf)
    assert [row for batch in batches for row in batch.to_list()] == expected
    assert [vocabulary.encode(text) for text in hf_folders.TITLES] == expected
    longest = max(map(len, expected)) + 2
    padded = np.full((len(expected), longest), vocabulary.pad_id, np.int32)
    for i, row in enumerate(expected):
        padded[i, : len(row) + 1] = [*row, vocabulary.eos_id]
    texts = [tokenizer.decode(row) for row in expected]
    assert [text.numpy().decode() for text in vocabulary.decode_tf(tf.constant(padded))] == texts
    assert [vocabulary.decode(row) for row in padded.tolist()] == texts
    assert (vocabulary.bos_id, vocabulary.eos_id) == (tokenizer.start_id, tokenizer.eos_id)
    assert vocabulary.vocab_size == tokenizer.vocab_size
    assert vocabulary == load_vocabulary(folder) and hash(vocabulary) == hash(load_vocabulary(folder))


def test_a_task_with_an_imported_tokenizer_has_the_examples_of_the_trainer(small_run, folders, registries):
    """Rows of the SeqIO converter under Gemma's BOS and EOS are those that `packing` fills, bit for bit."""
    import seqio

    from calrec_jax import tasks
    from calrec_jax.data.examples import build_examples
    from calrec_jax.data.packing import Packing, fill_rows
    from calrec_jax.features import CalrecFeatureConverter

    folder = folders["gemma3"][1]
    tokenizer = Tokenizer.load(folder)
    dataset = small_run.datasets[0]
    name = tasks.register_dataset(small_run.folders[0], folder, max_target_tokens=64)
    converter = CalrecFeatureConverter(pack=False, start_id=tokenizer.start_id, eos_id=tokenizer.eos_id)
    rows = seqio.get_dataset(
        name, {"inputs": 400, "targets": 64}, converter, "test", shuffle=False, verbose=False
    ).as_numpy_iterator()  # fmt: skip
    catalogue = tokenise_catalogue([dataset], tokenizer, max_target_tokens=64)
    examples = build_examples([dataset], catalogue, split="test", max_history_tokens=400)
    packing = Packing(row_tokens=528, row_examples=1, batch_rows=1, next_item_loss="last", window=1024)
    expected = fill_rows(examples, [np.array([i]) for i in range(len(examples))], packing)
    got = list(rows)
    assert len(got) == len(examples) > 10
    for key in ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights", "user_pool"):
        np.testing.assert_array_equal(np.stack([row[key] for row in got]), expected[key], err_msg=key)
    assert got[0]["decoder_input_tokens"][0] == tokenizer.start_id == 2


def test_an_export_with_texts_refuses_it(folders):
    from calrec_jax.export.functions import Lengths
    from calrec_jax.export.text_inputs import TextInputs

    folder = folders["llama3"][1]
    with pytest.raises(CalrecError, match=r"text_inputs=True: .* is an imported tokenizer"):
        TextInputs(folder, Lengths(16, 8, 8), 0)


def test_tokenizers_import_no_tensorflow():
    code = "import sys, calrec_jax.pretrained.import_hf, calrec_jax.pretrained.export_hf as e; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"tensorflow", "torch", "transformers", "seqio"} & {*done.stdout.split()}
