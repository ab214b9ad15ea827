"""The house's tokenizer as a SeqIO vocabulary: the same ids in Python and inside tf.data.

Notable: `encode` and `decode` are the `Tokenizer`'s own, so what SeqIO prints and scores is what the rest of the line
reads and writes; `encode_tf` runs TensorFlow Text on the same model and repeats the one thing the tokenizer adds to it
(U+2581, which SentencePiece writes for a space, is encoded as its three bytes). A file is named rather than bytes,
since SeqIO compares and copies vocabularies by their arguments.
"""

import functools
import pathlib
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from calrec_jax import artifacts
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


class CalrecVocabulary(seqio.SentencePieceVocabulary):
    """A tokenizer folder as a `seqio.Vocabulary`: 0 pad, 1 EOS, 2 unknown, no BOS and no extra ids.

    Two vocabularies are equal when they hold the same model, wherever it lies.
    `decode_tf` is TensorFlow Text's: it writes an unknown id as SentencePiece does (` ⁇ `), where `decode` has U+FFFD.

    Args:
      folder: the tokenizer's, as `calrec vocab` wrote it.

    Raises:
      CalrecError: the folder is not a complete tokenizer.
    """

    def __init__(self, folder: str | pathlib.Path):
        self._folder = str(folder)
        self._hash = artifacts.read_manifest(folder, kind="tokenizer")["hash"]
        _load(self._folder, self._hash)  # says now what is wrong with it
        super().__init__(str(pathlib.Path(folder) / MODEL_FILE), extra_ids=0)

    @property
    def calrec_tokenizer(self) -> Tokenizer:
        """The tokenizer itself."""
        return _load(self._folder, self._hash)

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
