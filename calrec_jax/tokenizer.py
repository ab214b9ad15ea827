"""SentencePiece tokenizer: training it from catalogues, and using it. Imports no TensorFlow.

Notable: the template's sentences and field names are single pieces, and so are attribute sentences that many items
share (`` Category: Industrial & Scientific, Abrasives.``): a model then spends its tokens on titles. With byte fallback
and the identity normaliser every string round-trips, ``decode(encode(text)) == text``. SentencePiece itself writes a
space as U+2581 (``▁``), so that character is encoded as its three bytes here and comes back as itself. The one thing
that has no encoding is a lone surrogate, which is no Unicode text; it is an error.
"""

import collections
import hashlib
import io
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin
import sentencepiece

from calrec_jax import artifacts
from calrec_jax.data import templates
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError

MODEL_FILE = "sentencepiece.model"
PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
_SPECIAL_PIECES = 3
_BYTE_PIECES = 256
_SPACE = "▁"  # what SentencePiece writes for a space
_REPLACEMENT = "\ufffd"
_AGAIN = "Delete the folder and run `calrec vocab` again."

_log = logging.getLogger(__name__)


def lone_surrogates(texts: Iterable[str]) -> CalrecError | None:
    """The error that names a text which is no Unicode, if there is one."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            return CalrecError(f"Text {text[:80]!r} has a lone surrogate, which is no Unicode text.")
    return None


class Tokenizer:
    """Text to ids and back. Ids: 0 pad, 1 EOS, 2 unknown; there is no BOS: a segment starts with 0, as in T5.

    Args:
      model: a serialised SentencePiece model.

    Raises:
      CalrecError: if the bytes are not such a model, or its special ids are others.
    """

    def __init__(self, model: bytes):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
        except (RuntimeError, TypeError) as error:
            raise CalrecError(
                f"Not a SentencePiece model: {error}. Make the tokenizer again with `calrec vocab`."
            ) from error
        ids = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        if ids != (PAD_ID, EOS_ID, UNKNOWN_ID):
            raise CalrecError(f"A SentencePiece model with (pad, EOS, unknown) ids {ids}; (0, 1, 2) are needed.")
        space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        if UNKNOWN_ID in space_bytes:
            raise CalrecError("A SentencePiece model without byte pieces; train it with byte_fallback.")
        self._space_ids = space_bytes

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        return PAD_ID

    @property
    def eos_id(self) -> int:
        """Id that ends an item to predict."""
        return EOS_ID

    @property
    def start_id(self) -> int:
        """Input id at the first position of a segment."""
        return PAD_ID

    @property
    def vocab_size(self) -> int:
        """Number of pieces V, special and byte pieces included."""
        return self._processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the model's bytes."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special ids are added.

        Raises:
          CalrecError: if the text has a lone surrogate.
        """
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; no special ids are added.

        Raises:
          CalrecError: if a text has a lone surrogate.
        """
        try:
            encoded = self._processor.encode([text.replace(_SPACE, "") for text in texts])
        except (TypeError, UnicodeEncodeError) as error:  # SentencePiece's versions differ
            raise (lone_surrogates(texts) or error) from error
        for row, text in enumerate(texts):
            if _SPACE in text:
                parts = self._processor.encode(text.split(_SPACE))
                encoded[row] = parts[0] + [i for part in parts[1:] for i in itertools.chain(self._space_ids, part)]
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Pad and EOS are empty; unknown and broken byte sequences give U+FFFD.

        Raises:
          CalrecError: if an id is not in the vocabulary.
        """
        return self.decode_many([ids])[0]

    def decode_many(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence of ids; see `decode`."""
        rows = [[int(i) for i in ids] for ids in batch]
        limit = self.vocab_size
        wrong = next((i for ids in rows for i in ids if not 0 <= i < limit), None)
        if wrong is not None:
            raise CalrecError(f"Token id {wrong} is not in the vocabulary of {limit}; it is another tokenizer's.")
        return [self._decode_known(ids) for ids in rows]

    def _decode_known(self, ids: list[int]) -> str:
        if UNKNOWN_ID not in ids:
            return self._processor.decode(ids) if ids else ""
        runs = itertools.groupby(ids, key=lambda i: i == UNKNOWN_ID)
        return "".join(
            _REPLACEMENT * len(run) if unknown else self._processor.decode(run)
            for unknown, run in ((unknown, list(group)) for unknown, group in runs)
        )

    def save(self, path: Path) -> None:
        """Writes the model's bytes, atomically."""
        with artifacts.atomic_file(path) as temporary:
            Path(temporary).write_bytes(self.model)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads a tokenizer folder, of the house or imported with a model.

        Raises:
          CalrecError: if the folder is not a complete tokenizer or its model was changed.
        """
        folder = Path(folder)
        manifest = artifacts.read_manifest(folder, kind="tokenizer")
        if "file" in manifest["settings"]:
            from calrec_jax.pretrained import tokenizer as imported

            return imported.load(folder, manifest)
        try:
            tokenizer = cls((folder / MODEL_FILE).read_bytes())
        except OSError as error:
            raise CalrecError(f"{folder / MODEL_FILE} cannot be read ({error.strerror}). {_AGAIN}") from error
        if tokenizer.fingerprint != manifest["fingerprint"]:
            raise CalrecError(f"{folder / MODEL_FILE} is not the model its manifest names. {_AGAIN}")
        return tokenizer


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, symbols: Sequence[str] = (), split_by_whitespace: bool = True
) -> bytes:
    """Trains a SentencePiece unigram model, in process; the same input gives the same bytes.

    Args:
      texts: what to learn from.
      vocab_size: most pieces wanted, the special, byte and symbol pieces included; a small catalogue gives fewer.
      symbols: texts that become one piece each, wherever they occur (of two that fit, the longer one).
      split_by_whitespace: whether no learnt piece spans words. False learns phrases: fewer tokens, rarer ones.

    Returns:
      The serialised model.

    Raises:
      CalrecError: if there is no text, or vocab_size is too small for the symbols, bytes and characters.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CalrecError("No text to train a tokenizer on: the catalogues are empty.")
    symbols = [symbol for symbol in dict.fromkeys(symbols) if symbol and _SPACE not in symbol]
    needed = _SPECIAL_PIECES + _BYTE_PIECES + len(symbols)
    if vocab_size <= needed:
        raise CalrecError(
            f"vocab_size={vocab_size} is too small: {len(symbols)} whole-piece symbols, {_BYTE_PIECES} bytes and "
            f"{_SPECIAL_PIECES} special ids take {needed}. Raise vocab.vocab_size or vocab.whole_sentences_min_count."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            user_defined_symbols=[symbol.replace(" ", _SPACE) for symbol in symbols],
            split_by_whitespace=split_by_whitespace,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNKNOWN_ID,
            bos_id=-1,
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            max_sentence_length=max(len(text.encode()) for text in texts) + 1,  # longer ones would be left out
            num_threads=1,  # more would make the pieces depend on the machine
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise CalrecError(
            f"SentencePiece could not learn {vocab_size} pieces from {len(texts)} texts ({error}). "
            "Set vocab.vocab_size higher if it is below the number of characters plus symbols."
        ) from error
    return model.getvalue()


def template_symbols(template: templates.Template) -> list[str]:
    """The template's sentences and field names, each a piece of its own."""
    return [templates.INTRO, templates.FIRST, templates.NEXT, *template.field_prefixes]


def whole_sentences(datasets: Sequence[Dataset], template: templates.Template, min_count: int) -> list[str]:
    """Attribute sentences other than the title that at least `min_count` items share, most frequent first (0: none)."""
    if not min_count:
        return []
    counts = collections.Counter(sentence for sentences in _sentences(datasets, template) for sentence in sentences)
    frequent = [(sentence, count) for sentence, count in counts.items() if count >= min_count]
    return [sentence for sentence, _ in sorted(frequent, key=lambda pair: (-pair[1], pair[0]))]


def _sentences(datasets: Sequence[Dataset], template: templates.Template) -> Iterator[list[str]]:
    keep = [i for i, name in enumerate(template.attributes) if name != "title"]
    for dataset in datasets:
        columns = [dataset.attributes[name] for name in template.attributes]
        for values in zip(*columns, strict=True):
            sentences = template.attribute_sentences(dict(zip(template.attributes, values, strict=True)))
            yield [sentences[i] for i in keep]


def _made_from(datasets: Sequence[Dataset], template: templates.Template) -> dict[str, str]:
    """Role to hash of the inputs; a CalrecError if they do not belong together."""
    made_from = {"template": template.fingerprint}
    for dataset in datasets:
        if dataset.template != template.fingerprint:
            raise CalrecError(f"Dataset {dataset.name!r} was made with another template. Run `calrec prepare` again.")
        role = f"dataset/{dataset.name}"
        if role in made_from:
            raise CalrecError(f"vocab: two datasets are named {dataset.name!r}; give each its own name.")
        made_from[role] = dataset.hash
    return made_from


@gin.configurable("vocab")
def make_tokenizer(
    out: str | Path,
    datasets: Sequence[Dataset],
    template: templates.Template,
    *,
    vocab_size: int = 4096,
    whole_sentences_min_count: int = 4,
    split_by_whitespace: bool = True,
) -> Tokenizer:
    """Makes the tokenizer folder from the catalogues' texts, or loads it when it is there already.

    Args:
      out: the folder: `sentencepiece.model` and `manifest.json`.
      datasets: whose catalogues to learn from; test purchases are not read, only item texts.
      template: the one the datasets' texts were made with.
      vocab_size: most pieces wanted.
      whole_sentences_min_count: an attribute sentence that this many items share is one piece; 0 is off. These take at
        most half of what bytes and the template leave of `vocab_size`, the most frequent first; the manifest counts
        those left out.
      split_by_whitespace: see `train_tokenizer`.

    Raises:
      CalrecError: if a dataset has texts of another template, the settings do not fit, or `out` holds a tokenizer made
        from something else.
    """
    out = Path(out)
    if not datasets:
        raise CalrecError("vocab needs at least one dataset.")
    if whole_sentences_min_count < 0:
        raise CalrecError(f"vocab.whole_sentences_min_count={whole_sentences_min_count}: 0 (off) or a count.")
    made_from = _made_from(datasets, template)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "whole_sentences_min_count": whole_sentences_min_count,
        "split_by_whitespace": split_by_whitespace,
    }
    if artifacts.is_done(out, kind="tokenizer", made_from=made_from, settings=settings):
        _log.info("%s: already made, skipped.", out)
        return Tokenizer.load(out)
    shared = whole_sentences(datasets, template, whole_sentences_min_count)
    symbols = template_symbols(template)
    kept = shared[: max(0, vocab_size - _SPECIAL_PIECES - _BYTE_PIECES - len(symbols)) // 2]
    texts = (text for dataset in datasets for text in dataset.texts)
    model = train_tokenizer(
        texts, vocab_size=vocab_size, symbols=symbols + kept, split_by_whitespace=split_by_whitespace
    )
    tokenizer = Tokenizer(model)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / MODEL_FILE)
    artifacts.write_manifest(
        out,
        kind="tokenizer",
        made_from=made_from,
        settings=settings,
        fingerprint=tokenizer.fingerprint,
        pieces=tokenizer.vocab_size,
        whole_sentences=len(kept),
        whole_sentences_left_out=len(shared) - len(kept),
    )
    return tokenizer
