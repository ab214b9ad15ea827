"""The SeqIO feature converter that makes the packed batch of docs/architecture.md from a task's tokenised examples.

Notable: the rows are filled by `data/packing.py`, as the trainer's are: a window of examples becomes an `ExampleSet`
whose catalogue is the window's own items, cut out of its tokens. The same examples in the same window give the same
rows, bit for bit, and no loss or mask is defined twice. It needs nothing but the examples, unless tokens are weighted
by the catalogue.

    converter = CalrecFeatureConverter(row_examples=8, next_item_loss="all")
    seqio.get_dataset("calrec_stage1", {"inputs": 1024, "targets": 128}, converter, shuffle=True, batch_size=64)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from calrec_jax.data import packing as packing_lib
from calrec_jax.data.examples import ExampleSet, TokenCatalogue
from calrec_jax.data.packing import Packing
from calrec_jax.errors import CalrecError
from calrec_jax.tasks import preprocessors
from calrec_jax.tokenizer import EOS_ID, PAD_ID

_TOKENS = (*packing_lib.TOKEN_KEYS, *packing_lib.POOL_KEYS)
_FLOATS = ("decoder_loss_weights", "example_mask")
KEYS = (*_TOKENS, *_FLOATS, *packing_lib.EXAMPLE_KEYS)
_SPEC = seqio.FeatureConverter.FeatureSpec


class Ragged(NamedTuple):
    """Rows of several lengths, end to end: row e is `values[splits[e]:splits[e + 1]]`."""

    values: np.ndarray
    splits: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[rows] values of each."""
        return np.diff(self.splits)


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokenised examples that are packed together, as `calrec_jax.tasks` gives them.

    Attributes:
      inputs: tokens of each history, int32.
      targets: tokens of each target and EOS, int32.
      segment_lengths: tokens of INTRO, FIRST, item 1, NEXT, … of each history, int32.
      items: numbers of each history's items and of the target, int32.
      target_user, target_text: [examples] int32.
    """

    inputs: Ragged
    targets: Ragged
    segment_lengths: Ragged
    items: Ragged
    target_user: np.ndarray
    target_text: np.ndarray

    def __len__(self) -> int:
        return len(self.target_user)

    def examples(
        self, catalogue: TokenCatalogue | None = None, start_id: int = PAD_ID, eos_id: int = EOS_ID
    ) -> ExampleSet:
        """The window as an `ExampleSet` over its own items: item n of it is value n of `items`.

        Args:
          catalogue: has the loss weights of the items' tokens; None: all weigh 1.
          start_id: what a segment begins with.
          eos_id: what ends an item.

        Raises:
          CalrecError: the examples do not hold together: they were trimmed by other means than `trim_history`, or come
            from different templates or tokenizers.
        """
        if not np.array_equal(self.targets.values[self.targets.splits[1:] - 1], np.full(len(self), eos_id)):
            raise CalrecError("an example's targets do not end in EOS; give sequence_length['targets'] more tokens")
        starts, lengths = self._item_slices()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        buffer = np.concatenate([self.inputs.values, self.targets.values])
        last = self.items.splits[1:] - 1
        text_ids = np.zeros(len(lengths), np.int32)
        text_ids[last] = self.target_text
        sentences = [self._sentence(place) for place in (0, 1, 3)]
        own = TokenCatalogue(
            tokens=buffer[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)],
            offsets=offsets,
            text_ids=text_ids,
            token_weights=self._token_weights(lengths, catalogue),
            intro=sentences[0],
            first=sentences[1],
            next=sentences[2],
            start_id=start_id,
            eos_id=eos_id,
            cut=0,
        )
        return ExampleSet(
            catalogue=own,
            items=np.arange(len(lengths), dtype=np.int32),
            start=self.items.splits[:-1].astype(np.int64),
            end=self.items.splits[1:].astype(np.int64),
            user=self.target_user,
            group=np.zeros(len(self), np.int32),
            group_sizes=np.array([len(self)], np.int64),
            joint_lengths=self.inputs.lengths + self.targets.lengths,
            alone_lengths=self.targets.lengths,
            dropped_items=0,
        )

    def _item_slices(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the tokens of each of `items` begin in `inputs` followed by `targets`, and how many there are."""
        ends = np.concatenate([[0], np.cumsum(self.segment_lengths.values)])
        counts = self.segment_lengths.lengths
        if not np.array_equal(ends[self.segment_lengths.splits], self.inputs.splits) or not np.array_equal(
            counts, 2 * self.items.lengths
        ):
            raise CalrecError("an example's inputs are not its segments end to end; trim histories by whole items")
        place = np.arange(len(self.segment_lengths.values)) - np.repeat(self.segment_lengths.splits[:-1], counts)
        is_item = (place >= 2) & (place % 2 == 0)
        example = np.repeat(np.arange(len(self)), counts)[is_item]
        starts = np.concatenate([ends[:-1][is_item], len(self.inputs.values) + self.targets.splits[:-1]])
        lengths = np.concatenate([self.segment_lengths.values[is_item], self.targets.lengths - 1])
        order = np.argsort(np.concatenate([example, np.arange(len(self))]), kind="stable")  # a target after its history
        return starts[order].astype(np.int64), lengths[order].astype(np.int64)

    def _sentence(self, place: int) -> np.ndarray:
        """Tokens of the template's sentence at a place among the segments; the same in all examples that have it."""
        at = self.segment_lengths.splits[:-1][self.segment_lengths.lengths > place] + place
        if not len(at):
            return np.zeros(0, np.int32)
        ends = np.concatenate([[0], np.cumsum(self.segment_lengths.values)])
        length = self.segment_lengths.values[at[0]]
        same = np.all(self.segment_lengths.values[at] == length)
        tokens = self.inputs.values[ends[at][:, None] + np.arange(length)] if same else np.zeros((1, 0), np.int32)
        if not same or np.any(tokens != tokens[0]):
            raise CalrecError("examples of different templates or tokenizers cannot be packed together")
        return tokens[0]

    def _token_weights(self, lengths: np.ndarray, catalogue: TokenCatalogue | None) -> np.ndarray:
        size = int(lengths.sum()) + len(lengths)
        if catalogue is None:
            return np.ones(size, np.float32)
        items = self.items.values.astype(np.int64)
        if items.max() >= len(catalogue.lengths) or not np.array_equal(catalogue.lengths[items], lengths):
            raise CalrecError(
                "the converter's catalogue is not the tasks': pass tasks.task_source(task).space.catalogue(…)"
            )
        ends = np.concatenate([[0], np.cumsum(lengths + 1)])
        begins = catalogue.offsets[items] + items
        return catalogue.token_weights[np.arange(size) + np.repeat(begins - ends[:-1], lengths + 1)]


class CalrecFeatureConverter(seqio.FeatureConverter):
    """Examples of `calrec_jax.tasks` to rows of the batch contract; with `pack=False`, one example a row and K = 1.

    SeqIO's `task_feature_lengths` are {"inputs": most tokens of a history, "targets": most tokens of an item}, as in
    the paper's 1,024 and 128; a row has L = inputs + 2·targets tokens, or `row_tokens`.

    Args:
      pack: whether several examples share a row. `seqio.Evaluator` wants False.
      row_tokens: L; None: inputs + 2·targets. Histories lose their oldest items where a row is too short for them.
      row_examples: K.
      next_item_loss: "last" (the paper: only the target is predicted) or "all" (every item but a sequence's first).
      window: examples packed together.
      seed: of the order of a window's rows.
      catalogue: has the loss weights of tokens (`CatalogueSpace.catalogue(forced_token_weight)`); None: all weigh 1.
      start_id: what a segment begins with; the tokenizer's `start_id`.
      eos_id: what ends an item; the tokenizer's `eos_id`.
      apply_length_check: SeqIO's own check of the lengths.

    Raises:
      CalrecError: a setting is not valid.
    """

    TASK_FEATURES: Mapping[str, Any] = {name: _SPEC(dtype=tf.int32) for name in ("inputs", "targets")}
    MODEL_FEATURES: Mapping[str, Any] = {
        name: _SPEC(dtype=tf.float32 if name in _FLOATS else tf.int32) for name in KEYS
    }
    PACKING_FEATURE_DTYPES: Mapping[str, tf.dtypes.DType] = {}  # an unpacked row has segments, too

    def __init__(
        self,
        pack: bool = True,
        *,
        row_tokens: int | None = None,
        row_examples: int = 8,
        next_item_loss: str = "last",
        window: int = 1024,
        seed: int = 0,
        catalogue: TokenCatalogue | None = None,
        start_id: int = PAD_ID,
        eos_id: int = EOS_ID,
        apply_length_check: bool = True,
    ):
        super().__init__(pack=pack, apply_length_check=apply_length_check, bos_id=start_id)
        self.start_id, self.eos_id = start_id, eos_id
        self.row_tokens = row_tokens
        self.seed = seed
        self.catalogue = catalogue
        self._packing = Packing(
            row_tokens=row_tokens if row_tokens is not None else 1,  # set when the lengths are known
            row_examples=row_examples if pack else 1,
            batch_rows=1,
            next_item_loss=next_item_loss,
            window=window,
        )

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """L for tokens, K for examples."""
        row_tokens = self.row_tokens or task_feature_lengths["inputs"] + 2 * task_feature_lengths["targets"]
        examples = ("example_mask", *packing_lib.EXAMPLE_KEYS)
        return {name: self._packing.row_examples if name in examples else row_tokens for name in KEYS}

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        preprocessors.check_along(ds.element_spec)
        lengths = self.get_model_feature_lengths(task_feature_lengths)
        packing = dataclasses.replace(self._packing, row_tokens=lengths["decoder_input_tokens"])
        if self.row_tokens is not None:
            trim = preprocessors.trim_oldest(
                lambda example: packing.row_tokens + 1 - 2 * tf.size(example["targets"]),
                f"row_tokens={self.row_tokens}",
            )
            ds = ds.map(trim, num_parallel_calls=tf.data.AUTOTUNE)
        names = [field.name for field in dataclasses.fields(Window)]

        def fill(window: tf.Tensor, batch: dict[str, Any]) -> dict[str, tf.Tensor]:
            parts = []
            for name in names:
                ragged = isinstance(batch[name], tf.RaggedTensor)
                parts += [batch[name].flat_values, batch[name].row_splits] if ragged else [batch[name]]
            dtypes = [self.MODEL_FEATURES[name].dtype for name in KEYS]
            rows = tf.numpy_function(lambda *args: self._rows(packing, *args), [window, *parts], dtypes)
            return {name: tf.ensure_shape(row, [None, lengths[name]]) for name, row in zip(KEYS, rows, strict=True)}

        ds = ds.map(lambda example: {name: example[name] for name in names}, num_parallel_calls=tf.data.AUTOTUNE)
        windows = ds.ragged_batch(packing.window).enumerate()
        rows = windows.map(fill, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).unbatch()
        count = int(ds.cardinality())
        # An example a row: T5X's eval.py asks for the number, which `unbatch` forgets.
        return rows if self.pack or count < 0 else rows.apply(tf.data.experimental.assert_cardinality(count))

    def _rows(self, packing: Packing, number: np.ndarray, *parts: np.ndarray) -> list[np.ndarray]:
        """The filled rows of one window, in the order of `KEYS`."""
        inputs, targets, segment_lengths, items = (Ragged(parts[i], parts[i + 1]) for i in range(0, 8, 2))
        window = Window(inputs, targets, segment_lengths, items, *parts[8:])
        examples = window.examples(self.catalogue, self.start_id, self.eos_id)
        if self.pack:
            rows = packing_lib.pack_window(examples.lengths, packing, seed=self.seed, window=int(number))
        else:
            rows = list(np.arange(len(window))[:, None])
        batch = packing_lib.fill_rows(examples, rows, packing)
        present = batch["example_mask"] > 0
        batch["target_item"] = np.where(present, window.items.values[batch["target_item"]], 0).astype(np.int32)
        return [batch[name] for name in KEYS]
