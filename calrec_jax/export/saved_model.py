"""Functions as a TensorFlow SavedModel, by orbax-export: served by TensorFlow alone. Imports TensorFlow.

    import tensorflow as tf
    user = tf.saved_model.load("runs/toys/exports/saved_model").signatures["user"]
    user(tokens=tokens, lengths=lengths)["user_embedding"]

Notable: prompts and texts may be shorter than the model's own lengths; they are filled up in the graph. With text
inputs, the template, the tokenizer and the cut of old items are in the graph, too; whoever loads that model must
register TensorFlow Text's operations first (`import tensorflow_text`; TensorFlow Serving has them).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import orbax.export as oex
import tensorflow as tf

from calrec_jax.export.functions import Function
from calrec_jax.export.text_inputs import TextInputs

# Each axis that a caller may leave shorter: which length it is filled up to, by input.
_FILLED = ("tokens", "candidates")


def write_saved_model(
    folder: pathlib.Path,
    functions: Mapping[str, Function],
    params: Any,
    platforms: Sequence[str],
    text_inputs: TextInputs | None = None,
) -> None:
    """Writes a SavedModel with a signature a function.

    Args:
      folder: which exists.
      functions: to write; their names are those of the signatures.
      params: of the model.
      platforms: that the functions are lowered for: "cpu", "cuda", "rocm", "tpu".
      text_inputs: adds a signature `<function>_text` for each function, which takes texts.
    """
    module = oex.JaxModule(
        params,
        {name: function.call for name, function in functions.items()},
        trainable=False,
        input_polymorphic_shape={
            name: {key: ", ".join(map(str, shape)).lower() for key, (_, shape) in function.inputs.items()}
            for name, function in functions.items()
        },
        jax2tf_kwargs={name: {"native_serialization_platforms": tuple(platforms)} for name in functions},
        jit_compile={name: True for name in functions},
    )
    configs = [_tokens_in(name, function) for name, function in functions.items()]
    if text_inputs is not None:
        configs += [text_inputs.serving_config(name, function) for name, function in functions.items()]
    oex.ExportManager(module, configs).save(str(folder))


def _tokens_in(name: str, function: Function) -> oex.ServingConfig:
    """The signature of a function as it is, but for axes that are filled up."""

    def fill(inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {key: fill_up(value, function.inputs[key][1]) for key, value in inputs.items()}

    specs = {
        key: tf.TensorSpec(_open_axes(key, shape), getattr(tf, dtype), name=key)
        for key, (dtype, shape) in function.inputs.items()
    }
    return oex.ServingConfig(name, input_signature=[specs], tf_preprocessor=fill, method_key=name)


def _open_axes(name: str, shape: tuple[int | str, ...]) -> list[int | None]:
    """The shape that a caller sees: symbols are open, and so is the last axis of what is filled up."""
    axes = [None if isinstance(axis, str) else axis for axis in shape]
    return [*axes[:-1], None] if name in _FILLED else axes


def fill_up(array: tf.Tensor, shape: tuple[int | str, ...]) -> tf.Tensor:
    """`array` with zeros behind its last axis up to what `shape` has there.

    A longer axis fails in the graph, naming both lengths: nothing is cut in silence.
    """
    if isinstance(shape[-1], str) or array.shape[-1] == shape[-1]:
        return array
    length = tf.shape(array)[-1]
    message = f"at most {shape[-1]} places are known to the model in the last axis"
    with tf.control_dependencies([tf.debugging.assert_less_equal(length, shape[-1], message)]):
        padding = [[0, 0]] * (len(shape) - 1) + [[0, shape[-1] - length]]
        filled = tf.pad(array, padding)
    return tf.ensure_shape(filled, [None if isinstance(axis, str) else axis for axis in shape])
