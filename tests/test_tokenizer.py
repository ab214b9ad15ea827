"""The tokenizer: round trips, whole pieces, determinism, its folder, and what it refuses."""

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calrec_jax import artifacts
from calrec_jax.data import dataset as dataset_lib
from calrec_jax.data import templates
from calrec_jax.data.dataset import save_dataset
from calrec_jax.data.templates import Template
from calrec_jax.errors import CalrecError
from calrec_jax.tokenizer import MODEL_FILE, Tokenizer, make_tokenizer, template_symbols, train_tokenizer

CATEGORY = " Category: Industrial, Wire & Rope."
LONGER = ' Category: Industrial, Wire & Rope. And more, with "quotes", commas.'
WORDS = ["steel", "wire", "rope", "copper", "hook", "glue", "blue", "red", "large", "pack"]
TEXTS = [f"Title: {a} {b} {i}.{CATEGORY}" for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)]
SYMBOLS = [*template_symbols(Template()), CATEGORY, LONGER]
# Any Unicode text, often with pieces of it that SentencePiece has its own meaning for.
PIECES = ["▁", " ", "\0", "\n", "\ufeff", "<unk>", "</s>", "<0x41>", "\u2585", "\u2047", "Title: ", CATEGORY[:-1]]
ANY_TEXT = st.lists(st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(PIECES + SYMBOLS)).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_tokenizer(TEXTS, vocab_size=360, symbols=SYMBOLS))


@given(ANY_TEXT)
@example("a▁b")
@example("▁▁ ▁")
@example("  two  spaces \t\r\n")
@settings(deadline=None, max_examples=300)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < i < tokenizer.vocab_size for i in ids)


@given(st.lists(ANY_TEXT, max_size=5))
@settings(deadline=None, max_examples=50)
def test_many_is_one_by_one(tokenizer, texts):
    encoded = tokenizer.encode_many(texts)
    assert encoded == [tokenizer.encode(text) for text in texts]
    assert tokenizer.decode_many(encoded) == texts


def test_symbols_are_one_piece_and_nothing_else_breaks(tokenizer):
    for symbol in SYMBOLS:
        assert len(tokenizer.encode(symbol)) == 1, symbol
    short, long = tokenizer.encode(CATEGORY)[0], tokenizer.encode(LONGER)[0]
    assert tokenizer.encode("rope" + CATEGORY)[-1] == short
    assert tokenizer.encode(CATEGORY + "blue")[0] == short  # a symbol that goes on as other text
    assert tokenizer.encode("x" + LONGER)[-1] == long  # the longer of two that fit


def test_training_learns_pieces(tokenizer):
    assert len(tokenizer.encode(TEXTS[7])) < len(TEXTS[7]) / 2


def test_special_ids(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.start_id) == (0, 1, 0)
    ids = tokenizer.encode("steel wire")
    assert tokenizer.decode([0, *ids, 1, 0, 0]) == "steel wire"
    assert tokenizer.decode([2, *ids, 2, 2]) == "\ufffdsteel wire\ufffd\ufffd"
    assert tokenizer.decode([]) == "" and tokenizer.encode("") == [] and tokenizer.encode_many([]) == []


def test_broken_bytes_decode_to_the_replacement_character(tokenizer):
    euro = tokenizer.encode("€")
    assert len(euro) == 3 and tokenizer.decode(euro[:1]) == "\ufffd"


@pytest.mark.parametrize("wrong", [-1, 10_000])
def test_ids_of_another_vocabulary(tokenizer, wrong):
    with pytest.raises(CalrecError, match=f"Token id {wrong} is not in the vocabulary"):
        tokenizer.decode([5, wrong])


def test_lone_surrogates_are_an_error(tokenizer):
    for text in ("\ud800", "a▁\udfff"):
        with pytest.raises(CalrecError, match="lone surrogate"):
            tokenizer.encode(text)


def test_same_input_same_bytes():
    first = train_tokenizer(TEXTS, vocab_size=330, symbols=SYMBOLS)
    assert first == train_tokenizer(iter(TEXTS), vocab_size=330, symbols=SYMBOLS + SYMBOLS[:2])
    assert Tokenizer(first).fingerprint != Tokenizer(train_tokenizer(TEXTS, vocab_size=340)).fingerprint


def test_phrases_only_when_words_are_not_split():
    text = "Title: copper hook 33. copper hook"
    texts = ["copper hook"] * 50 + TEXTS
    words = Tokenizer(train_tokenizer(texts, vocab_size=340))
    phrases = Tokenizer(train_tokenizer(texts, vocab_size=340, split_by_whitespace=False))
    assert len(phrases.encode("copper hook")) == 1 < len(words.encode("copper hook"))
    assert phrases.decode(phrases.encode(text)) == text


def test_a_symbol_with_the_space_mark_is_left_out():
    tokenizer = Tokenizer(train_tokenizer(TEXTS, vocab_size=330, symbols=["a▁b", ""]))
    assert tokenizer.decode(tokenizer.encode("a▁b a b")) == "a▁b a b"


def test_very_long_texts_are_learnt_from():
    long = " ".join(WORDS * 400) + " zirconium"
    assert len(long) > 4192  # where SentencePiece would leave a text out by default
    tokenizer = Tokenizer(train_tokenizer([long], vocab_size=330))
    assert len(tokenizer.encode("steel wire")) < len("steel wire")


def test_training_errors_name_the_setting():
    with pytest.raises(CalrecError, match=r"vocab_size=260 is too small: 9 whole-piece symbols.*vocab\.vocab_size"):
        train_tokenizer(TEXTS, vocab_size=260, symbols=SYMBOLS)
    with pytest.raises(CalrecError, match=r"could not learn 270 pieces.*vocab\.vocab_size"):
        train_tokenizer(TEXTS, vocab_size=270, symbols=SYMBOLS)
    with pytest.raises(CalrecError, match="No text to train"):
        train_tokenizer(["", "  "], vocab_size=400)


def test_not_a_model():
    with pytest.raises(CalrecError, match="Not a SentencePiece model"):
        Tokenizer(b"nothing")


def make_dataset(folder, titles, *, name="toy", template=None, brand=lambda i: "Acme" if i % 2 else "Zed"):
    items = [
        {"item_id": f"i{i}", "title": title, "category": "Wire, Rope", "brand": brand(i), "price": None}
        for i, title in enumerate(titles)
    ]
    sequence = {"user_id": "u", "item_ids": ["i0", "i1", "i2"], "timestamps": [1, 2, 3]}
    return save_dataset(
        folder,
        name=name,
        items=pa.Table.from_pylist(items, dataset_lib.ITEMS_SCHEMA.remove(5)),
        sequences=pa.Table.from_pylist(
            [{**sequence, "valid_position": 1, "test_position": 2}], dataset_lib.SEQUENCES_SCHEMA
        ),
        template=template or Template(),
        card={},
        made_from={},
        settings={},
    )


TITLES = [f"{a} {b}" for a in WORDS for b in WORDS]


def test_make_tokenizer_writes_a_folder_once(tmp_path):
    dataset = make_dataset(tmp_path / "d", TITLES)
    made = make_tokenizer(tmp_path / "t", [dataset], Template(), vocab_size=400)
    loaded = Tokenizer.load(tmp_path / "t")
    assert loaded.fingerprint == made.fingerprint and loaded.vocab_size == made.vocab_size <= 400
    for sentence in (templates.INTRO, templates.NEXT, " Category: Wire, Rope.", " Brand: Acme.", " Price: Unknown."):
        assert len(made.encode(sentence)) == 1, sentence
    manifest = artifacts.read_manifest(tmp_path / "t", kind="tokenizer")
    assert manifest["made_from"] == {"template": Template().fingerprint, "dataset/toy": dataset.hash}
    assert (manifest["fingerprint"], manifest["pieces"]) == (made.fingerprint, made.vocab_size)
    before = (tmp_path / "t" / MODEL_FILE).stat().st_mtime_ns
    assert make_tokenizer(tmp_path / "t", [dataset], Template(), vocab_size=400).fingerprint == made.fingerprint
    assert (tmp_path / "t" / MODEL_FILE).stat().st_mtime_ns == before


def test_a_half_written_folder_is_made_again(tmp_path):
    dataset = make_dataset(tmp_path / "d", TITLES)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / MODEL_FILE).write_bytes(b"half")
    make_tokenizer(tmp_path / "t", [dataset], Template(), vocab_size=400)
    assert Tokenizer.load(tmp_path / "t").encode(TITLES[0])


def test_whole_sentences_need_the_count_and_leave_room(tmp_path):
    dataset = make_dataset(tmp_path / "d", TITLES, brand=lambda i: f"Brand{i // 3}")  # each brand three times
    without = make_tokenizer(tmp_path / "t4", [dataset], Template(), vocab_size=500, whole_sentences_min_count=4)
    withal = make_tokenizer(tmp_path / "t3", [dataset], Template(), vocab_size=500, whole_sentences_min_count=3)
    none = make_tokenizer(tmp_path / "t0", [dataset], Template(), vocab_size=500, whole_sentences_min_count=0)
    assert len(without.encode(" Brand: Brand7.")) > 1 == len(withal.encode(" Brand: Brand7."))
    assert len(none.encode(" Category: Wire, Rope.")) > 1 == len(without.encode(" Category: Wire, Rope."))
    tight = make_tokenizer(tmp_path / "t", [dataset], Template(), vocab_size=334, whole_sentences_min_count=3)
    facts = artifacts.read_manifest(tmp_path / "t", kind="tokenizer")
    assert facts["whole_sentences"] == (334 - 3 - 256 - 7) // 2
    assert facts["whole_sentences"] + facts["whole_sentences_left_out"] == 33 + 2
    assert len(tight.encode(" Category: Wire, Rope.")) == 1  # the most frequent come first


def test_make_tokenizer_refuses_what_does_not_belong(tmp_path):
    dataset = make_dataset(tmp_path / "d", TITLES)
    make_tokenizer(tmp_path / "t", [dataset], Template(), vocab_size=400)
    with pytest.raises(CalrecError, match="setting vocab_size"):
        make_tokenizer(tmp_path / "t", [dataset], Template(), vocab_size=401)
    other = make_dataset(tmp_path / "o", TITLES[:50])
    with pytest.raises(CalrecError, match="made from another dataset/toy"):
        make_tokenizer(tmp_path / "t", [other], Template(), vocab_size=400)
    with pytest.raises(CalrecError, match="'toy' was made with another template"):
        make_tokenizer(tmp_path / "t2", [dataset], Template(("title",)), vocab_size=400)
    with pytest.raises(CalrecError, match="at least one dataset"):
        make_tokenizer(tmp_path / "t2", [], Template())
    with pytest.raises(CalrecError, match="two datasets are named 'toy'"):
        make_tokenizer(tmp_path / "t2", [dataset, other], Template())
    with pytest.raises(CalrecError, match=r"whole_sentences_min_count=-1"):
        make_tokenizer(tmp_path / "t2", [dataset], Template(), whole_sentences_min_count=-1)


def test_a_changed_or_missing_model_is_noticed(tmp_path):
    with pytest.raises(CalrecError, match="does not exist"):
        Tokenizer.load(tmp_path / "t")
    make_tokenizer(tmp_path / "t", [make_dataset(tmp_path / "d", TITLES)], Template(), vocab_size=400)
    (tmp_path / "t" / MODEL_FILE).write_bytes(train_tokenizer(TEXTS, vocab_size=330))
    with pytest.raises(CalrecError, match="is not the model its manifest names"):
        Tokenizer.load(tmp_path / "t")
    (tmp_path / "t" / MODEL_FILE).unlink()
    with pytest.raises(CalrecError, match=r"sentencepiece\.model cannot be read"):
        Tokenizer.load(tmp_path / "t")
