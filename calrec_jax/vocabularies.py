"""Tokenizers as SeqIO vocabularies, the house's and imported ones: the same ids in Python and inside tf.data.

Notable: `encode` and `decode` are the `Tokenizer`'s own, so what SeqIO prints and scores is what the rest of the line
reads and writes; `encode_tf` runs TensorFlow Text on the same model and repeats the one thing the tokenizer adds to it
(U+2581, which SentencePiece writes for a space, is encoded as its three bytes). A file is named rather than bytes,
since SeqIO compares and copies vocabularies by their arguments. For a `tokenizer.json` TensorFlow has no operation, so
inside tf.data its library is called as it is everywhere else.
"""

import functools
import pathlib
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from calrec_jax import artifacts
from calrec_jax.pretrained.tokenizer import JSON_FILE, SENTENCEPIECE_FILE
from calrec_jax.tokenizer import EOS_ID, MODEL_FILE, PAD_ID, Tokenizer

_SPACE = "▁"  # U+2581


@functools.lru_cache(maxsize=8)
def _load(folder: str, manifest_hash: str) -> Tokenizer:
    del manifest_hash  # a tokenizer made anew in the same folder is another one
    return Tokenizer.load(folder)


def encode_in_graph(tokenizer: Any, space_ids: np.ndarray, texts: tf.Tensor) -> tf.RaggedTensor:
    """Token ids of texts, as `Tokenizer.encode_many` gives them.

    Args:
      tokenizer: TensorFlow Text's, of the same model (`CalrecVocabulary.tf_tokenizer`).
      space_ids: `CalrecVocabulary.space_ids`.
      texts: string [N].

    Returns:
      RaggedTensor [N, (tokens)] int32.
    """
    parts = tf.strings.split(texts, _SPACE)  # [N, (parts)]; one part where the character does not occur
    ids = tokenizer.tokenize(parts.flat_values)
    spaces_of = tf.constant(space_ids, tf.int32)
    splits = parts.row_splits
    is_first = tf.scatter_nd(splits[:-1, None], tf.ones_like(splits[:-1]), tf.shape(parts.flat_values, tf.int64))
    before = tf.where(is_first > 0, tf.zeros_like(is_first), tf.size(spaces_of, tf.int64))
    count = tf.reduce_sum(before) // tf.size(spaces_of, tf.int64)
    spaces = tf.RaggedTensor.from_row_lengths(tf.tile(spaces_of, count[None]), before)
    joined = tf.concat([spaces, tf.cast(ids, tf.int32)], axis=1)
    return tf.RaggedTensor.from_row_splits(joined.flat_values, tf.gather(joined.row_splits, splits))


def load_vocabulary(
    folder: str | pathlib.Path,
) -> "CalrecVocabulary | JsonVocabulary | ImportedSentencePieceVocabulary":
    """The vocabulary of a tokenizer folder, of the house or imported.

    Raises:
      CalrecError: the folder is not a complete tokenizer.
    """
    settings = artifacts.read_manifest(folder, kind="tokenizer")["settings"]
    if settings.get("file") == JSON_FILE:
        return JsonVocabulary(folder)
    return ImportedSentencePieceVocabulary(folder) if settings.get("file") else CalrecVocabulary(folder)


class _OfFolder:
    """What the vocabularies of all tokenizer folders share.

    Args:
      folder: the tokenizer's.

    Raises:
      CalrecError: the folder is not a complete tokenizer.
    """

    def __init__(self, folder: str | pathlib.Path):
        self._folder = str(folder)
        self._hash = artifacts.read_manifest(folder, kind="tokenizer")["hash"]
        _load(self._folder, self._hash)  # says now what is wrong with it

    @property
    def calrec_tokenizer(self) -> Tokenizer:
        """The tokenizer itself."""
        return _load(self._folder, self._hash)


class CalrecVocabulary(_OfFolder, seqio.SentencePieceVocabulary):
    """A tokenizer folder as a `seqio.Vocabulary`: 0 pad, 1 EOS, 2 unknown, no BOS and no extra ids.

    Two vocabularies are equal when they hold the same model, wherever it lies.
    `decode_tf` is TensorFlow Text's: it writes an unknown id as SentencePiece does (` ⁇ `), where `decode` has U+FFFD.

    Args:
      folder: the tokenizer's, as `calrec vocab` wrote it.

    Raises:
      CalrecError: the folder is not a complete tokenizer.
    """

    def __init__(self, folder: str | pathlib.Path):
        _OfFolder.__init__(self, folder)
        seqio.SentencePieceVocabulary.__init__(self, str(pathlib.Path(folder) / MODEL_FILE), extra_ids=0)

    @property
    def pad_id(self) -> int:
        """0, which also starts a segment: SeqIO's feature converters begin decoder inputs with it."""
        return PAD_ID

    @property
    def bos_id(self) -> None:
        """None: no piece begins a text."""
        return None

    @property
    def eos_id(self) -> int:
        """1."""
        return EOS_ID

    def _encode(self, s: str) -> list[int]:
        return self.calrec_tokenizer.encode(s)

    def _decode(self, ids: list[int]) -> str:
        return self.calrec_tokenizer.decode(ids)

    def encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        """Token ids of one text or of several, without EOS.

        Args:
          s: string scalar or [N].

        Returns:
          [tokens] int32, or a RaggedTensor [N, (tokens)].
        """
        s = tf.convert_to_tensor(s)
        encoded = self._encode_many_tf(tf.reshape(s, [-1]))
        return encoded.flat_values if s.shape.rank == 0 else encoded

    def _encode_many_tf(self, texts: tf.Tensor) -> tf.RaggedTensor:
        return encode_in_graph(self.tf_tokenizer, self.space_ids, texts)

    @functools.cached_property
    def space_ids(self) -> np.ndarray:
        """Ids of the character U+2581, which is encoded as its bytes."""
        return np.asarray(self.calrec_tokenizer.encode(_SPACE), np.int32)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, CalrecVocabulary) and other.calrec_tokenizer.model == self.calrec_tokenizer.model
        return bool(same)

    def __hash__(self) -> int:
        return hash(self.calrec_tokenizer.model)

    def __str__(self) -> str:
        return f"CalrecVocabulary({self._folder}, fingerprint={self.calrec_tokenizer.fingerprint[:12]})"


class _Imported(_OfFolder):
    """What vocabularies of imported tokenizers share: their special ids.

    Args:
      folder: the tokenizer's, as `calrec import_hf` or `calrec vocab` of a run from an imported model wrote it.

    Raises:
      CalrecError: the folder is not a complete tokenizer.
    """

    @property
    def pad_id(self) -> int:
        """The family's; SeqIO itself fills rows with 0, whatever that is here: segments say which places are real."""
        return self.calrec_tokenizer.pad_id

    @property
    def bos_id(self) -> int:
        """What a segment begins with: BOS, or what separates documents in families without one."""
        return self.calrec_tokenizer.start_id

    @property
    def eos_id(self) -> int:
        """What ends an item."""
        return self.calrec_tokenizer.eos_id

    @property
    def unk_id(self) -> None:
        """None: every byte has a token, and an id without one decodes to U+FFFD."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        """V, rows of the model's embedding."""
        return self.calrec_tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self.calrec_tokenizer.encode(s)

    def _decode(self, ids: list[int]) -> str:
        return self.calrec_tokenizer.decode(ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and other.calrec_tokenizer.fingerprint == self.calrec_tokenizer.fingerprint

    def __hash__(self) -> int:
        return hash(self.calrec_tokenizer.fingerprint)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self._folder}, fingerprint={self.calrec_tokenizer.fingerprint[:12]})"


class JsonVocabulary(_Imported, seqio.Vocabulary):
    """A `tokenizer.json` as a `seqio.Vocabulary`; ids are the library's in Python and inside tf.data alike."""

    def __init__(self, folder: str | pathlib.Path):
        _Imported.__init__(self, folder)
        seqio.Vocabulary.__init__(self, extra_ids=0)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        """Ids of one text [tokens] int32, or of several, a RaggedTensor [N, (tokens)]."""
        s = tf.convert_to_tensor(s)
        values, lengths = tf.numpy_function(self._encode_numpy, [tf.reshape(s, [-1])], [tf.int32, tf.int64])
        values, lengths = tf.ensure_shape(values, [None]), tf.ensure_shape(lengths, [None])
        return values if s.shape.rank == 0 else tf.RaggedTensor.from_row_lengths(values, lengths)

    def _encode_numpy(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self.calrec_tokenizer.encode_many([text.decode("utf-8", "replace") for text in texts.tolist()])
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.array([i for row in rows for i in row], np.int32), lengths

    def _decode_tf(self, ids: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
        """Texts [...] of ids [..., tokens]."""
        if isinstance(ids, tf.RaggedTensor):
            return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)
        texts = tf.numpy_function(self._decode_numpy, [ids], tf.string)
        return tf.ensure_shape(texts, ids.shape[:-1])

    def _decode_numpy(self, ids: np.ndarray) -> np.ndarray:
        rows = self.calrec_tokenizer.decode_many(ids.reshape(-1, ids.shape[-1]).tolist())
        return np.array([row.encode() for row in rows], object).reshape(ids.shape[:-1])


class ImportedSentencePieceVocabulary(_Imported, seqio.SentencePieceVocabulary):
    """A `tokenizer.model` that came with a model, as a `seqio.SentencePieceVocabulary` with the model's own ids."""

    def __init__(self, folder: str | pathlib.Path):
        _Imported.__init__(self, folder)
        seqio.SentencePieceVocabulary.__init__(self, str(pathlib.Path(folder) / SENTENCEPIECE_FILE), extra_ids=0)
