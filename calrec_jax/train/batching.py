"""How many tokens, examples and rows a batch has: what a run file says of it, and the examples that follow from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import gin

from calrec_jax.data.dataset import Dataset
from calrec_jax.data.examples import ExampleSet, build_examples, tokenise_catalogue
from calrec_jax.data.packing import Packing
from calrec_jax.errors import CalrecError
from calrec_jax.tokenizer import Tokenizer


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Batching:
    """Rows and what they hold; see docs/architecture.md, "Examples and batches".

    Attributes:
      batch_rows: B, over all devices and hosts.
      row_tokens: L.
      row_examples: K.
      max_history_tokens: prompt budget; the oldest items go first.
      max_target_tokens: an item's tokens, EOS included.
      next_item_loss: "last" (the paper) or "all".
      forced_token_weight: loss weight of item tokens without an alternative in the catalogue; 1 is the paper's.
      sample_forced_tokens: in training, give forced tokens weight 1 with that probability in place of that weight: the
        same expected loss, and the vocabulary is skipped for the rest.
      split_long_histories: long training sequences become several examples rather than lose their oldest items.
      mixture_exponent: a category's rate is users^exponent.
      window: examples that are packed together.
      micro_batches: parts of a batch that are computed one after the other, to save memory; the result is the same (the
        contrastive terms see the whole batch), a step takes a forward pass more.
    """

    batch_rows: int = 32
    row_tokens: int = 1280
    row_examples: int = 8
    max_history_tokens: int = 1024
    max_target_tokens: int = 128
    next_item_loss: str = "last"
    forced_token_weight: float = 1.0
    sample_forced_tokens: bool = False
    split_long_histories: bool = False
    mixture_exponent: float = 0.3
    window: int = 1024
    micro_batches: int = 1

    def __post_init__(self):
        if self.micro_batches < 1:
            raise CalrecError(f"Batching.micro_batches={self.micro_batches}: must be at least 1")
        if self.mixture_exponent < 0:
            raise CalrecError(f"Batching.mixture_exponent={self.mixture_exponent}: must be at least 0")

    def packing(self, next_item_loss: str | None = None) -> Packing:
        """The shapes alone."""
        return Packing(
            self.row_tokens, self.row_examples, self.batch_rows, next_item_loss or self.next_item_loss, self.window
        )

    def examples(self, datasets: Sequence[Dataset], tokenizer: Tokenizer, split: str) -> ExampleSet:
        """Examples of a split under these budgets."""
        catalogue = tokenise_catalogue(
            datasets,
            tokenizer,
            max_target_tokens=self.max_target_tokens,
            forced_token_weight=self.forced_token_weight,
        )
        return build_examples(
            datasets,
            catalogue,
            split=split,
            max_history_tokens=self.max_history_tokens,
            row_tokens=self.row_tokens,
            split_long_histories=self.split_long_histories,
        )
