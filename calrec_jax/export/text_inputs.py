"""Texts into the token ids of an export's functions, inside TensorFlow's graph. Imports TensorFlow and its Text.

Notable: a prompt is what `decode/prompts.py` makes of the same texts, id for id: each segment tokenised alone, items
cut to what training allowed, the oldest items left out when the prompt is too long.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import orbax.export as oex
import tensorflow as tf

from calrec_jax.data import templates
from calrec_jax.errors import CalrecError
from calrec_jax.export.functions import Function, Lengths
from calrec_jax.vocabularies import CalrecVocabulary, encode_in_graph, load_vocabulary

_HISTORIES = "histories"


class TextInputs:
    """The tokenizer and the template in a graph.

    Args:
      folder: of the tokenizer.
      lengths: of the functions.
      start_id: the token before a prompt.

    Raises:
      CalrecError: the tokenizer was imported; it is no part of a graph that stands alone.
    """

    def __init__(self, folder: pathlib.Path, lengths: Lengths, start_id: int):
        vocabulary = load_vocabulary(folder)
        if not isinstance(vocabulary, CalrecVocabulary):
            raise CalrecError(
                f"export.text_inputs=True: {folder} is an imported tokenizer, which runs outside TensorFlow's graph; "
                "set it to False and pass token ids"
            )
        self._vocabulary = vocabulary
        self._tokenizer = self._vocabulary.tf_tokenizer
        self._lengths = lengths
        encode = self._vocabulary.encode
        self._frame = tf.constant([start_id, *encode(templates.INTRO), *encode(templates.FIRST)], tf.int32)
        self._next = tf.constant(encode(templates.NEXT), tf.int32)

    def serving_config(self, name: str, function: Function) -> oex.ServingConfig:
        """The signature `<name>_text`: `histories` [B, H], `candidates` [B, N] or `texts` [B] in place of token ids."""
        names = {"tokens": _HISTORIES} if "lengths" in function.inputs and name != "item" else {"tokens": "texts"}
        rest = {
            key: tf.TensorSpec(
                [None if isinstance(axis, str) else axis for axis in shape], getattr(tf, dtype), name=key
            )
            for key, (dtype, shape) in function.inputs.items()
            if key not in ("tokens", "lengths", "candidates", "candidate_lengths")
        }
        specs = {names["tokens"]: tf.TensorSpec([None] * (1 if name == "item" else 2), tf.string, name=names["tokens"])}
        if "candidates" in function.inputs:
            specs["candidates"] = tf.TensorSpec([None, None], tf.string, name="candidates")

        def encode(inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            out = {key: inputs[key] for key in rest}
            if _HISTORIES in inputs:
                out["tokens"], out["lengths"] = self.prompts(inputs[_HISTORIES])
            else:
                out["tokens"], out["lengths"] = self.texts(inputs["texts"])
            if "candidates" in inputs:
                candidates = inputs["candidates"]
                tokens, lengths = self.texts(tf.reshape(candidates, [-1]))
                shape = tf.shape(candidates)
                out["candidates"] = tf.reshape(tokens, [shape[0], shape[1], self._lengths.text])
                out["candidate_lengths"] = tf.reshape(lengths, shape)
            return out

        return oex.ServingConfig(
            f"{name}_text",
            input_signature=[specs | rest],
            tf_preprocessor=encode,
            tf_postprocessor=self.with_texts if "completions" in function.outputs else None,
            extra_trackable_resources=self._tokenizer,
            method_key=name,
        )

    def texts(self, texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Token ids [N, T] and lengths [N] of texts [N]; longer ones are cut as they were in training."""
        ids = self._encode(texts)
        return ids.to_tensor(shape=[None, self._lengths.text]), tf.cast(ids.row_lengths(), tf.int32)

    def prompts(self, histories: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Token ids [B, L] and lengths [B] of the prompts of histories.

        Args:
          histories: string [B, H], oldest item first; empty texts only fill up.
        """
        items = tf.reshape(histories, [-1])
        ids = self._encode(items)
        following = tf.tile(self._next[None], [tf.size(items), 1])
        ids = tf.concat([ids, tf.RaggedTensor.from_tensor(following)], axis=1)
        real = tf.not_equal(histories, "")
        costs = tf.where(real, tf.reshape(tf.cast(ids.row_lengths(), tf.int32), tf.shape(histories)), 0)
        fits = tf.size(self._frame) + tf.cumsum(costs, axis=1, reverse=True) <= self._lengths.prompt
        keep = real & fits
        told = tf.debugging.Assert(
            tf.reduce_all(tf.reduce_any(keep, axis=1) | ~tf.reduce_any(real, axis=1)),
            [
                "the newest item of a history and the prompt's frame do not fit the model's",
                self._lengths.prompt,
                "tokens",
            ],
        )
        with tf.control_dependencies([told] if told is not None else []):
            chosen = tf.ragged.boolean_mask(ids, tf.reshape(keep, [-1]))
        counts = tf.reduce_sum(tf.cast(keep, tf.int64), axis=1)
        by_user = tf.RaggedTensor.from_row_lengths(chosen, counts).merge_dims(1, 2)
        frames = tf.RaggedTensor.from_tensor(tf.tile(self._frame[None], [tf.shape(histories)[0], 1]))
        prompts = tf.concat([frames, by_user], axis=1)
        return prompts.to_tensor(shape=[None, self._lengths.prompt]), tf.cast(prompts.row_lengths(), tf.int32)

    def with_texts(self, outputs: Mapping[str, tf.Tensor]) -> dict[str, Any]:
        """The outputs and `texts` [B, N], the completions without their EOS."""
        completions = outputs["completions"]
        lengths = outputs["completion_lengths"] - tf.cast(outputs["finished"], tf.int32)
        shape = tf.shape(completions)
        ids = tf.RaggedTensor.from_tensor(tf.reshape(completions, [-1, shape[2]]), lengths=tf.reshape(lengths, [-1]))
        return {**outputs, "texts": tf.reshape(self._tokenizer.detokenize(ids), shape[:2])}

    def _encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        return encode_in_graph(self._tokenizer, self._vocabulary.space_ids, texts)[:, : self._lengths.text]
