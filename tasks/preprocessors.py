"""From texts to the tokens of an example: each segment tokenised alone, the oldest items left out.

Notable: `tokenise` depends on the tokenizer alone, so it runs before the cache; `trim_history` depends on the lengths
of the run and comes after. Both give what `build_examples` gives for the same user, id for id.
"""

from collections.abc import Callable, Mapping

import seqio
import tensorflow as tf

from calrec_jax.errors import CalrecError
from calrec_jax.vocabularies import CalrecVocabulary

Example = dict[str, tf.Tensor]

# What rides along with `inputs` and `targets`, as `tokenise` leaves it: name to dtype and rank.
ALONG = {
    "segment_lengths": (tf.int32, 1),
    "items": (tf.int32, 1),
    "target_user": (tf.int32, 0),
    "target_text": (tf.int32, 0),
}


def tokenise(dataset: tf.data.Dataset, *, vocabulary: CalrecVocabulary, max_target_tokens: int) -> tf.data.Dataset:
    """Turns `segments` and `targets` into token ids.

    Adds `inputs` (int32 [tokens], the segments end to end), `segment_lengths` (int32 [2 + 2n], tokens of each) and the
    texts as `inputs_pretokenized` and `targets_pretokenized`. An item has at most `max_target_tokens` − 1 tokens, in
    the history as in `targets`, where EOS follows.
    """

    def one(example: Example) -> Example:
        example = dict(example)
        segments = example.pop("segments")
        ids = vocabulary.encode_tf(segments)
        place = tf.range(tf.shape(segments)[0])
        is_item = (place >= 2) & (place % 2 == 0)
        limit = tf.where(is_item, max_target_tokens - 1, tf.int32.max)
        lengths = tf.minimum(tf.cast(ids.row_lengths(), tf.int32), limit)
        kept = tf.ragged.range(tf.cast(ids.row_starts(), tf.int32), tf.cast(ids.row_starts(), tf.int32) + lengths)
        target = vocabulary.encode_tf(example["targets"])[: max_target_tokens - 1]
        return example | {
            "inputs": tf.gather(ids.flat_values, kept.flat_values),
            "segment_lengths": lengths,
            "targets": tf.concat([target, [vocabulary.eos_id]], 0),
            "inputs_pretokenized": tf.strings.reduce_join(segments),
            "targets_pretokenized": example["targets"],
        }

    return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def trim_history(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None = None,
    *,
    max_target_tokens: int,
) -> tf.data.Dataset:
    """Leaves out the oldest items until `inputs` fits `sequence_length["inputs"]`, the start token counted as well.

    Nothing is trimmed where no length is given. At least one item of a history stays.

    Raises:
      CalrecError: `sequence_length["targets"]` is less than the tokens an item may have, so SeqIO would cut EOS.
    """
    lengths = sequence_length or {}
    target_length = lengths.get("targets")
    if target_length is not None and target_length < max_target_tokens:
        raise CalrecError(
            f"sequence_length['targets']={target_length}: the task's items have up to {max_target_tokens} tokens, EOS "
            f"included; give at least that, or register the dataset with max_target_tokens={target_length}"
        )
    history_length = lengths.get("inputs")
    if history_length is None:
        return dataset
    trim = trim_oldest(
        lambda example: tf.constant(history_length, tf.int32), f"sequence_length['inputs']={history_length}"
    )
    return dataset.map(trim, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def trim_oldest(budget: Callable[[Example], tf.Tensor | int], setting: str) -> Callable[[Example], Example]:
    """A function of one tokenised example that leaves out its oldest items.

    Args:
      budget: of an example: most tokens of its history, the start token included.
      setting: named when not even one item fits.
    """

    def trim(example: Example) -> Example:
        lengths = example["segment_lengths"]
        frame = 1 + tf.reduce_sum(lengths[:2])  # start INTRO FIRST
        costs = tf.reduce_sum(tf.reshape(lengths[2:], [-1, 2]), 1)  # an item and the NEXT after it
        fits = frame + tf.cumsum(costs, reverse=True) <= budget(example)
        keep = tf.reduce_sum(tf.cast(fits, tf.int32))
        tf.debugging.Assert(
            (keep > 0) | tf.equal(tf.size(costs), 0),
            [f"{setting}: the prompt's frame and its newest item need", frame + costs[-1:], "tokens; raise it"],
        )
        dropped = tf.size(costs) - keep
        tokens = tf.reduce_sum(costs[:dropped])
        inputs = example["inputs"]
        return dict(example) | {
            "inputs": tf.concat([inputs[: frame - 1], inputs[frame - 1 + tokens :]], 0),
            "segment_lengths": tf.concat([lengths[:2], lengths[2 + 2 * dropped :]], 0),
            "items": example["items"][dropped:],
        }

    return trim


def check_along(specs: Mapping[str, tf.TypeSpec]) -> None:
    """Raises a `CalrecError` if the features that ride along are not there, or are not what `tokenise` made."""
    for name, (dtype, rank) in ALONG.items():
        spec = specs.get(name)
        if spec is None:
            raise CalrecError(
                f"the examples have no feature {name!r}: use a task of calrec_jax.tasks.register_dataset, and mix "
                "tasks with register_mixture, since a seqio.Mixture keeps no features but the output features"
            )
        if spec.dtype != dtype or spec.shape.rank != rank:
            raise CalrecError(
                f"feature {name!r} is {spec.dtype.name} of rank {spec.shape.rank}, not {dtype.name} of rank {rank}"
            )


def output_features(vocabulary: CalrecVocabulary) -> dict[str, seqio.Feature]:
    """SeqIO's declaration of `inputs` (a prompt, without EOS) and `targets` (with it)."""
    return {
        "inputs": seqio.Feature(vocabulary=vocabulary, add_eos=False, dtype=tf.int32),
        "targets": seqio.Feature(vocabulary=vocabulary, add_eos=True, dtype=tf.int32),
    }
